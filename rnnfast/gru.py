"""The GRU layer."""

from __future__ import annotations

from typing import Any

import torch

from . import _heads, _norm
from ._checks import check_bool
from ._layer import no_proj_size
from ._signatures import Device, OneStateCalls

__all__ = ["GRU"]


def kind_of(who: str, reset_after: Any) -> str:
    """The GRU of this option, as :func:`rnnfast.cells.chosen_cell` calls it."""
    check_bool(who, "reset_after", reset_after)
    return "gru" if reset_after else "gru_before"


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
    torch.nn compute it; with ``reset_after=False`` before it, as the paper does:

    .. math::
        n_t = \tanh(W_{in} x_t + b_{in} + W_{hn} (r_t \odot h_{t-1}) + b_{hn})

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
        weight_dropout: probability of an entry of `W_hh` being zeroed in training, one mask a call
            for each layer and direction (DropConnect; Merity et al. 2018, arXiv:1708.02182); an
            attribute, too
        input_dropout: probability of a feature of each layer's input being zeroed in training, one
            mask a sequence (Gal & Ghahramani 2016, arXiv:1512.05287); an attribute, too
        recurrent_dropout: probability of a feature of h being zeroed on its way into `W_hh` in
            training, one mask a sequence for each layer and direction (Gal & Ghahramani 2016,
            arXiv:1512.05287). Not with ``layer_norm`` or ``reset_after=False``; an attribute, too
        zoneout: probability of an entry of h staying as it was at a step in training; in eval that
            part of it stays (Krueger et al. 2017, arXiv:1606.01305). Not with ``layer_norm`` or
            ``reset_after=False``; an attribute, too
        return_last: the output is that of the last step only, :math:`(B, D \cdot H)`; an
            attribute, too
        activation, gate_activation: of the candidate :math:`n` (tanh above), and of the gates
            (sigmoid): one of :data:`rnnfast.ACTIVATIONS`, with torch's definitions and
            default parameters; attributes to be read, too
        reset_after: whether the reset gate comes after the product (``False``: Keras' argument of
            this name, ONNX' ``linear_before_reset=0``); an attribute to be read, too
        num_heads: number of blocks :math:`n` on the diagonal of `W_hh`, which is zero elsewhere:
            the state of a head of :math:`H/n` units enters the gates of that head alone (Beck et
            al. 2024, arXiv:2405.04517). Not with ``layer_norm``; an attribute to be read, too
        layer_norm: layer normalisation (Ba et al. 2016, arXiv:1607.06450) of :math:`W_{ih} x_t` and
            of :math:`W_{hh} h_{t-1}`, of the gates r and z together over all units and of n by
            itself; an attribute to be read, too. Not with ``reset_after=False``, ``num_heads``,
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
        weight_ih_l[k]: :math:`(3H, I)`, :math:`(3H, D \cdot H)` for k > 0; gates r, z, n
        weight_hh_l[k]: :math:`(3H, H)`, :math:`(3H, H/n)` with heads: row by row the block that its
            unit belongs to
        bias_ih_l[k], bias_hh_l[k]: :math:`(3H)`

        norm_ih_l[k], norm_hh_l[k]: gains :math:`(3H)`, with ``layer_norm`` only

        With the suffix ``_reverse`` for the second direction.

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.GRU, with its texts; ValueError for
            options that do not go together

    .. note::
        Backward reads ``output``: like cuDNN's layers, it raises if that was changed in place.

    Example::

        >>> layer = rnnfast.GRU(10, 20, 2)
        >>> output, hn = layer(torch.randn(5, 3, 10), torch.randn(2, 3, 20))
        >>> output.shape
        torch.Size([5, 3, 20])
    """

    num_heads: int = 1

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
        weight_dropout: float = 0.0,
        input_dropout: float = 0.0,
        return_last: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        activation: str = "tanh",
        gate_activation: str = "sigmoid",
        reset_after: bool = True,
        num_heads: int = 1,
        layer_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        no_proj_size(kwargs, "GRU")
        _heads.check("GRU", num_heads, hidden_size)
        kind = _norm.kind_of(
            "GRU", kind_of("GRU", reset_after), "gru", layer_norm,
            **{"reset_after=False": not reset_after, "num_heads": num_heads != 1},
        )  # fmt: skip
        self._choose(kind, activation, gate_activation)
        # for who reads them; what is called was chosen above
        self.activation, self.gate_activation = activation, gate_activation
        self.reset_after = reset_after
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, "meta" if num_heads > 1 else device, dtype,
        )  # fmt: skip
        if num_heads > 1:  # else the class says it
            self.num_heads = num_heads
            self._set_heads(num_heads, device)
        if layer_norm:
            _norm.add(self, device, dtype)
        self._set_options(
            recompute, weight_dropout, input_dropout, False, return_last, recurrent_dropout, zoneout
        )
