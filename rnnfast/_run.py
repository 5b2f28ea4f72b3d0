"""The path of every call: checks, the choice between operators and reference, layers and
directions. The layers (lstm.py, ...) and the functions (functional.py) both end here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import (
    _functorch,
    _group,
    _hx,
    _last,
    _lengths,
    _mask,
    _masks,
    _modes,
    _passes,
    _recompute,
    _regularize,
    _reset,
    _stack,
    engine,
    ops,
    reference,
)
from ._cast import (
    autocast_weights,
    check_device,
    is_any_autocast_enabled,
    match_input,
    match_state,
    refuse_input,
)
from ._checks import (
    check_batch_sizes,
    check_dense,
    check_lengths_kind,
    check_recompute,
    check_weights,
)
from ._masked import Masks
from ._modes import is_transformed, refuse_tangents
from ._modes import transforms_active as _transforms_active
from ._regularize import Options
from ._route import is_exporting, use_reference
from .cells import CellSpec

_forward = ops.forward
_run_eager = ops.RNNFast.apply
_is_grad_enabled = torch.is_grad_enabled
_strided = torch.strided


def direction(
    use_ref: bool,
    spec: CellSpec,
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
    packed_weights: Tensor | None,
    reverse: bool,
    lengths: Tensor | None = None,
    recompute: bool = False,
    last: bool = False,
    masks: Masks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of one layer: (y, h_n, c_n); `last`: nobody reads y."""
    if masks is not None:
        return _masks.direction(
            use_ref, spec, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reset,
            packed_weights, reverse, lengths, recompute, masks,
        )  # fmt: skip
    if use_ref:
        check_weights(spec, x, w_ih, w_hh, b_ih, b_hh, w_hr)
        if not torch.compiler.is_compiling():
            engine.note_reference()
        elif not _transforms_active():
            x = refuse_tangents(x)
        if lengths is not None:
            return _lengths.direction(
                True, spec, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reset, None, reverse,
                False,
            )  # fmt: skip
        return reference.forward(
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reset, cell=spec, reverse=reverse
        )
    if is_transformed():
        if _transforms_active():
            if _functorch.is_differentiated():
                ops.refuse_packed(packed_weights)
            tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
            return _functorch.direction(spec, tensors, reset, reverse)
        x = refuse_tangents(x)
    save = _is_grad_enabled() and (
        w_hh.requires_grad
        or x.requires_grad
        or w_ih.requires_grad
        or any(t is not None and t.requires_grad for t in (h0, c0, b_ih, b_hh, w_hr))
    )
    if save:
        ops.refuse_packed(packed_weights)
        # an exported graph is for inference; should it be trained, backward computes `saved` anew
        save = not is_exporting()
    elif last and x.is_cpu and lengths is None:
        return _last.run(
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reset, packed_weights, spec.id,
            reverse,
        )  # fmt: skip
    if lengths is not None:
        return _lengths.direction(
            False, spec, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reset, packed_weights,
            reverse, save and not recompute,
        )  # fmt: skip
    if save and recompute:
        return _recompute.run(
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reset, spec.id, reverse
        )
    args = (
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reset, packed_weights, spec.id,
        reverse, save,
    )  # fmt: skip
    if not _modes.is_eager(args):
        return _forward(*args)[:3]
    if save:
        return _run_eager(*args)[:3]
    with ops.below_autograd():
        return _forward(*args)[:3]


def stack(
    spec: CellSpec,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Any],
    bias: bool,
    num_layers: int,
    directions: int,
    dropout: float,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    packed_weights: Sequence[Tensor] | None,
    lengths: Tensor | None = None,
    recompute: bool = False,
    last: bool = False,
    masks: Sequence[Masks] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers and directions.

    x (T, B, I) or packed (N, I), h0 (L*D, B, P), c0 (L*D*(S-1), B, H) or None, reset (T, B) or (N,)
    as the forward direction has it; weights: of each head in turn; packed_weights: those of a
    frozen layer; lengths: of padded x, where a graph keeps them; last: nobody reads y, which may
    then be empty; masks: those of each pass. Gives y, h_n (L*D, B, P) and c_n (L*D*(S-1), B, H),
    which is empty for cells of one state.
    """
    without_rules = batch_sizes is not None or spec.parameters > 0
    use_ref = use_reference(x, h0, c0, weights, without_rules)
    # some cells save nothing but y
    recompute = recompute and spec.planes > 0 and _is_grad_enabled()
    if use_ref and batch_sizes is not None:
        check_batch_sizes(batch_sizes, x.size(0))
    of_layer = directions * spec.heads  # passes side by side
    if num_layers == 1 and of_layer == 1:
        # bias says what the layer has: parameters stand behind a bias that it may not have
        b_ih, b_hh = weights[2:4] if len(weights) >= 4 else (None, None)
        w_hr = weights[-1] if len(weights) % 2 else None
        y, h_n, c_n = direction(
            use_ref,
            spec,
            x,
            None if h0 is None else h0.squeeze(0),
            c0,
            weights[0],
            weights[1],
            b_ih,
            b_hh,
            w_hr,
            batch_sizes,
            reset,
            None if packed_weights is None else packed_weights[0],
            False,
            lengths,
            recompute,
            last,
            None if masks is None else masks[0],
        )
        if use_ref or _transforms_active():
            return y, h_n.unsqueeze(0), c_n
        # no view: FSDP2 loses its hook on one that is then changed in place
        return y, h_n.unsqueeze_(0), c_n

    if torch.compiler.is_compiling() and not (
        use_ref
        or recompute
        or packed_weights is not None
        or masks is not None
        or spec.heads > 1
        or is_exporting()
        or (last and x.is_cpu and lengths is None and not _stack.saves(x, h0, c0, weights))
    ):
        return _stack.run(
            spec, x, h0, c0, weights, num_layers, directions, dropout, batch_sizes, reset, lengths
        )
    passes = _passes.split(
        spec, weights, num_layers, directions, h0, c0, batch_sizes, reset, packed_weights
    )
    one_by_one = use_ref or recompute or lengths is not None or masks is not None
    grouped = not one_by_one and _group.applies(x, passes)
    all_at_once = grouped and of_layer == 1 and dropout == 0

    def run(y: Tensor, first: int, some: Sequence[_passes.Pass]) -> Sequence[Any]:
        ends = last and first + len(some) == len(passes)
        if grouped and len(some) > 1:
            return _group.run(spec, y, some, batch_sizes, of_layer == 1, ends)
        outs: list[Any] = []
        for k, (*tensors, mask, packed) in enumerate(some):
            drawn = None if masks is None else masks[first + k]
            args: Any = (
                *tensors, batch_sizes, mask, packed, k >= spec.heads, lengths, recompute, ends,
                drawn,
            )  # fmt: skip
            outs.append(direction(use_ref, spec, y, *args))
        return outs

    def between(y: Tensor) -> Tensor:
        # torch.nn's draw, so that seeds give its masks
        return y if dropout == 0 else torch.dropout(y, dropout, True)

    at_once = len(passes) if all_at_once else of_layer
    return _passes.walk(spec, x, passes, of_layer, at_once, run, between)


def layer(
    name: str,
    spec: CellSpec,
    input: Tensor | PackedSequence,
    hx: Any,
    reset: Any,
    weights: Sequence[Any],
    input_size: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bias: bool,
    batch_first: bool,
    dropout: float,
    bidirectional: bool,
    packed_weights: Sequence[Tensor] | None,
    lengths: Any = None,
    recompute: bool = False,
    mask: Any = None,
    options: Options | None = None,
) -> tuple[Any, Any]:
    """A whole layer as torch.nn has it: input and hx in any of their forms, its errors."""
    directions = 2 if bidirectional else 1
    weight = weights[0]
    dtype = weight.dtype
    sorted_indices = unsorted_indices = batch_sizes = None
    x: Tensor
    if packed_weights is None and is_any_autocast_enabled():
        weights, cast = autocast_weights(weights, weight.device.type)
        if cast is not None:
            weight, dtype = weights[0], cast
    rows = empty = back = last = None
    single = False  # unbatched input with a mask
    if not isinstance(input, (Tensor, PackedSequence)):
        refuse_input(input)
    if recompute is not False:
        check_recompute(name, recompute)
    if mask is not None:
        entered = _mask.enter(input, reset, mask, lengths, batch_first)
        input, reset, rows, lengths, empty, back, single = entered
        batch_first = batch_first and not single
    elif lengths is not None:
        check_lengths_kind(lengths, input)
        input, reset, rows, lengths = _lengths.enter(input, reset, lengths, batch_first)[:4]
    if isinstance(input, PackedSequence):
        x, batch_sizes, sorted_indices, unsorted_indices = input
        if x.layout is not _strided:
            check_dense(x, "input")
        batch = 0
        if hx is not None:
            if batch_sizes.dim() != 1 or batch_sizes.size(0) == 0:
                check_batch_sizes(batch_sizes, x.size(0))  # has no first one, and raises
            if not torch.compiler.is_compiling():
                batch = int(batch_sizes[0])
        dims = 2
        batched = not single
        if x.dtype != dtype:
            x = match_input(x, weight, spec.states == 1)
    else:
        x = input
        if x.layout is not _strided:
            check_dense(x, "input")
        dims = x.dim()
        if dims == 3:
            batched = not single
            if batch_first:
                x = x.transpose(0, 1)
        elif dims == 2:
            batched = False
            x = x.unsqueeze(1)
        else:
            noun = "D tensor" if spec.states == 1 and spec.gates == 1 else "D"
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {dims}{noun} instead")
        batch = x.size(1)
        dims = 3

    h0: Tensor | None = None
    c0: Tensor | None = None
    if hx is not None:
        states = _hx.take(hx, spec.states, batched, batch_sizes is not None and not single)
        h0 = states[0]
        if batch_sizes is not None and torch.compiler.is_compiling() and h0.dim() == 3:
            # a graph has no batch_sizes yet: its operator compares them with what it gets
            batch = h0.size(1) if sorted_indices is None else sorted_indices.size(0)
    if x.dtype != dtype:
        x = match_input(x, weight, True)
    if x.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {x.dim()}")
    if x.size(-1) != input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {input_size}, got {x.size(-1)}"
        )
    on_cpu = x.is_cpu
    if weight.is_cpu is not on_cpu or not on_cpu:
        check_device(x, weight)
    if hx is not None:
        count = num_layers * directions
        sizes = (count, batch, proj_size or hidden_size), (count, batch, hidden_size)
        h0, c0 = _hx.fit(states, batched, sizes, weight, sorted_indices)
    if x.size(0) == 0 and batch_sizes is None:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    if reset is not None:
        if isinstance(input, PackedSequence):
            reset = _reset.of_packed(reset, input, x)
        else:
            reset = _reset.of_padded(reset, x, batched, batch_first)

    args = (
        spec, x, h0, c0, weights, bias, num_layers, directions, dropout, batch_sizes, reset,
        packed_weights, lengths, recompute,
    )  # fmt: skip
    if options is None and empty is None:
        y, h_n, c_n = stack(*args)
    else:
        y, last, h_n, c_n = _regularize.run(stack, options, empty, sorted_indices, *args)

    if unsorted_indices is not None:
        h_n = h_n.index_select(1, unsorted_indices)
        c_n = c_n.index_select(1, unsorted_indices) if spec.states > 1 else c_n
    if not batched:
        h_n = h_n.squeeze(1)
        c_n = c_n.squeeze(1) if spec.states > 1 else c_n
    output: Any = y
    if last is not None:
        output = last if unsorted_indices is None else last.index_select(0, unsorted_indices)
        output = output if batched else output.squeeze(0)
    elif batch_sizes is not None and rows is None:
        output = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
    else:
        if rows is not None:
            output = _lengths.pad(y, rows)
        elif back is not None:
            output = back(y)
        if not batched:
            output = output.squeeze(1)
        elif batch_first:
            output = output.transpose(0, 1)
    return output, _hx.leave(h_n, c_n, spec.states)


def of_module(
    name: str,
    spec: CellSpec,
    module: Any,
    input: Any,
    hx: Any,
    reset: Any,
    lengths: Any = None,
    mask: Any = None,
) -> tuple[Any, Any]:
    """A whole layer with the options and the current weights of a module."""
    weights, packed = module._current()
    return layer(
        name, spec, input, hx, reset, weights, module.input_size, module.hidden_size,
        module.proj_size, module.num_layers, module.bias or spec.parameters > 0,
        module.batch_first,
        module.dropout if module.training else 0.0, module.bidirectional, packed, lengths,
        getattr(module, "recompute", False), mask,
        _regularize.of_module(name, module, spec.states),
    )  # fmt: skip


def check_cell_state(x: Tensor, state: Tensor, hidden: int, which: int) -> None:
    if state.shape == (x.size(0), hidden):
        return
    if state.size(0) != x.size(0):
        raise RuntimeError(
            f"Input batch size {x.size(0)} doesn't match hidden{which} batch size {state.size(0)}"
        )
    if state.dim() < 2 or state.size(1) != hidden:
        found = state.size(1) if state.dim() > 1 else state.size(0)
        raise RuntimeError(
            f"hidden{which} has inconsistent hidden_size: got {found}, expected {hidden}"
        )
    raise RuntimeError(
        f"rnnfast: hx must have shape (B, H) = ({x.size(0)}, {hidden}), got {tuple(state.shape)}"
    )


def raise_cell_weights(spec: CellSpec, rows: int, hidden: int) -> NoReturn:
    if spec.name == "gru":  # torch.nn's GRUCell sees it in the state of zeros that it makes
        raise RuntimeError(
            f"hidden0 has inconsistent hidden_size: got {rows // spec.gates}, expected {hidden}"
        )
    raise RuntimeError(
        f"weight_ih first dim must be {spec.gates} * hidden_size = {spec.gates * hidden}, "
        f"but got {rows}"
    )


def cell(
    spec: CellSpec,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One step: x (B, I), h and c (B, H) or None; gives h' and c' (one more dimension in front)."""
    if x.layout is not _strided or (h is not None and h.layout is not _strided):
        check_dense(x, "input")
        check_dense(x if h is None else h, "hx")
    if x.dim() != 2:
        raise RuntimeError(f"rnnfast: input must have shape (B, I), got {tuple(x.shape)}")
    if is_any_autocast_enabled():
        (w_ih, w_hh, b_ih, b_hh), _ = autocast_weights((w_ih, w_hh, b_ih, b_hh), w_ih.device.type)
    # sizes before dtypes: the order of torch.nn's checks
    if x.size(1) != w_ih.size(1):
        raise RuntimeError(
            f"input has inconsistent input_size: got {x.size(1)} expected {w_ih.size(1)}"
        )
    hidden = w_hh.size(-1)
    if w_ih.size(0) != spec.gates * hidden:
        raise_cell_weights(spec, w_ih.size(0), hidden)
    if h is not None:
        check_cell_state(x, h, hidden, 0)
        if c is not None:
            check_cell_state(x, c, hidden, 1)
    dtype = w_ih.dtype
    if x.dtype != dtype:
        x = match_input(x, w_ih, False)
    on_cpu = x.is_cpu
    if w_ih.is_cpu is not on_cpu or not on_cpu:
        check_device(x, w_ih)
    if h is not None:
        if h.dtype != dtype or not (on_cpu and h.is_cpu):
            h = match_state(h, w_ih, "hx" if c is None else "hx[0]")
        if c is not None:
            if c.dtype != dtype or not (on_cpu and c.is_cpu):
                c = match_state(c, w_ih, "hx[1]")
            c = c.unsqueeze(0)
    use_ref = use_reference(x, h, c, (w_ih, w_hh, b_ih, b_hh))
    _, h_n, c_n = direction(
        use_ref, spec, x.unsqueeze(0), h, c, w_ih, w_hh, b_ih, b_hh, None, None, None, None, False
    )
    return h_n, c_n
