"""Contestants on a GPU: ours by each way of launching, and torch.nn's layers, which are cuDNN's.

They are those of peers.py with the device's settings around them. All settings are entered before
a sample and left after it, outside of what is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import gpu_shapes
from .gpu_device import Host, precision
from .peers import DTYPES, CantRun, Rnnfast, TorchLoop, TorchModule, TorchNN, need
from .problem import Problem, difference, errors

NO_DEVICE = "no CUDA device"
EXACT_ON_CPU = 2e9  # operations; up to here the reference is float64's, else float32's on the GPU


class OnDevice(TorchModule):
    """What all contestants share: dtypes, modes, and the flag of float32 products."""

    dtypes: tuple[str, ...] = gpu_shapes.DTYPES
    modes: tuple[str, ...] = ("streaming", "inference", "forward", "training")
    captured = False  # the call is a CUDA graph's replay
    flattened = False  # all weights in one buffer, as cuDNN wants them
    error = float("nan")  # greatest, of the check
    used = ""  # what ran in it, as far as can be told

    def __init__(self, problem: Problem, device: Host, threads: int) -> None:
        self.on = device
        super().__init__(problem, threads)

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """The same flag for everybody: float32 products in TF32 or in full."""
        value = "tf32" if self.problem.shape.dtype == "tfloat32" else "ieee"
        with precision(torch.backends.cudnn.rnn, value):
            yield

    def build(self, threads: int) -> None:
        with self.settings():
            super().build(threads)
        bare = getattr(self, "inner", self.call)
        inference = self.mode

        @contextlib.contextmanager
        def mode() -> Iterator[None]:
            with self.settings(), inference():
                yield

        self.mode = mode
        if self.captured:
            bare = self.capture(bare)

        def call() -> Any:
            with mode():
                return bare()

        self.inner, self.call = bare, call
        self.used = self.engine_used()
        self.on.synchronize()

    def capture(self, bare: Any) -> Any:
        """The call as a graph."""
        if self.on.kind != "cuda":
            raise CantRun(NO_DEVICE)
        with self.mode():
            replay, outcome = self.on.capture(bare)

        def run() -> Any:
            replay()
            return outcome

        return run

    def fault(self, reference: dict[str, torch.Tensor]) -> str | None:
        """What is wrong with the results of a call; keeps the greatest error of them."""
        found = {name: value.detach().float() for name, value in self.tensors().items()}
        self.error = max(errors(found, reference).values(), default=float("nan"))
        return difference(found, reference, self.problem.shape.dtype)

    def engine_used(self) -> str:
        return "torch's own operators"


class GpuRnnfast(OnDevice, Rnnfast):
    """Ours on the engine "cuda"; in a dry run, the CPU's."""

    name = "rnnfast"
    launch = "auto"
    kernel: str | None = None  # None: the library's choice

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        rnnfast = need("rnnfast")
        if self.on.kind != "cuda":
            if (self.launch, self.kernel) != ("auto", None):
                raise CantRun(NO_DEVICE)
            with super().settings():
                yield
            return
        with (
            super().settings(),
            rnnfast.use_engine("cuda", launch=self.launch, kernel=self.kernel),
        ):
            yield

    def build(self, threads: int) -> None:
        try:
            super().build(threads)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what the library refuses, it refuses in its own name
            if str(error).startswith("rnnfast: "):
                raise CantRun(str(error).removeprefix("rnnfast: ")) from None
            raise

    def engine_used(self) -> str:
        if not self.captured:  # of a graph the capture was the last run, replays are none
            self.call()
        run = dict(need("rnnfast").last_run())
        engine = str(run.pop("engine"))
        if engine != self.on.kind:
            raise RuntimeError(f"bench: {self.name} must run on {self.on.kind}, ran on {engine}")
        if self.kernel not in (None, run.get("kernel")):
            raise RuntimeError(f"bench: {self.name} must run {self.kernel}, ran {run['kernel']}")
        said = [f"{key}={value}" for key, value in run.items() if value is not None]
        return " ".join([engine, *said, *["in a CUDA graph"] * self.captured])


class Plain(GpuRnnfast):
    """Ours by the step engine, a plain launch for every kernel."""

    name = "rnnfast plain"
    launch, kernel = "plain", "step"


class Dependent(GpuRnnfast):
    """Ours by the step engine and programmatic dependent launch: a kernel starts while the one
    before it ends."""

    name = "rnnfast pdl"
    launch, kernel = "pdl", "step"


class Graph(GpuRnnfast):
    """Ours, the whole call captured in the caller's CUDA graph."""

    name = "rnnfast graph"
    captured = True


class Operators(TorchDispatchMode):
    """Names of the operators that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.add(function.name())
        return function(*args, **(kwargs or {}))


class GpuTorchNN(OnDevice, TorchNN):
    """torch.nn as everybody calls it: cuDNN's layers, weights in one buffer."""

    name = "torch.nn"

    def finish(self, module: nn.Module) -> nn.Module:
        module = super().finish(module)
        if self.on.kind != "cuda":
            return module
        if not torch.backends.cudnn.enabled or not torch.backends.cudnn.is_available():
            raise RuntimeError("bench: torch.nn must run on cuDNN, which is off or not there")
        module.flatten_parameters()  # type: ignore[operator]
        self.flattened = in_one_buffer(module)
        if not self.flattened:
            flatten(module)
            self.flattened = in_one_buffer(module)
        return module

    def engine_used(self) -> str:
        if self.captured:
            return "a CUDA graph"
        operators = Operators()
        trains = self.problem.shape.mode in ("forward", "training")
        # not in inference mode, where torch shows the layer whole
        with self.settings(), torch.set_grad_enabled(trains), operators:
            self.inner()
        if any("cudnn" in name for name in operators.seen):
            return "cuDNN" + ", weights in one buffer" * self.flattened
        return super().engine_used()


class TorchGraph(GpuTorchNN):
    """torch.nn, the whole call captured in a CUDA graph."""

    name = "torch.nn graph"
    captured = True
    refused: ClassVar[dict[tuple[str, str, bool], str]] = {}  # not tried again: it may cost memory

    def capture(self, bare: Any) -> Any:
        """Whether cuDNN's layers can be captured is not ours to promise: who can't says why."""
        shape = self.problem.shape
        key = (shape.mode, shape.dtype, shape.packed)
        if key not in self.refused:
            try:
                return super().capture(bare)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.refused[key] = " ".join(str(error).split())[:120]
        raise CantRun(f"no capture: {self.refused[key]}")


class GpuTorchLoop(OnDevice, TorchLoop):
    """An IndRNN in plain torch, which has no such layer."""


def in_one_buffer(module: nn.Module) -> bool:
    return len({weight.untyped_storage().data_ptr() for weight in module.parameters()}) == 1


def flatten(module: Any) -> None:
    """What flatten_parameters does, for bfloat16 too, which it leaves out though cuDNN takes it."""
    rnn: Any = torch.backends.cudnn.rnn
    with contextlib.suppress(RuntimeError), torch.no_grad():
        torch._cudnn_rnn_flatten_weight(
            module._flat_weights,
            4,
            module.input_size,
            rnn.get_cudnn_mode(module.mode),
            module.hidden_size,
            0,
            module.num_layers,
            False,
            module.bidirectional,
        )


def forced(kernel: str) -> type[GpuRnnfast]:
    """Ours with one kernel forced; who can't serve a layer with it says why."""
    return type("Forced", (GpuRnnfast,), {"name": f"rnnfast[{kernel}]", "kernel": kernel})


OURS: list[type[GpuRnnfast]] = [GpuRnnfast, Plain, Dependent, Graph]
ALL = ("onchip",)  # what `--engine all` lays beside these, whose plain and pdl force "step"
RIVALS: list[type[OnDevice]] = [GpuTorchNN, TorchGraph, GpuTorchLoop]


class _Exact(OnDevice):
    """In float64, whatever the shape's dtype."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64


class _ExactNN(_Exact, TorchNN):
    name = "torch.nn float64"


class _ExactLoop(_Exact, TorchLoop):
    name = "torch loop float64"


def reference(problem: Problem, device: Host, threads: int) -> tuple[str, dict[str, torch.Tensor]]:
    """Right results, on numbers rounded to the shape's dtype, and whose they are: float64's on the
    CPU, or where that would take too long, float32's on the GPU, no TF32."""
    shape = problem.shape
    loop = shape.cell == "indrnn"
    kind: type[OnDevice]
    if device.kind == "cpu" or shape.flops() <= EXACT_ON_CPU:
        device, kind = Host(), _ExactLoop if loop else _ExactNN
    else:
        kind = GpuTorchLoop if loop else GpuTorchNN
    dtype = DTYPES.get(shape.dtype, torch.float32)
    exact = kind(problem.rounded(dtype, device.device), device, threads)
    found = {name: value.detach().float() for name, value in exact.tensors().items()}
    where = "float64 on the CPU" if isinstance(exact, _Exact) else "float32 on the GPU"
    return f"{kind.name.split(' float')[0]}, {where}", found
