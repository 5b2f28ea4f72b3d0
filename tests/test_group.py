"""Both directions of a layer, or its layers, at once: the same numbers as one by one, and right
where only part of the gradients is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast import _group

CELLS = ("LSTM", "GRU", "RNN", "IndRNN")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


# what runs side by side
KINDS: dict[str, dict[str, Any]] = {
    "directions": {"bidirectional": True},
    "layers": {"num_layers": 3},
}


def make(cell: str, inputs: int, hidden: int, **options: Any) -> Any:
    return getattr(rnnfast, cell)(inputs, hidden, **options)


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
    monkeypatch.setattr(_group, "applies", lambda *_: False)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forced, so that sizes too small for it, and uneven ones, run side by side, too."""
    with rnnfast.use_engine("cpu", split=request.param):
        yield request.param


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_same_numbers_as_one_by_one(
    kind: str, cell: str, dtype: torch.dtype, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # several chunks of backward, of forward, and less than one
    for sizes in ((60, 30, 24, 40), (60, 9, 24, 64), (3, 2, 5, 7)):
        options = {"num_layers": 2} | KINDS[kind]
        layer = make(cell, *sizes[2:], dtype=dtype, **options)
        x = torch.randn(sizes[0], sizes[1], sizes[2], dtype=dtype, requires_grad=grad)
        with torch.set_grad_enabled(grad):
            got = results(layer, x)
            with monkeypatch.context() as patch:
                one_by_one(patch)
                want = results(layer, x)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.alone
@pytest.mark.parametrize("kind", KINDS)
def test_side_by_side_really_happens(kind: str) -> None:
    batch, layers = {"directions": (8, 1), "layers": (1, 2)}[kind]
    layer = make("LSTM", 64, 64, **KINDS[kind] | {"num_layers": layers})
    x = torch.randn(480 // batch, batch, 64, requires_grad=True)
    taken = {"forward": 0, "backward": 0}
    for _ in range(20):  # a busy machine may give one thread only, now and then
        y, _ = layer(x)
        taken["forward"] += rnnfast.last_run()["split"] == kind
        with rnnfast.use_engine("cpu", split=kind):
            y.sum().backward()
        taken["backward"] += rnnfast.last_run()["split"] == kind
        time.sleep(0.02)
    assert all(taken.values()), taken
    rows = rnnfast.explain(layer, x).rows
    assert [(row.split, row.threads) for row in rows] == [(kind, 2)] * 2
    assert all("side by side" in row.reason for row in rows)
    if kind == "layers":  # of three layers one is left
        layer = make("LSTM", 64, 64, num_layers=3)
        splits = [row.split for row in rnnfast.explain(layer, x).rows]
        assert splits[:2] == [kind, kind] and splits[2] != kind
    with rnnfast.use_engine("cpu", split="serial"), torch.no_grad():
        layer(x)
        assert rnnfast.last_run()["split"] == "serial"


def both_ways(monkeypatch: pytest.MonkeyPatch, layer: Any, x: torch.Tensor, *args: Any) -> None:
    got = results(layer, x, *args)
    with monkeypatch.context() as patch:
        one_by_one(patch)
        want = results(layer, x, *args)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_packed_reset_states_projection_frozen(
    kind: str, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"proj_size": 16} if cell == "LSTM" else {}
    layer = make(cell, 24, 48, **options, **KINDS[kind])
    x = torch.randn(40, 6, 24, requires_grad=True)
    reset = torch.rand(40, 6) < 0.1
    width, rows = options.get("proj_size", 48), len(layer.all_weights)
    h, c = torch.randn(rows, 6, width), torch.randn(rows, 6, 48)
    hx = (h, c) if cell == "LSTM" else h

    both_ways(monkeypatch, layer, x, hx, reset)
    both_ways(monkeypatch, layer, x, hx)
    lengths = torch.tensor([40, 33, 20, 20, 7, 1])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x.detach(), lengths)

    def packed_gradients() -> list[torch.Tensor]:
        y, _ = layer(packed, hx)
        loss = (y.data * torch.linspace(-1, 1, y.data.numel()).view_as(y.data)).sum()
        return list(torch.autograd.grad(loss, list(layer.parameters())))

    grads = packed_gradients()
    with monkeypatch.context() as patch:
        one_by_one(patch)
        wanted = packed_gradients()
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
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
    layer = make("LSTM", 16, 32, bidirectional=True).double()
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


@pytest.mark.parametrize("part", ["y", "last state", "first state", "none of x", "frozen below"])
def test_only_a_part_of_the_layers(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make("LSTM", 16, 32, num_layers=3).double()
    x = torch.randn(30, 4, 16, dtype=torch.float64, requires_grad=part not in ("none of x",))
    if part == "frozen below":
        x = x.detach()
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("l0" not in name)
    wanted = [p for p in (x, *layer.parameters()) if p.requires_grad]

    def grads() -> Any:
        y, (h, _) = layer(x)
        loss = {"last state": h[2], "first state": h[0]}.get(part, y)
        return torch.autograd.grad(loss.square().sum(), wanted, allow_unused=True)

    with rnnfast.use_engine("cpu", split="layers"):
        got = grads()
    one_by_one(monkeypatch)
    want = grads()
    for a, b in zip(got, want, strict=True):
        zero = torch.zeros(())  # stacked states bring zeros where one by one has no path
        assert torch.equal(zero.double() if a is None else a, zero.double() if b is None else b)


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives(kind: str, cell: str) -> None:
    layer = make(cell, 2, 2, **KINDS[kind]).double()  # each number costs two backward passes
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor) -> Any:
        return torch.tanh(layer(x)[0]) if cell != "RNN" else layer(x)[0]

    def of_weights(x: torch.Tensor, *weights: torch.Tensor) -> Any:
        named = dict(zip(dict(layer.named_parameters()), weights, strict=True))
        return torch.func.functional_call(layer, named, (x,))[0]

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))
    weights = [w.detach().clone().requires_grad_() for w in layer.parameters()]
    assert torch.autograd.gradgradcheck(of_weights, (x, *weights))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=str)
def test_checkpoint_and_hooks_unpack_once(options: dict[str, Any]) -> None:
    layer = make("GRU", 8, 16, num_layers=2, **options)
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


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors_outside_of_their_mode(kind: str) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    y, _ = make("LSTM", 3, 4, **KINDS[kind])(mode.from_tensor(torch.randn(3, 2, 3)))
    assert isinstance(y, FakeTensor) and y.shape == (3, 2, 8 if kind == "directions" else 4)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_autograd_has_no_break(kind: str) -> None:
    layer = make("GRU", 4, 6, **KINDS[kind])
    x = torch.randn(5, 2, 4)
    layer(x)[0].square().sum().backward()
    want = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    compiler = torch.compile(backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        layer(x)[0].square().sum().backward()
    for p, w in zip(layer.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, w)


def test_a_forced_kind_leaves_the_other_to_the_model() -> None:
    layer = make("GRU", 64, 64, num_layers=2)
    x = torch.randn(1000, 1, 64)
    with rnnfast.use_engine("cpu", split="directions"):
        rows = rnnfast.explain(layer, x).rows
    assert [row.split for row in rows] == ["layers"] * 2
    assert "all 2 layers" in rows[0].reason and "side by side" in rows[0].reason


def test_dropout_between_layers_goes_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make("GRU", 8, 16, num_layers=2, dropout=0.5)
    called = []
    monkeypatch.setattr(_group, "run", lambda *_: called.append(1))
    layer(torch.randn(6, 3, 8))
    assert not called
    monkeypatch.undo()
    plain = make("GRU", 8, 16, num_layers=2)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(6, 3, 8)
    assert torch.equal(layer.eval()(x)[0], plain(x)[0])


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_layers_and_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of fewer and more layers than threads, and one that is left; y's that are reused."""
    torch.set_num_threads(threads)
    for count in (2, 3, 4, 7):
        layer = make("GRU", 6, 20, num_layers=count)
        x = torch.randn(50, 3, 6)
        with rnnfast.use_engine("cpu", split="layers"), torch.no_grad():
            both_ways(monkeypatch, layer, x)


def test_operators_refuse_what_does_not_fit() -> None:
    x, w = torch.randn(3, 2, 5), torch.randn(16, 5)
    good = [None, None, w, torch.randn(16, 4), None, None, None, None, None]
    above = [None, None, torch.randn(16, 4), *good[3:]]
    run = torch.ops.rnnfast.forward_group
    assert len(run(x, [*good, *good], None, 0, False, False)) == 8
    assert len(run(x, [*good, *above, *above], None, 0, True, False)) == 12
    other = [*good[:2], torch.randn(32, 5), torch.randn(32, 8), *good[4:]]
    half = [*good[:6], torch.randn(4, 4), *good[7:]]  # a projection of the same size in one only
    for passes, chained, text in (
        ([*good, *good[:5]], False, "passes must hold 9 tensors .* each of two .*, got 14"),
        (good, False, "passes must hold 9 tensors or None for each of two directions, got 9"),
        ([], True, "passes must hold 9 tensors or None for each layer, got 0"),
        ([*good, *[None] * 9], False, "passes must hold w_ih and w_hh"),
        ([*good, *other], False, "passes side by side must have the hidden size of the first"),
        ([*good, *half], False, ".*w_hr in one of them only"),
        ([*good, *good], True, "w_ih must have shape .* = .16, 4., got .16, 5."),
    ):
        with pytest.raises(RuntimeError, match=f"rnnfast: {text}"):
            run(x, passes, None, 0, chained, False)
    back = torch.ops.rnnfast.backward_group
    with pytest.raises(RuntimeError, match="rnnfast: passes must hold 13 tensors .*, got 18"):
        back(x, [*good, *good], None, 0, False, [1, 1])
    y, _, _, saved = torch.ops.rnnfast.forward(x, *good[:8], None, None, 0, False, True)
    whole = [*good[:8], y, saved, y, None, None]
    with pytest.raises(RuntimeError, match="needs must hold a mask for each of 2 passes, got 1"):
        back(x, [*whole, *whole], None, 0, False, [1])
    with pytest.raises(RuntimeError, match="passes must hold y and saved of each, got None"):
        back(x, [*whole, *whole[:8], *[None] * 5], None, 0, False, [1, 1])
    with pytest.raises(RuntimeError, match="dy of the last layer only, got one of layer 0"):
        back(x, [*whole, *whole], None, 0, True, [1, 1])
