"""torch.func, forward-mode AD, torch.compile and export: what torch.nn's layers partly refuse."""

from __future__ import annotations

from typing import Any

import pytest
import tolerance
import torch
from test_modules import leaves_of
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.utils.rnn import PackedSequence

import rnnfast

f64 = torch.float64


def layers() -> list[Any]:
    return [
        rnnfast.LSTM(5, 9, 2, bidirectional=True, dtype=f64),
        rnnfast.LSTM(5, 9, proj_size=4, dtype=f64),
        rnnfast.GRU(5, 9, dtype=f64),
        rnnfast.RNN(5, 9, dtype=f64),
        rnnfast.IndRNN(5, 9, nonlinearity="tanh", dtype=f64),
    ]


NAMES = ["LSTM", "LSTM proj", "GRU", "RNN", "IndRNN"]
close = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(params=range(len(NAMES)), ids=NAMES)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return layers()[request.param]


def test_vmap_over_inputs(layer: nn.Module) -> None:
    x = torch.randn(4, 3, 2, 5, dtype=f64)
    got = vmap(lambda one: layer(one)[0])(x)
    want = torch.stack([layer(one)[0] for one in x])
    torch.testing.assert_close(got, want, **close)


def test_vmap_over_weights(layer: nn.Module) -> None:
    """An ensemble: the same input, several sets of parameters."""
    sets = [{k: torch.randn_like(v) / 3 for k, v in layer.named_parameters()} for _ in range(3)]
    stacked = {k: torch.stack([s[k] for s in sets]) for k in sets[0]}
    x = torch.randn(3, 2, 5, dtype=f64)
    got = vmap(lambda p: functional_call(layer, p, (x,))[0])(stacked)
    want = torch.stack([functional_call(layer, s, (x,))[0] for s in sets])
    torch.testing.assert_close(got, want, **close)


def test_per_sample_gradients(layer: nn.Module) -> None:
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    x = torch.randn(4, 3, 5, dtype=f64)

    def loss(p: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(layer, p, (one,))[0].square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for k, one in enumerate(x):
        layer.zero_grad()
        layer(one)[0].square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(got[name][k], p.grad, **close)


def test_jvp_is_not_silently_zero(layer: nn.Module) -> None:
    x, v = torch.randn(3, 2, 5, dtype=f64), torch.randn(3, 2, 5, dtype=f64)
    _, tangent = jvp(lambda one: layer(one)[0], (x,), (v,))
    eps = 1e-6
    numeric = (layer(x + eps * v)[0] - layer(x - eps * v)[0]) / (2 * eps)
    torch.testing.assert_close(tangent, numeric, rtol=1e-5, atol=1e-8)
    assert tangent.abs().max() > 1e-3


def test_dual_tensors_are_not_silently_dropped(layer: nn.Module) -> None:
    x, v = torch.randn(3, 2, 5, dtype=f64), torch.randn(3, 2, 5, dtype=f64)
    _, want = jvp(lambda one: layer(one)[0], (x,), (v,))
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, v))[0]
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
        assert tangent is not None
        torch.testing.assert_close(tangent, want, **close)


def test_jacobian(layer: nn.Module) -> None:
    x = torch.randn(2, 1, 5, dtype=f64)
    got = jacrev(lambda one: layer(one)[0])(x)
    want = torch.autograd.functional.jacobian(lambda one: layer(one)[0], x)
    torch.testing.assert_close(got, want, **close)
    fast = torch.autograd.functional.jacobian(lambda one: layer(one)[0], x, vectorize=True)
    torch.testing.assert_close(fast, want, **close)


def test_hessian_vector_product(layer: nn.Module) -> None:
    x, v = torch.randn(3, 2, 5, dtype=f64), torch.randn(3, 2, 5, dtype=f64)

    def loss(one: Tensor) -> Tensor:
        return layer(one)[0].pow(3).sum()

    got = jvp(grad(loss), (x,), (v,))[1]
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(z), z, create_graph=True)
    (want,) = torch.autograd.grad((g * v).sum(), z)
    torch.testing.assert_close(got, want, **close)


def test_compile_fullgraph(layer: nn.Module) -> None:
    """One graph, no break, forward and backward; backend aot_eager needs no compiler."""
    x = torch.randn(3, 2, 5, dtype=f64, requires_grad=True)
    want = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    for a, b in zip(leaves_of(got), leaves_of(want), strict=True):
        torch.testing.assert_close(a, b, **close)
    inputs = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(got[0].sum(), inputs),
        torch.autograd.grad(want[0].sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **close)


def test_compile_of_a_frozen_layer(layer: nn.Module) -> None:
    """A graph holds the plain weights: compiling never meets the checks of a frozen layer."""
    torch._dynamo.reset()  # each kind of layer is one more version of the same code
    x = torch.randn(3, 2, 5, dtype=f64)
    with torch.no_grad():
        want = layer(x)
        layer.freeze()
        got = torch.compile(layer, fullgraph=True, backend="eager")(x)
        exported = torch.export.export(layer, (x,)).module()(x)
    for result in (got, exported):
        for a, b in zip(leaves_of(result), leaves_of(want), strict=True):
            torch.testing.assert_close(a, b, **close)


def test_compile_of_a_packed_sequence_without_state() -> None:
    """No value of batch_sizes is read while tracing, by none of the checks."""
    layer = rnnfast.GRU(5, 9, 2, dtype=f64)
    sizes, rows = torch.tensor([3, 2, 1]), torch.randn(6, 5, dtype=f64)

    def run(x: Tensor) -> Tensor:
        return layer(PackedSequence(x, sizes))[0].data

    with torch.no_grad():
        got = torch.compile(run, backend="aot_eager")(rows)
        torch.testing.assert_close(got, run(rows), **close)


def test_export_with_a_dynamic_length() -> None:
    layer = rnnfast.LSTM(5, 9, 2, bidirectional=True).eval()
    x = torch.randn(4, 2, 5)
    steps, batch = torch.export.Dim("steps", min=2, max=100), torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes={"input": {0: steps, 1: batch}})
    for shape in ((4, 2, 5), (9, 3, 5), (50, 7, 5)):
        other = torch.randn(shape)
        for a, b in zip(leaves_of(program.module()(other)), leaves_of(layer(other)), strict=True):
            torch.testing.assert_close(a, b)


def test_checkpointing() -> None:
    layer = rnnfast.GRU(5, 9, 2, dropout=0.3)
    x = torch.randn(4, 3, 5, requires_grad=True)
    results = []
    for use in (False, True):
        torch.manual_seed(4)
        if use:
            y = torch.utils.checkpoint.checkpoint(lambda z: layer(z)[0], x, use_reentrant=False)
        else:
            y = layer(x)[0]
        results.append(torch.autograd.grad(y.sum(), [x, *layer.parameters()]))
    for a, b in zip(*results, strict=True):
        assert tolerance.same_bits(a, b)


def test_batched_gradients() -> None:
    layer = rnnfast.GRU(5, 9, dtype=f64)
    x = torch.randn(2, 1, 5, dtype=f64, requires_grad=True)
    y = layer(x)[0]
    basis = torch.eye(y.numel(), dtype=f64).view(-1, *y.shape)
    (got,) = torch.autograd.grad(y, x, basis, is_grads_batched=True, retain_graph=True)
    want = torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in basis])
    torch.testing.assert_close(got, want, **close)


def test_batch_sizes_are_checked_under_a_transform() -> None:
    layer = rnnfast.GRU(5, 9)
    x = torch.randn(4, 5, 5)
    for sizes in ([2, 3], [2, 2, 2], [5, -1], [], [0]):
        with pytest.raises(RuntimeError, match="rnnfast: (batch_sizes|x) must"):
            vmap(lambda one, n=sizes: layer(PackedSequence(one, torch.tensor(n).long()))[0].data)(x)
    sizes = torch.tensor([3, 2])
    got = vmap(lambda one: layer(PackedSequence(one, sizes))[0].data)(x)
    want = torch.stack([layer(PackedSequence(one, sizes))[0].data for one in x])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
