"""Masks of resets: from the forms that a layer takes to that of the operators, (T, B) or packed
rows (N,)."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _rows
from ._checks import check_dense, has_values


def _text(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')} on {value.device}"


def _raise(name: str, wanted: str, letters: str, sizes: tuple[int, ...], found: Any) -> NoReturn:
    raise RuntimeError(
        f"rnnfast: {name} must be {wanted} of shape {letters} = {sizes}, got {_text(found)}"
    )


def check(
    mask: Any, letters: str, sizes: tuple[int, ...], x: Tensor, name: str = "reset"
) -> Tensor:
    """A mask of these sizes on the device of x."""
    if isinstance(mask, Tensor) and mask.layout is not torch.strided:
        check_dense(mask, name)
    if (
        not isinstance(mask, Tensor)
        or mask.dtype != torch.bool
        or mask.shape != sizes
        or mask.device != x.device
    ):
        _raise(name, f"a bool tensor on {x.device}", letters, sizes, mask)
    return mask


def of_padded(
    mask: Any, x: Tensor, batched: bool, batch_first: bool, name: str = "reset"
) -> Tensor:
    """The mask (T, B) of a layer's input, which is x (T, B, I) by now."""
    steps, batch = x.size(0), x.size(1)
    if not batched:
        return check(mask, "(T,)", (steps,), x, name).unsqueeze(1)
    if batch_first:
        return check(mask, "(B, T)", (batch, steps), x, name).t()
    return check(mask, "(T, B)", (steps, batch), x, name)


def of_packed(reset: Any, input: PackedSequence, x: Tensor) -> Tensor:
    """The mask (N,) of a packed input; a packed mask must lie in its order."""
    if not isinstance(reset, PackedSequence):
        if not isinstance(reset, Tensor) or reset.dim() != 1:
            wanted = "a PackedSequence like input, or its data, a bool tensor"
            _raise("reset", wanted, "(N,)", (x.size(0),), reset)
        return check(reset, "(N,)", (x.size(0),), x)
    sizes = input.batch_sizes
    if reset.batch_sizes.shape != sizes.shape or (
        has_values(sizes) and not torch.equal(reset.batch_sizes, sizes)
    ):
        raise RuntimeError(
            "rnnfast: reset must be packed with the batch_sizes of input, "
            f"{sizes.tolist()}, got {reset.batch_sizes.tolist()}"
        )
    ours, theirs = input.sorted_indices, reset.sorted_indices
    if ours is not theirs and has_values(sizes):
        order = torch.arange(int(sizes[0]))
        ours, theirs = (order if i is None else i.to(order) for i in (ours, theirs))
        if not torch.equal(ours, theirs):
            raise RuntimeError(
                "rnnfast: reset must be packed in the order of input, sorted_indices = "
                f"{ours.tolist()}, got {theirs.tolist()}"
            )
    return check(reset.data, "(N,)", (x.size(0),), x)


def of_backward_direction(reset: Tensor, batch_sizes: Tensor | None) -> Tensor:
    """The mask that cuts a reverse pass between the same steps: it enters step t from t + 1, so
    that it starts anew at t where a new sequence begins at t + 1."""
    if batch_sizes is None:
        return torch.cat([reset[1:], reset.new_zeros(1, reset.size(1))])
    rows = reset.size(0)
    sizes = _rows.on_device(batch_sizes, reset.device)
    step, column = _rows.places(sizes, rows)
    row = torch.arange(rows, device=reset.device)
    after = torch.cat([sizes[1:], sizes.new_zeros(1)])[step]  # rows of the next step
    below = (row + sizes[step]).clamp(max=rows - 1)
    return reset[below] & (column < after)
