"""The points of the GPU comparison, and what is told of their times; the rows are made up."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rnnfast")

from bench import gpu_compare, gpu_floor, gpu_peers, gpu_report, gpu_shapes, shapes
from bench.compare import write
from bench.gpu_compare import GpuComparison, Wish
from bench.gpu_device import Host
from bench.gpu_floor import Ceilings
from bench.shapes import Shape
from bench.table import load, shape_of
from rnnfast import _cuda
from rnnfast.cells import CELLS

CEILINGS = Ceilings(dict.fromkeys(gpu_shapes.DTYPES, 1e12), 1e12, 1e-6, 4e-6, "made up")
FACTS = {"gpu": "made up", "driver": "1", "cuda": "1", "cudnn": "1", "torch": "1"}
FACTS |= {"rnnfast": "1", "commit": "1", "ours": "rnnfast"}


def made_up(shape: Shape, ours: float = 1.0, **others: float) -> dict[str, Any]:
    """A row with these times in ms."""
    times = {"rnnfast": ours} | {name.replace("_", " "): ms for name, ms in others.items()}
    real = {"nn": "torch.nn", "rnnfast onchip": "rnnfast[onchip]"}
    times = {real.get(name, name): ms for name, ms in times.items()}
    return {
        "shape": shape.name,
        "rank": gpu_shapes.RANKS[shape],
        "device": "cuda",
        **FACTS,
        **shape.columns(),
        "contestants": {name: {"ms": ms, "host_ms": ms} for name, ms in times.items()},
        "floors": CEILINGS.floors(shape),
        "noisy": False,
    }


def test_the_grid_covers_what_was_promised() -> None:
    grid = gpu_shapes.GRID
    assert {s.cell for s in grid} >= {"lstm", "gru", "rnn"}
    assert {s.dtype for s in grid} == set(gpu_shapes.DTYPES)
    assert {s.mode for s in grid} == set(shapes.MODES)
    assert {s.H for s in grid} >= {*gpu_shapes.SWEEP_H, 33, 100, 650}
    assert {s.B for s in grid} >= {1, 4, 8, 16, 32, 64, 128, 256}
    assert {s.T for s in grid} >= {1, 16, 50, 100, 256, 512, 1024}
    assert {s.layers for s in grid} >= {1, 4}
    together = {(s.cell, s.dtype, s.mode) for s in grid}
    wanted = {(c, d, m) for c in gpu_shapes.CELLS for d in gpu_shapes.DTYPES for m in shapes.MODES}
    assert together >= wanted
    half = [s for s in grid if s.dtype == "float16" and s.cell == "lstm"]
    for H in (768, 1024):
        assert {s.B for s in half if s.H == H} >= {16, 32, 64}
    for cell in gpu_shapes.CELLS:
        mine = [s for s in grid if s.cell == cell]
        assert any(s.packed for s in mine) and any(s.bidirectional for s in mine)
        assert any(s.layers == 4 for s in mine) and any(s.B > 128 for s in mine)


def test_ranks_are_total_and_the_first_show_everything() -> None:
    assert sorted(gpu_shapes.RANKS.values()) == list(range(1, len(gpu_shapes.GRID) + 1))
    assert len({shape.name for shape in gpu_shapes.GRID}) == len(gpu_shapes.GRID)
    first = gpu_shapes.GRID[:40]
    assert {s.dtype for s in first} == set(gpu_shapes.DTYPES)
    assert {s.mode for s in first} == set(shapes.MODES)
    assert {s.cell for s in first} == set(gpu_shapes.CELLS)
    assert any(s.packed for s in first) and any(s.bidirectional for s in first)
    assert any(s.layers == 4 for s in first) and any(s.B > 128 for s in first)


def test_every_point_of_the_cpu_is_there_or_has_a_reason() -> None:
    assert set(shapes.every()) <= set(gpu_shapes.GRID) | set(gpu_shapes.UNABLE)
    assert all(shape.dtype == "int8" for shape in gpu_shapes.UNABLE)


def test_selecting() -> None:
    assert gpu_shapes.select(["full"]) == gpu_shapes.GRID
    found = gpu_shapes.select(["smoke", "gru-*-H1024-float16"])
    assert found == sorted(found, key=lambda shape: gpu_shapes.RANKS[shape])
    with pytest.raises(ValueError, match="no GPU set or point"):
        gpu_shapes.select(["lstm-nothing"])
    kinds = gpu_shapes.rehearsal()
    assert {s.mode for s in kinds} == set(shapes.MODES)
    assert {s.dtype for s in kinds} == set(gpu_shapes.DTYPES)


def test_floors_of_a_known_shape() -> None:
    lstm = Shape("lstm", "inference", 100, 2, 512, dtype="float16")
    flops, moved = 2 * 200 * 4 * 512 * 1024, 2 * (4 * 512 * 1024 + 2 * 200 * 512 + 2 * 2 * 512)
    floors = CEILINGS.floors(lstm)
    assert (floors["flops"], floors["bytes"]) == (flops, moved)
    assert (floors["steps"], floors["launches"], floors["by"]) == (100, 200, "operations")
    assert floors["operations_ms"] == pytest.approx(flops * 1e-9, rel=1e-3)
    assert floors["bytes_ms"] == pytest.approx(moved * 1e-9, rel=1e-3)
    assert floors["exchanges_ms"] == pytest.approx(0.2)
    assert gpu_floor.floor_ms(floors) == floors["operations_ms"]
    assert gpu_floor.least_bytes(replace(lstm, dtype="tfloat32")) == 2 * moved
    assert gpu_floor.steps(replace(lstm, layers=4)) == 103  # a wavefront
    assert gpu_floor.steps(replace(lstm, layers=4, bidirectional=True)) == 400
    assert gpu_floor.steps(replace(lstm, mode="training")) == 200
    training = gpu_floor.least_bytes(replace(lstm, mode="training"))
    assert training == 2 * 2 * (4 * 512 * 1024 + 2 * 200 * 512)


def test_rows_know_their_shapes() -> None:
    for shape in gpu_shapes.GRID:
        assert shape_of(made_up(shape)) == shape


def test_means_use_every_row() -> None:
    chosen = [s for s in gpu_shapes.GRID if s.cell != "indrnn"]
    values = [random.Random(1).lognormvariate(0, 0.5) for _ in chosen]
    rows = [made_up(s, 1.0, nn=float(f"{v:.4g}")) for s, v in zip(chosen, values)]
    mean = math.exp(sum(math.log(row["contestants"]["torch.nn"]["ms"]) for row in rows) / len(rows))
    text = gpu_report.summary_table(gpu_report.points_of(rows), markdown=True)
    cells = text.splitlines()[2].split(" | ")
    assert cells[0] == "| all" and cells[2] == str(len(chosen))
    assert cells[3] == f"{mean:.2f}x ({min(values):.2f}x)"
    by_mode = [line.split(" | ") for line in text.splitlines()[3:]]
    assert sum(int(line[2]) for line in by_mode if line[1] == "all") == len(chosen)
    # a row without a time of cuDNN is told, not dropped in silence
    rows[0]["contestants"].pop("torch.nn")
    text = gpu_report.summary_table(gpu_report.points_of(rows), markdown=True)
    assert f"{len(chosen) - 1} of {len(chosen)}" in text.splitlines()[2]


def test_what_launching_otherwise_gains() -> None:
    row = made_up(gpu_shapes.GRID[0], 2.0, nn=3.0, torch_loop=9.0)
    row["contestants"] |= {
        name: {"ms": ms, "host_ms": 10 * ms}
        for name, ms in (("rnnfast plain", 4.0), ("rnnfast pdl", 2.0), ("rnnfast graph", 1.0))
    }
    point = gpu_report.Point(row)
    assert (point.ratio, point.pdl_gain, point.graph_gain) == (1.5, 2.0, 4.0)
    assert point.graph_host_gain == 4.0 and point.graph_ratio is None
    assert "pdl 2.00x" in gpu_report.one_line(row)


def serves(shape: Shape) -> str:
    """Why the on-chip kernel does not, on an H100 with TF32 allowed where the point has it."""
    name = {"rnn": "rnn_tanh"}.get(shape.cell, shape.cell)
    (cell,) = (spec.id for spec in CELLS if spec.name == name)
    size = 4 if "float32" in shape.dtype else 2
    for backward in (False, True)[: 1 + (shape.mode == "training")]:
        sizes = (shape.T, shape.B, shape.input_size, shape.H, shape.H)
        tf32 = shape.dtype == "tfloat32"
        why = _cuda.Passes(
            cell, sizes, size, 90, 227 << 10, backward=backward, tf32=tf32
        ).why_not_onchip()
        if why:
            return why
    return ""


def test_the_points_for_the_on_chip_kernel() -> None:
    """A first call measures them all: few, by value, and none that the kernel refuses."""
    chosen = gpu_shapes.select(["onchip"])
    assert chosen == gpu_shapes.ONCHIP and len(chosen) <= 40
    assert {shape.H for shape in chosen} == {32, 64, 96, 128, 160, 192}
    assert {shape.B for shape in chosen} == {1, 8, 16, 32}
    assert {shape.cell for shape in chosen} == {"lstm", "gru", "rnn"}
    assert {shape.dtype for shape in chosen} == {"float16", "bfloat16", "tfloat32"}
    assert {shape.mode for shape in chosen} == {"inference", "forward", "training"}
    assert [why for shape in chosen if (why := serves(shape))] == []
    large = Shape("lstm", "training", 256, 16, 192, dtype="float16")
    assert "up to H = 176" in serves(large)


def test_whom_an_engine_brings() -> None:
    def names(**wish: Any) -> list[str]:
        ours, others = gpu_compare.contestants(Wish(**wish))
        return [kind.name for kind in (ours, *others)]

    rivals = ["torch.nn", "torch.nn graph", "torch loop"]
    plain = ["rnnfast", "rnnfast plain", "rnnfast pdl", "rnnfast graph"]
    assert names() == plain + rivals
    assert names(engine="all") == [*plain, "rnnfast[onchip]", *rivals]
    assert names(engine="step") == ["rnnfast[step]", *rivals]
    assert names(engine="onchip") == ["rnnfast[onchip]", *rivals]
    assert names(engine="all", peers=("rnnfast[onchip]",)) == ["rnnfast", "rnnfast[onchip]"]
    kinds: list[Any] = [gpu_peers.Plain, gpu_peers.Dependent, gpu_peers.forced("onchip")]
    assert [kind.kernel for kind in kinds] == ["step", "step", "onchip"]
    assert [kind.name for kind in kinds] == list(gpu_report.KERNELS)


def test_the_choice_is_held_against_the_best_kernel(tmp_path: Path) -> None:
    """Times of 256 steps in ms: 0.1024 are 0.4 us a step."""
    good, late, bad, left = gpu_shapes.ONCHIP[:4]
    forced = {"rnnfast_plain": 0.7, "rnnfast_pdl": 0.6}
    rows = [
        made_up(good, 0.1, nn=0.2048, rnnfast_onchip=0.1024, **forced),
        made_up(late, 0.63, nn=0.5, rnnfast_onchip=0.64, **forced),
        made_up(bad, 0.7, nn=0.1024, rnnfast_onchip=0.1024, **forced),
        made_up(left, 0.7, nn=0.1, **forced),  # the kernel did not serve
    ]
    rows[2]["contestants"]["rnnfast"]["ran"] = "cuda device=sm_90 kernel=step launch=plain"
    points = [gpu_report.Point(row) for row in rows]
    assert [p.best_kernel for p in points] == ["onchip", "step, pdl", "onchip", "step, pdl"]
    assert [p.best_ratio and round(p.best_ratio, 3) for p in points] == [2.0, 0.833, 1.0, 0.167]
    assert points[0].best_us == pytest.approx(0.4) and points[2].chosen == "step"
    assert (good.mode, good.H, late.mode) == ("inference", 64, "training")
    assert [p.goal and round(p.goal, 3) for p in points[:2]] == [0.45, 1.215]
    for other in (replace(good, B=64), replace(good, H=192), replace(good, packed=True)):
        assert gpu_report.Point({**rows[0], **other.columns()}).goal is None
    text = gpu_report.choices(points)
    assert "within 10% of the best at 2 of 3 points, and not at:" in text
    assert f"- `{bad.name}`: best onchip, 0.4" in text and "chosen step, 2.734: 6.84x" in text
    assert "2 of 3 met" in text
    mean = (2.0 * 0.5 / 0.6 * 1.0) ** (1 / 3)
    assert f"geometric mean: {mean:.2f}x of 3 points (goal 1.50x)" in text
    assert gpu_report.choices(points[3:]) == ""
    said = gpu_report.one_line(rows[0])
    assert "onchip 6.84x" in said and said.endswith("best onchip 0.400 us a step")
    comparison = GpuComparison(Wish(), Host())
    header = comparison.header({}) | FACTS | {"ceilings": CEILINGS.describe()}
    write(tmp_path / "out.json", header, rows)
    results = load(tmp_path / "out.json")
    assert "and not at:" in gpu_report.summary(results)
    table = gpu_report.kernel_table(points, markdown=True)
    assert len(table.splitlines()) == 6 and "| 0.45 met |" in table and "1.22 missed" in table
    assert table.splitlines()[2].split(" | ")[1:5] == ["0.391", "2.734", "2.344", "0.400"]
    assert "### microseconds a step by kernel" in gpu_report.report(results, markdown=True)


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        made_up(shape, 1.0, **({"torch_loop": 9.0} if shape.cell == "indrnn" else {"nn": 1.2}))
        for shape in gpu_shapes.GRID
    ]
    for shape, row in zip(gpu_shapes.GRID, rows):
        if shape.H <= 192 and shape.cell != "indrnn":
            row["contestants"]["rnnfast[onchip]"] = {"ms": 0.3, "host_ms": 0.3}
    comparison = GpuComparison(Wish(), Host())
    header = comparison.header({"budget": []}) | FACTS | {"ceilings": CEILINGS.describe()}
    write(tmp_path / "out.json", header, rows)
    written = gpu_report.finish(tmp_path / "out.json")
    assert [path.name for path in written] == ["out.md", "out-ratios.png", "out-steps.png"]
    assert all(path.stat().st_size > 10_000 for path in written)
