"""The same call gives the same bits; a sequence cut in two gives the bits of the whole."""

from __future__ import annotations

from dataclasses import replace

import cases
import oracle
import pytest
import tolerance
import torch
from cases import Case

import rnnfast

CASES = [
    *cases.small_cases(),
    Case("lstm", 5, 9, 16, 320, threads=2),
    Case("gru", 5, 2, 16, 384, threads=2),
    Case("rnn_tanh", 40, 33, 40, 130, threads=2),
    Case("indrnn_relu", 40, 13, 40, 130, threads=2),
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernel", [None, "packed", "direct"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_runs_are_equal_bit_for_bit(case: Case, kernel: str | None, threads: int) -> None:
    problem, _, _ = cases.solved(case)
    torch.set_num_threads(threads)
    with rnnfast.use_engine("cpu", kernel=kernel):
        first = cases.run_rnnfast(problem)
        # other work in between, so that scratch memory is not what the first run left
        cases.run_rnnfast(cases.solved(Case("lstm", 3, 13, 7, 77, case.dtype))[0])
        second = cases.run_rnnfast(problem)
    for name in first:
        assert tolerance.same_bits(first[name], second[name]), name


CUTS = [
    Case(cell, seq_len, batch, 16, hidden, dtype)
    for cell in oracle.CELLS
    for seq_len, batch, hidden, dtype in (
        (2, 1, 17, torch.float32),
        (7, 6, 33, torch.float32),
        (40, 13, 64, torch.float64),
        (7, 5, 130, torch.float64),
    )
] + [
    Case("lstm", 7, 7, 5, 33, proj=9),
    Case("lstm", 6, 9, 16, 320),
    Case("gru", 6, 2, 16, 384),
    Case("rnn_relu", 6, 1, 16, 640),
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernel", ["packed", "direct"])
@pytest.mark.parametrize("case", CUTS, ids=str)
def test_a_sequence_cut_in_two(case: Case, kernel: str, threads: int) -> None:
    """With the kernel forced, streaming gives what the whole sequence gives, to the bit."""
    problem, _, _ = cases.solved(case)
    _, args = cases.op_inputs(problem, grad=False)
    x, h0, c0, *weights = args
    cell = oracle.CELL_IDS[case.cell]
    torch.set_num_threads(threads)

    def forward(part: torch.Tensor, h: torch.Tensor, c: torch.Tensor | None):  # type: ignore[no-untyped-def]
        return torch.ops.rnnfast.forward(part, h, c, *weights, None, cell, False, False)[:3]

    with rnnfast.use_engine("cpu", kernel=kernel):
        y, h_n, c_n = forward(x, h0, c0)
        for cut in {1, case.seq_len // 2, case.seq_len - 1}:
            y1, h, c = forward(x[:cut], h0, c0)
            y2, h, c = forward(x[cut:], h, c if case.cell == "lstm" else None)
            assert tolerance.same_bits(torch.cat([y1, y2]), y), f"y, cut at {cut}"
            assert tolerance.same_bits(h, h_n) and tolerance.same_bits(c, c_n), (
                f"state, cut at {cut}"
            )


@pytest.mark.parametrize("cell", oracle.CELLS)
def test_layer_streamed_step_by_step(cell: str) -> None:
    """The same through the layer, one step at a time over two layers."""
    kind, *rest = cell.split("_")
    options = {"nonlinearity": rest[0]} if rest else {}
    classes = {
        "lstm": rnnfast.LSTM,
        "gru": rnnfast.GRU,
        "rnn": rnnfast.RNN,
        "indrnn": rnnfast.IndRNN,
    }
    layer = classes[kind](5, 17, num_layers=2, **options)
    x = torch.randn(9, 4, 5)
    for kernel in ("packed", "direct"):
        with rnnfast.use_engine("cpu", kernel=kernel), torch.no_grad():
            want, last = layer(x)
            state, steps = None, []
            for t in range(9):
                y, state = layer(x[t : t + 1], state)
                steps.append(y)
        assert tolerance.same_bits(torch.cat(steps), want)
        for a, b in zip(
            state if cell == "lstm" else [state], last if cell == "lstm" else [last], strict=True
        ):
            assert tolerance.same_bits(a, b)


@pytest.mark.parametrize("case", cases.small_cases()[::2], ids=str)
def test_saving_for_backward_changes_no_bit(case: Case) -> None:
    problem, _, _ = cases.solved(case)
    _, args = cases.op_inputs(problem, grad=False)
    for kernel in ("packed", "direct"):
        with rnnfast.use_engine("cpu", kernel=kernel):
            kept, dropped = (
                torch.ops.rnnfast.forward(
                    *args, None, oracle.CELL_IDS[case.cell], case.reverse, save
                )
                for save in (True, False)
            )
        assert dropped[3].shape == (0,)
        for a, b in zip(kept[:3], dropped[:3], strict=True):
            assert tolerance.same_bits(a, b)


@pytest.mark.parametrize("case", [c for c in cases.small_cases() if not c.packed], ids=str)
def test_a_batch_computed_as_packed(case: Case) -> None:
    """Equal lengths, packed or padded, are the same rows in the same order."""
    problem, ref, peer = cases.solved(case)
    even = cases.run_rnnfast(problem)
    leaves, args = cases.op_inputs(problem)
    rows = leaves["x"].detach().reshape(-1, case.input_size).requires_grad_()
    sizes = torch.full((case.seq_len,), case.batch)
    y, h_n, _, _ = torch.ops.rnnfast.forward(
        rows, *args[1:8], sizes, None, None, oracle.CELL_IDS[case.cell], case.reverse, True
    )
    tolerance.check_tensor("y", y.detach().view_as(even["y"]), peer, ref["y"], case.dtype)
    tolerance.check_tensor("h_n", h_n.detach(), peer, ref["h_n"], case.dtype)


def test_threads_change_no_more_than_rounding() -> None:
    case = replace(CASES[-2], dtype=torch.float64)
    problem, ref, _ = cases.solved(case)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        tolerance.check(cases.run_rnnfast(problem), None, ref, case.dtype)
