"""recompute=True: the same results and gradients, and less kept for backward."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import cases
import oracle
import pytest
import tolerance
import torch
import works
from cases import Case
from test_modules import leaves_of
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import rnnfast
from bench.recompute import kept_bytes
from rnnfast import _modes, _recompute, ops

f64 = torch.float64
close = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A kept state every two steps, so that short sequences have several chunks."""
    if not request.node.name.startswith("test_kept_bytes"):
        monkeypatch.setattr(_recompute, "EVERY", 2)


def kept_beyond(layer: Any, x: Tensor) -> int:
    """Bytes that autograd keeps of a call beyond its input, weights and results."""
    return kept_bytes(lambda: leaves_of(layer(x)), x, *layer.parameters())


# --------------------------------------------------------------------------- rows of the table


@works.row(
    "Memory",
    "`recompute=True`: what LSTM and GRU keep beyond input and output at T = 4096 falls to a "
    "fourth or less (to 1/160 and 1/256)",
    torch_nn="has no such option",
    error="unexpected keyword argument 'recompute'",
)
def test_kept_bytes(library: Any, device: torch.device) -> None:
    for name in ("LSTM", "GRU"):
        kept = []
        for recompute in (True, False):
            options = {"recompute": True} if recompute else {}
            layer = getattr(library, name)(32, 32, device=device, **options)
            x = torch.randn(4096, 4, 32, device=device, requires_grad=True)
            kept.append(kept_beyond(layer, x))
        assert kept[0] * 4 <= kept[1], (name, kept)


@works.row(
    "Memory",
    "`recompute=True` changes no number: forward bit for bit in float32 (CPU), gradients to "
    "rounding",
    torch_nn="has no such option",
    error="unexpected keyword argument 'recompute'",
)
def test_the_same_numbers(library: Any, device: torch.device) -> None:
    lean = library.LSTM(16, 33, 2, bidirectional=True, recompute=True, device=device)
    plain = library.LSTM(16, 33, 2, bidirectional=True, device=device)
    plain.load_state_dict(lean.state_dict())
    x = torch.randn(51, 3, 16, device=device)
    results = []
    for layer in (lean, plain):
        out = leaves_of(layer(x))
        grads = torch.autograd.grad(sum(o.square().sum() for o in out), layer.parameters())
        results.append(([o.detach() for o in out], grads))
    for a, b in zip(*(r[0] for r in results), strict=True):
        if device.type == "cpu":
            assert tolerance.same_bits(a, b)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(r[1] for r in results), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def has_no_effect(library: Any, device: torch.device) -> None:
    """torch.nn's layers keep what they kept, and run what they ran."""
    for kind in works.kinds(library):
        layer = getattr(library, kind)(5, 9, device=device)
        x = torch.randn(40, 3, 5, device=device, requires_grad=True)
        found = []
        for recompute in (False, True):
            layer.recompute = recompute
            y = layer(x)[0]
            grads = torch.autograd.grad(y.square().sum(), layer.parameters())
            numbers = [t.detach().tolist() for t in (y, *grads)]
            found.append((kept_beyond(layer, x), type(y.grad_fn), repr(layer), numbers))
        assert found[0] == found[1]


@works.row(
    "Memory",
    "`recompute=True` on a layer that is there already, `accelerate`d ones included; copied, "
    "pickled",
    torch_nn="an attribute without effect",
    theirs=has_no_effect,
)
def test_attribute(library: Any, device: torch.device) -> None:
    model = nn.Sequential(nn.GRU(5, 9, device=device))
    if library is rnnfast:
        rnnfast.accelerate(model)
    state = list(model.state_dict())
    model[0].recompute = True
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[0].recompute is True and list(twin.state_dict()) == state
        x = torch.randn(40, 3, 5, device=device, requires_grad=True)
        if library is rnnfast:
            assert "recompute=True" in repr(twin)
            assert type(twin[0](x)[0].grad_fn).__name__.startswith("_Recompute")
        twin(x)[0].sum().backward()
    rnnfast.restore(model)
    if library is rnnfast:
        assert "recompute" not in vars(model[0]) and type(model[0]) is nn.GRU


@works.row(
    "Memory",
    "`recompute=True` in `torch.compile(fullgraph=True)`: one operator a direction, whatever T is",
    torch_nn="has no such option",
    error="unexpected keyword argument 'recompute'",
)
def test_compile(library: Any, device: torch.device) -> None:
    torch._dynamo.reset()
    layer = library.LSTM(5, 9, recompute=True, device=device, dtype=f64)
    called: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        called.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for steps in (7, 12, 50):
        x = torch.randn(steps, 3, 5, device=device, dtype=f64, requires_grad=True)
        inputs = [x, *layer.parameters()]
        results = []
        for one in (compiled, layer):
            out = leaves_of(one(x))
            grads = torch.autograd.grad(sum(o.square().sum() for o in out), inputs)
            results.append([*out, *grads])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, **close)
    assert sum("forward_recompute" in name for name in called) == 1, called
    assert not any("rnnfast.forward." in name for name in called)


# --------------------------------------------------------------------------- one direction


def as_function(case: Case) -> tuple[Callable[..., Any], list[Tensor]]:
    leaves, args = cases.op_inputs(cases.build(case))
    outputs = 3 if case.cell == "lstm" else 2

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        operands = cases.op_operands(dict(zip(leaves, tensors, strict=True)))
        rest = (*args[8:], oracle.CELL_IDS[case.cell], case.reverse)
        return _recompute.run(*operands, *rest)[:outputs]

    return function, list(leaves.values())


SMALL = [
    Case(cell, 5, 2, 3, 3, f64, packed=packed, reverse=reverse)
    for cell in oracle.CELLS
    for packed, reverse in ((False, False), (False, True), (True, False), (True, True))
] + [
    Case("lstm", 5, 2, 2, 3, f64, proj=2),
    Case("lstm", 5, 3, 2, 3, f64, proj=2, packed=True, reverse=True),
    Case("gru", 4, 1, 2, 3, f64, bias=False, state=False),
    Case("lstm", 4, 2, 2, 3, f64, bias=False, state=False, packed=True),
]


@pytest.mark.parametrize("registered", [False, True], ids=["eager", "registered"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case: Case, registered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if registered:
        monkeypatch.setattr(_modes, "is_eager", lambda args: False)
    function, tensors = as_function(case)
    assert gradcheck(function, tensors, fast_mode=registered)


@pytest.mark.parametrize("case", SMALL[::2] + SMALL[-4:], ids=str)
def test_gradgradcheck(case: Case) -> None:
    function, tensors = as_function(case)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("every", [1, 3, 64])
@pytest.mark.parametrize(
    "case",
    [c for c in cases.small_cases() if c.cell in ("lstm", "gru")]
    + [
        Case("lstm", 40, 33, 5, 17, threads=2),
        Case("lstm", 9, 7, 5, 17, packed=True, reverse=True, state=False),
        Case("gru", 9, 7, 5, 17, packed=True, loss="y"),
        Case("lstm", 9, 7, 5, 17, loss="state", reverse=True),
        *(Case("gru", 5, 3, 5, 9, layout=layout) for layout in cases.LAYOUTS),
    ],
    ids=str,
)
def test_against_the_oracle(case: Case, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recompute, "EVERY", every)
    torch.set_num_threads(case.threads)
    problem, ref, peer = cases.solved(case)
    leaves, args = cases.op_inputs(problem)
    cell = oracle.CELL_IDS[case.cell]
    y, h_n, c_n = _recompute.run(*args, cell, case.reverse)
    plain = torch.ops.rnnfast.forward(*args, None, cell, case.reverse, False)
    for ours, theirs in zip((y, h_n, c_n), plain, strict=False):
        assert tolerance.same_bits(ours.detach(), theirs.detach())
    outputs = {"y": y, "h_n": h_n} | ({"c_n": c_n[0]} if case.cell == "lstm" else {})
    grads = cases._gradients(cases._pack_cotangents(problem), leaves, outputs)
    results = {k: v.detach() for k, v in outputs.items()} | grads
    results = {k: v.reshape(ref[k].shape) for k, v in results.items()}
    tolerance.check(results, peer, ref, case.dtype)


@pytest.mark.parametrize("wanted", [("x",), ("w_hh",), ("h0", "b_ih"), ("c0",), ("w_ih", "w_hr")])
def test_only_the_gradients_asked_for(wanted: tuple[str, ...]) -> None:
    problem, ref, _ = cases.solved(Case("lstm", 7, 3, 5, 17, f64, proj=4))
    leaves, args = cases.op_inputs(problem, grad=False)
    for name in wanted:
        leaves[name].requires_grad_()
    args = [*cases.op_operands(leaves), None, None]
    y, h_n, c_n = _recompute.run(*args, 0, False)
    outputs = {"y": y, "h_n": h_n, "c_n": c_n[0]}
    chosen = {name: leaves[name] for name in wanted}
    for name, got in cases._gradients(problem, chosen, outputs).items():
        tolerance.check_tensor(name, got, None, ref[name], f64)


@pytest.mark.parametrize("case", SMALL[:8] + SMALL[-4:], ids=str)
def test_opcheck(case: Case) -> None:
    _, args = cases.op_inputs(cases.build(case))
    cell = oracle.CELL_IDS[case.cell]
    rest = (cell, case.reverse, 2)
    forward = torch.ops.rnnfast.forward_recompute.default
    torch.library.opcheck(forward, (*args, *rest))
    given = [a.detach() if isinstance(a, Tensor) else a for a in args]
    y, h_n, c_n, *kept = forward(*given, *rest)
    dc_n = c_n if case.cell == "lstm" else None
    needs = ops.needs_mask([a is not None and a.requires_grad for a in args[:8]])
    for mask in (needs, 1, 16):
        torch.library.opcheck(
            torch.ops.rnnfast.backward_recompute.default,
            (y, h_n, dc_n, *given, *kept, *rest, mask),
        )


def test_packed_weights_are_those_of_a_whole_call() -> None:
    """The bits of y hang on it: a chunk alone has too few rows to pack the weights."""
    x, w = torch.randn(40, 2, 5), torch.randn(36, 5)
    u = torch.randn(36, 9)
    assert _recompute._packed(x, w, u, None, 0) is not None
    assert _recompute._packed(x[:39], w, u, None, 0) is None
    with rnnfast.use_engine("cpu", kernel="direct"):
        assert _recompute._packed(x, w, u, None, 0) is None


def test_third_derivative() -> None:
    function, tensors = as_function(Case("lstm", 3, 1, 2, 2, f64))

    def gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
        y = function(*inputs)[0]
        return torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)

    assert gradgradcheck(gradient, tensors, fast_mode=True)
