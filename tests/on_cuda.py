"""What the tests of the CUDA engine share: layers and their inputs, ways to run them, the rule.

A layer is computed three times from the same rounded numbers: in float64 on the CPU, by a peer on
the device (torch.nn's layer, which is cuDNN's, or reference.py for what cuDNN lacks), and by ours.
"""

from __future__ import annotations

import contextlib
import copy
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cases
import tolerance
import torch
from conftest import CUDA_TESTS_ON
from tolerance import Tensors, biggest
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import _cuda

f64 = torch.float64
cudnn: Any = torch.backends.cudnn
BY_DEFAULT = cudnn.rnn.fp32_precision
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "RNN_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "RNN_relu": ("RNN", {"nonlinearity": "relu"}),
    "IndRNN_tanh": ("IndRNN", {"nonlinearity": "tanh"}),
    "IndRNN_relu": ("IndRNN", {"nonlinearity": "relu"}),
}
# The type, what operands of products are rounded to, and by how much a peer may be off at most
# (of the largest value): one that is wrong would make the rule pass anything.
PRECISIONS: dict[str, tuple[torch.dtype, float, float]] = {
    "float64": (torch.float64, 2.0**-52, 1e-10),
    "float32": (torch.float32, 2.0**-23, 1e-4),
    "tf32": (torch.float32, 2.0**-10, 0.05),
    "float16": (torch.float16, 2.0**-10, 0.05),
    "bfloat16": (torch.bfloat16, 2.0**-7, 0.4),
}
DTYPES = {name: dtype for name, (dtype, _, _) in PRECISIONS.items() if name != "tf32"}
FORMS = (*cases.LAYOUTS, "packed", "packed_even", "packed_ones", "packed_uneven")
LOSSES = ("all", "y", "state", "sum")
HOST_FLAG = 3  # of the device of loops: whether its float32 products may be TF32


def operators() -> Any:
    """torch.ops.rnnfast, or what stands in for it."""
    if CUDA_TESTS_ON == "cuda":
        return torch.ops.rnnfast
    import on_host

    return on_host.operators()


@contextlib.contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Whether float32 products of recurrent layers, and all others, may be TF32. By torch's older
    flags: torch.export, for one, fails where the newer ones are set one by one."""
    flags: tuple[Any, ...] = (cudnn, torch.backends.cuda.matmul)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = tf32
    on_the_host = None if CUDA_TESTS_ON == "cuda" else operators().set(HOST_FLAG, tf32)
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value
        if on_the_host is not None:
            operators().set(HOST_FLAG, on_the_host)


@contextlib.contextmanager
def kernel_forced(kernel: str) -> Iterator[None]:
    """One of the engine's kernels or an error; "" leaves the choice to the library."""
    if not kernel:
        yield
    elif CUDA_TESTS_ON == "cuda":
        with rnnfast.use_engine("cuda", kernel=kernel):
            yield
    else:
        before = operators().cuda_set_kernel(_cuda.KERNELS.index(kernel))
        try:
            yield
        finally:
            operators().cuda_set_kernel(before)


def kernel_ran() -> str:
    """In the engine's last pass of this thread."""
    if CUDA_TESTS_ON == "cuda":
        return str(rnnfast.last_run()["kernel"])
    return _cuda.KERNELS[operators().cuda_last_run(6)]


def leaves_of(result: Any) -> list[Tensor]:
    """The tensors of a nested output, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [leaf for part in result for leaf in leaves_of(part)]


@dataclass(frozen=True)
class Setup:
    """A layer and what it is given."""

    kind: str
    precision: str
    seq_len: int
    batch: int
    input_size: int
    hidden: int
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj: int = 0
    state: bool = True
    form: str = "contiguous"
    reset: bool = False
    loss: str = "all"

    def __str__(self) -> str:
        sizes = f"T{self.seq_len}-B{self.batch}-I{self.input_size}-H{self.hidden}"
        marks = [self.kind, self.precision, sizes]
        marks += [f"P{self.proj}"] if self.proj else []
        marks += [f"{self.num_layers}layers"] if self.num_layers > 1 else []
        marks += ["bidirectional"] if self.bidirectional else []
        marks += [] if self.bias else ["nobias"]
        marks += [] if self.state else ["nostate"]
        marks += [self.form] if self.form != "contiguous" else []
        marks += ["reset"] if self.reset else []
        return "-".join([*marks, *([f"loss_{self.loss}"] if self.loss != "all" else [])])

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    @property
    def lengths(self) -> list[int] | None:
        if not self.form.startswith("packed"):
            return None
        if self.form == "packed_even":
            return [self.seq_len] * self.batch
        if self.form == "packed_ones":
            return [self.seq_len] + [1] * (self.batch - 1)
        rng = random.Random(self.batch)
        rest = [rng.randint(1, self.seq_len) for _ in range(self.batch - 1)]
        if self.form == "packed":
            return sorted([self.seq_len, *rest], reverse=True)
        return [*rest, self.seq_len]

    @property
    def has_cudnn(self) -> bool:
        """Whether torch.nn has such a layer."""
        return not (self.kind.startswith("IndRNN") or self.reset)

    def layer(self, ours: bool) -> Any:
        """On the CPU, in float64, with any weights."""
        name, options = KINDS[self.kind]
        options = {**options, "bias": self.bias, "num_layers": self.num_layers, "dtype": f64}
        options |= {"bidirectional": self.bidirectional, "batch_first": self.form == "batch_first"}
        options |= {"proj_size": self.proj} if self.proj else {}
        return getattr(rnnfast if ours else nn, name)(self.input_size, self.hidden, **options)


@dataclass
class Problem:
    """A setup with its numbers: float64 on the CPU, rounded to the setup's type."""

    setup: Setup
    layer: Any  # ours
    x: Tensor  # (T, B, I)
    hx: list[Tensor]
    mask: Tensor | None
    cotangents: list[Tensor] = field(default_factory=list)


def build(setup: Setup) -> Problem:
    """The numbers of a setup, always the same.

    relu has a kink, within rounding of which a gradient is anybody's guess. In float64 that is
    nowhere; elsewhere large biases keep relu's units on one side, half of them on either.
    """
    gen = torch.Generator().manual_seed(zlib.crc32(str(setup).encode()))

    def rounded(values: Tensor) -> Tensor:
        return values.to(setup.dtype).double()

    def normal(*shape: int) -> Tensor:
        return rounded(torch.randn(shape, generator=gen, dtype=f64))

    layer = setup.layer(ours=True)
    one_side = setup.kind.endswith("relu") and setup.precision != "float64"
    assert setup.bias or not one_side, "relu without a bias can't keep from its kink"
    with torch.no_grad():
        for name, p in layer.named_parameters():
            values = torch.rand(p.shape, generator=gen, dtype=f64) * 2 - 1
            if one_side and name.startswith("bias_ih"):
                values = torch.where(values > 0, 2 + values, -2 + values)
            elif one_side:
                values /= 4 * setup.hidden**0.5
            elif name.startswith("weight_hh") and p.dim() == 1:
                values = values.abs()  # of IndRNN
            else:
                values /= setup.hidden**0.5
            p.copy_(rounded(values))
    steps, batch = setup.seq_len, setup.batch
    x = normal(steps, batch, setup.input_size)
    if setup.form == "expanded":
        x = x[:1].expand_as(x).contiguous()
    rows = setup.num_layers * (1 + setup.bidirectional)
    widths = [setup.proj or setup.hidden] + [setup.hidden] * (setup.kind == "LSTM")
    hx = [normal(rows, batch, width) for width in widths] if setup.state else []
    mask = torch.rand(steps, batch, generator=gen) < 0.3 if setup.reset else None
    out = widths[0] * (1 + setup.bidirectional)
    shapes = [(steps, batch, out), *((rows, batch, width) for width in widths)]
    return Problem(setup, layer, x, hx, mask, [normal(*shape) for shape in shapes])


def inputs_of(problem: Problem, device: Any, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """x, (B, T, I) for a layer that is batch_first, and hx, as leaves."""
    form = problem.setup.form
    x = problem.x.to(device, dtype)
    x = cases.with_layout(x, form) if form in cases.LAYOUTS else x
    x = x.transpose(0, 1) if form == "batch_first" else x
    hx = [h.detach().to(device, dtype).requires_grad_() for h in problem.hx]
    return x.detach().requires_grad_(), hx


def call(problem: Problem, module: Any, x: Tensor, hx: Sequence[Tensor]) -> list[Tensor]:
    """y (T, B, P) with zeros where a sequence has ended, and the states."""
    lengths, batch_first = problem.setup.lengths, problem.setup.form == "batch_first"
    state = None if not hx else (tuple(hx) if len(hx) > 1 else hx[0])
    mask = None if problem.mask is None else problem.mask.to(x.device)
    if lengths is None:
        y, last = module(x, state, *([] if mask is None else [mask.t() if batch_first else mask]))
        return [y.transpose(0, 1) if batch_first else y, *leaves_of(last)]
    in_order = lengths == sorted(lengths, reverse=True)

    def pack(padded: Tensor) -> PackedSequence:
        return pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=in_order)

    y, last = module(pack(x), state, *([] if mask is None else [pack(mask)]))
    padded, _ = pad_packed_sequence(y)
    return [padded, *leaves_of(last)]


def run(problem: Problem, module: Any, device: Any, dtype: torch.dtype) -> Tensors:
    """Outputs and, by the setup's loss, all gradients of a module on a device, in a type."""
    x, hx = inputs_of(problem, device, dtype)
    outputs = call(problem, module, x, hx)
    names = ["y", *(f"state{i}" for i in range(len(outputs) - 1))]
    results = {name: out.detach() for name, out in zip(names, outputs, strict=True)}
    loss = problem.setup.loss
    leaves = {"dx": x} | {f"dhx{i}": h for i, h in enumerate(hx)}
    leaves |= {f"d{name}": p for name, p in module.named_parameters()}
    if loss == "sum":  # hands the engine a gradient of stride 0
        given: Any = ([outputs[0].sum()], None)
    else:
        chosen = slice({"all": 0, "y": 0, "state": 1}[loss], 1 if loss == "y" else None)
        cotangents = [c.to(device, dtype) for c in problem.cotangents[chosen]]
        given = (outputs[chosen], cotangents)
    grads = torch.autograd.grad(given[0], list(leaves.values()), given[1], allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        grad = torch.zeros_like(leaf) if grad is None else grad
        results[name] = (
            grad.transpose(0, 1) if name == "dx" and x.shape != problem.x.shape else grad
        )
    return results


def module_on(problem: Problem, ours: bool, device: Any, dtype: torch.dtype) -> Any:
    """The problem's layer, or torch.nn's with its weights."""
    if ours:
        return copy.deepcopy(problem.layer).to(device, dtype)
    twin = problem.setup.layer(ours=False)
    twin.load_state_dict(problem.layer.state_dict())
    return twin.to(device, dtype)


def run_ours(problem: Problem, device: Any) -> Tensors:
    dtype = problem.setup.dtype
    with products(problem.setup.precision == "tf32"):
        return run(problem, module_on(problem, True, device, dtype), device, dtype)


def run_exactly(problem: Problem) -> Tensors:
    """float64 on the CPU: torch.nn, or reference.py."""
    theirs = problem.setup.has_cudnn
    engine = contextlib.nullcontext() if theirs else rnnfast.use_engine("reference")
    with engine:
        return run(problem, module_on(problem, not theirs, "cpu", f64), "cpu", f64)


def run_peer(problem: Problem, device: Any) -> Tensors:
    """cuDNN's results, or for what it lacks or can't do those of reference.py."""
    dtype = problem.setup.dtype
    with products(problem.setup.precision == "tf32"):
        if problem.setup.has_cudnn:
            try:
                return run(problem, module_on(problem, False, device, dtype), device, dtype)
            except RuntimeError as error:
                if "cudnn" not in str(error).lower():
                    raise
        with rnnfast.use_engine("reference"):
            return run(problem, module_on(problem, True, device, dtype), device, dtype)


def run_peer_again(problem: Problem, device: Any, seed: int) -> Tensors:
    """On numbers that differ by less than a rounding; of TF32 where the peer, a CPU's, has none."""
    gen = torch.Generator().manual_seed(seed)
    coarse = problem.setup.precision == "tf32" and CUDA_TESTS_ON != "cuda"

    def noisy(values: Tensor) -> Tensor:
        if coarse:
            noise = torch.rand(values.shape, generator=gen, dtype=f64) * 2 - 1
            return values.detach() * (1 + PRECISIONS["tf32"][1] * noise)
        return tolerance.last_bits(values.to(problem.setup.dtype), gen).double()

    layer = copy.deepcopy(problem.layer)
    for p in layer.parameters():
        p.data = noisy(p)
    x, hx = noisy(problem.x), [noisy(h) for h in problem.hx]
    if problem.setup.form == "expanded":
        x = x[:1].expand_as(x).contiguous()
    twin = Problem(problem.setup, layer, x, hx, problem.mask, problem.cotangents)
    return run_peer(twin, device)


def on_cpu(results: Tensors) -> Tensors:
    return {name: value.cpu() for name, value in results.items()}


def check_tensor(name: str, ours: Tensor, peer: tolerance.Peer, ref: Tensor, precision: str) -> str:
    """tolerance.py's rule for every type; what is wrong in words."""
    dtype, rounding, most = PRECISIONS[precision]
    assert ours.shape == ref.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(ref.shape)}"
    assert ours.dtype == dtype, f"{name}: {ours.dtype}, not {dtype}"
    scale, error = biggest(ref), biggest(ours.double() - ref)
    if precision == "float64":
        return "" if error <= most * scale else f"{name}: off by {error:.3g} of {scale:.3g}"
    theirs = biggest(peer[name].double() - ref)
    draws = peer.draws()
    while not error <= 2 * theirs + 4 * rounding * scale:  # NaN compares false
        result = next(draws, None)
        if result is None:
            return f"{name}: off by {error:.3g} of {scale:.3g}, the peer by {theirs:.3g}"
        theirs = max(theirs, biggest(result[name].double() - ref))
    return ""


def check(setup: Setup, device: Any, kernel: str = "") -> None:
    """The rule for outputs and every gradient; all tensors that break it are named. ``kernel``: the
    one that must compute them."""
    problem = build(setup)
    ref = run_exactly(problem)
    with kernel_forced(kernel):
        ours = on_cpu(run_ours(problem, device))
        assert kernel in ("", kernel_ran())
    peer = tolerance.Peer(
        {} if setup.precision == "float64" else on_cpu(run_peer(problem, device)),
        lambda seed: on_cpu(run_peer_again(problem, device, seed)),
    )
    assert ours.keys() == ref.keys()
    broken = [check_tensor(name, ours[name], peer, ref[name], setup.precision) for name in ref]
    assert not any(broken), "; ".join(filter(None, broken))
    # A peer that is wrong would make the rule pass anything. A gradient may nearly cancel, though.
    most = PRECISIONS[setup.precision][2]
    wrong = [k for k in peer if not biggest(peer[k].double() - ref[k]) <= most * biggest(ref[k])]
    assert len(wrong) <= len(ref) // 4 and all(name[0] == "d" for name in wrong), f"peer: {wrong}"


def results_of(layer: Any, x: Any, *args: Any) -> list[Tensor]:
    """Outputs of a layer, and the gradients of a loss that weighs each of their numbers."""
    outputs = leaves_of(layer(x, *args))
    loss = sum(
        (out * torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)).sum()
        for out in outputs
    )
    assert isinstance(loss, Tensor)
    wanted = [p for p in (x, *args, *layer.parameters()) if getattr(p, "requires_grad", False)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(loss, wanted)]


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(tolerance.same_bits(one, other) for one, other in zip(a, b, strict=True))


def assert_near(got: Sequence[Tensor], want: Sequence[Tensor], relative: float = 1e-9) -> None:
    """To within a part of the largest value of each tensor; devices may differ."""
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        assert a.shape == b.shape
        assert biggest(a - b) <= relative * biggest(b) + 1e-30, f"tensor {k}: {biggest(a - b)}"


def busy(milliseconds: float = 20) -> None:
    """Keeps the current stream of the device from going on for about that long."""
    torch.cuda._sleep(int(milliseconds * 1.8e6))


def spoil_free_memory(megabytes: int = 32) -> None:
    """Fills what the allocator will give out next on this stream, so that a number that nobody
    wrote, or that was read too late, is noticed."""
    for size in (2**9, 2**12, 2**16, 2**20, megabytes * 2**20):
        junk = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for _ in range(4)]
        del junk
