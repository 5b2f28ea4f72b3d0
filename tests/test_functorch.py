"""torch.func on the engines, held against reference.py and torch.nn: what _functorch.py has
rules for, and transforms of what another system of derivatives has recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_derivatives import f64, near, parameters
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import rnnfast
from rnnfast import _functorch

# --------------------------------------------------------------------------- two systems at once


def recorded(x: Tensor, layer: Any) -> Any:
    """A backward pass whose forward autograd has recorded before."""
    z = x.clone().requires_grad_()
    y = layer(z)[0]

    def back(c: Tensor, create: bool = True) -> Tensor:
        return torch.autograd.grad(y, z, c, retain_graph=True, create_graph=create)[0]

    return back


def in_dual_level(f: Any) -> Any:
    with forward_ad.dual_level():
        found = f()
        tangent = forward_ad.unpack_dual(found).tangent
        return forward_ad.unpack_dual(found).primal if tangent is None else tangent


def vjp_function(x: Tensor, layer: Any) -> Any:
    """The same of torch.func, used after its transform has ended."""
    _, back = vjp(lambda x: layer(x)[0], x)
    return lambda c: back(c)[0]


def squared(f: Any) -> Any:
    return grad(lambda c: f(c).square().sum())


def twice(c: Tensor) -> Tensor:
    return torch.stack([c, 2 * c])


MIXED: dict[str, Any] = {
    "vjp over a recorded graph": lambda L, x, c: vjp(recorded(x, L), c)[0],
    "grad over a recorded graph": lambda L, x, c: squared(recorded(x, L))(c),
    "vmap of it": lambda L, x, c: vmap(squared(recorded(x, L)))(twice(c)),
    "jvp over a recorded graph": lambda L, x, c: jvp(recorded(x, L), (c,), (c,))[1],
    "grad of a vjp function": lambda L, x, c: squared(vjp_function(x, L))(c),
    "jvp of a vjp function": lambda L, x, c: jvp(vjp_function(x, L), (c,), (c,))[1],
    "vmap of a vjp function": lambda L, x, c: vmap(vjp_function(x, L))(twice(c)),
    "vmap of its grad": lambda L, x, c: vmap(squared(vjp_function(x, L)))(twice(c)),
    "grad of its vmap": lambda L, x, c: squared(vmap(vjp_function(x, L)))(twice(c)),
    "a dual cotangent": lambda L, x, c: in_dual_level(
        lambda: recorded(x, L)(forward_ad.make_dual(c, 2 * c), False)
    ),
    "a dual cotangent, differentiable": lambda L, x, c: in_dual_level(
        lambda: recorded(x, L)(forward_ad.make_dual(c, 2 * c))
    ),
    "grad of a dual": lambda L, x, c: in_dual_level(
        lambda: grad(lambda x: (L(x)[0] * c).sin().sum())(forward_ad.make_dual(x, 2 * x))
    ),
}
MODELS: dict[str, Any] = {
    "LSTM": lambda library: library.LSTM(3, 4, dtype=f64),
    "GRU": lambda library: library.GRU(3, 4, dtype=f64),
    "stack": lambda library: library.GRU(3, 4, 2, dtype=f64),
    "recompute": lambda library: library.LSTM(
        3, 4, dtype=f64, **({"recompute": True} if library is rnnfast else {})
    ),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("what", MIXED)
def test_transforms_of_what_another_system_recorded(what: str, model: str) -> None:
    """As torch.nn: neither a zero, nor a tangent that is lost."""
    plain, ours = MODELS[model](nn), MODELS[model](rnnfast)
    ours.load_state_dict(plain.state_dict())
    x, c = torch.randn(5, 2, 3, dtype=f64), torch.randn(5, 2, 4, dtype=f64)
    want = MIXED[what](plain, x, c)
    assert want.abs().max() > 1e-6
    near(MIXED[what](ours, x, c), want)


def test_vmap_inside_a_dual_level_without_tangents() -> None:
    layer, x = rnnfast.GRU(3, 4, dtype=f64), torch.randn(4, 5, 2, 3, dtype=f64)
    want = vmap(lambda x: layer(x)[0])(x)
    with forward_ad.dual_level():
        near(vmap(lambda x: layer(x)[0])(x), want)


def test_transforms_of_fake_tensors() -> None:
    layer, xs = rnnfast.GRU(3, 4), torch.randn(4, 5, 3)

    def loss(p: Any, one: Tensor) -> Tensor:
        return functional_call(layer, p, (one,))[0].square().sum()

    f = vmap(grad(loss), in_dims=(None, 0))
    graph = make_fx(f, tracing_mode="fake")(parameters(layer), xs)
    near(graph(parameters(layer), xs), f(parameters(layer), xs))


def test_layers_for_inference_give_no_gradients_under_transforms() -> None:
    x = torch.randn(5, 2, 3)
    for layer in (rnnfast.LSTM(3, 4).freeze(), rnnfast.quantize(rnnfast.LSTM(3, 4))):
        vmap(lambda x, layer=layer: layer(x)[0])(torch.stack([x, x]))
        with pytest.raises(RuntimeError, match="gives no gradients"):
            grad(lambda x, layer=layer: layer(x)[0].sum())(x)


# --------------------------------------------------------------------------- the engine does it

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True},
    "nobias": {"bias": False},
    "batch_first": {"batch_first": True},
}
MAKE: dict[str, Any] = {
    "lstm": rnnfast.LSTM,
    "gru": rnnfast.GRU,
    "rnn": rnnfast.RNN,
    "indrnn": rnnfast.IndRNN,
}


def samples(layer: Any, extras: bool) -> tuple[Tensor, tuple[Any, ...], Any]:
    """Six samples of a batch of two: x, and with `extras` initial states and resets of each."""
    batch = 2
    shape = (6, batch, 5, 3) if layer.batch_first else (6, 5, batch, 3)
    x = torch.randn(shape, dtype=f64)
    if not extras:
        return x, (), None
    rows = layer.num_layers * (1 + layer.bidirectional)
    h = torch.randn(6, rows, batch, layer.proj_size or layer.hidden_size, dtype=f64)
    c = torch.randn(6, rows, batch, layer.hidden_size, dtype=f64)
    hx = (h, c) if isinstance(layer, rnnfast.LSTM) else h
    return x, (hx,), torch.rand(shape[:3]) < 0.3


@pytest.mark.parametrize("extras", [False, True], ids=["x", "states_and_resets"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", MAKE)
def test_engine_under_vmap_and_grad(kind: str, options: str, extras: bool) -> None:
    """The same as reference.py's, and it is the engine that ran: recurrences of all samples at
    once."""
    layer = MAKE[kind](3, 4, dtype=f64, **OPTIONS[options])
    x, hx, reset = samples(layer, extras)
    weigh = torch.randn(40, dtype=f64)

    def loss(p: Any, x: Tensor, *rest: Any) -> Tensor:
        y, last = functional_call(layer, p, (x, *(rest or (None,))))
        last = last[0] if isinstance(last, tuple) else last
        return (y.cos() * weigh[: y.size(-1)]).sum() + last.sin().sum()

    f = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0, *(0,) * (len(hx) + (reset is not None))))
    args = (parameters(layer), x, *hx, *([reset] if reset is not None else []))
    with rnnfast.use_engine("cpu"):
        found = f(*args)
    assert rnnfast.last_run()["engine"] == "cpu"
    with rnnfast.use_engine("reference"):
        want = f(*args)
    near(found, want)


def test_engine_with_a_projection() -> None:
    layer = rnnfast.LSTM(3, 5, proj_size=2, dtype=f64)
    x = torch.randn(4, 6, 3, dtype=f64)

    def loss(p: Any, one: Tensor) -> Tensor:
        return functional_call(layer, p, (one,))[0].cos().sum()

    f = vmap(grad(loss), in_dims=(None, 0))
    with rnnfast.use_engine("cpu"):
        found = f(parameters(layer), x)
    with rnnfast.use_engine("reference"):
        near(found, f(parameters(layer), x))


def test_states_alone_are_batched() -> None:
    """The input is the same for all samples, the initial states are not."""
    layer = rnnfast.GRU(3, 4, dtype=f64)
    x, h = torch.randn(5, 2, 3, dtype=f64), torch.randn(6, 1, 2, 4, dtype=f64)

    def loss(h: Tensor, p: Any) -> Tensor:
        return functional_call(layer, p, (x, h))[0].square().sum()

    f = vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None))
    found = f(h, parameters(layer))
    with rnnfast.use_engine("reference"):
        near(found, f(h, parameters(layer)))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_any_dimension_may_be_mapped(dim: int) -> None:
    layer = rnnfast.LSTM(3, 4, dtype=f64)
    x = torch.randn(5, 2, 3, dtype=f64)
    xs = torch.stack([x * k for k in range(1, 5)], dim)
    found = vmap(lambda one: layer(one)[1], in_dims=dim, out_dims=1)(xs)
    for k in range(4):
        near((found[0][:, k], found[1][:, k]), layer(x * (k + 1))[1])


def test_parameters_that_require_gradients_stay_differentiable() -> None:
    """A loss of per-sample gradients (their norms, say) is differentiated once more."""
    layer = rnnfast.LSTM(3, 4, dtype=f64)
    xs = torch.randn(3, 5, 3, dtype=f64)

    def loss(p: Any, one: Tensor) -> Tensor:
        return functional_call(layer, p, (one,))[0].square().sum()

    def norms() -> Tensor:
        each = vmap(grad(loss), in_dims=(None, 0))(dict(layer.named_parameters()), xs)
        return sum((g.square().sum() for g in each.values()), torch.zeros((), dtype=f64))

    wanted = list(layer.parameters())
    found = torch.autograd.grad(norms(), wanted)
    with rnnfast.use_engine("reference"):
        near(found, torch.autograd.grad(norms(), wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    layer = rnnfast.GRU(3, 8, dtype=dtype)
    xs = torch.randn(4, 5, 3).to(dtype)

    def loss(p: Any, one: Tensor) -> Tensor:
        return functional_call(layer, p, (one,))[0].sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters(layer), xs)
    eps = torch.finfo(dtype).eps
    for k, one in enumerate(xs):
        layer.zero_grad()
        layer(one)[0].sum().backward()
        for name, p in layer.named_parameters():
            assert p.grad is not None and found[name].dtype == dtype
            error = (found[name][k].double() - p.grad.double()).abs().max()
            assert error <= 8 * eps * p.grad.double().abs().max() + 1e-12


@pytest.mark.parametrize("kind", MAKE)
def test_empty_batches(kind: str) -> None:
    layer, xs = MAKE[kind](3, 4, dtype=f64), torch.randn(6, 5, 0, 3, dtype=f64)

    def loss(p: Any, one: Tensor) -> Tensor:
        return functional_call(layer, p, (one,))[0].square().sum()

    assert vmap(lambda one: layer(one)[0])(xs).shape == (6, 5, 0, 4)
    for name, g in vmap(grad(loss), in_dims=(None, 0))(parameters(layer), xs).items():
        assert g.shape == (6, *layer.get_parameter(name).shape) and not g.any()


def test_cells_under_vmap() -> None:
    cell = rnnfast.LSTMCell(3, 4, dtype=f64)
    xs = torch.randn(5, 2, 3, dtype=f64)

    def loss(p: Any, one: Tensor) -> Tensor:
        return functional_call(cell, p, (one,))[0].square().sum()

    f = vmap(grad(loss), in_dims=(None, 0))
    found = f(parameters(cell), xs)
    with rnnfast.use_engine("reference"):
        near(found, f(parameters(cell), xs))


def test_forced_engines_refuse_what_they_cannot() -> None:
    """Forward mode and gradients of gradients are the reference's: a forced engine says so."""
    layer = rnnfast.GRU(3, 4, dtype=f64)
    x = torch.randn(3, 2, 3, dtype=f64)

    def loss(x: Tensor) -> Tensor:
        return layer(x)[0].square().sum()

    with rnnfast.use_engine("cpu"):
        vmap(grad(loss))(torch.stack([x, x]))
        for refused in (
            lambda: grad(lambda x: grad(loss)(x).sum())(x),
            lambda: jvp(loss, (x,), (x,)),
        ):
            with pytest.raises(RuntimeError, match='engine "cpu" was forced and can\'t run under'):
                refused()


def test_what_is_private_is_still_there() -> None:
    """torch's list of transforms has no public name: this fails loudly when it goes."""
    assert _functorch.transforms() == []
    seen: list[Any] = []

    def f(x: Tensor) -> Tensor:
        seen.append([str(kind).rsplit(".", 1)[-1] for kind in _functorch.transforms()])
        return x.sum()

    vmap(grad(f))(torch.ones(2, 3))
    jvp(f, (torch.ones(2),), (torch.ones(2),))
    assert seen == [["Vmap", "Grad"], ["Jvp"]]


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_jvp_of_an_older_pullback_of_the_weights(kind: str, bidirectional: bool) -> None:
    """The transform begins after forward, so backward is the reference's, under two levels."""
    layer = MAKE[kind](3, 4, bidirectional=bidirectional, dtype=f64)
    x = torch.randn(3, 2, 3, dtype=f64)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def run() -> Any:
        y, pullback = vjp(lambda weights: functional_call(layer, weights, (x,))[0], weights)
        (tangents,) = jvp(pullback, (y.cos(),), (y.sin(),))[1]
        return list(tangents.values())

    with rnnfast.use_engine("reference"):
        expected = run()
    for got, want in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, want)
