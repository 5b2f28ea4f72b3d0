"""Padded input with a mask of valid steps: padding on either side, holes, rows without any.

The valid steps of a row move together, and what runs is a batch with lengths: where Python may read
the mask they are packed (one gather, and one scatter behind the layers), in a graph they move to
the front of the row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _lengths, _modes, _reset
from ._checks import check_dense, has_values
from ._modes import is_transformed, is_vmapped


class _Rows(_lengths.Rows):
    """Where the valid steps of a batch, those of a mask (T, B) on the host, lie among packed rows.
    A row without any has one that stands for none, since a packed sequence has no empty ones."""

    def __init__(self, mask: Tensor, device: torch.device) -> None:
        none = ~mask.any(0)
        has_empty = bool(none.any())
        if has_empty:
            mask = mask.clone()
            mask[0] |= none
        counts = mask.sum(0)
        self._first = torch.cumsum(counts, 0) - counts
        self._steps = mask.t().nonzero()[:, 1]  # of one row after the other
        super().__init__(counts, mask.size(0), device)
        self._dummies: Tensor | None = None
        self.empty: Tensor | None = None  # which sequences, in the order of the packed rows
        if has_empty:
            none = none[torch.sort(counts, descending=True, stable=True).indices]
            # the first step has a row of each sequence
            self._dummies = none.nonzero().squeeze(1).to(device)
            self.empty = none.unsqueeze(1).to(device)

    def step_of(self, nth: Tensor, sequence: Tensor) -> Tensor:
        return self._steps[self._first[sequence] + nth]

    def real(self, rows: Tensor) -> Tensor:
        return rows if self._dummies is None else rows.index_fill(0, self._dummies, 0)


class _Move(torch.autograd.Function):
    """x's steps at `index` where `there`, zeros elsewhere; `back` and `back_there` undo it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *places: Tensor) -> Any:
        ctx.save_for_backward(*places)
        return _moved(x, *places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        index, there, back, back_there = ctx.saved_tensors
        return _Move.apply(grad, back, back_there, index, there), None, None, None, None


def _moved(x: Tensor, index: Tensor, there: Tensor, *_: Tensor) -> Tensor:
    steps = x.gather(0, index.unsqueeze(-1).expand(-1, -1, x.size(-1)))
    return torch.where(there.unsqueeze(-1), steps, 0)


class _Front:
    """Valid steps moved to the front of their rows, by a mask (T, B) without values yet."""

    def __init__(self, mask: Tensor) -> None:
        steps, batch = mask.shape
        number = torch.arange(steps, device=mask.device).unsqueeze(1)
        counts = mask.sum(0)
        self.empty = (counts == 0).unsqueeze(1)
        self.lengths = counts.clamp(min=1)  # an empty row runs one step of zeros
        at = torch.cumsum(mask, 0) - 1
        # what is not valid goes to a step behind the last, which is cut off
        behind = torch.where(mask, at, steps)
        order = number.new_zeros(steps + 1, batch).scatter(0, behind, number.expand(-1, batch))
        filled = number < counts
        self.order, self.filled = order[:steps], filled
        self._there = (self.order, filled, at.clamp(min=0), mask)

    def move(self, x: Tensor) -> Tensor:
        return _moved(x, *self._there) if is_transformed() else _Move.apply(x, *self._there)

    def back(self, y: Tensor) -> Tensor:
        places = self._there[2:] + self._there[:2]
        return _moved(y, *places) if is_transformed() else _Move.apply(y, *places)


def _carried(reset: Tensor, mask: Tensor) -> Tensor:
    """A reset at a step that is not valid holds for the next valid one of its row."""
    seen = torch.cumsum(reset, 0)
    at_valid = torch.where(mask, seen, 0)
    before = torch.cummax(at_valid, 0).values[:-1]  # resets up to the valid step before
    return mask & (seen > torch.cat([torch.zeros_like(seen[:1]), before]))


def enter(input: Any, reset: Any, mask: Any, lengths: Any, batch_first: bool) -> _lengths.Entered:
    """The input of a layer that was called with a mask."""
    if lengths is not None:
        raise RuntimeError(
            "rnnfast: lengths or mask say which steps are valid, got both; leave one out"
        )
    if isinstance(input, PackedSequence):
        raise RuntimeError(
            "rnnfast: mask is for padded input, got a PackedSequence, which has its own lengths; "
            "leave mask out"
        )
    check_dense(input, "input")
    if input.dim() not in (2, 3):
        return _lengths.Entered(input, reset)  # the layer says what it takes
    single = input.dim() == 2
    x = input.unsqueeze(1) if single else input.transpose(0, 1) if batch_first else input
    mask = _reset.of_padded(mask, x, not single, batch_first, "mask")
    cut: Tensor | None = None
    if reset is not None:
        cut = _carried(_reset.of_padded(reset, x, not single, batch_first), mask)
    if is_vmapped(mask):
        raise RuntimeError(
            "rnnfast: mask can't be batched by vmap, since how many steps there are would differ; "
            "put the batch into input's own"
        )
    if x.size(0) == 0:
        return _lengths.Entered(input, reset)
    if has_values(mask) and (_modes.is_eager((x, mask)) or is_transformed()):
        values = mask.detach().cpu()
        if bool(values.all()):
            return _lengths.Entered(input, reset)
        rows = _Rows(values, x.device)
        packed = PackedSequence(
            _lengths.pack(x, rows), rows.batch_sizes, rows.sorted, rows.unsorted
        )
        return _lengths.Entered(packed, rows.pack(cut), rows, empty=rows.empty, single=single)
    front = _Front(mask)
    if cut is not None:
        cut = cut.gather(0, front.order) & front.filled
        cut = cut.squeeze(1) if single else cut.t() if batch_first else cut
    moved = front.move(x)
    moved = moved.transpose(0, 1) if batch_first and not single else moved
    return _lengths.Entered(moved, cut, None, front.lengths, front.empty, front.back, single)
