"""What recompute=True costs and saves in training: ``python -m bench.recompute [THREADS [ROUNDS]]``

Plain and recomputing layers take turns, so that whatever else the machine does falls on both. CPU
seconds (of all threads) say more than the clock's on a machine that is shared.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import rnnfast

from .table import render

SHAPES = (
    *(("LSTM", 4096, 4, 128), ("LSTM", 4096, 16, 256)),
    *(("GRU", 4096, 4, 128), ("GRU", 4096, 16, 256)),
    *(("LSTM", 512, 4, 128), ("LSTM", 512, 16, 256)),
)


def kept_bytes(run: Callable[[], Iterable[Tensor]], *known: Tensor) -> int:
    """What autograd keeps of a call beyond these tensors (its input and weights, say) and the
    results that it returns."""
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        results = list(run())
    for tensor in (*known, *results):
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(found.values())


def seconds(layer: Any, x: Tensor, clock: Callable[[], float]) -> float:
    begin = clock()
    layer(x)[0].sum().backward()
    return clock() - begin


def main(threads: int = 1, rounds: int = 9) -> None:
    torch.set_num_threads(threads)
    rows = []
    for name, steps, batch, hidden in SHAPES:
        torch.manual_seed(0)
        x = torch.randn(steps, batch, hidden, requires_grad=True)
        plain = getattr(rnnfast, name)(hidden, hidden)
        lean = getattr(rnnfast, name)(hidden, hidden, recompute=True)
        ratios = []
        for clock in (time.perf_counter, time.process_time):
            seconds(plain, x, clock), seconds(lean, x, clock)
            times = [(seconds(plain, x, clock), seconds(lean, x, clock)) for _ in range(rounds)]
            plainly, leanly = (statistics.median(t) for t in zip(*times, strict=True))
            ratios.append(f"{leanly / plainly:.2f}")
        sizes = [
            kept_bytes(lambda one=layer, z=x: one(z)[:1], x, *layer.parameters()) / 2**20
            for layer in (plain, lean)
        ]
        shape = f"{name} T={steps} B={batch} H={hidden}"
        rows.append([shape, f"{sizes[0]:.1f}", f"{sizes[1]:.2f}", *ratios])
    print(render(["layer", "plain, MiB", "recompute, MiB", "time", "CPU time"], rows, False))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
