"""A layer taken apart into its passes, one for each head (_heads.py) of each direction of each
layer of the stack, and the way of the input through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _reset
from .cells import CellSpec

# h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset and packed weights of one pass
Pass = Sequence[Tensor | None]


def _h_of_heads(h: Tensor, heads: int) -> Tensor:
    """(K, B, H) as (K*heads, B, H/heads)."""
    return h if heads == 1 else h.unflatten(-1, (heads, -1)).movedim(2, 1).flatten(0, 1)


def _c_of_heads(c: Tensor, heads: int, rest: int) -> Tensor:
    """(K*rest, B, H) as (K*heads*rest, B, H/heads)."""
    if heads == 1:
        return c
    parts = c.unflatten(-1, (heads, -1)).unflatten(0, (-1, rest))
    return parts.movedim(3, 1).flatten(0, 2)


def _h_of_all(h: Tensor, heads: int) -> Tensor:
    """The way back of :func:`_h_of_heads`."""
    return h if heads == 1 else h.unflatten(0, (-1, heads)).movedim(1, 2).flatten(2)


def _c_of_all(c: Tensor, heads: int, rest: int) -> Tensor:
    """The way back of :func:`_c_of_heads`."""
    if heads == 1 or rest == 0:
        return c if rest else c.new_empty(0, c.size(1), heads * c.size(2))
    return c.unflatten(0, (-1, heads, rest)).movedim(1, 3).flatten(3).flatten(0, 1)


def split(
    spec: CellSpec,
    weights: Sequence[Any],
    num_layers: int,
    directions: int,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    packed_weights: Sequence[Tensor] | None = None,
) -> list[Pass]:
    """weights as torch.nn has them, those of each head in turn; h0 (L*D, B, P), c0 (L*D*(S-1), B,
    H); reset as the forward direction has it."""
    count = num_layers * directions * spec.heads
    each = len(weights) // count
    h0s = (None,) * count if h0 is None else _h_of_heads(h0, spec.heads).unbind(0)
    rest = spec.states - 1
    c0s = (None,) * count if c0 is None else _c_of_heads(c0, spec.heads, rest).split(max(rest, 1))
    packed = (None,) * count if packed_weights is None else packed_weights
    resets = [reset] * directions
    if reset is not None and directions == 2:
        resets[1] = _reset.of_backward_direction(reset, batch_sizes)
    passes: list[Pass] = []
    for i in range(count):
        w = weights[i * each : (i + 1) * each]
        b_ih, b_hh = w[2:4] if each >= 4 else (None, None)
        w_hr = w[-1] if each % 2 else None
        cut = resets[i // spec.heads % directions]
        passes.append((h0s[i], c0s[i], w[0], w[1], b_ih, b_hh, w_hr, cut, packed[i]))
    return passes


def weight_places(each: int) -> list[int]:
    """Where the weights of a pass stand in it, of which it has so many."""
    return [2, 3, *((4, 5) if each >= 4 else ()), *((6,) if each % 2 else ())]


def walk(
    spec: CellSpec,
    x: Tensor,
    passes: Sequence[Pass],
    of_layer: int,
    at_once: int,
    run: Callable[[Tensor, int, Sequence[Pass]], Sequence[Any]],
    between: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_n (L*D, B, P) and c_n (L*D*(S-1), B, H), empty for cells of one state. A layer has so
    many passes (`of_layer`: D*n) side by side. `run` gives y, h_n and c_n of each of the next
    passes, `at_once` of them from the one of that index on; `between` gets what one layer hands on
    to the next, unless `run` has both."""
    y = x
    outs: list[Any] = []
    for first in range(0, len(passes), at_once):
        outs += run(y, first, passes[first : first + at_once])
        y = outs[-1][0] if of_layer == 1 else torch.cat([out[0] for out in outs[-of_layer:]], -1)
        if first + at_once < len(passes):
            y = between(y)
    h_n, c_n = torch.stack([out[1] for out in outs]), torch.cat([out[2] for out in outs])
    return y, _h_of_all(h_n, spec.heads), _c_of_all(c_n, spec.heads, spec.states - 1)
