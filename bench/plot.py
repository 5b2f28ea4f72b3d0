"""Pictures of a result file: times faster than each peer, and nearness to the machine's limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

from .shapes import MODES
from .table import Line, caption, geometric_mean, lines_of, load, peer_names, ratio

# told apart by darkness as well as by hue, and slower bars are hatched besides
FASTER, SLOWER, TEXT, FAINT, MARK = "#1f5f99", "#e8a33d", "#222222", "#d9dde2", "#b3402e"
TITLES = {
    "torch.nn": "torch.nn",
    "torch.nn cell": "torch.nn's cell",
    "torch loop": "torch loop",
    "jax": "JAX lax.scan",
    "onnxruntime": "ONNX Runtime *",
    "openvino": "OpenVINO *",
}
FONT: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": TEXT,
    "axes.edgecolor": FAINT,
}
ROW, GAP = 0.235, 1.3  # inches a row; rows that a heading takes


def places(lines: list[Line]) -> tuple[list[float], dict[str, float], float]:
    """Height of each line's row (downwards), of each mode's heading, and of the whole."""
    heights: list[float] = []
    headings: dict[str, float] = {}
    y = 0.0
    for line in lines:
        if line.shape.mode not in headings:
            y += GAP * bool(headings)
            headings[line.shape.mode] = y
            y += 1
        heights.append(y)
        y += 1
    return heights, headings, y


def label(line: Line) -> str:
    cell = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN", "indrnn": "IndRNN"}[line.shape.cell]
    return f"{cell}  {line.shape.short}" + "  ~" * line.noisy


def frame(axes: Any, height: float) -> None:
    axes.set_ylim(height - 0.3, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", length=0, labelcolor="#555555", labelsize=8)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def name_rows(
    axes: Any, lines: list[Line], heights: list[float], headings: dict[str, float]
) -> None:
    axes.set_yticks(heights, [label(line) for line in lines])
    for mode, y in headings.items():
        axes.annotate(
            mode,
            (0, y),
            xycoords=("axes fraction", "data"),
            xytext=(-8, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontweight="bold",
        )


def margins(figure: Any, title: str, foot: list[str], right: float = 0.985) -> None:
    """Title above and caption below, at distances in inches whatever the height."""
    height = figure.get_figheight()
    top, bottom = 0.82, 0.36 + 0.16 * len(foot)
    figure.subplots_adjust(
        left=2.25 / figure.get_figwidth(),
        right=right,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=0.09,
    )
    figure.text(0.012, 1 - 0.16 / height, title, va="top", fontsize=12, fontweight="bold")
    for k, line in enumerate(reversed(foot)):
        figure.text(0.012, (0.12 + 0.16 * k) / height, line, fontsize=7.5, color="#555555")


def ratio_picture(results: dict[str, Any], path: Path) -> None:
    """A panel a peer: bars from 1, on a logarithmic axis that all panels share."""
    lines = lines_of(results["rows"])
    names = peer_names(lines)
    heights, headings, height = places(lines)
    values = [value for line in lines for value in line.ratios.values()]
    least, most = max(min([0.7, *values]), 1 / 8), min(max([2.0, *values]), 16)
    low, high = least / 1.2, most * (most / least) ** 0.3
    figure, panels = plt.subplots(
        1,
        len(names),
        sharey=True,
        squeeze=False,
        figsize=(2.4 + 1.75 * len(names), 1.5 + ROW * height),
    )
    for axes, name in zip(panels[0], names, strict=True):
        frame(axes, height)
        axes.set_xscale("log", base=2)
        axes.set_xlim(low, high)
        ticks = (
            [4.0**k for k in range(-1, 3)] if high / low > 16 else [2.0**k for k in range(-3, 5)]
        )
        axes.set_xticks([tick for tick in ticks if low < tick < high])
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
        )
        axes.xaxis.set_minor_locator(NullLocator())
        for line, y in zip(lines, heights, strict=True):
            value = line.ratios.get(name)
            if value is None:
                continue
            slower = value < 1
            axes.barh(
                y,
                min(max(value, least), most) - 1,
                left=1,
                height=0.66,
                color=SLOWER if slower else FASTER,
                hatch="////" if slower else None,
                edgecolor="white",
                linewidth=0,
            )
            axes.text(
                min(max(value, 1), most) * 1.06,
                y,
                ratio(value)[:-1],
                va="center",
                fontsize=7.5,
                color=TEXT,
            )
        axes.axvline(1, color=TEXT, linewidth=1.1)
        mean = geometric_mean(line.ratios[name] for line in lines if name in line.ratios)
        axes.set_title(f"{TITLES.get(name, name)}\nmean {ratio(mean)}", fontsize=9, loc="left")
    name_rows(panels[0][0], lines, heights, headings)
    foot = [
        "time of the peer over time of rnnfast: right of the line rnnfast is faster, "
        "hatched bars left of it: slower"
    ]
    if max(values) > most or min(values) < least:
        foot[0] += "; long bars are cut off, their numbers are not"
    starred = "* weights prepacked, held against a frozen layer of ours; mean: geometric"
    noisy = "; ~ noisy row" if any(line.noisy for line in lines) else ""
    width = int(15 * figure.get_figwidth())
    foot = [part for line in (*foot, starred + noisy) for part in wrapped(line, width)]
    foot += wrapped(caption(results["header"]), width)
    margins(figure, "How many times faster", foot)
    save(figure, path)


def limit_picture(results: dict[str, Any], path: Path) -> None:
    """Share of the measured limit: ours as bars, the best peer as a mark."""
    lines = lines_of(results["rows"])
    heights, headings, height = places(lines)
    figure, axes = plt.subplots(figsize=(8.4, 1.5 + ROW * height))
    frame(axes, height)
    top = 1.0
    for line, y in zip(lines, heights, strict=True):
        axes.barh(y, line.share, height=0.66, color=FASTER)
        said = f"{100 * line.share:.0f}%"
        beside: Any = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
        axes.annotate(said, (1.07, y), ha="right", fontweight="bold", **beside)
        top = max(top, line.share)
        if line.best_peer:
            name = line.best_peer[0]
            row = line.frozen if line.frozen and name in line.frozen["peers"] else line.plain
            assert row is not None
            share = row["limit_ms"] / row["peers"][name]
            axes.plot(share, y, marker="D", markersize=4.5, color=MARK, markeredgecolor="white")
            plain_name = TITLES.get(name, name).rstrip(" *")
            axes.annotate(f"{100 * share:.0f}%", (1.15, y), ha="right", color=MARK, **beside)
            axes.annotate(plain_name, (1.165, y), ha="left", color=MARK, **beside)
            top = max(top, share)
    axes.set_xlim(0, top * 1.01)
    axes.axvline(1, color=TEXT, linewidth=1.1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
    axes.plot([], [], "s", color=FASTER, markersize=7, label="rnnfast (inference: frozen)")
    axes.plot([], [], "D", color=MARK, markersize=4.5, label="best peer")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, fontsize=8.5)
    name_rows(axes, lines, heights, headings)
    foot = [
        "limit: the greater of operations / measured multiply-add peak and "
        "bytes of weights / measured read bandwidth",
        *wrapped(caption(results["header"]), 125),
    ]
    margins(figure, "Share of the machine's limit", foot, right=0.78)
    save(figure, path)


def wrapped(text: str, width: int) -> list[str]:
    """Words in lines of at most `width` letters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def draw(source: Path, folder: Path) -> list[Path]:
    """Writes NAME-ratios.png and NAME-limit.png for a result file.

    Files with more than 40 shapes get a pair of pictures a mode.
    """
    results = load(source)
    folder.mkdir(parents=True, exist_ok=True)
    lines = lines_of(results["rows"])
    plain = [row for row in results["rows"] if row["dtype"] == "float32"]
    groups = {"": plain}
    if len(lines) > 40:
        groups = {f"-{mode}": [row for row in plain if row["mode"] == mode] for mode in MODES}
    for dtype in dict.fromkeys(row["dtype"] for row in results["rows"]):
        if dtype != "float32":
            groups[f"-{dtype}"] = [row for row in results["rows"] if row["dtype"] == dtype]
    written = []
    with plt.rc_context(FONT):
        for suffix, rows in groups.items():
            if not rows:
                continue
            part = {"header": results["header"], "rows": rows}
            for kind, picture in (("ratios", ratio_picture), ("limit", limit_picture)):
                path = folder / f"{source.stem}{suffix}-{kind}.png"
                picture(part, path)
                written.append(path)
    return written
