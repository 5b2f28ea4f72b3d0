"""The LSTM with recurrent batch normalisation without a module; :mod:`rnnfast.functional` has
it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _batch_norm_stack as _stack
from ._batch_norm import STATISTICS
from ._checks import check_dense
from ._signatures import Input as Form
from ._signatures import States

__all__ = ["batch_norm_lstm"]


def batch_norm_lstm(
    input: Form,
    hx: States | None,
    weights: Sequence[Tensor],
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    lengths: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Form, States]:
    r"""LSTM with recurrent batch normalisation (Cooijmans et al. 2017, arXiv:1603.09025), without a
    module.

    As :class:`rnnfast.BatchNormLSTM`; running statistics as
    :func:`torch.nn.functional.batch_norm` takes them.

    Args:
        input: the sequence, a tensor or a :class:`torch.nn.utils.rnn.PackedSequence`
        hx: initial state ``(h_0, c_0)``; ``None`` means zeros
        weights: flat list, for each layer and direction
            ``w_ih, w_hh, gain_ih, gain_hh, bias, gain_c, bias_c``
        running_mean, running_var: of each layer and direction those of the first :math:`S` steps,
            moved in place in training; float32 ones serve weights of 16 bits, too
        num_layers: number of layers :math:`L`
        bias: whether ``weights`` has ``bias``; ``bias_c`` is always there
        batch_first: input and output are :math:`(B, T, *)`
        dropout: probability of an element being zeroed between layers in training
        training: whether statistics are those of each step's rows, and dropout is applied
        bidirectional: two directions, :math:`D = 2`
        lengths: valid steps of each row of padded input, as :class:`rnnfast.LSTM` takes them
        momentum: part of the batch's statistics in the running ones, in [0, 1]
        eps: :math:`\epsilon`, added to variances

    Shape:
        - input: :math:`(T, B, I)`, :math:`(B, T, I)` if ``batch_first``, :math:`(T, I)` outside of
          training, or packed
        - hx: each :math:`(D \cdot L, B, H)`, or :math:`(D \cdot L, H)` for unbatched input
        - w_ih: :math:`(4H, I)`, or :math:`(4H, D \cdot H)` above the first; w_hh: :math:`(4H, H)`;
          gain_ih, gain_hh, bias: :math:`(4H)`; gain_c, bias_c: :math:`(H)`; gates i, f, g, o
        - running_mean, running_var: each :math:`(S, 9H)`: of :math:`W_{ih} x`, of
          :math:`W_{hh} h` and of :math:`c`
        - lengths: integers, :math:`(B)`
        - Output: ``(output, (h_n, c_n))`` of the same forms, :math:`D \cdot H` features

    Raises:
        RuntimeError: a size, device or number of tensors that does not fit
        ValueError: an input of the wrong rank or dtype, a batch of one row in training, ``dropout``
            or ``momentum`` outside of [0, 1], ``eps`` that is not positive
        TypeError: weights, statistics, hx or options of another type

    Example::

        >>> x, layer = torch.randn(5, 3, 10), rnnfast.BatchNormLSTM(10, 20, max_steps=5)
        >>> output, (h_n, c_n) = rnnfast.functional.batch_norm_lstm(
        ...     x, None, list(layer.parameters()), [layer.running_mean_l0],
        ...     [layer.running_var_l0], training=True)
    """
    from .functional import _check_options  # which imports this module

    _check_options(num_layers, bias, dropout)
    for option, value in (
        ("batch_first", batch_first), ("training", training), ("bidirectional", bidirectional),
    ):  # fmt: skip
        _stack.check_flag(option, value)
    eps, momentum = _stack.numbers(eps, momentum)
    count, each = num_layers * (1 + bidirectional), len(_stack.WEIGHTS) - (not bias)
    flat = _tensors("weights", weights, each, count)
    means = _tensors("running_mean", running_mean, 1, count)
    variances = _tensors("running_var", running_var, 1, count)
    w_ih = flat[0]
    for name, tensors in (("weights", flat), ("running_mean", means), ("running_var", variances)):
        for k, one in enumerate(tensors):
            if one.device != w_ih.device:
                raise RuntimeError(
                    f"rnnfast: {name}[{k}] must be on the device of weights[0], {w_ih.device}, got "
                    f"{one.device}"
                )
    if w_ih.dim() != 2 or w_ih.size(0) == 0 or w_ih.size(0) % 4:
        raise RuntimeError(f"rnnfast: w_ih must have shape (4*H, I), got {tuple(w_ih.shape)}")
    columns = STATISTICS * (w_ih.size(0) // 4)
    for name, all_of_it in (("running_mean", means), ("running_var", variances)):
        for k, one in enumerate(all_of_it):
            wanted = (max(means[k].size(0) if means[k].dim() else 0, 1), columns)
            if one.shape != wanted:
                raise RuntimeError(
                    f"rnnfast: {name}[{k}] must have shape (S, 9*H) = {wanted}, got "
                    f"{tuple(one.shape)}"
                )
    directions: list[Sequence[Tensor | None]] = []
    for k in range(count):
        own: list[Tensor | None] = list(flat[k * each : (k + 1) * each])
        if not bias:
            own.insert(_stack.WEIGHTS.index("bias"), None)
        directions.append(own)
    stack = _stack.Stack(
        directions, means, variances, num_layers, batch_first, float(dropout), bidirectional,
        training, eps, momentum,
    )  # fmt: skip
    result: tuple[Form, States] = _stack.run(stack, input, hx, lengths)
    return result


def _tensors(name: str, found: Any, each: int, count: int) -> list[Tensor]:
    """A list of so many tensors for each of so many layers and directions."""
    if isinstance(found, Tensor) or not isinstance(found, Iterable):
        raise TypeError(f"rnnfast: {name} must be a list of tensors, got {type(found).__name__}")
    tensors = list(found)
    if len(tensors) != each * count:
        raise RuntimeError(
            f"rnnfast: {name} must hold {each} tensors for each of {count} layers and directions "
            f"= {each * count}, got {len(tensors)}"
        )
    for k, one in enumerate(tensors):
        if not isinstance(one, Tensor):
            raise TypeError(f"rnnfast: {name}[{k}] must be a tensor, got {type(one).__name__}")
        if one.layout is not torch.strided:
            check_dense(one, f"{name}[{k}]")
    return tensors
