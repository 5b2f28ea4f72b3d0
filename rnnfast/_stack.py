"""All layers and directions as one operator, for graphs of torch.compile: one node whatever T is,
without a ``cat`` or sum beside it for which a compiler would write kernels, and inside it
directions and layers run side by side.

The kernels are Python between the group operators of _group.py. Export keeps one operator a
direction, which ONNX and AOTInductor in C++ know.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from . import _group, _lengths, _passes, ops, reference
from ._checks import has_values
from ._modes import is_beyond_kernels, refuse_tangents, transforms_active
from .cells import CellSpec, cell_spec

# Gives y, h_n, c_n, and for backward the output of each layer below the last, what each pass saved,
# and the masks of dropout between layers. A Tensor?[] would lose gradients: weights are those there
# are.
_FORWARD = (
    "(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, "
    "Tensor? reset, int cell, int num_layers, int directions, float dropout, bool save) -> Tensor[]"
)
# Gives those gradients of x, h0, c0 and the weights that are needed.
_BACKWARD = (
    "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, "
    "Tensor? batch_sizes, Tensor? lengths, Tensor? reset, Tensor y, Tensor[] kept, int cell, "
    "int num_layers, int directions, float dropout, bool[] needs) -> Tensor[]"
)


def _refuse(expected: str, found: Any) -> NoReturn:
    raise RuntimeError(f"rnnfast: {expected}, got {found}")


def _check(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: int,
    num_layers: int,
    directions: int,
) -> None:
    """What the passes, each of which sees its part, would not notice."""
    if num_layers < 1 or directions not in (1, 2):
        _refuse("num_layers must be at least 1, directions 1 or 2", (num_layers, directions))
    count = num_layers * directions
    if len(weights) not in range(2 * count, 6 * count, count):
        _refuse(f"weights must hold 2 to 5 tensors for each of L*D = {count} passes", len(weights))
    rest = max(cell_spec(cell).states - 1, 1)
    of_c = "(L*D, B, H)" if rest == 1 else "(L*D*(S-1), B, H)"
    for name, letters, state, each in (("h0", "(L*D, B, P)", h0, 1), ("c0", of_c, c0, rest)):
        if state is not None and (state.dim() != 3 or state.size(0) != count * each):
            _refuse(f"{name} must have shape {letters} with L*D = {count}", tuple(state.shape))
    if lengths is not None:
        if batch_sizes is not None:
            _refuse("lengths are for padded x", "batch_sizes, too")
        _lengths._check_lengths(lengths, x)


def _rows(lengths: Tensor | None, x: Tensor) -> _lengths.Rows | None:
    return None if lengths is None else _lengths._rows(lengths, x.size(0), x.device)


def _at_once(count: int, directions: int, dropout: float) -> int:
    """How many passes one call of a group operator takes."""
    return count if directions == 1 and dropout == 0 else directions


def _drop(y: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """What ``torch.native_dropout`` made of y when it drew this mask."""
    return y * mask * (0.0 if dropout == 1 else 1 / (1 - dropout))


def _forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    cell: int,
    num_layers: int,
    directions: int,
    dropout: float,
    save: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs, inner ones, saved, masks; without lengths."""
    inner: list[Tensor] = []
    saved: list[Tensor] = []
    masks: list[Tensor] = []
    chained = directions == 1

    def run(y: Tensor, first: int, some: Sequence[_passes.Pass]) -> list[list[Tensor]]:
        given = [t for one in some for t in one]
        out = _group._forward_group(y, given, batch_sizes, cell, chained, save)
        saved.extend(out[3::4])
        if chained:
            inner.extend(out[:-4:4])
        return [out[i : i + 3] for i in range(0, len(out), 4)]

    def between(y: Tensor) -> Tensor:
        inner.append(y)
        if dropout == 0:
            return y
        dropped, mask = torch.native_dropout(y, dropout, True)
        masks.append(mask.bool())  # of no rows it is not
        return dropped

    spec = cell_spec(cell)
    passes = _passes.split(spec, weights, num_layers, directions, h0, c0, batch_sizes, reset)
    at_once = _at_once(len(passes), directions, dropout)
    outputs = list(_passes.walk(spec, x, passes, directions, at_once, run, between))
    return (outputs, inner, saved, masks) if save else (outputs, [], [], [])


def _flat(parts: Sequence[list[Tensor]]) -> list[Tensor]:
    return list(itertools.chain.from_iterable(parts))


def _forward_kernel(
    x: Tensor, h0: Any, c0: Any, weights: Any, batch_sizes: Any, lengths: Any, reset: Any,
    cell: int, num_layers: int, directions: int, dropout: float, save: bool,
) -> list[Tensor]:  # fmt: skip
    _check(x, h0, c0, weights, batch_sizes, lengths, cell, num_layers, directions)
    numbers = (cell, num_layers, directions, dropout, save)
    rows = _rows(lengths, x)
    if rows is None:
        return _flat(_forward(x, h0, c0, weights, batch_sizes, reset, *numbers))
    (y, h_n, c_n), inner, saved, masks = _forward(
        rows.pack(x), rows.sort(h0, 1), rows.sort(c0, 1), weights, rows.batch_sizes,
        rows.pack(reset), *numbers,
    )  # fmt: skip
    if saved:  # in a graph its size must not depend on lengths
        rest = saved[0].new_zeros((x.size(0) * x.size(1) - rows.count, *saved[0].shape[1:]))
        saved = [torch.cat([tensor, rest]) for tensor in saved]
    kept = [*map(rows.pad, inner), *saved, *map(rows.pad, masks)]
    return [rows.pad(y), rows.unsort(h_n, 1), rows.unsort(c_n, 1), *kept]


def _forward_fake(
    x: Tensor, h0: Any, c0: Any, weights: Any, batch_sizes: Any, lengths: Any, reset: Any,
    cell: int, num_layers: int, directions: int, dropout: float, save: bool,
) -> list[Tensor]:  # fmt: skip
    _check(x, h0, c0, weights, batch_sizes, lengths, cell, num_layers, directions)
    if batch_sizes is not None and h0 is None:
        # an unknown batch, which must be the same one in all passes
        count = num_layers * directions
        each = len(weights) // count
        out = weights[each - 1].size(0) if each % 2 else weights[0].size(0) // cell_spec(cell).gates
        batch = ops._batch(batch_sizes, None if c0 is None else c0[0, :])
        h0 = x.new_empty((count, batch, out))
    numbers = (cell, num_layers, directions, dropout, save)
    return _flat(_forward(x, h0, c0, weights, batch_sizes, reset, *numbers))


def _split_kept(kept: Sequence[Tensor], num_layers: int, directions: int) -> Iterator[list[Tensor]]:
    """The inner outputs, saved, masks."""
    ends = (0, num_layers - 1, num_layers - 1 + num_layers * directions, len(kept))
    return (list(kept[i:j]) for i, j in itertools.pairwise(ends))


def _halves(tensor: Tensor | None, directions: int) -> Sequence[Tensor | None]:
    """That of each direction."""
    return (None,) * directions if tensor is None else tensor.chunk(directions, -1)


class _Needs(NamedTuple):
    lowest: int  # no layer below this one has anything to learn
    masks: list[int]  # of each pass, as ``rnnfast::backward`` has it
    places: list[list[int]]  # of the weights' gradients among the eight of each pass


@functools.lru_cache(maxsize=1024)
def _needs_of_passes(needs: tuple[bool, ...], num_layers: int, directions: int) -> _Needs:
    """What `needs` of the operator is for the passes."""
    count = num_layers * directions
    each = (len(needs) - 3) // count
    all_places = [place + 1 for place in _passes.weight_places(each)]  # after that of x
    of_weights = [needs[3 + each * i : 3 + each * (i + 1)] for i in range(count)]
    learning = (i for i, w in enumerate(of_weights) if any(needs[:3]) or any(w))
    lowest = next(learning, count) // directions
    places = [[p for p, n in zip(all_places, w, strict=True) if n] for w in of_weights]
    masks = []
    for i, chosen in enumerate(places):
        below = needs[0] or i // directions > lowest
        masks.append(ops.needs_mask([below, *needs[1:3], *(p in chosen for p in range(3, 8))]))
    return _Needs(lowest, masks, places)


def _backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    kept: Sequence[Tensor],
    cell: int,
    num_layers: int,
    directions: int,
    dropout: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients, without lengths."""
    spec = cell_spec(cell)
    rest = spec.states - 1
    passes = _passes.split(spec, weights, num_layers, directions, h0, c0, batch_sizes, reset)
    inner, saved, masks = _split_kept(kept, num_layers, directions)
    ys = [half for of_layer in (*inner, y) for half in _halves(of_layer, directions)]
    lowest, masks_of_needs, places = _needs_of_passes(tuple(needs), num_layers, directions)
    at_once = _at_once(len(passes), directions, dropout)
    grads: list[Sequence[Tensor]] = [()] * len(passes)
    for first in reversed(range(lowest * directions, len(passes), at_once)):
        layer, end = first // directions, min(first + at_once, len(passes))
        dys = [*(None,) * (end - first - directions), *_halves(dy, directions)]
        given: list[Tensor | None] = []
        for i in range(first, end):
            dh = None if dh_n is None else dh_n[i]
            dc = None if dc_n is None else dc_n[i * rest : (i + 1) * rest]
            given += [*passes[i][:8], ys[i], saved[i], dys[i - first], dh, dc]
        entered = x if layer == 0 else inner[layer - 1]
        if layer > 0 and masks:
            entered = _drop(entered, masks[layer - 1], dropout)
        out = _group._backward_group(
            entered, given, batch_sizes, cell, directions == 1, masks_of_needs[first:end]
        )
        grads[first:end] = [out[k : k + 8] for k in range(0, len(out), 8)]
        dy = out[0] if directions == 1 else out[0] + out[8]
        if layer > lowest and masks:
            dy = _drop(dy, masks[layer - 1], dropout)
    results = [dy] if needs[0] and dy is not None else []
    if needs[1]:
        results.append(torch.stack([g[1] for g in grads]))
    if needs[2]:
        results.append(torch.cat([g[2] for g in grads]))
    return results + [g[place] for g, of_pass in zip(grads, places) for place in of_pass]


def _backward_kernel(
    dy: Any, dh_n: Any, dc_n: Any, x: Tensor, h0: Any, c0: Any, weights: Any, batch_sizes: Any,
    lengths: Any, reset: Any, y: Tensor, kept: Any, cell: int, num_layers: int, directions: int,
    dropout: float, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    _check(x, h0, c0, weights, batch_sizes, lengths, cell, num_layers, directions)
    numbers = (cell, num_layers, directions, dropout, needs)
    rows = _rows(lengths, x)
    if rows is None:
        last = (batch_sizes, reset, y, kept, *numbers)
        return _backward(dy, dh_n, dc_n, x, h0, c0, weights, *last)
    inner, saved, masks = _split_kept(kept, num_layers, directions)
    saved = [tensor[: rows.count] for tensor in saved]
    kept = [*map(rows.pack, inner), *saved, *map(rows.pack, masks)]
    grads = _backward(
        rows.pack(dy), rows.sort(dh_n, 1), rows.sort(dc_n, 1), rows.pack(x), rows.sort(h0, 1),
        rows.sort(c0, 1), weights, rows.batch_sizes, rows.pack(reset), rows.pack(y), kept, *numbers,
    )  # fmt: skip
    if needs[0]:
        grads[0] = rows.pad(grads[0])
    for k in range(needs[0], sum(needs[:3])):
        grads[k] = rows.unsort(grads[k], 1)
    return grads


def _backward_fake(
    dy: Any, dh_n: Any, dc_n: Any, x: Tensor, h0: Any, c0: Any, weights: Any, batch_sizes: Any,
    lengths: Any, reset: Any, y: Tensor, kept: Any, cell: int, num_layers: int, directions: int,
    dropout: float, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    _check(x, h0, c0, weights, batch_sizes, lengths, cell, num_layers, directions)
    ops._check_devices(
        x, batch_sizes, dy=dy, dh_n=dh_n, dc_n=dc_n, h0=h0, c0=c0, reset=reset, y=y,
        **{f"weights[{i}]": t for i, t in enumerate(weights)},
        **{f"kept[{i}]": t for i, t in enumerate(kept)},
    )  # fmt: skip
    wanted = itertools.compress((x, h0, c0, *weights), needs)
    return [x.new_empty(tensor.shape) for tensor in wanted]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    x, h0, c0, weights, batch_sizes, lengths, reset, *ctx.numbers, ctx.save = inputs
    y, _, c_n, *kept = output
    ctx.mark_non_differentiable(*kept, *([c_n] if cell_spec(ctx.numbers[0]).states == 1 else []))
    ctx.save_for_backward(x, h0, c0, batch_sizes, lengths, reset, y, *weights, *kept)


def _formula(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    *needs, of_weights = ctx.needs_input_grad[:4]
    needs += of_weights
    none: list[None] = [None] * 8
    dout = tuple(grads[:3])
    if all(d is None for d in dout):
        return (None, None, None, [None] * len(of_weights), *none)
    if not ctx.save:
        raise RuntimeError("rnnfast: forward_stack keeps nothing for backward if save is false")
    x, h0, c0, *rows, y = (tensors := ctx.saved_tensors)[:7]  # once: hooks unpack them once
    weights, kept = list(tensors[7 : 7 + len(of_weights)]), list(tensors[7 + len(of_weights) :])
    args = (*dout, x, h0, c0, weights, *rows, y, kept, *ctx.numbers, needs)
    compiling = torch.compiler.is_compiling()
    if not compiling and (torch.is_grad_enabled() or is_beyond_kernels(dout)):
        backward: Any = _exact_backward
    else:
        backward = _backward_op if rows[1] is None else _backward_lengths_op
    found = iter(backward(*args))
    result = [next(found) if needed else None for needed in needs]
    return (*result[:3], result[3:], *none)


def _one_by_one(
    batch_sizes: Any, lengths: Any, reset: Any, kept: Sequence[Tensor], cell: int, num_layers: int,
    directions: int, dropout: float,
) -> Any:  # fmt: skip
    """The same as a function of x, h0, c0 and the weights with derivatives of any order: where
    gradients will be differentiated, or come in batches or with tangents."""
    masks = list(_split_kept(kept, num_layers, directions))[2]
    if lengths is not None and not has_values(lengths):
        raise RuntimeError(
            "rnnfast: second derivatives of a layer with lengths can't be traced; take them "
            "outside of torch.compile"
        )

    def call(x: Tensor, h0: Any, c0: Any, *weights: Tensor) -> Any:
        rows = _rows(lengths, x)
        sizes, cut, drawn = batch_sizes, reset, iter(masks)
        if rows is not None:
            x, h0, c0 = _lengths.pack(x, rows), rows.sort(h0, 1), rows.sort(c0, 1)
            sizes, cut, drawn = rows.batch_sizes, rows.pack(reset), map(rows.pack, masks)

        def run(y: Tensor, first: int, some: Sequence[_passes.Pass]) -> Any:
            given = [(y, *tensors, sizes, now) for *tensors, now, _ in some]
            if transforms_active():  # the operator would stop them
                reference_of: Any = reference.forward
                return [reference_of(*g, cell=cell, reverse=k == 1) for k, g in enumerate(given)]
            return [ops.forward(*g, None, cell, k == 1, True)[:3] for k, g in enumerate(given)]

        def between(y: Tensor) -> Tensor:
            return _drop(y, next(drawn), dropout) if masks else y

        spec = cell_spec(cell)
        passes = _passes.split(spec, weights, num_layers, directions, h0, c0, sizes, cut)
        y, h_n, c_n = _passes.walk(spec, x, passes, directions, directions, run, between)
        if rows is None:
            return y, h_n, c_n
        return _lengths.pad(y, rows), rows.unsort(h_n, 1), rows.unsort(c_n, 1)

    return call


def _exact_backward(
    dy: Any, dh_n: Any, dc_n: Any, x: Tensor, h0: Any, c0: Any, weights: Any, batch_sizes: Any,
    lengths: Any, reset: Any, y: Tensor, kept: Any, cell: int, num_layers: int, directions: int,
    dropout: float, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients by :func:`_one_by_one`; also the compiled backward's under is_grads_batched."""
    run = _one_by_one(batch_sizes, lengths, reset, kept, cell, num_layers, directions, dropout)
    grads = ops.vjp(run, (dy, dh_n, dc_n), (x, h0, c0, *weights), needs)
    return [g for g in grads if g is not None]


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    *dout, x, h0, c0, weights, batch_sizes, lengths, reset, y, kept = inputs[:12]
    ctx.numbers = inputs[12:]
    ctx.save_for_backward(*dout, x, h0, c0, batch_sizes, lengths, reset, y, *weights, *kept)


def _second_formula(ctx: Any, ddout: Sequence[Tensor | None]) -> tuple[Any, ...]:
    *dout, x, h0, c0, batch_sizes, lengths, reset, y = (tensors := ctx.saved_tensors)[:10]
    *needs, of_weights = ctx.needs_input_grad[:7]
    weights, kept = tensors[10 : 10 + len(of_weights)], tensors[10 + len(of_weights) :]

    def first(dy: Any, dh_n: Any, dc_n: Any, x: Any, h0: Any, c0: Any, *weights: Any) -> Any:
        rows = (batch_sizes, lengths, reset)
        return _exact_backward(dy, dh_n, dc_n, x, h0, c0, weights, *rows, y, kept, *ctx.numbers)

    args = (*dout, x, h0, c0, *weights)
    found = ops.vjp(first, tuple(ddout), args, [*needs, *of_weights])
    return (*found[:6], found[6:], *(None,) * 4, [None] * len(kept), *(None,) * 5)


def _define(name: str, schema: str, tags: Any, kernel: Any, fake: Any) -> Any:
    name = f"rnnfast::{name}"
    torch.library.define(name, schema, tags=tags)
    torch.library.impl(name, "default")(kernel)
    torch.library.register_fake(name, fake)
    if kernel is _forward_kernel:
        torch.library.register_autograd(name, _formula, setup_context=_setup)
    else:
        torch.library.register_autograd(name, _second_formula, setup_context=_backward_setup)
        torch.library.impl(name, "Batched")(_exact_backward)
    return getattr(torch.ops.rnnfast, name.partition("::")[2]).default


# A tag holds for the whole operator. So calls that draw have one of their own, and calls with
# lengths, which are read on the host, so that no CUDA graph may hold them.
_DRAWS, _READS = (torch.Tag.nondeterministic_seeded,), (torch.Tag.cudagraph_unsafe,)
# by whether there is dropout, and whether there are lengths
_FORWARD_OPS = {
    (draws, reads): _define(
        "forward_stack" + "_lengths" * reads + "_dropout" * draws,
        _FORWARD,
        _DRAWS * draws + _READS * reads,
        _forward_kernel,
        _forward_fake,
    )
    for draws, reads in itertools.product((False, True), repeat=2)
}
_backward_op = _define("backward_stack", _BACKWARD, (), _backward_kernel, _backward_fake)
_backward_lengths_op = _define(
    "backward_stack_lengths", _BACKWARD, _READS, _backward_kernel, _backward_fake
)


def saves(x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Whether a call keeps what backward needs."""
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, h0, c0, *weights)
    )


def run(
    spec: CellSpec,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    num_layers: int,
    directions: int,
    dropout: float,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """_run.stack in a graph."""
    dropout = dropout if num_layers > 1 else 0.0
    forward = _FORWARD_OPS[dropout != 0, lengths is not None]
    y, h_n, c_n, *_ = forward(
        refuse_tangents(x), h0, c0, list(weights), batch_sizes, lengths, reset, spec.id,
        num_layers, directions, dropout, saves(x, h0, c0, weights),
    )  # fmt: skip
    return y, h_n, c_n
