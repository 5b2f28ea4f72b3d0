"""Where the rows of a packed batch lie."""

from __future__ import annotations

import torch
from torch import Tensor


def places(sizes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Step and sequence of each of so many packed rows, given the number of rows of each step."""
    steps = torch.arange(sizes.size(0), device=sizes.device)
    step = torch.repeat_interleave(steps, sizes, output_size=count)
    row = torch.arange(count, device=sizes.device)
    return step, row - (torch.cumsum(sizes, 0) - sizes)[step]


def last_rows(sizes: Tensor, batch: int) -> Tensor:
    """Of each sequence the row of its last step."""
    sequence = torch.arange(batch, device=sizes.device)
    length = (sizes.unsqueeze(1) > sequence).sum(0)
    return (torch.cumsum(sizes, 0) - sizes)[length - 1] + sequence


def on_device(sizes: Tensor, device: torch.device) -> Tensor:
    """batch_sizes on the device of the rows, without waiting for it. (A graph that is being
    captured would read the host's memory again at each replay: there, torch's error is right.)"""
    if (
        device.type != "cuda"
        or torch.compiler.is_compiling()
        or torch.cuda.is_current_stream_capturing()
    ):
        return sizes.to(device)
    return sizes.pin_memory().to(device, non_blocking=True)
