"""The oracle equals torch.nn in float64; the cases cover what they promise; the rule can fail."""

from __future__ import annotations

import itertools

import cases
import oracle
import pytest
import tolerance
import torch
from cases import Case

ENGINE_CASES = cases.engine_cases()


@pytest.mark.parametrize(
    "case", [c for c in ENGINE_CASES if c.cell in oracle.TORCH_CELLS][::3], ids=str
)
def test_oracle_equals_torch_in_float64(case: Case) -> None:
    problem = cases.build(case)
    peer = cases.run_torch(problem, torch.float64)
    assert peer is not None
    tolerance.check(peer, None, cases.run_oracle(problem), torch.float64)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", oracle.TORCH_CELLS)
def test_stacked_oracle_equals_torch_in_float64(cell: str, bidirectional: bool) -> None:
    torch.manual_seed(0)
    kind, *rest = cell.split("_")
    options = {"nonlinearity": rest[0]} if rest else {}
    module = getattr(torch.nn, kind.upper())(
        5, 7, num_layers=3, bidirectional=bidirectional, dtype=torch.float64, **options
    )
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    want, state = module(x)
    y, h_n, c_n = oracle.stack(
        cell, x, None, module._flat_weights, num_layers=3, bidirectional=bidirectional
    )
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-14)
    states = state if cell == "lstm" else (state,)
    for got, expected in zip((h_n, c_n), states, strict=False):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_indrnn_is_a_diagonal_rnn(activation: str) -> None:
    """IndRNN is torch's RNN whose recurrent matrix is diag(u): gradients too."""
    case = Case(f"indrnn_{activation}", 7, 5, 5, 17, torch.float64)
    problem = cases.build(case)
    ref = cases.run_oracle(problem)
    u = problem.inputs["w_hh"]
    assert u is not None
    dense = cases.Problem(
        Case(f"rnn_{activation}", 7, 5, 5, 17, torch.float64),
        {**problem.inputs, "w_hh": torch.diag(u)},
        problem.cotangents,
    )
    peer = cases.run_torch(dense)
    assert peer is not None
    peer["dw_hh"] = peer["dw_hh"].diagonal()
    tolerance.check(peer, None, ref, torch.float64)


def test_cases_cover_every_size_and_every_pair() -> None:
    fields = ("cell", "seq_len", "batch", "input_size", "hidden", "dtype", "threads", "loss")
    sizes = {
        "cell": oracle.CELLS,
        "seq_len": cases.SEQ_LENS,
        "batch": cases.BATCHES,
        "input_size": cases.INPUTS,
        "hidden": cases.HIDDEN,
        "dtype": cases.DTYPES,
        "threads": (1, 2),
        "loss": cases.LOSSES,
    }
    for a, b in itertools.combinations(fields, 2):
        seen = {(getattr(c, a), getattr(c, b)) for c in ENGINE_CASES}
        missing = set(itertools.product(sizes[a], sizes[b])) - seen
        assert not missing, f"{a} x {b}: {missing}"
    for cell in oracle.CELLS:
        mine = [c for c in ENGINE_CASES if c.cell == cell]
        assert {c.packed for c in mine} == {c.reverse for c in mine} == {True, False}
        assert {c.layout for c in mine} == set(cases.LAYOUTS)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["f32", "f64"])
@pytest.mark.parametrize(
    "name", ["y", "h_n", "c_n", "dx", "dh0", "dc0", "dw_ih", "dw_hh", "db_ih", "db_hh"]
)
def test_the_rule_rejects_a_small_error_in_any_tensor(name: str, dtype: torch.dtype) -> None:
    """An error of 2e-5 of the largest value of one element must not pass, nor may NaN."""
    problem, ref, peer = cases.solved(Case("lstm", 7, 5, 16, 33, dtype))
    good = cases.run_torch(problem)
    assert good is not None
    tolerance.check(good, peer, ref, dtype)
    for wrong in (2e-5 * tolerance.biggest(ref[name]), float("nan")):
        bad = {k: v.clone() for k, v in good.items()}
        bad[name].view(-1)[1] += wrong
        with pytest.raises(AssertionError, match=name):
            tolerance.check(bad, peer, ref, dtype)
