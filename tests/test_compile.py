"""torch.compile: no graph break, one operator a layer, few graphs. What lengths add is in
test_lengths.py, what stacks and two directions compute in test_compile_stack.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import works
from functorch.compile import make_boxed_func
from test_modules import leaves_of
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.func import vmap

import rnnfast

SECTION = "Compilers and export"
NOT_TRACED = "Attempted to wrap RNN, GRU, or LSTM|Unsupported function call"
ONE = {"num_layers": 1}
ALL: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": True}
# (T, B). Sizes that are equal at the first call, input_size too, are one size to torch.compile.
SHAPES = ((3, 4), (7, 6), (2, 2), (50, 5), (9, 9))


class Graphs:
    """A backend that runs what it is given, and keeps it: graphs of forward and of backward."""

    def __init__(self) -> None:
        self.forward: list[Any] = []
        self.backward: list[Any] = []
        self.compile = aot_autograd(
            fw_compiler=lambda graph, _: self._keep(self.forward, graph),
            bw_compiler=lambda graph, _: self._keep(self.backward, graph),
        )

    @staticmethod
    def _keep(where: list[Any], graph: Any) -> Any:
        where.append(graph)
        return make_boxed_func(graph.forward)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        return self.compile(graph, inputs)

    def counts(self) -> tuple[int, int]:
        return len(self.forward), len(self.backward)


def operators(graph: Any) -> list[str]:
    """rnnfast's operators in a graph."""
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [target.split(".")[1] for target in targets if target.startswith("rnnfast.")]


def compiled(function: Any, **options: Any) -> tuple[Any, Graphs]:
    torch._dynamo.reset()  # each kind of layer is one more version of the same code
    graphs = Graphs()
    return torch.compile(function, fullgraph=True, backend=graphs, **options), graphs


def example(layer: Any, form: str, steps: int, batch: int) -> tuple[Tensor, dict[str, Any]]:
    """An input, and what else a form of call has."""
    shape = (batch, steps) if layer.batch_first else (steps, batch)
    x = torch.randn(*shape, layer.input_size)
    given: dict[str, Any] = {}
    if form == "unbatched":
        return torch.randn(steps, layer.input_size), given
    if "hx" in form:
        count = layer.num_layers * (1 + layer.bidirectional)
        h = torch.randn(count, batch, layer.hidden_size)
        given["hx"] = (h, torch.randn_like(h)) if isinstance(layer, rnnfast.LSTM) else h
    if "reset" in form:
        given["reset"] = torch.rand(shape) < 0.3
    if "lengths" in form:
        given["lengths"] = torch.randint(1, steps + 1, (batch,))
    return x, given


def check(layer: Any, function: Any, form: str, steps: int, batch: int, train: bool) -> None:
    """The graph and the layer give the same, gradients too."""
    x, given = example(layer, form, steps, batch)
    results = []
    for run in (function, layer):
        if not train:
            with torch.no_grad():
                results.append(leaves_of(run(x, **given)))
            continue
        one = x.clone().requires_grad_()
        torch.manual_seed(3)  # dropout
        out = leaves_of(run(one, **given))
        loss = torch.stack([(t.float() ** 2).sum() for t in out]).sum()
        results.append([*out, *torch.autograd.grad(loss, [one, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "train"),
    [(ONE, False), (ONE, True), (ALL, True)],
    ids=["inference", "training", "all, training"],
)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "IndRNN"])
def test_one_graph_for_all_sizes(kind: str, options: Any, train: bool) -> None:
    """dynamic=True: one graph serves all T, B >= 2, and it holds one operator."""
    layer = getattr(rnnfast, kind)(5, 9, **options).train(train)
    function, graphs = compiled(layer, dynamic=True)
    for steps, batch in SHAPES:
        check(layer, function, "hx, reset" if options is ONE else "plain", steps, batch, train)
    assert graphs.counts() == (1, int(train))
    end = "" if options is ONE else "_stack"
    assert operators(graphs.forward[0]) == [f"forward{end}"]
    if train:
        assert operators(graphs.backward[0]) == [f"backward{end}"]


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("LSTM", "hx"),
        ("GRU", "reset"),
        ("GRU", "lengths"),
        ("LSTM", "hx, reset, lengths"),
        ("RNN", "unbatched"),
    ],
)
def test_forms_of_calls(kind: str, form: str) -> None:
    layer = getattr(rnnfast, kind)(5, 9, **ALL)
    function, graphs = compiled(layer)
    check(layer, function, form, 7, 3, True)
    check(layer, function, form, 8, 2, True)
    assert graphs.counts() == (2, 2)
    end = "_lengths" if "lengths" in form else ""
    assert operators(graphs.forward[1]) == [f"forward_stack{end}"]
    assert operators(graphs.backward[1]) == [f"backward_stack{end}"]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_one_recompilation_a_dimension(train: bool) -> None:
    """By default the first change of T and the first of B compile again, and no later one."""
    layer = rnnfast.GRU(5, 9)
    function, graphs = compiled(layer)
    counts = []
    for steps, batch in ((4, 3), (5, 3), (9, 3), (9, 5), (7, 8), (50, 2)):
        check(layer, function, "plain", steps, batch, train)
        counts.append(len(graphs.forward))
    assert counts == [1, 2, 2, 3, 3, 3]
    assert len(graphs.backward) == (3 if train else 0)


def test_the_graph_does_not_grow_with_time() -> None:
    sizes = []
    for steps in (2, 500):
        layer = rnnfast.LSTM(5, 9, **ALL)
        function, graphs = compiled(layer)
        function(torch.randn(3, steps, 5))[0].sum().backward()
        sizes.append([len(g.graph.nodes) for g in (graphs.forward[0], graphs.backward[0])])
    assert sizes[0] == sizes[1]


def test_options_may_change() -> None:
    """Dropout, training and weights are read at the call, in a graph as without."""
    layer = rnnfast.GRU(5, 9, 2, dropout=0.5)
    function, _ = compiled(layer)
    x = torch.randn(7, 3, 5)
    for train, dropout in ((True, 0.5), (False, 0.5), (True, 0.0), (True, 0.9)):
        layer.train(train)
        layer.dropout = dropout
        with torch.no_grad():
            layer.weight_hh_l0.mul_(0.9)
        torch.manual_seed(4)
        got = function(x)
        torch.manual_seed(4)
        torch.testing.assert_close(got, layer(x))


def test_cells_steps_and_loops() -> None:
    """What is called in a loop is traced into it."""
    cell, layer = rnnfast.LSTMCell(5, 9), rnnfast.GRU(5, 9)

    def run(x: Tensor) -> Tensor:
        state, hidden, ys = (x.new_zeros(3, 9), x.new_zeros(3, 9)), None, []
        for one in x.unbind(0):
            state = cell(one, state)
            y, hidden = layer.step(one, hidden)
            ys.append(y + state[0])
        return torch.stack(ys)

    function, graphs = compiled(run)
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(function(x), run(x))
    assert len(graphs.forward) == 1


def test_transforms_inside_a_graph() -> None:
    layer, n = rnnfast.GRU(5, 9), torch.tensor([2, 4, 1])
    x = torch.randn(2, 4, 3, 5)
    for given in ({}, {"lengths": n}):

        def run(x: Tensor, given: Any = given) -> Tensor:
            return vmap(lambda one: layer(one, **given)[0])(x)

        torch.testing.assert_close(compiled(run)[0](x), run(x), rtol=1e-4, atol=1e-5)


def test_inductor() -> None:
    """The real compiler: training and inference of everything at once."""
    torch._dynamo.reset()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = rnnfast.LSTM(5, 9, bidirectional=True, batch_first=True)
            self.head = nn.Linear(18, 3)

        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            return self.head(self.layer(self.layer(x)[0][..., :5], lengths=n)[0])

    model = Model()
    function = torch.compile(model, fullgraph=True, dynamic=True)
    for steps, batch in ((7, 3), (5, 6)):
        x, n = torch.randn(batch, steps, 5), torch.randint(1, steps + 1, (batch,))
        got, want = function(x, n), model(x, n)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        weights = list(model.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), weights),
            torch.autograd.grad(want.square().sum(), weights),
            rtol=1e-4,
            atol=1e-4,
        )


def _run(library: Any, device: torch.device, dynamic: bool | None, train: bool) -> Graphs:
    """Three sizes through one compiled layer of torch.nn or rnnfast."""
    layer = library.LSTM(5, 9, 2, bidirectional=True, device=device)
    function, graphs = compiled(layer, dynamic=dynamic)
    for steps, batch in ((7, 3), (9, 6), (5, 2)):
        x = torch.randn(steps, batch, 5, device=device)
        with torch.set_grad_enabled(train):
            y = function(x)[0]
        torch.testing.assert_close(y, layer(x)[0], rtol=1e-4, atol=1e-5)
        if train:
            y.sum().backward()
    return graphs


@works.row(
    SECTION,
    "`torch.compile(fullgraph=True)`, inference",
    torch_nn="no: not traced",
    error=NOT_TRACED,
)
def test_compiled_inference(library: Any, device: torch.device) -> None:
    graphs = _run(library, device, None, False)
    assert graphs.counts() == (2, 0)


@works.row(
    SECTION,
    "`torch.compile(fullgraph=True)`, training",
    torch_nn="no: not traced",
    error=NOT_TRACED,
)
def test_compiled_training(library: Any, device: torch.device) -> None:
    assert _run(library, device, None, True).counts() == (2, 2)


@works.row(
    SECTION,
    "one graph for all T and B from 2 on (`dynamic=True`), one operator for all layers and "
    "directions",
    torch_nn="no: not traced",
    error=NOT_TRACED,
)
def test_one_graph(library: Any, device: torch.device) -> None:
    graphs = _run(library, device, True, True)
    assert graphs.counts() == (1, 1)
    assert operators(graphs.forward[0]) == ["forward_stack"]
    assert operators(graphs.backward[0]) == ["backward_stack"]


@works.row(
    SECTION,
    "autocast around a compiled layer",
    torch_nn="no: not traced",
    error=NOT_TRACED,
)
def test_autocast(library: Any, device: torch.device) -> None:
    layer = library.GRU(5, 9, device=device)
    function, _ = compiled(layer)
    x = torch.randn(4, 3, 5, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        got, want = function(x)[0], layer(x)[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    got.sum().backward()


@works.row(
    SECTION,
    "CUDA graphs: inference captured and replayed",
    torch_nn="yes, on CUDA",
    cpu=False,
)
def test_cuda_graphs(library: Any, device: torch.device) -> None:
    layer = library.LSTM(5, 9, 2, device=device)
    static = torch.randn(4, 3, 5, device=device)
    with torch.no_grad():
        if device.type == "cpu":
            y = layer(static)[0]
            torch.testing.assert_close(layer(static)[0], y)
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(static)[0]
        static.copy_(torch.randn_like(static))
        graph.replay()
        torch.testing.assert_close(y, layer(static)[0], rtol=1e-4, atol=1e-5)


@works.row(
    SECTION,
    '`torch.compile(mode="reduce-overhead")`: CUDA graphs by the compiler',
    torch_nn="no: not traced",
    error=NOT_TRACED,
    cpu=False,
)
def test_reduce_overhead(library: Any, device: torch.device) -> None:
    torch._dynamo.reset()
    layer = library.LSTM(5, 9, device=device)
    function = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(4, 3, 5, device=device)
            torch.testing.assert_close(function(x)[0].clone(), layer(x)[0], rtol=1e-4, atol=1e-5)
