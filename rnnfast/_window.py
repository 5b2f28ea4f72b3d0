"""The rows of a convolution over time: each step's features with those of the steps before it."""

from __future__ import annotations

import torch
from torch import Tensor


def _shifted(x: Tensor, steps: int) -> Tensor:
    """x (T, B, I) of so many steps before; zeros where there is none."""
    before = x.new_zeros((min(steps, x.size(0)), *x.shape[1:]))
    return torch.cat([before, x[: x.size(0) - before.size(0)]])


def _packed_before(rows: Tensor, batch_sizes: Tensor) -> Tensor:
    """Which row is that of the step before each packed row; their number where there is none."""
    starts = torch.cumsum(batch_sizes, 0) - batch_sizes
    steps = torch.arange(batch_sizes.size(0))
    step = torch.repeat_interleave(steps, batch_sizes, output_size=rows.size(0))
    place = torch.arange(rows.size(0)) - starts[step]
    before = starts[(step - 1).clamp(min=0)] + place
    return torch.where(step > 0, before, rows.size(0)).to(rows.device)


def window(
    x: Tensor, size: int, batch_sizes: Tensor | None = None, reset: Tensor | None = None
) -> Tensor:
    """Rows (T, B, I) or packed (N, I) as rows of ``size`` times the features: those of the step
    itself, then of the step before it, and so on. Nothing comes from before a reset."""
    if size == 1:
        return x
    parts = [x]
    if batch_sizes is not None:
        before = _packed_before(x, batch_sizes)
        padding = x.new_zeros(1, x.size(1))
        no_more = None if reset is None else torch.cat([reset, reset.new_ones(1)])
        at = torch.arange(x.size(0), device=x.device)
        for _ in range(size - 1):
            if no_more is not None:  # the row that `at` names begins anew: it has nothing before it
                at = torch.where(no_more[at], x.size(0), at)
            at = torch.cat([before, before.new_full((1,), x.size(0))])[at]
            parts.append(torch.cat([x, padding])[at])
        return torch.cat(parts, -1)
    begun = None if reset is None else torch.zeros_like(reset)
    for k in range(1, size):
        part = _shifted(x, k)
        if begun is not None and reset is not None:
            begun = begun | _shifted(reset, k - 1)
            part = torch.where(begun.unsqueeze(-1), 0, part)
        parts.append(part)
    return torch.cat(parts, -1)
