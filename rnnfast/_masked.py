"""``rnnfast::forward_masked`` and ``rnnfast::backward_masked``: a pass with masks inside the
recurrence. Zoneout keeps entries of the states as they were, dropout of h zeroes some where h
enters the product with w_hh. The masks are operands without a gradient, so whoever runs a pass
again runs it with the same ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from ._checks import check_flags, check_shape
from ._modes import is_beyond_kernels
from .cells import CellSpec, cell_spec

forward = torch.ops.rnnfast.forward_masked.default
backward = torch.ops.rnnfast.backward_masked.default

# Arguments: 8 that have gradients, batch_sizes, reset, zone and h_kept; in forward then packed
# weights. Numbers: keep_h, keep_c and h_scale.
_ROWS = 12

_Grads = tuple[Tensor | None, ...]


class Masks(NamedTuple):
    """Of one pass.

    Args:
        zone: bool, (T, B, S, H) or packed (N, S, H): where a state stays as it was
        h_kept: bool, (B, P): which entries of h enter the product with w_hh, ``h_scale`` times
        keep_h, keep_c: what part of h, and of the other states, stays where ``zone`` is false
        h_scale: factor of what enters
    """

    zone: Tensor | None = None
    h_kept: Tensor | None = None
    keep_h: float = 0.0
    keep_c: float = 0.0
    h_scale: float = 1.0

    @property
    def there(self) -> bool:
        """Whether they do anything."""
        return self.zone is not None or self.h_kept is not None or any(self[2:4])

    @property
    def numbers(self) -> tuple[float, float, float]:
        return self[2:]

    @property
    def of_reference(self) -> dict[str, Any]:
        """As reference.forward takes them."""
        return {
            "zone": self.zone, "h_kept": self.h_kept, "keep": (self.keep_h, self.keep_c),
            "h_scale": self.h_scale,
        }  # fmt: skip


def _check(
    spec: CellSpec,
    x: Tensor,
    batch_sizes: Tensor | None,
    w_ih: Tensor,
    w_hr: Tensor | None,
    masks: Masks,
) -> None:
    hidden = w_ih.shape[0] // spec.gates
    if masks.zone is not None or masks.keep_h or masks.keep_c:
        if not spec.keeps:
            raise RuntimeError(
                "rnnfast: zone, keep_h and keep_c are for cells of zoneout, got cell " + spec.name
            )
        if not (0 <= masks.keep_h <= 1 and 0 <= masks.keep_c <= 1):
            raise RuntimeError(
                f"rnnfast: keep_h and keep_c must be in [0, 1], got {masks.keep_h} and "
                f"{masks.keep_c}"
            )
    if masks.zone is not None:
        check_flags("zone", masks.zone, x)
        letters = "(T, B, S, H)" if batch_sizes is None else "(N, S, H)"
        check_shape("zone", masks.zone, letters, (*x.shape[:-1], spec.states, hidden))
    kept = masks.h_kept
    if kept is None:
        return
    check_flags("h_kept", kept, x)
    if not spec.dense:
        raise RuntimeError(
            f"rnnfast: h_kept is for cells whose w_hh is a matrix, got cell {spec.name}"
        )
    if spec.stages:
        raise RuntimeError(f"rnnfast: h_kept is for cells without stages, got cell {spec.name}")
    out = hidden if w_hr is None else w_hr.shape[0]
    # of packed rows the batch need not be known: there may be more
    batch = kept.shape[0] if batch_sizes is not None else x.shape[1]
    check_shape("h_kept", kept, "(B, H)" if w_hr is None else "(B, P)", (batch, out))


@torch.library.register_fake("rnnfast::forward_masked")
def forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *given, packed, keep_h, keep_c, h_scale, cell, reverse, save = args
    out = ops.forward_fake(*given[:10], packed, cell, reverse, save)
    masks = Masks(given[10], given[11], keep_h, keep_c, h_scale)
    _check(cell_spec(cell), given[0], given[8], given[3], given[7], masks)
    return out


@torch.library.register_fake("rnnfast::backward_masked")
def backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return ops.backward_fake(*args[:13], *args[15:17], *args[20:])


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    y, _, c_n, saved = output
    ctx.numbers, (ctx.cell, ctx.reverse, ctx.save) = inputs[13:16], inputs[16:]
    one_state = cell_spec(ctx.cell).states == 1
    ctx.mark_non_differentiable(saved, *([c_n] if one_state else []))
    ctx.save_for_backward(*inputs[:_ROWS], y, saved)


def formula(
    ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, _: Tensor | None
) -> _Grads:
    none: _Grads = (None,) * 19
    needed, dout = ctx.needs_input_grad[:8], (dy, dh_n, dc_n)
    if all(d is None for d in dout):
        return none
    *inputs, y, saved = ctx.saved_tensors
    if is_beyond_kernels(dout):
        exact = ops.reference_backward(dout, tuple(inputs[:8]), inputs[8:], ctx, needed)
        return (*exact, *none[8:])
    if not ctx.save:
        with torch.no_grad():
            y, _, _, saved = forward(*inputs, None, *ctx.numbers, ctx.cell, ctx.reverse, True)
    args = (
        *dout, *inputs, y, saved, *ctx.numbers, ctx.cell, ctx.reverse, ops.needs_mask(needed)
    )  # fmt: skip
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        grads = backward(*args)
    else:  # nobody will differentiate the gradients
        with ops.below_autograd():
            grads = backward(*args)
    return (*(g if n else None for g, n in zip(grads, needed, strict=True)), *none[8:])


def backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.numbers = inputs[17:20]
    ops.backward_setup(ctx, inputs[: 3 + _ROWS], inputs[20:], output)


torch.library.register_autograd("rnnfast::forward_masked", formula, setup_context=setup)
torch.library.register_autograd(
    "rnnfast::backward_masked", ops._backward_backward, setup_context=backward_setup
)


class Eager(torch.autograd.Function):
    """``rnnfast::forward_masked`` without the dispatcher's way to Python, for eager calls."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        with ops.below_autograd():
            output = forward(*args)
        setup(ctx, args, output)
        return output

    backward = staticmethod(formula)


class _Forward(Eager):
    """The same where the dispatcher came to it."""


ops.refuse_tangents_in("rnnfast::forward_masked", forward, _Forward)
