"""The sLSTM without a module; :mod:`rnnfast.functional` has it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ._layer import SPECS
from ._signatures import FourStates
from ._signatures import Input as Form
from .slstm import mode_of

__all__ = ["slstm"]


def slstm(
    input: Form,
    hx: FourStates | None,
    weights: Sequence[Tensor],
    *,
    num_heads: int = 1,
    forget: str = "sigmoid",
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    reset: Tensor | PackedSequence | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
    mask: Tensor | None = None,
    weight_dropout: float = 0.0,
    input_dropout: float = 0.0,
    return_last: bool = False,
) -> tuple[Form, FourStates]:
    r"""The sLSTM (Beck et al. 2024, arXiv:2405.04517), without a module.

    As :class:`rnnfast.SLSTM`.

    Args:
        input: the sequence, a tensor or a :class:`torch.nn.utils.rnn.PackedSequence`
        hx: initial state ``(h_0, c_0, n_0, m_0)``; ``None`` means zeros
        weights: flat list, for each layer and direction ``w_ih, w_hh, b_ih, b_hh``
        num_heads: number of blocks :math:`n` of w_hh
        forget: the forget gate, ``'sigmoid'`` or ``'exp'``
        num_layers: number of layers :math:`L`
        bias: whether ``weights`` has ``b_ih, b_hh``
        batch_first: input and output are :math:`(B, T, *)`
        dropout: probability of an element being zeroed between layers
        training: whether any dropout is applied
        bidirectional: two directions, :math:`D = 2`
        reset: true at the first step of each new sequence, as :class:`rnnfast.LSTM` takes it
        lengths: valid steps of each row of padded input, as :class:`rnnfast.LSTM` takes them
        recompute: keep only the states every 64 steps for backward, and compute what lies between
            anew there
        mask: true at the valid steps of padded input, as :class:`rnnfast.LSTM` takes it
        weight_dropout, input_dropout: probability of an entry of w_hh (one mask a call), and of a
            feature of a layer's input (one mask a sequence), being zeroed in training
        return_last: the output is that of the last step only

    Shape:
        - input: :math:`(T, B, I)`, :math:`(B, T, I)` if ``batch_first``, :math:`(T, I)`, or packed
        - hx: each :math:`(D \cdot L, B, H)`, or :math:`(D \cdot L, H)` for unbatched input
        - w_ih: :math:`(4H, I)`; w_hh: :math:`(4H, H/n)`; b_ih, b_hh: :math:`(4H)`; gates i, f, g, o
        - reset, mask: bool, input's shape without the features
        - lengths: integers, :math:`(B)`
        - Output: ``(output, (h_n, c_n, n_n, m_n))`` of the same forms, :math:`D \cdot H` features;
          with ``return_last`` an output of :math:`(B, D \cdot H)`

    Raises:
        RuntimeError: a size, device or number of weights that does not fit
        ValueError: an input of the wrong rank or dtype, ``num_heads`` that does not divide
            :math:`H`, another ``forget``, ``dropout`` outside of [0, 1], ``weight_dropout`` or
            ``input_dropout`` outside of [0, 1)
        TypeError: weights, hx or options of another type

    Example::

        >>> x, layer = torch.randn(5, 3, 10), rnnfast.SLSTM(10, 20)
        >>> output, (h_n, c_n, n_n, m_n) = rnnfast.functional.slstm(x, None, layer.all_weights[0])
    """
    from .functional import _layer  # which imports this module

    return _layer(
        "SLSTM", SPECS[mode_of("slstm", forget)], input, hx, reset, weights, num_layers, bias,
        batch_first, dropout, training, bidirectional, lengths, recompute, mask, weight_dropout,
        input_dropout, return_last, num_heads=num_heads,
    )  # fmt: skip
