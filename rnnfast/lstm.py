"""The LSTM layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from . import _heads, _norm
from ._checks import check_bool
from ._signatures import Device, LSTMCalls

__all__ = ["LSTM"]


def _check_forget_bias(forget_bias: Any, bias: bool) -> None:
    if forget_bias is None:
        return
    if isinstance(forget_bias, bool) or not isinstance(forget_bias, (int, float)):
        found = type(forget_bias).__name__
        raise TypeError(f"rnnfast: forget_bias of LSTM must be a number or None, got {found}")
    if not math.isfinite(forget_bias):
        raise ValueError(f"rnnfast: forget_bias of LSTM must be finite, got {forget_bias}")
    if not bias:
        raise ValueError(
            "rnnfast: forget_bias is what the forget gate's bias starts from, and bias=False has "
            f"none; got forget_bias={forget_bias}"
        )


def kind_of(who: str, coupled: Any, peephole: Any) -> str:
    """The LSTM of these options, as :func:`rnnfast.cells.chosen_cell` calls it."""
    check_bool(who, "coupled", coupled)
    check_bool(who, "peephole", peephole)
    if coupled and peephole:
        raise ValueError(
            f"rnnfast: coupled and peephole of {who} can't be combined: an input gate that is "
            "1 - f has no peephole of its own"
        )
    return "coupled_lstm" if coupled else "peephole_lstm" if peephole else "lstm"


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
        weight_dropout: probability of an entry of `W_hh` being zeroed in training, one mask a call
            for each layer and direction (DropConnect; Merity et al. 2018, arXiv:1708.02182); an
            attribute, too
        input_dropout: probability of a feature of each layer's input being zeroed in training, one
            mask a sequence (Gal & Ghahramani 2016, arXiv:1512.05287); an attribute, too
        recurrent_dropout: probability of a feature of h being zeroed on its way into `W_hh` in
            training, one mask a sequence for each layer and direction (Gal & Ghahramani 2016,
            arXiv:1512.05287). Not with ``layer_norm``; an attribute, too
        zoneout: probability of an entry of h, and of c, staying as it was at a step in training;
            in eval that part of it stays. A number, or a pair for h and c (Krueger et al. 2017,
            arXiv:1606.01305). Not with ``proj_size``, ``coupled``, ``peephole`` or
            ``layer_norm``; an attribute, too
        return_last: the output is that of the last step only, :math:`(B, D \cdot P)`; an
            attribute, too
        forget_bias: what the forget gate's bias starts from (its part of b_ih; that of b_hh is
            zero then): 1.0, say, keeps what is remembered at first (Jozefowicz et al. 2015).
            ``None``: drawn like the rest, as torch.nn does
        activation, gate_activation: of the candidate and the cell state (tanh above), and of the
            gates (sigmoid): one of :data:`rnnfast.ACTIVATIONS`, with torch's definitions and
            default parameters; attributes to be read, too
        coupled: the input gate is what the forget gate leaves, :math:`i_t = 1 - f_t` (Greff et al.
            2017, arXiv:1503.04069, "CIFG"); the gates are f, g, o then, a quarter less of weights
            and work
        peephole: the gates see :math:`c`, i and f that of the step before, o the new one (Gers &
            Schmidhuber 2000): :math:`p_i \odot c_{t-1}`, :math:`p_f \odot c_{t-1}` and
            :math:`p_o \odot c_t` are added before their :math:`\sigma`
        cell_clip: bound of :math:`c_t`, which is clamped to [-cell_clip, cell_clip] before it goes
            into :math:`h_t` and on (Sak et al. 2014); ``None`` for none
        num_heads: number of blocks :math:`n` on the diagonal of `W_hh`, which is zero elsewhere:
            the state of a head of :math:`H/n` units enters the gates of that head alone (Beck et
            al. 2024, arXiv:2405.04517). Not with ``proj_size`` or ``layer_norm``; an attribute to
            be read, too
        layer_norm: layer normalisation (Ba et al. 2016, arXiv:1607.06450) of :math:`W_{ih} x_t` and
            of :math:`W_{hh} h_{t-1}` over the gates of all units, and of :math:`c_t` on its way
            into :math:`h_t` (it goes on as it is); an attribute to be read, too. Not with
            ``proj_size``, ``coupled``, ``peephole``, ``cell_clip``, ``num_heads``,
            ``recurrent_dropout`` or ``zoneout``

    Inputs: input, (h_0, c_0), reset, lengths, mask
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
        - mask: bool, input's shape without the features, true at valid steps of padded input
        - output: :math:`(T, B, D \cdot P)` in the form of input; with ``return_last``
          :math:`(B, D \cdot P)`, or :math:`(D \cdot P)`

    Outputs: output, (h_n, c_n)

    Attributes:
        weight_ih_l[k]: :math:`(4H, I)`, :math:`(4H, D \cdot P)` for k > 0; gates i, f, g, o;
            with ``coupled`` 3 gates f, g, o, here and below
        weight_hh_l[k]: :math:`(4H, P)`, :math:`(4H, H/n)` with heads: row by row the block that its
            unit belongs to
        bias_ih_l[k], bias_hh_l[k]: :math:`(4H)`
        weight_hr_l[k]: :math:`(P, H)`, with ``proj_size`` only
        weight_ph_l[k]: :math:`(3H)`, with ``peephole`` only: :math:`p_i, p_f, p_o`

        norm_ih_l[k], norm_hh_l[k]: gains :math:`(4H)`, with ``layer_norm`` only, as
            norm_c_l[k], norm_c_bias_l[k]: gain and bias of c, :math:`(H)`

        With the suffix ``_reverse`` for the second direction.

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.LSTM, with its texts; ValueError for
            options that do not go together

    .. note::
        Backward reads ``output``: like cuDNN's layers, it raises if that was changed in place.

    Example::

        >>> layer = rnnfast.LSTM(10, 20, 2)
        >>> x, h0, c0 = torch.randn(5, 3, 10), torch.randn(2, 3, 20), torch.randn(2, 3, 20)
        >>> output, (hn, cn) = layer(x, (h0, c0))
        >>> output.shape
        torch.Size([5, 3, 20])
    """

    forget_bias: float | None = None
    coupled: bool = False
    peephole: bool = False
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
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        weight_dropout: float = 0.0,
        input_dropout: float = 0.0,
        return_last: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        forget_bias: float | None = None,
        activation: str = "tanh",
        gate_activation: str = "sigmoid",
        cell_clip: float | None = None,
        coupled: bool = False,
        peephole: bool = False,
        num_heads: int = 1,
        layer_norm: bool = False,
    ) -> None:
        _heads.check("LSTM", num_heads, hidden_size, proj_size)
        _check_forget_bias(forget_bias, bias)
        kind = _norm.kind_of(
            "LSTM", kind_of("LSTM", coupled, peephole), "lstm", layer_norm, coupled=coupled,
            peephole=peephole, proj_size=proj_size, cell_clip=cell_clip is not None,
            num_heads=num_heads != 1,
        )  # fmt: skip
        self._choose(kind, activation, gate_activation, cell_clip)
        # for who reads them; what is called was chosen above
        self.activation, self.gate_activation = activation, gate_activation
        self.cell_clip = cell_clip
        if forget_bias is not None:  # else the class says it; torch.nn draws the weights at once
            self.forget_bias = forget_bias
        if coupled:
            self.coupled = True
        super().__init__(
            "GRU" if coupled else "LSTM",  # by which torch.nn knows how many gates there are
            input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size, "meta" if num_heads > 1 else device, dtype,
        )  # fmt: skip
        self.mode = "LSTM"
        if num_heads > 1:  # else the class says it
            self.num_heads = num_heads
            self._set_heads(num_heads, device)
        if peephole:
            self._add_peepholes(device, dtype)
        if layer_norm:
            _norm.add(self, device, dtype)
        self._set_options(
            recompute, weight_dropout, input_dropout, False, return_last, recurrent_dropout, zoneout
        )

    def _add_peepholes(self, device: Device, dtype: torch.dtype | None) -> None:
        self.peephole = True
        for names in self._all_weights:
            name = names[0].replace("weight_ih", "weight_ph")
            p = torch.empty(3 * self.hidden_size, device=device, dtype=dtype)
            bound = 1.0 / math.sqrt(self.hidden_size)  # as all of torch.nn's weights
            setattr(self, name, nn.Parameter(nn.init.uniform_(p, -bound, bound)))
            names.append(name)
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()

    def reset_parameters(self) -> None:
        """Draw the initial weights anew."""
        super().reset_parameters()
        if self.forget_bias is None:
            return
        with torch.no_grad():
            for name in self._flat_weights_names:
                bias = self._parameters.get(name)
                if bias is not None and name.startswith("bias"):
                    gate = 0 if self.coupled else 1
                    of_forget_gate = bias[gate * self.hidden_size : (gate + 1) * self.hidden_size]
                    of_forget_gate.fill_(self.forget_bias if name.startswith("bias_ih") else 0.0)

    def extra_repr(self) -> str:
        """What differs from a default."""
        text = super().extra_repr()
        return text if self.forget_bias is None else f"{text}, forget_bias={self.forget_bias}"

    # torch.nn.LSTM's methods, for code that calls or overrides them
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]
