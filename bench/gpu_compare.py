"""The comparison on a GPU: `python -m bench compare --device cuda`.

Points are measured by rank until the budget is spent; what has no row is listed with the reason.
Where there is no CUDA device, the same code rehearses on the CPU, and its times are thrown away.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import gpu_floor, gpu_report, gpu_shapes
from .compare import (
    AGAIN,
    AGREEMENT,
    Plan,
    Roster,
    commit,
    disagreement,
    no_collection,
    race,
    significant,
    write,
)
from .gpu_device import DeviceEntry, Host, environment, find
from .gpu_peers import (
    ALL,
    NO_DEVICE,
    OURS,
    RIVALS,
    GpuRnnfast,
    GpuTorchLoop,
    GpuTorchNN,
    OnDevice,
    forced,
    reference,
)
from .peers import need, versions
from .problem import Problem
from .shapes import Shape
from .table import load

PLAN = Plan(budget=0.5, fewest=5, most=31)
REHEARSAL = Plan(budget=0.0, fewest=2, most=2)
BUDGET, NOT_ASKED = "budget", "not asked for by --shapes"
CUT = "the run was cut off before"  # in the file of a run that goes on, or was killed
SAME = ("gpu", "driver", "cuda", "cudnn", "torch", "rnnfast", "commit", "ours")  # for --resume


@dataclass(frozen=True)
class Wish:
    """What the command line asks for."""

    shapes: tuple[str, ...] = ("full",)
    budget: float | None = None  # seconds of measuring; None: as long as it takes
    rounds: int | None = None
    peers: tuple[str, ...] | None = None  # None: everyone
    engine: str = "auto"  # or a kernel of ours; "all": each beside the choice of the library
    ours: str = "rnnfast"
    commit: str = ""  # of a copy of the checkout without its history
    resume: Path | None = None
    command: str = ""


class LostDevice(RuntimeError):
    """The device answers no more; nothing can be measured after that."""


def contestants(wish: Wish) -> tuple[type[OnDevice], list[type[OnDevice]]]:
    """Who is "ours", and everyone that is measured beside it."""
    ours: type[OnDevice] = OURS[0]
    others: list[type[OnDevice]] = [*OURS[1:], *RIVALS]
    if wish.ours != "rnnfast":  # cuDNN in our place: what the noise alone looks like
        ours, others = type("StandIn", (GpuTorchNN,), {"name": f"{wish.ours} as ours"}), [*RIVALS]
    elif wish.engine == "all":
        others = [*OURS[1:], *map(forced, ALL), *RIVALS]
    elif wish.engine != "auto":
        ours, others = forced(wish.engine), [*RIVALS]
    names = [kind.name for kind in others]
    unknown = [name for name in wish.peers or () if name not in names]
    if unknown:
        raise ValueError(f"bench: no peer {unknown[0]!r} on a GPU; there are {', '.join(names)}")
    return ours, [kind for kind in others if wish.peers is None or kind.name in wish.peers]


@dataclass
class GpuComparison(Roster):
    """Measures points one by one; `rows` and `left_out` grow."""

    wish: Wish
    device: Host
    plan: Plan = PLAN
    ceilings: gpu_floor.Ceilings | None = None  # until `measure_ceilings`

    def __post_init__(self) -> None:
        super().__init__()
        self.ours, self.others = contestants(self.wish)
        # where the times mean nothing, one thread is the quickest on a busy machine
        self.threads = torch.get_num_threads() if self.device.kind == "cuda" else 1
        found = versions()
        self.facts = {
            **self.device.facts(),
            "torch": found["torch"],
            "rnnfast": found.get("rnnfast", "none"),
            "commit": self.wish.commit or commit(),
            "ours": self.ours.name,
        }

    def measure_ceilings(self) -> None:
        """Before the first point."""
        self.ceilings = gpu_floor.measure(self.device, gpu_shapes.DTYPES)

    def header(self, missing: dict[str, list[str]]) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.timezone.utc)
        return {
            "device": "cuda",
            **self.facts,
            **self.device.more_facts(),
            "versions": versions(),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "environment": environment(),
            "date": now.isoformat(timespec="seconds"),
            "command": self.wish.command,
            "agreement": AGREEMENT,
            "ceilings": self.ceilings.describe() if self.ceilings else {},
            "left_out": self.left_out,
            "wrong": self.wrong,
            "not_measured": missing,
        }

    def run(self, shape: Shape) -> str | None:
        """Adds the row of a point; the reason where it gets none."""
        problem = Problem(shape, device=self.device.device)
        checked_by, right = reference(problem, self.device, self.threads)
        # of no interest where cuDNN has the cell
        others = [k for k in self.others if k is not GpuTorchLoop or shape.cell in k.cells]
        built: dict[str, Any] = self.admit(
            shape,
            [self.ours, *others],
            [self.ours, *(kind for kind in others if issubclass(kind, GpuRnnfast))],
            lambda kind: kind(problem, self.device, self.threads),  # type: ignore[arg-type, call-arg]
            lambda peer: peer.fault(right),  # type: ignore[attr-defined]
        )
        mine = self.ours.name
        if mine not in built:
            return f"{mine}: {self.absent[mine].removeprefix(f'{shape.name}: ')}"
        entries = [
            DeviceEntry(name, peer.inner, peer.mode, device=self.device)
            for name, peer in [*built.items(), (mine + AGAIN, built[mine])]
        ]
        with no_collection():
            race(entries, self.plan, self.wish.rounds, [(mine, mine + AGAIN)], lambda: None)
        times = {entry.name: entry for entry in entries}
        self.rows.append(self.row(shape, checked_by, built, times))
        return None

    def row(
        self,
        shape: Shape,
        checked_by: str,
        built: dict[str, OnDevice],
        times: dict[str, DeviceEntry],
    ) -> dict[str, Any]:
        assert self.ceilings is not None, "bench: ceilings are measured before the points"
        one, other = times[self.ours.name], times.pop(self.ours.name + AGAIN)
        apart = disagreement(one, other)
        one.samples += other.samples
        one.host_samples += other.host_samples
        flag = {"tfloat32": "tf32", "float32": "ieee"}.get(shape.dtype, "no float32 products")
        return {
            "shape": shape.name,
            "rank": gpu_shapes.RANKS[shape],
            "device": "cuda",
            **self.facts,
            "fp32_precision": flag,
            "command": self.wish.command,
            **shape.columns(),
            "contestants": {
                name: {
                    "ms": significant(entry.ms),
                    "host_ms": significant(entry.host_ms),
                    "spread": round(entry.spread, 3),
                    "samples": len(entry.samples),
                    "error": significant(built[name].error),
                    "ran": built[name].used,
                }
                for name, entry in times.items()
            },
            "floors": self.ceilings.floors(shape),
            "checked_by": checked_by,
            "again": round(apart, 3),
            "noisy": apart > AGREEMENT,
        }


class Journal:
    """The result file and its log, written anew after every point, so that a killed run counts."""

    def __init__(self, out: Path, chosen: Iterable[Shape]) -> None:
        self.out = out
        wanted = set(chosen)
        self.reasons: dict[str, str] = {
            shape.name: CUT if shape in wanted else NOT_ASKED for shape in gpu_shapes.GRID
        }
        self.reasons |= {shape.name: why for shape, why in gpu_shapes.UNABLE.items()}
        out.parent.mkdir(parents=True, exist_ok=True)
        self.log = out.with_suffix(".log").open("a")
        self.start = time.perf_counter()

    @property
    def missing(self) -> dict[str, list[str]]:
        """Reason -> names of the points that have no row."""
        found: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            found.setdefault(reason, []).append(name)
        return found

    def say(self, text: str) -> None:
        print(f"{time.perf_counter() - self.start:7.1f} s  {text}", file=self.log, flush=True)

    def settle(self, name: str, reason: str | None) -> None:
        """A point has its row, or the reason why not."""
        if reason is None:
            self.reasons.pop(name, None)
        else:
            self.reasons[name] = reason

    def pending(self, reason: str) -> None:
        """Everything not reached yet stays so, for this reason."""
        for name, before in self.reasons.items():
            if before == CUT:
                self.reasons[name] = reason

    def save(self, comparison: GpuComparison) -> dict[str, Any]:
        header, rows = comparison.header(self.missing), comparison.rows
        write(self.out, header, rows)
        return {"header": header, "rows": rows}


def resumed(comparison: GpuComparison, path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier file of the same machine, commit and versions."""
    rows: list[dict[str, Any]] = load(path)["rows"]
    for row in rows:
        for name in SAME:
            if row.get(name) != comparison.facts[name]:
                raise ValueError(
                    f"bench: --resume needs rows of the same {name}, {comparison.facts[name]}, "
                    f"got {row.get(name)} in {path.name}"
                )
    return rows


def measure(comparison: GpuComparison, chosen: list[Shape], journal: Journal) -> None:
    """Points by rank until the budget is spent: none is begun that would likely overrun it."""
    budget = comparison.wish.budget
    took: list[float] = []
    for shape in tqdm(chosen, unit="point", file=sys.stderr, dynamic_ncols=True, disable=None):
        begun = time.perf_counter()
        expected = statistics.mean(took[-10:]) if took else 0.0
        if budget is not None and begun - journal.start + expected > budget:
            journal.pending(BUDGET)
            break
        before = len(comparison.wrong)
        try:
            reason = one_point(comparison, shape)
        except LostDevice as error:
            comparison.wrong.append(f"{shape.name}: {error}")
            journal.settle(shape.name, str(error))
            journal.pending(f"the CUDA device was lost at {shape.name}")
            journal.say(f"{shape.name}: {error}")
            break
        journal.settle(shape.name, reason)
        said = reason or gpu_report.one_line(comparison.rows[-1])
        journal.say(f"{gpu_shapes.RANKS[shape]:4} {shape.name}: {said}")
        for fault in comparison.wrong[before:]:
            journal.say(f"WRONG: {fault}")
        journal.save(comparison)
        took.append(time.perf_counter() - begun)


def one_point(comparison: GpuComparison, shape: Shape) -> str | None:
    """As `run`; what breaks outside of a contestant is the point's reason, if the device lives."""
    try:
        reason = comparison.run(shape)
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:  # as that of a contestant, it costs the point and not the run
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        comparison.wrong.append(f"{shape.name}: {reason}")
    try:
        comparison.device.synchronize()
        comparison.device.release()
    except RuntimeError as error:
        raise LostDevice(" ".join(str(error).split())[:160]) from None
    return reason


def rehearse(wish: Wish) -> list[str]:
    """Everything once, on the CPU: build, check, rounds, rows, file, tables and pictures; what was
    wrong. The times mean nothing and go with the folder."""
    with tempfile.TemporaryDirectory(prefix="rnnfast-bench-") as folder:
        chosen = gpu_shapes.rehearsal()
        # a kernel of the device can't stand in for all of ours here
        wish = replace(wish, budget=None, rounds=None, engine="all")
        comparison = GpuComparison(wish, Host(), REHEARSAL)
        comparison.measure_ceilings()
        journal = Journal(Path(folder) / "rehearsal.json", chosen)
        measure(comparison, chosen, journal)
        journal.save(comparison)
        gpu_report.finish(journal.out)
        journal.log.close()
        faults = comparison.wrong + [
            f"{shape.name}: {journal.reasons[shape.name]}"
            for shape in chosen
            if shape.name in journal.reasons
        ]
    return list(dict.fromkeys(faults))


def compare(wish: Wish, out: Path) -> tuple[dict[str, Any], list[str]]:
    """The whole run; results as they are in the file, and what was wrong."""
    chosen = gpu_shapes.select(wish.shapes)
    device = find()
    contestants(wish)  # a wrong name is told before anything is measured
    if device.kind != "cuda":
        print(
            f"bench: {NO_DEVICE} here: a dry run of {len(gpu_shapes.rehearsal())} small points on "
            "the CPU, whose times are discarded"
        )
        faults = rehearse(wish)
        comparison = GpuComparison(wish, device)
        comparison.wrong = faults
        journal = Journal(out, chosen)
        journal.pending(NO_DEVICE)
        journal.say(f"{NO_DEVICE}: nothing was measured")
    else:
        engines = need("rnnfast").engines()
        if wish.ours == "rnnfast" and "cuda" not in engines:
            raise ValueError(
                "bench: --device cuda needs rnnfast's engine cuda, this build has "
                f"{', '.join(engines)}; build with RNNFAST_CUDA=1, or measure cuDNN alone with "
                "--ours torch.nn"
            )
        started = time.perf_counter()
        comparison = GpuComparison(wish, device)
        journal = Journal(out, chosen)
        journal.start = started
        comparison.measure_ceilings()
        if wish.resume:
            comparison.rows += resumed(comparison, wish.resume)
            for row in comparison.rows:
                journal.settle(row["shape"], None)
            done = {row["shape"] for row in comparison.rows}
            chosen = [shape for shape in chosen if shape.name not in done]
        journal.save(comparison)
        measure(comparison, chosen, journal)
        faults = comparison.wrong
    results = journal.save(comparison)
    journal.log.close()
    return results, faults
