"""What this machine can do at most, measured first: operations and bytes read a second.

A shape's limit is max(operations / peak, bytes / bandwidth), the bandwidth taken where
its weights fit: W_hh is read every step, W_ih once (see Shape.read_bytes).
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .shapes import Shape

SOURCE = Path(__file__).with_name("limits.c")
FLAG_SETS: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])


def compile_loops(folder: str) -> tuple[Any, str] | None:
    """The loops of limits.c as a library, and how they were compiled; None where no compiler is."""
    for compiler in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if not compiler or not shutil.which(compiler):
            continue
        for flags in FLAG_SETS:
            library = Path(folder) / "limits.so"
            options = ["-O3", "-ffp-contract=fast", *flags, "-shared", "-fPIC"]
            command = [compiler, *options, str(SOURCE), "-o", str(library)]
            if subprocess.run(command, capture_output=True).returncode == 0:
                loops = ctypes.CDLL(str(library))
                loops.fma_flops.restype = ctypes.c_long
                loops.run_fma.argtypes = [ctypes.c_long]
                loops.run_read.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
                return loops, f"C loop ({Path(compiler).name} {' '.join(options[:3])})"
    return None


def together(threads: int, work: Callable[[int], Any]) -> list[float]:
    """Runs `work(index)`, which leaves the interpreter's lock, on all threads at once.

    Returns each one's seconds of CPU time, so that other programs don't lower the ceilings.
    """
    gate = threading.Barrier(threads + 1)
    spent = [0.0] * threads

    def run(index: int) -> None:
        gate.wait()
        start = time.thread_time()
        work(index)
        spent[index] = time.thread_time() - start

    workers = [threading.Thread(target=run, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    gate.wait()
    for worker in workers:
        worker.join()
    return spent


def best_rate(amount: float, run: Callable[[], float], budget: float) -> float:
    """Highest amount / seconds within the budget: a ceiling is a best, not a median."""
    best, end = 0.0, time.perf_counter() + budget
    while True:
        best = max(best, amount / run())
        if time.perf_counter() >= end:
            return best


class Limits:
    """Peak and bandwidth at a number of threads; bandwidths are measured on demand and kept."""

    def __init__(self, threads: int, budget: float = 1.0) -> None:
        self.threads, self.budget = threads, budget
        self.folder = tempfile.TemporaryDirectory(prefix="rnnfast-bench-")
        self.loops = compile_loops(self.folder.name)
        self.bandwidths: dict[int, float] = {}
        self.sgemm, self.sgemm_by = self._sgemm()
        self.fma = self._fma()
        self.peak = max(self.fma, self.sgemm)  # operations a second

    def _fma(self) -> float:
        if self.loops is None:
            return 0.0
        loops, turns = self.loops[0], 2_000_000
        amount = float(self.threads * turns * loops.fma_flops())

        def run() -> float:  # registers are private to a core, so CPU time counts
            return sum(together(self.threads, lambda _: loops.run_fma(turns))) / self.threads

        return best_rate(amount, run, self.budget)

    def _sgemm(self, size: int = 1024) -> tuple[float, str]:
        """The fastest large product among the libraries at hand, in operations a second."""
        torch.set_num_threads(self.threads)
        a, b = torch.randn(size, size), torch.randn(size, size)
        out = torch.empty(size, size)
        products: dict[str, Callable[[], Any]] = {"torch.mm": lambda: torch.mm(a, b, out=out)}
        try:  # oneDNN with packed weights; private to torch, so one day it may be gone
            linear, reorder = (
                torch.ops.mkldnn._linear_pointwise,
                torch.ops.mkldnn._reorder_linear_weight,
            )
            packed = reorder(b, size)
            linear(a, packed, None, "none", [], "")
            products["oneDNN linear"] = lambda: linear(a, packed, None, "none", [], "")
        except (RuntimeError, TypeError, AttributeError):
            pass
        best = 0.0, ""
        for name, product in products.items():

            def run(product: Callable[[], Any] = product) -> float:
                start = time.perf_counter()
                product()
                return time.perf_counter() - start

            run()
            best = max(best, (best_rate(2.0 * size**3, run, self.budget / 2), name))
        return best

    def bandwidth(self, size: int) -> float:
        """Bytes a second of all threads, each reading its share of `size` again and again."""
        step = self.threads * 16 * 64  # whole vectors for every thread
        octaves = math.log2(max(size, step))
        rounded = int(2 ** (round(2 * octaves) / 2))  # half octaves, so that shapes share them
        rounded = max(step, rounded // step * step)
        if rounded not in self.bandwidths:
            self.bandwidths[rounded] = self._read(rounded)
        return self.bandwidths[rounded]

    def _read(self, size: int) -> float:
        share = size // self.threads // 4
        arrays = [np.zeros(share + 16, np.float32) for _ in range(self.threads)]
        arrays = [a[(-a.ctypes.data % 64) // 4 :][:share] for a in arrays]  # whole cache lines
        sweeps = max(1, int(self.budget * 0.03 * 40e9 / size))
        amount = float(share * 4 * self.threads * sweeps)
        if self.loops is not None:
            loops = self.loops[0]

            def read(index: int) -> None:
                loops.run_read(arrays[index].ctypes.data, share, sweeps)

            return best_rate(amount, lambda: max(together(self.threads, read)), self.budget / 4)
        whole = torch.zeros(share * self.threads)

        def add() -> float:
            start = time.perf_counter()
            for _ in range(sweeps):
                whole.sum()
            return time.perf_counter() - start

        return best_rate(amount, add, self.budget / 4)

    def limit_ms(self, shape: Shape) -> float:
        """The least time that a call of this shape can take here, by operations or by bytes."""
        working_set = shape.recurrent_bytes() if shape.T > 1 else shape.weight_bytes()
        reading = shape.read_bytes() / self.bandwidth(working_set)
        # the peak is that of float32: with fewer bits a processor may do more
        adding = shape.flops() / self.peak if shape.dtype == "float32" else 0.0
        return 1e3 * max(adding, reading)

    def describe(self) -> dict[str, Any]:
        """For the head of a result file."""
        loop = self.loops[1] if self.loops else ""
        peak_by = loop if self.fma >= self.sgemm else f"1024^3 sgemm, {self.sgemm_by}"
        return {
            "peak_gflops": round(self.peak / 1e9, 1),
            "peak_by": f"{peak_by}, best of repeats, {self.threads} threads at once",
            "sgemm_gflops": round(self.sgemm / 1e9, 1),
            "sgemm_by": f"1024^3 float32, {self.sgemm_by}",
            "read_by": f"{loop or 'torch.sum'}: every thread its share, best of repeats",
            "read_gb_per_s": {
                str(size): round(rate / 1e9, 1) for size, rate in sorted(self.bandwidths.items())
            },
        }
