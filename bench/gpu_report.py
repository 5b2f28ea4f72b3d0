"""Result files of a GPU as text: every point, geometric means, and what is missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .gpu_floor import floor_ms
from .shapes import MODES, Shape
from .table import load, mean_and_least, ms, percent, ratio, render, shape_of

Row = dict[str, Any]
DTYPES = ("float16", "bfloat16", "tfloat32", "float32")  # in the order of the tables
RIVALS = ("torch.nn", "torch loop")  # whoever is there is held against our plain call


@dataclass(frozen=True)
class Point:
    """A row and what follows from it; None where somebody has no time."""

    row: Row

    @property
    def shape(self) -> Shape:
        return shape_of(self.row)

    def ms(self, name: str, clock: str = "ms") -> float | None:
        found = self.row["contestants"].get(name)
        return found[clock] if found else None

    @property
    def ours(self) -> float:
        return float(self.row["contestants"][self.row["ours"]]["ms"])

    @property
    def rival(self) -> str:
        return next((name for name in RIVALS if name in self.row["contestants"]), "")

    def over(self, slow: str, fast: str, clock: str = "ms") -> float | None:
        """How many times longer `slow` takes than `fast`."""
        one, other = self.ms(slow, clock), self.ms(fast, clock)
        return one / other if one and other else None

    @property
    def ratio(self) -> float | None:
        """The rival's time over ours on the device: the figure of the means and pictures."""
        return self.over(self.rival, self.row["ours"])

    @property
    def host_ratio(self) -> float | None:
        return self.over(self.rival, self.row["ours"], "host_ms")

    @property
    def graph_ratio(self) -> float | None:
        return self.over("torch.nn graph", "rnnfast graph")

    @property
    def pdl_gain(self) -> float | None:
        return self.over("rnnfast plain", "rnnfast pdl")

    @property
    def graph_gain(self) -> float | None:
        return self.over("rnnfast plain", "rnnfast graph")

    @property
    def graph_host_gain(self) -> float | None:
        return self.over("rnnfast plain", "rnnfast graph", "host_ms")

    @property
    def floor(self) -> float:
        return floor_ms(self.row["floors"])

    @property
    def share(self) -> float:
        return self.floor / self.ours

    @property
    def us_a_step(self) -> float:
        return 1e3 * self.ours / self.shape.T / self.shape.layers

    @property
    def label(self) -> str:
        return f"{self.shape.cell} {self.shape.short}" + " ~" * self.row["noisy"]


def points_of(rows: Iterable[Row]) -> list[Point]:
    """By mode and dtype, within them by rank."""
    return sorted(
        (Point(row) for row in rows),
        key=lambda p: (
            MODES.index(p.shape.mode),
            DTYPES.index(p.shape.dtype),
            p.row["rank"],
        ),
    )


def caption(header: Row) -> str:
    """The machine, the versions, the date and the commit."""
    ceilings = header["ceilings"]
    said = f"{header['gpu']}, driver {header['driver']}, CUDA {header['cuda']}, "
    said += f"cuDNN {header['cudnn']}, torch {header['torch']}, rnnfast {header['rnnfast']} "
    said += f"commit {header['commit']}, {header['date'][:10]}"
    if ceilings:
        peaks = ", ".join(f"{name} {rate:.0f}" for name, rate in ceilings["peak_tflops"].items())
        said += (
            f"; measured ceilings: TFLOP/s {peaks}; copy {ceilings['copy_gb_per_s']:.0f} GB/s; "
            f"kernel to kernel {ceilings['kernel_to_kernel_us']:.2f} us in a graph, "
            f"{ceilings['launch_to_launch_us']:.2f} us launched"
        )
    return said


def maybe(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else form(value)


def point_table(points: list[Point], markdown: bool) -> str:
    head = ["point", "rank", "ms", "host ms", "plain", "pdl", "graph", "torch.nn", "its graph"]
    head += ["faster", "host", "graphs", "us/step", "GFLOP", "MB", "launches"]
    head += ["operations", "bytes", "exchanges", "floor"]
    body = []
    for p in points:
        floors, mine = p.row["floors"], p.row["ours"]
        cells = [p.label, str(p.row["rank"]), ms(p.ours)]
        cells.append(maybe(p.ms(mine, "host_ms"), ms))
        for name in ("rnnfast plain", "rnnfast pdl", "rnnfast graph", p.rival, "torch.nn graph"):
            cells.append(maybe(p.ms(name), ms) + " (loop)" * (name == "torch loop"))
        cells += [maybe(value, ratio) for value in (p.ratio, p.host_ratio, p.graph_ratio)]
        cells += [ms(p.us_a_step), f"{floors['flops'] / 1e9:.3g}", f"{floors['bytes'] / 1e6:.3g}"]
        cells.append(str(floors["launches"]))
        cells += [ms(floors[f"{name}_ms"]) for name in ("operations", "bytes", "exchanges")]
        cells.append(percent(p.share))
        body.append(cells)
    return render(head, body, markdown)


def groups(points: list[Point]) -> list[tuple[str, str, list[Point]]]:
    """(mode, what, points): all of a mode, then by dtype; IndRNN, which cuDNN lacks, apart."""
    found = []
    for mode in MODES:
        here = [p for p in points if p.shape.mode == mode]
        plain = [p for p in here if p.shape.cell != "indrnn"]
        parts = [(dtype, [p for p in plain if p.shape.dtype == dtype]) for dtype in DTYPES]
        parts = [("all", plain), *parts, ("indrnn", [p for p in here if p not in plain])]
        found += [(mode, what, part) for what, part in parts if part]
    everything = [p for p in points if p.shape.cell != "indrnn"]
    return [("all", "all", everything), *found] if everything else found


def summary_table(points: list[Point], markdown: bool) -> str:
    """Geometric means over every measured point and, in brackets, the worst."""
    head = ["mode", "dtype", "points", "faster", "slower at", "worst", "host", "graphs"]
    head += ["pdl", "graph", "graph host", "of floor"]
    body = []
    for mode, what, part in groups(points):

        def mean(
            pick: Callable[[Point], float | None],
            form: Callable[[float], str] = ratio,
            part: list[Point] = part,
        ) -> str:
            return mean_and_least([v for p in part if (v := pick(p)) is not None], form)

        told = [(p.ratio, p) for p in part if p.ratio is not None]
        worst = min(told, key=lambda pair: pair[0])[1] if told else None
        body.append(
            [
                mode,
                what,
                str(len(part)) if len(told) == len(part) else f"{len(told)} of {len(part)}",
                mean(lambda p: p.ratio),
                str(sum(value < 1 for value, _ in told)),
                f"{worst.label} {worst.shape.mode * (mode == 'all')}".strip() if worst else "",
                mean(lambda p: p.host_ratio),
                mean(lambda p: p.graph_ratio),
                mean(lambda p: p.pdl_gain),
                mean(lambda p: p.graph_gain),
                mean(lambda p: p.graph_host_gain),
                mean(lambda p: p.share, percent),
            ]
        )
    return render(head, body, markdown, text_columns=2)


LEGEND = """\
Times are medians on the device's clock (CUDA events), L2 overwritten before each call; host: from
an idle device to an idle device on the host's clock. faster: torch.nn's time over ours, above 1 we
are faster (IndRNN, which cuDNN lacks: a loop in torch's); graphs: the same, both captured in a CUDA
graph. pdl, graph: our plain launches over programmatic dependent launch, and over our whole call
captured. Means are geometric, over every measured point; in brackets the worst.
floor: the greatest of operations / measured peak, bytes / measured bandwidth, and exchanges, two
dependent launches a step at the measured time from kernel to kernel; a kernel that stays on the
chip for all steps may pass the last of them (over 100%)."""


def missing(header: Row, markdown: bool, names: bool) -> str:
    """Who has no row and why: counts, or every name."""
    found: dict[str, list[str]] = header["not_measured"]
    count = sum(map(len, found.values()))
    lines = [f"Not measured: {count} points" + "." * (not found)]
    for reason, points in found.items():
        lines.append(f"- {reason}: {len(points)}")
        if names:
            tick = "`" if markdown else ""
            lines[-1] += " (" + ", ".join(f"{tick}{name}{tick}" for name in points) + ")"
    return "\n".join(lines)


def left_out(header: Row) -> str:
    lines = []
    for name, reasons in header["left_out"].items():
        lines += [f"- {name}: {why}: {count}" for why, count in reasons.items()]
    return "\n".join(["Left out (reason: points):", *lines]) if lines else ""


def summary(results: Row, markdown: bool = False) -> str:
    """What a run says at its end; `report` has every point as well."""
    header, points = results["header"], points_of(results["rows"])
    parts = [caption(header)]
    if points:
        parts.append(summary_table(points, markdown))
        if any(p.row["noisy"] for p in points):
            allowed = percent(header["agreement"])
            parts.append(f"~ noisy: the same layer entered twice differed by more than {allowed}.")
    parts.append(missing(header, markdown, names=False))
    return "\n\n".join(parts)


def report(results: Row, markdown: bool = False) -> str:
    """Everything: a table a mode, the means, the legend, who is missing and who was left out."""
    header, points = results["header"], points_of(results["rows"])
    title = "### {}" if markdown else "{}"
    parts = []
    for mode in MODES:
        for dtype in DTYPES:
            part = [p for p in points if (p.shape.mode, p.shape.dtype) == (mode, dtype)]
            if part:
                heading = title.format(f"{mode}, {dtype}")
                parts.append(heading + "\n\n" + point_table(part, markdown))
    parts.append(title.format("geometric means") + "\n\n" + summary(results, markdown))
    parts += [LEGEND, missing(header, markdown, names=True), left_out(header)]
    return "\n\n".join(part for part in parts if part)


def one_line(row: Row) -> str:
    """For the log."""
    p = Point(row)
    told = {
        p.rival: p.ratio,
        "host": p.host_ratio,
        "graphs": p.graph_ratio,
        "pdl": p.pdl_gain,
        "graph": p.graph_gain,
    }
    parts = [f"{name} {ratio(value)}" for name, value in told.items() if value is not None]
    parts = [f"{ms(p.ours)} ms", *parts, f"{percent(p.share)} of the floor"]
    return ", ".join(parts + ["noisy"] * row["noisy"])


def finish(path: Path) -> list[Path]:
    """Writes the report and the pictures beside a result file."""
    text = path.with_suffix(".md")
    text.write_text(report(load(path), markdown=True) + "\n")
    try:
        picture: Any = importlib.import_module("bench.gpu_plot")
    except ImportError:  # matplotlib is optional
        return [text]
    return [text, *picture.draw(path, path.parent)]
