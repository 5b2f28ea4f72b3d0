"""The CUDA engine and streams: it waits for what came before it on the caller's, what comes after
waits for it, and the host waits for nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from on_cuda import (
    Setup,
    assert_near,
    build,
    busy,
    inputs_of,
    leaves_of,
    module_on,
    results_of,
    same_bits,
    spoil_free_memory,
)
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast

pytestmark = pytest.mark.cuda

POOL = 32  # streams of torch's pool, given out in turn
OPTIONS: dict[str, dict[str, Any]] = {
    "one": {},
    "directions": {"bidirectional": True},
    "layers": {"num_layers": 3},
    "both": {"num_layers": 2, "bidirectional": True},
    "packed": {"form": "packed", "num_layers": 3},
    "nine_layers": {"num_layers": 9},
}
forms = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
KINDS_OF_STREAMS = ("LSTM", "GRU", "IndRNN_tanh")


@pytest.fixture(params=KINDS_OF_STREAMS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def layer_and_input(
    kind: str, options: dict[str, Any], device: torch.device, precision: str = "float32"
) -> tuple[Any, Tensor, Callable[[Tensor], Any]]:
    """A layer, its input, and how that is given to it."""
    problem = build(Setup(kind, precision, 19, 6, 9, 33, **options))
    layer = module_on(problem, True, device, problem.setup.dtype)
    x, _ = inputs_of(problem, device, problem.setup.dtype)
    lengths = problem.setup.lengths
    if lengths is None:
        return layer, x.detach(), lambda x: x
    sizes = pack_padded_sequence(x.detach().cpu(), torch.tensor(lengths)).batch_sizes
    rows = int(sizes.sum())
    return layer, x.detach().reshape(-1, 9)[:rows], lambda x: PackedSequence(x, sizes)


def train(layer: Any, x: Tensor, given: Callable[[Tensor], Any]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    outputs = leaves_of(layer(given(x)))
    loss = torch.stack([out.square().sum() for out in outputs]).sum()
    return [
        *(out.detach() for out in outputs),
        *torch.autograd.grad(loss, [x, *layer.parameters()]),
    ]


def occupy_the_pool(milliseconds: float) -> None:
    """The engine's own streams come late to their work: who does not wait for them is noticed."""
    for _ in range(POOL):
        with torch.cuda.stream(torch.cuda.Stream()):
            busy(milliseconds)


@forms
@pytest.mark.parametrize("own_stream", [False, True], ids=["default", "other"])
def test_it_waits_for_what_came_before(
    kind: str, options: dict[str, Any], own_stream: bool, cuda: torch.device
) -> None:
    """The input is written late, by the same stream; weights, too."""
    layer, x, given = layer_and_input(kind, options, cuda)
    want = train(layer, x, given)
    weights = [p.detach().clone() for p in layer.parameters()]
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    late = torch.zeros_like(x)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        busy()
        late.copy_(x)
        with torch.no_grad():
            for p, value in zip(layer.parameters(), weights, strict=True):
                p.copy_(value)
        got = train(layer, late, given)
    torch.cuda.synchronize()
    assert same_bits(got, want)


@forms
@pytest.mark.parametrize("own_stream", [False, True], ids=["default", "other"])
def test_what_comes_after_waits_for_it(
    kind: str, options: dict[str, Any], own_stream: bool, cuda: torch.device
) -> None:
    """Results are read, inputs overwritten and memory given to others right after the call."""
    layer, x, given = layer_and_input(kind, options, cuda)
    want = train(layer, x, given)
    with torch.no_grad():
        forward = leaves_of(layer(given(x)))
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        taken = x.clone()
        occupy_the_pool(2)
        with torch.no_grad():
            read = [out.clone() for out in leaves_of(layer(given(taken)))]
            taken.fill_(float("nan"))
        spoil_free_memory()
        taken = x.clone()
        occupy_the_pool(2)
        got = [out.clone() for out in train(layer, taken, given)]
        taken.fill_(float("nan"))
        spoil_free_memory()
    torch.cuda.synchronize()
    assert same_bits(read, [out.detach() for out in forward])
    assert same_bits(got, want)


@forms
def test_the_pool_may_give_out_the_callers_stream(
    kind: str, options: dict[str, Any], cuda: torch.device
) -> None:
    """A stream of torch.cuda.Stream() is one of the pool's, and its turn comes again."""
    layer, x, given = layer_and_input(kind, options, cuda)
    with torch.no_grad():
        want = leaves_of(layer(given(x)))
    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        runs = [leaves_of(layer(given(x))) for _ in range(POOL + 2)]
    torch.cuda.synchronize()
    assert all(same_bits(run, want) for run in runs)


@forms
def test_two_streams_at_once(kind: str, options: dict[str, Any], cuda: torch.device) -> None:
    """Calls of two streams share neither room nor cuBLAS's workspace."""
    layer, x, given = layer_and_input(kind, options, cuda)
    other, z, given_z = layer_and_input("GRU", {"num_layers": 2}, cuda, "float64")
    want, want_z = train(layer, x, given), train(other, z, given_z)
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    runs: list[list[list[Tensor]]] = [[], []]
    for _ in range(3):
        for stream, found, args in zip(
            streams, runs, ((layer, x, given), (other, z, given_z)), strict=True
        ):
            with torch.cuda.stream(stream):
                found.append(train(*args))
    torch.cuda.synchronize()
    assert all(same_bits(run, want) for run in runs[0])
    assert all(same_bits(run, want_z) for run in runs[1])


@forms
def test_the_same_bits_beside_other_work(
    kind: str, options: dict[str, Any], cuda: torch.device
) -> None:
    layer, x, given = layer_and_input(kind, options, cuda, "bfloat16")
    want = train(layer, x, given)
    matrix = torch.randn(1024, 1024, device=cuda)
    for _ in range(5):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                matrix @ matrix
        spoil_free_memory()
        assert same_bits(train(layer, x, given), want)


@pytest.fixture
def _waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@forms
@pytest.mark.parametrize("state", [False, True], ids=["nostate", "state"])
@pytest.mark.parametrize("more", [False, True], ids=["", "reset or uneven"])
def test_nothing_waits_for_the_device(
    kind: str, options: dict[str, Any], state: bool, more: bool, cuda: torch.device
) -> None:
    """Forward and backward return while the device still sleeps, and torch sees no wait either."""
    packed = "form" in options
    form = ("packed_uneven" if more else "packed") if packed else "contiguous"
    setup = Setup("LSTM", "float32", 5, 4, 9, 33, state=state, **options | {"form": form})
    problem = build(replace(setup, kind=kind, reset=more and not packed))
    layer = module_on(problem, True, cuda, torch.float32)
    x, hx = inputs_of(problem, cuda, torch.float32)
    hx_given: Any = None if not hx else (tuple(hx) if len(hx) > 1 else hx[0])
    mask = None if problem.mask is None else problem.mask.to(cuda)
    given: Any = x
    if problem.setup.lengths is not None:
        lengths = torch.tensor(problem.setup.lengths)
        given = pack_padded_sequence(x.detach(), lengths, enforce_sorted=not more)
        x = given.data.requires_grad_()
    cotangents = [torch.ones_like(out) for out in leaves_of(layer(given, hx_given, mask))]
    inputs = [x, *hx, *layer.parameters()]

    def step() -> list[Tensor]:
        outputs = leaves_of(layer(given, hx_given, mask))
        grads = torch.autograd.grad(outputs, inputs, cotangents)
        return [*(out.detach() for out in outputs), *grads]

    want = step()  # kernels are loaded at their first launch, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        busy(100)
        asleep = torch.cuda.Event()
        asleep.record()
        got = step()
        returned_early = not asleep.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert returned_early, "the host waited for the device"
    assert same_bits(got, want)


@pytest.mark.usefixtures("_waiting_is_an_error")
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=["one", "directions"])
def test_resets_of_packed_input_do_not_wait(options: dict[str, Any], cuda: torch.device) -> None:
    layer = rnnfast.LSTM(5, 9, **options, device=cuda)
    sizes = torch.tensor([3, 2, 1])
    x = PackedSequence(torch.zeros(6, 5, device=cuda), sizes)
    mask = PackedSequence(torch.zeros(6, device=cuda, dtype=torch.bool), sizes)
    layer(x, None, mask)[0].data.sum().backward()


def test_every_device(cuda: torch.device) -> None:
    """Also one that is not the current one."""
    current = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        for options in OPTIONS.values():
            layer, x, given = layer_and_input("GRU", options, device, "float64")
            got = train(layer, x, given)
            assert all(t.device == device for t in got)
            assert torch.cuda.current_device() == current
            exact, z, given_z = layer_and_input("GRU", options, torch.device("cpu"), "float64")
            assert_near(got, train(exact, z, given_z))


def test_threads_of_the_host(cuda: torch.device) -> None:
    """Each with a stream of its own, at the same time."""
    layer, x, given = layer_and_input("LSTM", {"num_layers": 2, "bidirectional": True}, cuda)
    want = train(layer, x, given)
    torch.cuda.synchronize()
    runs: list[list[Tensor]] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                found = train(layer, x, given)
                torch.cuda.current_stream().synchronize()
                runs.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 20 and all(same_bits(run, want) for run in runs)


def test_tensors_of_another_stream(cuda: torch.device) -> None:
    """Made on one stream, used on another after an event: torch's own rules, and nothing more."""
    layer, x, _ = layer_and_input("LSTM", {"bidirectional": True}, cuda)
    want = results_of(layer, x)
    side, event = torch.cuda.Stream(), torch.cuda.Event()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        busy()
        copy = x.clone()
        event.record()
    event.wait()
    copy.record_stream(torch.cuda.current_stream())
    assert same_bits(results_of(layer, copy), want)
