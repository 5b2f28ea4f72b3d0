"""Layers with ``recompute=True``: forward keeps the states every EVERY steps, and backward computes
what lies between two of them anew, a chunk of steps at a time, from the last to the first.

Two operators, so that a graph holds one node whatever T is, and for plain eager calls an autograd
function that passes by the dispatcher's way to Python."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _masked, _modes, engine, ops
from ._checks import check_layer
from ._masked import Masks
from ._modes import is_beyond_kernels
from .cells import cell_spec

# Steps from one kept state to the next. Fewer keep more states and leave the threads less to
# share, more make what backward holds at a time larger; between 32 and 128 the time hardly changes.
# Not a function of T: a graph of dynamic length has no number to take the root of.
EVERY = 64

_HALF = (torch.bfloat16, torch.float16)
_WEIGHTS = range(3, 8)  # among the gradients: w_ih, w_hh, b_ih, b_hh, w_hr


class _Chunk(NamedTuple):
    rows: slice  # of x and y: steps, or packed rows
    steps: slice
    batch: int  # sequences that it has; of a packed batch the first so many


def _chunks(x: Tensor, batch_sizes: Tensor | None, every: int, reverse: bool) -> list[_Chunk]:
    """In the order in which forward takes them."""
    found = []
    if batch_sizes is None:
        for t in range(0, x.size(0), every):
            cut = slice(t, min(t + every, x.size(0)))
            found.append(_Chunk(cut, cut, x.size(1)))
    else:
        sizes, row = batch_sizes.tolist(), 0
        for t in range(0, len(sizes), every):
            after = row + sum(sizes[t : t + every])
            found.append(_Chunk(slice(row, after), slice(t, t + every), sizes[t]))
            row = after
    return found[::-1] if reverse else found


def _packed(x: Tensor, w_ih: Tensor, w_hh: Tensor, w_hr: Tensor | None, cell: int) -> Tensor | None:
    """The weights packed once for all chunks, where a call of the whole sequence would pack them:
    so y has the bits that it has there."""
    if not x.is_cpu or x.is_meta or x.numel() == 0:
        return None
    hidden = w_ih.size(0) // cell_spec(cell).gates
    rows = x.numel() // x.size(-1)
    sizes = (rows, 1, x.size(-1), hidden, hidden if w_hr is None else w_hr.size(0))
    if engine.choose(cell, sizes, x.element_size(), 1)[2] != "packed":
        return None
    return ops.pack(w_ih, w_hh, w_hr, cell)


def _run_forward(masks: Masks, args: tuple[Any, ...], packed: Any, *rest: Any) -> tuple[Any, ...]:
    """args: up to reset; rest: cell, reverse, save."""
    if not masks.there:
        return ops.forward(*args, packed, *rest)
    return _masked.forward(*args, *masks[:2], packed, *masks.numbers, *rest)


def _run_backward(masks: Masks, args: tuple[Any, ...], *rest: Any) -> tuple[Any, ...]:
    """args: up to reset; rest: y, saved, cell, reverse, needs."""
    if not masks.there:
        return ops.backward(*args, *rest)
    return _masked.backward(*args, *masks[:2], *rest[:2], *masks.numbers, *rest[2:])


def _cut(masks: Masks, rows: slice, n: int) -> Masks:
    """Those of a chunk."""
    zone, h_kept = masks[:2]
    return masks._replace(
        zone=None if zone is None else zone[rows], h_kept=None if h_kept is None else h_kept[:n]
    )


def _forward(
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
    cell: int,
    reverse: bool,
    every: int,
    *drawn: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, h_n, c_n and the states that enter each chunk: (K, B, P) and (K, S-1, B, H)."""
    spec = cell_spec(cell)
    check_layer(spec, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reset)
    masks = Masks(*drawn)
    weights = (w_ih, w_hh, b_ih, b_hh, w_hr)
    packed = _packed(x, w_ih, w_hh, w_hr, cell)
    chunks = _chunks(x, batch_sizes, every, reverse)
    batch = max(chunk.batch for chunk in chunks)
    hidden = w_ih.size(0) // spec.gates
    out = hidden if w_hr is None else w_hr.size(0)
    y = x.new_empty((*x.shape[:-1], out))
    h = x.new_zeros(batch, out) if h0 is None else h0.clone()
    c = x.new_zeros(spec.states - 1, batch, hidden) if c0 is None else c0.clone()
    # sequences that a chunk has not keep their first state, or the one that they ended with
    h_before, c_before = h.new_empty(len(chunks), *h.shape), c.new_empty(len(chunks), *c.shape)
    for k, (rows, steps, n) in enumerate(chunks):
        h_before[k], c_before[k] = h, c
        given = (
            x[rows], h[:n], c[:, :n] if spec.states > 1 else None, *weights,
            None if batch_sizes is None else batch_sizes[steps],
            None if reset is None else reset[rows],
        )  # fmt: skip
        cut = _cut(masks, rows, n)
        y_chunk, h_n, c_n, _ = _run_forward(cut, given, packed, cell, reverse, False)
        y[rows], h[:n], c[:, :n] = y_chunk, h_n, c_n
    return y, h, c, h_before, c_before


def _backward(
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
    h_before: Tensor,
    c_before: Tensor,
    cell: int,
    reverse: bool,
    every: int,
    needs: int,
    *drawn: Any,
) -> list[Tensor]:
    """The gradients as ``rnnfast::backward`` gives them, empty where not needed."""
    spec = cell_spec(cell)
    masks = Masks(*drawn)
    weights = (w_ih, w_hh, b_ih, b_hh, w_hr)
    packed = _packed(x, w_ih, w_hh, w_hr, cell)
    chunks = _chunks(x, batch_sizes, every, reverse)
    # The CPU engine's backward computes 16 bits in float32: between chunks nothing is rounded
    # then. Sums over chunks are float32 everywhere.
    half = x.dtype in _HALF
    wide = half and x.is_cpu

    def widened(tensor: Tensor | None) -> Tensor | None:
        return tensor.float() if wide and tensor is not None else tensor

    given = [widened(w) for w in weights]
    carried = torch.float32 if wide else x.dtype
    two = spec.states > 1
    dh, dc = (
        torch.zeros_like(kept[0], dtype=carried) if d is None else d.to(carried, copy=True)
        for kept, d in ((h_before, dh_n), (c_before, dc_n))
    )
    dx = x.new_empty(x.shape if needs & 1 else (0,))
    sums: dict[int, Tensor] = {}
    for k in reversed(range(len(chunks))):
        rows, steps, n = chunks[k]
        sizes = None if batch_sizes is None else batch_sizes[steps]
        anew = None if reset is None else reset[rows]
        x_chunk, h, c = x[rows], h_before[k, :n], c_before[k, :, :n] if two else None
        cut = _cut(masks, rows, n)
        y, _, _, saved = _run_forward(
            cut, (x_chunk, h, c, *weights, sizes, anew), packed, cell, reverse, True
        )
        # the states' gradients go on to the chunk before
        wanted = needs | 2 | (4 if two else 0) if k else needs
        args = (
            None if dy is None else widened(dy[rows]), dh[:n], dc[:, :n] if two else None,
            widened(x_chunk), widened(h), widened(c), *given, sizes, anew,
        )  # fmt: skip
        grads = _run_backward(cut, args, widened(y), saved, cell, reverse, wanted)
        if needs & 1:
            dx[rows] = grads[0]
        if wanted & 2:
            dh[:n] = grads[1]
        if wanted & 4:
            dc[:, :n] = grads[2]
        for i in _WEIGHTS:
            if needs & 1 << i:
                grad = grads[i].float() if half else grads[i]
                sums[i] = sums[i].add_(grad) if i in sums else grad
    none = x.new_empty(0)
    result = [dx, dh.to(x.dtype) if needs & 2 else none, dc.to(x.dtype) if needs & 4 else none]
    result += [sums[i].to(x.dtype) if i in sums else none for i in _WEIGHTS]
    return [g.clone() if g is none else g for g in result]  # an operator's results are apart


_MASKS = (
    "Tensor? zone=None, Tensor? h_kept=None, float keep_h=0.0, float keep_c=0.0, float h_scale=1.0"
)
_forward_op: Any = torch.library.custom_op(
    "rnnfast::forward_recompute",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
    "Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, Tensor? reset, int cell, bool reverse, "
    f"int every, {_MASKS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_backward_op: Any = torch.library.custom_op(
    "rnnfast::backward_recompute",
    _backward,
    mutates_args=(),
    schema="(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, "
    "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, "
    "Tensor? reset, Tensor h_before, Tensor c_before, int cell, bool reverse, int every, "
    f"int needs, {_MASKS}) -> Tensor[]",
)


@_forward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    tensors, (cell, reverse, every), masks = args[:10], args[10:13], Masks(*args[13:])
    x, batch_sizes = tensors[0], tensors[8]
    y, h_n, c_n, _ = _masked.forward_fake(
        *tensors, *masks[:2], None, *masks.numbers, cell, reverse, False
    )
    steps = x.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    count = (steps + every - 1) // every
    return y, h_n, c_n, h_n.new_empty(count, *h_n.shape), c_n.new_empty(count, *c_n.shape)


@_backward_op.register_fake
def _(*args: Any) -> list[Tensor]:
    tensors = list(args[:13])
    h_before, c_before, cell, reverse, _, needs = args[13:19]
    # a packed batch without a state has its size in what is kept
    tensors[4] = h_before[0] if tensors[4] is None else tensors[4]
    return list(ops.backward_fake(*tensors, h_before, c_before, cell, reverse, needs))


class AsPlain:
    """What the formula of ``rnnfast::forward`` looks at in its ctx."""

    save = False  # it computes what forward would have saved

    def __init__(self, ctx: Any, inputs: tuple[Any, ...]) -> None:
        self.saved_tensors = (*inputs, None, None)
        self.needs_input_grad = ctx.needs_input_grad
        self.cell, self.reverse = ctx.cell, ctx.reverse
        self.numbers = getattr(ctx, "numbers", None)  # of masks


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.cell, ctx.reverse, ctx.every = inputs[10:13]
    masks = Masks(*inputs[13:])
    ctx.numbers = masks.numbers
    *_, c_n, h_before, c_before = output
    one_state = cell_spec(ctx.cell).states == 1
    ctx.mark_non_differentiable(h_before, c_before, *([c_n] if one_state else []))
    ctx.save_for_backward(*inputs[:10], *masks[:2], h_before, c_before)


def _formula(
    ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    none: tuple[None, ...] = (None,) * 18
    incoming = (dy, dh_n, dc_n)
    if all(d is None for d in incoming):
        return none
    *inputs, h_before, c_before = ctx.saved_tensors
    masks = Masks(*inputs[10:], *ctx.numbers)
    compiling = torch.compiler.is_compiling()
    if not compiling and (torch.is_grad_enabled() or is_beyond_kernels(incoming)):
        # who differentiates gradients keeps everything anyway; batches are for the reference
        if masks.there:
            exact = _masked.formula(AsPlain(ctx, tuple(inputs)), *incoming, None)
        else:
            exact = ops.forward_backward(AsPlain(ctx, tuple(inputs[:10])), *incoming, None)
        return (*exact[:8], *none[8:])
    needed = ctx.needs_input_grad[:8]
    numbers = (ctx.cell, ctx.reverse, ctx.every, ops.needs_mask(needed))
    args: Any = (*incoming, *inputs[:10], h_before, c_before, *numbers)
    if masks.there:
        args = (*args, *masks)
    if _modes.is_eager(args):
        with ops.below_autograd():
            grads = _backward(*args)
    else:
        grads = _backward_op(*args)
    return (*(g if n else None for g, n in zip(grads, needed, strict=True)), *none[8:])


_forward_op.register_autograd(_formula, setup_context=_setup)


class _Recompute(torch.autograd.Function):
    """``rnnfast::forward_recompute`` with the same formula, for calls that are eager."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        with ops.below_autograd():
            output = _forward(*args)
        _setup(ctx, args, output)
        return output

    backward = staticmethod(_formula)


def run(*args: Any, masks: Masks | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of one layer as ``rnnfast::forward`` takes it, to be differentiated: (y, h_n,
    c_n). args: x, h0, c0, the weights, batch_sizes, reset, cell, reverse."""
    given = (*args, EVERY, *(masks or ()))
    out = _Recompute.apply(*given) if _modes.is_eager(given) else _forward_op(*given)
    return out[0], out[1], out[2]
