"""Padded input with lengths: only valid steps are computed, and padding is never read.

Where Python may read the lengths, the rows are packed before the layers and padded after them. In
a graph, which must not depend on values, one direction of one layer is the operator
``rnnfast::forward_lengths``: padded outside, packed inside, where it is run with real lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _modes, _reset, ops, reference
from ._checks import has_values
from ._modes import is_transformed, is_vmapped, transforms_active
from ._rows import places
from .cells import CellSpec

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _raise(expected: str, found: str) -> NoReturn:
    raise RuntimeError(f"rnnfast: lengths must {expected}, got {found}")


def _text(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"


def _check_form(lengths: Tensor, batch: Any) -> None:
    if lengths.dtype not in _INTEGERS or lengths.dim() != 1:
        _raise(f"be an integer tensor of shape (B,) = ({batch},)", _text(lengths))

    def text() -> str:
        return f"rnnfast: lengths must have shape (B,) = ({batch},), got {tuple(lengths.shape)}"

    if isinstance(batch, int) and isinstance(lengths.size(0), int):
        if lengths.size(0) != batch:
            raise RuntimeError(text())
    else:  # a size that only the run will know
        torch._check(lengths.size(0) == batch, text)


class Rows:
    """Where the valid steps of a padded batch lie among packed rows."""

    def __init__(self, values: Tensor, steps: int, device: torch.device) -> None:
        batch = values.size(0)
        sizes, order = torch.sort(values, descending=True, stable=True)
        longest = int(sizes[0])
        self.batch_sizes = (sizes > torch.arange(longest).unsqueeze(1)).sum(1)
        self.count = int(sizes.sum())
        nth, column = places(self.batch_sizes, self.count)
        sequence = order[column]
        self.shape = (steps, batch)
        self.at = (self.step_of(nth, sequence).to(device), sequence.to(device))
        self.sorted: Tensor | None = None
        self.unsorted: Tensor | None = None
        if not torch.equal(order, torch.arange(batch)):
            self.sorted = order.to(device)
            self.unsorted = torch.argsort(order).to(device)

    def step_of(self, nth: Tensor, sequence: Tensor) -> Tensor:
        """Where the n-th valid steps of sequences stand in the batch."""
        return nth

    def real(self, rows: Tensor) -> Tensor:
        """rows, with zeros in those that stand for no step at all."""
        return rows

    def pack(self, x: Any) -> Any:
        """The rows (N, ...) of x (T, B, ...)."""
        return None if x is None else self.real(x[self.at])

    def pad(self, rows: Tensor) -> Tensor:
        """(T, B, ...) of rows, zero elsewhere."""
        padded = rows.new_zeros((*self.shape, *rows.shape[1:]))
        return padded.index_put_(self.at, self.real(rows))

    def sort(self, state: Any, dim: int) -> Any:
        """A state in the order of the rows."""
        if state is None or self.sorted is None:
            return state
        return state.index_select(dim, self.sorted)

    def unsort(self, state: Tensor, dim: int) -> Tensor:
        """A state in the order of the batch."""
        return state if self.unsorted is None else state.index_select(dim, self.unsorted)


def _read(lengths: Tensor, steps: int) -> Tensor:
    """The values on the host, checked. (From another device, it waits for them.)"""
    values = lengths.detach().to("cpu", torch.int64)
    wrong = (values < 1) | (values > steps)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        _raise(f"be at least 1 and at most T = {steps}", f"{int(values[row])} at row {row}")
    return values


def _rows(lengths: Tensor, steps: int, device: torch.device) -> Rows | None:
    """Rows of lengths, whose values are read and checked here; None if no step is padding."""
    values = _read(lengths, steps)
    if bool((values == steps).all()):
        return None
    return Rows(values, steps, device)


# Derivatives of indexing are sums over rows that may repeat, and slow for it; these rows do not.
class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Any:
        ctx.rows = rows
        return rows.pack(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Pad.apply(grad, ctx.rows), None


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Any:
        ctx.rows = rows
        return rows.pad(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Pack.apply(grad, ctx.rows), None


def pack(x: Tensor, rows: Rows) -> Tensor:
    """:meth:`Rows.pack`, differentiable to any order."""
    return rows.pack(x) if is_transformed() else _Pack.apply(x, rows)


def pad(x: Tensor, rows: Rows) -> Tensor:
    """:meth:`Rows.pad`, differentiable to any order."""
    if not is_transformed():
        return _Pad.apply(x, rows)
    return x.new_zeros((*rows.shape, *x.shape[1:])).index_put(rows.at, rows.real(x))


class Entered(NamedTuple):
    """What :func:`enter`, and _mask.py's, make of a call."""

    input: Any
    reset: Any
    rows: Rows | None = None  # of the packed input
    lengths: Tensor | None = None  # of a padded input, whose values can't be read yet
    empty: Tensor | None = None  # (B, 1): which sequences have no valid step, in input's order
    back: Callable[[Tensor], Tensor] | None = None  # puts steps of y where those of x stood
    single: bool = False  # an unbatched input, which is a batch of one now


def _valid(lengths: Tensor, steps: Any) -> Tensor:
    """(T, B): which steps are no padding."""
    return torch.arange(steps, device=lengths.device).unsqueeze(1) < lengths


def enter(input: Any, reset: Any, lengths: Any, batch_first: bool) -> Entered:
    """The input of a layer that was called with lengths: packed where they can be read."""
    if isinstance(input, PackedSequence):
        raise RuntimeError(
            "rnnfast: lengths are for padded input, got a PackedSequence, which has its own; "
            "leave lengths out"
        )
    if input.dim() != 3:
        raise RuntimeError(
            "rnnfast: lengths are for batched input (T, B, I) or (B, T, I), got "
            f"{input.dim()} dimensions; cut an unbatched sequence: input[:length]"
        )
    x = input.transpose(0, 1) if batch_first else input
    steps, batch = x.size(0), x.size(1)
    if not isinstance(lengths, Tensor):
        _raise(f"be an integer tensor of shape (B,) = ({batch},)", _text(lengths))
    _check_form(lengths, batch)
    mask: Tensor | None = None
    if reset is not None:
        letters = ("(B, T)", (batch, steps)) if batch_first else ("(T, B)", (steps, batch))
        mask = _reset.check(reset, *letters, x)
        mask = mask.t() if batch_first else mask
    if is_vmapped(lengths):
        raise RuntimeError(
            "rnnfast: lengths can't be batched by vmap, since how many steps there are would "
            "differ; put the batch into input's own"
        )
    if has_values(lengths) and (_modes.is_eager((x, lengths)) or is_transformed()):
        rows = _rows(lengths, steps, x.device) if steps else None
        if rows is None:
            return Entered(input, reset)
        packed = PackedSequence(pack(x, rows), rows.batch_sizes, rows.sorted, rows.unsorted)
        return Entered(packed, rows.pack(mask), rows)
    lengths = lengths.to(torch.int64)
    if mask is not None:
        # the second direction reads the mask one step on, where padding says nothing
        mask = mask & _valid(lengths, steps).to(mask.device)
        reset = mask.t() if batch_first else mask
    return Entered(input, reset, lengths=lengths)


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
    lengths: Tensor,
    reset: Tensor | None,
    packed_weights: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """_run.direction for padded input with lengths that Python can't read."""
    if use_ref:
        return reference_of(
            spec, x, h0, c0, (w_ih, w_hh, b_ih, b_hh, w_hr), lengths, reset, reverse
        )
    if x.is_cpu and not lengths.is_cpu:  # the operator would look for x there
        lengths = lengths.cpu()
    y, h_n, c_n, _ = forward(
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reset, packed_weights, spec.id, reverse,
        save,
    )  # fmt: skip
    return y, h_n, c_n


def valid_steps(lengths: Tensor, x: Tensor) -> Tensor:
    """(T, B): which steps of padded x are no padding, of lengths that are checked when it runs."""
    return _valid(_checked(lengths, x.size(0)), x.size(0)).to(x.device)


def reference_of(
    spec: CellSpec,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: tuple[Any, ...],
    lengths: Tensor,
    reset: Tensor | None,
    reverse: bool,
    **masks: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """In torch's operators, all T steps of them. No shape depends on a value. masks: of h, the
    same at all steps, as reference.forward takes them."""
    valid = valid_steps(lengths, x)
    x = torch.where(valid.unsqueeze(-1), x, 0)
    step: Any = reference.forward
    hidden = weights[0].size(0) // spec.gates
    out = hidden if weights[4] is None else weights[4].size(0)
    h = x.new_zeros(x.size(1), out) if h0 is None else h0
    c = x.new_zeros(spec.states - 1, x.size(1), hidden) if c0 is None else c0
    ys: list[Tensor] = [h] * x.size(0)
    for t in range(x.size(0) - 1, -1, -1) if reverse else range(x.size(0)):
        now = None if reset is None else reset[t : t + 1]
        _, h_t, c_t = step(
            x[t : t + 1], h, c, *weights, None, now, cell=spec, reverse=reverse, **masks
        )
        at = valid[t].unsqueeze(-1)
        ys[t] = torch.where(at, h_t, 0)
        h, c = torch.where(at, h_t, h), torch.where(at, c_t, c)
    return torch.stack(ys), h, c


forward = torch.ops.rnnfast.forward_lengths.default
backward = torch.ops.rnnfast.backward_lengths.default
_checked = torch.ops.rnnfast.checked_lengths.default

# The lengths are read on the host: no CUDA graph may hold these operators. (The stable ABI of torch
# 2.10, for which the library is built, has no tags.)
for _operator in (forward, backward, _checked):
    _operator.tags.append(torch.Tag.cudagraph_unsafe)


@torch.library.register_fake("rnnfast::checked_lengths")
def _(lengths: Tensor, steps: int) -> Tensor:
    return torch.empty_like(lengths, dtype=torch.int64)


def _check_lengths(lengths: Tensor, x: Tensor) -> None:
    if x.dim() != 3:
        raise RuntimeError(f"rnnfast: x must have shape (T, B, I), got {tuple(x.shape)}")
    _check_form(lengths, x.size(1))
    if lengths.device.type == "meta" and x.device.type != "meta":
        raise RuntimeError("rnnfast: lengths must have values, got a meta tensor")


@torch.library.register_fake("rnnfast::forward_lengths")
def forward_fake(
    x: Tensor, h0: Any, c0: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any, w_hr: Any,
    lengths: Tensor, reset: Any, packed: Any, cell: int, reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check_lengths(lengths, x)
    return ops.forward_fake(
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, None, reset, packed, cell, reverse, save
    )


@torch.library.register_fake("rnnfast::backward_lengths")
def backward_fake(
    dy: Any, dh_n: Any, dc_n: Any, x: Tensor, h0: Any, c0: Any, w_ih: Tensor, w_hh: Tensor,
    b_ih: Any, b_hh: Any, w_hr: Any, lengths: Tensor, reset: Any, y: Tensor, saved: Tensor,
    cell: int, reverse: bool, needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_lengths(lengths, x)
    return ops.backward_fake(
        dy, dh_n, dc_n, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, None, reset, y, saved, cell,
        reverse, needs,
    )  # fmt: skip


def _formula(
    ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    none = (None,) * 14
    needed = ctx.needs_input_grad[:8]
    if dy is None and dh_n is None and dc_n is None:
        return none
    if transforms_active():
        raise RuntimeError(
            "rnnfast: a traced layer with lengths can't take gradients in batches; call it outside "
            "of torch.compile and of torch_dispatch modes"
        )
    *inputs, y, saved = ctx.saved_tensors
    if not ctx.save:
        with torch.no_grad():
            y, _, _, saved = forward(*inputs, None, ctx.cell, ctx.reverse, True)
    grads = backward(
        dy, dh_n, dc_n, *inputs, y, saved, ctx.cell, ctx.reverse, ops.needs_mask(needed)
    )
    return (*(g if n else None for g, n in zip(grads, needed, strict=True)), *none[8:])


def _double_backward(ctx: Any, *ddout: Tensor | None) -> tuple[Tensor | None, ...]:
    """That of the packed rows, which is right to any order."""
    *args, lengths, reset = ctx.saved_tensors
    if not has_values(lengths):
        raise RuntimeError(
            "rnnfast: second derivatives of a layer with lengths can't be traced; take them "
            "outside of torch.compile"
        )
    rows = _rows(lengths, args[3].size(0), args[3].device)

    def enter(dy: Any, h: Any, c: Any) -> list[Any]:
        if rows is None:
            return [dy, h, c]
        return [None if dy is None else pack(dy, rows), rows.sort(h, 0), rows.sort(c, 1)]

    def leave(dy: Any, h: Any, c: Any) -> list[Any]:
        if rows is None:
            return [dy, h, c]
        return [
            None if dy is None else pad(dy, rows),
            None if h is None else rows.unsort(h, 0),
            None if c is None else rows.unsort(c, 1),
        ]

    sizes, mask = (None, reset) if rows is None else (rows.batch_sizes, rows.pack(reset))
    of_rows = SimpleNamespace(
        saved_tensors=[*enter(*args[:3]), *enter(*args[3:6]), *args[6:], sizes, mask],
        needs_input_grad=ctx.needs_input_grad,
        needs=ctx.needs,
        cell=ctx.cell,
        reverse=ctx.reverse,
    )
    grads = ops._backward_backward(of_rows, *enter(*ddout[:3]), *ddout[3:])
    return (*leave(*grads[:3]), *leave(*grads[3:6]), *grads[6:])


# arguments and results stand where those of rnnfast::forward and rnnfast::backward stand
torch.library.register_autograd(
    "rnnfast::forward_lengths", _formula, setup_context=ops._forward_setup
)
torch.library.register_autograd(
    "rnnfast::backward_lengths", _double_backward, setup_context=ops._backward_setup
)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        with ops.below_autograd():
            output = forward(*args)
        ops._forward_setup(ctx, args, output)
        return output

    backward = staticmethod(_formula)


ops.refuse_tangents_in("rnnfast::forward_lengths", forward, _Forward)
