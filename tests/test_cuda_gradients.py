"""Derivatives through the CUDA kernels: numerically, twice, on request only, from any layout, and
the same bits at every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import oracle
import pytest
import torch
from cases import Case
from conftest import CUDA_TESTS_ON
from on_cuda import (
    DTYPES,
    KINDS,
    Setup,
    assert_near,
    build,
    call,
    inputs_of,
    leaves_of,
    module_on,
    operators,
    results_of,
    same_bits,
    spoil_free_memory,
)
from test_gradients import GRADIENT_LAYOUTS, LARGER, NEEDS, SMALL
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence

pytestmark = pytest.mark.cuda

f64 = torch.float64
kinds = pytest.mark.parametrize("kind", KINDS)


def as_function(
    case: Case, device: torch.device, reset: bool = False
) -> tuple[Callable[..., Any], list[Tensor]]:
    """The operator as a function of the tensors that can have a gradient, on the device."""
    problem = cases.build(case)
    leaves, args = cases.op_inputs(problem, grad=False)
    tensors = [t.to(device).requires_grad_() for t in leaves.values()]
    mask = None
    if reset:
        gen = torch.Generator().manual_seed(case.seq_len)
        mask = torch.rand(case.seq_len, case.batch, generator=gen) < 0.4
        mask = mask if case.lengths is None else oracle.pack_rows(mask, case.lengths)
        mask = mask.to(device)
    outputs = 3 if case.cell == "lstm" else 2
    run = operators().forward.default

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        operands = cases.op_operands(dict(zip(leaves, inputs, strict=True)))
        result = run(*operands, args[8], mask, None, oracle.CELL_IDS[case.cell], case.reverse, True)
        return tuple(result[:outputs])

    return function, tensors


@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case: Case, reset: bool, device: torch.device) -> None:
    assert gradcheck(*as_function(case, device, reset))


@pytest.mark.parametrize("case", LARGER, ids=str)
def test_gradcheck_larger(case: Case, device: torch.device) -> None:
    assert gradcheck(*as_function(case, device), fast_mode=True)


@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradgradcheck(case: Case, reset: bool, device: torch.device) -> None:
    assert gradgradcheck(*as_function(case, device, reset), fast_mode=True)


@pytest.mark.parametrize(
    "options",
    [{"bidirectional": True}, {"num_layers": 3}, {"form": "packed_uneven", "bidirectional": True}],
    ids=str,
)
@kinds
def test_gradcheck_of_layers(kind: str, options: dict[str, Any], device: torch.device) -> None:
    """Both directions and layers at once, once and twice differentiated."""
    problem = build(Setup(kind, "float64", 3, 3, 2, 3, **options))
    layer = module_on(problem, True, device, f64)
    x, hx = inputs_of(problem, device, f64)
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, weights = rest[: len(hx)], dict(zip(names, rest[len(hx) :], strict=True))

        def module(*args: Any) -> Any:
            return torch.nn.utils.stateless._functional_call(layer, weights, args)

        return tuple(call(problem, module, x, states))

    weights = [p.detach().requires_grad_() for p in layer.parameters()]
    assert gradcheck(function, [x, *hx, *weights], fast_mode=True)
    assert gradgradcheck(function, [x, *hx, *weights], fast_mode=True)


@pytest.mark.parametrize("form", ["contiguous", "packed"])
@kinds
def test_second_derivative_equals_the_cpus(kind: str, form: str, device: torch.device) -> None:
    """A gradient penalty; cuDNN has no second derivative."""
    problem = build(Setup(kind, "float64", 4, 3, 5, 9, bidirectional=True, num_layers=2, form=form))
    found = []
    for where in (device, "cpu"):
        layer = module_on(problem, True, where, f64)
        x, hx = inputs_of(problem, where, f64)
        y, *_ = call(problem, layer, x, hx)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        penalty = (dx.norm(dim=-1) - 1).square().sum()
        found.append(torch.autograd.grad(penalty, [x, *hx, *layer.parameters()], allow_unused=True))
    pairs = [(a, b) for a, b in zip(*found, strict=True) if b is not None]
    assert_near([a for a, _ in pairs], [b for _, b in pairs])


@pytest.mark.parametrize("case", [c for c in cases.small_cases() if c.state], ids=str)
def test_backward_fills_only_what_is_needed(case: Case, device: torch.device) -> None:
    """Each bit of ``needs`` by itself: that gradient as with all of them, the others empty."""
    problem = cases.build(case)
    leaves, args = cases.op_inputs(problem, grad=False)
    run, cell = operators(), oracle.CELL_IDS[case.cell]
    args = [a if a is None or i == 8 else a.to(device) for i, a in enumerate(args)]
    y, _, _, saved = run.forward(*args, None, cell, case.reverse, True)
    given = cases._pack_cotangents(problem).cotangents
    dy, dh_n = given["y"].to(device), given["h_n"].to(device)
    dc_n = given["c_n"][None].to(device) if "c_n" in given else None

    def gradients(needs: int) -> Any:
        return run.backward(dy, dh_n, dc_n, *args, y, saved, cell, case.reverse, needs)

    every = gradients(sum(NEEDS[name] for name in leaves))
    for i, name in enumerate(NEEDS):
        if name not in leaves:
            continue
        for other, grad in enumerate(gradients(NEEDS[name])):
            if other == i:
                assert same_bits([grad], [every[i]])
            else:
                assert grad.shape == (0,), f"tensor {other} came back though only {name} was needed"


@pytest.mark.parametrize("wanted", ["x", "hx", "weight_hh_l0", "bias_ih_l1", "x weight_ih_l1"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=["layers", "directions"])
@kinds
def test_only_the_gradients_asked_for(
    kind: str, options: dict[str, Any], wanted: str, device: torch.device
) -> None:
    problem = build(Setup(kind, "float64", 5, 3, 5, 17, num_layers=2, **options))
    found = []
    for some in (True, False):
        layer = module_on(problem, True, device, f64)
        x, hx = inputs_of(problem, device, f64)
        leaves = {"x": x, "hx": hx[0]} | dict(layer.named_parameters())
        if some:
            for name, leaf in leaves.items():
                leaf.requires_grad_(name in wanted.split())
            for h in hx[1:]:
                h.requires_grad_(False)
        y, *states = call(problem, layer, x, hx)
        loss = y.square().sum() + sum(s.sum() for s in states)
        found.append(torch.autograd.grad(loss, [leaves[name] for name in wanted.split()]))
    assert_near(found[0], found[1])


@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", oracle.CELLS)
def test_layout_of_incoming_gradients(
    cell: str, layout: str, packed: bool, device: torch.device
) -> None:
    case = Case(cell, 3, 5, 5, 17, f64, packed=packed)
    function, tensors = as_function(case, device)
    outputs = function(*tensors)
    if cell == "lstm":
        outputs = (*outputs[:2], outputs[2][0])
    given = cases._pack_cotangents(cases.build(case)).cotangents.values()
    change = GRADIENT_LAYOUTS[layout]
    views = [change(g.to(device)) for g in given]
    plain = [view.contiguous() for view in views]
    assert all(view.stride() != value.stride() for view, value in zip(views, plain, strict=True))
    got, want = (
        torch.autograd.grad(outputs, tensors, each, retain_graph=True) for each in (views, plain)
    )
    assert_near(got, want)


def test_backward_twice_and_accumulation(device: torch.device) -> None:
    problem = build(Setup("GRU", "float32", 4, 3, 5, 9, bidirectional=True))
    layer = module_on(problem, True, device, torch.float32)
    x, _ = inputs_of(problem, device, torch.float32)
    loss = layer(x)[0].square().sum()
    inputs = [x, *layer.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert same_bits(first, torch.autograd.grad(loss, inputs, retain_graph=True))
    loss.backward()
    layer(x)[0].square().sum().backward()
    assert_near([p.grad for p in layer.parameters()], [2 * g for g in first[1:]], 1e-5)


def test_modified_input_is_noticed(device: torch.device) -> None:
    for num_layers in (1, 2):
        problem = build(Setup("LSTM", "float32", 4, 3, 5, 9, num_layers=num_layers))
        layer = module_on(problem, True, device, torch.float32)
        y, _ = layer(inputs_of(problem, device, torch.float32)[0])
        with torch.no_grad():
            layer.weight_hh_l0.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


REPEATED: dict[str, dict[str, Any]] = {
    "one": {},
    "directions": {"bidirectional": True},
    "layers": {"num_layers": 3},
    "both": {"num_layers": 2, "bidirectional": True},
    "packed": {"form": "packed", "num_layers": 3},
}


@pytest.mark.parametrize("options", REPEATED.values(), ids=REPEATED)
@pytest.mark.parametrize("precision", DTYPES)
@kinds
def test_the_same_bits_at_every_run(
    kind: str, precision: str, options: dict[str, Any], device: torch.device
) -> None:
    """Also in memory of another content, with several streams, and long sums."""
    problem = build(Setup(kind, precision, 21, 40, 17, 65, **options))
    layer = module_on(problem, True, device, problem.setup.dtype)
    x, _ = inputs_of(problem, device, problem.setup.dtype)
    lengths = problem.setup.lengths
    first: list[Tensor] = []
    for _ in range(5):
        if CUDA_TESTS_ON == "cuda":
            spoil_free_memory()
        given = x if lengths is None else pack_padded_sequence(x, torch.tensor(lengths))
        outputs = leaves_of(layer(given))
        loss = torch.stack([out.float().square().sum() for out in outputs]).sum() / 64
        grads = torch.autograd.grad(loss, [x, *layer.parameters()])
        result = [*(out.detach() for out in outputs), *grads]
        first = first or result
        assert same_bits(result, first)
        assert all(bool(t.isfinite().all()) for t in result)


@pytest.mark.parametrize("options", REPEATED.values(), ids=REPEATED)
@kinds
def test_side_by_side_is_one_by_one(
    kind: str, options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes that share a call give what each gives alone."""
    from rnnfast import _group

    problem = build(Setup(kind, "float64", 37, 6, 9, 33, **options))
    layer = module_on(problem, True, device, f64)
    x: Any = inputs_of(problem, device, f64)[0]
    if problem.setup.lengths is not None:
        x = pack_padded_sequence(x.detach(), torch.tensor(problem.setup.lengths))
    got = results_of(layer, x)
    monkeypatch.setattr(_group, "applies", lambda *_: False)
    assert_near(got, results_of(layer, x))
