"""Linear recurrences and MinGRU as T grows, against the ways that PyTorch has: ``python -m
bench.scan [--rounds N] [--most T] [--out FOLDER]``. Prints two tables; with --out also writes
scan.json and scan.png there.

a and b are positive, as the paper's log-space form needs them. Of torch's, ``associative_scan`` is
compiled up to T = 1024 and a loop up to T = 256, whose compiling takes minutes beyond.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from tqdm import tqdm

import rnnfast
from rnnfast.functional import linear_scan

from .extras import median_ms
from .table import render

B, H = 4, 64
STEPS = (64, 256, 1024, 4096, 16384, 65536)
MOST_COMPILED, MOST_UNROLLED = 1024, 256
OURS = "rnnfast"

Way = Callable[[Tensor, Tensor], Tensor]


def loop(a: Tensor, b: Tensor) -> Tensor:
    h = torch.zeros_like(b[0])
    steps = []
    for factor, added in zip(a.unbind(0), b.unbind(0)):
        h = torch.addcmul(added, factor, h)
        steps.append(h)
    return torch.stack(steps)


def log_space(a: Tensor, b: Tensor) -> Tensor:
    """Feng et al. 2024, appendix B: Heinsen's cumulative sums of logarithms."""
    so_far = torch.cumsum(torch.log(a), 0)
    return torch.exp(so_far + torch.logcumsumexp(torch.log(b) - so_far, 0))


def associative(a: Tensor, b: Tensor) -> Tensor:
    def join(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return associative_scan(join, (a, b), 0, combine_mode="generic")[1]  # type: ignore[no-any-return]


def ways(T: int) -> dict[str, Way]:
    found: dict[str, Way] = {OURS: linear_scan, "loop": loop}
    if T <= MOST_UNROLLED:
        found["compiled loop"] = torch.compile(loop, dynamic=False)
    found["log-space, compiled"] = torch.compile(log_space, dynamic=False)
    scan = associative if T > MOST_COMPILED else torch.compile(associative, dynamic=False)
    found["associative_scan"] = scan
    return found


def gates(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    k, n = F.linear(x, w, b).chunk(2, -1)
    z = torch.sigmoid(k)
    return 1 - z, z * torch.where(n >= 0, n + 0.5, torch.sigmoid(n))


def called(run: Callable[..., Tensor], args: tuple[Tensor, ...], training: bool) -> Any:
    if not training:
        with torch.no_grad():
            return run(*args)
    h = run(*args)
    return torch.autograd.grad(h, args, torch.ones_like(h))


def measured(
    runs: dict[str, Callable[..., Tensor]], args: tuple[Tensor, ...], training: bool, rounds: int
) -> dict[str, float]:
    """Median ms of all that agree and run at all."""
    want = called(runs[OURS], args, False).double()
    calls: dict[str, Callable[[], Any]] = {}
    for name, run in runs.items():
        try:
            error = (called(run, args, False).double() - want).abs().max() / want.abs().max()
            if training:
                called(run, args, True)
        except Exception as failure:  # of a peer, whatever it is
            print(f"{name}: {type(failure).__name__}", file=sys.stderr)
            continue
        if not error < (0.05 if name.startswith("log") else 1e-4):
            print(f"{name}: off by {float(error):.1e}", file=sys.stderr)
            continue
        calls[name] = lambda run=run: called(run, args, training)  # type: ignore[misc]
    return median_ms(calls, rounds)


def point(what: str, T: int, training: bool, rounds: int) -> dict[str, float]:
    torch._dynamo.reset()
    gen = torch.Generator().manual_seed(0)
    if what == "linear_scan":
        a = torch.rand(T, B, H, generator=gen) * 0.9 + 0.05
        b = torch.rand(T, B, H, generator=gen)
        args: tuple[Tensor, ...] = tuple(t.requires_grad_(training) for t in (a, b))
        return measured(dict(ways(T)), args, training, rounds)
    layer = rnnfast.MinGRU(H, H)
    x = torch.randn(T, B, H, generator=gen)
    args = (x, *(p.detach() for p in layer.parameters()))
    args = tuple(t.requires_grad_(training) for t in args)
    compiled = torch.compile(gates, dynamic=False)
    runs: dict[str, Callable[..., Tensor]] = {
        OURS: lambda x, w, b: rnnfast.functional.min_gru(x, None, [w, b])[0]
    }
    for name, way in ways(T).items():
        label = "torch's gates, linear_scan" if name == OURS else name
        runs[label] = lambda x, w, b, way=way: way(*compiled(x, w, b))  # type: ignore[misc]
    return measured(runs, args, training, rounds)


def bandwidth(rounds: int) -> dict[str, float]:
    """GB/s of forward, backward and torch.add over numbers that no cache holds: the best of all
    rounds, since a neighbour can only take from it."""
    T, N = 16384, 256
    a, b, out = (torch.rand(T, 1, N) for _ in range(3))
    scan, backward = torch.ops.rnnfast.scan.default, torch.ops.rnnfast.scan_backward.default
    calls: dict[str, tuple[int, Callable[[], Any]]] = {  # numbers moved for each element
        "add": (3, lambda: torch.add(a, b, out=out)),
        "forward": (3, lambda: scan(a, b, None, False)),
        "backward": (5, lambda: backward(b, a, h, None, False, 3)),
    }
    best = dict.fromkeys(calls, 0.0)
    with torch.inference_mode():
        h = scan(a, b, None, False)
        for _ in range(3 * rounds):
            for name, (numbers, call) in calls.items():
                start = time.perf_counter()
                call()
                seconds = time.perf_counter() - start
                best[name] = max(best[name], numbers * 4e-9 * T * N / seconds)
    return best


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    styles = {
        OURS: ("#1f5f99", "-", "o", 2.2),
        "torch's gates, linear_scan": ("#1f5f99", ":", "", 1.2),
    }
    others = (("#b3402e", "-"), ("#b3402e", "--"), ("#e8a33d", "-"), ("#777777", "-."))
    panels = list(dict.fromkeys((row["what"], row["mode"]) for row in rows))
    figure, all_axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.3), sharey=True)
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    rest = [name for name in names if name not in styles]
    for axes, (what, mode) in zip(all_axes, panels, strict=True):
        chosen = [row for row in rows if (row["what"], row["mode"]) == (what, mode)]
        for name in names:
            points = [(row["T"], row["ms"][name]) for row in chosen if name in row["ms"]]
            if not points:
                continue
            if name in styles:
                color, line, marker, width = styles[name]
            else:
                (color, line), marker, width = others[rest.index(name) % len(others)], "", 1.3
            axes.plot(*zip(*points), line, color=color, marker=marker, linewidth=width, label=name)
        axes.set(xscale="log", yscale="log", title=f"{what}, {mode}", xlabel="T")
        axes.grid(color="#d9dde2", linewidth=0.6)
        axes.tick_params(labelsize=8)
    all_axes[0].set_ylabel("ms")
    handles = {h.get_label(): h for axes in all_axes for h in axes.get_lines()}
    figure.legend(
        handles.values(), handles.keys(), loc="lower center", ncols=6, fontsize=8, frameon=False
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)


def show(rows: list[dict[str, Any]], markdown: bool) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["ms"] if name != OURS))
    table = []
    for row in rows:
        ours = row["ms"][OURS]
        found = [f"{row['ms'][n] / ours:.1f}x" if n in row["ms"] else "" for n in names]
        table.append([row["what"], row["mode"], str(row["T"]), f"{ours:.3f}", *found])
    return render(["what", "mode", "T", "ours ms", *names], table, markdown)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scan", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--most", type=int, default=STEPS[-1], metavar="T")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--out", type=Path, help="a folder for scan.json and scan.png")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    points = [
        (what, mode, T)
        for what in ("linear_scan", "MinGRU")
        for mode in ("inference", "training")
        for T in STEPS
        if options.most >= T
    ]
    for what, mode, T in tqdm(points, unit="point", file=sys.stderr, dynamic_ncols=True):
        ms = point(what, T, mode == "training", options.rounds)
        rows.append({"what": what, "mode": mode, "T": T, "B": B, "H": H, "ms": ms})
    rates = bandwidth(options.rounds)
    print(show(rows, options.markdown))
    print(
        f"\nmemory, {options.threads} threads: torch.add {rates['add']:.1f} GB/s, scan "
        f"{rates['forward']:.1f}, backward {rates['backward']:.1f}"
    )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        found = {"torch": torch.__version__, "threads": options.threads, "rates": rates}
        (options.out / "scan.json").write_text(json.dumps(found | {"rows": rows}) + "\n")
        picture(rows, options.out / "scan.png")
        print(f"written: {options.out / 'scan.json'}, {options.out / 'scan.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
