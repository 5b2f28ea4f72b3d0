"""CUDA graphs of the engine's calls, which the caller captures, and what it allocates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_cuda import assert_near, same_bits
from test_cuda_streams import KINDS_OF_STREAMS, OPTIONS, forms, layer_and_input, train
from torch import Tensor, nn

import rnnfast

pytestmark = pytest.mark.cuda

launches = pytest.mark.parametrize("launch", ["plain", "pdl"])


@pytest.fixture(params=KINDS_OF_STREAMS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def capture(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of a function that has run before on a stream of its own, and its results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def check_replays(
    layer: Any, x: Tensor, function: Callable[[Tensor], list[Tensor]], near: float = 1e-5
) -> None:
    """On new inputs and weights the graph gives what a plain call gives, each time the same."""
    static = x.clone()
    graph, results = capture(lambda: function(static))
    for _ in range(2):
        new = torch.randn_like(x)
        static.copy_(new)
        with torch.no_grad():
            for p in layer.parameters():
                p.mul_(0.9)
        graph.replay()
        first = [t.clone() for t in results]
        graph.replay()
        assert same_bits(first, results)
        want = function(new)
        assert_near(first, want, near)


@launches
@forms
def test_forward(kind: str, options: dict[str, Any], launch: str, cuda: torch.device) -> None:
    layer, x, given = layer_and_input(kind, options, cuda)

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            y, last = layer(given(x))
        states = last if isinstance(last, tuple) else (last,)
        return [getattr(y, "data", y), *states]

    with rnnfast.use_engine("cuda", launch=launch):
        check_replays(layer, x, run)


@launches
@forms
def test_forward_and_backward(
    kind: str, options: dict[str, Any], launch: str, cuda: torch.device
) -> None:
    layer, x, given = layer_and_input(kind, options, cuda)
    with rnnfast.use_engine("cuda", launch=launch):
        check_replays(layer, x, lambda x: train(layer, x, given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_and_projections(dtype: torch.dtype, cuda: torch.device) -> None:
    layer = rnnfast.LSTM(9, 33, 2, bidirectional=True, proj_size=7, device=cuda, dtype=dtype)
    x = torch.randn(5, 6, 9, device=cuda, dtype=dtype)
    static = x.clone()
    graph, results = capture(lambda: train(layer, static, lambda x: x))
    graph.replay()
    assert_near(results, train(layer, x, lambda x: x), max(1e-12, 8 * torch.finfo(dtype).eps))


class Model(nn.Module):
    """A layer between others, its state thrown away."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_make_graphed_callables(kind: str, options: dict[str, Any], cuda: torch.device) -> None:
    """A few steps of training with torch's own tool, against the same without it."""
    layer = getattr(rnnfast, kind)(5, 16, **options)
    plain = Model(layer, 16 * (1 + layer.bidirectional)).to(cuda)
    graphed = copy.deepcopy(plain)
    x, target = torch.randn(7, 4, 5, device=cuda), torch.randn(7, 4, 3, device=cuda)
    graphed_call = torch.cuda.make_graphed_callables(graphed, (x,))
    losses: list[list[Tensor]] = []
    calls: list[Any] = [plain, graphed_call]
    for module, function in zip((plain, graphed), calls, strict=True):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        mine = []
        for step in range(4):
            optimizer.zero_grad(set_to_none=True)
            loss = (function(x * (1 + step / 4)) - target).square().mean()
            loss.backward()
            optimizer.step()
            mine.append(loss.detach().clone())
        losses.append(mine)
    assert_near(losses[1], losses[0], 1e-5)
    assert_near(list(graphed.parameters()), list(plain.parameters()), 1e-4)
    assert float(losses[0][-1]) != float(losses[0][0])


def test_a_whole_step_of_training(cuda: torch.device) -> None:
    plain = Model(rnnfast.LSTM(5, 16, 2), 16).to(cuda)
    captured = copy.deepcopy(plain)
    x, target = torch.randn(7, 4, 5, device=cuda), torch.randn(7, 4, 3, device=cuda)

    def step(model: nn.Module) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        optimizer.zero_grad(set_to_none=True)
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    graph, _ = capture(lambda: step(captured))  # two steps before, none of the capture
    for _ in range(3):
        graph.replay()
    for _ in range(5):
        step(plain)
    assert_near(list(captured.parameters()), list(plain.parameters()), 1e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["LSTM", "IndRNN_tanh"])
def test_nothing_is_allocated_behind_torch(
    kind: str, options: dict[str, Any], cuda: torch.device
) -> None:
    """The device's free memory changes by what torch reserves, and that by nothing."""
    layer, x, given = layer_and_input(kind, options, cuda)

    def use() -> tuple[int, int]:
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()

    for _ in range(40):  # each stream of the pool comes up, and keeps what torch gives it
        train(layer, x, given)
    before = use()
    for _ in range(80):
        train(layer, x, given)
    assert use() == before


def test_a_step_of_a_stream_in_a_graph(cuda: torch.device) -> None:
    """layer.step with a state that is written where it is read."""
    layer = rnnfast.GRU(5, 16, 2, device=cuda).requires_grad_(False)
    x = torch.randn(6, 3, 5, device=cuda)
    static, state = x[0].clone(), torch.zeros(2, 3, 16, device=cuda)

    def step() -> list[Tensor]:
        y, new = layer.step(static, state)
        state.copy_(new)
        return [y]

    graph, (y,) = capture(step)
    state.zero_()
    ys = []
    for one in x:
        static.copy_(one)
        graph.replay()
        ys.append(y.clone())
    assert_near([torch.stack(ys)], [layer(x)[0]], 1e-5)
