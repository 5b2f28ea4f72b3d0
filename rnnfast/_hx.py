"""The state of a layer's call, hx: the forms that torch.nn takes, and its errors; and those of
cells with more states, whose tuple has one tensor for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._cast import match_state
from ._checks import check_dense

_strided = torch.strided
_Size = tuple[int, int, int]


def names(states: int) -> list[str]:
    """What errors call the states of a cell: as the library's cells have them, or by number."""
    return (
        [*"hcnm"[:states]] if states in (1, 2, 4) else ["h", *(f"s{k}" for k in range(1, states))]
    )


def _refuse(found: Any, states: int, error: type[Exception]) -> NoReturn:
    """What is no tensor, or no tuple of so many, where torch.nn raises such an error."""
    kind = type(found).__name__
    if states > 1 and isinstance(found, (tuple, list)):
        kind = f"({', '.join(type(one).__name__ for one in found)})"
    each = ", ".join(f"{name}_0" for name in names(states))
    number = {2: "two", 3: "three", 4: "four"}.get(states, states)
    wanted = f"a tuple ({each}) of {number} tensors" if states > 1 else "a tensor"
    raise error(f"rnnfast: hx must be {wanted}, got {kind}")


def _take_many(hx: Any, states: int, wanted: int, form: str) -> tuple[Tensor, ...]:
    if (
        not isinstance(hx, (tuple, list))
        or len(hx) != states
        or not all(isinstance(one, Tensor) for one in hx)
    ):
        _refuse(hx, states, TypeError)
    for k, one in enumerate(hx):
        if one.layout is not _strided:
            check_dense(one, f"hx[{k}]")
        if one.dim() != wanted:
            raise RuntimeError(
                f"For {form} input, all of hx should also be {wanted}-D but hx[{k}] is a "
                f"{one.dim()}-D tensor"
            )
    return tuple(hx)


def take(hx: Any, states: int, batched: bool, packed: bool) -> tuple[Tensor, ...]:
    """h_0, c_0 and what else a cell carries as they were given, of the right dimensions."""
    wanted = 3 if batched else 2
    form = "batched 3-D" if batched else "unbatched 2-D"
    if states > 2:
        return _take_many(hx, states, wanted, form)
    if states == 1:
        if not isinstance(hx, Tensor):
            _refuse(hx, 1, AttributeError)
        if hx.layout is not _strided:
            check_dense(hx, "hx")
        if hx.dim() != wanted and not packed:
            raise RuntimeError(
                f"For {form} input, hx should also be {wanted}-D but got {hx.dim()}-D tensor"
            )
        return (hx,)
    if not packed:
        try:  # as torch.nn looks at them, so that what is wrong raises the same types of errors
            found = hx[0].dim(), hx[1].dim()
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError) as error:
            _refuse(hx, 2, type(error))
        if found != (wanted, wanted):
            raise RuntimeError(
                f"For {form} input, hx and cx should also be {wanted}-D but got "
                f"({found[0]}-D, {found[1]}-D) tensors"
            )
    elif isinstance(hx, (tuple, list)) and not all(isinstance(one, Tensor) for one in hx):
        _refuse(hx, 2, TypeError)
    if not isinstance(hx, (tuple, list)):
        _refuse(hx, 2, TypeError)
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    h0, c0 = hx
    if h0.layout is not _strided or c0.layout is not _strided:
        check_dense(h0, "hx[0]")
        check_dense(c0, "hx[1]")
    return h0, c0


def _raise_size(who: str, expected: _Size, found: Tensor) -> NoReturn:
    raise RuntimeError(f"Expected {who} size {expected}, got {list(found.size())}")


def inner(states: Sequence[Tensor]) -> Tensor | None:
    """(K*(S-1), B, H): what a cell carries besides h, of each pass in turn, of S-1 tensors (K, B,
    H)."""
    if len(states) < 2:
        return states[0] if states else None
    return torch.stack(tuple(states), 1).flatten(0, 1)


def leave(h: Tensor, c: Tensor, states: int) -> Any:
    """The state as a layer gives it back: a tensor, or a tuple; c as :func:`inner` makes it."""
    if states < 3:
        return h if states == 1 else (h, c)
    each = c.unflatten(0, (-1, states - 1))
    return (h, *(each[:, k] for k in range(states - 1)))


def fit(
    states: Sequence[Tensor],
    batched: bool,
    sizes: tuple[_Size, _Size],
    weight: Tensor,
    order: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """h_0 and :func:`inner` of the rest, batched, of these sizes, in the dtype of the weights and
    the order of packed rows."""
    on_cpu, single = weight.is_cpu, len(states) == 1
    if not batched:
        states = [state.unsqueeze(1) for state in states]
    for k, state in enumerate(states):
        if state.shape != sizes[k > 0]:
            _raise_size("hidden" if single else f"hidden[{k}]", sizes[k > 0], state)
    # c first: torch.nn's order
    fitted = list(states)
    for k in reversed(range(len(fitted))):
        state = fitted[k]
        if state.dtype != weight.dtype or not (on_cpu and state.is_cpu):
            fitted[k] = match_state(state, weight, "hx" if single else f"hx[{k}]")
    h0, c0 = fitted[0], inner(fitted[1:])
    if order is not None:
        h0 = h0.index_select(1, order)
        c0 = None if c0 is None else c0.index_select(1, order)
    return h0, c0
