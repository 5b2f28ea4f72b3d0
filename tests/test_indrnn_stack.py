"""Deep IndRNNs: residual connections, the constraint of the recurrent weights, long memory."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from test_lengths import WAYS, f64
from test_modules import leaves_of
from torch import Tensor, nn

import rnnfast
from rnnfast import functional

T, B = 7, 4


def by_hand(layer: Any, x: Tensor, reset: Tensor | None = None) -> list[Tensor]:
    """y_l = x_l + f(x_l) around one layer at a time, where sizes agree."""
    each = 4 * (1 + layer.bidirectional)
    ends = []
    for k in range(layer.num_layers):
        weights = layer._weights()[k * each : (k + 1) * each]
        y, h = functional.indrnn_relu(
            x, None, weights, bidirectional=layer.bidirectional, reset=reset
        )
        x = x + y if y.shape == x.shape else y
        ends.append(h)
    return [x, torch.cat(ends)]


@pytest.mark.parametrize(
    ("inputs", "two_ways", "way"),
    [
        *itertools.product([8, 16, 5], [False, True], ["eager", "operator"]),
        (8, False, "compiled"),
        (16, True, "compiled"),
    ],
)
def test_residuals(inputs: int, two_ways: bool, way: str) -> None:
    layer = rnnfast.IndRNN(inputs, 8, 3, bidirectional=two_ways, residual=True, dtype=f64)
    x = torch.randn(T, B, inputs, dtype=f64, requires_grad=True)
    reset = torch.rand(T, B) < 0.3
    want, got = by_hand(layer, x, reset), leaves_of(WAYS[way](layer, x, None, reset))
    inputs_of = [x, *layer.parameters()]
    grads = [torch.autograd.grad(out[0].square().sum(), inputs_of) for out in (want, got)]
    for a, b in zip([*got, *grads[1]], [*want, *grads[0]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    plain = copy.deepcopy(layer)
    plain.residual = False
    assert not torch.equal(plain(x)[0], layer(x)[0])


@pytest.mark.parametrize("way", WAYS)
def test_padding_stays_zero(way: str) -> None:
    """The input's padding is not added to the output's, whatever stands there."""
    layer = rnnfast.IndRNN(8, 8, 2, residual=True, dtype=f64)
    x, n = torch.randn(T, B, 8, dtype=f64), torch.tensor([2, 7, 1, 4])
    valid = torch.arange(T).unsqueeze(1) < n
    want = torch.where(valid.unsqueeze(-1), layer(x)[0], 0)
    x[~valid] = torch.nan
    x.requires_grad_()
    y, _ = WAYS[way](layer, x, lengths=n)
    torch.testing.assert_close(y, want)
    dx, *others = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert not dx[~valid].any() and all(bool(g.isfinite().all()) for g in others)


def test_other_ways_to_call_it() -> None:
    layer = rnnfast.IndRNN(8, 8, 3, residual=True, dropout=0.5).eval()
    x = torch.randn(T, B, 8)
    want, h = layer(x)
    got, state = [], None
    with torch.no_grad():
        frozen = copy.deepcopy(layer).freeze()
        for stream in (layer, frozen):
            for one in x:
                y, state = stream.step(one, state)
                got.append(y)
            torch.testing.assert_close((torch.stack(got), state), (want, h))
            got, state = [], None
        torch.testing.assert_close(frozen(x), (want, h))
        quantized = rnnfast.quantize(copy.deepcopy(layer))
        torch.testing.assert_close(quantized(x)[0], want, rtol=0.1, atol=0.1)
        assert "residual=True" in repr(quantized) and "residual=True" in repr(layer)
    weights = layer._weights()
    torch.testing.assert_close(
        functional.indrnn_relu(x, None, weights, num_layers=3, residual=True), (want, h)
    )
    rows = rnnfast.explain(layer, x).rows
    assert len(rows) == 3 and "layers" not in {row.split for row in rows}
    lazy = rnnfast.LazyIndRNN(8, 3, residual=True)
    assert lazy(x)[0].shape == want.shape and lazy.residual
    with pytest.raises(TypeError, match="rnnfast: residual of IndRNN must be a bool, got int"):
        rnnfast.IndRNN(8, 8, residual=1)  # type: ignore[arg-type]


def test_gradients_do_not_explode_once_constrained() -> None:
    """dh_T/dh_0 of a layer of relu that is on is u^T, at most gamma."""
    steps, gamma = 50, 3.0
    layer = rnnfast.IndRNN(2, 6, 2, bidirectional=True, dtype=f64)
    with torch.no_grad():
        for name, w in layer.named_parameters():
            w.copy_(torch.linspace(-2, 2, w.numel()).view_as(w) if "_hh_" in name else w.abs())
    kept = {k: w.clone() for k, w in layer.named_parameters() if "weight_hh" not in k}
    for w in layer.parameters():
        w.grad = torch.ones_like(w)
    assert layer.constrain_(steps, gamma) is layer
    bound = gamma ** (1 / steps)
    for name, w in layer.named_parameters():
        if name in kept:
            torch.testing.assert_close(w, kept[name], rtol=0, atol=0)
        else:
            want = torch.linspace(-2, 2, 6, dtype=f64).clamp(-bound, bound)
            torch.testing.assert_close(w.detach(), want)
            assert w.requires_grad and w.is_leaf and w.grad is not None
    one = rnnfast.IndRNN(2, 6, dtype=f64)
    with torch.no_grad():
        for w in one.parameters():
            w.abs_()
        one.weight_hh_l0.fill_(5.0)
    one.constrain_(steps, gamma)
    h = torch.rand(1, 1, 6, dtype=f64, requires_grad=True)
    _, end = one(torch.rand(steps, 1, 2, dtype=f64), h)
    dh = torch.autograd.grad(end.sum(), h)[0]
    torch.testing.assert_close(dh, torch.full_like(dh, gamma))


def test_memory_of_the_last_layer() -> None:
    torch.manual_seed(0)
    layer = rnnfast.IndRNN(2, 400, 2, bidirectional=True)
    before = {k: w.clone() for k, w in layer.named_parameters()}
    assert layer.init_memory_(100, gamma=2.0, epsilon=0.5) is layer
    low, high = 0.5**0.01, 2**0.01
    for name, w in layer.named_parameters():
        if name.startswith("weight_hh_l1"):
            assert bool(((w >= low) & (w <= high)).all()) and float(w.detach().std()) > 0.002
        else:
            torch.testing.assert_close(w, before[name], rtol=0, atol=0)


def test_bounds_that_make_no_sense() -> None:
    layer: Any = rnnfast.IndRNN(2, 6)
    for steps in (0, -1, 2.0, True, None):
        for call in (layer.constrain_, layer.init_memory_):
            with pytest.raises(ValueError, match="rnnfast: seq_len of .* must be an int >= 1, got"):
                call(steps)
    for gamma in (0, -1.0, float("inf"), float("nan"), "2", True):
        with pytest.raises(ValueError, match="rnnfast: gamma of constrain_ must be a number above"):
            layer.constrain_(5, gamma)
        with pytest.raises(ValueError, match="rnnfast: epsilon of init_memory_ must be a number"):
            layer.init_memory_(5, epsilon=gamma)
    with pytest.raises(ValueError, match="rnnfast: epsilon of init_memory_ must be at most gamma"):
        layer.init_memory_(5, 1.0, 1.5)
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0", dim=None)
    with pytest.raises(RuntimeError, match="constrain_ changes .* that are parameters, got weight"):
        layer.constrain_(5)


def test_it_learns_to_remember() -> None:
    """The first of 300 steps; who has forgotten it can't do better than its variance, 1/12."""

    def error_of(memory: bool, steps: int = 300) -> float:
        torch.manual_seed(1)
        layer = rnnfast.IndRNN(1, 16, 2, bias=False, return_last=True)
        if memory:
            layer.init_memory_(steps)
        head = nn.Linear(16, 1)
        optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-2)
        errors = []
        for _ in range(100):
            first = torch.rand(32, 1)
            x = torch.cat([first.unsqueeze(0), torch.zeros(steps - 1, 32, 1)])
            error = (head(layer(x)[0]) - first).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            if memory:
                layer.constrain_(steps)
            errors.append(error.detach())
        return float(torch.stack(errors[-10:]).mean())

    assert error_of(True) < 0.02 < 0.06 < error_of(False)
