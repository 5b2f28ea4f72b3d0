"""GRU(reset_after=False): the reset gate before the product, as Cho et al. 2014 have it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import staged
import torch
import variants
from torch import Tensor
from torch.nn import functional as F

import rnnfast
from rnnfast import functional
from rnnfast.cells import cell_spec, chosen_cell

f64 = torch.float64


def gru(inputs: int = 4, hidden: int = 19, *args: Any, **options: Any) -> rnnfast.GRU:
    torch.manual_seed(5)
    return rnnfast.GRU(inputs, hidden, *args, reset_after=False, **options)


def step_of(layer: Any, act: Any = torch.tanh, gate: Any = torch.sigmoid) -> staged.Step:
    """From the paper's equations (arXiv:1406.1078, 5 to 8), with biases."""
    w_ih, w_hh = layer.weight_ih_l0, layer.weight_hh_l0
    w_r, w_z, w = w_ih.chunk(3)
    u_r, u_z, u = w_hh.chunk(3)
    b: Any = (0.0, 0.0, 0.0)
    if layer.bias:
        b = (layer.bias_ih_l0 + layer.bias_hh_l0).chunk(3)

    def step(x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h,) = state
        r = gate(x @ w_r.t() + h @ u_r.t() + b[0])
        z = gate(x @ w_z.t() + h @ u_z.t() + b[1])
        n = act(x @ w.t() + (r * h) @ u.t() + b[2])
        return (z * h + (1 - z) * n,)

    return step


@pytest.mark.parametrize("hidden", [1, 3, 8, 16, 19, 33, 64, 130])
def test_against_the_equations(hidden: int) -> None:
    layer = gru(hidden=hidden, dtype=f64)
    staged.check_against_step(layer, step_of(layer))


@pytest.mark.parametrize("batch", [1, 2, 7, 40])
@pytest.mark.parametrize("kernel", ["packed", "direct"])
def test_sizes_and_kernels(batch: int, kernel: str) -> None:
    layer = gru(5, 37, dtype=f64)
    staged.check_against_step(layer, step_of(layer), 9, batch, kernel=kernel)


def test_without_bias_and_state() -> None:
    layer = gru(bias=False, dtype=f64)
    staged.check_against_step(layer, step_of(layer), state=False)


def test_chosen_activations() -> None:
    layer = gru(dtype=f64, activation="gelu", gate_activation="softsign")
    assert (layer.activation, layer.gate_activation) == ("gelu", "softsign")
    staged.check_against_step(layer, step_of(layer, F.gelu, F.softsign))


@pytest.mark.parametrize("recompute", [False, True])
def test_every_form_of_a_sequence(recompute: bool) -> None:
    layer = gru(4, 6, 2, bidirectional=True, dtype=f64, recompute=recompute)
    variants.check_every_sequence(layer, 4)


def test_derivatives() -> None:
    x = torch.randn(3, 2, 3, dtype=f64, requires_grad=True)
    variants.check_derivatives(gru(3, 3, dtype=f64), x)


def test_per_sample_gradients() -> None:
    variants.check_per_sample_gradients(gru(3, 5, dtype=f64), torch.randn(4, 3, 3, dtype=f64))


def test_bits_do_not_depend_on_threads() -> None:
    layer = gru(40, 100)
    for batch in (2, 13, 40):
        variants.check_threads(layer, torch.randn(20, batch, 40, requires_grad=True))
    x = torch.randn(20, 40, 40)
    with torch.no_grad():
        assert staged.ran_on_threads(layer, x, 2) == 2, "or nothing was compared"


def test_never_by_units() -> None:
    layer, x = gru(256, 512), torch.randn(3, 4, 256)
    with rnnfast.use_engine("cpu", split="units"):
        assert staged.ran_on_threads(layer, x, 2, tries=1) == 1
        assert rnnfast.last_run()["split"] == "serial"
    row = rnnfast.explain(layer, x).rows[0]
    assert row.engine == "cpu" and "gru_before" in row.shape and "whole rows" in row.reason


def test_sixteen_bits() -> None:
    variants.check_sixteen_bits(gru(num_layers=2), torch.randn(5, 3, 4, requires_grad=True))


def test_frozen_and_stepped() -> None:
    for dtype in (torch.float32, f64):
        layer = gru(num_layers=2, dtype=dtype)
        variants.check_frozen_and_stepped(layer, torch.randn(5, 3, 4, dtype=dtype))


def test_compiled() -> None:
    variants.check_compiled(gru(num_layers=2), torch.randn(5, 3, 4, requires_grad=True))


def test_last_step_alone() -> None:
    layer, x = gru(return_last=True).eval(), torch.randn(6, 3, 4)
    with torch.inference_mode():
        last, h_n = layer(x)
        layer.return_last = False
        torch.testing.assert_close(last, layer(x)[0][-1], rtol=0, atol=0)
    torch.testing.assert_close(last, h_n[-1], rtol=0, atol=0)


def test_float32_against_float64() -> None:
    layer, x = gru(64, 128), torch.randn(100, 8, 64)
    y, _ = layer(x)
    exact, _ = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


def test_function() -> None:
    layer, x = gru(), torch.randn(5, 3, 4)
    y, _ = functional.gru(x, None, layer.all_weights[0], reset_after=False)
    torch.testing.assert_close(y, layer(x)[0], rtol=0, atol=0)
    after, _ = functional.gru(x, None, layer.all_weights[0])
    assert not torch.allclose(after, y)


def test_life_of_a_layer() -> None:
    layer, x = gru(2, 3), torch.randn(4, 1, 2)
    assert repr(layer) == "GRU(2, 3, reset_after=False)" and layer.reset_after is False
    assert rnnfast.GRU(2, 3).reset_after is True and rnnfast.GRU(2, 3)._chosen_cell is None
    assert layer.state_dict().keys() == rnnfast.GRU(2, 3).state_dict().keys()
    lazy = rnnfast.LazyGRU(3, reset_after=False)
    lazy(x)
    assert type(lazy) is rnnfast.GRU and repr(lazy) == repr(layer)
    spec = chosen_cell("GRU", "gru_before", "tanh")
    assert spec is cell_spec("gru_before") and spec.stages
    assert cell_spec(chosen_cell("GRU", "gru_before", "relu").id).activation == "relu"


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: rnnfast.GRU(2, 3, reset_after=None), TypeError,
         "reset_after of GRU must be a bool, got NoneType"),
        (lambda: rnnfast.LSTM(2, 3, reset_after=False), TypeError, "reset_after"),  # type: ignore[call-arg]
        (lambda: rnnfast.quantize(torch.nn.Sequential(gru(2, 3))), RuntimeError,
         r"quantize has no kernels .* GRU\(reset_after=False\); exclude it"),
        (lambda: functional.gru(torch.ones(1, 1, 2), None, [], reset_after=0), TypeError,
         "reset_after of gru must be a bool"),
    ],
)  # fmt: skip
def test_errors(make: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make()
