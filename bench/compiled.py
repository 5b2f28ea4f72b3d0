"""How long torch.compile takes for a layer, and what the compiled layer gains: ``python -m
bench.compiled [ROUNDS]``

Inductor is warmed up by a small model that needs a C++ kernel, and has no cache; each layer has a
size of its own, so that no C++ is there already. The first call, backward included, less the second
is what compiling took.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()

import torch
from torch import Tensor, nn

import rnnfast

from .table import render

LAYERS: dict[str, dict[str, Any]] = {
    "one layer, one direction": {},
    "two directions": {"bidirectional": True},
    "2 layers, two directions": {"num_layers": 2, "bidirectional": True},
    "3 layers, dropout 0.5": {"num_layers": 3, "dropout": 0.5},
    "2 layers, two directions, dropout 0.5": {
        "num_layers": 2,
        "bidirectional": True,
        "dropout": 0.5,
    },
}
HIDDEN = itertools.count(33)
# T, B, H
SIZES = ((20, 8, 32), (100, 32, 256))


def call(run: Callable[..., Any], x: Tensor, train: bool, given: dict[str, Any]) -> float:
    begin = time.perf_counter()
    with torch.set_grad_enabled(train):
        y = run(x, **given)[0]
    if train:
        y.backward(torch.ones_like(y))
    return time.perf_counter() - begin


def to_compile(options: dict[str, Any], steps: int, train: bool, lengths: bool) -> float:
    torch._dynamo.reset()
    layer = rnnfast.LSTM(16, next(HIDDEN), **options).train(train)
    run = torch.compile(layer, fullgraph=True)
    x = torch.randn(steps, 8, 16)
    given = {"lengths": torch.randint(1, steps + 1, (8,))} if lengths else {}
    first = call(run, x, train, given)
    return first - call(run, x, train, given)


def compile_times(rounds: int) -> None:
    warm = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    torch.compile(warm)(torch.randn(8, 16)).sum().backward()
    cases = [
        (name, train, lengths)
        for name, options in LAYERS.items()
        for train in (False, True)
        for lengths in (False, True)
        if train or "dropout" not in options
    ]
    rows = []
    for name, train, lengths in cases:
        found = [
            [to_compile(LAYERS[name], steps, train, lengths) for _ in range(rounds)]
            for steps in (10, 1000)
        ]
        kind = ("training" if train else "inference") + (", lengths" if lengths else "")
        times = [f"{statistics.median(f):.2f} ({min(f):.2f} to {max(f):.2f})" for f in found]
        rows.append([name, kind, *times])
    print(render(["LSTM", "", "seconds for T = 10", "T = 1000"], rows, True))


def run_times(rounds: int) -> None:
    rows = []
    for name, options in LAYERS.items():
        for steps, batch, hidden in SIZES:
            for train in (False, True):
                torch._dynamo.reset()
                layer = rnnfast.LSTM(hidden, hidden, **options).train(train)
                compiled = torch.compile(layer, fullgraph=True)
                x = torch.randn(steps, batch, hidden, requires_grad=train)
                call(compiled, x, train, {})
                times = [
                    [call(run, x, train, {}) for run in (compiled, layer)] for _ in range(rounds)
                ]
                ratio = statistics.median(a / b for a, b in times)
                own = statistics.median(a for a, _ in times)
                kind = "training" if train else "inference"
                rows.append(
                    [name, f"{steps} {batch} {hidden}", kind, f"{own * 1e3:.2f}", f"{ratio:.2f}"]
                )
    print(render(["LSTM", "T B H", "", "ms compiled", "of the eager layer"], rows, True))


def main(rounds: int = 3) -> None:
    warnings.filterwarnings("ignore")
    compile_times(rounds)
    print()
    run_times(20 * rounds)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
