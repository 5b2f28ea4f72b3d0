"""Who looks on: the predicates of _modes.py, and a compiled layer where tensors carry tangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_modules import leaves_of
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from rnnfast import _modes


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def seen(transform: Callable[..., Any]) -> tuple[bool, ...]:
    """What the predicates say of a tensor within a transform of torch.func."""
    found: list[tuple[bool, ...]] = []

    def look(x: Tensor) -> Tensor:
        found.append(
            (
                _modes.transforms_active(),
                _modes.is_transformed(),
                _modes.is_vmapped(x),
                _modes.is_beyond_kernels([x, None]),
            )
        )
        return x.sum()

    transform(look)(torch.ones(2, 3))
    return found[0]


def test_what_transforms_look_like() -> None:
    assert seen(lambda f: f) == (False, False, False, False)
    assert seen(vmap) == (True, True, True, True)
    assert seen(grad) == (True, True, False, True)
    assert seen(lambda f: lambda x: jvp(f, (x,), (x,))) == (True, True, False, True)


def test_what_tangents_look_like() -> None:
    x = torch.ones(3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert _modes.is_transformed() and not _modes.transforms_active()
        assert not _modes.has_tangent([x, None]) and _modes.has_tangent([x, dual])
        assert not _modes.is_beyond_kernels([x]) and _modes.is_beyond_kernels([None, dual])
    assert not _modes.is_transformed() and not _modes.has_tangent([x])


def test_a_batch_of_gradients_is_beyond_kernels() -> None:
    found: list[bool] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, d: Tensor) -> Tensor:  # type: ignore[override]
            found.append(_modes.is_beyond_kernels([d]))
            return d

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Look.apply(x), x, torch.eye(2), is_grads_batched=True)
    torch.autograd.grad(Look.apply(x), x, torch.ones(2))
    assert found == [True, False]


def test_what_tracing_looks_like() -> None:
    found: list[bool] = []

    def look(x: Tensor) -> Tensor:
        found.append(_modes.is_traced())
        return x * 2

    x = torch.ones(2)
    look(x)
    with Mode():
        look(x)
    torch.jit.trace(look, x, check_trace=False)
    assert found == [False, True, True]
    assert _modes.is_eager((x, None, 3))
    assert (
        torch.compile(lambda x: x + _modes.is_traced(), backend="eager", fullgraph=True)(x)[0] == 2
    )


# --------------------------------------------------------------------------- compiled layers


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "GRU": lambda: rnnfast.GRU(3, 4),
    "stack": lambda: rnnfast.LSTM(3, 4, 2, bidirectional=True),
    "recompute": lambda: rnnfast.LSTM(3, 4, recompute=True),
    "inference": lambda: rnnfast.GRU(3, 4).requires_grad_(False),
    "quantized": lambda: rnnfast.quantize(rnnfast.GRU(3, 4)),
}
# torch 2.15 sees dual tensors before us: it refuses them, or breaks the graph and runs eagerly
TORCH_REFUSES = torch.torch_version.TorchVersion(torch.__version__) >= (2, 14)
REFUSED = (
    r"Attempted to wrap a dual tensor"
    if TORCH_REFUSES
    else r"rnnfast: a compiled layer was called within forward_ad.dual_level\(\), and can't carry "
    r"tangents; call the layer itself, outside of torch.compile"
)


CASES = [(name, backend) for name in LAYERS for backend in ("eager", "aot_eager")]
CASES += [("GRU", "inductor"), ("inference", "inductor")]


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_tangents_are_not_lost_in_graphs(name: str, backend: str) -> None:
    """torch's own words are of an autograd.Function without a jvp; of layers without gradients,
    its compilers would lose tangents without a word."""
    torch._dynamo.reset()
    layer = LAYERS[name]()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x, v = torch.randn(3, 2, 3), torch.randn(3, 2, 3)
    want = layer(x)
    for _ in range(2):  # a graph that is there already is not taken for another level
        for a, b in zip(leaves_of(compiled(x)), leaves_of(want), strict=True):
            torch.testing.assert_close(a, b)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=REFUSED):
            compiled(forward_ad.make_dual(x, v))
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, v))[0]
        tangent = forward_ad.unpack_dual(y).tangent
    if name == "GRU":  # torch.func's jvp, traced into a graph, is another matter
        inside = torch.compile(lambda z: jvp(lambda y: layer(y)[0], (z,), (v,))[1], backend=backend)
        torch.testing.assert_close(inside(x), tangent)


def test_every_form_of_call_says_so() -> None:
    torch._dynamo.reset()
    layer, cell = rnnfast.LSTM(3, 4), rnnfast.GRUCell(3, 4)
    x = torch.randn(3, 2, 3)
    calls: dict[str, Callable[[Tensor], Any]] = {
        "lengths": lambda z: layer(z, lengths=torch.tensor([2, 3])),
        "step": lambda z: layer.step(z[0]),
        "cell": lambda z: cell(z[0]),
        "function": lambda z: rnnfast.functional.lstm(z, None, list(layer.parameters())),
    }
    for call in calls.values():
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=REFUSED):
            compiled(forward_ad.make_dual(x, x))
    with rnnfast.use_engine("reference"):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=TORCH_REFUSES)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=REFUSED):
            compiled(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("form", ["plain", "lengths"])
@pytest.mark.parametrize("learns", [False, True])
def test_tangents_are_not_lost_in_exported_programs(form: str, learns: bool) -> None:
    layer, x = rnnfast.LSTM(3, 4).requires_grad_(learns), torch.randn(5, 2, 3)
    more = {"lengths": torch.tensor([5, 3])} if form == "lengths" else {}
    program = torch.export.export(layer, (x,), more).module()
    torch.testing.assert_close(program(x, **more)[0], layer(x, **more)[0])
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"rnnfast::forward\w* can't carry tangents"),
    ):
        program(forward_ad.make_dual(x, x), **more)
