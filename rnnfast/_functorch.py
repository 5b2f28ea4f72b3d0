"""vmap, grad, vjp and what torch.func makes of them, on the engines: one direction of one layer.

A vmapped dimension of x joins the batch, so that a call stays a call. Per-sample gradients,
``vmap(grad)``, run the recurrence once for all samples (``rnnfast::gate_gradients``) and multiply
the weights' gradients sample by sample. Batched weights are taken one after the other. Everything
else (forward mode, grad of grad, packed rows) is reference.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .cells import CELLS, CellSpec

_functorch = torch._C._functorch
_VMAP, _GRAD = _functorch.TransformType.Vmap, _functorch.TransformType.Grad
# Where the batch is in the arguments of forward, by their places, and of backward; the weights,
# which have none, stand between h0, c0 and reset.
_FORWARD_AXES = {0: 1, 1: 0, 2: 1, 9: 1}
_BACKWARD_AXES = {0: 1, 1: 0, 2: 1, 3: 1, 4: 0, 5: 1, 12: 1, 13: 1, 14: 1}
_FORWARD_WEIGHTS, _BACKWARD_WEIGHTS = range(3, 8), range(6, 11)


def transforms() -> list[Any]:
    """The kinds of the transforms in force, the outermost first."""
    stack = _functorch.get_interpreter_stack()
    return [] if stack is None else [one.key() for one in stack]


def fits() -> bool:
    """Whether the transforms in force are those that this file has rules for: any number of vmaps
    and at most one gradient."""
    kinds = transforms()
    return all(kind in (_VMAP, _GRAD) for kind in kinds) and kinds.count(_GRAD) <= 1


def is_differentiated() -> bool:
    """Whether one of the transforms takes gradients."""
    return _GRAD in transforms()


def _fold(tensor: Tensor | None, dim: int | None, size: int, axis: int) -> Tensor | None:
    """A batched dimension into the batch, which is dimension ``axis``."""
    if tensor is None:
        return None
    if dim is None:
        tensor, dim = tensor.unsqueeze(0).expand(size, *tensor.shape), 0
    return tensor.movedim(dim, axis).flatten(axis, axis + 1)


def _folded(args: Sequence[Any], in_dims: Sequence[Any], size: int, axes: Any) -> list[Any]:
    folded = list(args)
    for place, axis in axes.items():
        folded[place] = _fold(args[place], in_dims[place], size, axis)
    return folded


def _unfold(tensor: Tensor, size: int, axis: int) -> Tensor:
    """The way back; the batched dimension is then ``axis``."""
    return tensor.unflatten(axis, (size, -1))


def _one_by_one(function: Any, info: Any, in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
    outs = [
        function.apply(
            *(a if d is None else a.select(d, k) for a, d in zip(args, in_dims, strict=True))
        )
        for k in range(info.batch_size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*outs, strict=True)), (0,) * len(outs[0])


class Forward(torch.autograd.Function):
    """``rnnfast::forward`` with its arguments; what is saved comes as (T, B, planes, H), so that
    its batch is a dimension."""

    @staticmethod
    def forward(*args: Any) -> Any:
        x = args[0]
        with ops.below_autograd():
            y, h_n, c_n, saved = ops.forward(*args)
        return y, h_n, c_n, saved.unflatten(0, x.shape[:2]) if args[13] else saved

    setup_context = staticmethod(ops._forward_setup)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        none = (None,) * 14
        dout = incoming[:3]
        if all(d is None for d in dout):
            return none
        *inputs, y, saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[:8]
        if not fits() or ops.has_tangent(dout):  # a transform that began after forward
            grads = ops.reference_backward(dout, tuple(inputs[:8]), inputs[8:], ctx, needed)
            return (*grads, *none[8:])
        if not ctx.save:
            y, _, _, saved = Forward.apply(*inputs, None, ctx.cell, ctx.reverse, True)
        grads = Backward.apply(
            *dout, *inputs, y, saved, ctx.cell, ctx.reverse, ops.needs_mask(needed)
        )
        return (*(g if n else None for g, n in zip(grads, needed, strict=True)), *none[8:])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        size, save = info.batch_size, args[13]
        if any(in_dims[k] is not None for k in _FORWARD_WEIGHTS):
            return _one_by_one(Forward, info, in_dims, args)
        y, h_n, c_n, saved = Forward.apply(*_folded(args, in_dims, size, _FORWARD_AXES))
        outs = (_unfold(y, size, 1), _unfold(h_n, size, 0), _unfold(c_n, size, 1))
        if not save:
            return (*outs, saved), (1, 0, 1, None)
        return (*outs, _unfold(saved, size, 1)), (1, 0, 1, 1)


class Backward(torch.autograd.Function):
    """``rnnfast::backward`` with its arguments."""

    @staticmethod
    def forward(*args: Any) -> Any:
        args = (*args[:14], args[14].flatten(0, 1), *args[15:])
        with ops.below_autograd():
            return tuple(ops.backward(*args))

    setup_context = staticmethod(ops._backward_setup)
    backward = staticmethod(ops._backward_backward)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        size = info.batch_size
        differentiable = torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in args
        )
        batched_weights = any(in_dims[k] is not None for k in _BACKWARD_WEIGHTS)
        # x that is the same for all: its gradients for several cotangents, without copies of it
        if differentiable or batched_weights or in_dims[3] is None:
            return _one_by_one(Backward, info, in_dims, args)
        return _per_sample(size, *_folded(args, in_dims, size, _BACKWARD_AXES))


class Gates(torch.autograd.Function):
    """``rnnfast::gate_gradients``: dgx, dgh, dm as (T, B, features), dh0, dc0. Nobody
    differentiates it: Backward takes another way where somebody could."""

    @staticmethod
    def forward(*args: Any) -> Any:
        batch = args[3].shape[:2]
        args = (*args[:14], args[14].flatten(0, 1), *args[15:])
        with ops.below_autograd():
            *gates, dh0, dc0 = ops.gate_gradients(*args)
        return *(g.unflatten(0, batch) if g.shape[0] else g for g in gates), dh0, dc0

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        size = info.batch_size
        if any(in_dims[k] is not None for k in _BACKWARD_WEIGHTS):
            return _one_by_one(Gates, info, in_dims, args)
        *gates, dh0, dc0 = Gates.apply(*_folded(args, in_dims, size, _BACKWARD_AXES))
        there = [g.dim() == 3 for g in gates]  # dgh and dm may not be
        outs = [_unfold(g, size, 1) if t else g for g, t in zip(gates, there, strict=True)]
        dims = [1 if t else None for t in there]
        return (*outs, _unfold(dh0, size, 0), _unfold(dc0, size, 1)), (*dims, 0, 1)


def _entered(y: Tensor, h0: Tensor | None, reset: Tensor | None, reverse: bool) -> Tensor:
    """h as it entered each step."""
    first = torch.zeros_like(y[0]) if h0 is None else h0
    h = torch.cat([y[1:], first[None]] if reverse else [first[None], y[:-1]])
    return h if reset is None else torch.where(reset.unsqueeze(-1), 0, h)


def _per_sample(size: int, *args: Any) -> Any:
    """Backward of samples that were folded into the batch: the weights' gradients for each."""
    x, h0, w_ih, w_hr = args[3], args[4], args[6], args[10]
    reset, y, saved, cell, reverse, needs = args[12:18]
    spec = CELLS[cell]
    dgx, dgh, dm, dh0, dc0 = Gates.apply(*args[:17])
    dgh = dgh if dgh.dim() == 3 else dgx

    def of_weights(left: Tensor, right: Tensor) -> Tensor:
        # (T, V B, m), (T, V B, n) -> (V, m, n)
        left, right = (_unfold(t, size, 1).movedim(1, 0).flatten(1, 2) for t in (left, right))
        return left.transpose(1, 2) @ right.to(left.dtype)

    def total(rows: Tensor) -> Tensor:
        return _unfold(rows, size, 1).sum((0, 2))

    grads: list[Tensor] = [x.new_empty(0)] * 8
    dims: list[int | None] = [None] * 8
    wanted = [bool(needs & 1 << k) for k in range(8)]
    if wanted[0]:
        grads[0], dims[0] = _unfold(dgx @ w_ih, size, 1), 1
    if wanted[1]:
        grads[1], dims[1] = _unfold(dh0, size, 0), 0
    if wanted[2]:
        grads[2], dims[2] = _unfold(dc0, size, 1), 1
    if wanted[3]:
        grads[3], dims[3] = of_weights(dgx, x), 0
    if wanted[4]:
        h = _entered(y, h0, reset, reverse)
        grads[4], dims[4] = total(dgh * h) if spec.diagonal else of_weights(dgh, h), 0
    if wanted[5]:
        grads[5], dims[5] = total(dgx), 0
    if wanted[6]:
        grads[6], dims[6] = total(dgh), 0
    if wanted[7] and w_hr is not None:
        grads[7], dims[7] = of_weights(dm, saved[:, :, -1]), 0
    return tuple(grads), tuple(dims)


def direction(
    spec: CellSpec, tensors: Sequence[Tensor | None], reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of one layer under transforms that :func:`fits`; tensors are x, h0, c0, w_ih,
    w_hh, b_ih, b_hh, w_hr."""
    save = is_differentiated() or torch.is_grad_enabled()
    y, h_n, c_n, _ = Forward.apply(*tensors, None, reset, None, spec.id, reverse, save)
    return y, h_n, c_n
