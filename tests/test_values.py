"""NaN and infinity flow through as in torch; inputs stay as they are, marked views included."""

from __future__ import annotations

import cases
import oracle
import pytest
import tolerance
import torch
from cases import Case
from test_op_errors import good_arguments
from torch import Tensor

import rnnfast

f64 = torch.float64


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("kernel", ["packed", "direct"])
@pytest.mark.parametrize("hidden", [1, 9, 33])
@pytest.mark.parametrize("cell", oracle.CELLS)
def test_nan_flows_through(cell: str, hidden: int, kernel: str) -> None:
    """NaN in one step of one sequence spoils that sequence from there on, and no other."""
    for dtype in cases.DTYPES:
        case = Case(cell, 5, 7, 5, hidden, dtype)
        problem = cases.build(case)
        _, args = cases.op_inputs(problem, grad=False)
        args[0] = args[0].clone()
        args[0][2, 3, 1] = float("nan")
        with rnnfast.use_engine("cpu", kernel=kernel):
            y, h_n, c_n, _ = torch.ops.rnnfast.forward(
                *args, None, oracle.CELL_IDS[cell], False, True
            )
        want = torch.zeros(5, 7, dtype=torch.bool)
        want[2:, 3] = True
        assert torch.equal(y.isnan(), want[..., None].expand_as(y))
        assert torch.equal(h_n.isnan().all(1), want[-1]) and torch.equal(
            h_n.isnan().any(1), want[-1]
        )
        if cell == "lstm":
            assert torch.equal(c_n[0].isnan().all(1), want[-1])


@pytest.mark.parametrize("name", ["h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr"])
def test_nan_in_every_operand_is_seen(name: str) -> None:
    case = Case("lstm", 3, 5, 5, 17, proj=4 if name == "w_hr" else 0)
    problem = cases.build(case)
    value = problem.inputs[name]
    assert value is not None
    value.view(-1)[3] = float("nan")
    ours, ref = cases.run_rnnfast(problem), cases.run_oracle(problem)
    for key in ref:
        assert torch.equal(ours[key].isnan(), ref[key].isnan()), key
    assert ours["y"].isnan().any()


@pytest.mark.parametrize("cell", oracle.CELLS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["f32", "f64"])
def test_infinite_and_huge_numbers(cell: str, dtype: torch.dtype) -> None:
    """Saturated gates as torch has them: no NaN out of infinity where torch has none."""
    case = Case(cell, 3, 8, 1, 17, dtype, state=False)
    problem = cases.build(case)
    x = problem.inputs["x"]
    assert x is not None
    big = torch.finfo(dtype).max
    column = [float("inf"), -float("inf"), big, -big, 1e4, -1e4, 1e-40, 88.8]
    x[0, :, 0] = torch.tensor(column, dtype=dtype)
    _, args = cases.op_inputs(problem, grad=False)
    y = torch.ops.rnnfast.forward(*args, None, oracle.CELL_IDS[cell], False, False)[0]
    # the same dtype, since a product of huge numbers overflows in float32 only
    want = cases.run_oracle(problem, dtype)["y"]
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("case", cases.small_cases(), ids=str)
def test_a_successful_call_changes_no_input(case: Case) -> None:
    problem, _, _ = cases.solved(case)
    leaves, args = cases.op_inputs(problem)
    kept = cases.clones(list(leaves.values()))
    given = cases._pack_cotangents(problem)
    given_kept = cases.clones(list(given.cotangents.values()))
    out = torch.ops.rnnfast.forward(*args, None, oracle.CELL_IDS[case.cell], case.reverse, True)
    outputs = {"y": out[0], "h_n": out[1]} | ({"c_n": out[2][0]} if case.cell == "lstm" else {})
    outputs_kept = cases.clones([*outputs.values(), out[3]])
    cases._gradients(given, leaves, outputs)
    for a, b in zip(leaves.values(), kept, strict=True):
        assert tolerance.same_bits(a.detach(), b) and a._version == 0
    for a, b in zip(given.cotangents.values(), given_kept, strict=True):
        assert tolerance.same_bits(a, b)
    for a, b in zip([*outputs.values(), out[3]], outputs_kept, strict=True):
        assert tolerance.same_bits(a.detach(), b), "backward changed what forward made"


def test_negated_and_conjugated_views_are_read_as_what_they_mean() -> None:
    """torch marks some views 'negated when read'; a kernel that ignores it is silently wrong."""
    z = torch.complex(rand(4, 3, 5), rand(4, 3, 5))
    negated = z.conj().imag
    assert negated.is_neg()
    good = good_arguments("lstm")
    got = torch.ops.rnnfast.forward(*(good | {"x": negated}).values())
    want = torch.ops.rnnfast.forward(*(good | {"x": negated.resolve_neg().clone()}).values())
    assert tolerance.same_bits(got[0], want[0])
