"""The dispatcher's operators seen from Python: fake kernels and derivatives.

``rnnfast::forward`` and ``rnnfast::backward`` are one direction of one layer (_group.py has the
operators for several at once); their schemas and CPU kernels live in csrc/bindings. Both have
derivatives: that of ``forward`` is ``backward``, that of ``backward`` is reference.py
differentiated twice, right to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import reference
from ._checks import check_layer, has_values
from ._library import load
from ._modes import has_tangent, is_beyond_kernels, transforms_active
from .cells import cell_spec

__all__ = [
    "backward",
    "forward",
    "gate_gradients",
    "pack",
    "pack_int8",
    "sample_product",
]

load()

forward = torch.ops.rnnfast.forward.default
backward = torch.ops.rnnfast.backward.default
gate_gradients = torch.ops.rnnfast.gate_gradients.default
sample_product = torch.ops.rnnfast.sample_product.default
pack = torch.ops.rnnfast.pack.default
pack_int8 = torch.ops.rnnfast.pack_int8.default

# Skips autograd's part of the dispatcher, in Python for these operators: where there is nothing
# to differentiate.
below_autograd = torch._C._AutoDispatchBelowAutograd

# the differentiable arguments, in the order of the bits of `needs`
_BITS = (1, 2, 4, 8, 16, 32, 64, 128)

_Grads = tuple[Tensor | None, ...]


def _hidden(w_ih: Tensor, cell: int) -> int:
    return w_ih.shape[0] // cell_spec(cell).gates


def _check_devices(x: Tensor, batch_sizes: Tensor | None, **others: Tensor | None) -> None:
    # a call that mixes meta tensors with others comes to the fake kernel, and must not pass
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(
                f"rnnfast: {name} must be on the same device as x ({x.device}), got {tensor.device}"
            )
    if batch_sizes is not None and batch_sizes.device.type != "cpu":
        raise RuntimeError(
            f"rnnfast: batch_sizes must be a CPU tensor, got one on {batch_sizes.device}"
        )


def _batch(batch_sizes: Tensor, state: Tensor | None) -> Any:
    """The batch of packed rows."""
    if state is not None:
        return state.shape[0]
    if has_values(batch_sizes):  # beside meta tensors it is a real one
        return int(batch_sizes[0])
    return torch.library.get_ctx().new_dynamic_size()


@torch.library.register_fake("rnnfast::forward")
def forward_fake(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    packed: Tensor | None,
    cell: int,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_devices(
        x, batch_sizes, h0=h0, c0=c0, w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh, w_hr=w_hr,
        reset=reset, packed=packed,
    )  # fmt: skip
    spec = cell_spec(cell)
    check_layer(spec, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reset)
    hidden = _hidden(w_ih, cell)
    out = hidden if w_hr is None else w_hr.shape[0]
    if batch_sizes is None:
        batch: Any = x.shape[1]
        rows = x.shape[0] * x.shape[1]
        y = x.new_empty((x.shape[0], batch, out))
    else:
        batch = _batch(batch_sizes, h0)
        rows = x.shape[0]
        y = x.new_empty((rows, out))
    planes = spec.planes + (w_hr is not None)
    kept = torch.float64 if x.dtype == torch.float64 else torch.float32
    saved = x.new_empty((rows, planes, hidden) if save else (0,), dtype=kept)
    return y, x.new_empty((batch, out)), x.new_empty((spec.states - 1, batch, hidden)), saved


@torch.library.register_fake("rnnfast::backward")
def backward_fake(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    saved: Tensor,
    cell: int,
    reverse: bool,
    needs: int,
) -> tuple[Tensor, ...]:
    _check_devices(
        x, batch_sizes, dy=dy, dh_n=dh_n, dc_n=dc_n, h0=h0, c0=c0, w_ih=w_ih, w_hh=w_hh,
        b_ih=b_ih, b_hh=b_hh, w_hr=w_hr, reset=reset, y=y, saved=saved,
    )  # fmt: skip
    hidden = _hidden(w_ih, cell)
    batch: Any = 0
    if needs & 6:
        given = next((t for t in (h0, dh_n) if t is not None), None)
        batch = x.shape[1] if batch_sizes is None else _batch(batch_sizes, given)
    gates = w_ih.shape[0]
    shapes: tuple[Any, ...] = (
        x.shape,
        (batch, hidden if w_hr is None else w_hr.shape[0]),
        (cell_spec(cell).states - 1, batch, hidden),
        w_ih.shape,
        w_hh.shape,
        (gates,),
        (gates,) if b_hh is None else b_hh.shape,  # with the cell's parameters
        (0,) if w_hr is None else w_hr.shape,
    )
    return tuple(
        x.new_empty(shape if needs & bit else (0,))
        for shape, bit in zip(shapes, _BITS, strict=True)
    )


@torch.library.register_fake("rnnfast::gate_gradients")
def _(*args: Any) -> tuple[Tensor, ...]:
    x, h0, w_ih, w_hr, batch_sizes = args[3], args[4], args[6], args[10], args[11]
    spec, hidden = cell_spec(args[15]), _hidden(args[6], args[15])
    batch = x.shape[1] if batch_sizes is None else _batch(batch_sizes, h0)
    rows = x.shape[0] * x.shape[1] if batch_sizes is None else x.shape[0]
    out = hidden if w_hr is None else w_hr.shape[0]
    gates = w_ih.shape[0]
    return (
        x.new_empty((rows, gates)),
        x.new_empty((rows if spec.split_gates else 0, gates)),
        x.new_empty((0 if w_hr is None else rows, out)),
        x.new_empty((batch, out)),
        x.new_empty((spec.states - 1, batch, hidden)),
    )


@torch.library.register_fake("rnnfast::sample_product")
def _(left: Tensor, right: Tensor, samples: int) -> Tensor:
    return left.new_empty((samples, left.shape[2], right.shape[2]))


@torch.library.register_fake("rnnfast::pack")
def _(w_ih: Tensor, w_hh: Tensor, w_hr: Tensor | None, cell: int) -> Tensor:
    return w_ih.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.uint8)


@torch.library.register_fake("rnnfast::pack_int8")
def _(
    w_ih: Tensor,
    scale_ih: Tensor,
    w_hh: Tensor,
    scale_hh: Tensor | None,
    w_hr: Tensor | None,
    scale_hr: Tensor | None,
    cell: int,
) -> Tensor:
    return w_ih.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.uint8)


def needs_mask(needed: Any) -> int:
    """The `needs` of backward."""
    return sum(bit for bit, needs in zip(_BITS, needed, strict=True) if needs)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    y, _, c_n, saved = output
    ctx.cell, ctx.reverse, ctx.save = inputs[11:14]
    if cell_spec(ctx.cell).states == 1:
        ctx.mark_non_differentiable(saved, c_n)
    else:
        ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(*inputs[:10], y, saved)


def forward_backward(
    ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, _: Tensor | None
) -> _Grads:
    none: _Grads = (None,) * 14
    needed = ctx.needs_input_grad[:8]
    if dy is None and dh_n is None and dc_n is None:
        return none
    *inputs, y, saved = ctx.saved_tensors
    if is_beyond_kernels((dy, dh_n, dc_n)):
        # batched gradients (is_grads_batched, vectorize=True), or transforms of a backward pass:
        # the kernel takes one at a time, and knows no other derivative
        grads = reference_backward((dy, dh_n, dc_n), tuple(inputs[:8]), inputs[8:], ctx, needed)
        return (*grads, *none[8:])
    if not ctx.save:
        with torch.no_grad():
            y, _, _, saved = forward(*inputs, None, ctx.cell, ctx.reverse, True)
    args = (dy, dh_n, dc_n, *inputs, y, saved, ctx.cell, ctx.reverse, needs_mask(needed))
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        grads = backward(*args)
    else:  # nobody will differentiate the gradients
        with below_autograd():
            grads = backward(*args)
    return (*(g if n else None for g, n in zip(grads, needed, strict=True)), *none[8:])


def backward_setup(
    ctx: Any, tensors: tuple[Any, ...], numbers: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    """tensors: all but y and saved; numbers: cell, reverse and needs."""
    ctx.set_materialize_grads(False)
    ctx.cell, ctx.reverse, ctx.needs = numbers
    ctx.mark_non_differentiable(
        *(g for g, bit in zip(output, _BITS, strict=True) if not ctx.needs & bit)
    )
    ctx.save_for_backward(*tensors)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    backward_setup(ctx, inputs[:13], inputs[15:18], output)


def _alias(tensor: Tensor | None, needed: bool) -> Tensor | None:
    """A node of its own for an argument: arguments may depend on each other (h0 on x, say), and the
    derivative wanted is the one with the others held fixed."""
    if tensor is None or not needed:
        return tensor
    if torch.is_grad_enabled() and tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()


def _chosen_vjp(function: Any, args: Sequence[Any], wanted: Sequence[bool], dout: Any) -> list[Any]:
    """torch.func.vjp with respect to the arguments that are wanted: under functorch's transforms,
    where a tensor can't be told to require a gradient. `function` gives None for what has no part
    in it."""
    places = [k for k, (a, n) in enumerate(zip(args, wanted, strict=True)) if n and a is not None]

    def of_chosen(*chosen: Tensor) -> Any:
        full = list(args)
        for place, tensor in zip(places, chosen, strict=True):
            full[place] = tensor
        out = function(*full)
        return tuple(o for o, d in zip(out, dout, strict=True) if d is not None and o is not None)

    back: Any = torch.func.vjp(of_chosen, *(args[k] for k in places))[1]
    grads = dict(zip(places, back(tuple(d for d in dout if d is not None)), strict=True))
    return [grads.get(k) for k in range(len(args))]


def reference_backward(
    dout: _Grads, args: _Grads, rows: Sequence[Tensor | None], ctx: Any, wanted: Any
) -> list[Tensor | None]:
    """Gradients of the arguments that are wanted, by reference.py, themselves differentiable
    if grad mode is on."""
    return vjp(_reference_of(rows, ctx), dout, args, wanted)


def _reference_of(rows: Sequence[Tensor | None], ctx: Any) -> Any:
    more: dict[str, Any] = {}
    if len(rows) > 2:  # masks (_masked.py)
        *keep, h_scale = ctx.numbers
        more = {"keep": keep, "h_scale": h_scale}

    def run(*args: Any) -> Any:
        return reference.forward(*args, *rows, cell=ctx.cell, reverse=ctx.reverse, **more)

    return run


def vjp(run: Any, dout: _Grads, args: _Grads, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of those arguments of a function that are wanted, themselves differentiable if grad
    mode is on. dout: what arrives at its results."""
    if transforms_active():
        return _chosen_vjp(run, args, wanted, dout)
    create_graph = torch.is_grad_enabled()
    leaves = [_alias(a, n) for a, n in zip(args, wanted, strict=True)]
    with torch.enable_grad():
        return _vjp(run, dout, leaves, wanted, create_graph)


def _vjp(run: Any, dout: Any, leaves: Any, wanted: Any, create_graph: bool) -> list[Tensor | None]:
    out = run(*leaves)
    pairs = [(o, d) for o, d in zip(out, dout, strict=True) if d is not None and o.requires_grad]
    chosen = [leaf for leaf, n in zip(leaves, wanted, strict=True) if n]
    if not pairs or not chosen:
        pairs_wanted = zip(leaves, wanted, strict=True)
        return [torch.zeros_like(leaf) if n else None for leaf, n in pairs_wanted]
    grads = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            chosen,
            [d for _, d in pairs],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return [next(grads) if n else None for n in wanted]


def _second_vjp(
    ctx: Any, args: Any, rows: Any, asked: Any, wanted: Any, ddout: Any
) -> list[Tensor | None]:
    """What _backward_backward gives, under functorch's transforms: dy, dh_n, dc_n and the
    arguments."""

    run = _reference_of(rows, ctx)

    def first(*inputs: Any) -> Any:
        return _chosen_vjp(run, inputs[3:], asked, inputs[:3])

    kept = [d if a else None for d, a in zip(ddout, asked, strict=True)]
    return _chosen_vjp(first, args, wanted, kept)


def _backward_backward(ctx: Any, *ddout: Tensor | None) -> _Grads:
    none: _Grads = (None,) * len(ctx.needs_input_grad)
    args = list(ctx.saved_tensors)
    rows = args[11:]
    batch_sizes: Any = rows[0]
    del args[11:]
    dout_needed, needed = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:11]
    create_graph = torch.is_grad_enabled()
    asked = [bool(ctx.needs & bit) and d is not None for bit, d in zip(_BITS, ddout, strict=True)]
    if not any(asked):
        return none
    # what a state that was not given would have been
    packed = batch_sizes is not None
    if (args[4] is None and (asked[1] or packed)) or (asked[2] and args[5] is None):
        if not packed:
            batch = args[3].shape[1]
        else:  # the shape where there is one: a traced batch_sizes has no values
            batch = int(batch_sizes[0]) if args[1] is None else args[1].shape[0]
        hidden = _hidden(args[6], ctx.cell)
        if args[4] is None:
            out = hidden if args[10] is None else args[10].shape[0]
            args[4] = args[3].new_zeros((batch, out))
        if args[5] is None and cell_spec(ctx.cell).states > 1:
            args[5] = args[3].new_zeros((cell_spec(ctx.cell).states - 1, batch, hidden))

    if transforms_active():
        return (*_second_vjp(ctx, args, rows, asked, (*dout_needed, *needed), ddout), *none[11:])

    dout: list[Any] = [_alias(d, n) for d, n in zip(args[:3], dout_needed, strict=True)]
    # the first derivative needs a node for all that it was asked for, the second for all it is
    either = [(n or a) and t is not None for n, a, t in zip(needed, asked, args[3:], strict=True)]
    leaves = [_alias(t, n) for t, n in zip(args[3:], either, strict=True)]
    with torch.enable_grad():
        run = _reference_of(rows, ctx)
        first = _vjp(run, dout, leaves, [a and e for a, e in zip(asked, either)], True)
        pairs = [
            (g, d)
            for g, d in zip(first, ddout, strict=True)
            if g is not None and d is not None and g.requires_grad
        ]
        inputs = [*dout, *leaves]
        wanted = [n and t is not None for n, t in zip((*dout_needed, *needed), inputs, strict=True)]
        chosen = [t for t, n in zip(inputs, wanted, strict=True) if n]
        if not pairs or not chosen:
            return none
        grads = iter(
            torch.autograd.grad(
                [g for g, _ in pairs],
                chosen,
                [d for _, d in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return (*(next(grads) if n else None for n in wanted), *none[11:])


def refuse_packed(packed: Tensor | None) -> None:
    if packed is not None:
        raise RuntimeError(
            "rnnfast: a frozen or quantized layer gives no gradients; call it under "
            "torch.no_grad() or torch.inference_mode(), or unfreeze() a frozen one"
        )


class RNNFast(torch.autograd.Function):
    """``rnnfast::forward`` with its registered formula, but without the dispatcher's way to Python
    and back, which takes longer than a small layer. For calls that are :func:`is_eager`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        with below_autograd():
            output = forward(*args)
        _forward_setup(ctx, args, output)
        return output

    backward = staticmethod(forward_backward)


torch.library.register_autograd("rnnfast::forward", forward_backward, setup_context=_forward_setup)
torch.library.register_autograd(
    "rnnfast::backward", _backward_backward, setup_context=_backward_setup
)


def _no_derivative(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError(
        "rnnfast: rnnfast::gate_gradients has no derivative; differentiate rnnfast::backward"
    )


def _sample_product_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    left, right, ctx.samples = inputs
    ctx.save_for_backward(left, right)


def _sample_product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    left, right = (t.unflatten(1, (ctx.samples, -1)) for t in ctx.saved_tensors)
    return (right @ grad.mT).flatten(1, 2), (left @ grad).flatten(1, 2), None


torch.library.register_autograd("rnnfast::gate_gradients", _no_derivative)
torch.library.register_autograd(
    "rnnfast::sample_product", _sample_product_backward, setup_context=_sample_product_setup
)


def refuse_tangents_in(name: str, operator: Any, function: Any) -> None:
    """Make calls of an operator with dual tensors raise, where it would lose their tangents: those
    of an exported program, say. ``function``: the autograd function of its formula."""

    def kernel(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if has_tangent(tensors):
            raise RuntimeError(
                f"rnnfast: {name} can't carry tangents (forward-mode AD); call the layer itself, "
                "outside of exported programs"
            )
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return function.apply(*args)
        with below_autograd():
            return operator(*args)

    for device in ("CPU", "CUDA"):
        torch.library.impl(name, f"Autograd{device}")(kernel)


class Forward(RNNFast):
    """``rnnfast::forward`` where the dispatcher came to it."""


refuse_tangents_in("rnnfast::forward", forward, Forward)
