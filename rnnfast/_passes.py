"""A layer taken apart into its passes, one for each direction of each layer of the stack, and the
way of the input through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _reset

# h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset and packed weights of one pass
Pass = Sequence[Tensor | None]


def split(
    weights: Sequence[Any],
    num_layers: int,
    directions: int,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    packed_weights: Sequence[Tensor] | None = None,
) -> list[Pass]:
    """weights as torch.nn has them; h0 (L*D, B, P), c0 (L*D, B, H); reset as the forward direction
    has it."""
    count = num_layers * directions
    each = len(weights) // count
    h0s = (None,) * count if h0 is None else h0.unbind(0)
    c0s = (None,) * count if c0 is None else c0.split(1)
    packed = (None,) * count if packed_weights is None else packed_weights
    resets = [reset] * directions
    if reset is not None and directions == 2:
        resets[1] = _reset.of_backward_direction(reset, batch_sizes)
    passes: list[Pass] = []
    for i in range(count):
        w = weights[i * each : (i + 1) * each]
        b_ih, b_hh = w[2:4] if each >= 4 else (None, None)
        w_hr = w[-1] if each % 2 else None
        passes.append(
            (h0s[i], c0s[i], w[0], w[1], b_ih, b_hh, w_hr, resets[i % directions], packed[i])
        )
    return passes


def weight_places(each: int) -> list[int]:
    """Where the weights of a pass stand in it, of which it has so many."""
    return [2, 3, *((4, 5) if each >= 4 else ()), *((6,) if each % 2 else ())]


def walk(
    x: Tensor,
    passes: Sequence[Pass],
    directions: int,
    at_once: int,
    run: Callable[[Tensor, int, Sequence[Pass]], Sequence[Any]],
    between: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_n (L*D, B, P) and c_n (L*D, B, H), empty for cells of one state. `run` gives y, h_n and
    c_n of each of the next passes, `at_once` of them from the one of that index on; `between` gets
    what one layer hands on to the next, unless `run` has both."""
    y = x
    outs: list[Any] = []
    for first in range(0, len(passes), at_once):
        outs += run(y, first, passes[first : first + at_once])
        y = outs[-1][0] if directions == 1 else torch.cat([outs[-2][0], outs[-1][0]], -1)
        if first + at_once < len(passes):
            y = between(y)
    return y, torch.stack([out[1] for out in outs]), torch.cat([out[2] for out in outs])
