"""The GPU comparison keeps its promises; what only a GPU can show runs here with stand-ins."""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rnnfast")

import rnnfast
from bench import __main__ as command_line
from bench import gpu_compare, gpu_device, gpu_floor, gpu_peers, gpu_report, gpu_shapes, shapes
from bench.compare import write
from bench.gpu_compare import GpuComparison, Journal, Wish
from bench.gpu_device import Cuda, DeviceEntry, Host
from bench.gpu_floor import Ceilings
from bench.problem import Problem
from bench.shapes import Shape
from bench.table import load, shape_of
from rnnfast import _cuda
from rnnfast.cells import CELLS

CEILINGS = Ceilings(dict.fromkeys(gpu_shapes.DTYPES, 1e12), 1e12, 1e-6, 4e-6, "made up")
FACTS = {"gpu": "made up", "driver": "1", "cuda": "1", "cudnn": "1", "torch": "1"}
FACTS |= {"rnnfast": "1", "commit": "1", "ours": "rnnfast"}
IN_A_ROW = {
    *("shape", "rank", "device", "gpu", "driver", "cuda", "cudnn", "torch", "rnnfast", "commit"),
    *("ours", "fp32_precision", "command", "cell", "mode", "dtype", "T", "B", "I", "H", "layers"),
    *("bidirectional", "packed", "contestants", "floors", "checked_by", "again", "noisy"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Quick on a busy machine, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


class Slow(GpuComparison):
    """A point takes 50 ms and always has the same row."""

    def run(self, shape: Shape) -> str | None:
        time.sleep(0.05)
        self.rows.append(made_up(shape, 1.0, nn=2.0))
        return None


def test_a_spent_budget_leaves_a_valid_file(tmp_path: Path) -> None:
    comparison = Slow(Wish(budget=0.3), Host())
    journal = Journal(tmp_path / "out.json", gpu_shapes.GRID)
    gpu_compare.measure(comparison, gpu_shapes.GRID, journal)
    journal.save(comparison)
    results = load(journal.out)
    measured = [row["shape"] for row in results["rows"]]
    assert 1 <= len(measured) <= 6
    assert measured == [shape.name for shape in gpu_shapes.GRID[: len(measured)]]
    missing = results["header"]["not_measured"]
    assert missing["budget"] == [shape.name for shape in gpu_shapes.GRID[len(measured) :]]
    assert missing["int8: no CUDA engine"] == [shape.name for shape in gpu_shapes.UNABLE]
    assert f"- budget: {len(missing['budget'])}" in gpu_report.summary(results)
    assert missing["budget"][-1] in gpu_report.report(results)


def test_a_killed_run_leaves_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Slow):
        def run(self, shape: Shape) -> str | None:
            if len(self.rows) == 2:
                raise KeyboardInterrupt
            return super().run(shape)

    journal = Journal(tmp_path / "out.json", gpu_shapes.GRID)
    with pytest.raises(KeyboardInterrupt):
        gpu_compare.measure(Killed(Wish(), Host()), gpu_shapes.GRID, journal)
    results = load(journal.out)
    assert len(results["rows"]) == 2
    left = results["header"]["not_measured"][gpu_compare.CUT]
    assert len(left) == len(gpu_shapes.GRID) - 2
    assert len(journal.out.with_suffix(".log").read_text().splitlines()) == 2


def test_a_lost_device_ends_the_run(tmp_path: Path) -> None:
    class Broken(Host):
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    comparison = Slow(Wish(), Broken())
    journal = Journal(tmp_path / "out.json", gpu_shapes.GRID)
    gpu_compare.measure(comparison, gpu_shapes.GRID, journal)
    assert "illegal memory access" in comparison.wrong[0]
    lost = journal.missing[f"the CUDA device was lost at {gpu_shapes.GRID[0].name}"]
    assert len(lost) == len(gpu_shapes.GRID) - 1


def test_going_on_with_an_earlier_file(tmp_path: Path) -> None:
    comparison = Slow(Wish(), Host())
    comparison.facts = dict(FACTS)
    rows = [made_up(shape) for shape in gpu_shapes.GRID[:3]]
    write(tmp_path / "old.json", {"device": "cuda"}, rows)
    assert gpu_compare.resumed(comparison, tmp_path / "old.json") == rows
    comparison.facts["cudnn"] = "2"
    with pytest.raises(ValueError, match="the same cudnn, 2, got 1"):
        gpu_compare.resumed(comparison, tmp_path / "old.json")


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


def test_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "dry.json"
    assert command_line.main(["compare", "--device", "cuda", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("bench: no CUDA device here: a dry run of")
    results = json.loads(out.read_text())
    assert results["rows"] == [] and results["header"]["ceilings"] == {}
    missing = results["header"]["not_measured"]
    assert missing["no CUDA device"] == [shape.name for shape in gpu_shapes.GRID]
    assert set(missing) == {"no CUDA device", "int8: no CUDA engine"}
    assert {"gpu", "driver", "cudnn", "torch", "commit", "command"} <= results["header"].keys()
    assert f"no CUDA device: {len(gpu_shapes.GRID)}" in said
    assert command_line.main(["table", str(out)]) == 0
    assert gpu_shapes.GRID[-1].name in capsys.readouterr().out
    assert command_line.main(["plot", str(out)]) == 0


def test_wrong_words_give_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--shapes", "nothing"], "list --device cuda"),
        (["--peers", "nobody"], "no peer 'nobody' on a GPU"),
        (["--threads", "2"], "--threads needs --device cpu"),
        (["--engine", "packed"], "--engine packed needs --device cpu, got --device cuda"),
    ):
        assert command_line.main(["compare", "--device", "cuda", *words]) == 2
        assert said in capsys.readouterr().err
    assert command_line.main(["compare", "--budget", "5"]) == 2
    assert "--budget needs --device cuda" in capsys.readouterr().err
    assert command_line.main(["compare", "--engine", "onchip"]) == 2
    assert "--engine onchip needs --device cuda, got --device cpu" in capsys.readouterr().err


class Pretend(Cuda):
    """The code of a GPU over tensors of the CPU."""

    place = "cpu"
    in_force: dict[str, str]  # how ours launches, within use_engine


class Event:
    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


class CUDAGraph:
    replays = 0

    def replay(self) -> None:
        CUDAGraph.replays += 1


class Stream:
    def __init__(self, device: Any = None) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


class Properties:
    name, L2_cache_size, major, minor = "pretended", 1 << 20, 9, 0
    multi_processor_count, total_memory = 132, 80 << 30


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """torch.cuda, cuDNN and rnnfast's engine "cuda" as far as the benchmark calls them."""
    ran: dict[str, str] = {}
    in_force = {"launch": ""}

    @contextlib.contextmanager
    def use_engine(name: str, launch: str, kernel: str | None) -> Iterator[None]:
        in_force["launch"] = launch
        ran.update(engine=name, launch=launch, kernel=kernel or "step")
        yield
        in_force["launch"] = ""

    def graph(graph: Any, pool: Any) -> Any:
        return contextlib.nullcontext()

    for name, value in {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "get_device_properties": lambda device: Properties,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
        "graph_pool_handle": lambda: (0, 1),
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(gpu_peers, "flatten", lambda module: None)
    monkeypatch.setattr(rnnfast, "use_engine", use_engine)
    monkeypatch.setattr(rnnfast, "last_run", lambda: dict(ran))
    monkeypatch.setattr(gpu_device, "FLUSH_LEAST", 1 << 10)
    device = Pretend()
    device.in_force = in_force
    return device


@pytest.mark.parametrize("where", [0.0, 1e12], ids=["reference on the GPU", "on the CPU"])
def test_the_way_of_a_gpu(
    pretended: Pretend, where: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_peers, "EXACT_ON_CPU", where)
    comparison = GpuComparison(Wish(commit="c", command="x"), pretended, gpu_compare.REHEARSAL)
    comparison.ceilings = CEILINGS
    chosen = gpu_shapes.select(
        [
            *("lstm-training-T20-B8-H64", "lstm-training-T20-B8-H64-tfloat32"),
            *("lstm-inference-T20-B8-H64-packed", "gru-forward-T20-B8-H64-float16"),
            "lstm-streaming-T1-B1-H64-float16",
        ]
    )
    journal = Journal(tmp_path / "out.json", chosen)
    gpu_compare.measure(comparison, chosen, journal)
    assert comparison.wrong == []
    assert {shape.name for shape in chosen}.isdisjoint(journal.reasons)
    for row in comparison.rows:
        assert set(row) == IN_A_ROW
        assert row["gpu"] == "pretended" and row["commit"] == "c"
        seen = row["contestants"]
        ours = ["rnnfast", "rnnfast plain", "rnnfast pdl", "rnnfast graph"]
        assert list(seen) == [*ours, "torch.nn", "torch.nn graph"]
        assert [seen[name]["ran"] for name in ours] == [
            "cuda launch=auto kernel=step",
            "cuda launch=plain kernel=step",
            "cuda launch=pdl kernel=step",
            "cuda launch=auto kernel=step in a CUDA graph",
        ]
        for one in seen.values():
            assert one["ms"] >= 0 and one["host_ms"] > 0 and one["error"] < 0.01
        flag = {"tfloat32": "tf32", "float32": "ieee"}
        assert row["fp32_precision"] == flag.get(row["dtype"], "no float32 products")
    assert CUDAGraph.replays > 0
    assert "pretended" in gpu_report.summary(load(journal.out))


def test_every_kernel_is_measured_where_it_serves(
    pretended: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the choice of the library, and interleaved with it; where not, with the reason."""
    comparison = GpuComparison(Wish(engine="all"), pretended, gpu_compare.REHEARSAL)
    comparison.ceilings = CEILINGS
    small = gpu_shapes.SMOKE[0]
    assert comparison.run(small) is None and comparison.wrong == []
    seen = comparison.rows[0]["contestants"]
    assert seen["rnnfast[onchip]"]["ran"] == "cuda launch=auto kernel=onchip"
    assert seen["rnnfast"]["ran"] == "cuda launch=auto kernel=step"
    assert gpu_report.Point(comparison.rows[0]).kernels.keys() == set(gpu_report.KERNELS.values())
    plain = rnnfast.use_engine

    def refuse(name: str, launch: str, kernel: str | None) -> Any:
        if kernel == "onchip":
            raise RuntimeError("rnnfast: float64 products are not in the tiles")
        return plain(name, launch=launch, kernel=kernel)

    monkeypatch.setattr(rnnfast, "use_engine", refuse)
    assert comparison.run(small) is None and comparison.wrong == []
    assert "rnnfast[onchip]" not in comparison.rows[1]["contestants"]
    assert comparison.left_out["rnnfast[onchip]"] == {"float64 products are not in the tiles": 1}
    # a kernel that ran in another's place is a fault
    monkeypatch.setattr(rnnfast, "use_engine", plain)
    monkeypatch.setattr(rnnfast, "last_run", lambda: {"engine": "cuda", "kernel": "step"})
    assert comparison.run(small) is None
    assert any("must run onchip, ran step" in fault for fault in comparison.wrong)
    alone = GpuComparison(Wish(engine="onchip"), pretended, gpu_compare.REHEARSAL)
    alone.ceilings = CEILINGS
    reason = alone.run(small)
    assert reason and reason.startswith("rnnfast[onchip]: ")


def test_settings_hold_within_a_sample_only(pretended: Pretend) -> None:
    flag: Any = torch.backends.cudnn.rnn
    before = flag.fp32_precision
    shape = Shape("lstm", "training", 5, 2, 16, dtype="tfloat32")
    peer = gpu_peers.GpuRnnfast(Problem(shape), pretended, 1)
    seen = []
    inner = peer.inner

    def watched() -> Any:
        seen.append((flag.fp32_precision, pretended.in_force["launch"]))
        return inner()

    entry = DeviceEntry("ours", watched, peer.mode, device=pretended)
    entry.estimate()
    entry.measure()
    assert set(seen) == {("tf32", "auto")}
    assert flag.fp32_precision == before and pretended.in_force["launch"] == ""
    assert len(entry.samples) == len(entry.host_samples) == entry.loops


def test_a_layer_that_ran_elsewhere_is_wrong(
    pretended: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rnnfast, "last_run", lambda: {"engine": "reference"})
    comparison = GpuComparison(Wish(), pretended, gpu_compare.REHEARSAL)
    comparison.ceilings = CEILINGS
    reason = comparison.run(gpu_shapes.SMOKE[0])
    assert reason and "must run on cuda, ran on reference" in reason
    assert any("ran on reference" in fault for fault in comparison.wrong)


def test_a_refusal_is_a_reason(pretended: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    def use_engine(name: str, launch: str, kernel: str | None) -> Any:
        if launch == "pdl":
            raise RuntimeError("rnnfast: launch 'pdl' needs compute capability 9.0, got 8.0")
        return contextlib.nullcontext()

    monkeypatch.setattr(rnnfast, "use_engine", use_engine)
    monkeypatch.setattr(
        rnnfast, "last_run", lambda: {"engine": "cuda", "launch": "plain", "kernel": "step"}
    )
    comparison = GpuComparison(Wish(), pretended, gpu_compare.REHEARSAL)
    comparison.ceilings = CEILINGS
    assert comparison.run(gpu_shapes.SMOKE[3]) is None
    assert not comparison.wrong
    assert "rnnfast pdl" not in comparison.rows[0]["contestants"]
    why = "launch 'pdl' needs compute capability 9.0, got 8.0"
    assert comparison.left_out["rnnfast pdl"] == {why: 1}
    # where it is ours itself that is refused, the point has this reason
    comparison.ours = gpu_peers.Dependent
    assert comparison.run(gpu_shapes.SMOKE[3]) == f"rnnfast pdl: {why}"


def test_a_build_without_the_engine_is_told(
    pretended: Pretend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_compare, "find", lambda: pretended)
    monkeypatch.setattr(rnnfast, "engines", lambda: ["cpu", "reference"])
    with pytest.raises(ValueError, match="needs rnnfast's engine cuda, this build has cpu"):
        gpu_compare.compare(Wish(), tmp_path / "out.json")
