"""The CUDA engine seen from Python: whether it can run here, what torch allows it, what it ran."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ._library import cuda_load_error

LAUNCHES = ("plain", "pdl")
KERNELS = ("step", "onchip")

_native = torch.ops.rnnfast


def loaded() -> bool:
    """Whether the kernels are loaded. Asks for no device: that starts CUDA, which a process that
    forks later must not."""
    return not cuda_load_error()


@functools.cache
def why_not() -> str:
    """Why the CUDA engine can't run here, in a few words; empty if it can."""
    error = cuda_load_error()
    if error:
        return error
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    devices = range(torch.cuda.device_count())
    return min((why_not_on(torch.device("cuda", i)) for i in devices), key=len, default="")


@functools.cache
def why_not_on(device: torch.device) -> str:
    """Why it can't run on a device; empty if it can."""
    error = cuda_load_error()
    if error:
        return error
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the CUDA engine needs compute capability 8.0 or higher, got {major}.{minor}"
    return ""


def is_tf32_allowed() -> bool:
    """torch's flag for TF32 in recurrent layers, nn.LSTM's own: the same model then has the same
    precision."""
    allowed: str = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return allowed == "tf32"


# The engine asks for the flag at every call, compiled graphs included: the library can't read it.
_library = torch.library.Library("rnnfast", "FRAGMENT")
_library.define("tf32_allowed() -> bool")
_library.impl("tf32_allowed", is_tf32_allowed, "CompositeExplicitAutograd")


def set_launch(launch: int) -> int:
    """Wish for one of LAUNCHES, or -1; gives the wish before."""
    return int(_native.cuda_set_launch(launch))


def set_kernel(kernel: int) -> int:
    """Wish for one of KERNELS, or -1; gives the wish before."""
    return int(_native.cuda_set_kernel(kernel))


def last_run(field: int) -> int:
    """Of this thread: 0 runs, 1 time, 2 launch, 3 streams, 4 compute capability, 5 TF32, 6
    kernel."""
    return int(_native.cuda_last_run(field))


@dataclass(frozen=True)
class Passes:
    """Passes of one call, as the choice sees them: ``count`` directions of a layer, or (chained)
    layers, the first of sizes (T, B, I, H, P); on a device."""

    cell: int
    sizes: tuple[int, int, int, int, int]
    itemsize: int
    capability: int
    shared_bytes: int = 0  # that a block may have
    count: int = 1
    chained: bool = False
    backward: bool = False
    tf32: bool = False

    def choose(self, launch: int = -1, kernel: int = -1) -> tuple[str, int, int, str]:
        """How the engine launches, on how many streams, how many steps an input projection takes at
        once, and its kernel; with a wished launch and kernel."""
        how, streams, steps, what = (
            int(
                _native.choose_cuda(
                    *(field, self.capability, self.shared_bytes, launch, kernel, self.tf32),
                    *(self.count, self.chained, self.backward, self.cell, *self.sizes),
                    self.itemsize,
                )
            )
            for field in range(4)
        )
        return LAUNCHES[how], streams, steps, KERNELS[what]

    def why_not_onchip(self) -> str:
        """Why their weights can't be kept on chip, or an empty string."""
        return str(
            _native.why_not_onchip(
                *(self.capability, self.shared_bytes, self.tf32, self.count, self.chained),
                *(self.backward, self.cell, *self.sizes, self.itemsize),
            )
        )
