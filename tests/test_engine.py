"""The CPU engine against the float64 oracle: every cell, dtype and option, both passes."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import Any

import cases
import oracle
import pytest
import tolerance
import torch
from cases import Case

import rnnfast

ENGINE_CASES = cases.engine_cases()
KERNELS = (None, "packed", "direct")
SPLITS: Counter[str] = Counter()


def run(case: Case, kernel: str | None = None) -> None:
    problem, ref, peer = cases.solved(case)
    torch.set_num_threads(case.threads)
    with rnnfast.use_engine("cpu", kernel=kernel):  # a split may be in force, too
        ours = cases.run_rnnfast(problem)
        proof = rnnfast.last_run()
    if case.batch:  # an empty one runs nothing that could be reported
        assert proof["engine"] == "cpu"
        assert proof["threads"] <= case.threads
        SPLITS[proof["split"]] += 1
    tolerance.check(ours, peer, ref, case.dtype)


@pytest.mark.parametrize("case", ENGINE_CASES, ids=str)
def test_engine(case: Case) -> None:
    run(case)


@pytest.mark.parametrize("kernel", KERNELS[1:])
@pytest.mark.parametrize("case", ENGINE_CASES[::3], ids=str)
def test_engine_with_the_kernel_forced(case: Case, kernel: str) -> None:
    run(case, kernel)


SPLIT_CASES = [c for c in ENGINE_CASES if c.threads > 1 and c.batch][::3]


@pytest.mark.parametrize("split", ["serial", "batch", "units"])
@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_engine_with_the_split_forced(case: Case, split: str) -> None:
    with rnnfast.use_engine("cpu", split=split):
        run(case)
        proof = rnnfast.last_run()
    # a batch of one, or one panel, can't be divided; a busy machine may give one thread only
    assert proof["split"] in (split, "serial")


def test_the_split_that_was_forced_is_taken() -> None:
    case = Case("lstm", 4, 9, 16, 200, threads=2)
    for split in ("serial", "batch", "units"):
        with rnnfast.use_engine("cpu", split=split):
            for _ in range(200):  # a busy machine may give one thread only, for a while
                run(case)
                if rnnfast.last_run()["split"] == split:
                    break
                time.sleep(0.02)
            else:
                raise AssertionError(f"{split} was never taken")


@pytest.mark.alone  # teams that stay on one thread prove nothing here
# a chunk of backward has 512 rows
@pytest.mark.parametrize(("steps", "threads"), [(1, 2), (1, 4), (2, 4), (513, 2), (513, 4)])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN", "IndRNN", "SLSTM"])
def test_fewer_rows_than_threads(cell: str, steps: int, threads: int) -> None:
    """A chunk that leaves some threads without a row of dx, for panels of x of every width."""
    for inputs in (1, 9, 20, 24, 32, 40, 50, 64):
        layer = getattr(rnnfast, cell)(inputs, 200)
        x = torch.randn(steps, 1, inputs, requires_grad=True)

        found: list[tuple[torch.Tensor, ...]] = []

        def run(layer: Any = layer, x: torch.Tensor = x, found: list[Any] = found) -> None:
            found.append(torch.autograd.grad(layer(x)[0].sum(), [x, *layer.parameters()]))

        run()
        torch.set_num_threads(threads)
        assert cases.is_taken("units", run)
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(found[0], found[-1], strict=True)), inputs


def test_every_split_was_taken() -> None:
    """Runs after the cases above; alone it has nothing to look at and fills in the large ones."""
    if len(SPLITS) < 3:
        for case in ENGINE_CASES:
            if case.hidden >= 300:
                run(case)
        run(Case("lstm", 3, 1, 5, 3, threads=1))
        run(Case("lstm", 7, 33, 40, 130, threads=2))
    assert set(SPLITS) == {"serial", "batch", "units"}, SPLITS


def test_luck_is_called_upon_rarely() -> None:
    """Nearly every tensor meets the rule at torch.nn's first draw; the rest are chance."""
    if tolerance.VERDICTS["tensors"] < 500:
        for case in ENGINE_CASES[::2]:
            run(case)
    assert tolerance.VERDICTS["asked again"] <= 0.02 * tolerance.VERDICTS["tensors"], (
        tolerance.VERDICTS
    )


@pytest.mark.parametrize("case", ENGINE_CASES[1::3], ids=str)
def test_reference_engine(case: Case) -> None:
    """rnnfast.reference, which serves vmap, jvp and double backward, is held to the same oracle."""
    if case.layout != "contiguous":
        case = replace(case, layout="contiguous")
    problem, ref, _ = cases.solved(case)
    inputs = {k: None if v is None else v.detach().double() for k, v in problem.inputs.items()}
    problem = cases.Problem(case, inputs, problem.cotangents)
    leaves, _ = cases.op_inputs(problem)
    with rnnfast.use_engine("reference"):
        outputs = functional_outputs(case, leaves)
    ours = {k: v.detach() for k, v in outputs.items()}
    ours |= cases._gradients(cases._pack_cotangents(problem), leaves, outputs)
    tolerance.check(ours, None, ref, torch.float64)


@pytest.mark.parametrize("case", [c for c in ENGINE_CASES if not c.reverse][::3], ids=str)
def test_functional(case: Case) -> None:
    """rnnfast.functional over the same kernels gives the same numbers as the op."""
    problem, ref, peer = cases.solved(case)
    torch.set_num_threads(case.threads)
    leaves, _ = cases.op_inputs(problem)
    outputs = functional_outputs(case, leaves)
    ours = {k: v.detach() for k, v in outputs.items()}
    ours |= cases._gradients(cases._pack_cotangents(problem), leaves, outputs)
    tolerance.check(ours, peer, ref, case.dtype)


def functional_outputs(case: Case, leaves: cases.Tensors) -> cases.Tensors:
    """A case through the public functional interface; a reversed one as half of two directions."""
    weights = [leaves[k] for k in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr") if k in leaves]
    ways = 2 if case.reverse else 1
    flat = [w.detach() for w in weights] * (ways - 1) + weights
    x = leaves["x"]
    lengths = case.lengths
    if lengths is not None:
        sizes = torch.tensor(oracle.batch_sizes_of(lengths))
        x = torch.nn.utils.rnn.PackedSequence(x, sizes)
    hx = None
    if case.state:
        states = [torch.stack([leaves[s]] * ways) for s in ("h0", "c0") if s in leaves]
        hx = tuple(states) if case.cell == "lstm" else states[0]
    y, state = getattr(rnnfast.functional, case.cell)(
        x, hx, flat, bias=case.bias, bidirectional=ways == 2
    )
    if lengths is not None:
        y = y.data
    out = case.proj or case.hidden
    h_n, c_n = state if case.cell == "lstm" else (state, None)
    outputs = {"y": y[..., -out:], "h_n": h_n[-1]}
    if c_n is not None:
        outputs["c_n"] = c_n[-1]
    return outputs


def test_cells_against_the_oracle() -> None:
    """The functions of one step: every cell, both dtypes, with and without bias."""
    for dtype in cases.DTYPES:
        for cell in oracle.TORCH_CELLS:
            for bias in (True, False):
                for batch in (1, 7):
                    check_cell(Case(cell, 1, batch, 16, 33, dtype, bias=bias))


def check_cell(case: Case) -> None:
    problem, ref, peer = cases.solved(case)
    leaves, _ = cases.op_inputs(problem)
    weights = [leaves.get(k) for k in ("w_ih", "w_hh", "b_ih", "b_hh")]
    if case.cell == "lstm":
        hx = (leaves["h0"], leaves["c0"])
        h, c = rnnfast.functional.lstm_cell(leaves["x"][0], hx, *weights)
        outputs = {"y": h[None], "h_n": h, "c_n": c}
    else:
        function = getattr(rnnfast.functional, f"{case.cell}_cell")
        h = function(leaves["x"][0], leaves["h0"], *weights)
        outputs = {"y": h[None], "h_n": h}
    ours = {k: v.detach() for k, v in outputs.items()}
    ours |= cases._gradients(problem, leaves, outputs)
    tolerance.check(ours, peer, ref, case.dtype)
