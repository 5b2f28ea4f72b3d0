"""The comparison: build everyone, check results, then time in interleaved rounds; a row a shape."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import peers as peers_module
from .limits import Limits
from .peers import CantRun, Peer, Rnnfast, RnnfastFrozen, TorchModule, peer_classes, versions
from .problem import Problem, difference
from .shapes import Shape

AGREEMENT = 0.05  # ours entered twice: medians further apart than this make a row noisy
AGAIN = " again"  # marks the second entry of ours
LEAST_ROUNDS, PATIENCE = 3, 4  # on a busy machine: stop after 4 budgets, but not before 3 rounds
MIN_SAMPLE = 1e-2  # seconds; shorter calls are timed many at once
QUIET_SLICE, QUIET_CPU, QUIET_USUAL, QUIET_MOST = 2e-3, 3e-4, 0.01, 0.1


# what `--engine all` lays beside the choice of the library
ALL = ("packed", "direct", "serial", "batch", "units", "directions", "layers")


@dataclass(frozen=True)
class Plan:
    """How long a shape is measured: rounds as the budget (seconds) allows, within bounds."""

    budget: float
    fewest: int
    most: int
    limits_budget: float = 1.0


PLANS = {
    "smoke": Plan(budget=1.0, fewest=3, most=15, limits_budget=0.3),
    "readme": Plan(budget=9.0, fewest=7, most=41),
    "full": Plan(budget=4.0, fewest=5, most=31),
}


@dataclass
class Entry:
    """One contestant of a shape, and what was timed of it."""

    name: str
    call: Callable[[], Any]
    mode: Callable[[], Any] = contextlib.nullcontext
    loops: int = 1
    seconds: float = 0.0  # of one call, as estimated before the rounds
    samples: list[float] = field(default_factory=list)

    def estimate(self) -> None:
        """Warm up, and choose how many calls make a sample."""
        with self.mode():
            self.call()
            start, count = time.perf_counter(), 0
            while count < 1 or (time.perf_counter() - start < 5e-3 and count < 1000):
                self.call()
                count += 1
            self.seconds = (time.perf_counter() - start) / count
        self.loops = max(1, round(MIN_SAMPLE / self.seconds))

    @property
    def cost(self) -> float:
        """Seconds that this takes of a round, waiting included."""
        return QUIET_USUAL + self.seconds * (self.loops + max(1, self.loops // 4))

    def measure(self) -> None:
        call, loops = self.call, self.loops
        with self.mode():
            for _ in range(max(1, loops // 4)):  # wakes the thread pool, brings the weights back
                call()
            start = time.perf_counter()
            for _ in range(loops):
                call()
            self.samples.append((time.perf_counter() - start) / loops)

    @property
    def ms(self) -> float:
        return 1e3 * statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        if len(self.samples) < 4:
            return (max(self.samples) - min(self.samples)) / statistics.median(self.samples)
        low, middle, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / middle


def wait_for_quiet() -> None:
    """Sleeps until the pools of the call before have stopped spinning (up to 40 ms was seen)."""
    end = time.perf_counter() + QUIET_MOST
    while True:
        before = time.process_time()  # CPU time of all threads of this process
        time.sleep(QUIET_SLICE)
        if time.process_time() - before < QUIET_CPU or time.perf_counter() > end:
            return


def rounds_of(
    entries: Sequence[Entry],
    count: int,
    order: random.Random,
    end: float,
    pause: Callable[[], None] = wait_for_quiet,
) -> None:
    """`count` rounds, everyone once in each, in a new order every time; after `end` at least 3."""
    for index in range(count):
        if index >= LEAST_ROUNDS and time.perf_counter() > end:
            return
        for entry in order.sample(entries, len(entries)):
            pause()
            entry.measure()


def race(
    entries: Sequence[Entry],
    plan: Plan,
    rounds: int | None,
    twins: list[tuple[str, str]],
    pause: Callable[[], None] = wait_for_quiet,
) -> None:
    """Times everyone, once more if ours disagrees with itself and time is left."""
    order = random.Random(0)
    for entry in entries:
        entry.estimate()
    start, each = time.perf_counter(), sum(entry.cost for entry in entries)
    count = rounds or max(plan.fewest, min(plan.most, int(plan.budget / each)))
    by_name = {entry.name: entry for entry in entries}

    end = math.inf if rounds else start + PATIENCE * plan.budget
    rounds_of(entries, count, order, end, pause)
    noisy = any(disagreement(by_name[a], by_name[b]) > AGREEMENT for a, b in twins)
    if noisy and rounds is None and time.perf_counter() - start < 2 * plan.budget:
        rounds_of(entries, count, order, end, pause)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Garbage is collected before, not between the samples."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def disagreement(one: Entry, other: Entry) -> float:
    return abs(one.ms / other.ms - 1)


class Roster:
    """Who takes part: built and found right, or left out and counted with the reason."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.left_out: dict[str, dict[str, int]] = {}  # peer -> reason -> number of shapes
        self.absent: dict[str, str] = {}  # peer -> reason, of the shape that came last
        self.wrong: list[str] = []

    def admit(
        self,
        shape: Shape,
        kinds: Iterable[type[Peer]],
        ours: Sequence[type[Peer]],
        build: Callable[[type[Peer]], Peer],
        check: Callable[[Peer], str | None],
    ) -> dict[str, Peer]:
        """Everyone who can and in whose results `check` finds no fault, by name."""
        found: dict[str, Peer] = {}
        self.absent = {}
        for kind in kinds:
            try:
                peer = build(kind)
                fault = check(peer)
                if fault:
                    self.wrong.append(f"{shape.name}: {kind.name}: {fault}")
                    raise CantRun(f"{shape.name}: wrong result: {fault}")
                found[kind.name] = peer
            except CantRun as reason:
                self._leave_out(kind, str(reason))
            except torch.OutOfMemoryError:
                self._leave_out(kind, f"{shape.name}: out of memory")
            except Exception as error:  # a peer that breaks costs its column, not the run
                text = " ".join(f"{type(error).__name__}: {error}".split())[:160]
                self._leave_out(kind, f"{shape.name}: {text}")
                if kind in ours:
                    self.wrong.append(f"{shape.name}: {kind.name}: {text}")
        return found

    def _leave_out(self, kind: type[Peer], reason: str) -> None:
        self.absent[kind.name] = reason
        reasons = self.left_out.setdefault(kind.name, {})
        reasons[reason] = reasons.get(reason, 0) + 1


class Comparison(Roster):
    """Measures shapes one by one; `rows` and `left_out` grow."""

    def __init__(
        self,
        threads: int,
        plan: Plan,
        names: list[str] | None = None,
        engine: str = "auto",
        ours: str = "rnnfast",
        rounds: int | None = None,
    ) -> None:
        super().__init__()
        self.threads, self.plan, self.rounds, self.engine = threads, plan, rounds, engine
        self.everyone = peer_classes()
        chosen = list(self.everyone) if names is None else names
        unknown = [name for name in chosen if name not in self.everyone]
        if unknown:
            raise ValueError(f"bench: no peer {unknown[0]!r}; there are {', '.join(self.everyone)}")
        self.peers: list[type[Peer]] = [self.everyone[name] for name in chosen]
        self.ours: type[TorchModule] = Rnnfast
        self.frozen: type[Rnnfast] | None = RnnfastFrozen
        if ours != "rnnfast":  # a torch-like peer in our place: what the noise alone looks like
            kind: Any = self.everyone[ours]
            self.ours = type("StandIn", (kind,), {"name": f"{ours} as ours"})
            self.frozen = None
        elif engine == "all":
            self.peers += [peers_module.forced(kind) for kind in ALL]
        elif engine != "auto":
            self.ours = peers_module.forced(engine)
            self.frozen = peers_module.forced(engine, RnnfastFrozen)
        self.versions = versions()
        self.commit = commit()
        self.limits = Limits(threads, plan.limits_budget)

    def header(self, command: str) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.timezone.utc)
        return {
            "versions": self.versions,
            "python": platform.python_version(),
            "commit": self.commit,
            "device": "cpu",
            "cpu": cpu_model(),
            "system": f"{platform.system()} {platform.machine()}",
            "threads": self.threads,
            "date": now.isoformat(timespec="seconds"),
            "command": command,
            "ours": self.ours.name,
            "agreement": AGREEMENT,
            "limits": self.limits.describe(),
            "left_out": self.left_out,
        }

    def _build(self, problem: Problem) -> dict[str, Peer]:
        """Everyone who can and whose results are right, ours first; the rest is left out."""
        shape = problem.shape
        baseline = self.everyone["torch loop" if shape.cell == "indrnn" else "torch.nn"]
        exact = Problem(replace(shape, dtype="float32"))
        reference = baseline(exact, self.threads).results()
        ours: list[type[Peer]] = [self.ours, self.frozen] if self.frozen else [self.ours]
        kinds = [
            kind  # some are there for other shapes only
            for kind in [*ours, *self.peers]
            if shape.dtype != "float32" or "float32" in kind.dtypes
        ]
        found = self.admit(
            shape,
            kinds,
            ours,
            lambda kind: kind(problem, self.threads),
            lambda peer: difference(peer.results(), reference, shape.dtype),
        )
        if self.frozen and not any(peer.against_frozen for peer in found.values()):
            found.pop(self.frozen.name, None)  # nobody to compare it with
        return found

    def run(self, shape: Shape) -> None:
        """Adds the rows of one shape: our plain layer, then the frozen one."""
        problem = Problem(shape)
        built = self._build(problem)
        limit = self.limits.limit_ms(shape)
        frozen_name = self.frozen.name if self.frozen else ""
        mine = [name for name in (self.ours.name, frozen_name) if name in built]
        if not mine:
            return
        entries = [Entry(name, peer.inner, peer.mode) for name, peer in built.items()]
        entries += [Entry(name + AGAIN, built[name].inner, built[name].mode) for name in mine]
        with no_collection():
            race(entries, self.plan, self.rounds, [(name, name + AGAIN) for name in mine])
        times = {entry.name: entry for entry in entries}
        for name in mine:
            frozen, alone = name == frozen_name, len(mine) == 1
            rivals = {
                other: times[other]
                for other, peer in built.items()
                if other not in mine and (alone or peer.against_frozen == frozen)
            }
            one, other = times[name], times[name + AGAIN]
            both = Entry(name, one.call, one.mode, samples=one.samples + other.samples)
            spread = {"ours": both.spread, "again": disagreement(one, other)}
            spread |= {key: entry.spread for key, entry in rivals.items()}
            used = getattr(built[name], "engine_used", None)
            self.rows.append(
                {
                    "shape": shape.name,
                    "device": "cpu",
                    "versions": self.versions,
                    "commit": self.commit,
                    **shape.columns(),
                    "frozen": frozen,
                    "ours_ms": significant(both.ms),
                    "peers": {key: significant(entry.ms) for key, entry in rivals.items()},
                    "limit_ms": significant(limit),
                    "engine": used() if used else name,
                    "spread": {key: round(value, 3) for key, value in spread.items()},
                    "noisy": disagreement(one, other) > AGREEMENT,
                }
            )


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def commit() -> str:
    """Short hash of the checkout, '+' when it was changed since; 'unknown' outside of git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_model() -> str:
    """Name of the processor, with family and model where the name alone says little."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']}"
        flags = fields.get("flags", "").split()
        best = next((isa for isa in ("avx512f", "avx2", "avx") if isa in flags), "")
        name += f", {best.upper()})" if best else ")"
    return name


def write(path: Path, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """JSON with a line a row, so that files stay small and diffs readable."""
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{{"header": {json.dumps(header)},\n"rows": [\n{lines}\n]}}\n')
    os.replace(temporary, path)


def compare(comparison: Comparison, shapes: list[Shape], out: Path, command: str) -> dict[str, Any]:
    """Runs all shapes with a progress bar; writes after every shape, so that a cut run counts."""
    with tqdm(shapes, unit="shape", file=sys.stderr, dynamic_ncols=True) as bar:
        for shape in bar:
            bar.set_postfix_str(shape.name)
            comparison.run(shape)
            write(out, comparison.header(command), comparison.rows)
    return {"header": comparison.header(command), "rows": comparison.rows}
