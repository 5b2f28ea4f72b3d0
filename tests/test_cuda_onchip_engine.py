"""The on-chip kernel of the CUDA engine as users meet it: forced, refused, explained, captured, and
under what torch brings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from on_cuda import (
    PRECISIONS,
    Setup,
    assert_near,
    build,
    busy,
    inputs_of,
    kernel_forced,
    kernel_ran,
    leaves_of,
    module_on,
    products,
    same_bits,
    spoil_free_memory,
)
from test_cuda_graphs import check_replays
from test_cuda_onchip import kinds
from test_cuda_streams import layer_and_input, train
from tolerance import biggest
from torch import Tensor, nn

import rnnfast
from rnnfast import _cuda
from rnnfast.cells import CELLS

pytestmark = pytest.mark.cuda

CAPABILITY, SHARED_BYTES = 90, 227 << 10  # of the device of loops

# --------------------------------------------------------------------------- torch around it


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_autocast_is_a_layer_of_the_type(name: str, device: torch.device) -> None:
    """To the bit, with float32 parameters and their gradients: float32 weights that the kernel
    would refuse come to it in 16 bits."""
    module = getattr(rnnfast, name)(5, 33, 2).to(device)
    x = torch.randn(3, 9, 5).to(device)
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(module).to(dtype)
        with kernel_forced("onchip"):
            with torch.autocast(device.type, dtype=dtype):
                outputs = leaves_of(module(x))
                assert kernel_ran() == "onchip"
            wanted = leaves_of(half(x.to(dtype)))
            assert same_bits([t.detach() for t in outputs], [t.detach() for t in wanted])
            loss, other = (out[0].float().square().sum() for out in (outputs, wanted))
            grads = torch.autograd.grad(loss, list(module.parameters()))
            halves = torch.autograd.grad(other, list(half.parameters()))
        assert all(g.dtype == torch.float32 for g in grads)
        assert same_bits(grads, [g.float() for g in halves])


@kinds
def test_compile_fullgraph(kind: str, device: torch.device) -> None:
    problem = build(Setup(kind, "bfloat16", 5, 9, 7, 33, bidirectional=True))
    layer = module_on(problem, True, device, torch.bfloat16)
    x, _ = inputs_of(problem, device, torch.bfloat16)
    inputs = [x, *layer.parameters()]
    torch._dynamo.reset()
    with kernel_forced("onchip"):
        want = layer(x)
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert kernel_ran() == "onchip"
        grads, wanted = (torch.autograd.grad(out[0].sum(), inputs) for out in (got, want))
    assert_near(leaves_of(got), leaves_of(want), 2**-6)
    assert_near(grads, wanted, 2**-6)


# --------------------------------------------------------------------------- refused, and told


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "diagonal": (
        lambda: rnnfast.IndRNN(5, 9),
        torch.float16,
        "the on-chip engine needs a dense recurrence, got indrnn_relu, whose steps have no product",
    ),
    "projection": (
        lambda: rnnfast.LSTM(5, 33, proj_size=7),
        torch.bfloat16,
        "the on-chip engine has no projection, got one from H = 33 to P = 7",
    ),
    "float64": (
        lambda: rnnfast.GRU(5, 9),
        torch.float64,
        "float64 products are not in the tiles",
    ),
    "float32": (
        lambda: rnnfast.LSTM(5, 9),
        torch.float32,
        "the on-chip engine has no float32 products without TF32, which "
        "torch.backends.cudnn.rnn.fp32_precision allows",
    ),
    "lstm": (
        lambda: rnnfast.LSTM(5, 193),
        torch.float16,
        "the on-chip engine holds w_hh of up to H = 192 units in one block, got H = 193",
    ),
    "layers": (
        lambda: rnnfast.GRU(5, 200, 2),
        torch.bfloat16,
        "the on-chip engine holds w_hh of up to H = 192 units in one block, got H = 200",
    ),
    "directions": (
        lambda: rnnfast.RNN(5, 257, bidirectional=True),
        torch.float16,
        "the on-chip engine holds w_hh of up to H = 256 units in one block, got H = 257",
    ),
}


@pytest.mark.parametrize(("make", "dtype", "words"), REFUSED.values(), ids=REFUSED)
def test_what_it_refuses(make: Any, dtype: torch.dtype, words: str, device: torch.device) -> None:
    """In a sentence, and nothing runs in its place; without the wish the step engine does."""
    layer = make().to(device, dtype)
    x = torch.randn(3, 4, 5, dtype=dtype).to(device)
    with kernel_forced("onchip"):
        for mode in (torch.enable_grad, torch.no_grad):
            with mode(), pytest.raises(RuntimeError) as told:
                layer(x)
            said = str(told.value)
            assert said.startswith(f"rnnfast: {words} (use_engine forces the on-chip kernel)")
        if device.type == "cuda":
            row = rnnfast.explain(layer, x).rows[0]
            assert (row.engine, row.reason) == ("none", f"{words} (use_engine forces it)")
    layer(x)
    assert kernel_ran() == "step"


def test_float32_is_taken_with_tf32_only(device: torch.device) -> None:
    layer, x = rnnfast.LSTM(5, 33).to(device), torch.randn(3, 4, 5).to(device)
    with kernel_forced("onchip"):
        with products(True):
            layer(x)
            assert kernel_ran() == "onchip"
            with pytest.raises(RuntimeError, match="up to H = 128 units in one block, got H = 129"):
                rnnfast.LSTM(5, 129).to(device)(x)
        with pytest.raises(RuntimeError, match="float32 products without TF32"):
            layer(x)


@kinds
def test_the_reason_can_be_asked_for(kind: str, device: torch.device) -> None:
    """Without a call: it is empty just where forward, or backward, runs."""
    capability, shared_bytes = CAPABILITY, SHARED_BYTES
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = 10 * properties.major + properties.minor
        shared_bytes = properties.shared_memory_per_block_optin
    (cell,) = (spec.id for spec in CELLS if spec.name == kind.lower())
    for hidden in (1, 128, 176, 177, 192, 193, 256, 257):
        problem = build(Setup(kind, "float16", 2, 3, 5, hidden))
        layer = module_on(problem, True, device, torch.float16)
        x, _ = inputs_of(problem, device, torch.float16)
        sizes = (2, 3, 5, hidden, hidden)
        for backward in (False, True):
            why = _cuda.Passes(
                cell, sizes, 2, capability, shared_bytes, backward=backward
            ).why_not_onchip()
            with kernel_forced("" if backward else "onchip"):
                try:
                    y = layer(x)[0]
                    with kernel_forced("onchip"):
                        y.sum().backward() if backward else None
                    said = ""
                except RuntimeError as error:
                    said = str(error).removeprefix("rnnfast: ").split(" (use_engine")[0]
            assert said == why


SIDE_BY_SIDE: dict[str, tuple[dict[str, Any], str, int]] = {
    "one": ({}, "-", 1),
    "directions": ({"bidirectional": True}, "directions", 2),
    "layers": ({"num_layers": 3}, "layers", 3),
}


@pytest.mark.parametrize(("options", "split", "streams"), SIDE_BY_SIDE.values(), ids=SIDE_BY_SIDE)
def test_last_run_and_explain_tell_the_same(
    options: dict[str, Any], split: str, streams: int, cuda: torch.device
) -> None:
    layer, x, _ = layer_and_input("LSTM", options, cuda, "float16")
    sm = "sm_{}{}".format(*torch.cuda.get_device_capability())
    for kernel, words in (
        ("onchip", "w_hh stays on the chip for all steps, forced by use_engine"),
        ("step", "a cuBLAS product and one kernel a step, forced by use_engine"),
        (None, "a cuBLAS product and one kernel a step;"),
    ):
        with rnnfast.use_engine("cuda", kernel=kernel):
            rows = rnnfast.explain(layer, x).rows
            layer(x)
            ran = rnnfast.last_run()
        assert (ran["engine"], ran["kernel"]) == ("cuda", kernel or "step")
        assert (ran["device"], ran["streams"]) == (sm, streams)
        for row in rows:
            assert (row.engine, row.isa, row.split, row.kernel) == (
                "cuda",
                sm,
                split,
                ran["kernel"],
            )
            assert words in row.reason


def test_the_wish_is_undone(cuda: torch.device) -> None:
    layer, x, _ = layer_and_input("GRU", {}, cuda, "bfloat16")
    with rnnfast.use_engine("auto", kernel="onchip"):
        with rnnfast.use_engine("cuda", kernel="step"):
            layer(x)
            assert rnnfast.last_run()["kernel"] == "step"
        layer(x)
        assert rnnfast.last_run()["kernel"] == "onchip"
    layer(x)
    assert rnnfast.last_run()["kernel"] == "step"
    rnnfast.use_engine("cuda", kernel="onchip")
    rnnfast.use_engine("auto")
    layer(x)
    assert rnnfast.last_run()["kernel"] == "step"


# --------------------------------------------------------------------------- streams and graphs

OPTIONS: dict[str, dict[str, Any]] = {
    "one": {},
    "directions": {"bidirectional": True},
    "layers": {"num_layers": 3},
    "packed": {"form": "packed", "num_layers": 3},
}
forms = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
OF_KIND = {"LSTM": "float16", "GRU": "bfloat16", "RNN_tanh": "tf32"}
few_kinds = pytest.mark.parametrize("kind", OF_KIND)


@forms
@few_kinds
def test_graphs(kind: str, options: dict[str, Any], cuda: torch.device) -> None:
    """Captured forward alone, and with backward: nothing is copied from the host."""
    precision = OF_KIND[kind]
    near = 8 * PRECISIONS[precision][1]
    layer, x, given = layer_and_input(kind, options, cuda, precision)

    def forward(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return leaves_of(layer(given(x)))

    with products(True), rnnfast.use_engine("cuda", kernel="onchip"):
        check_replays(layer, x, forward, near)
        check_replays(layer, x, lambda x: train(layer, x, given), near)
        assert rnnfast.last_run()["kernel"] == "onchip"


@forms
def test_the_same_bits_beside_other_work(options: dict[str, Any], cuda: torch.device) -> None:
    kind = list(OF_KIND)[len(options) % 3]
    layer, x, given = layer_and_input(kind, options, cuda, OF_KIND[kind])
    matrix = torch.randn(1024, 1024, device=cuda)
    with products(True), rnnfast.use_engine("cuda", kernel="onchip"):
        want = train(layer, x, given)
        for _ in range(20):
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(10):
                    matrix @ matrix
            spoil_free_memory()
            assert same_bits(train(layer, x, given), want)


@forms
def test_two_streams_at_once(options: dict[str, Any], cuda: torch.device) -> None:
    """Both of the kernel's: blocks of two calls share multiprocessors and no room."""
    layer, x, given = layer_and_input("LSTM", options, cuda, "float16")
    other, z, given_z = layer_and_input("GRU", {"num_layers": 2}, cuda, "bfloat16")
    with rnnfast.use_engine("cuda", kernel="onchip"):
        want, want_z = train(layer, x, given), train(other, z, given_z)
        streams = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        runs: list[list[list[Tensor]]] = [[], []]
        for _ in range(5):
            for stream, found, args in zip(
                streams, runs, ((layer, x, given), (other, z, given_z)), strict=True
            ):
                with torch.cuda.stream(stream):
                    found.append(train(*args))
        torch.cuda.synchronize()
    assert all(same_bits(run, want) for run in runs[0])
    assert all(same_bits(run, want_z) for run in runs[1])


@forms
def test_nothing_waits_for_the_device(options: dict[str, Any], cuda: torch.device) -> None:
    """Forward and backward return while the device still sleeps; then they find what was written
    late."""
    layer, x, given = layer_and_input("LSTM", options, cuda, "bfloat16")
    for launch in _cuda.LAUNCHES:
        with rnnfast.use_engine("cuda", kernel="onchip", launch=launch):
            want = train(layer, x, given)
            late = torch.zeros_like(x)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                busy(100)
                asleep = torch.cuda.Event()
                late.copy_(x)
                asleep.record()
                got = train(layer, late, given)
                returned_early = not asleep.query()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        assert returned_early, "the host waited for the device"
        assert same_bits(got, want)


def test_training_lowers_the_loss(device: torch.device) -> None:
    """As the step engine does, step for step."""
    problem = build(Setup("LSTM", "tf32", 6, 5, 4, 33, num_layers=2))
    target = torch.randn(6, 5, 33).to(device) / 4
    losses = []
    for kernel in ("onchip", "step"):
        module = module_on(problem, True, device, torch.float32)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        mine = []
        with products(True), kernel_forced(kernel):
            for _ in range(10):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(module(problem.x.to(device).float())[0], target)
                loss.backward()
                optimizer.step()
                mine.append(loss.detach())
        losses.append(torch.stack(mine))
    assert_near(losses[:1], losses[1:], 2**-6)
    assert float(losses[0][-1]) < float(losses[0][0]) and biggest(losses[0]) < 10
