"""The device that a GPU comparison runs on: what it is, and how long a call takes on it.

`find()` gives the CUDA device, or where there is none the host, on which the same code rehearses.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .compare import Entry, cpu_model

FLUSH_LEAST = 64 << 20  # bytes, where the device does not say how large its L2 is
SAMPLE = 2e-3  # seconds; of shorter calls a round takes several samples
MOST_SAMPLES = 5
Call = Callable[[], Any]


class Host:
    """The CPU in a GPU's place, for dry runs: one clock, nothing asynchronous, no cache flushed."""

    kind = "cpu"
    place = "cpu"  # of tensors
    small = True  # ceilings are measured with small arrays

    def __init__(self) -> None:
        self.device = torch.device(self.place)

    def facts(self) -> dict[str, Any]:
        """What stands in the header and in every row."""
        return {"gpu": f"none: {cpu_model()}", "driver": "none", "cuda": "none", "cudnn": "none"}

    def more_facts(self) -> dict[str, Any]:
        """What the header alone says."""
        return {}

    def flush(self) -> None:
        """Empties the caches that the call before has filled."""

    def synchronize(self) -> None:
        """Waits for the device; raises what it has to say of the calls before."""

    def release(self) -> None:
        """Gives back memory that only this process's pool still holds."""

    def seconds(self, call: Call) -> float:
        """Of one call, by the device's own clock."""
        return self.host_seconds(call)

    def host_seconds(self, call: Call) -> float:
        """Of one call, by the host's clock, from an idle device to an idle device."""
        self.flush()
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def capture(self, call: Call) -> tuple[Call, Any]:
        """`call` as a graph: what replays it, and the tensors that a replay fills."""
        raise RuntimeError("no CUDA device")


class Cuda(Host):
    """A GPU: CUDA events around the call, its L2 overwritten before each."""

    kind = place = "cuda"
    small = False

    def __init__(self) -> None:
        super().__init__()
        self.properties: Any = torch.cuda.get_device_properties(self.device)
        self.l2 = int(getattr(self.properties, "L2_cache_size", 0))
        self.scratch = torch.empty(
            max(2 * self.l2, FLUSH_LEAST), dtype=torch.uint8, device=self.device
        )
        self.before = torch.cuda.Event(enable_timing=True)
        self.after = torch.cuda.Event(enable_timing=True)

    def facts(self) -> dict[str, Any]:
        return {
            "gpu": str(self.properties.name),
            "driver": driver_version(),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
        }

    def more_facts(self) -> dict[str, Any]:
        return {
            "capability": f"{self.properties.major}.{self.properties.minor}",
            "multiprocessors": self.properties.multi_processor_count,
            "memory_gib": round(self.properties.total_memory / 2**30, 1),
            "l2_mib": round(self.l2 / 2**20, 1),
            "flushed_mib": round(self.scratch.numel() / 2**20, 1),
        }

    def flush(self) -> None:
        self.scratch.zero_()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        torch.cuda.empty_cache()

    def seconds(self, call: Call) -> float:
        self.flush()  # not waited for, so that the host is ahead when the first event is reached
        self.before.record()
        call()
        self.after.record()
        self.after.synchronize()
        return 1e-3 * float(self.before.elapsed_time(self.after))

    def capture(self, call: Call) -> tuple[Call, Any]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # as torch's documentation warms up, off the main stream
            for _ in range(3):
                call()
        usual = torch.cuda.current_stream(self.device)
        usual.wait_stream(stream)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=pool):
                outcome = call()
        except BaseException:
            torch.cuda.set_stream(usual)  # a capture that fails at its end leaves both as they were
            with contextlib.suppress(Exception):
                native: Any = torch._C
                native._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
        graph.replay()
        self.synchronize()
        return graph.replay, outcome


def find() -> Host:
    """The CUDA device, else the host."""
    return Cuda() if torch.cuda.is_available() else Host()


def driver_version() -> str:
    """Of the GPU's driver: from its own library, else from nvidia-smi, else CUDA's number of it."""
    try:
        library = importlib.import_module("pynvml")
        library.nvmlInit()
        try:
            version = library.nvmlSystemGetDriverVersion()
        finally:
            library.nvmlShutdown()
        return version.decode() if isinstance(version, bytes) else str(version)
    except Exception:  # the module is optional, and its errors are its own
        pass
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        if said.stdout.strip():
            return said.stdout.split()[0]
    with contextlib.suppress(Exception):
        native: Any = torch._C
        return f"CUDA {native._cuda_getDriverVersion()}"
    return "unknown"


@contextlib.contextmanager
def precision(owner: Any, value: str) -> Iterator[None]:
    """float32 products of `owner` (torch.backends.cudnn.rnn, ...) in "ieee" or "tf32" within."""
    before = owner.fp32_precision
    owner.fp32_precision = value
    try:
        yield
    finally:
        owner.fp32_precision = before


@dataclass
class DeviceEntry(Entry):
    """A contestant with two clocks: `samples` are the device's, `host_samples` the host's."""

    device: Host = field(default_factory=Host)
    host_samples: list[float] = field(default_factory=list)

    def estimate(self) -> None:
        """Warm up (the first call of cuDNN plans), and choose how many samples a round takes."""
        with self.mode():
            for _ in range(3):
                self.call()
            self.seconds = statistics.median(self.device.host_seconds(self.call) for _ in range(3))
        self.loops = max(1, min(MOST_SAMPLES, round(SAMPLE / max(self.seconds, 1e-9))))

    @property
    def cost(self) -> float:
        return (2 * self.loops + 1) * (self.seconds + 1e-4)  # the flush

    def measure(self) -> None:
        with self.mode():
            self.call()  # the settings just changed, and another's kernels ran last
            for _ in range(self.loops):
                self.samples.append(self.device.seconds(self.call))
                self.host_samples.append(self.device.host_seconds(self.call))

    @property
    def host_ms(self) -> float:
        return 1e3 * statistics.median(self.host_samples)


def environment() -> dict[str, str]:
    """Variables that change what is measured, where they are set."""
    names = ["CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING", "CUBLAS_WORKSPACE_CONFIG"]
    names += ["NVIDIA_TF32_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"]
    return {name: os.environ[name] for name in names if name in os.environ}
