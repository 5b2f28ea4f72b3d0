"""torch.nn's recurrent layers on the fast engines: same signature, attributes and errors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from ._layer import Layer
from ._signatures import Device, LSTMCalls, OneStateCalls

__all__ = ["GRU", "LSTM", "RNN", "IndRNN"]


def _no_proj_size(kwargs: dict[str, Any], name: str) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    for key in kwargs:
        raise TypeError(f"{name}.__init__() got an unexpected keyword argument '{key}'")


class LSTM(LSTMCalls):
    r"""Long short-term memory, a drop-in for :class:`torch.nn.LSTM`.

    .. math::
        \begin{array}{ll}
            i_t = \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
            f_t = \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
            g_t = \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
            o_t = \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
            c_t = f_t \odot c_{t-1} + i_t \odot g_t \\
            h_t = o_t \odot \tanh(c_t)
        \end{array}

    Hochreiter & Schmidhuber 1997, the forget gate of Gers et al. 2000; with ``proj_size``,
    :math:`h_t` is multiplied by :math:`W_{hr}` (Sak et al. 2014, arXiv:1402.1128).

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        num_layers: number of layers :math:`L`, each fed by the one before
        bias: whether there are biases
        batch_first: input and output are :math:`(B, T, *)`; states stay as they are
        dropout: probability of an element being zeroed between layers in training
        bidirectional: two directions (:math:`D = 2`), outputs concatenated
        proj_size: size :math:`P` of the projected output; 0 for none (:math:`P = H`)
        device, dtype: of the parameters
        recompute: keep only the states every 64 steps for backward, and compute what lies between
            anew there; an attribute, too

    Inputs: input, (h_0, c_0), reset, lengths
        The state is zero where it is not given, and where ``reset`` is true. Under autocast,
        weights, input and states are cast to its dtype, and the outputs have it (float64 weights,
        and those of a frozen layer, stay as they are, and the rest is cast to theirs).

    Shape:
        - input: :math:`(T, B, I)`, :math:`(B, T, I)` if ``batch_first``, :math:`(T, I)`, or a
          :class:`~torch.nn.utils.rnn.PackedSequence`, of which only valid steps are computed
        - h_0, h_n: :math:`(D \cdot L, B, P)` or :math:`(D \cdot L, P)`
        - c_0, c_n: :math:`(D \cdot L, B, H)` or :math:`(D \cdot L, H)`
        - reset: bool, input's shape without the features, or packed like it; true at the first
          step of a new sequence
        - lengths: integers, :math:`(B)`, valid steps of the rows of padded input
        - output: :math:`(T, B, D \cdot P)` in the form of input

    Outputs: output, (h_n, c_n)

    Attributes:
        weight_ih_l[k]: :math:`(4H, I)`, :math:`(4H, D \cdot P)` for k > 0; gates i, f, g, o
        weight_hh_l[k]: :math:`(4H, P)`
        bias_ih_l[k], bias_hh_l[k]: :math:`(4H)`
        weight_hr_l[k]: :math:`(P, H)`, with ``proj_size`` only

        With the suffix ``_reverse`` for the second direction.

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.LSTM, with its texts

    .. note::
        Backward reads ``output``: like cuDNN's layers, it raises if that was changed in place.

    Example::

        >>> layer = rnnfast.LSTM(10, 20, 2)
        >>> x, h0, c0 = torch.randn(5, 3, 10), torch.randn(2, 3, 20), torch.randn(2, 3, 20)
        >>> output, (hn, cn) = layer(x, (h0, c0))
        >>> output.shape
        torch.Size([5, 3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size, device, dtype,
        )  # fmt: skip
        self._set_recompute(recompute)

    # torch.nn.LSTM's methods, for code that calls or overrides them
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]


class GRU(OneStateCalls):
    r"""Gated recurrent unit, a drop-in for :class:`torch.nn.GRU`.

    .. math::
        \begin{array}{ll}
            r_t = \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
            z_t = \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
            n_t = \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
            h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1}
        \end{array}

    Cho et al. 2014 (arXiv:1406.1078), with the reset gate after the product, as cuDNN and
    torch.nn compute it.

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        num_layers: number of layers :math:`L`, each fed by the one before
        bias: whether there are biases
        batch_first: input and output are :math:`(B, T, *)`; states stay as they are
        dropout: probability of an element being zeroed between layers in training
        bidirectional: two directions (:math:`D = 2`), outputs concatenated
        device, dtype: of the parameters
        recompute: keep only the states every 64 steps for backward, and compute what lies between
            anew there; an attribute, too

    Inputs: input, h_0, reset, lengths
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
        - output: :math:`(T, B, D \cdot H)` in the form of input

    Outputs: output, h_n

    Attributes:
        weight_ih_l[k]: :math:`(3H, I)`, :math:`(3H, D \cdot H)` for k > 0; gates r, z, n
        weight_hh_l[k]: :math:`(3H, H)`
        bias_ih_l[k], bias_hh_l[k]: :math:`(3H)`

        With the suffix ``_reverse`` for the second direction.

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.GRU, with its texts

    .. note::
        Backward reads ``output``: like cuDNN's layers, it raises if that was changed in place.

    Example::

        >>> layer = rnnfast.GRU(10, 20, 2)
        >>> output, hn = layer(torch.randn(5, 3, 10), torch.randn(2, 3, 20))
        >>> output.shape
        torch.Size([5, 3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        _no_proj_size(kwargs, "GRU")
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, device, dtype,
        )  # fmt: skip
        self._set_recompute(recompute)


def _check_nonlinearity(nonlinearity: str) -> None:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")


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
        recompute: taken, and changes nothing: this layer keeps nothing beyond input and output

    Inputs: input, h_0, reset, lengths
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
        - output: :math:`(T, B, D \cdot H)` in the form of input

    Outputs: output, h_n

    Attributes:
        weight_ih_l[k]: :math:`(H, I)`, :math:`(H, D \cdot H)` for k > 0
        weight_hh_l[k]: :math:`(H, H)`
        bias_ih_l[k], bias_hh_l[k]: :math:`(H)`

        With the suffix ``_reverse`` for the second direction.

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.RNN, with its texts

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
        **kwargs: Any,
    ) -> None:
        _no_proj_size(kwargs, "RNN")
        _check_nonlinearity(nonlinearity)
        self.nonlinearity = nonlinearity
        super().__init__(
            "RNN_" + nonlinearity.upper(), input_size, hidden_size, num_layers, bias,
            batch_first, dropout, bidirectional, 0, device, dtype,
        )  # fmt: skip
        self._set_recompute(recompute)


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
        recompute: taken, and changes nothing: this layer keeps nothing beyond input and output

    Inputs: input, h_0, reset, lengths
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
        - output: :math:`(T, B, D \cdot H)` in the form of input

    Outputs: output, h_n

    Attributes:
        weight_ih_l[k]: :math:`(H, I)`, :math:`(H, D \cdot H)` for k > 0
        weight_hh_l[k]: the recurrent weights :math:`u`, :math:`(H)`
        bias_ih_l[k], bias_hh_l[k]: :math:`(H)`

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
    ) -> None:
        _check_nonlinearity(nonlinearity)
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
        self._set_recompute(recompute)

    def reset_parameters(self) -> None:
        """Draw the initial weights anew."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for name, weight in self.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.uniform_(weight, 0.0, 1.0)
            else:
                nn.init.uniform_(weight, -bound, bound)


LAYERS: tuple[type[Layer], ...] = (LSTM, GRU, RNN, IndRNN)
