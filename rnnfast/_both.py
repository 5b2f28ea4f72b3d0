"""Both directions of a layer in one call, so that they may run side by side where one direction
leaves processors idle. For plain eager calls: everything else takes them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .cells import CELLS, CellSpec

_forward_both = torch.ops.rnnfast.forward_both.default
_backward_both = torch.ops.rnnfast.backward_both.default
_is_grad_enabled = torch.is_grad_enabled

_PLAIN = (Tensor, torch.nn.Parameter, type(None))

Tensors = Sequence[Tensor | None]
Outputs = tuple[Tensor, Tensor, Tensor]


class _OneDirection:
    """What ops.py's formula of one direction looks at in its ctx."""

    def __init__(self, ctx: Any, saved_tensors: Sequence[Any], index: int) -> None:
        x, batch_sizes, *rest = saved_tensors
        h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset = rest[8 * index : 8 * index + 8]
        y, saved = rest[16 + 2 * index : 18 + 2 * index]
        self.saved_tensors = (
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reset, y, saved,
        )  # fmt: skip
        needed = ctx.needs_input_grad
        self.needs_input_grad = (needed[0], *needed[3 + 8 * index : 10 + 8 * index])
        self.cell, self.reverse, self.save = ctx.cell, index == 1, True


class _Both(torch.autograd.Function):
    """forward_both; arguments x, batch_sizes, cell, then h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr and
    reset of each direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch_sizes: Tensor | None, cell: int, *tensors: Any) -> Any:
        with ops.below_autograd():
            out = _forward_both(
                x, [*tensors[:8], None], [*tensors[8:], None], batch_sizes, cell, True
            )
        ctx.set_materialize_grads(False)
        ctx.cell = cell
        fixed = [out[3], out[7]]
        if CELLS[cell].states == 1:
            fixed += [out[2], out[6]]
        ctx.mark_non_differentiable(*fixed)
        ctx.save_for_backward(x, batch_sizes, *tensors, out[0], out[3], out[4], out[7])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        kept = ctx.saved_tensors  # once: hooks may unpack them only once
        directions = _OneDirection(ctx, kept, 0), _OneDirection(ctx, kept, 1)
        if _may_run_at_once(incoming):
            grads = _at_once(directions, incoming)
        else:
            grads = [
                ops.forward_backward(one, *incoming[4 * i : 4 * i + 4])[:8]
                for i, one in enumerate(directions)
            ]
        dx = [g[0] for g in grads if g[0] is not None]
        total = None if not dx else dx[0] if len(dx) == 1 else dx[0] + dx[1]
        return (total, None, None, *grads[0][1:], None, *grads[1][1:], None)


def _may_run_at_once(incoming: Sequence[Tensor | None]) -> bool:
    """Whether gradients came for both directions, nobody will differentiate what becomes of them,
    and they are one set of gradients, not a batch."""
    given = [g for g in incoming if g is not None]
    return (
        any(g is not None for g in incoming[:3])
        and any(g is not None for g in incoming[4:7])
        and not _is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and not any(torch._C._functorch.is_legacy_batchedtensor(g) for g in given)
    )


def _at_once(directions: tuple[_OneDirection, _OneDirection], incoming: Any) -> list[Any]:
    lists, needs = [], []
    for i, one in enumerate(directions):
        x, *given, batch_sizes, reset, y, saved = one.saved_tensors
        lists.append([*given, reset, y, saved, *incoming[4 * i : 4 * i + 3]])
        needs.append(ops.needs_mask(one.needs_input_grad))
    with ops.below_autograd():
        grads = _backward_both(x, *lists, batch_sizes, directions[0].cell, *needs)
    return [
        tuple(
            g if n else None
            for g, n in zip(grads[8 * i : 8 * i + 8], one.needs_input_grad, strict=True)
        )
        for i, one in enumerate(directions)
    ]


def applies(x: Tensor, first: Tensors, second: Tensors) -> bool:
    """Whether a call with these tensors may take this way: plain ones only, since the operators
    have no fake kernels."""
    tensors = (x, *first, *second)
    return x.is_cpu and all(type(t) in _PLAIN for t in tensors) and ops.is_eager(tensors)


def run(
    spec: CellSpec, x: Tensor, first: Tensors, second: Tensors, batch_sizes: Tensor | None
) -> tuple[Outputs, Outputs]:
    """(y, h_n, c_n) of both directions, each given as h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset
    and packed weights."""
    tensors = (x, *first[:7], *second[:7])
    if _is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        ops.refuse_packed(first[8])
        out = _Both.apply(x, batch_sizes, spec.id, *first[:8], *second[:8])
    else:
        with ops.below_autograd():
            out = _forward_both(x, list(first), list(second), batch_sizes, spec.id, False)
    return tuple(out[:3]), tuple(out[4:7])
