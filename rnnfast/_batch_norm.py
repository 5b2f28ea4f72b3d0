"""The operators of the LSTM with recurrent batch normalisation seen from Python:
``rnnfast::batch_norm_forward`` and ``rnnfast::batch_norm_backward``, one direction of one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _modes, _route, engine, reference
from ._checks import has_values
from ._library import load
from .ops import below_autograd, refuse_tangents_in, vjp

load()

forward = torch.ops.rnnfast.batch_norm_forward.default
backward = torch.ops.rnnfast.batch_norm_backward.default
threads_of = torch.ops.rnnfast.batch_norm_threads.default

_PLANES = 13  # what forward keeps of each unit and row: gates, both products, c
STATISTICS = 9  # of each unit and step: of both products, and of c
_INPUTS = 10  # the differentiable arguments: x, h0, c0, w_ih, w_hh, gains, bias, gain_c, bias_c


@torch.library.register_fake("rnnfast::batch_norm_forward")
def forward_fake(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, gain_ih: Tensor,
    gain_hh: Tensor, bias: Tensor | None, gain_c: Tensor, bias_c: Tensor, running_mean: Tensor,
    running_var: Tensor, batch_sizes: Tensor | None, training: bool, eps: float, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    hidden = w_hh.shape[1]
    steps = x.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    rows = x.shape[0] * x.shape[1] if batch_sizes is None else x.shape[0]
    statistics = (steps, STATISTICS * hidden) if save or training else (0,)
    return (
        x.new_empty((*x.shape[:-1], hidden)),
        x.new_empty(h0.shape),
        x.new_empty(c0.shape),
        x.new_empty(statistics),
        x.new_empty(statistics),
        x.new_empty((rows, _PLANES, hidden) if save else (0,)),
    )


@torch.library.register_fake("rnnfast::batch_norm_backward")
def backward_fake(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, x: Tensor, h0: Tensor, c0: Tensor,
    w_ih: Tensor, w_hh: Tensor, gain_ih: Tensor, gain_hh: Tensor, bias: Tensor | None,
    gain_c: Tensor, bias_c: Tensor, batch_sizes: Tensor | None, y: Tensor, mean: Tensor,
    var: Tensor, saved: Tensor, training: bool, eps: float, needs_dx: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        x.new_empty(x.shape if needs_dx else (0,)),
        *(
            x.new_empty(t.shape)
            for t in (h0, c0, w_ih, w_hh, gain_ih, gain_hh, gain_ih, gain_c, bias_c)
        ),
    )


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.training, ctx.eps, ctx.save = inputs[13:16]
    y, _, _, mean, var, saved = output
    ctx.mark_non_differentiable(mean, var, saved)
    ctx.save_for_backward(*inputs[:_INPUTS], inputs[12], y, mean, var, saved)


def _reference_of(batch_sizes: Tensor | None, mean: Tensor, var: Tensor, ctx: Any) -> Any:
    """The differentiable outputs of the call that used these statistics."""

    def run(*args: Any) -> Any:
        given: Any = (*args, mean, var, batch_sizes, ctx.training, ctx.eps)
        return reference.batch_norm_lstm(*given)[:3]

    return run


def _formula(
    ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    none = (None,) * (16 - _INPUTS)
    dout = (dy, dh_n, dc_n)
    needed = ctx.needs_input_grad[:_INPUTS]
    if all(d is None for d in dout) or not any(needed):
        return (None,) * 16
    *inputs, batch_sizes, y, mean, var, saved = ctx.saved_tensors
    if not ctx.save:
        raise RuntimeError(
            "rnnfast: this call of BatchNormLSTM was traced for inference and kept nothing for "
            "backward; trace it with gradients enabled"
        )
    if _modes.is_beyond_kernels(dout):
        run = _reference_of(batch_sizes, mean, var, ctx)
        return (*vjp(run, dout, tuple(inputs), needed), *none)
    args = (
        *dout, *inputs, batch_sizes, y, mean, var, saved, ctx.training, ctx.eps, bool(needed[0]),
    )  # fmt: skip
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        grads = backward(*args)
    else:  # nobody will differentiate the gradients
        with below_autograd():
            grads = backward(*args)
    return (*(g if n else None for g, n in zip(grads, needed, strict=True)), *none)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.training, ctx.eps, needs_dx = inputs[18:21]
    if not needs_dx:
        ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(*inputs[:14], inputs[15], inputs[16])


def _double_backward(ctx: Any, *ddout: Tensor | None) -> tuple[Tensor | None, ...]:
    """By the reference, which computes the statistics anew."""
    *args, batch_sizes, mean, var = ctx.saved_tensors
    if batch_sizes is not None and not has_values(batch_sizes):
        raise RuntimeError(
            "rnnfast: second derivatives of packed rows can't be traced; take them outside of "
            "torch.compile"
        )
    if all(d is None for d in ddout):
        return (None,) * 21
    run = _reference_of(batch_sizes, mean, var, ctx)
    asked = [d is not None for d in ddout]

    def first(*tensors: Any) -> Any:
        return vjp(run, tensors[:3], tensors[3:], asked)

    return (*vjp(first, ddout, tuple(args), ctx.needs_input_grad[:13]), *(None,) * 8)


class BatchNormStep(torch.autograd.Function):
    """``rnnfast::batch_norm_forward`` with its formula, for eager calls."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        with below_autograd():
            output = forward(*args)
        _forward_setup(ctx, args, output)
        return output

    backward = staticmethod(_formula)


torch.library.register_autograd(
    "rnnfast::batch_norm_forward", _formula, setup_context=_forward_setup
)
torch.library.register_autograd(
    "rnnfast::batch_norm_backward", _double_backward, setup_context=_backward_setup
)
refuse_tangents_in("rnnfast::batch_norm_forward", forward, BatchNormStep)


def run(*args: Any) -> tuple[Tensor, ...]:
    """One direction by whatever looks on: the arguments of the operator but ``save``. Gives y, h_n,
    c_n, and the statistics of each step (empty where nobody asks)."""
    tensors = args[:_INPUTS]
    x, h0, c0, *weights = tensors
    on_reference = _route.use_reference(x, h0, c0, weights, without_rules=True)
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16):  # computed in float32, and rounded once
        wide = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        y, h_n, c_n, *statistics = run(*wide)
        return y.to(dtype), h_n.to(dtype), c_n.to(dtype), *statistics
    if on_reference:
        if not torch.compiler.is_compiling():
            engine.note_reference()
        return reference.batch_norm_lstm(*args)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    args = (*args, save)
    out: Any
    if not _modes.is_eager(args):
        out = forward(*args)
    elif save:
        out = BatchNormStep.apply(*args)
    else:
        with below_autograd():
            out = forward(*args)
    return tuple(out[:5])
