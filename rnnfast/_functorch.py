"""vmap, grad, vjp and what torch.func makes of them, on the engines: one direction of one layer.

A vmapped dimension of x joins the batch, so that a call stays a call. Per-sample gradients,
``vmap(grad)``, run the recurrence once for all samples (``rnnfast::gate_gradients``) and multiply
the weights' gradients sample by sample. Batched weights, and samples of cells with stages, are
taken one after the other. Everything else (forward mode, grad of grad, packed rows) is
reference.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._modes import has_tangent
from .cells import CellSpec, cell_spec

_functorch = torch._C._functorch
_VMAP, _GRAD = _functorch.TransformType.Vmap, _functorch.TransformType.Grad

# The arguments of forward and backward as the operators have them, and where those that have a
# batch have it.
_COTANGENTS = ("dy", "dh_n", "dc_n")
_STATES = ("x", "h0", "c0")
_WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
_INPUTS = (*_STATES, *_WEIGHTS)
_ROWS = ("batch_sizes", "reset")
_BATCH_AXIS = {
    "x": 1, "h0": 0, "c0": 1, "reset": 1, "dy": 1, "dh_n": 0, "dc_n": 1, "y": 1, "saved": 1
}  # fmt: skip


@dataclass(frozen=True)
class _Call:
    """What a function is called with besides tensors, and which tensors these are: functorch's work
    grows with the arguments, so what is None is left out."""

    names: tuple[str, ...]
    cell: int
    reverse: bool
    save: bool = True
    wanted: tuple[str, ...] = ()  # of _INPUTS, whose gradients backward gives

    @property
    def needs(self) -> int:
        return ops.needs_mask(name in self.wanted for name in _INPUTS)

    def arguments(self, names: Sequence[str], tensors: Sequence[Any]) -> list[Any]:
        """The tensors of these names, None for those that are left out."""
        given = dict(zip(self.names, tensors, strict=True))
        return [given.get(name) for name in names]


def _present(names: Sequence[str], tensors: Sequence[Any]) -> tuple[tuple[str, ...], list[Any]]:
    """The names and tensors of those that are there."""
    found = [(n, t) for n, t in zip(names, tensors, strict=True) if t is not None]
    return tuple(n for n, _ in found), [t for _, t in found]


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


def _fold(tensor: Tensor, dim: int | None, size: int, axis: int) -> Tensor:
    """A batched dimension into the batch, which is dimension ``axis``."""
    if dim is None:
        tensor, dim = tensor.unsqueeze(0).expand(size, *tensor.shape), 0
    return tensor.movedim(dim, axis).flatten(axis, axis + 1)


def _folded(call: _Call, tensors: Sequence[Tensor], in_dims: Sequence[Any], size: int) -> list[Any]:
    return [
        _fold(t, d, size, _BATCH_AXIS[name]) if name in _BATCH_AXIS else t
        for name, t, d in zip(call.names, tensors, in_dims, strict=True)
    ]


def _has_batched_weights(call: _Call, in_dims: Sequence[Any]) -> bool:
    return any(d is not None for n, d in zip(call.names, in_dims, strict=True) if n in _WEIGHTS)


def _unfold(tensor: Tensor, size: int, axis: int) -> Tensor:
    """The way back; the batched dimension is then ``axis``."""
    return tensor.unflatten(axis, (size, -1))


def _one_by_one(
    function: Any, info: Any, call: _Call, in_dims: Sequence[Any], tensors: Sequence[Tensor]
) -> Any:
    outs = [
        function.apply(
            call, *(t if d is None else t.select(d, k) for t, d in zip(tensors, in_dims))
        )
        for k in range(info.batch_size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*outs, strict=True)), (0,) * len(outs[0])


class Forward(torch.autograd.Function):
    """``rnnfast::forward`` of a call and its tensors; what is saved comes as (T, B, planes, H), so
    that its batch is a dimension."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Any:
        *inputs, reset = call.arguments((*_INPUTS, "reset"), tensors)
        with ops.below_autograd():
            y, h_n, c_n, saved = ops.forward(
                *inputs, None, reset, None, call.cell, call.reverse, call.save
            )
        return y, h_n, c_n, saved.unflatten(0, inputs[0].shape[:2]) if call.save else saved

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.call, *tensors = inputs
        y, _, c_n, saved = output
        one_state = cell_spec(ctx.call.cell).states == 1
        ctx.mark_non_differentiable(saved, *([c_n] if one_state else []))
        ctx.save_for_backward(*tensors, y, saved)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        call, dout = ctx.call, incoming[:3]
        if all(d is None for d in dout):
            return (None,) * (1 + len(call.names))
        *tensors, y, saved = ctx.saved_tensors
        needed = dict(zip(call.names, ctx.needs_input_grad[1:], strict=True))
        if not fits() or has_tangent(dout):  # a transform that began after forward
            inputs = tuple(call.arguments(_INPUTS, tensors))
            asked = [needed.get(name, False) for name in _INPUTS]
            rows = call.arguments(_ROWS, tensors)
            grads: Any = ops.reference_backward(dout, inputs, rows, call, asked)
            of = dict(zip(_INPUTS, grads, strict=True))
        else:
            if not call.save:
                y, _, _, saved = Forward.apply(replace(call, save=True), *tensors)
            names, cotangents = _present(_COTANGENTS, dout)
            wanted = tuple(name for name in _INPUTS if needed.get(name))
            below = replace(call, names=(*names, *call.names, "y", "saved"), wanted=wanted)
            of = dict(
                zip(wanted, Backward.apply(below, *cotangents, *tensors, y, saved), strict=True)
            )
        return (None, *(of.get(name) if needed[name] else None for name in call.names))

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *tensors: Tensor) -> Any:
        size, dims = info.batch_size, in_dims[1:]
        if _has_batched_weights(call, dims):
            return _one_by_one(Forward, info, call, dims, tensors)
        y, h_n, c_n, saved = Forward.apply(call, *_folded(call, tensors, dims, size))
        outs = (_unfold(y, size, 1), _unfold(h_n, size, 0), _unfold(c_n, size, 1))
        if not call.save:
            return (*outs, saved), (1, 0, 1, None)
        return (*outs, _unfold(saved, size, 1)), (1, 0, 1, 1)


_BACKWARD = (*_COTANGENTS, *_INPUTS, *_ROWS, "y", "saved")


class Backward(torch.autograd.Function):
    """``rnnfast::backward`` of a call and its tensors: the gradients that are wanted."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Any:
        *args, saved = call.arguments(_BACKWARD, tensors)
        with ops.below_autograd():
            grads = ops.backward(*args, saved.flatten(0, 1), call.cell, call.reverse, call.needs)
        return tuple(g for name, g in zip(_INPUTS, grads, strict=True) if name in call.wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors[:-2])

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        call = ctx.call
        args = replace(call, names=call.names[:-2]).arguments(_BACKWARD[:-2], ctx.saved_tensors)
        needed = dict(zip(call.names, ctx.needs_input_grad[1:], strict=True))
        as_operator = SimpleNamespace(
            saved_tensors=args,
            needs_input_grad=[needed.get(name, False) for name in _BACKWARD],
            needs=call.needs,
            cell=call.cell,
            reverse=call.reverse,
        )
        given = dict(zip(call.wanted, incoming, strict=True))
        grads = ops._backward_backward(as_operator, *(given.get(name) for name in _INPUTS))
        of = dict(zip(_BACKWARD, grads))
        return (None, *(of.get(name) for name in call.names))

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *tensors: Tensor) -> Any:
        size, dims = info.batch_size, in_dims[1:]
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        # x that is the same for all: its gradients for several cotangents, without copies of it
        same_x = dims[call.names.index("x")] is None
        # what w_hh is multiplied with in a cell with stages is not h alone
        staged = cell_spec(call.cell).stages
        if differentiable or same_x or staged or _has_batched_weights(call, dims):
            return _one_by_one(Backward, info, call, dims, tensors)
        return _per_sample(size, call, _folded(call, tensors, dims, size))


class Gates(torch.autograd.Function):
    """``rnnfast::gate_gradients``: dgx, dgh, dm as (T, B, features), dh0, dc0. Nobody
    differentiates it: Backward takes another way where somebody could."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Any:
        *args, saved = call.arguments(_BACKWARD, tensors)
        batch = saved.shape[:2]
        with ops.below_autograd():
            *gates, dh0, dc0 = ops.gate_gradients(
                *args, saved.flatten(0, 1), call.cell, call.reverse
            )
        return *(g.unflatten(0, batch) if g.shape[0] else g for g in gates), dh0, dc0

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *tensors: Tensor) -> Any:
        size, dims = info.batch_size, in_dims[1:]
        if _has_batched_weights(call, dims):
            return _one_by_one(Gates, info, call, dims, tensors)
        *gates, dh0, dc0 = Gates.apply(call, *_folded(call, tensors, dims, size))
        there = [g.dim() == 3 for g in gates]  # dgh and dm may not be
        outs = [_unfold(g, size, 1) if t else g for g, t in zip(gates, there, strict=True)]
        at = [1 if t else None for t in there]
        return (*outs, _unfold(dh0, size, 0), _unfold(dc0, size, 1)), (*at, 0, 1)


def _entered(y: Tensor, h0: Tensor | None, reset: Tensor | None, reverse: bool) -> Tensor:
    """h as it entered each step."""
    first = torch.zeros_like(y[0]) if h0 is None else h0
    h = torch.cat([y[1:], first[None]] if reverse else [first[None], y[:-1]])
    return h if reset is None else torch.where(reset.unsqueeze(-1), 0, h)


def _per_sample(size: int, call: _Call, tensors: Sequence[Tensor]) -> Any:
    """Backward of samples that were folded into the batch: the weights' gradients for each."""
    x, h0, w_ih, reset, y, saved = call.arguments(
        ("x", "h0", "w_ih", "reset", "y", "saved"), tensors
    )
    dgx, dgh, dm, dh0, dc0 = Gates.apply(call, *tensors)
    split = dgh.dim() == 3
    dgh = dgh if split else dgx

    def of_weights(left: Tensor, right: Tensor) -> Tensor:
        # (T, V B, m), (T, V B, n) -> (V, m, n)
        if left.is_cpu and not transforms():
            wide = torch.promote_types(left.dtype, torch.float32)
            with ops.below_autograd():
                return ops.sample_product(left.to(wide), right.to(wide), size).to(left.dtype)
        left, right = (_unfold(t, size, 1).movedim(1, 0).flatten(1, 2) for t in (left, right))
        return left.transpose(1, 2) @ right.to(left.dtype)

    def total(rows: Tensor) -> Tensor:
        return _unfold(rows, size, 1).sum((0, 2))

    grads: dict[str, Tensor] = {}
    if "x" in call.wanted:
        grads["x"] = _unfold(dgx @ w_ih, size, 1)
    if "h0" in call.wanted:
        grads["h0"] = _unfold(dh0, size, 0)
    if "c0" in call.wanted:
        grads["c0"] = _unfold(dc0, size, 1)
    if "w_ih" in call.wanted:
        grads["w_ih"] = of_weights(dgx, x)
    if "w_hh" in call.wanted:
        h = _entered(y, h0, reset, call.reverse)
        grads["w_hh"] = total(dgh * h) if cell_spec(call.cell).diagonal else of_weights(dgh, h)
    if "b_ih" in call.wanted:
        grads["b_ih"] = total(dgx)
    if "b_hh" in call.wanted:
        same = "b_ih" in grads and not split
        grads["b_hh"] = grads["b_ih"].clone() if same else total(dgh)
    if "w_hr" in call.wanted:
        grads["w_hr"] = of_weights(dm, saved[:, :, -1])
    # those of weights have their samples first, the others where their batch is
    return tuple(grads[name] for name in call.wanted), tuple(
        _BATCH_AXIS.get(name, 0) for name in call.wanted
    )


def direction(
    spec: CellSpec, tensors: Sequence[Tensor | None], reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of one layer under transforms that :func:`fits`; tensors are x, h0, c0, w_ih,
    w_hh, b_ih, b_hh, w_hr."""
    save = is_differentiated() or torch.is_grad_enabled()
    names, given = _present((*_INPUTS, "reset"), (*tensors, reset))
    y, h_n, c_n, _ = Forward.apply(_Call(names, spec.id, reverse, save), *given)
    return y, h_n, c_n
