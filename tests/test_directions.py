"""Both directions of a layer at once: the same numbers as one by one, and right where only part of
the gradients is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast import _both

CELLS = ("LSTM", "GRU", "RNN", "IndRNN")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def make(cell: str, inputs: int, hidden: int, **options: Any) -> Any:
    return getattr(rnnfast, cell)(inputs, hidden, bidirectional=True, **options)


def results(layer: Any, x: torch.Tensor, *args: Any) -> list[torch.Tensor]:
    """Outputs and, with gradients on, every gradient."""
    y, state = layer(x, *args)
    outputs = [y, *(state if isinstance(state, tuple) else (state,))]
    if not torch.is_grad_enabled():
        return outputs
    loss = sum((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outputs)
    wanted = [x, *layer.parameters()]
    assert isinstance(loss, torch.Tensor)
    return [*outputs, *torch.autograd.grad(loss, wanted)]


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_both, "applies", lambda *_: False)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_same_numbers_as_one_by_one(
    cell: str, dtype: torch.dtype, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # two sizes of each: side by side, and one after the other because there is too little work
    for sizes in ((60, 9, 24, 64), (3, 2, 5, 7)):
        layer = make(cell, *sizes[2:], num_layers=2, dtype=dtype)
        x = torch.randn(sizes[0], sizes[1], sizes[2], dtype=dtype, requires_grad=grad)
        with torch.set_grad_enabled(grad):
            got = results(layer, x)
            with monkeypatch.context() as patch:
                one_by_one(patch)
                want = results(layer, x)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_side_by_side_really_happens() -> None:
    layer, x = make("LSTM", 64, 64), torch.randn(60, 8, 64, requires_grad=True)
    taken = []
    for _ in range(20):  # a busy machine may give one thread only, now and then
        y, _ = layer(x)
        taken.append(rnnfast.last_run())
        y.sum().backward()
    assert any(run["split"] == "directions" and run["threads"] == 2 for run in taken)
    rows = rnnfast.explain(layer, x).rows
    assert all((row.split, row.threads) == ("directions", 2) for row in rows)
    with rnnfast.use_engine("cpu", split="serial"), torch.no_grad():
        layer(x)
        assert rnnfast.last_run()["split"] == "serial"


@pytest.mark.parametrize("cell", CELLS)
def test_packed_reset_states_projection_frozen(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"proj_size": 16} if cell == "LSTM" else {}
    layer = make(cell, 24, 48, **options)
    x = torch.randn(40, 6, 24, requires_grad=True)
    reset = torch.rand(40, 6) < 0.1
    width = options.get("proj_size", 48)
    h, c = torch.randn(2, 6, width), torch.randn(2, 6, 48)
    hx = (h, c) if cell == "LSTM" else h

    def both_ways(*args: Any) -> None:
        got = results(layer, x, *args)
        with monkeypatch.context() as patch:
            one_by_one(patch)
            want = results(layer, x, *args)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    both_ways(hx, reset)
    both_ways(hx)
    lengths = torch.tensor([40, 33, 20, 20, 7, 1])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x.detach(), lengths)
    with torch.no_grad():
        got, _ = layer(packed, hx)
        with monkeypatch.context() as patch:
            one_by_one(patch)
            want, _ = layer(packed, hx)
        assert torch.equal(got.data, want.data)
        plain, _ = layer(x, hx)
        frozen, _ = layer.freeze()(x, hx)
        torch.testing.assert_close(frozen, plain, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="rnnfast: a frozen .*gives no gradients"):
        layer(x, hx)


@pytest.mark.parametrize("part", ["first", "second", "state", "none of x"])
def test_only_a_part_of_the_gradients(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make("LSTM", 16, 32).double()
    x = torch.randn(30, 4, 16, dtype=torch.float64, requires_grad=part != "none of x")
    wanted = [layer.weight_hh_l0, layer.weight_ih_l0_reverse, layer.bias_hh_l0]
    wanted += [x] if x.requires_grad else []

    def grads() -> Any:
        y, (_, c) = layer(x)
        loss = {"first": y[..., :32], "second": y[..., 32:], "state": c[1]}.get(part, y)
        return torch.autograd.grad(loss.square().sum(), wanted, allow_unused=True)

    got = grads()
    one_by_one(monkeypatch)
    want = grads()
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives(cell: str) -> None:
    layer = make(cell, 3, 4).double()
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor) -> Any:
        return torch.tanh(layer(x)[0]) if cell != "RNN" else layer(x)[0]

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


def test_checkpoint_and_hooks_unpack_once() -> None:
    layer = make("GRU", 8, 16, num_layers=2)
    x = torch.randn(6, 3, 8, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        return layer(x)[0]

    want = torch.autograd.grad(run(x).square().sum(), [x, *layer.parameters()])
    y = checkpoint(run, x, use_reentrant=False)
    got = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    packed, unpacked = [], []

    def pack(t: torch.Tensor) -> torch.Tensor:
        packed.append(t)
        return t

    def unpack(t: torch.Tensor) -> torch.Tensor:
        unpacked.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = run(x)
    y.square().sum().backward()
    assert len(unpacked) == len(packed)


def test_fake_tensors_outside_of_their_mode() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    y, _ = make("LSTM", 3, 4)(mode.from_tensor(torch.randn(3, 2, 3)))
    assert isinstance(y, FakeTensor) and y.shape == (3, 2, 8)


def test_operators_refuse_what_does_not_fit() -> None:
    x, w = torch.randn(3, 2, 5), torch.randn(16, 5)
    good = [None, None, w, torch.randn(16, 4), None, None, None, None, None]
    run = torch.ops.rnnfast.forward_both
    assert len(run(x, good, good, None, 0, False)) == 8
    short = good[:5]
    other = [*good[:2], torch.randn(32, 5), torch.randn(32, 8), *good[4:]]
    for second, text in (
        (short, "second must hold 9 tensors or None, got 5"),
        ([None] * 9, "second must hold w_ih and w_hh"),
        (other, "second must have the hidden size of first"),
    ):
        with pytest.raises(RuntimeError, match=f"rnnfast: {text}"):
            run(x, good, second, None, 0, False)
    half = [*good[:6], torch.randn(4, 4), *good[7:]]  # a projection of the same size in one only
    with pytest.raises(RuntimeError, match="w_hr in one of them only"):
        run(x, good, half, None, 0, False)
    with pytest.raises(RuntimeError, match="rnnfast: first must hold 13 tensors or None, got 9"):
        torch.ops.rnnfast.backward_both(x, good, good, None, 0, 1, 1)
