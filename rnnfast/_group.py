"""Several passes of a layer in one call, so that they may run side by side where one leaves
processors idle: both directions and their heads, or (``chained``) layers that read one another. For
plain eager calls: everything else takes them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _modes, ops
from ._passes import Pass
from .cells import CellSpec, cell_spec

_forward_group = torch.ops.rnnfast.forward_group.default
_forward_group_last = torch.ops.rnnfast.forward_group_last.default
_backward_group = torch.ops.rnnfast.backward_group.default
_is_grad_enabled = torch.is_grad_enabled

_PLAIN = (Tensor, torch.nn.Parameter, type(None))

Outputs = tuple[Tensor, Tensor, Tensor]


@torch.library.register_fake("rnnfast::forward_group")
def forward_group_fake(
    x: Tensor, tensors: Any, sizes: Any, cell: int, chained: bool, save: bool, heads: int = 1
) -> list[Tensor]:
    """For _stack.py, which looks into its operator with it."""
    outs: list[Tensor] = []
    for first in range(0, len(tensors), 9):
        *one, reset, packed = tensors[first : first + 9]
        y = outs[-4] if chained and outs else x
        reverse = not chained and first >= 9 * heads
        outs += ops.forward_fake(y, *one, sizes, reset, packed, cell, reverse, save)
    return outs


class _OnePass:
    """What ops.py's formula of one pass looks at in its ctx."""

    def __init__(self, ctx: Any, saved_tensors: Sequence[Any], index: int) -> None:
        x, batch_sizes, *rest = saved_tensors
        h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset = rest[8 * index : 8 * index + 8]
        ys, saved = rest[8 * ctx.count : 9 * ctx.count], rest[9 * ctx.count :]
        needed = ctx.needs_input_grad
        below = needed[0]
        if ctx.chained and index > 0:
            x = ys[index - 1]
            below = below or any(needed[5 : 5 + 8 * index])
        self.saved_tensors = (
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reset, ys[index], saved[index],
        )  # fmt: skip
        self.needs_input_grad = (below, *needed[5 + 8 * index : 12 + 8 * index])
        self.cell, self.reverse, self.save = ctx.cell, not ctx.chained and index >= ctx.heads, True


class _Group(torch.autograd.Function):
    """forward_group; arguments x, batch_sizes, cell, chained, heads, then h0, c0, w_ih, w_hh, b_ih,
    b_hh, w_hr and reset of each pass. Every y is an output: layers above one another read them, and
    a second derivative goes through them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        batch_sizes: Tensor | None,
        cell: int,
        chained: bool,
        heads: int,
        *tensors: Any,
    ) -> Any:
        ctx.count = len(tensors) // 8
        passes: list[Tensor | None] = []
        for i in range(ctx.count):
            passes += [*tensors[8 * i : 8 * i + 8], None]
        with ops.below_autograd():
            out = _forward_group(x, passes, batch_sizes, cell, chained, True, heads)
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.chained, ctx.heads = cell, chained, heads
        fixed = out[3::4]
        if cell_spec(cell).states == 1:
            fixed += out[2::4]
        ctx.mark_non_differentiable(*fixed)
        ctx.save_for_backward(x, batch_sizes, *tensors, *out[0::4], *out[3::4])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        kept = ctx.saved_tensors  # once: hooks may unpack them only once
        passes = [_OnePass(ctx, kept, i) for i in range(ctx.count)]
        if _may_run_at_once(passes, incoming, ctx.chained):
            grads = _at_once(passes, incoming, ctx.chained, ctx.heads)
        elif ctx.chained:
            grads = _from_last_to_first(passes, incoming)
        else:
            grads = [
                ops.forward_backward(one, *incoming[4 * i : 4 * i + 4])[:8]
                for i, one in enumerate(passes)
            ]
        dx = grads[0][0]
        for of_pass in () if ctx.chained else grads[1:]:
            dx = _sum(dx, of_pass[0])
        result: list[Any] = [dx, None, None, None, None]
        for of_pass in grads:
            result += [*of_pass[1:], None]
        return tuple(result)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


def _from_last_to_first(passes: Sequence[_OnePass], incoming: Any) -> list[Any]:
    grads: list[Any] = []
    dx = None
    for i in reversed(range(len(passes))):
        dy, *rest = incoming[4 * i : 4 * i + 4]
        dy = _sum(dy, dx)
        if any(passes[i].needs_input_grad):
            of_pass = ops.forward_backward(passes[i], dy, *rest)[:8]
        else:
            of_pass = (None,) * 8
        dx = of_pass[0]
        grads.insert(0, of_pass)
    return grads


def _may_run_at_once(passes: Sequence[_OnePass], incoming: Sequence[Any], chained: bool) -> bool:
    """Whether each pass has gradients to take and to give, nobody will differentiate or trace what
    becomes of them, and they are one set of gradients, not a batch."""
    if torch.compiler.is_compiling():
        return False
    given = [g for g in incoming if g is not None]
    takes = [any(g is not None for g in incoming[4 * i : 4 * i + 3]) for i in range(len(passes))]
    if chained:  # layers below the last have a gradient from above, and their own y has none
        fits = takes[-1] and all(g is None for g in incoming[0 : 4 * len(passes) - 4 : 4])
    else:
        fits = all(takes)
    return (
        fits
        and all(any(one.needs_input_grad) for one in passes)
        and not _is_grad_enabled()
        and not _modes.is_beyond_kernels(given)
    )


def _at_once(passes: Sequence[_OnePass], incoming: Any, chained: bool, heads: int) -> list[Any]:
    tensors: list[Tensor | None] = []
    for i, one in enumerate(passes):
        _, *given, batch_sizes, reset, y, saved = one.saved_tensors
        tensors += [*given, reset, y, saved, *incoming[4 * i : 4 * i + 3]]
    needs = [ops.needs_mask(one.needs_input_grad) for one in passes]
    first = passes[0]
    with ops.below_autograd():
        grads = _backward_group(
            first.saved_tensors[0], tensors, batch_sizes, first.cell, chained, needs, heads
        )
    return [
        tuple(
            g if n else None
            for g, n in zip(grads[8 * i : 8 * i + 8], one.needs_input_grad, strict=True)
        )
        for i, one in enumerate(passes)
    ]


def applies(x: Tensor, passes: Sequence[Pass]) -> bool:
    """Whether a call with these tensors may take this way: plain ones only, whose operators nobody
    overrides."""
    tensors = (x, *(t for one in passes for t in one))
    on_engine = x.is_cpu or x.is_cuda
    plain = all(type(t) in _PLAIN for t in tensors) and _modes.is_eager(tensors)
    return on_engine and plain and not _modes.transforms_active()


def run(
    spec: CellSpec,
    x: Tensor,
    passes: Sequence[Pass],
    batch_sizes: Tensor | None,
    chained: bool,
    last: bool = False,
) -> list[Outputs]:
    """(y, h_n, c_n) of each pass; of chained ones only the last y may be read, and none if
    `last`."""
    if _is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for p in passes for t in p[:7])
    ):
        ops.refuse_packed(passes[0][8])
        given = [t for one in passes for t in one[:8]]
        out = _Group.apply(x, batch_sizes, spec.id, chained, spec.heads, *given)
    else:
        with ops.below_autograd():
            given = [t for one in passes for t in one]
            if last and x.is_cpu:
                out = _forward_group_last(x, given, batch_sizes, spec.id, chained, spec.heads)
            else:
                out = _forward_group(x, given, batch_sizes, spec.id, chained, False, spec.heads)
    return [tuple(out[4 * i : 4 * i + 3]) for i in range(len(passes))]
