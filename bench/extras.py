"""What a grid of times does not show: scaling with threads, gradients of single samples, the cost
of uneven lengths, memory, and what a call costs beside its kernel. ``python -m bench extras``
prints them as one table."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast

from .options import calls_of_options
from .table import render


@dataclass(frozen=True)
class Line:
    """One finding: what, at which shape, the figure, and what was hoped for."""

    what: str
    shape: str
    found: str
    goal: str


def sizes(T: int, B: int, H: int) -> str:
    return f"T{T} B{B} H{H}"


def compile_anew() -> None:
    """Forgets what was compiled, and lets Dynamo raise where it would run a function uncompiled, as
    it has too many versions of it: it counts those of all layers and shapes."""
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def median_ms(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median of each call, in rounds of a new order."""
    order = random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            calls[name]()
            start = time.perf_counter()
            calls[name]()
            found[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in found.items()}


def trained(layer: nn.Module, x: Any) -> Any:
    y = layer(x)[0]
    data = y.data if isinstance(y, PackedSequence) else y
    return torch.autograd.grad(data.sum(), list(layer.parameters()))


def scaling(rounds: int) -> list[Line]:
    """One thread against two."""
    lines = []
    for T, B, H in ((100, 64, 512), (50, 32, 256)):
        layer, x = rnnfast.LSTM(H, H), torch.randn(T, B, H)

        def run(threads: int, training: bool, layer: Any = layer, x: Any = x) -> Any:
            torch.set_num_threads(threads)
            if training:
                return trained(layer, x)
            with torch.inference_mode():
                return layer(x)

        for mode, training in (("inference", False), ("training", True)):
            ms = median_ms(
                {
                    "one": lambda training=training, run=run: run(1, training),  # type: ignore[misc]
                    "two": lambda training=training, run=run: run(2, training),  # type: ignore[misc]
                },
                rounds,
            )
            found = f"{ms['one'] / ms['two']:.2f}x"
            lines.append(Line(f"2 threads over 1, LSTM {mode}", sizes(T, B, H), found, "1.8x"))
    return lines


def uneven(rounds: int) -> list[Line]:
    """Lengths uniform in [T/2, T] against as many valid steps of equal length."""
    lines = []
    for cell, T, B, H in (("LSTM", 100, 32, 256), ("GRU", 100, 32, 256), ("LSTM", 100, 64, 512)):
        layer = getattr(rnnfast, cell)(H, H)
        lengths = torch.linspace(T, T // 2, B).round().long()
        even_T = round(int(lengths.sum()) / B)
        packed = pack_padded_sequence(torch.randn(T, B, H), lengths)
        even = torch.randn(even_T, B, H)
        steps = int(lengths.sum()) / (even_T * B)
        for mode in ("inference", "training"):

            def run(x: Any, mode: str = mode, layer: Any = layer) -> Any:
                if mode == "training":
                    return trained(layer, x)
                with torch.inference_mode():
                    return layer(x)

            ms = median_ms(
                {
                    "packed": lambda run=run, x=packed: run(x),  # type: ignore[misc]
                    "even": lambda run=run, x=even: run(x),  # type: ignore[misc]
                },
                rounds,
            )
            found = f"{ms['packed'] / ms['even'] / steps:.2f}x"
            what = f"uneven lengths over even ones, {cell} {mode}"
            lines.append(Line(what, sizes(T, B, H), found, "at most 1.1x"))
    return lines


def around_the_cell(rounds: int) -> list[Line]:
    """Options of the layers against what a user of torch.nn writes, and against no option."""
    lines = []
    for cell, T, B, H in (("LSTM", 100, 32, 256), ("GRU", 100, 32, 256)):
        compile_anew()
        for option, calls in calls_of_options(cell, T, B, H).items():
            ms = median_ms(calls, rounds)
            found = f"{ms['theirs'] / ms['ours']:.2f}x, {ms['ours'] / ms['without']:.2f} of none"
            what = f"{option} over torch.nn's way, {cell} training"
            lines.append(Line(what, sizes(T, B, H), found, "more than 1x"))
    return lines


def side_by_side(rounds: int) -> list[Line]:
    """Directions, and layers of a stack, at once against each of the other splits."""
    lines = []
    for cell, T, B, H, options, split in (
        ("LSTM", 100, 1, 64, {"num_layers": 2}, "layers"),
        ("GRU", 1000, 1, 64, {"num_layers": 2}, "layers"),
        ("LSTM", 100, 1, 256, {"num_layers": 2}, "layers"),
        ("LSTM", 100, 1, 256, {"bidirectional": True}, "directions"),
        ("GRU", 100, 16, 256, {"bidirectional": True}, "directions"),
    ):
        layer, x = getattr(rnnfast, cell)(H, H, **options), torch.randn(T, B, H)
        for mode in ("inference", "training"):

            def run(how: str | None, mode: str = mode, layer: Any = layer, x: Any = x) -> Any:
                with rnnfast.use_engine("auto" if how is None else "cpu", split=how):
                    if mode == "training":
                        return trained(layer, x)
                    with torch.inference_mode():
                        return layer(x)

            splits = ("serial", *(("batch",) if B > 1 else ()), "units", split)
            calls: dict[str, Callable[[], Any]] = {how: partial(run, how) for how in splits}
            calls["chosen"] = partial(run, None)
            ms = median_ms(calls, rounds)
            best = min(ms[how] for how in splits[:-1])
            found = f"{best / ms[split]:.2f}x, as chosen {best / ms['chosen']:.2f}x"
            what = f"{split} at once over the best of {', '.join(splits[:-1])}, {cell} {mode}"
            lines.append(Line(what, sizes(T, B, H), found, "the choice at least 1x"))
    return lines


def per_sample(rounds: int) -> list[Line]:
    """A gradient for every sample, ``vmap(grad)`` with its forward, against backward alone and a
    step of the whole batch, on one thread."""
    lines = []
    torch.set_num_threads(1)
    for cell, T, B, H in (("LSTM", 50, 64, 128), ("LSTM", 100, 32, 256), ("GRU", 20, 64, 32)):
        layer, xs = getattr(rnnfast, cell)(H, H), torch.randn(B, T, H)
        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        x = xs.transpose(0, 1).contiguous()

        def loss(parameters: Any, x: Any, layer: Any = layer) -> Any:
            return torch.func.functional_call(layer, parameters, (x,))[0].sum()

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
        kept = layer(x)[0].sum()
        weights = list(layer.parameters())
        ms = median_ms(
            {
                "each": partial(each, parameters, xs),
                "step": partial(trained, layer, x),
                "backward": partial(torch.autograd.grad, kept, weights, retain_graph=True),
            },
            rounds,
        )
        found = f"{ms['each'] / ms['backward']:.1f}x, {ms['each'] / ms['step']:.1f}x a step"
        what = f"per-sample gradients over a backward of the batch, {cell}"
        lines.append(Line(what, sizes(T, B, H), found, "at most 3x"))
    return lines


_PEAK = """
import sys, torch
kind, cell, T, B, H, save = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7])
module = __import__("rnnfast") if kind == "rnnfast" else torch.nn
layer, x = getattr(module, cell)(H, H), torch.randn(T, B, H)
small = torch.randn(2, 2, H)
def run(x):
    if not save:
        with torch.no_grad():
            return layer(x)
    layer(x)[0].sum().backward()
run(small)
def kib(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name + ":"))
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = kib("VmRSS")
run(x)
print(kib("VmHWM") - before)
"""


def memory() -> list[Line]:
    """How far a step raises the peak of the process, each in a process of its own."""
    lines: list[Line] = []
    if sys.platform != "linux":
        return lines
    for cell in ("LSTM", "GRU", "RNN"):
        for T, B, H in ((100, 64, 512), (512, 8, 128)):
            found = {}
            for save in (1, 0):
                for kind in ("rnnfast", "torch.nn"):
                    command = [sys.executable, "-c", _PEAK, kind, cell, T, B, H, save]
                    words = [str(word) for word in command]
                    done = subprocess.run(words, capture_output=True, text=True, check=True)
                    found[kind, save] = int(done.stdout) / 1024
            for save, mode in ((1, "training"), (0, "no_grad")):
                ours, theirs = found["rnnfast", save], found["torch.nn", save]
                text = f"{ours:.0f} MiB, torch.nn {theirs:.0f}"
                lines.append(
                    Line(f"peak memory, {cell} {mode}", sizes(T, B, H), text, "at most torch.nn's")
                )
    return lines


def overhead(rounds: int) -> list[Line]:
    """A step of a layer so small that only the call is left."""
    lines = []
    for cell in ("LSTM", "GRU", "RNN"):
        layer, x = getattr(rnnfast, cell)(4, 4).eval(), torch.randn(1, 4)
        state = layer.step(x)[1]
        state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        w = [p.detach() for p in layer.parameters()]
        h, c = (state[0], state[1]) if isinstance(state, tuple) else (state, None)
        arguments = (x[None], h[0], c, *w, None, None, None, None, layer_id(cell), False, False)

        def many(call: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> None:
                with torch.inference_mode():
                    for _ in range(1000):
                        call()

            return run

        operator = torch.ops.rnnfast.forward.default
        frozen = getattr(rnnfast, cell)(4, 4).freeze()
        ms = median_ms(
            {
                "frozen": many(lambda layer=frozen, x=x, s=state: layer.step(x, s)),  # type: ignore[misc]
                "step": many(lambda layer=layer, x=x, s=state: layer.step(x, s)),  # type: ignore[misc]
                "operator": many(lambda op=operator, a=arguments: op(*a)),  # type: ignore[misc]
            },
            rounds,
        )
        found = f"{ms['step']:.1f} us, frozen {ms['frozen']:.1f}; the operator {ms['operator']:.1f}"
        lines.append(Line(f"one step() of a layer of 4 units, {cell}", "T1 B1 H4", found, "15 us"))
    return lines


def layer_id(cell: str) -> int:
    return {"LSTM": 0, "GRU": 1, "RNN": 2}[cell]


def measure(rounds: int) -> list[Line]:
    before = torch.get_num_threads()
    lines = scaling(rounds) + per_sample(rounds)
    torch.set_num_threads(before)
    lines += uneven(rounds)
    lines += around_the_cell(rounds)
    lines += side_by_side(rounds)
    lines += overhead(rounds)
    return lines + memory()


def show(lines: list[Line], markdown: bool) -> str:
    head = ["what", "shape", "found", "goal"]
    rows = [[line.what, line.shape, line.found, line.goal] for line in lines]
    return render(head, rows, markdown)
