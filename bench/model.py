"""A model of a layer on many cores: counts taken from the kernels, times from a few rates.

What a worker does is counted as csrc/cpu does it (panels, tiles, chunks, barriers, bytes); the
choice of threads and split is choose_engine's own. A part takes as long as the worker that has most
of it, since a barrier or the end of the call waits for that one. Nothing beyond two cores was
measured: Machine says of each rate where it is from.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .shapes import GATES, Shape
from .table import render

# Of csrc/cpu: gemm.h, forward.h, backward.h; the vectors are AVX-512's.
LANES = 16
KEPT = 0.75  # kCacheShare of choose_engine.cpp
PANEL_VECTORS = (
    4  # kMaxVectors: a gated panel is a vector of units with its gates, a plain one four
)
TILE_ROWS = 6  # max_rows(4)
FORWARD_CHUNK, BACKWARD_CHUNK = 128, 512  # rows
FLOAT = 4  # bytes
BEGIN, END = "<!-- python -m bench model -->", "<!-- end of the model -->"

SHAPES = [
    Shape("lstm", mode, *sizes)
    for mode in ("inference", "training")
    for sizes in ((100, 64, 512), (50, 32, 256), (100, 1, 512), (512, 8, 128))
]

# Median ms of inference on one and two cores in a quiet second of the machine measured, in the
# order of SHAPES.
MEASURED = [(167.8, 84.7), (11.1, 5.86), (11.5, 3.95), (7.55, 4.11)]


def known(value: Any, what: str, source: str) -> Any:
    """A rate with what it is and where it is from, for the document."""
    return field(default=value, metadata={"what": what, "source": source})


ONE = "measured, one thread, "


@dataclass(frozen=True)
class Machine:
    """One core, and what joins the cores of one socket."""

    flops: float = known(1.65e11, "a core in the packed kernel, /s", ONE + "T100 B64 H512")
    private_bytes: int = known(2 << 20, "a core's own cache, bytes", "of the machine measured")
    private_rate: float = known(8.0e10, "weights from there, bytes/s", ONE + "T400 B1 H256")
    shared_rate: float = known(
        2.9e10,
        "weights from the shared cache, bytes/s a core",
        ONE + "reading an array; assumed of all cores at once",
    )
    cell: float = known(4.5e-8, "the gates of one vector of units, s", ONE + "T200 B64 H16 I1")
    line: float = known(
        6.5e-8,
        "a cache line from core to core, s",
        "measured: a third of a barrier of two, best of 200; assumed of any number",
    )
    remote_rate: float = known(1.0e10, "reading what others wrote, bytes/s a core", "assumed")
    start: float = known(8e-6, "the pool begins and joins, s", "assumed, as choose_engine does")
    start_each: float = known(5e-7, "the same for each worker, s", "assumed")

    def barrier(self, workers: int) -> float:
        """One counter: every arrival takes its line, and everyone who waits reads the new phase."""
        return 0.0 if workers < 2 else self.line * (2 * workers - 1)

    def product(self, rows: int, columns: int, depth: int, whole: int) -> float:
        """`rows` times a (depth, columns) matrix. Tiles of rows pass through it one after the
        other; the first fetches it from where a working set of `whole` bytes lives.
        """
        if rows <= 0 or columns <= 0:
            return 0.0
        size = FLOAT * depth * columns
        # Sweeps turn round: what was read last is read first, from the own cache.
        kept = size if whole <= self.private_bytes else size * KEPT * self.private_bytes / whole
        near, far = kept / self.private_rate, (size - kept) / self.shared_rate
        reading = near + far + (ceil(rows, TILE_ROWS) - 1) * size / self.private_rate
        return max(2.0 * rows * columns * depth / self.flops, reading)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def most(parts: int, workers: int) -> int:
    """Of `parts` in nearly equal shares, what the busiest worker has."""
    return ceil(parts, workers)


@dataclass(frozen=True)
class Choice:
    threads: int
    split: str


def core() -> Any:
    try:
        return importlib.import_module("rnnfast._core")
    except ImportError as error:
        raise ValueError(
            "bench: model must have the development build (RNNFAST_DEV=1), got one without _core"
        ) from error


def choose(shape: Shape, threads: int) -> Choice:
    """What choose_engine says."""
    from rnnfast.cells import CELLS

    names = {cell.name: cell.id for cell in CELLS}
    got: dict[str, Any] = core().choose(
        names[shape.cell],
        shape.T,
        shape.B,
        shape.input_size,
        shape.H,
        shape.H,
        shape.T * shape.B,
        FLOAT,
        threads,
        private_cache=Machine.private_bytes,
    )
    return Choice(got["threads"], got["split"])


@dataclass
class Pass:
    """One direction of time: seconds by part, and the counts behind them."""

    parts: dict[str, float]
    barriers: int
    shares: int  # what is dealt out: panels, or rows of the batch
    most: int  # of them, the busiest worker's
    weight_bytes: int  # recurrent weights that the busiest worker reads in a step

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def forward(shape: Shape, choice: Choice, m: Machine) -> Pass:
    gates, H, I, W = GATES[shape.cell], shape.H, shape.input_size, choice.threads  # noqa: E741
    units = choice.split == "units"
    panels = ceil(H, LANES)
    mine = most(panels, W) if units else panels  # panels of the busiest worker
    rows = shape.B if units else most(shape.B, W)
    columns = mine * gates * LANES
    step_bytes = FLOAT * columns * H
    chunk = min(shape.T, ceil(FORWARD_CHUNK, shape.B)) * rows  # rows of gx made together
    chunks = ceil(shape.T * rows, chunk)
    packed = FLOAT * gates * H * (I + H)
    barriers = (1 + (shape.T if units else 0)) if W > 1 else 0
    exchanged = FLOAT * shape.B * H * (1 - mine / panels) if units else 0.0
    parts = {
        "products": shape.T * m.product(rows, columns, H, step_bytes)
        + chunks * m.product(chunk, columns, I, FLOAT * columns * I),
        "cell": shape.T * rows * mine * m.cell,
        "pack": 2 * packed * most(panels, W) / panels / m.shared_rate,
        "exchange": shape.T * exchanged / m.remote_rate,
        "barriers": barriers * m.barrier(W),
        "start": m.start + m.start_each * W if W > 1 else 0.0,
    }
    shares = panels if units else shape.B
    return Pass(parts, barriers, shares, most(shares, W), step_bytes)


def backward(shape: Shape, choice: Choice, m: Machine) -> Pass:
    gates, H, I, W = GATES[shape.cell], shape.H, shape.input_size, choice.threads  # noqa: E741
    units = choice.split == "units"
    width = PANEL_VECTORS * LANES
    panels = ceil(H, width)
    mine = min(H, most(panels, W) * width) if units else H  # units of the busiest worker
    rows = shape.B if units else most(shape.B, W)
    step_bytes = FLOAT * gates * H * mine
    steps = min(shape.T, ceil(BACKWARD_CHUNK, shape.B))
    chunk, chunks = steps * shape.B, ceil(shape.T, steps)
    left = most(gates * H, W)  # rows of the weight gradients
    right_bytes = FLOAT * chunk * (I + H)
    barriers = (1 + 3 * chunks + (shape.T if units else 0)) if W > 1 else 0
    # dgh of the step by units; of the chunk, the right sides that others packed
    exchanged = FLOAT * shape.B * gates * H * (1 - mine / H) * shape.T if units else 0.0
    shared = FLOAT * chunk * (I + H) * (1 - 1 / W) * chunks
    gradients = chunks * m.product(left, I + H, chunk, right_bytes)
    dx = chunks * m.product(most(chunk, W), I, gates * H, FLOAT * gates * H * I)
    right_panels = ceil(I, width) + ceil(H, width)
    pack_share = (most(ceil(I, width), W) + most(ceil(H, width), W)) / right_panels
    packed = FLOAT * gates * H * (I + H) + chunks * right_bytes
    parts = {
        "products": shape.T * m.product(rows, mine, gates * H, step_bytes) + gradients + dx,
        "cell": shape.T * rows * ceil(mine, LANES) * m.cell,
        "pack": 2 * packed * pack_share / m.shared_rate,
        "exchange": (exchanged + shared) / m.remote_rate,
        "barriers": barriers * m.barrier(W),
        "start": m.start + m.start_each * W if W > 1 else 0.0,
    }
    shares = panels if units else shape.B
    return Pass(parts, barriers, shares, most(shares, W), step_bytes)


def passes(shape: Shape, choice: Choice, m: Machine) -> list[Pass]:
    done = [forward(shape, choice, m)]
    return done + [backward(shape, choice, m)] if shape.mode == "training" else done


def seconds(shape: Shape, threads: int, m: Machine) -> float:
    return sum(p.seconds for p in passes(shape, choose(shape, threads), m))


def stops_at(shape: Shape, m: Machine, limit: int = 128) -> int:
    """The threads from which twice as many gain less than a fifth."""
    threads = 1
    while threads < limit and seconds(shape, 2 * threads, m) < seconds(shape, threads, m) / 1.2:
        threads *= 2
    return threads


def row(shape: Shape, threads: int, m: Machine) -> list[str]:
    choice = choose(shape, threads)
    done = passes(shape, choice, m)
    total = sum(p.seconds for p in done)
    parts: dict[str, float] = {}
    for p in done:
        for name, value in p.parts.items():
            parts[name] = parts.get(name, 0.0) + value
    apart = {k: v for k, v in parts.items() if k in ("exchange", "barriers", "start")}
    what = "panels" if choice.split == "units" else "rows"
    shares = ", ".join(f"{p.most} of {p.shares}" for p in done)
    uneven = max(p.most * choice.threads / p.shares for p in done)
    step_kib = max(p.weight_bytes for p in done) / 1024
    return [
        shape.mode,
        shape.short,
        str(threads),
        str(choice.threads),
        choice.split,
        f"{shares} {what}" if choice.threads > 1 else "all",
        f"{uneven:.2f}",
        f"{step_kib:.0f}",
        str(sum(p.barriers for p in done)),
        f"{1e3 * total:.2f}",
        f"{seconds(shape, 1, m) / total:.1f}",
        *(f"{value / total:.0%}" for value in apart.values()),
        str(stops_at(shape, m)),
    ]


HEAD = [
    "mode",
    "LSTM",
    "threads",
    "used",
    "split",
    "busiest has",
    "uneven",
    "KiB a step",
    "barriers",
    "ms",
    "speed-up",
    "exchange",
    "in barriers",
    "start",
    "stops at",
]


def tables(threads: list[int], m: Machine, markdown: bool) -> str:
    """What is assumed, how that fits one and two cores, the barrier, and the model itself."""
    known = [
        [f.metadata["what"], f.metadata["source"], f"{getattr(m, f.name):.3g}"] for f in fields(m)
    ]
    costs = [
        [str(n), f"{1e6 * m.barrier(n):.2f}", f"{1e6 * (m.start + n * m.start_each):.1f}"]
        for n in dict.fromkeys([2, *threads])
        if n > 1
    ]
    fit = []
    for shape, measured in zip(SHAPES, MEASURED, strict=False):
        modelled = [1e3 * seconds(shape, n, m) for n in (1, 2)]
        pairs = zip(modelled, measured, strict=True)
        fit.append([shape.short, *(f"{ms:.1f}" for pair in pairs for ms in pair)])
    head = ["LSTM, inference, ms", "model, 1", "measured, 1", "model, 2", "measured, 2"]
    parts = [
        render(["parameter", "from", "value"], known, markdown, text_columns=2),
        render(head, fit, markdown),
        render(["workers", "us a barrier", "us to start and join"], costs, markdown),
        render(HEAD, [row(s, n, m) for s in SHAPES for n in threads], markdown, text_columns=2),
    ]
    return "\n\n".join(parts)


def write(path: Path, text: str) -> None:
    """Puts the tables between the two marks of a document."""
    old = path.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        raise ValueError(f"bench: {path.name} must have the marks {BEGIN} and {END} once")
    marked = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)
    path.write_text(marked.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", old), encoding="utf-8")


def measured_line(m: Machine, repeats: int = 200) -> Machine:
    """The machine with this one's cost of a cache line, from a barrier of two."""
    runs = (core().barrier_seconds(2, 2000) for _ in range(repeats))
    times = sorted(time for time in runs if time > 0)
    if not times:
        raise ValueError("bench: a barrier must be measured on two cores, got no two at once")
    return replace(m, line=times[0] / 3)
