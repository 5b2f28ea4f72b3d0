"""The GPU comparison keeps its promises; what only a GPU can show runs here with stand-ins."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rnnfast")

import rnnfast
from bench import __main__ as command_line
from bench import gpu_compare, gpu_device, gpu_peers, gpu_report, gpu_shapes
from bench.compare import write
from bench.gpu_compare import GpuComparison, Journal, Wish
from bench.gpu_device import Cuda, DeviceEntry, Host
from bench.problem import Problem
from bench.shapes import Shape
from bench.table import load
from bench.test_gpu_report import CEILINGS, FACTS, made_up

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
