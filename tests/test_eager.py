"""The short way of eager training calls: the registered operator's formula, bits and errors."""

from __future__ import annotations

import threading
from typing import Any

import cases
import pytest
import tolerance
import torch
from cases import Case
from test_modules import leaves_of
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast import _modes

f64 = torch.float64


def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_modes, "is_eager", lambda args: False)


def gradients(layer: nn.Module, x: Tensor, **kwargs: Any) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = leaves_of(layer(x))
    loss = sum((k + 1) * o.square().sum() for k, o in enumerate(out))
    return [*out, *torch.autograd.grad(loss, [x, *layer.parameters()], **kwargs)]


LAYERS = [
    lambda: rnnfast.LSTM(5, 9, 2, bidirectional=True, dtype=f64),
    lambda: rnnfast.LSTM(5, 9, proj_size=4, dtype=f64),
    lambda: rnnfast.GRU(5, 9, bias=False, dtype=f64),
    lambda: rnnfast.RNN(5, 9, dtype=f64),
    lambda: rnnfast.IndRNN(5, 9, nonlinearity="tanh", dtype=f64),
]


@pytest.mark.parametrize("make", LAYERS)
def test_the_same_bits_both_ways(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(), torch.randn(4, 3, 5, dtype=f64)
    name = type(layer(x)[0].grad_fn).__name__
    short = gradients(layer, x)
    registered(monkeypatch)
    assert type(layer(x)[0].grad_fn).__name__ != name or layer.num_layers > 1
    for a, b in zip(short, gradients(layer, x), strict=True):
        assert tolerance.same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("make", LAYERS)
def test_second_derivatives(make: Any) -> None:
    layer = make()
    x = torch.randn(2, 2, 5, dtype=f64, requires_grad=True)
    assert gradgradcheck(
        lambda z, *_: leaves_of(layer(z)), [x, *layer.parameters()], fast_mode=True
    )


def test_only_what_is_asked_for_and_what_came() -> None:
    layer, x = rnnfast.LSTM(5, 9), torch.randn(4, 3, 5)
    layer.weight_ih_l0.requires_grad_(False)
    y, (h, c) = layer(x)
    for out in (y, h, c):
        grads = torch.autograd.grad(out.sum(), [layer.weight_hh_l0], retain_graph=True)
        assert grads[0].abs().sum() > 0
    layer.requires_grad_(False)
    y, _ = layer(x)
    assert not y.requires_grad and y.grad_fn is None
    h0 = torch.zeros(1, 3, 9, requires_grad=True)
    y, _ = layer(x, (h0, h0.detach()))
    y.sum().backward()
    assert h0.grad is not None and h0.grad.abs().sum() > 0


def test_hooks_see_the_tensors() -> None:
    layer, x = rnnfast.GRU(5, 9), torch.randn(4, 3, 5, requires_grad=True)
    seen: list[str] = []
    layer.weight_hh_l0.register_hook(lambda g: seen.append("weight"))
    layer.register_full_backward_hook(lambda *_: seen.append("module"))
    y, _ = layer(x)
    y.register_hook(lambda g: 2 * g)
    y.sum().backward()
    assert set(seen) == {"weight", "module"}
    doubled = x.grad.clone()
    x.grad = None
    layer(x)[0].sum().backward()
    torch.testing.assert_close(doubled, 2 * x.grad)


def test_saved_tensors_hooks_and_checkpointing() -> None:
    layer, x = rnnfast.LSTM(5, 9, dtype=f64), torch.randn(4, 3, 5, dtype=f64)
    want = gradients(layer, x)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        got = gradients(layer, x)
    assert len(packed) > 5
    for a, b in zip(got, want, strict=True):
        assert tolerance.same_bits(a.detach(), b.detach())
    z = x.clone().requires_grad_()
    for reentrant in (False, True):
        y = checkpoint(lambda one: layer(one)[0], z, use_reentrant=reentrant)
        (grad,) = torch.autograd.grad(y.sum(), z) if not reentrant else (None,)
        if reentrant:
            z.grad = None
            y.sum().backward()
            grad = z.grad
        (plain,) = torch.autograd.grad(layer(z)[0].sum(), z)
        assert tolerance.same_bits(grad, plain)


def test_errors_as_before() -> None:
    layer, x = rnnfast.LSTM(5, 9), torch.randn(4, 3, 5)
    y, _ = layer(x)
    with torch.no_grad():
        layer.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y, _ = layer(x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y, _ = layer(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rnnfast":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


class Logged(Tensor):
    seen: list[Any] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("grad", [False, True])
def test_modes_see_the_operators(grad: bool) -> None:
    layer, x = rnnfast.GRU(5, 9), torch.randn(4, 3, 5)
    with Watch() as watch, torch.set_grad_enabled(grad):
        y, _ = layer(x)
        if grad:
            y.sum().backward()
    assert watch.seen == ["forward"] + ["backward"] * grad


def test_overridden_tensors_see_the_operators() -> None:
    """A subclass with __torch_function__ gets the operator itself."""
    layer = rnnfast.GRU(5, 9)
    x = torch.randn(4, 3, 5).as_subclass(Logged)
    y, _ = layer(x)
    assert torch.ops.rnnfast.forward.default in Logged.seen and isinstance(y, Logged)
    y.sum().backward()


def test_backward_in_another_thread() -> None:
    case = Case("gru", 3, 2, 5, 9, f64)
    problem, ref, _ = cases.solved(case)
    layer = rnnfast.GRU(5, 9, dtype=f64)
    for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        long = {"w": "weight", "b": "bias"}[name[0]] + name[1:] + "_l0"
        getattr(layer, long).data.copy_(problem.inputs[name])
    x = problem.inputs["x"].requires_grad_()
    y, h = layer(x, problem.inputs["h0"][None])
    given = [problem.cotangents["y"], problem.cotangents["h_n"]]
    thread = threading.Thread(target=torch.autograd.backward, args=([y, h[0]], given))
    thread.start()
    thread.join()
    torch.testing.assert_close(x.grad, ref["dx"], rtol=1e-9, atol=1e-12)
