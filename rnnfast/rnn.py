"""The layers of one gate: the simple RNN and IndRNN."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import Parameter

from . import _norm
from ._layer import no_proj_size
from ._signatures import Device, OneStateCalls

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["RNN", "IndRNN"]


def _root(what: str, name: str, value: Any, seq_len: Any) -> float:
    """What grows to the value over a sequence."""
    if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 1:
        raise ValueError(f"rnnfast: seq_len of {what} must be an int >= 1, got {seq_len!r}")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"rnnfast: {name} of {what} must be a number above 0, got {value!r}")
    return float(value ** (1.0 / seq_len))


class RNN(OneStateCalls):
    r"""Elman RNN, a drop-in for :class:`torch.nn.RNN`.

    .. math::
        h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    or relu in place of tanh. Elman 1990.

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        num_layers: number of layers :math:`L`, each fed by the one before
        nonlinearity: ``'tanh'`` or ``'relu'``
        bias: whether there are biases
        batch_first: input and output are :math:`(B, T, *)`; states stay as they are
        dropout: probability of an element being zeroed between layers in training
        bidirectional: two directions (:math:`D = 2`), outputs concatenated
        device, dtype: of the parameters
        recompute: taken, and changes nothing but for a chosen ``activation``: else this layer keeps
            nothing beyond input and output
        weight_dropout: probability of an entry of `W_hh` being zeroed in training, one mask a call
            for each layer and direction (DropConnect; Merity et al. 2018, arXiv:1708.02182); an
            attribute, too
        input_dropout: probability of a feature of each layer's input being zeroed in training, one
            mask a sequence (Gal & Ghahramani 2016, arXiv:1512.05287); an attribute, too
        recurrent_dropout: probability of a feature of h being zeroed on its way into `W_hh` in
            training, one mask a sequence for each layer and direction (Gal & Ghahramani 2016,
            arXiv:1512.05287). Not with ``layer_norm``; an attribute, too
        zoneout: probability of an entry of h staying as it was at a step in training; in eval that
            part of it stays (Krueger et al. 2017, arXiv:1606.01305). Not with ``layer_norm``; an
            attribute, too
        return_last: the output is that of the last step only, :math:`(B, D \cdot H)`; an
            attribute, too
        activation: in place of ``nonlinearity``: one of :data:`rnnfast.ACTIVATIONS`, with torch's
            definitions and default parameters; an attribute to be read, too
        layer_norm: layer normalisation (Ba et al. 2016, arXiv:1607.06450) of :math:`W_{ih} x_t` and
            of :math:`W_{hh} h_{t-1}` over the units; an attribute to be read, too. Not with
            ``recurrent_dropout`` or ``zoneout``

    Inputs: input, h_0, reset, lengths, mask
        The state is zero where it is not given, and where ``reset`` is true. Under autocast,
        weights, input and states are cast to its dtype, and the outputs have it (float64 weights,
        and those of a frozen layer, stay as they are, and the rest is cast to theirs).

    Shape:
        - input: :math:`(T, B, I)`, :math:`(B, T, I)` if ``batch_first``, :math:`(T, I)`, or a
          :class:`~torch.nn.utils.rnn.PackedSequence`, of which only valid steps are computed
        - h_0, h_n: :math:`(D \cdot L, B, H)` or :math:`(D \cdot L, H)`
        - reset: bool, input's shape without the features, or packed like it; true at the first
          step of a new sequence
        - lengths: integers, :math:`(B)`, valid steps of the rows of padded input
        - mask: bool, input's shape without the features, true at valid steps of padded input
        - output: :math:`(T, B, D \cdot H)` in the form of input; with ``return_last``
          :math:`(B, D \cdot H)`, or :math:`(D \cdot H)`

    Outputs: output, h_n

    Attributes:
        weight_ih_l[k]: :math:`(H, I)`, :math:`(H, D \cdot H)` for k > 0
        weight_hh_l[k]: :math:`(H, H)`
        bias_ih_l[k], bias_hh_l[k]: :math:`(H)`

        norm_ih_l[k], norm_hh_l[k]: gains :math:`(H)`, with ``layer_norm`` only

        With the suffix ``_reverse`` for the second direction.

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.RNN, with its texts; ValueError for
            options that do not go together

    .. note::
        Backward reads ``output``: like cuDNN's layers, it raises if that was changed in place.

    Example::

        >>> layer = rnnfast.RNN(10, 20, 2)
        >>> output, hn = layer(torch.randn(5, 3, 10), torch.randn(2, 3, 20))
        >>> output.shape
        torch.Size([5, 3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        weight_dropout: float = 0.0,
        input_dropout: float = 0.0,
        return_last: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        activation: str | None = None,
        layer_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        no_proj_size(kwargs, "RNN")
        nonlinearity = self._nonlinearity("rnn", nonlinearity, activation, layer_norm)
        self.nonlinearity = nonlinearity
        super().__init__(
            "RNN_" + nonlinearity.upper(), input_size, hidden_size, num_layers, bias,
            batch_first, dropout, bidirectional, 0, device, dtype,
        )  # fmt: skip
        if layer_norm:
            _norm.add(self, device, dtype)
        self._set_options(
            recompute, weight_dropout, input_dropout, False, return_last, recurrent_dropout, zoneout
        )


class IndRNN(OneStateCalls):
    r"""Independently recurrent network: every unit sees only its own past.

    .. math::
        h_t = \text{act}(W_{ih} x_t + b_{ih} + u \odot h_{t-1} + b_{hh})

    Li et al. 2018, arXiv:1803.04831. torch.nn has no such layer; this one takes the arguments of
    :class:`rnnfast.RNN`.

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        num_layers: number of layers :math:`L`, each fed by the one before
        nonlinearity: act, ``'relu'`` or ``'tanh'``
        bias: whether there are biases
        batch_first: input and output are :math:`(B, T, *)`; states stay as they are
        dropout: probability of an element being zeroed between layers in training
        bidirectional: two directions (:math:`D = 2`), outputs concatenated
        device, dtype: of the parameters
        recompute: taken, and changes nothing but for a chosen ``activation``: else this layer keeps
            nothing beyond input and output
        weight_dropout: probability of an entry of `u` being zeroed in training, one mask a call
            for each layer and direction (DropConnect; Merity et al. 2018, arXiv:1708.02182); an
            attribute, too
        input_dropout: probability of a feature of each layer's input being zeroed in training, one
            mask a sequence (Gal & Ghahramani 2016, arXiv:1512.05287); an attribute, too
        residual: :math:`y_l = x_l + f(x_l)` around every layer whose input has as many features as
            its output; states stay those of :math:`f`. An attribute, too
        return_last: the output is that of the last step only, :math:`(B, D \cdot H)`; an
            attribute, too
        activation: in place of ``nonlinearity``: one of :data:`rnnfast.ACTIVATIONS`, with torch's
            definitions and default parameters; an attribute to be read, too
        layer_norm: layer normalisation (Ba et al. 2016, arXiv:1607.06450) of :math:`W_{ih} x_t`
            over the units (:math:`u \odot h_{t-1}` stays what it is); an attribute to be read, too

    Inputs: input, h_0, reset, lengths, mask
        The state is zero where it is not given, and where ``reset`` is true. Under autocast,
        weights, input and states are cast to its dtype, and the outputs have it (float64 weights,
        and those of a frozen layer, stay as they are, and the rest is cast to theirs).

    Shape:
        - input: :math:`(T, B, I)`, :math:`(B, T, I)` if ``batch_first``, :math:`(T, I)`, or a
          :class:`~torch.nn.utils.rnn.PackedSequence`, of which only valid steps are computed
        - h_0, h_n: :math:`(D \cdot L, B, H)` or :math:`(D \cdot L, H)`
        - reset: bool, input's shape without the features, or packed like it; true at the first
          step of a new sequence
        - lengths: integers, :math:`(B)`, valid steps of the rows of padded input
        - mask: bool, input's shape without the features, true at valid steps of padded input
        - output: :math:`(T, B, D \cdot H)` in the form of input; with ``return_last``
          :math:`(B, D \cdot H)`, or :math:`(D \cdot H)`

    Outputs: output, h_n

    Attributes:
        weight_ih_l[k]: :math:`(H, I)`, :math:`(H, D \cdot H)` for k > 0
        weight_hh_l[k]: the recurrent weights :math:`u`, :math:`(H)`
        bias_ih_l[k], bias_hh_l[k]: :math:`(H)`

        norm_ih_l[k]: gain :math:`(H)`, with ``layer_norm`` only

        With the suffix ``_reverse`` for the second direction. :math:`u` starts from
        :math:`\mathcal{U}(0, 1)`, where gradients neither explode nor die at once; the rest
        from :math:`\mathcal{U}(-1/\sqrt{H}, 1/\sqrt{H})`.

    Raises:
        ValueError, RuntimeError, TypeError: as :class:`rnnfast.RNN`

    Example::

        >>> layer = rnnfast.IndRNN(10, 20, 2)
        >>> output, hn = layer(torch.randn(5, 3, 10))
        >>> layer.weight_hh_l0.shape
        torch.Size([20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "relu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        weight_dropout: float = 0.0,
        input_dropout: float = 0.0,
        return_last: bool = False,
        residual: bool = False,
        activation: str | None = None,
        layer_norm: bool = False,
    ) -> None:
        nonlinearity = self._nonlinearity("indrnn", nonlinearity, activation, layer_norm)
        self.nonlinearity = nonlinearity
        # torch.nn checks the arguments and names the weights of a dense layer of no memory ...
        super().__init__(
            "RNN_" + nonlinearity.upper(), input_size, hidden_size, num_layers, bias,
            batch_first, dropout, bidirectional, 0, "meta", dtype,
        )  # fmt: skip
        # ... and here are the real ones
        self.mode = "INDRNN_" + nonlinearity.upper()
        for name in self._flat_weights_names:
            shape = getattr(self, name).shape
            if name.startswith("weight_hh"):
                shape = shape[:1]
            setattr(self, name, Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._init_flat_weights()
        self.reset_parameters()
        if layer_norm:
            _norm.add(self, device, dtype)
        self._set_options(recompute, weight_dropout, input_dropout, residual, return_last)

    def reset_parameters(self) -> None:
        """Draw the initial weights anew."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for name, weight in self.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.uniform_(weight, 0.0, 1.0)
            else:
                nn.init.uniform_(weight, -bound, bound)
        _norm.reset(self)

    def _recurrent(self, what: str, of_last_layer: bool = False) -> list[Parameter]:
        """u of all passes, or those of the last layer."""
        names = [name for name in self._flat_weights_names if name.startswith("weight_hh")]
        if of_last_layer:
            names = names[-2 if self.bidirectional else -1 :]
        found = [self._parameters.get(name) for name in names]
        for name, u in zip(names, found):
            if u is None:
                raise RuntimeError(
                    f"rnnfast: {what} changes recurrent weights that are parameters, got {name}, "
                    "which is computed from others (by a parametrization, say)"
                )
        return [u for u in found if u is not None]

    def constrain_(self, seq_len: int, gamma: float = 2.0) -> Self:
        r"""Clamp the recurrent weights in place, so that gradients do not explode over a sequence.

        .. math::
            |u| \le \gamma^{1/T}

        With relu a gradient grows by at most :math:`\gamma` over :math:`T` steps then (Li et al.
        2018, arXiv:1803.04831, section 3). Call it after each ``optimizer.step()``.

        Args:
            seq_len: number of steps :math:`T`, of the longest sequence
            gamma: the most that a gradient may grow by

        Returns:
            the layer itself

        Raises:
            ValueError: ``seq_len`` below 1, or a ``gamma`` that is not above 0 and finite
            RuntimeError: recurrent weights that are no parameters

        Example::

            >>> layer = rnnfast.IndRNN(10, 20, 4, residual=True).constrain_(784)
        """
        bound = _root("constrain_", "gamma", gamma, seq_len)
        with torch.no_grad():
            for u in self._recurrent("constrain_"):
                u.clamp_(-bound, bound)
        return self

    def init_memory_(self, seq_len: int, gamma: float = 2.0, epsilon: float = 0.5) -> Self:
        r"""Draw the recurrent weights of the last layer anew, for memory over a whole sequence.

        .. math::
            u \sim \mathcal{U}(\epsilon^{1/T}, \gamma^{1/T})

        What enters at the first of :math:`T` steps then counts at the last between
        :math:`\epsilon` and :math:`\gamma` times as much (Li et al. 2018, arXiv:1803.04831, whose
        authors' programs begin so where the last step alone is read). Other layers stay.

        Args:
            seq_len: number of steps :math:`T`
            gamma: upper bound of what is left, as in :meth:`constrain_`
            epsilon: lower bound, above 0

        Returns:
            the layer itself

        Raises:
            ValueError: ``seq_len`` below 1, bounds that are not above 0 and finite, or in the wrong
                order
            RuntimeError: recurrent weights that are no parameters

        Example::

            >>> layer = rnnfast.IndRNN(2, 128, 2, return_last=True).init_memory_(500)
        """
        high = _root("init_memory_", "gamma", gamma, seq_len)
        low = _root("init_memory_", "epsilon", epsilon, seq_len)
        if low > high:
            raise ValueError(
                "rnnfast: epsilon of init_memory_ must be at most gamma, got "
                f"epsilon={epsilon}, gamma={gamma}"
            )
        for u in self._recurrent("init_memory_", of_last_layer=True):
            nn.init.uniform_(u, low, high)
        return self
