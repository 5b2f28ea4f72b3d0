"""The CUDA engine beyond the limits of grids and of 32-bit numbers, held against smaller runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from on_cuda import KINDS, Setup, assert_near, build, leaves_of, module_on
from torch import Tensor

import rnnfast

pytestmark = pytest.mark.cuda

f64 = torch.float64
GRID = 65535  # places of a grid in y and z


@pytest.fixture(autouse=True)
def _give_memory_back(cuda: torch.device) -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def gradients(layer: Any, x: Tensor, scale: float = 1) -> tuple[Tensor, list[Tensor]]:
    """dx and the weights' gradients of the sum of y and of the states."""
    x = x.detach().requires_grad_()
    loss = torch.stack([out.sum() for out in leaves_of(layer(x))]).sum() * scale
    dx, *rest = torch.autograd.grad(loss, [x, *layer.parameters()])
    return dx, list(rest)


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_a_grid_has_places(kind: str, cuda: torch.device) -> None:
    """A block has 8 rows of so few units; half of them are more than a whole grid takes."""
    batch = GRID * 8 + 9
    layer = module_on(build(Setup(kind, "float64", 1, 1, 1, 2)), True, cuda, f64)
    x = torch.randn(2, batch, 1, device=cuda, dtype=f64)
    ends = torch.cat([x[:, :5], x[:, -5:]], 1)
    with torch.no_grad():
        y, last = layer(x)
        want, state = layer(ends)
    assert_near([torch.cat([y[:, :5], y[:, -5:]], 1)], [want])
    assert_near([s[:, -5:] for s in leaves_of(last)], [s[:, 5:] for s in leaves_of(state)])
    dx, rest = gradients(layer, x)
    of_ends, _ = gradients(layer, ends)
    assert_near([torch.cat([dx[:, :5], dx[:, -5:]], 1)], [of_ends])
    pieces = [gradients(layer, piece)[1] for piece in x.split(GRID * 2, 1)]
    assert_near(rest, [torch.stack(each).sum(0) for each in zip(*pieces, strict=True)])


@pytest.mark.parametrize("kind", ["LSTM", "IndRNN_tanh"])
def test_more_steps_than_a_grid_has_places(kind: str, cuda: torch.device) -> None:
    steps = GRID + 70
    layer = module_on(build(Setup(kind, "float64", 1, 1, 1, 3)), True, cuda, f64)
    x = torch.randn(steps, 2, 1, device=cuda, dtype=f64, requires_grad=True)
    y, last = layer(x)
    first, state = layer(x[: steps // 2])
    second, end = layer(x[steps // 2 :], state)
    assert_near([y, *leaves_of(last)], [torch.cat([first, second]), *leaves_of(end)])
    weigh = torch.randn(steps, 2, 3, device=cuda, dtype=f64)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad((y * weigh).sum(), inputs)
    want = torch.autograd.grad((torch.cat([first, second]) * weigh).sum(), inputs)
    assert_near(got, want)


def test_outputs_of_more_than_2_31_numbers(cuda: torch.device) -> None:
    """y takes 4.3 GB; the projection comes in chunks."""
    steps, batch, hidden = 1025, 512, 4096
    layer = rnnfast.IndRNN(1, hidden, device=cuda, dtype=torch.bfloat16)
    x = torch.randn(steps, batch, 1, device=cuda, dtype=torch.bfloat16)
    with torch.no_grad():
        y, last = layer(x)
        assert y.numel() > 2**31
        want, state = layer(x[:, -3:])
    assert_near([y[:, -3:], last[:, -3:]], [want, state], 2**-6)


def test_saved_of_more_than_2_31_numbers(cuda: torch.device) -> None:
    """14 GB in all: what forward keeps takes 8.6, the gates' gradients 3.5."""
    steps, batch, hidden = 103, 4096, 1024
    layer = rnnfast.LSTM(1, hidden, device=cuda, dtype=torch.bfloat16)
    assert steps * batch * hidden * 5 > 2**31, "c and four gates are kept of each"
    x = torch.randn(steps, batch, 1, device=cuda, dtype=torch.bfloat16)
    dx, rest = gradients(layer, x, 2**-10)
    pieces = [gradients(layer, piece, 2**-10) for piece in x.split(512, 1)]
    assert_near([dx], [torch.cat([piece[0] for piece in pieces], 1)], 2**-5)
    sums = [torch.stack([g.float() for g in each]).sum(0) for each in zip(*(p[1] for p in pieces))]
    assert_near(rest, sums, 2**-5)


def test_an_input_projection_in_chunks(cuda: torch.device) -> None:
    """More than 512 MiB of it: both directions, and layers in a pipeline, cut it the same way."""
    for options in ({}, {"bidirectional": True}, {"num_layers": 2}):
        layer = rnnfast.GRU(3, 2048, device=cuda, dtype=torch.bfloat16, **options)
        x = torch.randn(30, 1024, 3, device=cuda, dtype=torch.bfloat16)
        with torch.no_grad():
            y, _ = layer(x)
            assert_near([y[:, -2:]], [layer(x[:, -2:])[0]], 2**-5)
