"""The grid of the GPU, as data, in order of value: a run that is cut off has measured what matters.

A point's rank is its place in `GRID`. Like those of shapes.py, which all stand at the end, points
are only ever added.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from . import shapes
from .shapes import Shape

CELLS = ("lstm", "gru", "rnn")  # those that cuDNN has
DTYPES = ("float16", "bfloat16", "tfloat32", "float32")
NO_ENGINE = {"int8": "int8: no CUDA engine"}  # dtypes that no GPU point can have, and why


def _points(
    cells: str, dtypes: str, modes: str, *sizes: tuple[int, ...], **more: object
) -> list[Shape]:
    """Sizes are (T, B, H) or (T, B, H, I); they vary slowest, modes fastest."""
    return [
        shape
        for size in sizes
        for dtype in dtypes.split()
        for cell in cells.split()
        for mode in modes.split()
        for shape in shapes._shapes(cell, mode, size, dtype=dtype, **more)
    ]


def _unique(*chapters: Iterable[Shape]) -> list[Shape]:
    return list(dict.fromkeys(shape for chapter in chapters for shape in chapter))


_ALL = " ".join(DTYPES)
_HALF = "float16 bfloat16"
_BOTH = "inference training"

# every cell, dtype, mode and feature once: what a run of a minute should know
SPREAD: list[Shape] = [
    *_points("lstm", "float16", _BOTH, (1024, 16, 768)),  # where published figures are
    *_points("lstm", "bfloat16", _BOTH, (256, 32, 1024)),
    *_points("gru", "float16", _BOTH, (256, 32, 512)),
    *_points("lstm", "tfloat32 float32", "training", (100, 32, 512)),
    *_points("gru", "bfloat16 float32", "inference", (100, 32, 768)),
    *_points("rnn", "float16 tfloat32", "training", (256, 32, 512)),
    *_points("lstm gru", "float16", "forward", (256, 32, 512)),
    *_points("lstm", _HALF, "streaming", (1, 1, 512)),
    *_points("gru", "float32", "streaming", (1, 32, 512)),
    *_points("lstm", "float16", "training", (256, 32, 512), layers=4),
    *_points("gru", "bfloat16", "training", (100, 32, 512), bidirectional=True),
    *_points("lstm", "float16", _BOTH, (100, 32, 512), packed=True),
    *_points("lstm", "float16", "training", (100, 128, 512), (100, 256, 512)),
    *_points("lstm", "float16", "inference", (512, 8, 64), (256, 64, 192)),
    *_points("gru", "float16", "training", (100, 32, 650), (64, 32, 640, 400)),
    *_points("rnn", "float32", "inference", (100, 7, 33)),
    *_points("lstm", "float16", "training", (100, 1, 2048)),
]

# what one block can keep on chip, where the step engine's launches are most of a step
_STEPS = 256
ONCHIP: list[Shape] = [
    *_points("lstm gru", "float16", _BOTH, (_STEPS, 16, 64), (_STEPS, 16, 128)),
    *_points("lstm", "bfloat16", _BOTH, (_STEPS, 32, 128)),
    *_points("lstm", "tfloat32", _BOTH, (_STEPS, 16, 128)),
    *_points("lstm", "float16", _BOTH, (_STEPS, 1, 128), (_STEPS, 32, 64), (_STEPS, 16, 160)),
    *_points("gru", "float16", _BOTH, (_STEPS, 16, 192)),
    *_points("lstm", "float16", "inference", (_STEPS, 16, 192)),
    *_points("lstm", "float16", _BOTH, (_STEPS, 16, 32), (_STEPS, 16, 96)),
    *_points("gru", "tfloat32", _BOTH, (_STEPS, 16, 64)),
    *_points("gru", "bfloat16", _BOTH, (_STEPS, 8, 96)),
    *_points("lstm", "bfloat16", _BOTH, (_STEPS, 1, 32)),
    *_points("lstm", "float16", "forward", (_STEPS, 32, 128)),
    *_points("lstm", "float16", "training", (_STEPS, 32, 128), packed=True),
    *_points("lstm", "float16", _BOTH, (_STEPS, 32, 128), bidirectional=True),
    *_points("rnn", "float16", "training", (_STEPS, 16, 192)),
    *_points("gru", "tfloat32", "inference", (_STEPS, 1, 128), (_STEPS, 32, 32)),
]

# where the library promises to win, and where cuDNN is strongest
GOALS: list[Shape] = [
    *_points("lstm", "float16", "training inference", (256, 16, 1024), (256, 32, 768)),
    *_points("lstm", "float16", "training inference", (256, 64, 1024), (256, 64, 768)),
    *_points("lstm", "float16", "forward", (256, 32, 1024), (256, 16, 768)),
    *_points("lstm", "bfloat16", "training inference", (256, 16, 768), (256, 64, 1024)),
    *_points("lstm", "bfloat16", "forward", (256, 32, 1024)),
    *_points("gru", _HALF, "training inference", (256, 32, 1024), (256, 32, 256)),
    *_points("gru", "float16", "training inference", (256, 16, 768), (512, 8, 512)),
    *_points("gru", "tfloat32", "training inference", (100, 32, 512)),
    *_points("lstm", _HALF, "inference", (256, 32, 512), layers=4),
    *_points("gru", "float16", "training inference", (100, 32, 512), layers=4),
    *_points("rnn", "bfloat16", "training", (100, 32, 512), layers=4),
    *_points("lstm", "float16", "training inference", (256, 32, 512), bidirectional=True),
    *_points("gru", "float16", "inference", (256, 32, 512), bidirectional=True),
    *_points("rnn", "float32", "training", (100, 32, 256), bidirectional=True),
    *_points("lstm", "float16", "training", (100, 16, 256), layers=4, bidirectional=True),
    *_points("gru", "bfloat16", "training inference", (100, 64, 512), packed=True),
    *_points("lstm", "float16", "training", (512, 32, 256), packed=True, bidirectional=True),
    *_points("lstm", "tfloat32", "training", (256, 64, 512), packed=True),
    *_points("gru", "float16", "training inference", (50, 256, 512)),
    *_points("lstm", "bfloat16", "training inference", (50, 256, 1024)),
    *_points("rnn", "float16", "training", (50, 256, 1024)),
    *_points("lstm", _HALF, "inference", (100, 9, 100), (100, 33, 650)),
    *_points("gru", "float32", "training", (100, 7, 33), (64, 96, 640, 400)),
    *_points("lstm", "float16", "training", (256, 45, 160)),  # cuDNN's small-H kernel at its worst
    *_points("lstm", "float16", "inference", (256, 45, 160, 80)),
    *_points("gru", "float16", "inference", (256, 16, 128)),
    *_points("gru rnn", "bfloat16", "forward", (100, 32, 512)),
    *_points("lstm gru rnn", "float32 tfloat32", "forward", (100, 32, 256)),
    *_points("gru rnn", "float16", "streaming", (1, 1, 1024)),
    *_points("lstm", "float16", "streaming", (1, 32, 1024), (1, 1, 128), (1, 256, 512)),
    *_points("lstm", "tfloat32", "streaming", (1, 8, 512), layers=4),
]

# along one size; the picture of microseconds a step over H is drawn from the first of these
SWEEP_B, SWEEP_T = 16, 256
SWEEP_H = (32, 64, 128, 192, 256, 384, 512, 640, 768, 1024, 1536, 2048)
_FEW_H = (64, 128, 256, 512, 1024, 2048)


def _over_h(cells: str, dtypes: str, modes: str, sizes: tuple[int, ...]) -> list[Shape]:
    return _points(cells, dtypes, modes, *((SWEEP_T, SWEEP_B, H) for H in sizes))


SWEEPS: list[Shape] = [
    *_over_h("lstm", "float16", _BOTH, SWEEP_H),
    *_over_h("gru", "float16", "inference", SWEEP_H),
    *_points("lstm", "float16", "inference", *((100, B, 512) for B in (1, 4, 8, 16, 64, 128, 256))),
    *_over_h("lstm", "bfloat16", "inference", _FEW_H),
    *_points("gru", "float16", "training", *((100, B, 512) for B in (1, 4, 8, 16, 64, 128, 256))),
    *_points("lstm", "float16", "inference", *((T, 32, 256) for T in (16, 50, 100, 512, 1024))),
    *_over_h("lstm gru", "tfloat32", "inference", (64, 256, 512, 1024)),
    *_over_h("gru", "float16 bfloat16", "training", (64, 256, 512, 1024)),
    *_over_h("rnn", "float16", _BOTH, (64, 256, 512, 1024)),
    *_over_h("gru rnn", "bfloat16", "inference", (64, 256, 512, 1024)),
    *_over_h("lstm gru rnn", "float32", "inference", (64, 256, 512, 1024)),
    *_over_h("lstm", "bfloat16 tfloat32 float32", "training", (64, 256, 1024)),
    *_over_h("rnn", "tfloat32", "inference", (64, 256, 1024)),
    *_points("rnn", "float16", "forward", (100, 32, 512)),
    *_points("gru rnn", "tfloat32", "streaming", (1, 8, 512)),
    *_points("rnn", "bfloat16", "streaming", (1, 8, 512)),
]

# the points of the CPU's grid, so that both can be laid side by side
CPU: list[Shape] = [shape for shape in shapes.every() if shape.dtype not in NO_ENGINE]

# the least of everything: does it run and agree?
SMOKE: list[Shape] = [
    *_points("lstm", _ALL, "training", (20, 8, 64)),
    *_points("gru rnn", "float16", "inference", (20, 8, 64)),
    *_points("gru", "float16", "forward", (20, 8, 64)),
    *_points("lstm", "float16", "streaming", (1, 1, 64)),
    *_points("lstm", "float16", "training", (20, 8, 64), packed=True),
    *_points("gru", "float16", "training", (20, 8, 64), layers=4),
    *_points("rnn", "float16", "training", (20, 8, 64), bidirectional=True),
]

GRID: list[Shape] = _unique(SPREAD, ONCHIP, GOALS, SWEEPS, CPU, SMOKE)
RANKS: dict[Shape, int] = {shape: rank for rank, shape in enumerate(GRID, 1)}
UNABLE: dict[Shape, str] = {
    shape: NO_ENGINE[shape.dtype] for shape in shapes.every() if shape.dtype in NO_ENGINE
}
SETS: dict[str, list[Shape]] = {
    "full": GRID,
    "spread": SPREAD,
    "onchip": ONCHIP,
    "goals": GOALS,
    "sweeps": SWEEPS,
    "cpu": CPU,
    "smoke": SMOKE,
}


def select(words: Iterable[str]) -> list[Shape]:
    """Points of the named sets, or whose names match the patterns, by rank; ValueError if none."""
    chosen: set[Shape] = set()
    for word in words:
        found = SETS.get(word) or [shape for shape in GRID if fnmatch.fnmatch(shape.name, word)]
        if not found:
            raise ValueError(
                f"bench: no GPU set or point is called {word!r}; "
                "`python -m bench list --device cuda` names them"
            )
        chosen |= set(found)
    return [shape for shape in GRID if shape in chosen]


def rehearsal() -> list[Shape]:
    """The smallest point of every mode, dtype and feature, for a dry run."""
    kinds: list[tuple[str, object]] = [
        *(("mode", mode) for mode in shapes.MODES),
        *(("dtype", dtype) for dtype in DTYPES),
        *(("cell", cell) for cell in shapes.GATES),
        *(("packed", True), ("layers", 4), ("bidirectional", True)),
    ]

    def cost(shape: Shape) -> float:
        return shape.flops() * (30 if shape.dtype == "float16" else 1)  # slow on a CPU

    chosen = {
        min((s for s in GRID if getattr(s, name) == value), key=cost) for name, value in kinds
    }
    return [shape for shape in GRID if shape in chosen]
