"""The sLSTM layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _heads
from ._layer import no_proj_size
from ._signatures import Device, SLSTMCalls

__all__ = ["SLSTM"]

FORGET = {"sigmoid": "SLSTM", "exp": "SLSTM_EXP"}


def mode_of(who: str, forget: Any) -> str:
    """The cell with this forget gate, by its layer's ``mode``."""
    if not isinstance(forget, str) or forget not in FORGET:
        raise ValueError(f"rnnfast: forget of {who} must be 'sigmoid' or 'exp', got {forget!r}")
    return FORGET[forget]


class SLSTM(SLSTMCalls):
    r"""The sLSTM: an LSTM with an exponential input gate, normalised, of one head or several.

    .. math::
        \begin{array}{ll}
            \tilde i_t, \tilde f_t, \tilde g_t, \tilde o_t =
                W_{i*} x_t + b_{i*} + W_{h*} h_{t-1} + b_{h*} \\
            \log f_t = \log \sigma(\tilde f_t) \quad \text{or} \quad \tilde f_t, \qquad
                o_t = \sigma(\tilde o_t) \\
            m_t = \max(\log f_t + m_{t-1}, \tilde i_t) \\
            i'_t = \exp(\tilde i_t - m_t), \qquad f'_t = \exp(\log f_t + m_{t-1} - m_t) \\
            c_t = f'_t \odot c_{t-1} + i'_t \odot \tanh(\tilde g_t) \\
            n_t = f'_t \odot n_{t-1} + i'_t \\
            h_t = o_t \odot c_t / n_t
        \end{array}

    Beck et al. 2024, arXiv:2405.04517 (xLSTM), section 2.2, stabilised. There :math:`g` is
    called :math:`z`; this is the recurrence alone, without the block of norms,
    convolution and projections that the paper puts around it. States begin at zero; where
    :math:`c` and :math:`n` are, :math:`m_t = \tilde i_t`. The stabiliser :math:`m` changes no
    output: :math:`c` and :math:`n` stand for :math:`c\,e^m` and :math:`n\,e^m`, so pre-activations
    of any size give finite numbers.

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        num_layers: number of layers :math:`L`, each fed by the one before
        bias: whether there are biases
        batch_first: input and output are :math:`(B, T, *)`; states stay as they are
        dropout: probability of an element being zeroed between layers in training
        bidirectional: two directions (:math:`D = 2`), outputs concatenated
        device, dtype: of the parameters
        num_heads: number of blocks :math:`n` on the diagonal of `W_hh`, which is zero elsewhere:
            the state of a head of :math:`H/n` units enters the gates of that head alone; an
            attribute to be read, too
        forget: the forget gate, ``'sigmoid'`` or ``'exp'``; an attribute to be read, too
        recompute: keep only the states every 64 steps for backward, and compute what lies between
            anew there; an attribute, too
        weight_dropout: probability of an entry of `W_hh` being zeroed in training, one mask a call
            for each layer and direction (DropConnect; Merity et al. 2018, arXiv:1708.02182); an
            attribute, too
        input_dropout: probability of a feature of each layer's input being zeroed in training, one
            mask a sequence (Gal & Ghahramani 2016, arXiv:1512.05287); an attribute, too
        return_last: the output is that of the last step only, :math:`(B, D \cdot H)`; an
            attribute, too

    Inputs: input, (h_0, c_0, n_0, m_0), reset, lengths, mask
        The state is zero where it is not given, and where ``reset`` is true. Under autocast,
        weights, input and states are cast to its dtype, and the outputs have it (float64 weights,
        and those of a frozen layer, stay as they are, and the rest is cast to theirs).

    Shape:
        - input: :math:`(T, B, I)`, :math:`(B, T, I)` if ``batch_first``, :math:`(T, I)`, or a
          :class:`~torch.nn.utils.rnn.PackedSequence`, of which only valid steps are computed
        - h_0, c_0, n_0, m_0 and h_n, c_n, n_n, m_n: :math:`(D \cdot L, B, H)` or
          :math:`(D \cdot L, H)`
        - reset: bool, input's shape without the features, or packed like it; true at the first
          step of a new sequence
        - lengths: integers, :math:`(B)`, valid steps of the rows of padded input
        - mask: bool, input's shape without the features, true at valid steps of padded input
        - output: :math:`(T, B, D \cdot H)` in the form of input; with ``return_last``
          :math:`(B, D \cdot H)`, or :math:`(D \cdot H)`

    Outputs: output, (h_n, c_n, n_n, m_n)

    Attributes:
        weight_ih_l[k]: :math:`(4H, I)`, :math:`(4H, D \cdot H)` for k > 0; gates i, f, g, o
        weight_hh_l[k]: :math:`(4H, H/n)`: row by row the block that its unit belongs to
        bias_ih_l[k], bias_hh_l[k]: :math:`(4H)`

        With the suffix ``_reverse`` for the second direction. Weights are drawn as torch.nn's; the
        forget gate's bias starts from a power law over the units of each head, from 5 down to -7,
        as in the paper's programs (see :meth:`reset_parameters`).

    Raises:
        ValueError: ``hidden_size`` that ``num_heads`` does not divide, another ``forget``, and what
            torch.nn's layers refuse
        RuntimeError, TypeError: as torch.nn.LSTM

    .. note::
        Backward reads ``output``: like cuDNN's layers, it raises if that was changed in place. In
        16 bits :math:`m_n` is rounded as the other states are, so that a state handed on weighs
        less or more than it did; keep streams in float32.

    Example::

        >>> layer = rnnfast.SLSTM(10, 20, 2, num_heads=4)
        >>> output, (hn, cn, nn, mn) = layer(torch.randn(5, 3, 10))
        >>> output.shape, layer.weight_hh_l0.shape
        (torch.Size([5, 3, 20]), torch.Size([80, 5]))
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
        num_heads: int = 1,
        forget: str = "sigmoid",
        recompute: bool = False,
        weight_dropout: float = 0.0,
        input_dropout: float = 0.0,
        return_last: bool = False,
        **kwargs: Any,
    ) -> None:
        if "proj_size" in kwargs:
            raise ValueError("rnnfast: SLSTM has no projection: proj_size is an argument of LSTM")
        no_proj_size(kwargs, "SLSTM")
        mode = mode_of("SLSTM", forget)
        _heads.check("SLSTM", num_heads, hidden_size)
        self.forget, self.num_heads = forget, num_heads
        # torch.nn checks the arguments and names the weights of an LSTM of no memory
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, "meta", dtype,
        )  # fmt: skip
        self.mode = mode
        self._set_heads(num_heads, device)
        self._set_options(recompute, weight_dropout, input_dropout, False, return_last)

    def extra_repr(self) -> str:
        """What differs from a default."""
        text = super().extra_repr()
        return text if self.forget == "sigmoid" else f"{text}, forget={self.forget}"

    def _forget_bias(self, layer: int) -> Tensor:
        units = self.hidden_size // self.num_heads
        depth = layer / max(1, self.num_layers - 1)
        position = torch.arange(units, dtype=torch.float64) / max(1, units - 1)
        bias = 5 - 12 * position ** (0.3 + 1.3 * depth)
        if self.forget == "exp":  # the same factors
            bias = nn.functional.logsigmoid(bias)
        return bias.repeat(self.num_heads)

    def reset_parameters(self) -> None:
        r"""Draw the initial weights anew.

        They are uniform, as torch.nn's, but for the forget gate's bias:

        .. math::
            b_{if} = 5 - 12 \left(\frac{k}{H/n - 1}\right)^{0.3 + 1.3\,l/(L - 1)}, \qquad b_{hf} = 0

        for unit :math:`k` of each head of layer :math:`l`: some units remember, others forget
        ("powerlaw_blockdependent" of the paper's programs). Where :math:`H/n = 1` it is 5, that of
        the first unit, and where :math:`L = 1` the exponent is 0.3. With ``forget='exp'``
        :math:`\log \sigma` of it, so that the factors are the same.
        """
        super().reset_parameters()
        with torch.no_grad():
            for name in self._flat_weights_names:
                bias = self._parameters.get(name)
                if bias is None or not name.startswith("bias"):
                    continue
                of_forget_gate = bias[self.hidden_size : 2 * self.hidden_size]
                if name.startswith("bias_ih"):
                    layer = int(name.removesuffix("_reverse").rpartition("_l")[2])
                    of_forget_gate.copy_(self._forget_bias(layer))
                else:
                    of_forget_gate.zero_()
