"""Guards against slowdowns, with pytest-benchmark.

``pytest bench/test_speed.py --benchmark-autosave``, change something, then
``pytest bench/test_speed.py --benchmark-compare --benchmark-compare-fail=median:10%``.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("rnnfast")
pytest.importorskip("pytest_benchmark")

from bench.peers import CantRun, Peer, Rnnfast, RnnfastFrozen, TorchNN, versions
from bench.problem import Problem
from bench.shapes import Shape

THREADS = int(os.environ.get("RNNFAST_BENCH_THREADS", "1"))  # one thread varies least
SHAPES = [
    Shape("lstm", "streaming", 1, 1, 128),
    Shape("lstm", "inference", 50, 1, 256),
    Shape("lstm", "inference", 50, 32, 256),
    Shape("gru", "inference", 50, 32, 256),
    Shape("rnn", "inference", 50, 32, 256),
    Shape("lstm", "inference", 50, 32, 256, packed=True),
    Shape("lstm", "training", 50, 16, 128),
    Shape("gru", "training", 50, 16, 128),
    Shape("indrnn", "training", 200, 16, 128),
]


@pytest.mark.parametrize("kind", [Rnnfast, RnnfastFrozen, TorchNN], ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_speed(benchmark: Any, shape: Shape, kind: type[Peer]) -> None:
    try:
        peer = kind(Problem(shape), THREADS)
    except CantRun as reason:
        pytest.skip(str(reason))
    benchmark.group = shape.name
    benchmark.extra_info.update(versions(), threads=THREADS, gflop=shape.flops() / 1e9)
    peer.call()
    rounds = 15 if shape.flops() > 1e8 else 60
    benchmark.pedantic(peer.call, rounds=rounds, iterations=3, warmup_rounds=2)
