"""Pictures of a GPU's result file: times faster by group of shapes, microseconds a step over H."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt  # after plot.py has chosen the backend, whose default would do too

from . import gpu_shapes
from .gpu_report import DTYPES, Point, caption, points_of
from .plot import FAINT, FASTER, FONT, MARK, SLOWER, TEXT, margins, save, wrapped
from .shapes import GATES, MODES, Shape
from .table import geometric_mean, load, ratio

MARKERS = {"float16": "o", "bfloat16": "D", "tfloat32": "s", "float32": "^"}
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN", "indrnn": "IndRNN"}
ROW = 0.27  # inches


def feature(shape: Shape) -> str:
    """The one group that a point is drawn in."""
    if shape.packed:
        return "packed"
    if shape.bidirectional:
        return "bidirectional"
    if shape.layers > 1:
        return "layers"
    if shape.B > 64:
        return "B over 64"
    if shape.H % 32 or shape.input_size != shape.H:
        return "odd sizes"
    return ""


def group(p: Point) -> tuple[str, str]:
    return p.shape.cell, feature(p.shape)


FEATURES = ("", "B over 64", "odd sizes", "layers", "bidirectional", "packed")


def octaves(axis: Any, low: float, high: float) -> None:
    """Ticks at powers of two, written as 1/4, 1, 4."""
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    every = max(1, len(powers) // 5)
    chosen = [k for k in powers if k % every == 0]
    axis.set_ticks(
        [2.0**k for k in chosen], [f"{2**k}" if k >= 0 else f"1/{2**-k}" for k in chosen]
    )
    axis.set_ticks([], minor=True)


def plain_axes(axes: Any) -> None:
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelcolor="#555555", labelsize=8)
    axes.set_axisbelow(True)


def ratio_picture(header: dict[str, Any], points: list[Point], path: Path) -> None:
    """A panel a mode, a line a group, a mark a point, a bar at the group's geometric mean."""
    told = [(p, p.ratio) for p in points if p.ratio is not None]
    present = {group(p) for p, _ in told}
    names = [(cell, what) for cell in GATES for what in FEATURES if (cell, what) in present]
    modes = [mode for mode in MODES if any(p.shape.mode == mode for p, _ in told)]
    # a loop in torch is so slow that it would make the rest small: cut off, with its number
    values = [value for p, value in told if p.shape.cell != "indrnn"]
    low, high = min([0.7, *values]) / 1.25, max([1.5, *values]) * 1.25
    figure, panels = plt.subplots(
        1,
        len(modes),
        sharey=True,
        squeeze=False,
        figsize=(2.6 + 2.3 * len(modes), 1.9 + ROW * len(names)),
    )
    for axes, mode in zip(panels[0], modes, strict=True):
        plain_axes(axes)
        axes.set_xscale("log", base=2)
        axes.set_xlim(low, high)
        axes.set_ylim(len(names) - 0.4, -0.6)
        octaves(axes.xaxis, low, high)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        here = [(p, value) for p, value in told if p.shape.mode == mode]
        for y, name in enumerate(names):
            axes.axhline(y + 0.5, color=FAINT, linewidth=0.5)
            members = [(p, value) for p, value in here if group(p) == name]
            for p, value in members:
                place = y + 0.16 * (DTYPES.index(p.shape.dtype) - 1.5)
                axes.plot(
                    min(max(value, low), high / 1.04),
                    place,
                    MARKERS[p.shape.dtype],
                    color=FASTER if value >= 1 else SLOWER,
                    markersize=4.2,
                    alpha=0.75,
                    markeredgewidth=0,
                )
            if members:
                mean = geometric_mean(value for _, value in members)
                if low < mean < high:
                    bar = [y - 0.4, y + 0.4]
                    axes.plot([mean, mean], bar, color=MARK, linewidth=1.8, zorder=1.5)
                else:
                    axes.text(high / 1.12, y, ratio(mean), ha="right", va="center", color=MARK)
        axes.axvline(1, color=TEXT, linewidth=1.1)
        against = [value for p, value in here if p.rival == "torch.nn"]
        title = f"{mode}\n{len(against)} points, mean {ratio(geometric_mean(against))}"
        axes.set_title(title if against else mode, fontsize=9, loc="left")
    panels[0][0].set_yticks(range(len(names)), [f"{CELLS[c]}  {w}".strip() for c, w in names])
    panels[0][0].tick_params(axis="y", labelcolor=TEXT, labelsize=9)
    for dtype, marker in MARKERS.items():
        panels[0][-1].plot([], [], marker, color="#777777", markersize=5, label=dtype)
    panels[0][-1].plot([], [], color=MARK, linewidth=1.8, label="mean of a line")
    foot = [
        "time of torch.nn (cuDNN) over time of rnnfast on the device: right of the line rnnfast is "
        "faster; IndRNN against a loop in torch, cut off, and in no mean of a mode",
        absent(header),
        caption(header),
    ]
    width = int(15 * figure.get_figwidth())
    margins(figure, "How many times faster", [w for line in foot for w in wrapped(line, width)])
    figure.legend(
        *panels[0][-1].get_legend_handles_labels(),
        loc="upper right",
        bbox_to_anchor=(0.99, 1.0),
        ncols=5,
        frameon=False,
        fontsize=8,
        handletextpad=0.2,
        columnspacing=1.0,
    )
    save(figure, path)


def absent(header: dict[str, Any]) -> str:
    count = sum(map(len, header["not_measured"].values()))
    return f"not measured: {count} points"


def swept(points: list[Point]) -> list[Point]:
    """Points along H, at one T and B and nothing else to them."""
    return [
        p
        for p in points
        if (p.shape.T, p.shape.B) == (gpu_shapes.SWEEP_T, gpu_shapes.SWEEP_B)
        and p.shape.mode in ("inference", "training")
        and feature(p.shape) == ""
    ]


def step_picture(header: dict[str, Any], points: list[Point], path: Path) -> None:
    """Microseconds a step over H: a line of panels for each cell and mode, one for each dtype."""
    names = [
        (cell, mode)
        for cell in GATES
        for mode in ("inference", "training")
        if any((p.shape.cell, p.shape.mode) == (cell, mode) for p in points)
    ]
    dtypes = [dtype for dtype in DTYPES if any(p.shape.dtype == dtype for p in points)]
    figure, panels = plt.subplots(
        len(names),
        len(dtypes),
        sharex=True,
        sharey="row",
        squeeze=False,
        figsize=(1.4 + 2.3 * len(dtypes), 1.9 + 1.55 * len(names)),
    )
    for row, (cell, mode) in zip(panels, names, strict=True):
        for axes, dtype in zip(row, dtypes, strict=True):
            plain_axes(axes)
            axes.grid(color=FAINT, linewidth=0.6)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            here = sorted(
                (
                    p
                    for p in points
                    if (p.shape.cell, p.shape.mode, p.shape.dtype) == (cell, mode, dtype)
                ),
                key=lambda p: p.shape.H,
            )
            for label, style, pick in LINES:
                told = [(p.shape.H, value) for p in here if (value := pick(p))]
                wide = [H for H, _ in told]
                us = [1e3 * value / gpu_shapes.SWEEP_T for _, value in told]
                axes.plot(wide, us, label=label, **style)
            if not here:
                axes.set_axis_off()
        row[0].set_ylabel(f"{CELLS[cell]} {mode}", fontsize=9, color=TEXT)
        # the lowest floor may leave the picture, or the lines would lie on each other
        shown = [p for p in points if (p.shape.cell, p.shape.mode) == (cell, mode)]
        others = ("torch.nn", "rnnfast[onchip]")
        values = [v for p in shown for v in (p.ours, *map(p.ms, others), p.floor) if v]
        low, high = (1e3 * v / gpu_shapes.SWEEP_T for v in (min(values) / 2, max(values) * 1.4))
        row[0].set_ylim(low, high)
        octaves(row[0].yaxis, low, high)
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        axes.set_title(dtype, fontsize=9, loc="left")
    wide = [p.shape.H for p in points]
    for column in panels.T:
        octaves(column[-1].xaxis, min(wide), max(wide))
        lowest = [axes for axes in column if axes.axison][-1]
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel("H", fontsize=8, color="#555555")
    title = f"Microseconds a step, T {gpu_shapes.SWEEP_T}, B {gpu_shapes.SWEEP_B}"
    foot = [
        "",
        "floor of any engine: operations and bytes; of a step engine: two dependent launches a "
        "step besides",
        caption(header),
    ]
    width = int(15 * figure.get_figwidth())
    lines = [w for line in foot for w in wrapped(line, width)]
    margins(figure, title, lines)
    figure.subplots_adjust(left=0.95 / figure.get_figwidth(), hspace=0.22)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.005, 1 - 0.34 / figure.get_figheight()),
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    save(figure, path)


def anyone(p: Point) -> float:
    floors = p.row["floors"]
    return float(max(floors["operations_ms"], floors["bytes_ms"]))


LINES: list[tuple[str, dict[str, Any], Any]] = [
    ("rnnfast", {"color": FASTER, "marker": "o", "markersize": 3.5}, lambda p: p.ours),
    (
        "rnnfast on chip",
        {"color": MARK, "marker": "D", "markersize": 3},
        lambda p: p.ms("rnnfast[onchip]"),
    ),
    (
        "torch.nn (cuDNN)",
        {"color": SLOWER, "marker": "s", "markersize": 3.5},
        lambda p: p.ms("torch.nn"),
    ),
    (
        "floor of a step engine",
        {"color": "#777777", "linestyle": "--", "linewidth": 1},
        lambda p: p.floor,
    ),
    ("floor of any engine", {"color": "#777777", "linestyle": ":", "linewidth": 1}, anyone),
]


def draw(source: Path, folder: Path) -> list[Path]:
    """Writes NAME-ratios.png and, where points along H were measured, NAME-steps.png."""
    results = load(source)
    points = points_of(results["rows"])
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(FONT):
        for name, part, picture in (
            ("ratios", points, ratio_picture),
            ("steps", swept(points), step_picture),
        ):
            if part:
                path = folder / f"{source.stem}-{name}.png"
                picture(results["header"], part, path)
                written.append(path)
    return written
