"""A frozen layer's step past the operators: the same bits, and only where nothing else is asked."""

from __future__ import annotations

import copy
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tolerance
import torch
from test_modules import leaves_of
from test_step import KINDS, some_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from rnnfast import _step_plan


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows with each step that went past the operators."""
    calls: list[int] = []
    run = _step_plan._run

    def counted(*args: Any) -> int:
        calls.append(1)
        return run(*args)

    monkeypatch.setattr(_step_plan, "_run", counted)
    yield calls


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(rnnfast, name.split()[0])(5, 9, **{**KINDS[name], **options}).freeze()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_same_bits_as_the_operator(
    name: str, num_layers: int, dtype: torch.dtype, taken: list[int]
) -> None:
    layer = make(name, num_layers=num_layers, dtype=dtype)
    steps = 0
    for mode in (torch.no_grad, torch.inference_mode):
        for batch in (1, 4, 40, 4):
            x = torch.randn(batch, 5, dtype=dtype)
            for reset in (None, torch.rand(batch) < 0.5):
                for state in (None, some_state(layer, batch)):
                    with mode():
                        got = leaves_of(layer.step(x, state, reset))
                        steps += 1
                        assert len(taken) == steps
                        row = None if reset is None else reset[None]
                        y, last = layer(x[None], state, row)
                    want = leaves_of((y[0], last))
                    for a, b in zip(got, want, strict=True):
                        assert tolerance.same_bits(a, b)
                        assert a.is_inference() is (mode is torch.inference_mode)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "IndRNN"])
def test_quantized(name: str, taken: list[int]) -> None:
    layer = rnnfast.quantize(torch.nn.Sequential(make(name, num_layers=2).unfreeze()))[0]
    x = torch.randn(3, 5)
    with torch.no_grad():
        got = leaves_of(layer.step(x))
        assert len(taken) == 1
        y, last = layer(x[None])
        for a, b in zip(got, leaves_of((y[0], last)), strict=True):
            assert tolerance.same_bits(a, b)
        # other bytes: another plan
        layer.weight_hh_l0_scale.mul_(0.5) if name != "IndRNN" else layer.weight_ih_l0_scale.mul_(2)
        assert tolerance.same_bits(layer.step(x, last)[0], layer(x[None], last)[0][0])
        twin = copy.deepcopy(layer)
        assert tolerance.same_bits(twin.step(x)[0], layer.step(x)[0])


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_everything_else_takes_the_operator(taken: list[int]) -> None:
    layer = make("LSTM")
    x, state = torch.randn(4, 5), some_state(layer, 4)
    with torch.no_grad():
        want = layer.step(x, state)[0]
        assert len(taken) == 1
        h, c = state
        negative = torch._neg_view(-x)
        for other, other_state, other_reset in (
            (x.t().contiguous().t(), state, None),
            (negative, state, None),
            (torch.nn.Parameter(x), state, None),
            (x, [h, c], None),
            (x, (h.transpose(1, 2).contiguous().transpose(1, 2), c), None),
            (x, (torch._neg_view(-h), c), None),
            (x, (h, torch._neg_view(-c)), None),
            (x, state, torch.zeros(8, dtype=torch.bool)[::2]),
        ):
            assert tolerance.same_bits(layer.step(other, other_state, other_reset)[0], want)
        zeros = torch._efficientzerotensor((4, 5))
        assert tolerance.same_bits(layer.step(zeros, state)[0], layer.step(x * 0, state)[0])
        taken.clear()
        layer.step(x[0], (h[:, 0], c[:, 0]))
        layer.step(x[:0], (h[:, :0], c[:, :0]))
        with Watch():
            layer.step(x, state)
        with torch.profiler.profile() as profile:
            layer.step(x, state)
        assert any("rnnfast::forward" in event.key for event in profile.key_averages())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer.step(x, state)
        with rnnfast.use_engine("reference"):
            assert layer.step(x, state)[0].shape == (4, 9)
        torch.func.vmap(lambda v: layer.step(v, None)[0])(x[None])
        with FakeTensorMode(allow_non_fake_inputs=True):
            layer.step(x, state)
        assert not taken
        layer.requires_grad_(False)
        traced = torch.jit.trace(lambda v: layer.step(v, state)[0], (x,))
        assert tolerance.same_bits(traced(2 * x), layer.step(2 * x, state)[0])
        plain = make("GRU").unfreeze().requires_grad_(False)
        traced = torch.jit.trace(lambda v: plain.step(v)[0], (x,))
        assert tolerance.same_bits(traced(2 * x), plain.step(2 * x)[0])
    layer.requires_grad_(True)
    with pytest.raises(RuntimeError, match="gives no gradients"):
        layer.step(x, state)


def test_dropout_between_layers_takes_the_operator(taken: list[int]) -> None:
    layer = make("GRU", num_layers=2, dropout=0.5)
    with torch.no_grad():
        layer.step(torch.randn(4, 5))
        assert not taken
        layer.eval().step(torch.randn(4, 5))
        assert taken


@pytest.mark.parametrize(
    ("input", "state", "reset", "text"),
    [
        (torch.zeros(4, 6), None, None, "input must have shape"),
        (torch.zeros(()), None, None, "input must have shape"),
        (torch.zeros(4, 5).double(), None, None, "does not match weight dtype"),
        (torch.zeros(4, 5), torch.zeros(4, 9), None, "state must have shape"),
        (torch.zeros(4, 5), torch.zeros(1, 4, 9).double(), None, "same dtype"),
        (torch.zeros(4, 5), (torch.zeros(1, 4, 9),) * 2, None, "state must have shape"),
        (torch.zeros(4, 5), None, torch.zeros(3, dtype=torch.bool), "reset must be .* of shape"),
        (torch.zeros(4, 5), None, torch.zeros(4), "reset must be a bool"),
    ],
    ids=str,
)
def test_wrong_input_is_refused(input: Tensor, state: Any, reset: Any, text: str) -> None:
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match=text):
        make("GRU").step(input, state, reset)


def test_weights_that_change(taken: list[int]) -> None:
    layer = make("RNN")
    x = torch.randn(2, 5)
    with torch.no_grad():
        layer.step(x)
        layer.weight_hh_l0.mul_(2)
        with pytest.raises(RuntimeError, match="weight_hh_l0 was changed since freeze"):
            layer.step(x)
        layer.freeze()
        assert tolerance.same_bits(layer.step(x)[0], layer(x[None])[0][0])
        layer.unfreeze()
        taken.clear()
        layer.step(x)
        assert not taken
    odd = rnnfast.GRU(5, 9)
    odd.bias_hh_l0 = torch.nn.Parameter(torch.randn(54)[::2])
    odd.freeze()
    with torch.no_grad():
        assert tolerance.same_bits(odd.step(x)[0], odd(x[None])[0][0])
        assert not taken


def test_stacks_whose_layers_do_not_fit(taken: list[int]) -> None:
    """The operator refuses them; addresses would be read past their ends."""
    for name, shapes in (("GRU", ((27, 2000), (27, 9))), ("GRU", ((12000, 9), (12000, 4000)))):
        layer = getattr(rnnfast, name)(5, 9, num_layers=2, bias=False)
        layer.weight_ih_l1 = torch.nn.Parameter(torch.randn(shapes[0]))
        layer.weight_hh_l1 = torch.nn.Parameter(torch.randn(shapes[1]))
        layer.freeze()
        with torch.no_grad(), pytest.raises(RuntimeError, match="must have shape"):
            layer.step(torch.randn(3, 5), torch.zeros(2, 3, 9))
        assert not taken


def test_quantized_weights_that_move(taken: list[int]) -> None:
    layer = rnnfast.quantize(torch.nn.Sequential(rnnfast.GRU(5, 9)))[0]
    x = torch.randn(3, 5)
    with torch.no_grad():
        layer.step(x)
        layer.bias_ih_l0.data = torch.randn(27)
        assert tolerance.same_bits(layer.step(x)[0], layer(x[None])[0][0])
    assert len(taken) == 2


def in_threads(*works: Callable[[], Any]) -> None:
    """Until the first is through; errors are raised here."""
    done, errors = threading.Event(), []

    def run(work: Callable[[], Any], first: bool) -> None:
        try:
            while not done.is_set():
                work()
                if first:
                    return
        except Exception as error:
            errors.append(error)
        finally:
            if first:
                done.set()

    threads = [threading.Thread(target=run, args=(w, i == 0)) for i, w in enumerate(works)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        sys.setswitchinterval(before)
    assert not errors and not any(thread.is_alive() for thread in threads), errors


def test_batches_of_two_sizes_at_the_same_time() -> None:
    layer = make("LSTM")

    def steps(batch: int, count: int) -> Callable[[], None]:
        x = torch.randn(batch, 5)
        with torch.no_grad():
            want = layer.unfreeze().freeze().step(x)[0]

        def work() -> None:
            with torch.no_grad():
                for _ in range(count):
                    y, (h, c) = layer.step(x)
                    assert y.shape == (batch, 9) and h.shape == c.shape == (1, batch, 9)
                    assert tolerance.same_bits(y, want)

        return work

    in_threads(steps(1, 3000), steps(300, 5))


def test_steps_while_the_layer_is_frozen_anew() -> None:
    """What a running step reads stays, whatever the layer drops meanwhile."""
    layer = rnnfast.LSTM(64, 256).freeze()
    x = torch.randn(8, 64)
    with torch.no_grad():
        want = layer.step(x)[0]

    def work() -> None:
        with torch.no_grad():
            for _ in range(400):
                assert tolerance.same_bits(layer.step(x)[0], want)

    in_threads(work, layer.freeze)


def test_threads_and_copies() -> None:
    """Streams of one layer from several threads; a copy's plan is its own, and the old one's ends
    with its layer."""
    layer = make("GRU", num_layers=2)
    x = torch.randn(50, 3, 5)
    with torch.inference_mode():
        want, _ = layer(x)
    results: dict[int, Tensor] = {}

    def work(index: int) -> None:
        state, ys = None, []
        with torch.inference_mode():
            for t in range(50):
                y, state = layer.step(x[t], state)
                ys.append(y)
        results[index] = torch.stack(ys)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for got in results.values():
        torch.testing.assert_close(got, want)
    assert len(results) == 4
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        want = layer.step(x[0])[0]
    layer.unfreeze()
    gc.collect()
    with torch.no_grad():
        assert tolerance.same_bits(twin.step(x[0])[0], want)
