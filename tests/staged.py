"""Layers whose cells have stages (csrc/cells/stages.h), against a loop over one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from variants import f64, flat, results

import rnnfast

# From x (B, I) and h or (h, c), each (B, H), to the next of these.
Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def unrolled(step: Step, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
    """y and the last state of a loop over the steps of x (T, B, I)."""
    y = []
    for x_t in x:
        state = step(x_t, state)
        y.append(state[0])
    return torch.stack(y), state


def called(layer: Any, x: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, Any]:
    """As `unrolled` gives it, of a layer of one direction."""
    hx = tuple(s.unsqueeze(0) for s in state)
    y, end = layer(x, (hx if len(hx) == 2 else hx[0]) if hx else None)
    return y, [e.squeeze(0) for e in flat(end)]


def assert_all_close(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def check_against_step(
    layer: Any, step: Step, steps: int = 5, batch: int = 3, state: bool = True, kernel: str = ""
) -> None:
    """A layer of one direction in float64, outputs and all gradients, of the engine (with one of
    its kernels) and of the reference."""
    count = 2 if isinstance(layer, rnnfast.LSTM) else 1
    x = torch.randn(steps, batch, layer.input_size, dtype=f64, requires_grad=True)
    states = [
        torch.randn(batch, layer.hidden_size, dtype=f64, requires_grad=True)
        for _ in range(count * state)
    ]
    inputs = [x, *states, *layer.parameters()]
    start = tuple(states) or (x.new_zeros(batch, layer.hidden_size),) * count
    expected = results(*unrolled(step, x, start), inputs)
    if kernel:
        with rnnfast.use_engine("cpu", kernel=kernel):
            assert_all_close(results(*called(layer, x, states), inputs), expected)
            assert rnnfast.last_run()["kernel_ih"] == kernel
        return
    assert_all_close(results(*called(layer, x, states), inputs), expected)
    with rnnfast.use_engine("reference"):
        assert_all_close(results(*called(layer, x, states), inputs), expected)


def ran_on_threads(layer: Any, x: Tensor, count: int, tries: int = 200) -> int:
    """The most of `count` threads that took a share of a call: a busy machine may have them late,
    and then one does all."""
    before, most = torch.get_num_threads(), 0
    torch.set_num_threads(count)
    try:
        while most < count and tries > 0:
            layer(x)
            most, tries = max(most, int(rnnfast.last_run()["threads"])), tries - 1
    finally:
        torch.set_num_threads(before)
    return most
