"""Result files as tables: a line a shape, then geometric means and the worst, by mode and cell."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .shapes import GATES, MODES, Shape

Row = dict[str, Any]


@dataclass
class Line:
    """The rows of one shape put together: our plain layer, and the frozen one."""

    shape: Shape
    plain: Row | None = None
    frozen: Row | None = None
    ratios: dict[str, float] = field(
        default_factory=dict
    )  # peer ms / ms of ours it is held against

    @property
    def best(self) -> Row:
        """The row of ours that has least to do: frozen where there is one."""
        row = self.frozen or self.plain
        assert row is not None
        return row

    @property
    def noisy(self) -> bool:
        return any(row["noisy"] for row in (self.plain, self.frozen) if row)

    @property
    def share(self) -> float:
        """Of the measured limit."""
        return self.best["limit_ms"] / self.best["ours_ms"]

    @property
    def best_peer(self) -> tuple[str, float] | None:
        """The peer that comes closest to us, or leads us most."""
        rivals = {
            name: ratio
            for name, ratio in self.ratios.items()
            if "[" not in name and not name.startswith("rnnfast")
        }
        return min(rivals.items(), key=lambda item: item[1]) if rivals else None


def shape_of(row: Row) -> Shape:
    names = ("cell", "mode", "dtype", "T", "B", "H", "layers", "bidirectional", "packed")
    values = {name: row[name] for name in names}
    return Shape(**values, I=0 if row["I"] == row["H"] else row["I"])


def lines_of(rows: Iterable[Row]) -> list[Line]:
    """Rows grouped by shape, by mode and cell, else in the order of the file."""
    lines: dict[Shape, Line] = {}
    for row in rows:
        shape = shape_of(row)
        line = lines.setdefault(shape, Line(shape))
        if row["frozen"]:
            line.frozen = row
        else:
            line.plain = row
        line.ratios |= {name: ms / row["ours_ms"] for name, ms in row["peers"].items()}
    cells = list(GATES)
    return sorted(
        lines.values(),
        key=lambda line: (MODES.index(line.shape.mode), cells.index(line.shape.cell)),
    )


def peer_names(lines: Iterable[Line]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line.ratios))


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def ms(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def ratio(value: float | None) -> str:
    if value is None:
        return ""
    return (
        f"{value:.0f}x" if value >= 99.5 else f"{value:.1f}x" if value >= 9.95 else f"{value:.2f}x"
    )


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def mean_and_least(values: list[float], form: Callable[[float], str]) -> str:
    return f"{form(geometric_mean(values))} ({form(min(values))})" if values else ""


def render(head: list[str], body: list[list[str]], markdown: bool, text_columns: int = 1) -> str:
    """Aligned columns, the first few to the left; or a table in Markdown."""
    if markdown:
        marks = ["---"] * text_columns + ["--:"] * (len(head) - text_columns)
        return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, marks, *body])
    widths = [max(len(cells[k]) for cells in [head, *body]) for k in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if k < text_columns else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, body)])


def shape_table(lines: list[Line], markdown: bool) -> str:
    """Times, speed, share of the limit, and how many times longer each peer takes."""
    names = peer_names(lines)
    any_frozen = any(line.frozen for line in lines)
    head = ["shape", "ms"] + ["frozen ms"] * any_frozen + ["GFLOP/s", "of limit", *names]
    body = []
    for line in lines:
        cells = [f"{line.shape.cell} {line.shape.short}" + " ~" * line.noisy]
        cells.append(ms(line.plain["ours_ms"]) if line.plain else "")
        if any_frozen:
            cells.append(ms(line.frozen["ours_ms"]) if line.frozen else "")
        cells.append(f"{line.shape.flops() / line.best['ours_ms'] / 1e6:.1f}")
        cells.append(percent(line.share))
        cells += [ratio(line.ratios.get(name)) for name in names]
        body.append(cells)
    return render(head, body, markdown)


def group_of(line: Line) -> str:
    """The cell, with its dtype where that is not float32: those are means of their own."""
    shape = line.shape
    return shape.cell if shape.dtype == "float32" else f"{shape.cell} {shape.dtype}"


def summary_table(lines: list[Line], markdown: bool) -> str:
    """Geometric mean and, in brackets, the least ratio to each peer, by mode and cell."""
    names = peer_names(lines)
    head = ["mode", "cell", "shapes", *names, "best peer", "at", "of limit"]
    body = []
    for mode in MODES:
        here = [line for line in lines if line.shape.mode == mode]
        cells = list(dict.fromkeys(group_of(line) for line in here))
        plain = [cell for cell in cells if cell in GATES]  # float32
        for cell in [*plain, *["all"] * (len(plain) > 1), *(c for c in cells if c not in plain)]:
            group = [
                line
                for line in here
                if cell == group_of(line) or (cell == "all" and group_of(line) in plain)
            ]
            row = [mode, cell, str(len(group))]
            for name in names:
                values = [line.ratios[name] for line in group if name in line.ratios]
                row.append(mean_and_least(values, ratio))
            best = [(line.best_peer[1], line) for line in group if line.best_peer]
            row.append(mean_and_least([value for value, _ in best], ratio))
            worst = min(best, key=lambda pair: pair[0])[1] if best else None
            row.append(
                f"{worst.shape.cell} {worst.shape.short}{' ~' * worst.noisy}" if worst else ""
            )
            row.append(mean_and_least([line.share for line in group], percent))
            body.append(row)
    return render(head, body, markdown, text_columns=2)


def caption(header: Row) -> str:
    """The machine, the date and the commit, for the foot of tables and plots."""
    versions = ", ".join(
        f"{name} {header['versions'][name]}"
        for name in ("rnnfast", "torch", "onnxruntime", "openvino", "jax")
        if name in header["versions"]
    )
    peak = header["limits"]["peak_gflops"]
    threads = f"{header['threads']} thread" + "s" * (header["threads"] != 1)
    return (
        f"{header['cpu']}, {threads}, float32 if not said, {header['date'][:10]}, "
        f"commit {header['commit']}; peak {peak:.0f} GFLOP/s; {versions}"
    )


def report(results: Row, markdown: bool = False) -> str:
    """Everything that `python -m bench compare` says at its end."""
    lines = lines_of(results["rows"])
    title = "### {}" if markdown else "{}"
    parts = [caption(results["header"])]
    for mode in MODES:
        chosen = [line for line in lines if line.shape.mode == mode]
        if chosen:
            parts.append(title.format(mode) + "\n\n" + shape_table(chosen, markdown))
    if lines:
        parts.append(title.format("geometric means") + "\n\n" + summary_table(lines, markdown))
    parts.append(
        "Peers: their time over ours, above 1 we are faster; onnxruntime, openvino and rnnfast\n"
        "float32 (ours in more bits) against our frozen layer, the others against the plain one;\n"
        "int8: all against the quantized layer. GFLOP/s and share of the limit: frozen where\n"
        "there is one. Summary: geometric mean, in brackets the least; best peer: the fastest at\n"
        "each shape, and the shape where it does best."
    )
    if any(line.noisy for line in lines):
        allowed = percent(results["header"]["agreement"])
        parts.append(f"~ noisy: the same layer entered twice differed by more than {allowed}.")
    said = [
        f"{name} ({', '.join(f'{why}: {count}' for why, count in reasons.items())})"
        for name, reasons in results["header"]["left_out"].items()
    ]
    if said:
        parts.append("Left out (reason: shapes): " + "; ".join(said))
    return "\n\n".join(parts)


def load(path: Path) -> Row:
    results = json.loads(path.read_text())
    if not isinstance(results, dict) or not {"header", "rows"} <= results.keys():
        raise ValueError(f"bench: {path.name} is not a result file of `python -m bench compare`")
    return results
