"""layer_norm=True: Ba et al. 2016 (arXiv:1607.06450), against torch's layer_norm in a loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import staged
import torch
import variants
from torch import Tensor
from torch.nn import functional as F
from variants import f64, results

import rnnfast
from rnnfast import functional

KINDS: dict[str, Any] = {
    "LSTM": rnnfast.LSTM,
    "GRU": rnnfast.GRU,
    "RNN": rnnfast.RNN,
    "IndRNN": rnnfast.IndRNN,
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, inputs: int = 4, hidden: int = 19, *args: Any, **options: Any) -> Any:
    """Gains and biases as training leaves them, not as they start."""
    torch.manual_seed(7)
    layer = KINDS[kind](inputs, hidden, *args, layer_norm=True, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("norm"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def step_of(layer: Any, act: Any = None, gate: Any = torch.sigmoid) -> staged.Step:
    """The paper's equations 20 to 26, of the first layer."""
    H = layer.hidden_size
    if act is None:
        act = torch.relu if isinstance(layer, rnnfast.IndRNN) else torch.tanh
    w_ih, w_hh = layer.weight_ih_l0, layer.weight_hh_l0
    b_ih, b_hh = (layer.bias_ih_l0, layer.bias_hh_l0) if layer.bias else (0.0, 0.0)
    groups = [2 * H, H] if isinstance(layer, rnnfast.GRU) else [w_ih.size(0)]

    def norm(a: Tensor, gain: Tensor, bias: Any) -> Tensor:
        parts = [
            F.layer_norm(part, part.shape[-1:], g, None, 1e-5)
            for part, g in zip(a.split(groups, -1), gain.split(groups), strict=True)
        ]
        return torch.cat(parts, -1) + bias

    def step(x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h = state[0]
        gx = norm(x @ w_ih.t(), layer.norm_ih_l0, b_ih)
        if isinstance(layer, rnnfast.IndRNN):
            return (act(gx + h * w_hh + b_hh),)
        gh = norm(h @ w_hh.t(), layer.norm_hh_l0, b_hh)
        if isinstance(layer, rnnfast.LSTM):
            i, f, g, o = (gx + gh).chunk(4, -1)
            c = gate(f) * state[1] + gate(i) * act(g)
            return gate(o) * act(F.layer_norm(c, (H,), layer.norm_c_l0, layer.norm_c_bias_l0)), c
        if isinstance(layer, rnnfast.GRU):
            (x_r, x_z, x_n), (h_r, h_z, h_n) = gx.chunk(3, -1), gh.chunk(3, -1)
            z = gate(x_z + h_z)
            return ((1 - z) * act(x_n + gate(x_r + h_r) * h_n) + z * h,)
        return (act(gx + gh),)

    return step


@kinds
@pytest.mark.parametrize("hidden", [2, 3, 8, 16, 19, 33, 64, 130])
def test_against_torch(kind: str, hidden: int) -> None:
    """Outputs and every gradient in float64."""
    layer = make(kind, hidden=hidden, dtype=f64)
    staged.check_against_step(layer, step_of(layer))


@kinds
@pytest.mark.parametrize("batch", [1, 2, 7, 40])
@pytest.mark.parametrize("kernel", ["packed", "direct"])
def test_sizes_and_kernels(kind: str, batch: int, kernel: str) -> None:
    layer = make(kind, 5, 37, dtype=f64)
    staged.check_against_step(layer, step_of(layer), 9, batch, kernel=kernel)


@kinds
def test_without_bias_and_state(kind: str) -> None:
    layer = make(kind, bias=False, dtype=f64)
    assert "bias_ih_l0" not in layer.state_dict() and "norm_ih_l0" in layer.state_dict()
    staged.check_against_step(layer, step_of(layer), state=False)


@kinds
def test_chosen_activations(kind: str) -> None:
    gated = kind in ("LSTM", "GRU")
    options = {"gate_activation": "hard_sigmoid"} if gated else {}
    layer = make(kind, dtype=f64, activation="gelu", **options)
    hard = lambda x: F.relu6(x + 3) / 6  # noqa: E731 torch's own is off by 1e-8
    staged.check_against_step(layer, step_of(layer, F.gelu, hard))


@kinds
@pytest.mark.parametrize("recompute", [False, True])
def test_every_form_of_a_sequence(kind: str, recompute: bool) -> None:
    layer = make(kind, 4, 6, 2, bidirectional=True, dtype=f64, recompute=recompute)
    variants.check_every_sequence(layer, 4)


@kinds
def test_derivatives(kind: str) -> None:
    x = torch.randn(3, 2, 3, dtype=f64, requires_grad=True)
    variants.check_derivatives(make(kind, 3, 4, dtype=f64), x)


@kinds
def test_per_sample_gradients(kind: str) -> None:
    variants.check_per_sample_gradients(
        make(kind, 3, 5, dtype=f64), torch.randn(4, 3, 3, dtype=f64)
    )


@kinds
def test_bits_do_not_depend_on_threads(kind: str) -> None:
    layer = make(kind, 40, 100)
    for batch in (2, 13, 40):
        variants.check_threads(layer, torch.randn(20, batch, 40, requires_grad=True))
    x = torch.randn(20, 40, 40)
    with torch.no_grad(), rnnfast.use_engine("cpu", split="batch"):
        assert staged.ran_on_threads(layer, x, 2) == 2, "or nothing was compared"


@kinds
def test_sixteen_bits(kind: str) -> None:
    x = torch.randn(5, 3, 16, requires_grad=True)
    variants.check_sixteen_bits(make(kind, 16, 64), x)


@kinds
def test_frozen_and_stepped(kind: str) -> None:
    for dtype in (torch.float32, f64):
        layer = make(kind, num_layers=2, dtype=dtype)
        variants.check_frozen_and_stepped(layer, torch.randn(5, 3, 4, dtype=dtype))


@kinds
def test_compiled(kind: str) -> None:
    variants.check_compiled(make(kind, num_layers=2), torch.randn(5, 3, 4, requires_grad=True))


@kinds
def test_other_options(kind: str) -> None:
    """Masks of a seed are those of the reference; the last step alone is the last step."""
    layer = make(kind, 4, 6, 2, dtype=f64, weight_dropout=0.3, input_dropout=0.2, dropout=0.2)
    x = torch.randn(7, 3, 4, dtype=f64, requires_grad=True)
    inputs = [x, *layer.parameters()]

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        return results(*layer(x), inputs)

    got = run()
    with rnnfast.use_engine("reference"):
        staged.assert_all_close(got, run())
    layer.eval()
    whole = layer(x)[0][-1]
    layer.return_last = True
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], whole.detach(), rtol=1e-12, atol=1e-12)


@kinds
def test_a_large_mean_costs_no_digits(kind: str) -> None:
    """Rows of W x around 300 with a spread of 1, in float32."""
    layer = make(kind, 8, 128)
    with torch.no_grad():
        layer.weight_ih_l0.add_(300.0 / 8)
    x = torch.ones(6, 4, 8) + 0.02 * torch.randn(6, 4, 8)
    exact, _ = copy.deepcopy(layer).double()(x.double())
    y, _ = layer(x)
    zeros = (torch.zeros(4, 128),) * (2 if kind == "LSTM" else 1)
    loop, _ = staged.unrolled(step_of(layer), x, zeros)
    ours = float((y.double() - exact).abs().max().detach())
    theirs = float((loop.double() - exact).abs().max().detach())
    assert ours <= 2 * theirs + 1e-6 and ours < 1e-2


@kinds
def test_float32_against_float64(kind: str) -> None:
    layer, x = make(kind, 64, 128), torch.randn(60, 8, 64)
    exact, _ = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(layer(x)[0].double(), exact, rtol=1e-4, atol=1e-4)


def test_parameters() -> None:
    layer = rnnfast.LSTM(4, 6, 2, bidirectional=True, layer_norm=True)
    shapes = {k: tuple(v.shape) for k, v in layer.named_parameters() if k.startswith("norm")}
    names = ("norm_ih", "norm_hh", "norm_c", "norm_c_bias")
    each = dict(zip(names, ((24,), (24,), (6,), (6,)), strict=True))
    assert shapes == {
        f"{name}_l{k}{d}": each[name] for k in (0, 1) for d in ("", "_reverse") for name in names
    }
    for name, parameter in layer.named_parameters():
        if name.startswith("norm"):
            assert (parameter == (0 if "bias" in name else 1)).all()
    assert {k for k, _ in rnnfast.IndRNN(4, 6, layer_norm=True).named_parameters()} == {
        "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "norm_ih_l0",
    }  # fmt: skip
    assert set(dict(rnnfast.GRU(4, 6, bias=False, layer_norm=True).named_parameters())) == {
        "weight_ih_l0", "weight_hh_l0", "norm_ih_l0", "norm_hh_l0",
    }  # fmt: skip
    # as torch.nn's, and drawn as theirs
    torch.manual_seed(0)
    plain = rnnfast.LSTM(4, 6)
    torch.manual_seed(0)
    normed = rnnfast.LSTM(4, 6, layer_norm=True)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, normed.get_parameter(name))
    with torch.no_grad():
        normed.norm_c_l0.fill_(3.0)
    normed.reset_parameters()
    assert (normed.norm_c_l0 == 1).all()


@kinds
def test_life_of_a_layer(kind: str) -> None:
    layer, x = make(kind, 2, 3), torch.randn(4, 1, 2)
    assert repr(layer) == f"{kind}(2, 3, layer_norm=True)" and layer.layer_norm is True
    y = layer(x)[0]
    fresh = KINDS[kind](2, 3, layer_norm=True)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x)[0], y, rtol=0, atol=0)
    lazy = getattr(rnnfast, f"Lazy{kind}")(3, layer_norm=True)
    lazy(x)
    assert repr(lazy) == repr(layer)
    torch.testing.assert_close(lazy.double()(x.double())[0].float(), lazy.float()(x)[0])


@kinds
def test_function(kind: str) -> None:
    layer, x = make(kind), torch.randn(5, 3, 4)
    function = getattr(functional, kind.lower())
    own = {"activation": layer.activation} if kind.endswith("RNN") else {}
    y, _ = function(x, None, layer.all_weights[0], layer_norm=True, **own)
    torch.testing.assert_close(y, layer(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make_it", "kind", "text"),
    [
        (lambda: rnnfast.LSTM(2, 3, layer_norm=1), TypeError,
         "layer_norm of LSTM must be a bool, got int"),
        (lambda: rnnfast.LSTM(2, 3, proj_size=2, layer_norm=True), ValueError,
         "layer_norm of LSTM is not defined with proj_size"),
        (lambda: rnnfast.LSTM(2, 3, peephole=True, layer_norm=True), ValueError,
         "layer_norm of LSTM is not defined with peephole"),
        (lambda: rnnfast.LSTM(2, 3, coupled=True, layer_norm=True), ValueError,
         "layer_norm of LSTM is not defined with coupled"),
        (lambda: rnnfast.LSTM(2, 3, cell_clip=1.0, layer_norm=True), ValueError,
         "layer_norm of LSTM is not defined with cell_clip"),
        (lambda: rnnfast.GRU(2, 3, reset_after=False, layer_norm=True), ValueError,
         "layer_norm of GRU is not defined with reset_after=False"),
        (lambda: rnnfast.quantize(torch.nn.Sequential(make("GRU", 2, 3))), RuntimeError,
         r"quantize has no kernels .* GRU\(layer_norm=True\); exclude it"),
    ],
)  # fmt: skip
def test_errors(make_it: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make_it()


def test_errors_of_the_operator() -> None:
    layer = make("LSTM", 2, 3)
    w_ih, w_hh, b_ih, b_hh = layer._complete(layer._weights())
    x, none = torch.ones(1, 1, 2), (None,) * 3
    cell = layer._chosen_cell.id
    short = r"b_hh must have shape \(\(G\+K\)\*H,\) = \(42,\), got \(12,\)"
    with pytest.raises(RuntimeError, match=short):
        torch.ops.rnnfast.forward(
            x, None, None, w_ih, w_hh, b_ih, b_hh[:12], None, *none, cell, False, False
        )
    with pytest.raises(RuntimeError, match="w_hr is for lstm only, got cell lstm_norm"):
        torch.ops.rnnfast.forward(
            x, None, None, w_ih, torch.ones(12, 2), b_ih, b_hh, torch.ones(2, 3), *none, cell,
            False, False,
        )  # fmt: skip
    one = r"b_hh must have shape \(G\*H,\) = \(12,\), got \(4,\)"
    with rnnfast.use_engine("reference"), pytest.raises(RuntimeError, match=one):
        functional.lstm(
            x, None, [w_ih, w_hh, b_ih, b_hh[:4], *[torch.ones(2)] * 4], layer_norm=True
        )


def test_operator_without_biases() -> None:
    """Gains are one then, biases zero."""
    for kind in KINDS:
        layer = KINDS[kind](3, 4, layer_norm=True, dtype=f64)
        w_ih, w_hh, b_ih, b_hh = layer._complete(layer._weights())
        x, cell = torch.randn(5, 2, 3, dtype=f64), layer._chosen_cell.id
        given = [torch.zeros_like(b_ih), b_hh.detach().clone()]
        given[1][: b_ih.size(0)] = 0
        outs = [
            torch.ops.rnnfast.forward(
                x, None, None, w_ih, w_hh, *biases, None, None, None, None, cell, False, False
            )[0]
            for biases in (given, (None, None))
        ]
        torch.testing.assert_close(outs[0], outs[1])
