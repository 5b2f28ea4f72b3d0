"""The initial state of a layer's call, hx: the forms that torch.nn takes, and its errors."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ._cast import match_state
from ._checks import check_dense

_strided = torch.strided
_Size = tuple[int, int, int]


def _refuse(found: Any, two_states: bool, error: type[Exception]) -> NoReturn:
    """What is no tensor, or no pair of them, where torch.nn raises such an error."""
    kind = type(found).__name__
    if two_states and isinstance(found, (tuple, list)):
        kind = f"({', '.join(type(one).__name__ for one in found)})"
    wanted = "a tuple (h_0, c_0) of two tensors" if two_states else "a tensor"
    raise error(f"rnnfast: hx must be {wanted}, got {kind}")


def take(hx: Any, two_states: bool, batched: bool, packed: bool) -> tuple[Tensor, Tensor | None]:
    """h_0 and c_0 (None where there is none) as they were given, of the right dimensions."""
    wanted = 3 if batched else 2
    form = "batched 3-D" if batched else "unbatched 2-D"
    if not two_states:
        if not isinstance(hx, Tensor):
            _refuse(hx, False, AttributeError)
        if hx.layout is not _strided:
            check_dense(hx, "hx")
        if hx.dim() != wanted and not packed:
            raise RuntimeError(
                f"For {form} input, hx should also be {wanted}-D but got {hx.dim()}-D tensor"
            )
        return hx, None
    if not packed:
        try:  # as torch.nn looks at them, so that what is wrong raises the same types of errors
            found = hx[0].dim(), hx[1].dim()
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError) as error:
            _refuse(hx, True, type(error))
        if found != (wanted, wanted):
            raise RuntimeError(
                f"For {form} input, hx and cx should also be {wanted}-D but got "
                f"({found[0]}-D, {found[1]}-D) tensors"
            )
    elif isinstance(hx, (tuple, list)) and not all(isinstance(one, Tensor) for one in hx):
        _refuse(hx, True, TypeError)
    if not isinstance(hx, (tuple, list)):
        _refuse(hx, True, TypeError)
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    h0, c0 = hx
    if h0.layout is not _strided or c0.layout is not _strided:
        check_dense(h0, "hx[0]")
        check_dense(c0, "hx[1]")
    return h0, c0


def _raise_size(who: str, expected: _Size, found: Tensor) -> NoReturn:
    raise RuntimeError(f"Expected {who} size {expected}, got {list(found.size())}")


def fit(
    h0: Tensor,
    c0: Tensor | None,
    batched: bool,
    sizes: tuple[_Size, _Size],
    weight: Tensor,
    order: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Batched states of these sizes, in the dtype of the weights and the order of packed rows."""
    if not batched:
        h0 = h0.unsqueeze(1)
        c0 = None if c0 is None else c0.unsqueeze(1)
    if h0.shape != sizes[0]:
        _raise_size("hidden" if c0 is None else "hidden[0]", sizes[0], h0)
    on_cpu = weight.is_cpu
    if c0 is not None:
        if c0.shape != sizes[1]:
            _raise_size("hidden[1]", sizes[1], c0)
        if c0.dtype != weight.dtype or not (on_cpu and c0.is_cpu):
            c0 = match_state(c0, weight, "hx[1]")
    if h0.dtype != weight.dtype or not (on_cpu and h0.is_cpu):
        h0 = match_state(h0, weight, "hx" if c0 is None else "hx[0]")
    if order is not None:
        h0 = h0.index_select(1, order)
        c0 = None if c0 is None else c0.index_select(1, order)
    return h0, c0
