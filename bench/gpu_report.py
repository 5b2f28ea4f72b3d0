"""Result files of a GPU as text: every point, geometric means, and what is missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .gpu_floor import floor_ms
from .shapes import MODES, Shape
from .table import geometric_mean, load, mean_and_least, ms, percent, ratio, render, shape_of

Row = dict[str, Any]
DTYPES = ("float16", "bfloat16", "tfloat32", "float32")  # in the order of the tables
RIVALS = ("torch.nn", "torch loop")  # whoever is there is held against our plain call
# our kernels by the contestants that force them; the first two are the step engine's launches
KERNELS = {"rnnfast plain": "step", "rnnfast pdl": "step, pdl", "rnnfast[onchip]": "onchip"}
CHOICE = 1.1  # the library's choice may take this much of the best kernel's time
# Microseconds a step that a layer of at most so many units is meant to take forward, in 16 bits
# and up to 32 sequences; with backward, so many times that. Against cuDNN: the mean.
GOALS, GOAL_B, GOAL_TRAINING, GOAL_RATIO = ((64, 0.45), (128, 0.70)), 32, 2.7, 1.5


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

    def us(self, name: str) -> float | None:
        """Of a step."""
        found = self.ms(name)
        return 1e3 * found / self.shape.T / self.shape.layers if found else None

    @property
    def kernels(self) -> dict[str, float]:
        """ms of each kernel that was forced and served."""
        told = {kernel: self.ms(name) for name, kernel in KERNELS.items()}
        return {kernel: ms for kernel, ms in told.items() if ms}

    @property
    def best_kernel(self) -> str:
        """The fastest of them; nobody where there was no choice."""
        found = self.kernels
        return min(found, key=lambda kernel: found[kernel]) if len(found) > 1 else ""

    @property
    def best_ms(self) -> float:
        return self.kernels[self.best_kernel] if self.best_kernel else self.ours

    @property
    def chosen(self) -> str:
        """The kernel that ran where none was forced, as the library told it."""
        ran = str(self.row["contestants"][self.row["ours"]].get("ran", ""))
        return ran.partition("kernel=")[2].partition(" ")[0]

    @property
    def best_us(self) -> float:
        """Of a step."""
        return 1e3 * self.best_ms / self.shape.T / self.shape.layers

    @property
    def best_ratio(self) -> float | None:
        """The rival's time over that of our best kernel."""
        found = self.ms(self.rival)
        return found / self.best_ms if found else None

    @property
    def goal(self) -> float | None:
        """Microseconds a step, where there is one."""
        s = self.shape
        plain = s.layers == 1 and not s.bidirectional and not s.packed and s.cell != "indrnn"
        if s.dtype not in DTYPES[:2] or s.B > GOAL_B or s.mode == "streaming" or not plain:
            return None
        forward = next((us for most, us in GOALS if most >= s.H), None)
        return forward and forward * (GOAL_TRAINING if s.mode == "training" else 1)

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


def kernel_table(points: list[Point], markdown: bool) -> str:
    """Microseconds a step by each kernel, and the library's choice among them."""
    head = ["point", "chosen", *KERNELS.values(), "torch.nn", "its graph", "best", "chosen/best"]
    head += ["best faster", "goal"]
    body = []
    for p in points:
        cells = [f"{p.label} {p.shape.mode}", ms(p.us_a_step)]
        cells += [maybe(p.us(name), ms) for name in (*KERNELS, p.rival, "torch.nn graph")]
        cells += [p.best_kernel, ratio(p.ours / p.best_ms), maybe(p.best_ratio, ratio)]
        met = "met" if p.goal and p.best_us <= p.goal else "missed"
        cells.append(f"{p.goal:.2f} {met}" if p.goal else "")
        body.append(cells)
    return render(head, body, markdown)


def choices(points: list[Point]) -> str:
    """Where the library's choice is not within 10 % of the best kernel, and the goals; of points
    at which there was a choice."""
    told = [p for p in points if "onchip" in p.kernels]
    if not told:
        return ""
    worse = [p for p in told if p.ours > CHOICE * p.best_ms]
    lines = [
        f"The kernel that the library chooses is within {percent(CHOICE - 1)} of the best at "
        f"{len(told) - len(worse)} of {len(told)} points" + (", and not at:" if worse else ".")
    ]
    for p in sorted(worse, key=lambda p: p.best_ms / p.ours):
        lines.append(
            f"- `{p.shape.name}`: best {p.best_kernel}, {ms(p.best_us)} us a step, "
            f"chosen {p.chosen or '?'}, {ms(p.us_a_step)}: {ratio(p.ours / p.best_ms)}"
        )
    aimed = [p for p in told if p.goal]
    met = sum(p.best_us <= (p.goal or 0) for p in aimed)
    lines.append(f"Goals a step, best kernel: {met} of {len(aimed)} met.")
    against = [value for p in told if (value := p.best_ratio) and p.rival == "torch.nn"]
    if against:
        lines.append(
            f"Best kernel against torch.nn, geometric mean: {ratio(geometric_mean(against))} of "
            f"{len(against)} points (goal {ratio(GOAL_RATIO)})."
        )
    return "\n".join(lines)


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
captured; plain and pdl are the step engine's. By kernel (--engine all): microseconds a step; best
the fastest kernel, chosen/best the time of the library's choice over its, best faster torch.nn's
over its, goal what a step is meant to take. Means are geometric, over every measured point; in
brackets the worst.
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
    parts += [text for text in [choices(points)] if text]
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
    told = [p for p in points if "onchip" in p.kernels]
    if told:
        heading = title.format("microseconds a step by kernel")
        parts.append(heading + "\n\n" + kernel_table(told, markdown))
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
        "onchip": p.over("rnnfast plain", "rnnfast[onchip]"),
    }
    parts = [f"{name} {ratio(value)}" for name, value in told.items() if value is not None]
    parts = [f"{ms(p.ours)} ms", *parts, f"{percent(p.share)} of the floor"]
    parts += [f"best {p.best_kernel} {ms(p.best_us)} us a step"] * bool(p.best_kernel)
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
