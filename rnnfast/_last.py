"""``rnnfast::forward_last``: a pass of whose output only the last step is asked for, which is h_n.
It allocates no y, whatever T is. For inference on the CPU; training keeps y, since backward reads
it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _modes, ops
from ._recompute import AsPlain
from .cells import cell_spec

forward_last = torch.ops.rnnfast.forward_last.default


@torch.library.register_fake("rnnfast::forward_last")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    _, h_n, c_n, _ = ops.forward_fake(*args, False)
    return h_n, c_n


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.packed, ctx.cell, ctx.reverse = inputs
    if cell_spec(ctx.cell).states == 1:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors)


def _formula(ctx: Any, dh_n: Tensor | None, dc_n: Tensor | None) -> tuple[Tensor | None, ...]:
    """For who differentiates it after all, an exported program, say: forward runs once more."""
    ops.refuse_packed(ctx.packed)
    grads = ops.forward_backward(AsPlain(ctx, ctx.saved_tensors), None, dh_n, dc_n, None)
    return (*grads[:8], *(None,) * 5)


torch.library.register_autograd("rnnfast::forward_last", _formula, setup_context=_setup)


class _ForwardLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        with ops.below_autograd():
            output = forward_last(*args)
        _setup(ctx, args, output)
        return output

    backward = staticmethod(_formula)


ops.refuse_tangents_in("rnnfast::forward_last", forward_last, _ForwardLast)


def run(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of one layer as the operator takes it, without gradients: (nothing, h_n,
    c_n)."""
    if _modes.is_eager(args):
        with ops.below_autograd():
            h_n, c_n = forward_last(*args)
    else:
        h_n, c_n = forward_last(*args)
    return h_n.new_empty(0), h_n, c_n
