"""Linear recurrences: h_t = a_t * h_{t-1} + b_t, by the operators ``rnnfast::scan`` and
``rnnfast::scan_backward``.

A scan's derivatives are scans: backward runs against its direction, forward mode along it. So every
order of them is made of the same operators, whose number does not depend on T."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _functorch, _modes, _route, engine, reference
from ._checks import DTYPES, check_dense
from ._library import load
from .ops import below_autograd, refuse_tangents_in, vjp

__all__ = ["linear_scan"]

load()

scan = torch.ops.rnnfast.scan.default
scan_backward = torch.ops.rnnfast.scan_backward.default

_A, _B, _H0 = 1, 2, 4  # the bits of `needs`


@torch.library.register_fake("rnnfast::scan")
def scan_fake(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    return b.new_empty(b.shape)


@torch.library.register_fake("rnnfast::scan_backward")
def scan_backward_fake(
    dh: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, reverse: bool, needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        a.new_empty(a.shape if needs & _A else (0,)),
        a.new_empty(a.shape if needs & _B else (0,)),
        a.new_empty(a.shape[1:] if needs & _H0 else (0,)),
    )


def _entered(h: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    """h as it entered each step."""
    first = torch.zeros_like(h[:1]) if h0 is None else h0.expand_as(h[0]).unsqueeze(0)
    return torch.cat([h[1:], first] if reverse else [first, h[:-1]])


def _gradients(
    dh: Tensor,
    a: Tensor,
    h: Tensor,
    h0: Tensor | None,
    reverse: bool,
    by: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """scan_backward in differentiable operators, one of them a scan."""
    # a as it leads out of each step
    rest = torch.zeros_like(a[:1])
    out = torch.cat([rest, a[:-1]] if reverse else [a[1:], rest])
    db = (by or run)(out, dh, None, reverse=not reverse)
    last = -1 if reverse else 0
    return db * _entered(h, h0, reverse), db, a[last] * db[last]


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    a, _, h0, ctx.reverse = inputs
    ctx.save_for_backward(a, h0, output)


def _needs(needed: Any) -> int:
    return sum(bit for bit, wanted in zip((_A, _B, _H0), needed[:3], strict=True) if wanted)


def _chosen(grads: Any, needs: int) -> Any:
    return (*(g if needs & bit else None for g, bit in zip(grads, (_A, _B, _H0), strict=True)),)


def _scan_formula(ctx: Any, dh: Tensor | None) -> Any:
    """Of a call that came through the dispatcher."""
    needs = _needs(ctx.needs_input_grad)
    if dh is None or needs == 0:
        return None, None, None, None
    a, h0, h = ctx.saved_tensors
    return (*_chosen(scan_backward(dh, a, h, h0, ctx.reverse, needs), needs), None)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.reverse, ctx.needs = inputs
    ctx.mark_non_differentiable(
        *(g for g, bit in zip(output, (_A, _B, _H0), strict=True) if not ctx.needs & bit)
    )
    ctx.save_for_backward(*tensors)


def _backward_formula(ctx: Any, *ddout: Tensor | None) -> Any:
    def run_of(dh: Tensor, a: Tensor, h: Tensor, h0: Tensor | None) -> Any:
        return _gradients(dh, a, h, h0, ctx.reverse)

    asked = _chosen(ddout, ctx.needs)
    if all(d is None for d in asked):
        return (None,) * 6
    return (*vjp(run_of, asked, ctx.saved_tensors, ctx.needs_input_grad[:4]), None, None)


def _folded(tensor: Tensor | None, dim: int | None, size: int, axis: int) -> Tensor | None:
    """A vmapped dimension into B, which is dimension ``axis``."""
    if tensor is None:
        return None
    if dim is None:
        tensor, dim = tensor.unsqueeze(0).expand(size, *tensor.shape), 0
    return tensor.movedim(dim, axis).flatten(axis, axis + 1)


class Scan(torch.autograd.Function):
    """``rnnfast::scan`` for eager calls and the transforms of torch.func."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
        with below_autograd():
            return scan(a, b, h0, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _scan_setup(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], inputs[2], output)

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None) -> Any:
        needs = _needs(ctx.needs_input_grad)
        if dh is None or needs == 0:
            return None, None, None, None
        a, h0, h = ctx.saved_tensors
        if _modes.transforms_active():
            alone = not _functorch.fits()
        else:
            alone = _modes.has_tangent((dh, a, h, h0))
        if alone:
            grads: Any = _gradients(dh, a, h, h0, ctx.reverse)
        elif _modes.is_beyond_kernels((dh,)) and not _modes.transforms_active():
            grads = _gradients(dh, a, h, h0, ctx.reverse, reference.scan)
        elif torch.is_grad_enabled() or _modes.transforms_active():
            grads = ScanBackward.apply(dh, a, h, h0, ctx.reverse, needs)
        else:  # nobody will differentiate the gradients
            with below_autograd():
                grads = scan_backward(dh, a, h, h0, ctx.reverse, needs)
        return (*_chosen(grads, needs), None)

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, dh0: Tensor | None, _: Any) -> Any:
        a, h0, h = ctx.saved_tensors
        added = torch.zeros_like(h) if db is None else db
        if da is not None:
            added = added + da * _entered(h, h0, ctx.reverse)
        return run(a, added, dh0, ctx.reverse)

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, b: Tensor, h0: Any, reverse: bool) -> Any:
        size = info.batch_size
        h = Scan.apply(
            _folded(a, in_dims[0], size, 1), _folded(b, in_dims[1], size, 1),
            _folded(h0, in_dims[2], size, 0), reverse,
        )  # fmt: skip
        return h.unflatten(1, (size, -1)), 1


class ScanBackward(torch.autograd.Function):
    """``rnnfast::scan_backward``, likewise."""

    @staticmethod
    def forward(
        dh: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, reverse: bool, needs: int
    ) -> Any:
        with below_autograd():
            return scan_backward(dh, a, h, h0, reverse, needs)

    setup_context = staticmethod(_backward_setup)
    backward = staticmethod(_backward_formula)

    @staticmethod
    def vmap(info: Any, in_dims: Any, dh: Tensor, a: Tensor, h: Tensor, h0: Any, *rest: Any) -> Any:
        size = info.batch_size
        dims = in_dims[:4]
        grads = ScanBackward.apply(
            *(_folded(t, d, size, 1) for t, d in zip((dh, a, h), dims[:3], strict=True)),
            _folded(h0, dims[3], size, 0), *rest,
        )  # fmt: skip
        outs: list[Any] = []
        at: list[Any] = []
        for grad, bit, axis in zip(grads, (_A, _B, _H0), (1, 1, 0), strict=True):
            there = rest[1] & bit
            outs.append(grad.unflatten(axis, (size, -1)) if there else grad)
            at.append(axis if there else None)
        return tuple(outs), tuple(at)


torch.library.register_autograd("rnnfast::scan", _scan_formula, setup_context=_scan_setup)
torch.library.register_autograd(
    "rnnfast::scan_backward", _backward_formula, setup_context=_backward_setup
)
refuse_tangents_in("rnnfast::scan", scan, Scan)


def run(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    """The scan of (T, B, H) by whatever looks on."""
    args = (a, b, h0, reverse)
    h: Tensor
    if _modes.transforms_active() or _modes.has_tangent((a, b, h0)):
        h = Scan.apply(*args)
    elif not _modes.is_eager(args):
        h = scan(*args)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (a, b, h0)):
        h = Scan.apply(*args)
    else:
        with below_autograd():
            h = scan(*args)
    return h


def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    r"""Linear recurrence over the first dimension, every element by itself.

    .. math::
        h_t = a_t \odot h_{t-1} + b_t

    What MinGRU, QRNN, SRU and linear state space models have in common (Blelloch 1990, "Prefix Sums
    and Their Applications"; Martin & Cundy 2018, arXiv:1709.04057). Each number is read and
    written once, forward and backward; sums are in float32 for 16-bit numbers. Long sequences of
    few columns are cut into chunks of steps, which threads take at the same time. How they are cut
    follows from the shape, so that no bit depends on the number of threads. Nothing is divided and
    no logarithm taken: a may be zero, negative, or larger than one.

    Args:
        a: the factors
        b: what is added
        h0: :math:`h_{-1}`, or :math:`h_T` if ``reverse``; ``None`` means zeros
        reverse: from the last step to the first, :math:`h_t = a_t \odot h_{t+1} + b_t`

    Shape:
        - a, b: :math:`(T, *)`, both the same; ``expand`` a constant one, which is not copied as
          long as its last dimension is not expanded
        - h0: :math:`(*)`
        - Output: :math:`(T, *)`

    Raises:
        RuntimeError: a shape, dtype or device that does not fit
        TypeError: what is no tensor

    Example::

        >>> a, b = torch.rand(1000, 8, 64), torch.randn(1000, 8, 64)
        >>> rnnfast.functional.linear_scan(a, b).shape
        torch.Size([1000, 8, 64])
    """
    _check(a, b, h0, reverse)
    if engine.forced == "reference":
        return reference.scan(a, b, h0, reverse=reverse)
    if a.dtype not in DTYPES:
        raise RuntimeError(
            "rnnfast: the engines compute in float32, float64, bfloat16 and float16, got "
            f"{a.dtype}; convert with .float(), or run plain torch operators with "
            'rnnfast.use_engine("reference")'
        )
    _route.check_place(a)
    shape = a.shape
    if len(shape) != 3:
        columns = shape[-1] if len(shape) > 1 else 1
        rows = math.prod(shape[1:-1])
        a, b = (t.reshape(shape[0], rows, columns) for t in (a, b))
        h0 = None if h0 is None else h0.reshape(rows, columns)
    h = run(a, b, h0, reverse)
    return h if len(shape) == 3 else h.reshape(shape)


def _check(a: Any, b: Any, h0: Any, reverse: Any) -> None:
    for name, tensor in (("a", a), ("b", b), ("h0", h0)):
        if not isinstance(tensor, Tensor):
            if tensor is None and name == "h0":
                continue
            raise TypeError(f"rnnfast: {name} must be a tensor, got {type(tensor).__name__}")
        check_dense(tensor, name)
    if not isinstance(reverse, bool):
        raise TypeError(f"rnnfast: reverse must be a bool, got {type(reverse).__name__}")
    if a.dim() == 0:
        raise RuntimeError("rnnfast: a must have shape (T, *), got ()")
    for name, tensor, letters, shape in (
        ("b", b, "(T, *)", a.shape),
        ("h0", h0, "(*)", a.shape[1:]),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise RuntimeError(
                f"rnnfast: {name} must have shape {letters} = {tuple(shape)} of a, "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.dtype != a.dtype:
            raise RuntimeError(
                f"rnnfast: {name} must have the dtype of a, {a.dtype}, got {tensor.dtype}"
            )
        if tensor.device != a.device:
            raise RuntimeError(
                f"rnnfast: {name} must be on the same device as a ({a.device}), got {tensor.device}"
            )
