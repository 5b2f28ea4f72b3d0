"""layer.step: one step at a time gives what the whole sequence gives, with gradients and resets."""

from __future__ import annotations

from typing import Any

import pytest
import tolerance
import torch
from test_eager import Logged, Watch
from test_modules import LAYERS, leaves_of
from torch import Tensor, nn

import rnnfast

KINDS: dict[str, dict[str, Any]] = {
    **LAYERS,
    "IndRNN": {},
    "LSTM proj": {"proj_size": 4},
    "GRU nobias": {"bias": False},
    "LSTM proj nobias": {"proj_size": 4, "bias": False},
}
MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape)


def bits(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


def make(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(rnnfast, name.split()[0])(5, 9, **{**KINDS[name], **options})


def stream(layer: nn.Module, x: Tensor, state: Any, reset: Any = None) -> tuple[Tensor, Any]:
    ys = []
    for t in range(x.size(0)):
        y, state = layer.step(x[t], state, None if reset is None else reset[t])
        ys.append(y)
    return torch.stack(ys), state


def some_state(layer: nn.Module, *batch: int) -> Any:
    dtype = layer.weight_ih_l0.dtype
    widths = [layer.proj_size or 9] + [9] * (layer.mode == "LSTM")
    states = [torch.randn(layer.num_layers, *batch, w, dtype=dtype) for w in widths]
    return tuple(states) if len(states) == 2 else states[0]


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_a_stream_equals_the_sequence(name: str, num_layers: int, engine: str) -> None:
    layer = make(name, num_layers=num_layers, batch_first=num_layers == 3, dtype=torch.float64)
    for batch in ((4,), (1,), (0,), ()):
        x = torch.randn(7, *batch, 5, dtype=torch.float64)
        sequence = x.transpose(0, 1) if num_layers == 3 and batch else x
        for mode in MODES:
            for state in (None, some_state(layer, *batch)):
                with mode(), rnnfast.use_engine(engine):
                    want, last = layer(sequence, state)
                    got, now = stream(layer, x, state)
                if num_layers == 3 and batch:
                    want = want.transpose(0, 1)
                assert got.shape == want.shape
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
                assert type(now) is type(last)
                for a, b in zip(leaves_of((got, now)), leaves_of((got, last)), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
                    assert a.requires_grad is (mode is torch.enable_grad)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_resets(name: str, num_layers: int) -> None:
    layer = make(name, num_layers=num_layers)
    x, reset = torch.randn(7, 4, 5), torch.rand(7, 4) < 0.4
    state = some_state(layer, 4)
    for mode in MODES:
        with mode():
            want, last = layer(x, state, reset)
            got, now = stream(layer, x, state, reset)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            for a, b in zip(leaves_of(now), leaves_of(last), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            alone = tuple(s[:, 1] for s in state) if layer.mode == "LSTM" else state[:, 1]
            for flags in (reset[:, 1], reset[:, 1].tolist()):
                got, _ = stream(layer, x[:, 1], alone, flags)
                torch.testing.assert_close(got, want[:, 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_flow_through_steps(name: str) -> None:
    layer = make(name, dtype=torch.float64)
    x = torch.randn(5, 3, 5, dtype=torch.float64, requires_grad=True)
    state = some_state(layer, 3)
    leaves = [s.requires_grad_() for s in (state if isinstance(state, tuple) else (state,))]
    reset = torch.rand(5, 3) < 0.3
    inputs = [x, *leaves, *layer.parameters()]
    results = []
    for run in (layer, lambda *args: stream(layer, *args)):
        y, last = run(x, state, reset)
        loss = y.square().sum() + sum(s.sum() for s in leaves_of((y, last))[1:])
        results.append(torch.autograd.grad(loss, inputs))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_frozen(name: str, num_layers: int) -> None:
    layer = make(name, num_layers=num_layers)
    x, state = torch.randn(3, 4, 5), some_state(layer, 4)
    with torch.no_grad():
        want, _ = stream(layer, x, state)
        layer.freeze()
        torch.testing.assert_close(stream(layer, x, state)[0], want, rtol=1e-5, atol=1e-6)
        assert rnnfast.last_run()["kernel_ih"] == "packed"
        layer.weight_hh_l0.mul_(2)
        with pytest.raises(RuntimeError, match="rnnfast: weight_hh_l0 was changed since freeze"):
            layer.step(x[0], state)
        layer.freeze()
        layer.weight_ih_l0 = nn.Parameter(torch.zeros_like(layer.weight_ih_l0))
        with pytest.raises(RuntimeError, match="rnnfast: weight_ih_l0 was replaced since freeze"):
            layer.step(x[0], state)
    layer.freeze()
    with pytest.raises(RuntimeError, match="rnnfast: a frozen .*gives no gradients"):
        layer.step(x[0], state)


def test_dropout_between_layers() -> None:
    layer = make("GRU", num_layers=2, dropout=0.5)
    x = torch.randn(4, 5)
    for training in (True, False):
        layer.train(training)
        for mode in MODES:
            with mode():
                torch.manual_seed(3)
                want = layer(x[None])[0][0]
                torch.manual_seed(3)
                assert tolerance.same_bits(layer.step(x)[0].detach(), want.detach())


def test_the_state_belongs_to_the_caller() -> None:
    """Outputs and states share no memory: either may be changed before the next step."""
    for name in ("GRU", "LSTM"):
        layer = make(name)
        for batch in ((4,), ()):
            for mode in MODES[1:]:
                with mode():
                    y, state = layer.step(torch.randn(*batch, 5))
                    kept = [s.clone() for s in leaves_of((y, state))[1:]]
                    y.zero_()
                    for a, b in zip(leaves_of((y, state))[1:], kept, strict=True):
                        assert torch.equal(a, b)


def test_other_inputs_take_the_long_way() -> None:
    """Strides, views, transforms, autocast, parametrized weights, a list as a state."""
    layer = make("GRU")
    x, h = torch.randn(4, 5), torch.randn(1, 4, 9)
    with torch.no_grad():
        want = layer(x[None], h)[0][0]
        strided = torch.stack([x, x], -1)[..., 0]
        torch.testing.assert_close(layer.step(strided, h)[0], want)
        torch.testing.assert_close(layer.step(x, h.transpose(1, 2).contiguous().mT)[0], want)
        every = torch.vmap(lambda a, b: layer.step(a, b)[0], in_dims=(0, 1))(x, h)
        torch.testing.assert_close(every, want, rtol=1e-5, atol=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(
                layer.step(x.bfloat16(), h)[0], layer(x.bfloat16()[None], h)[0][0]
            )
        lstm = make("LSTM")
        c = torch.randn(1, 4, 9)
        torch.testing.assert_close(lstm.step(x, [h, c])[0], lstm(x[None], (h, c))[0][0])
        nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
        torch.testing.assert_close(layer.step(x, h)[0], want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with torch.no_grad():
            y, _ = layer.step(dual, h)
        assert y.shape == (4, 9)


def test_modes_and_subclasses_see_the_operator() -> None:
    layer, x = make("GRU"), rand(4, 5)
    for mode in MODES:
        with Watch() as watch, mode():
            layer.step(x)
        assert watch.seen == ["forward"]
    with torch.no_grad():
        y = layer.step(x.as_subclass(Logged))[0]
        assert torch.ops.rnnfast.forward.default in Logged.seen
        assert tolerance.same_bits(y.as_subclass(Tensor), layer.step(x)[0])


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@pytest.mark.parametrize("frozen", [False, True])
def test_compiled(name: str, frozen: bool) -> None:
    torch._dynamo.reset()
    layer = make(name, num_layers=2)
    x, state, reset = torch.randn(4, 5), some_state(layer, 4), torch.tensor([True, False] * 2)
    step = torch.compile(lambda *args: layer.step(*args), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = layer.step(x, state, reset)
        if frozen:
            layer.freeze()
        for a, b in zip(leaves_of(step(x, state, reset)), leaves_of(want), strict=True):
            torch.testing.assert_close(a, b)


X = rand(4, 5)
WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "rank": ((rand(1, 4, 5),), r"\(B, I\) or \(I,\) with I = 5, got \(1, 4, 5\)"),
    "size": ((rand(4, 6),), r"with I = 5, got \(4, 6\)"),
    "not a tensor": (([1.0],), r"with I = 5, got list"),
    "batch": ((X, rand(1, 3, 9)), r"state .* \(L, B, H\) = \(1, 4, 9\), got \(1, 3, 9\)"),
    "state rank": ((X, rand(4, 9)), r"\(L, B, H\) = \(1, 4, 9\), got \(4, 9\)"),
    "more layers": ((X, rand(2, 4, 9)), r"got \(2, 4, 9\)"),
    "unbatched": ((rand(5), rand(1, 1, 9)), r"\(L, H\) = \(1, 9\), got \(1, 1, 9\)"),
    "pair": ((X, (rand(1, 4, 9),)), r"got tuple"),
    "reset shape": ((X, None, bits(3)), r"\(B,\) = \(4,\), got \(3,\) of bool"),
    "reset rank": ((X, None, bits(1, 4)), r"got \(1, 4\) of bool"),
    "reset floats": ((X, None, torch.zeros(4)), r"got \(4,\) of float32"),
    "reset of a batch": ((X, None, True), r"\(B,\) = \(4,\), got bool"),
    "reset unbatched": ((rand(5), None, bits(1)), r"got \(1,\) of bool"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", WRONG)
def test_errors(what: str, mode: Any) -> None:
    args, words = WRONG[what]
    with mode(), pytest.raises(RuntimeError, match="rnnfast: .*" + words):
        make("GRU").step(*args)


def test_other_errors() -> None:
    with pytest.raises(RuntimeError, match="rnnfast: step needs a layer of one direction, got bi"):
        make("GRU", bidirectional=True).step(X)
    h = rand(1, 4, 9)
    for mode in MODES:
        with mode():
            for name, state, words in (
                ("LSTM", h, r"state must be a tuple \(h, c\), got \(1, 4, 9\)"),
                ("LSTM", (h, h[..., :8]), r"state\[1\] must have shape .* got \(1, 4, 8\)"),
                ("LSTM proj", (h, h), r"state\[0\] .* \(L, B, P\) = \(1, 4, 4\)"),
                ("GRU", h.double(), "same dtype"),
            ):
                with pytest.raises(RuntimeError, match=words):
                    make(name).step(X, state)
            with pytest.raises(ValueError, match="RNN input dtype"):
                make("GRU").step(X.double())
