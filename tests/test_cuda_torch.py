"""The CUDA engine under what torch brings: flags of precision, autocast, compile, export, func."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from on_cuda import (
    BY_DEFAULT,
    PRECISIONS,
    Setup,
    assert_near,
    build,
    cudnn,
    inputs_of,
    leaves_of,
    module_on,
    products,
    results_of,
    same_bits,
)
from test_transforms import NAMES, layers
from tolerance import biggest
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import rnnfast

pytestmark = pytest.mark.cuda

f64 = torch.float64
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
DENSE = ("LSTM", "GRU", "RNN_tanh")


@pytest.fixture(params=range(len(NAMES)), ids=NAMES)
def layer(request: pytest.FixtureRequest, device: torch.device) -> Any:
    torch.manual_seed(0)
    torch._dynamo.reset()  # each kind of layer is one more version of the same code
    return layers()[request.param].to(device)


def random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=f64).to(device)


# --------------------------------------------------------------------------- flags


def long_sums(kind: str, device: torch.device) -> tuple[Any, Any, list[Tensor]]:
    """A layer whose products have long rows, its input, and its float64 results."""
    problem = build(Setup(kind, "float32", 3, 64, 1024, 64))
    exact, (x, _) = module_on(problem, True, "cpu", f64), inputs_of(problem, "cpu", f64)
    layer = module_on(problem, True, device, torch.float32)
    return layer, inputs_of(problem, device, torch.float32)[0], results_of(exact, x)


def worst(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(results, exact, strict=True)
    return [biggest(a.cpu().double() - b) / biggest(b) for a, b in pairs]


@pytest.mark.parametrize("kind", [*DENSE, "IndRNN_tanh"])
def test_tf32_is_what_the_flag_says(kind: str, cuda: torch.device) -> None:
    """In forward and in backward; the flag is that of recurrent layers, not that of matmul."""
    layer, x, exact = long_sums(kind, cuda)
    recurrent, matmul = cudnn.rnn, torch.backends.cuda.matmul
    with products(True):
        rounded = results_of(layer, x)
        recurrent.fp32_precision = "ieee"
        assert matmul.allow_tf32
        plain = results_of(layer, x)
    with products(False):
        assert same_bits(results_of(layer, x), plain)
        recurrent.fp32_precision = "tf32"
        assert same_bits(results_of(layer, x), rounded)
    assert max(worst(plain, exact)) < 2e-5
    assert worst(rounded, exact)[0] > 10 * worst(plain, exact)[0], "of y"
    dx = 2 + (kind == "LSTM")
    assert worst(rounded, exact)[dx] > 10 * worst(plain, exact)[dx], "of dx"
    assert max(worst(rounded, exact)) < 0.05


def test_by_default_as_torch_nn(cuda: torch.device) -> None:
    """Whose layers use TF32 unless told otherwise."""
    assert BY_DEFAULT == "tf32"
    layer, x, _ = long_sums("LSTM", cuda)
    cudnn.rnn.fp32_precision = BY_DEFAULT  # the fixture puts it back
    default = results_of(layer, x)
    cudnn.allow_tf32 = True
    assert same_bits(results_of(layer, x), default)


def test_flags_of_half_precision_sums_change_nothing(cuda: torch.device) -> None:
    layer, x, _ = long_sums("LSTM", cuda)
    layer, x = layer.half(), x.detach().half().requires_grad_()
    want = results_of(layer, x)
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    try:
        for flag in (True, False):
            matmul.allow_fp16_reduced_precision_reduction = flag
            assert same_bits(results_of(layer, x), want)
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before


def test_the_flag_is_heeded_in_compiled_code(cuda: torch.device) -> None:
    """Also where no eager call came between."""
    layer, x, exact = long_sums("GRU", cuda)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x), backend="aot_eager", fullgraph=True)
    for tf32 in (True, False, True):
        with products(tf32):
            compiled(x)  # the first call traces
            y, _ = compiled(x)
            (dx,) = torch.autograd.grad(y.sum(), x)
            with torch.no_grad():
                error = worst([y.detach()], exact[:1])[0]
            assert (error > 2e-5) is tf32, f"TF32 {tf32}, but an error of {error:.3g}"
    with products(True):
        layer(x)  # leaves the engine with TF32 allowed
    with products(False):
        y, _ = compiled(x)
        assert worst([y.detach()], exact[:1])[0] < 2e-5
    assert dx.shape == x.shape


# --------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", DENSE)
def test_autocast_as_torch_nn(
    kind: str, options: dict[str, Any], dtype: torch.dtype, cuda: torch.device
) -> None:
    """The same dtypes, and no larger an error than the rule allows."""
    problem = build(Setup(kind, "float32", 9, 6, 5, 33, **options))
    x, _ = inputs_of(problem, cuda, torch.float32)
    found = []
    for ours in (True, False):
        module = module_on(problem, ours, cuda, torch.float32)
        with torch.autocast("cuda", dtype=dtype):
            outputs = leaves_of(module(x))
        loss = torch.stack([out.float().square().sum() for out in outputs]).sum()
        grads = torch.autograd.grad(loss, [x, *module.parameters()])
        found.append([*(out.detach() for out in outputs), *grads])
    exact, (x, _) = module_on(problem, True, "cpu", f64), inputs_of(problem, "cpu", f64)
    outputs = leaves_of(exact(x))
    loss = torch.stack([out.square().sum() for out in outputs]).sum()
    ref = [*outputs, *torch.autograd.grad(loss, [x, *exact.parameters()])]
    rounding = PRECISIONS[str(dtype).removeprefix("torch.")][1]
    for k, (got, peer, want) in enumerate(zip(*found, ref, strict=True)):
        assert got.dtype == peer.dtype, f"tensor {k}"
        want = want.detach()
        error, theirs = (biggest(t.cpu().double() - want) for t in (got, peer))
        assert error <= 2 * theirs + 4 * rounding * biggest(want), f"tensor {k}: {error}, {theirs}"


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "IndRNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_autocast_is_a_layer_of_the_type(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    """To the bit, with float32 parameters and their gradients."""
    module = getattr(rnnfast, name)(5, 9).to(device)
    half = copy.deepcopy(module).to(dtype)
    x = torch.randn(4, 5) if name.endswith("Cell") else torch.randn(3, 4, 5)
    x = x.to(device)
    with torch.autocast(device.type, dtype=dtype):
        outputs = leaves_of(module(x))
    wanted = leaves_of(half(x.to(dtype)))
    assert same_bits([t.detach() for t in outputs], [t.detach() for t in wanted])
    grads = torch.autograd.grad(outputs[0].float().square().sum(), list(module.parameters()))
    halves = torch.autograd.grad(wanted[0].float().square().sum(), list(half.parameters()))
    assert all(g.dtype == torch.float32 for g in grads)
    assert same_bits(grads, [g.float() for g in halves])


def test_training_with_a_gradient_scaler(cuda: torch.device) -> None:
    layer, head = rnnfast.LSTM(5, 16).to(cuda), nn.Linear(16, 1).to(cuda)
    parameters = [*layer.parameters(), *head.parameters()]
    optimizer, scaler = torch.optim.SGD(parameters, 0.5), torch.amp.GradScaler("cuda")
    x = torch.randn(7, 8, 5, device=cuda)
    want = x.sum((0, 2))[:, None] / 6
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = nn.functional.mse_loss(head(layer(x)[0][-1]).float(), want)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


# --------------------------------------------------------------------------- compile, export, func


def test_compile_fullgraph(layer: Any, device: torch.device) -> None:
    x = random(3, 2, 5, device=device).requires_grad_()
    want = layer(x)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert_near(leaves_of(got), leaves_of(want))
    inputs = [x, *layer.parameters()]
    assert_near(
        torch.autograd.grad(got[0].sum(), inputs), torch.autograd.grad(want[0].sum(), inputs)
    )


def test_export(layer: Any, device: torch.device) -> None:
    x = random(4, 2, 5, device=device)
    steps, batch = torch.export.Dim("steps", min=2, max=100), torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes={"input": {0: steps, 1: batch}})
    for shape in ((4, 2, 5), (50, 7, 5)):
        other = random(*shape, device=device)
        assert_near(leaves_of(program.module()(other)), leaves_of(layer(other)))


def test_vmap_and_jvp_run_the_reference(layer: Any, device: torch.device) -> None:
    x, v = random(4, 3, 2, 5, device=device), random(3, 2, 5, device=device)
    want = torch.stack([layer(one)[0] for one in x])
    got = vmap(lambda one: layer(one)[0])(x)
    assert rnnfast.last_run()["engine"] == "reference"
    assert_near([got], [want])
    value, tangent = jvp(lambda one: layer(one)[0], (x[0],), (v,))[:2]
    numeric = (layer(x[0] + 1e-6 * v)[0] - layer(x[0] - 1e-6 * v)[0]) / 2e-6
    assert_near([value], [want[0]])
    assert_near([tangent], [numeric], 1e-6)


def test_per_sample_gradients(layer: Any, device: torch.device) -> None:
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    x = random(4, 3, 5, device=device)

    def loss(p: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(layer, p, (one,))[0].square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for k, one in enumerate(x):
        want = torch.autograd.grad(layer(one)[0].square().sum(), list(layer.parameters()))
        assert_near([got[name][k] for name in parameters], want)


def test_checkpointing(layer: Any, device: torch.device) -> None:
    x = random(4, 3, 5, device=device).requires_grad_()
    found = []
    for use in (False, True):
        y = layer(x)[0]
        if use:
            y = torch.utils.checkpoint.checkpoint(lambda z: layer(z)[0], x, use_reentrant=False)
        found.append(torch.autograd.grad(y.sum(), [x, *layer.parameters()]))
    assert same_bits(*found)


def test_saved_tensors_on_the_cpu(cuda: torch.device) -> None:
    layer = rnnfast.LSTM(5, 9, 2, bidirectional=True, device=cuda)
    x = torch.randn(4, 3, 5, device=cuda, requires_grad=True)
    want = torch.autograd.grad(layer(x)[0].sum(), [x, *layer.parameters()])
    with torch.autograd.graph.save_on_cpu():
        y = layer(x)[0]
    assert same_bits(torch.autograd.grad(y.sum(), [x, *layer.parameters()]), want)


# --------------------------------------------------------------------------- processes

FORK = """
import os, torch, rnnfast
layer = rnnfast.LSTM(5, 9, 2)
x = torch.randn(4, 3, 5)
layer(x)
rnnfast.explain(layer, x)
with rnnfast.use_engine("cpu"):
    layer(x)
rnnfast.accelerate(torch.nn.LSTM(5, 9))(x)
rnnfast.last_run()
assert not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    y, _ = layer.to("cuda")(x.to("cuda"))
    y.sum().backward()
    os._exit(0 if y.is_cuda and rnnfast.last_run()["engine"] == "cuda" else 7)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_cuda_starts_where_it_is_used_only(cuda: torch.device) -> None:
    """So that a process which used the CPU engine may fork children that use CUDA. (After a
    backward pass, on the CPU too, it may not: autograd has asked for the devices.)"""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "child 0", done.stdout + done.stderr
