"""Every peer computes the same as torch.nn, and the harness keeps its promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rnnfast")

from bench import __main__ as command_line
from bench import compare, shapes, table
from bench.peers import CantRun, Peer, Rnnfast, RnnfastFrozen, peer_classes
from bench.problem import Problem, difference
from bench.shapes import Shape

FIELDS = {
    *("shape", "device", "versions", "commit", "cell", "mode", "dtype", "T", "B", "I", "H"),
    *("layers", "bidirectional", "packed", "frozen", "ours_ms", "peers", "limit_ms", "engine"),
    *("spread", "noisy"),
}
KINDS: dict[str, type[Peer]] = {
    **peer_classes(),
    Rnnfast.name: Rnnfast,
    RnnfastFrozen.name: RnnfastFrozen,
}
CASES = [
    *shapes.SMOKE,
    Shape("gru", "streaming", 1, 3, 33),
    Shape("rnn", "streaming", 1, 1, 16),
    Shape("lstm", "inference", 7, 3, 20, I=12, layers=2, bidirectional=True),
    Shape("gru", "inference", 7, 3, 20, bidirectional=True),
    Shape("rnn", "inference", 7, 5, 20, packed=True),
    Shape("gru", "training", 7, 5, 20, packed=True),
    Shape("indrnn", "inference", 7, 3, 20, layers=2),
    Shape("lstm", "streaming", 1, 3, 33, dtype="bfloat16"),
    Shape("gru", "inference", 7, 3, 20, packed=True, dtype="bfloat16"),
    Shape("rnn", "training", 7, 3, 20, dtype="bfloat16"),
    Shape("lstm", "streaming", 1, 3, 33, dtype="int8"),
    Shape("lstm", "inference", 7, 5, 20, bidirectional=True, dtype="int8"),
    Shape("gru", "inference", 7, 3, 20, layers=2, dtype="int8"),
]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", CASES, ids=lambda shape: shape.name)
def test_results_agree_with_torch(shape: Shape, kind: type[Peer]) -> None:
    problem = Problem(shape)
    exact = Problem(replace(shape, dtype="float32"))
    baseline = KINDS["torch loop" if shape.cell == "indrnn" else "torch.nn"](exact, 1)
    try:
        peer = kind(problem, 1)
    except CantRun as reason:
        pytest.skip(str(reason))
    fault = difference(peer.results(), baseline.results(), shape.dtype)
    assert fault is None, fault


def test_fewer_bits_have_peers() -> None:
    """Who can run what: nobody is left out of these without a word."""
    able = {
        (shape.cell, shape.dtype, name)
        for shape in CASES
        for name, kind in KINDS.items()
        if shape.dtype in kind.dtypes and shape.cell in kind.cells and shape.mode in kind.modes
    }
    assert ("lstm", "int8", "onnxruntime int8") in able and ("gru", "int8", "torch int8") in able
    assert ("gru", "int8", "onnxruntime float32") in able
    assert ("gru", "bfloat16", "torch.nn") in able
    assert ("gru", "bfloat16", "rnnfast float32") in able


def test_a_wrong_result_is_told() -> None:
    right = {"y": np.ones((2, 3), np.float32), "dx": np.ones(3, np.float32)}
    assert difference({**right}, right) is None
    assert "y is off" in str(difference({**right, "y": right["y"] + 1e-3}, right))
    assert "y is off" in str(difference({**right, "y": right["y"] * np.nan}, right))
    assert "no gradient dx" in str(difference({"y": right["y"]}, right))
    assert "has shape" in str(difference({**right, "dx": np.ones(4, np.float32)}, right))


def test_flops_and_bytes() -> None:
    lstm = Shape("lstm", "inference", 100, 1, 512)
    assert lstm.flops() == 2 * 100 * 4 * 512 * 1024
    assert lstm.weight_bytes() == 4 * 4 * 512 * 1024
    assert lstm.read_bytes() == 4 * 4 * 512 * 512 * 101
    for dtype, share in (("bfloat16", 2), ("int8", 4)):
        fewer = replace(lstm, dtype=dtype)
        assert fewer.flops() == lstm.flops()
        assert share * fewer.weight_bytes() == lstm.weight_bytes()
        assert share * fewer.read_bytes() == lstm.read_bytes()
    assert Shape("lstm", "training", 100, 1, 512).flops() == 3 * lstm.flops()
    deep = Shape("gru", "inference", 10, 4, 8, I=5, layers=2, bidirectional=True)
    assert deep.flops() == 2 * 40 * 3 * 8 * 2 * ((5 + 8) + (16 + 8))
    packed = Shape("lstm", "inference", 10, 3, 8, packed=True)
    assert packed.lengths() == [10, 7, 5]
    assert packed.flops() == 2 * 22 * 4 * 8 * 16


def test_the_grid() -> None:
    grid = shapes.every()
    names = [shape.name for shape in grid]
    assert len(set(names)) == len(names)
    assert {shape.T for shape in grid} >= {1, 2000}
    assert {shape.B for shape in grid} >= {1, 128}
    assert {shape.H for shape in grid} >= {32, 1024}
    assert set(shapes.README) <= set(grid)
    assert shapes.select(["lstm-streaming-*-H512"])
    with pytest.raises(ValueError, match="no set or shape"):
        shapes.select(["lstm-nothing"])


class Calls:
    """A contestant that takes no time and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def test_every_round_has_everyone_once() -> None:
    entries = [compare.Entry(name, Calls()) for name in "abc"]
    plan = compare.Plan(budget=0.0, fewest=2, most=4)
    compare.race(entries, plan, 4, [])
    assert [len(entry.samples) for entry in entries] == [4, 4, 4]


def test_ours_disagreeing_with_itself_is_noisy() -> None:
    one, other = compare.Entry("a", Calls()), compare.Entry("b", Calls())
    one.samples, other.samples = [1.0, 1.0, 1.0], [1.0, 1.2, 1.2]
    assert compare.disagreement(one, other) > compare.AGREEMENT


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A real run of the smallest shapes, as it is written to disk."""
    path = tmp_path_factory.mktemp("bench") / "out.json"
    plan = compare.Plan(budget=0.0, fewest=2, most=2, limits_budget=0.02)
    comparison = compare.Comparison(1, plan, rounds=2)
    chosen = [
        Shape("gru", "inference", 5, 2, 16),
        Shape("lstm", "training", 5, 2, 16),
        Shape("lstm", "streaming", 1, 1, 16),
    ]
    compare.compare(comparison, chosen, path, "pytest")
    assert not comparison.wrong
    return table.load(path), path


def test_the_file(results: tuple[dict[str, Any], Path]) -> None:
    header, rows = results[0]["header"], results[0]["rows"]
    assert all(set(row) == FIELDS for row in rows)
    keys = {"versions", "commit", "device", "cpu", "threads", "date", "command", "limits"}
    assert set(header) >= keys
    for row in rows:
        assert row["limit_ms"] > 0 and row["ours_ms"] > 0
        prepacked = {"onnxruntime", "openvino"} & row["peers"].keys()
        assert not prepacked or row["frozen"]
    assert header["left_out"]["torch.nn cell"] == {"no inference": 1, "no training": 1}


def test_table_and_plots(
    results: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = results[1]
    assert command_line.main(["table", str(path)]) == 0
    assert "gru T5 B2 H16" in capsys.readouterr().out
    assert command_line.main(["table", "--markdown", str(path)]) == 0
    assert "| gru T5 B2 H16" in capsys.readouterr().out
    assert command_line.main(["plot", str(path)]) == 0
    pictures = capsys.readouterr().out.split()
    assert len(pictures) == 2
    assert all(Path(picture).stat().st_size > 10_000 for picture in pictures)


def test_a_wrong_word_gives_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["compare", "--shapes", "nothing"]) == 2
    assert "python -m bench list" in capsys.readouterr().err
    assert command_line.main(["compare", "--threads", "99999"]) == 2
    assert "--threads must be at most" in capsys.readouterr().err
