"""The LSTM layer."""

from __future__ import annotations

import torch
from torch import nn

from ._signatures import Device, LSTMCalls

__all__ = ["LSTM"]


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
