"""The model of many cores counts what the kernels do, and the document has what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import __main__ as command_line
from bench import model
from bench.shapes import Shape

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/performance.md"
MACHINE = model.Machine()


def test_the_document_has_the_tables_of_today(tmp_path: Path) -> None:
    copy = tmp_path / "performance.md"
    copy.write_text(DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    assert command_line.main(["model", "--threads", "8", "32", "128", "--write", str(copy)]) == 0
    assert copy.read_text(encoding="utf-8") == DOCUMENT.read_text(encoding="utf-8"), (
        "write them anew: python -m bench model --write docs/performance.md"
    )


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("gemm.h", "kMaxVectors", model.PANEL_VECTORS),
        ("../core/choose_engine.h", "kForwardChunkRows", model.FORWARD_CHUNK),
        ("../core/choose_engine.h", "kBackwardChunkRows", model.BACKWARD_CHUNK),
    ],
)
def test_constants_are_those_of_the_kernels(file: str, name: str, value: int) -> None:
    found = re.search(rf"\b{name} = (\d+);", (ROOT / "csrc/cpu" / file).read_text(encoding="utf-8"))
    assert found and int(found[1]) == value


def test_one_worker_is_bound_by_operations_where_rows_are_many() -> None:
    shape = Shape("lstm", "inference", 100, 64, 512)
    one = model.forward(shape, model.choose(shape, 1), MACHINE)
    assert one.parts["products"] == pytest.approx(shape.flops() / MACHINE.flops, rel=0.02)
    assert one.barriers == 0 and one.parts["exchange"] == 0 and one.parts["start"] == 0


def test_one_row_is_bound_by_reading_the_weights() -> None:
    shape = Shape("lstm", "inference", 100, 1, 512)
    one = model.forward(shape, model.Choice(1, "serial"), MACHINE)
    assert one.weight_bytes == shape.recurrent_bytes()
    far = shape.recurrent_bytes() - model.KEPT * MACHINE.private_bytes  # beyond the own cache
    assert one.seconds > 100 * far / MACHINE.shared_rate


@pytest.mark.parametrize("shape", model.SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("threads", [2, 7, 8, 32, 128])
def test_counts(shape: Shape, threads: int) -> None:
    choice = model.choose(shape, threads)
    alone = model.passes(shape, model.Choice(1, "serial"), MACHINE)
    for shared, whole in zip(model.passes(shape, choice, MACHINE), alone, strict=True):
        assert shared.most * choice.threads >= shared.shares  # nobody's share is lost
        assert shared.parts["products"] >= 0.99 * whole.parts["products"] / choice.threads or (
            shared.weight_bytes <= MACHINE.private_bytes < whole.weight_bytes  # now in the cache
        )
        steps = shape.T if choice.split == "units" else 0
        assert shared.barriers >= 1 + steps


def test_barrier_grows_with_the_workers() -> None:
    costs = [MACHINE.barrier(n) for n in (1, 2, 8, 32, 128)]
    assert costs[0] == 0 and costs == sorted(costs) and costs[4] > 10 * costs[2]


def test_measured_and_modelled_are_of_one_size() -> None:
    for shape, (one, two) in zip(model.SHAPES, model.MEASURED, strict=False):
        for threads, ms in ((1, one), (2, two)):
            assert 0.6 < 1e3 * model.seconds(shape, threads, MACHINE) / ms < 1.5, shape.name


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["model", "--threads", "0"]) == 2
    assert "--threads must be at least 1 each, got 0" in capsys.readouterr().err
    unmarked = tmp_path / "a.md"
    unmarked.write_text("nothing")
    assert command_line.main(["model", "--write", str(unmarked)]) == 2
    assert "a.md must have the marks" in capsys.readouterr().err
