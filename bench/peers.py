"""Ours and the peers: one small class each, all built from the same Problem.

A peer is built once a shape (compiling and prepacking happen there, untimed); `call` is what is
timed and `results` runs it once more and brings the outcome into torch's layout. A peer that is not
installed or can't do a shape raises `CantRun` with the reason in a word or two.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from . import onnx_model
from .problem import Problem, Results

# engines as the command line spells them -> arguments of rnnfast.use_engine
ENGINES: dict[str, dict[str, str]] = {
    "auto": {"name": "auto"},
    "reference": {"name": "reference"},
    "packed": {"name": "cpu", "kernel": "packed"},
    "direct": {"name": "cpu", "kernel": "direct"},
    "serial": {"name": "cpu", "split": "serial"},
    "batch": {"name": "cpu", "split": "batch"},
    "units": {"name": "cpu", "split": "units"},
    "directions": {"name": "cpu", "split": "directions"},
    "layers": {"name": "cpu", "split": "layers"},
    "amx": {"name": "cpu", "isa": "amx"},
    "avx512_bf16": {"name": "cpu", "isa": "avx512_bf16"},
    "avx512": {"name": "cpu", "isa": "avx512"},
    "avx2": {"name": "cpu", "isa": "avx2"},
    "neon": {"name": "cpu", "isa": "neon"},
    "portable": {"name": "cpu", "isa": "portable"},
}


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # the others are float32's


class CantRun(Exception):
    """This peer has no time for this shape, and why."""


def need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise CantRun("not installed") from None


class Peer:
    """Base class: `modes` it can run, and the layer of ours that it is compared with."""

    name = ""
    package = ""  # distribution whose version is written down
    against_frozen = False  # weights prepacked before the first call, as ours are in a frozen layer
    modes: tuple[str, ...] = ("streaming", "inference", "training")
    cells: tuple[str, ...] = ("lstm", "gru", "rnn")
    dtypes: tuple[str, ...] = ("float32",)
    call: Callable[[], Any]
    # A stream enters its mode once: `inner`, under `mode`, is what is timed.
    inner: Callable[[], Any]
    mode: Callable[[], Any] = contextlib.nullcontext

    def __init__(self, problem: Problem, threads: int) -> None:
        self.problem = problem
        shape = problem.shape
        if shape.mode not in self.modes:
            raise CantRun(f"no {shape.mode}")
        if shape.cell not in self.cells:
            raise CantRun(f"no {shape.cell}")
        if shape.dtype not in self.dtypes:
            raise CantRun(f"no {shape.dtype}")
        self.build(threads)
        if self.mode is contextlib.nullcontext:
            self.inner = self.call

    def build(self, threads: int) -> None:
        """Makes `call`."""
        raise NotImplementedError

    def results(self) -> Results:
        """Outcome of one call: y, h_n, c_n; in training y, dx and d<weight>."""
        raise NotImplementedError


class TorchModule(Peer):
    """Anything with torch.nn's calling convention."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    module: nn.Module

    def make_module(self) -> nn.Module:
        raise NotImplementedError

    def infer(self, inner: Callable[[], Any]) -> None:
        def call() -> Any:
            with torch.inference_mode():
                return inner()

        self.call, self.inner, self.mode = call, inner, torch.inference_mode

    def finish(self, module: nn.Module) -> nn.Module:
        """The module that is called, from the one that has the weights."""
        return module.to(self.problem.device, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of input and states."""
        return DTYPES.get(self.problem.shape.dtype, torch.float32)

    def hx(self) -> Any:
        hx: Any = self.problem.hx()
        if isinstance(hx, tuple):
            return tuple(state.to(self.dtype) for state in hx)
        return hx if hx is None else hx.to(self.dtype)

    def build(self, threads: int) -> None:
        torch.set_num_threads(threads)
        problem, shape = self.problem, self.problem.shape
        with problem.device:  # or large weights would be drawn and moved in vain
            self.module = self.make_module()
        self.module.load_state_dict(problem.weights)
        self.module = self.finish(self.module)
        module, hx = self.module, self.hx()
        numbers = problem.x.to(self.dtype)
        x: Any = problem.pack(numbers) if shape.packed else numbers
        if shape.mode in ("forward", "training"):
            module.train()
            leaf = (x.data if shape.packed else x).clone().requires_grad_()
            x = x._replace(data=leaf) if shape.packed else leaf
        if shape.mode == "forward":
            self.call = lambda: module(x, hx)
        elif shape.mode == "training":
            wanted = [leaf, *module.parameters()]
            dy = (problem.pack(problem.dy).data if shape.packed else problem.dy).to(self.dtype)

            def train() -> Any:
                y = module(x, hx)[0]
                y = y.data if shape.packed else y
                return y, torch.autograd.grad(y, wanted, dy)

            self.call = train
        else:
            module.eval().requires_grad_(False)

            self.infer(lambda: module(x, hx))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Outcome of one call in torch's layout, where it is."""
        problem = self.problem
        out = self.call()
        if problem.shape.mode == "training":
            y, gradients = out
            dx = gradients[0]
            if problem.shape.packed:
                y, dx = problem.pad(y.detach()), problem.pad(dx)
            found = {"y": y.detach(), "dx": dx}
            names = [name for name, _ in self.module.named_parameters()]
            found |= {f"d{name}": grad for name, grad in zip(names, gradients[1:], strict=True)}
        else:
            y, state = out
            found = {"y": problem.pad(y.data) if problem.shape.packed else y}
            states = state if isinstance(state, tuple) else (state,)
            found |= dict(zip(("h_n", "c_n"), states, strict=False))
        return found

    def results(self) -> Results:
        found = self.tensors()
        return {name: value.detach().float().cpu().numpy() for name, value in found.items()}


class TorchNN(TorchModule):
    """torch.nn as everybody calls it."""

    name = "torch.nn"
    package = "torch"

    def make_module(self) -> nn.Module:
        shape = self.problem.shape
        kind = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[shape.cell]
        return kind(
            shape.input_size,
            shape.H,
            num_layers=shape.layers,
            bidirectional=shape.bidirectional,
        )


class TorchCell(TorchModule):
    """torch.nn's cells, which a careful user of torch takes for single steps."""

    name = "torch.nn cell"
    package = "torch"
    modes = ("streaming",)

    def make_module(self) -> nn.Module:
        shape = self.problem.shape
        if shape.layers > 1 or shape.bidirectional:
            raise CantRun("one layer only")
        kind = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}[shape.cell]
        return kind(shape.input_size, shape.H)

    def build(self, threads: int) -> None:
        torch.set_num_threads(threads)
        problem = self.problem
        cell = self.make_module()
        cell.load_state_dict({name[:-3]: value for name, value in problem.weights.items()})
        cell.to(self.dtype).eval().requires_grad_(False)
        hx = self.hx()
        x = problem.x[0].to(self.dtype)
        state = tuple(h[0] for h in hx) if isinstance(hx, tuple) else hx[0]

        self.infer(lambda: cell(x, state))

    def results(self) -> Results:
        out = self.call()
        states = out if isinstance(out, tuple) else (out,)
        pairs = zip(("h_n", "c_n"), states, strict=False)
        found = {name: h[None].float().numpy() for name, h in pairs}
        return {"y": found["h_n"], **found}


class LoopIndRNN(nn.Module):
    """IndRNN with relu as a loop over time in torch operators, the input projection hoisted."""

    def __init__(self, layers: int, directions: int, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.layers, self.directions = layers, directions
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(torch.empty_like(value)))

    def forward(self, x: torch.Tensor, hx: torch.Tensor | None = None) -> Any:
        last: list[torch.Tensor] = []
        for layer in range(self.layers):
            sides = []
            for k in range(self.directions):
                tail = f"l{layer}" + "_reverse" * k
                u, bias = getattr(self, f"weight_hh_{tail}"), getattr(self, f"bias_hh_{tail}")
                gates = nn.functional.linear(
                    x, getattr(self, f"weight_ih_{tail}"), getattr(self, f"bias_ih_{tail}") + bias
                )
                h = gates.new_zeros(gates.shape[1:]) if hx is None else hx[len(last)]
                steps = []
                for gate in gates.flip(0).unbind(0) if k else gates.unbind(0):
                    h = torch.relu(torch.addcmul(gate, u, h))
                    steps.append(h)
                sides.append(torch.stack(steps[::-1] if k else steps))
                last.append(h)
            x = torch.cat(sides, -1) if self.directions > 1 else sides[0]
        return x, torch.stack(last)


class TorchLoop(TorchModule):
    """What an IndRNN costs in plain torch, which has no layer of this kind."""

    name = "torch loop"
    package = "torch"
    dtypes: tuple[str, ...] = ("float32",)
    cells = ("indrnn",)

    def make_module(self) -> nn.Module:
        shape = self.problem.shape
        if shape.packed:
            raise CantRun("no packed")
        return LoopIndRNN(shape.layers, shape.directions, self.problem.weights)


class Rnnfast(TorchModule):
    """Ours, as it stands in a model: weights packed anew in every call that wants them packed."""

    name = "rnnfast"
    package = "rnnfast"
    cells = ("lstm", "gru", "rnn", "indrnn")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "int8")
    engine = "auto"

    def make_module(self) -> nn.Module:
        rnnfast = need("rnnfast")
        shape = self.problem.shape
        kind = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN", "indrnn": "IndRNN"}[shape.cell]
        layer: nn.Module = getattr(rnnfast, kind)(
            shape.input_size,
            shape.H,
            num_layers=shape.layers,
            bidirectional=shape.bidirectional,
        )
        return layer

    def finish(self, module: nn.Module) -> nn.Module:
        if self.problem.shape.dtype == "int8":
            quantized: nn.Module = need("rnnfast").quantize(module)
            return quantized
        return super().finish(module)

    def prepare(self) -> None:
        """What happens once, before the first call; int8 layers have no plain form, and stream."""
        if self.problem.shape.dtype == "int8":
            self.stream()

    def stream(self) -> None:
        """Single steps by layer.step(), which is what the library has for streams."""
        if self.problem.shape.mode != "streaming":
            return
        module: Any = self.module
        x, hx = self.problem.x[0].to(self.dtype), self.hx()

        self.infer(lambda: module.step(x, hx))

    def tensors(self) -> dict[str, torch.Tensor]:
        found = super().tensors()
        if found["y"].ndim == 2:
            found["y"] = found["y"][None]
        return found

    def build(self, threads: int) -> None:
        if self.engine == "auto":
            super().build(threads)
            self.prepare()
            return
        shape = self.problem.shape
        if self.engine == "directions" and shape.directions == 1:
            raise CantRun("one direction")
        if self.engine == "layers" and (shape.layers == 1 or shape.directions == 2):
            raise CantRun("no stack of one direction")
        use_engine, how = need("rnnfast").use_engine, ENGINES[self.engine]
        try:
            with use_engine(**how):
                super().build(threads)
                self.prepare()
                plain, mode = self.inner, self.mode
                self.call()
        except RuntimeError as error:
            raise CantRun(str(error).removeprefix("rnnfast: ")) from None

        def forced() -> Any:  # in force during this peer's calls only
            with use_engine(**how):
                return plain()

        self.call = self.inner = forced
        if mode is not contextlib.nullcontext:
            self.infer(forced)

    def engine_used(self) -> str:
        """What the last call ran, as the library itself tells it."""
        self.call()
        run = need("rnnfast").last_run()
        keys = ("isa", "threads", "split", "kernel_ih", "kernel_hh")
        return " ".join([str(run["engine"]), *(f"{key}={run[key]}" for key in keys)])


class RnnfastFrozen(Rnnfast):
    """Ours after layer.freeze(): weights packed once, as by the peers that compile a model; single
    steps by layer.step(), which is what the library has for streams."""

    name = "rnnfast frozen"
    dtypes = ("float32", "bfloat16")  # int8 weights are packed once by themselves
    modes = ("streaming", "inference")

    def prepare(self) -> None:
        self.module.freeze()  # type: ignore[operator]
        self.stream()


class OnnxRuntime(Peer):
    """ONNX Runtime, weights prepacked by the session (its default), inputs and outputs bound."""

    name = "onnxruntime"
    package = "onnxruntime"
    against_frozen = True
    modes = ("streaming", "inference")

    def model(self) -> bytes:
        return onnx_model.build(self.problem)

    def build(self, threads: int) -> None:
        ort = need("onnxruntime")
        need("onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        session = ort.InferenceSession(self.model(), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for name, array in onnx_model.feeds(self.problem).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        self.names = [output.name for output in session.get_outputs()]
        for name in self.names:
            binding.bind_output(name, "cpu")
        self.binding = binding
        self.call = lambda: session.run_with_iobinding(binding)

    def results(self) -> Results:
        self.call()
        arrays = self.binding.copy_outputs_to_cpu()
        return {
            name.removesuffix("0"): value for name, value in zip(self.names, arrays, strict=True)
        }


class OpenVino(Peer):
    """OpenVINO's CPU plugin in latency mode, float32 (its own default may be bfloat16)."""

    name = "openvino"
    package = "openvino"
    against_frozen = True
    modes = ("streaming", "inference")

    def build(self, threads: int) -> None:
        # no usage reports: they fork, which a process with this many thread pools must not
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        openvino = need("openvino")
        need("onnx")
        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,  # nobody else is pinned
        }
        model = core.read_model(onnx_model.build(self.problem))
        compiled = core.compile_model(model, "CPU", settings)
        request = compiled.create_infer_request()
        self.arrays = onnx_model.feeds(self.problem)  # the tensors below share their memory
        for name, array in self.arrays.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        self.request, self.outputs = request, compiled.outputs

        def infer() -> None:
            request.start_async()
            request.wait()

        self.call = infer

    def results(self) -> Results:
        self.call()
        found = {}
        for output in self.outputs:
            value = np.array(self.request.get_tensor(output).data)
            found[output.get_any_name().removesuffix("0")] = value
        return found


def peer_classes() -> dict[str, type[Peer]]:
    """Everyone that ours is compared with, by name, in the order of the tables."""
    from .jax_peer import Jax
    from .small_peers import SMALL

    classes: list[type[Peer]] = [TorchNN, TorchCell, TorchLoop, Jax, OnnxRuntime, OpenVino]
    classes += SMALL
    return {peer.name: peer for peer in classes}


def forced(engine: str, base: type[Rnnfast] = Rnnfast) -> type[Rnnfast]:
    """Ours with one engine, ISA or kernel forced."""
    return type("Forced", (base,), {"name": f"{base.name}[{engine}]", "engine": engine})


def versions() -> dict[str, str]:
    """Versions of ours, the peers and what they rest on."""
    found = {}
    for package in ("rnnfast", "torch", "onnxruntime", "openvino", "jax", "jaxlib", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package == "rnnfast" and importlib.util.find_spec("rnnfast"):  # run from a checkout
                found[package] = str(getattr(need("rnnfast"), "__version__", "checkout"))
    return found
