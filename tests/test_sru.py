"""SRU against the equations of its paper, in float64, and in every form that a layer has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import variants
from torch import Tensor
from variants import f64, results

import rnnfast
from rnnfast import functional


def plain(layer: Any, x: Tensor, c: Tensor, suffix: str = "") -> tuple[Tensor, Tensor]:
    """One direction, step by step (Lei et al. 2018, equations 3 to 6, with a highway that fits)."""
    H = layer.hidden_size
    w, v = getattr(layer, f"weight_ih_l0{suffix}"), getattr(layer, f"weight_c_l0{suffix}")
    b = getattr(layer, f"bias_ih_l0{suffix}") if layer.bias else torch.zeros(2 * H, dtype=x.dtype)
    alpha = math.sqrt(1 + 2 * math.exp(layer.highway_bias)) if layer.rescale else 1.0
    y: list[Tensor] = []
    for x_t in x.flip(0) if suffix else x:
        f = torch.sigmoid(x_t @ w[H : 2 * H].t() + v[:H] * c + b[:H])
        r = torch.sigmoid(x_t @ w[2 * H : 3 * H].t() + v[H:] * c + b[H:])
        c = f * c + (1 - f) * (x_t @ w[:H].t())
        if w.size(0) == 4 * H:
            skip = x_t @ w[3 * H :].t()
        elif x_t.size(-1) == H:
            skip = alpha * x_t
        else:
            skip = alpha * (x_t[:, H:] if suffix else x_t[:, :H])
        y.append(r * c + (1 - r) * skip)
    return torch.stack(y[::-1] if suffix else y), c


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [4, 19])
@pytest.mark.parametrize("options", [{}, {"rescale": True, "highway_bias": -1.5}])
def test_as_the_paper_says(bias: bool, inputs: int, options: Any) -> None:
    torch.manual_seed(3)
    layer = rnnfast.SRU(inputs, 19, bias=bias, dtype=f64, **options)
    assert layer.weight_ih_l0.size(0) == (57 if inputs == 19 else 76)
    x = torch.randn(5, 3, inputs, dtype=f64, requires_grad=True)
    c = torch.randn(3, 19, dtype=f64, requires_grad=True)
    wanted = [x, c, *layer.parameters()]
    y, (h_n, c_n) = layer(x, (torch.randn(1, 3, 19, dtype=f64), c.unsqueeze(0)))
    torch.testing.assert_close(h_n[0], y[-1], rtol=0, atol=0)
    got = results(y, c_n.squeeze(0), wanted)
    for a, b in zip(got, results(*plain(layer, x, c), wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_each_direction_takes_its_half() -> None:
    torch.manual_seed(0)
    layer = rnnfast.SRU(12, 6, bidirectional=True, rescale=True, dtype=f64)
    assert layer.weight_ih_l0.shape == (18, 12)
    x, c = torch.randn(5, 3, 12, dtype=f64), torch.zeros(3, 6, dtype=f64)
    y, _ = layer(x)
    want = torch.cat([plain(layer, x, c)[0], plain(layer, x, c, "_reverse")[0]], -1)
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("inputs", [4, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_every_sequence(inputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = rnnfast.SRU(inputs, 6, 2, bias, bidirectional=True, dtype=f64, recompute=bias)
    variants.check_every_sequence(layer, inputs)


def test_derivatives() -> None:
    torch.manual_seed(0)
    layer = rnnfast.SRU(3, 3, dtype=f64)
    x = torch.randn(4, 2, 3, dtype=f64, requires_grad=True)
    variants.check_derivatives(layer, x)
    variants.check_per_sample_gradients(layer, x)


def test_ways_to_run() -> None:
    torch.manual_seed(0)
    layer = rnnfast.SRU(5, 35, 2)
    x = torch.randn(6, 7, 5, requires_grad=True)
    variants.check_threads(layer, x)
    variants.check_compiled(layer, x)
    variants.check_sixteen_bits(layer, x)
    variants.check_frozen_and_stepped(layer, x)


def test_function() -> None:
    x = torch.randn(5, 3, 6)
    for bias in (True, False):
        layer = rnnfast.SRU(6, 6, 2, bias, rescale=True)
        weights = [w for names in layer.all_weights for w in names]
        y, _ = functional.sru(x, None, weights, num_layers=2, bias=bias, scale=math.sqrt(3))
        torch.testing.assert_close(y, layer(x)[0], rtol=0, atol=0)


def test_what_weights_start_from() -> None:
    torch.manual_seed(0)
    layer = rnnfast.SRU(300, 200, highway_bias=-2.0)
    assert (layer.bias_ih_l0[:200] == 0).all() and (layer.bias_ih_l0[200:] == -2).all()
    assert layer.weight_ih_l0.abs().max() <= 0.1 and layer.weight_ih_l0.std() > 0.05
    assert repr(layer) == "SRU(300, 200, highway_bias=-2.0)"
    assert repr(rnnfast.SRU(3, 4, rescale=True)) == "SRU(3, 4, rescale=True)"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rnnfast.SRU(3, 4, rescale=1), TypeError, "rescale of SRU must be a bool"),
        (lambda: rnnfast.SRU(3, 4, highway_bias="a"), TypeError, "must be a number, got str"),
        (lambda: rnnfast.SRU(3, 4, highway_bias=math.inf), ValueError, r"in \[-80, 80\]"),
        (lambda: rnnfast.SRU(3, 0), ValueError, "hidden_size must be greater than zero"),
        (
            lambda: functional.sru(
                torch.zeros(2, 1, 5), None, [torch.zeros(9, 5), torch.zeros(6)], bias=False
            ),
            RuntimeError,
            r"w_ih of SRU must have shape \(4\*H, I\) = \(12, 5\), or \(3\*H, I\)",
        ),
        (
            lambda: functional.sru(torch.zeros(2, 1, 5), None, [torch.zeros(9, 5)]),
            RuntimeError,
            "weights must hold 3 tensors",
        ),
        (
            lambda: functional.sru(
                torch.zeros(2, 1, 3), None, [torch.zeros(9, 3), torch.zeros(5)], bias=False
            ),
            RuntimeError,
            r"weights\[1\] must have shape \(2\*H,\), got \(5,\)",
        ),
    ],
)
def test_errors(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_weight_dropout_has_nothing_to_drop() -> None:
    layer = rnnfast.SRU(3, 4)
    layer.weight_dropout = 0.5
    with pytest.raises(RuntimeError, match="weight_dropout is for layers with a w_hh"):
        layer(torch.zeros(2, 1, 3))
