"""What a GPU can do at most, measured first, and the floor that each row is held against.

Three floors, of which the greatest counts: operations over the measured peak of a large product of
that dtype; bytes over the measured bandwidth of a large copy, every input read once and every
output written once; and steps, of which none can begin before the one before it has ended. A step
engine launches two dependent kernels a step (product and cell), so its exchange takes twice the
measured time from a kernel to its successor in a captured graph. An engine that stays on the chip
for the whole sequence has no such launches and may lie below that third floor (bench/exchanges
measures what it pays instead); the first two hold for everybody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .gpu_device import Host, precision
from .peers import DTYPES
from .shapes import WEIGHT_BYTES, Shape

LAUNCHES_A_STEP = 2
CHAIN = 256  # dependent kernels that are timed together
REPEATS = 10  # of which the best is the ceiling


def steps(shape: Shape) -> int:
    """Length of the longest chain of steps that wait for each other.

    Layers can follow each other by one step (a wavefront), but not where both directions of the
    layer below are needed; backward is as long as forward.
    """
    layers = shape.layers
    forward = shape.T * layers if shape.bidirectional else shape.T + layers - 1
    return forward * (2 if shape.mode == "training" else 1)


def least_bytes(shape: Shape) -> int:
    """x, weights and, in streaming, states read once; y and last states written once; in training
    dy, dx and the weights' gradients besides (what is kept for backward could be computed anew)."""
    size = WEIGHT_BYTES[shape.dtype]
    valid = sum(shape.lengths())
    x = valid * shape.input_size * size
    y = valid * shape.directions * shape.H * size
    states = shape.layers * shape.directions * shape.B * shape.H * size
    states *= 2 if shape.cell == "lstm" else 1
    moved = x + y + shape.weight_bytes()
    if shape.mode == "training":
        return 2 * moved
    return moved + states * (2 if shape.mode == "streaming" else 1)


@dataclass(frozen=True)
class Ceilings:
    """Of one device, measured: rates a second, and seconds from a kernel to the next."""

    peaks: dict[str, float]
    bandwidth: float
    replayed: float  # in a captured graph
    launched: float  # one by one by the host
    how: str

    def floors(self, shape: Shape) -> dict[str, Any]:
        """What stands beside a row: the three floors in ms with their counts, and the greatest."""
        chain = steps(shape)
        launches = LAUNCHES_A_STEP * chain
        found = {
            "operations": 1e3 * shape.flops() / self.peaks[shape.dtype],
            "bytes": 1e3 * least_bytes(shape) / self.bandwidth,
            "exchanges": 1e3 * launches * self.replayed,
        }
        return {
            "flops": shape.flops(),
            "bytes": least_bytes(shape),
            "steps": chain,
            "launches": launches,
            **{f"{name}_ms": float(f"{value:.4g}") for name, value in found.items()},
            "by": max(found, key=lambda name: found[name]),
        }

    def describe(self) -> dict[str, Any]:
        """For the head of a result file."""
        return {
            "peak_tflops": {name: round(rate / 1e12, 4) for name, rate in self.peaks.items()},
            "copy_gb_per_s": round(self.bandwidth / 1e9, 1),
            "kernel_to_kernel_us": round(1e6 * self.replayed, 3),
            "launch_to_launch_us": round(1e6 * self.launched, 3),
            "launches_a_step": LAUNCHES_A_STEP,
            "how": self.how,
        }


def floor_ms(floors: dict[str, Any]) -> float:
    """The greatest of the three."""
    return max(floors[f"{name}_ms"] for name in ("operations", "bytes", "exchanges"))


def best(device: Host, call: Callable[[], Any]) -> float:
    """Seconds of the fastest of some calls: a ceiling is a best, not a median."""
    for _ in range(3):
        call()
    return min(device.seconds(call) for _ in range(REPEATS))


def peak(device: Host, dtype: str) -> float:
    """Operations a second of a large product of random numbers; zeros can run faster."""
    size = 128 if device.small else 4096 if dtype == "float32" else 8192
    kind = DTYPES.get(dtype, torch.float32)
    a, b = (torch.randn(size, size, device=device.device).to(kind) for _ in range(2))
    out = torch.empty_like(a)
    value = "tf32" if dtype == "tfloat32" else "ieee"
    with precision(torch.backends.cuda.matmul, value):
        return 2.0 * size**3 / best(device, lambda: torch.mm(a, b, out=out))


def bandwidth(device: Host) -> float:
    """Bytes a second, those read and those written, of a large copy."""
    size = 1 << 20 if device.small else 1 << 30
    source = torch.ones(size, dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    return 2.0 * size / best(device, lambda: target.copy_(source))


def chain(device: Host) -> tuple[float, float]:
    """Seconds from a kernel to one that depends on it: in a captured graph, and launched."""
    value = torch.zeros(1024, device=device.device)

    def call() -> None:
        for _ in range(CHAIN):
            value.add_(1.0)

    launched = best(device, call) / CHAIN
    if device.small:
        return launched, launched
    replay, _ = device.capture(call)
    return best(device, replay) / CHAIN, launched


def measure(device: Host, dtypes: tuple[str, ...]) -> Ceilings:
    """All of it; a second or two on a GPU."""
    replayed, launched = chain(device)
    ceilings = Ceilings(
        {dtype: peak(device, dtype) for dtype in dtypes},
        bandwidth(device),
        replayed,
        launched,
        "torch.mm 8192^3 (float32 4096^3) of random numbers, a copy of 1 GiB counted twice, "
        f"{CHAIN} dependent kernels; best of {REPEATS}",
    )
    device.release()
    return ceilings
