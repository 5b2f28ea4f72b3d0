"""Derivatives through the real kernels: numerically, twice, on request only, from any layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import oracle
import pytest
import tolerance
import torch
from cases import Case
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast

NEEDS = {"x": 1, "h0": 2, "c0": 4, "w_ih": 8, "w_hh": 16, "b_ih": 32, "b_hh": 64, "w_hr": 128}

SMALL = [
    Case(cell, 3, 2, 3, 3, torch.float64, packed=packed, reverse=reverse)
    for cell in oracle.CELLS
    for packed, reverse in ((False, False), (True, True))
] + [
    Case("lstm", 2, 2, 2, 3, torch.float64, proj=2),
    Case("lstm", 3, 2, 2, 3, torch.float64, proj=2, packed=True, reverse=True),
    Case("gru", 2, 1, 2, 3, torch.float64, bias=False, state=False),
]
LARGER = [
    Case(cell, 7, 5, 5, 17, torch.float64, packed=packed, threads=2)
    for cell in oracle.CELLS
    for packed in (False, True)
]


def as_function(case: Case) -> tuple[Callable[..., Any], list[Tensor]]:
    """The op as a function of the tensors that can have a gradient."""
    problem = cases.build(case)
    leaves, args = cases.op_inputs(problem)
    outputs = 3 if case.cell == "lstm" else 2

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        operands = cases.op_operands(dict(zip(leaves, tensors, strict=True)))
        result = torch.ops.rnnfast.forward(
            *operands, *args[8:], None, oracle.CELL_IDS[case.cell], case.reverse, True
        )
        return tuple(result[:outputs])

    return function, list(leaves.values())


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case: Case) -> None:
    function, tensors = as_function(case)
    assert gradcheck(function, tensors)


@pytest.mark.parametrize("case", LARGER, ids=str)
def test_gradcheck_larger(case: Case) -> None:
    function, tensors = as_function(case)
    assert gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradgradcheck(case: Case) -> None:
    function, tensors = as_function(case)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("case", LARGER[::2], ids=str)
def test_gradgradcheck_larger(case: Case) -> None:
    function, tensors = as_function(case)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("cell", oracle.TORCH_CELLS)
def test_second_derivative_equals_torch(cell: str) -> None:
    """A gradient penalty, as WGAN-GP and meta-learning use it, in float64."""
    case = Case(cell, 4, 3, 5, 9, torch.float64)
    problem = cases.build(case)
    results = []
    for ours in (True, False):
        leaves, args = cases.op_inputs(problem)
        if ours:
            y = torch.ops.rnnfast.forward(*args, None, oracle.CELL_IDS[cell], False, True)[0]
        else:
            y, _, _ = oracle.direction(cell, args[0], args[1], leaves.get("c0"), args[3:8])
        (dx,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
        penalty = (dx.norm(dim=-1) - 1).square().sum()
        results.append(torch.autograd.grad(penalty, [leaves["w_ih"], leaves["w_hh"], leaves["x"]]))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_third_derivative() -> None:
    case = Case("gru", 2, 1, 2, 2, torch.float64)
    function, tensors = as_function(case)

    def gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
        y = function(*inputs)[0]
        return torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)

    assert gradgradcheck(gradient, tensors, fast_mode=True)


class Recorder(TorchDispatchMode):
    """Notes the arguments of each rnnfast::backward that autograd issues."""

    def __init__(self) -> None:
        super().__init__()
        self.needs: list[int] = []
        self.forwards = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.rnnfast.backward.default:
            self.needs.append(args[-1])
        if func is torch.ops.rnnfast.forward.default:
            self.forwards += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wanted", [("x",), ("w_hh",), ("h0", "b_ih"), ("w_ih", "w_hh", "b_ih", "b_hh")]
)
@pytest.mark.parametrize("cell", oracle.CELLS)
def test_only_the_gradients_asked_for(cell: str, wanted: tuple[str, ...]) -> None:
    """Autograd asks the kernel for exactly what requires a gradient, and each is right."""
    case = Case(cell, 3, 5, 5, 17, torch.float64)
    problem, ref, _ = cases.solved(case)
    leaves, args = cases.op_inputs(problem, grad=False)
    for name in wanted:
        leaves[name].requires_grad_()
    with Recorder() as recorder:
        out = torch.ops.rnnfast.forward(*args, None, oracle.CELL_IDS[cell], False, True)
        outputs = {"y": out[0], "h_n": out[1]} | ({"c_n": out[2][0]} if cell == "lstm" else {})
        chosen = {name: leaves[name] for name in wanted}
        grads = cases._gradients(problem, chosen, outputs)
    assert recorder.needs == [sum(NEEDS[name] for name in wanted)]
    for name, grad in grads.items():
        tolerance.check_tensor(name, grad, None, ref[name], torch.float64)


@pytest.mark.parametrize("case", [c for c in cases.small_cases() if c.state], ids=str)
def test_backward_op_fills_only_what_is_needed(case: Case) -> None:
    """Each bit of ``needs`` by itself: that gradient as in the full run, everything else empty."""
    problem, ref, peer = cases.solved(case)
    leaves, args = cases.op_inputs(problem, grad=False)
    cell = oracle.CELL_IDS[case.cell]
    y, _, _, saved = torch.ops.rnnfast.forward(*args, None, cell, case.reverse, True)
    given = cases._pack_cotangents(problem).cotangents
    dc_n = given["c_n"][None] if "c_n" in given else None
    order = list(NEEDS)
    for name in leaves:
        grads = torch.ops.rnnfast.backward(
            given["y"], given["h_n"], dc_n, *args, y, saved, cell, case.reverse, NEEDS[name]
        )
        for other, grad in zip(order, grads, strict=True):
            if other == name:
                shaped = grad.reshape(ref[f"d{name}"].shape)
                tolerance.check_tensor(f"d{name}", shaped, peer, ref[f"d{name}"], case.dtype)
            else:
                assert grad.shape == (0,), f"{other} came back though only {name} was needed"


def test_state_gradients_without_a_state() -> None:
    """dh0 and dc0 come back whole even where the state was left out."""
    with_state = Case("lstm", 3, 5, 5, 17, torch.float64)
    problem = cases.build(with_state)
    zeros = {k: torch.zeros_like(problem.inputs[k]) for k in ("h0", "c0")}  # type: ignore[arg-type]
    ref = cases.run_oracle(
        cases.Problem(with_state, {**problem.inputs, **zeros}, problem.cotangents)
    )
    _, args = cases.op_inputs(problem, grad=False)
    args[1] = args[2] = None
    y, _, _, saved = torch.ops.rnnfast.forward(*args, None, 0, False, True)
    given = problem.cotangents
    grads = torch.ops.rnnfast.backward(
        given["y"], given["h_n"], given["c_n"][None], *args, y, saved, 0, False, 2 | 4
    )
    tolerance.check_tensor("dh0", grads[1], None, ref["dh0"], torch.float64)
    tolerance.check_tensor("dc0", grads[2][0], None, ref["dc0"], torch.float64)


GRADIENT_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "stride 0": lambda g: g[..., :1].expand_as(g),
    "one number": lambda g: g.new_tensor(0.7).expand_as(g),
    "transposed": lambda g: g.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda g: torch.stack([g, torch.full_like(g, float("nan"))], -1)[..., 0],
    "inside": lambda g: torch.nn.functional.pad(g, (1, 2), value=float("nan"))[..., 1:-2],
}


@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
@pytest.mark.parametrize("cell", oracle.CELLS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_layout_of_incoming_gradients(cell: str, layout: str, packed: bool) -> None:
    case = Case(cell, 3, 5, 5, 17, torch.float64, packed=packed)
    problem = cases.build(case)
    change = GRADIENT_LAYOUTS[layout]
    plain = {k: change(v).contiguous() for k, v in problem.cotangents.items()}
    ref = cases.run_oracle(cases.Problem(case, problem.inputs, plain))
    leaves, args = cases.op_inputs(problem)
    out = torch.ops.rnnfast.forward(*args, None, oracle.CELL_IDS[cell], False, True)
    outputs = [out[0], out[1]] + ([out[2][0]] if cell == "lstm" else [])
    given = cases._pack_cotangents(cases.Problem(case, problem.inputs, plain)).cotangents
    views = [change(v) for v in given.values()]
    for view, value in zip(views, given.values(), strict=True):
        assert torch.equal(view, value) and view.stride() != value.stride()
    grads = torch.autograd.grad(outputs, list(leaves.values()), views)
    for name, grad in zip(leaves, grads, strict=True):
        tolerance.check_tensor(f"d{name}", grad, None, ref[f"d{name}"], torch.float64)


def test_sum_backward_through_the_layer() -> None:
    """y.sum().backward() hands the kernel a gradient of stride 0."""
    torch.manual_seed(1)
    theirs = torch.nn.LSTM(5, 9, 2, bidirectional=True, dtype=torch.float64)
    ours = rnnfast.LSTM(5, 9, 2, bidirectional=True, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    ours(x)[0].sum().backward()
    theirs(x)[0].sum().backward()
    for (name, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_backward_twice_and_accumulation() -> None:
    """retain_graph gives the same gradient again; .grad accumulates; nothing is overwritten."""
    layer = rnnfast.GRU(5, 9)
    x = torch.randn(4, 3, 5, requires_grad=True)
    loss = layer(x)[0].square().sum()
    first = torch.autograd.grad(loss, [x, *layer.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *layer.parameters()], retain_graph=True)
    for a, b in zip(first, second, strict=True):
        assert tolerance.same_bits(a, b)
    loss.backward()
    layer(x)[0].square().sum().backward()
    torch.testing.assert_close(layer.weight_hh_l0.grad, 2 * first[2])


def test_modified_input_is_noticed() -> None:
    """Backward after an in-place change of what it needs raises, as for every torch op."""
    layer = rnnfast.LSTM(5, 9)
    y, _ = layer(torch.randn(4, 3, 5))
    with torch.no_grad():
        layer.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


OPCHECK_CASES = [
    case
    for cell in oracle.CELLS
    for case in (
        Case(cell, 3, 2, 5, 9, torch.float32),
        Case(cell, 1, 1, 5, 8, torch.float64, bias=False, state=False, reverse=True),
        Case(cell, 3, 4, 5, 9, torch.float64, packed=True),
    )
] + [
    Case("lstm", 3, 4, 5, 9, torch.float32, proj=4),
    Case("lstm", 2, 0, 5, 9, torch.float32),
    Case("gru", 3, 4, 5, 9, torch.float32, layout="strided"),
    Case("lstm", 3, 4, 5, 9, torch.float32, layout="batch_first"),
]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "nograd"])
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_opcheck_forward(case: Case, grad: bool) -> None:
    _, args = cases.op_inputs(cases.build(case), grad=grad)
    cell = oracle.CELL_IDS[case.cell]
    torch.library.opcheck(
        torch.ops.rnnfast.forward.default, (*args, None, cell, case.reverse, grad)
    )


@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_opcheck_backward(case: Case) -> None:
    problem = cases.build(case)
    leaves, args = cases.op_inputs(problem, grad=False)
    cell = oracle.CELL_IDS[case.cell]
    y, _, _, saved = torch.ops.rnnfast.forward(*args, None, cell, case.reverse, True)
    given = cases._pack_cotangents(problem).cotangents
    dc_n = given["c_n"][None] if "c_n" in given else None
    needs = sum(NEEDS[name] for name in leaves)
    for mask in (needs, 1, 16):
        torch.library.opcheck(
            torch.ops.rnnfast.backward.default,
            (given["y"], given["h_n"], dc_n, *args, y, saved, cell, case.reverse, mask),
        )


@pytest.mark.parametrize("projected", [False, True])
def test_opcheck_pack(projected: bool) -> None:
    w_hr = torch.randn(4, 9) if projected else None
    w_hh = torch.randn(36, 4 if projected else 9)
    torch.library.opcheck(torch.ops.rnnfast.pack.default, (torch.randn(36, 5), w_hh, w_hr, 0))
