"""rnnfast.truncated: a stream in chunks, the state carried and the gradients cut."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import tolerance
import torch
import works
from test_modules import leaves_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import rnnfast

f64 = torch.float64
LAYERS = {
    "LSTM": lambda **k: rnnfast.LSTM(5, 17, 2, **k),
    "LSTM proj": lambda **k: rnnfast.LSTM(5, 17, proj_size=4, batch_first=True, **k),
    "GRU": lambda **k: rnnfast.GRU(5, 33, **k),
    "RNN": lambda **k: rnnfast.RNN(5, 9, 2, nonlinearity="relu", **k),
    "IndRNN": lambda **k: rnnfast.IndRNN(5, 9, **k),
    "torch.nn.GRU": lambda **k: nn.GRU(5, 9, **k),
}


def of_whole(library: Any, device: torch.device) -> list[tuple[str, Any, Tensor, Any]]:
    """Layers, an input, and what the layer makes of it in one call."""
    found = []
    for name in works.kinds(library):
        layer = getattr(library, name)(5, 33, 2, device=device)
        x = torch.randn(95, 8, 5, device=device)
        found.append((name, layer, x, layer(x)))
    return found


def by_hand(library: Any, device: torch.device) -> None:
    """torch.nn has no such function; its layers' states may be carried, by the helper too."""
    assert not hasattr(library, "truncated")
    for name, layer, x, (want, _) in of_whole(library, device):
        state, ys = None, []
        for chunk in x.split(20):
            y, state = layer(chunk, state)
            state = tuple(s.detach() for s in state) if name == "LSTM" else state.detach()
            ys.append(y)
        torch.testing.assert_close(torch.cat(ys), want, rtol=1e-4, atol=1e-5)
        helped = [y for y, _ in rnnfast.truncated(layer, x, steps=20)]
        assert all(torch.equal(a, b) for a, b in zip(helped, ys, strict=True))


@works.row(
    "Memory",
    "truncated backpropagation through time, `rnnfast.truncated`: forward bit for bit that of the "
    "whole sequence in float32 (CPU, chunks of 80 rows or more)",
    torch_nn="by hand; the helper takes its layers, too",
    theirs=by_hand,
)
def test_forward_is_that_of_the_whole(library: Any, device: torch.device) -> None:
    for _, layer, x, (want, state) in of_whole(library, device):
        pairs = list(library.truncated(layer, x, steps=20))
        got = torch.cat([output for output, _ in pairs])
        for a, b in zip(leaves_of((got, pairs[-1][1])), leaves_of((want, state)), strict=True):
            if device.type == "cpu":
                assert tolerance.same_bits(a.detach(), b.detach())
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_each_chunk(name: str) -> None:
    layer = LAYERS[name](dtype=f64)
    time = 1 if layer.batch_first else 0
    x = torch.randn((3, 10, 5) if time else (10, 3, 5), dtype=f64, requires_grad=True)
    state = None
    for k, (output, after) in enumerate(rnnfast.truncated(layer, x, steps=4)):
        want, _ = layer(x.split(4, time)[k], state)
        assert all(not s.requires_grad for s in leaves_of(after))
        inputs = [x, *layer.parameters()]
        grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (output, want)]
        for a, b in zip((output, *grads[0]), (want, *grads[1]), strict=True):
            torch.testing.assert_close(a, b)
        assert not grads[0][0].narrow(time, 0, 4 * k).any()  # nothing before the chunk
        state = after


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_initial_state_chunks_and_reset(name: str) -> None:
    layer = LAYERS[name](dtype=f64)
    x = torch.randn(10, 3, 5, dtype=f64)
    _, last = layer(x)
    start = tuple(s.detach() for s in last) if name == "LSTM" else last.detach()
    leaves = leaves_of(start)
    for leaf in leaves:
        leaf.requires_grad_()
    reset = torch.rand(10, 3) < 0.3
    want = layer(x, start, reset)[0]
    got = list(rnnfast.truncated(layer, x, start, steps=4, reset=reset))
    torch.testing.assert_close(torch.cat([o for o, _ in got]), want)
    assert torch.autograd.grad(got[0][0].sum(), leaves)[0].abs().sum() > 0
    assert torch.autograd.grad(got[1][0].sum(), leaves, allow_unused=True)[0] is None

    def stream() -> Iterator[Tensor]:
        yield from x.split([3, 6, 1])

    pieces = rnnfast.truncated(layer, stream(), start)
    torch.testing.assert_close(torch.cat([o for o, _ in pieces]), layer(x, start)[0])
    unbatched = rnnfast.truncated(layer, x[:, 0], steps=3)
    torch.testing.assert_close(torch.cat([o for o, _ in unbatched]), layer(x[:, 0])[0])


def test_lazily_with_the_weights_of_the_moment() -> None:
    """As the example trains: a step of the optimizer between chunks."""
    layer = rnnfast.GRU(5, 9)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    x = torch.randn(40, 4, 5)
    losses = []
    for _ in range(6):
        total = 0.0
        for (output, _), target in zip(
            rnnfast.truncated(layer, x, steps=10), x.sum(-1, keepdim=True).split(10), strict=True
        ):
            loss = (output.mean(-1, keepdim=True) - 0.1 * target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        losses.append(total)
    assert losses[-1] < losses[0]


def test_a_chunk_is_let_go() -> None:
    """Its output, and so its graph, is gone before the next chunk runs."""
    layer = rnnfast.LSTM(5, 9)
    seen: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def look(*_: Any) -> None:
        gc.collect()
        alive.extend(ref() is not None for ref in seen)

    layer.register_forward_pre_hook(look)
    for output, _ in rnnfast.truncated(layer, torch.randn(9, 2, 5), steps=3):
        seen.append(weakref.ref(output))
        del output
    assert len(alive) == 3 and not any(alive)


def test_recompute_inside() -> None:
    layer = rnnfast.LSTM(5, 9, recompute=True, dtype=f64)
    x = torch.randn(200, 2, 5, dtype=f64)
    got = torch.cat([o for o, _ in rnnfast.truncated(layer, x, steps=100)])
    torch.testing.assert_close(got, layer(x)[0])


@pytest.mark.parametrize("kept", ["frozen", "quantized"])
@pytest.mark.parametrize("name", ["LSTM", "LSTM proj", "GRU", "RNN", "IndRNN"])
def test_layers_for_inference(name: str, kept: str) -> None:
    """Bit for bit, with chunks of one row, too."""
    made = LAYERS[name]()
    layer = rnnfast.quantize(made) if kept == "quantized" else made.eval().freeze()
    time = 1 if layer.batch_first else 0
    x = torch.randn((3, 50, 5) if time else (50, 3, 5))
    reset = torch.rand(x.shape[:-1]) < 0.1
    with torch.inference_mode():
        _, start = layer(x)
        for batch, given in ((3, start), (1, None)):
            z, now = x.narrow(1 - time, 0, batch), reset.narrow(1 - time, 0, batch)
            want, state = layer(z, given, now)
            for steps in (1, 7, 64):
                pairs = list(rnnfast.truncated(layer, z, given, steps=steps, reset=now))
                got = torch.cat([output for output, _ in pairs], time)
                for a, b in zip(
                    leaves_of((got, pairs[-1][1])), leaves_of((want, state)), strict=True
                ):
                    assert tolerance.same_bits(a, b)
    with pytest.raises(RuntimeError, match="frozen or quantized layer gives no gradients"):
        next(rnnfast.truncated(layer, x.requires_grad_(), steps=7))


def test_a_chunk_is_cut_when_it_is_asked_for() -> None:
    """A list of 2**31 chunks would not fit."""
    layer = rnnfast.GRU(5, 9)
    x = torch.zeros(1).expand(2**31, 2, 5)
    chunks = rnnfast.truncated(layer, x, steps=1)
    assert [next(chunks)[0].shape for _ in range(2)] == [(1, 2, 9)] * 2


def test_errors() -> None:
    layer, x = rnnfast.GRU(5, 9), torch.randn(6, 2, 5)
    refused = [
        (TypeError, "needs a recurrent layer of rnnfast or torch.nn, got Linear"),
        (RuntimeError, "one direction, got bidirectional=True"),
        (RuntimeError, "got a PackedSequence; pad it"),
        (RuntimeError, "steps of truncated must be an int >= 1, got None"),
        (RuntimeError, "steps of truncated must be an int >= 1, got 0"),
        (RuntimeError, "steps of truncated goes with one tensor, got an input of type list"),
        (RuntimeError, "reset of truncated goes with one tensor, got an input of type tuple"),
        (RuntimeError, "without the features = (6, 2), got (6,)"),
        (TypeError, "a tensor or an iterable of chunks, got NoneType"),
        (NotImplementedError, "input of truncated must be a dense tensor (torch.strided), got"),
    ]
    calls = [
        lambda: rnnfast.truncated(nn.Linear(5, 9), x, steps=2),  # type: ignore[arg-type]
        lambda: rnnfast.truncated(rnnfast.GRU(5, 9, bidirectional=True), x, steps=2),
        lambda: rnnfast.truncated(layer, pack_sequence([x[:, 0]]), steps=2),
        lambda: rnnfast.truncated(layer, x),
        lambda: rnnfast.truncated(layer, x, steps=0),
        lambda: rnnfast.truncated(layer, [x, x], steps=2),
        lambda: rnnfast.truncated(layer, (x, x), reset=x[..., 0] > 0),
        lambda: next(rnnfast.truncated(layer, x, steps=2, reset=x[:, 0, 0] > 0)),
        lambda: rnnfast.truncated(layer, None),  # type: ignore[arg-type]
        lambda: rnnfast.truncated(layer, x.to_sparse(), steps=2),
    ]
    for call, (kind, text) in zip(calls, refused, strict=True):
        with pytest.raises(kind) as raised:
            call()
        assert str(raised.value).startswith("rnnfast: ") and text in str(raised.value)
