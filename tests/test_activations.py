"""Activations and the bound of c that a layer chooses, against torch's functions in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import functional
from rnnfast.cells import CELLS, cell_spec, chosen_cell

f64 = torch.float64
# torch's own of float64 is off by 1e-8 in hardsigmoid, by 1e-16 where gelu is nearly 0
PLAIN: dict[str, Any] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "hard_sigmoid": lambda x: F.relu6(x + 3) / 6,
    "hard_tanh": F.hardtanh,
    "softsign": F.softsign,
    "elu": F.elu,
    "selu": F.selu,
    "gelu": lambda x: x * 0.5 * torch.special.erfc(-x / 2**0.5),
    "silu": F.silu,
    "softplus": F.softplus,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
}
KINDS: dict[str, Any] = {
    "LSTM": rnnfast.LSTM,
    "GRU": rnnfast.GRU,
    "RNN": rnnfast.RNN,
    "IndRNN": rnnfast.IndRNN,
}
GATED = ("LSTM", "GRU")


def plain(layer: Any, x: Tensor, state: tuple[Tensor, ...], clip: float | None) -> tuple[Any, Any]:
    """One layer, one direction, step by step, from the attributes of a layer."""
    gate = PLAIN[getattr(layer, "gate_activation", "sigmoid")]  # of those that have gates
    act = PLAIN[layer.activation]
    w_ih, w_hh, b_ih, b_hh = layer._weights()
    h, c = state if len(state) == 2 else (state[0], None)
    y = []
    for x_t in x:
        gx = x_t @ w_ih.t() + b_ih
        gh = (h * w_hh if w_hh.dim() == 1 else h @ w_hh.t()) + b_hh
        if isinstance(layer, rnnfast.LSTM):
            i, f, g, o = (gx + gh).chunk(4, -1)
            c = gate(f) * c + gate(i) * act(g)
            c = c if clip is None else c.clamp(-clip, clip)
            h = gate(o) * act(c)
        elif isinstance(layer, rnnfast.GRU):
            (x_r, x_z, x_n), (h_r, h_z, h_n) = gx.chunk(3, -1), gh.chunk(3, -1)
            z = gate(x_z + h_z)
            h = (1 - z) * act(x_n + gate(x_r + h_r) * h_n) + z * h
        else:
            h = act(gx + gh)
        y.append(h)
    return torch.stack(y), (h,) if c is None else (h, c)


def case(kind: str, dtype: torch.dtype = f64, hidden: int = 19, **options: Any) -> Any:
    torch.manual_seed(3)
    layer = KINDS[kind](4, hidden, dtype=dtype, **options)
    x = torch.randn(5, 3, 4, dtype=dtype, requires_grad=True)
    count = 2 if kind == "LSTM" else 1
    state = tuple(torch.randn(3, hidden, dtype=dtype, requires_grad=True) for _ in range(count))
    return layer, x, state


def results(y: Tensor, ends: Any, inputs: Any) -> list[Tensor]:
    """Outputs, and the gradients of a sum in which all of them count."""
    outs = [y, *ends]
    loss = sum(
        (o * torch.linspace(-1, 1.5, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outs
    )
    return [*outs, *torch.autograd.grad(loss, inputs)]


def run(layer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """As `plain` gives it."""
    hx = tuple(s.unsqueeze(0) for s in state)
    y, end = layer(x, hx if len(hx) == 2 else hx[0])
    return y, tuple(e.squeeze(0) for e in (end if len(hx) == 2 else (end,)))


def check_against_plain(layer: Any, x: Tensor, state: Any, clip: float | None = None) -> None:
    inputs = [x, *state, *layer.parameters()]
    got = results(*run(layer, x, state), inputs)
    expected = results(*plain(layer, x, state, clip), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("kind", KINDS)
def test_as_torch_computes_it(kind: str, activation: str) -> None:
    """Outputs and every gradient in float64, the same function at gates and state."""
    options = {"gate_activation": activation} if kind in GATED else {}
    layer, x, state = case(kind, activation=activation, **options)
    assert layer.activation == activation
    check_against_plain(layer, x, state)


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize(("activation", "gate"), [("relu", "hard_sigmoid"), ("gelu", "softsign")])
def test_gates_and_state_differ(kind: str, activation: str, gate: str) -> None:
    layer, x, state = case(kind, activation=activation, gate_activation=gate)
    assert (layer.activation, layer.gate_activation) == (activation, gate)
    check_against_plain(layer, x, state)


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=str)
def test_values_and_slopes(activation: str, dtype: torch.dtype) -> None:
    """The function alone, over its range and beyond: a step of one unit without a past."""
    edges = [
        -1e4,
        -100.0,
        -88.0,
        -20.0,
        -6.0,
        -3.0,
        -1.0,
        -1e-6,
        0.0,
        1e-6,
        1.0,
        3.0,
        20.0,
        100.0,
        1e4,
    ]
    x = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor(edges)]).to(dtype)
    x.requires_grad_()
    one = torch.ones(1, 1, dtype=dtype)
    y, _ = functional.rnn(
        x.view(1, -1, 1), None, [one, torch.zeros_like(one)], activation=activation, bias=False
    )
    (slope,) = torch.autograd.grad(y.sum(), x)
    exact = x.detach().to(f64).requires_grad_()
    value = PLAIN[activation](exact)
    (exact_slope,) = torch.autograd.grad(value.sum(), exact)
    # torch's softplus is linear from 20 on, 2e-9 off. exp ends before it underflows: 1e-38 times x.
    # The density of gelu loses what the square of x has: x**2 eps / 2. 1 - y has lost eps.
    eps = torch.finfo(dtype).eps
    loose = 3e-9 if activation == "softplus" else 1e-33
    rtol = (128 if activation == "gelu" else 8) * eps
    torch.testing.assert_close(y.view(-1).to(f64), value, rtol=rtol, atol=loose)
    torch.testing.assert_close(slope.to(f64), exact_slope, rtol=rtol, atol=max(loose, 8 * eps))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=str)
def test_far_out_it_vanishes(activation: str, dtype: torch.dtype) -> None:
    """exp ends before it is zero; a factor x must not bring that back."""
    huge = torch.finfo(dtype).max / 2
    x = torch.tensor([-huge, -1e30, 1e30, huge], dtype=dtype, requires_grad=True)
    one = torch.ones(1, 1, dtype=dtype)
    weights = [one, torch.zeros_like(one)]
    y, _ = functional.rnn(x.view(1, -1, 1), None, weights, activation=activation, bias=False)
    (slope,) = torch.autograd.grad(y.sum(), x)
    value = y.detach().view(-1)
    assert (value[:2].abs() < 1e-34).all() and (value[2:] == x[2:]).all()
    torch.testing.assert_close(slope, torch.tensor([0, 0, 1, 1], dtype=dtype), rtol=0, atol=1e-34)


def test_a_subclass_may_have_an_activation_of_its_own() -> None:
    class Mine(rnnfast.LSTM):
        def __init__(self, activation: Any) -> None:
            super().__init__(3, 4)
            self.activation = activation

    relu = nn.ReLU()
    assert Mine(relu).activation is relu and Mine(torch.relu).activation is torch.relu
    assert Mine(relu)(torch.randn(2, 1, 3))[0].shape == (2, 1, 4)


@pytest.mark.parametrize("activation", PLAIN)
def test_a_nan_stays(activation: str) -> None:
    layer, x, state = case("LSTM", torch.float32, activation=activation, gate_activation=activation)
    with torch.no_grad():
        x[2, 1, 0] = torch.nan
        y, _ = run(layer, x, state)
    assert y[:2].isfinite().all() and y[2:, 1].isnan().all() and y[2:, 0].isfinite().all()


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_cell_clip(activation: str) -> None:
    """c stays within the bound, and nothing flows back through what was cut."""
    layer, x, state = case("LSTM", activation=activation, cell_clip=0.25)
    assert layer.cell_clip == 0.25
    _, (_, c) = run(layer, x, state)
    assert (c.abs() == 0.25).any() and (c.abs() <= 0.25).all() and (c.abs() < 0.25).any()
    check_against_plain(layer, x, state, 0.25)


def test_clipped_with_a_projection() -> None:
    torch.manual_seed(0)
    layer = rnnfast.LSTM(4, 7, 2, proj_size=3, cell_clip=0.25, activation="silu", dtype=f64)
    x = torch.randn(6, 2, 4, dtype=f64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    y, (h, c) = layer(x)
    got = results(y, (h, c), inputs)
    with rnnfast.use_engine("reference"):
        y, (h, c) = layer(x)
        expected = results(y, (h, c), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_feature_of_a_layer(kind: str) -> None:
    """Stacked, both directions, packed, lengths, reset, recompute, in one go, against the
    reference."""
    options = {"gate_activation": "hard_sigmoid"} if kind in GATED else {}
    torch.manual_seed(0)
    layer = KINDS[kind](
        4, 6, 2, bidirectional=True, activation="gelu", dtype=f64, recompute=True, **options
    )
    x = torch.randn(70, 3, 4, dtype=f64, requires_grad=True)
    lengths = torch.tensor([70, 3, 41])
    reset = torch.rand(70, 3) < 0.1
    inputs = [x, *layer.parameters()]

    def both(call: Any) -> None:
        got = call()
        with rnnfast.use_engine("reference"):
            expected = call()
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)

    def flat(y: Tensor, end: Any) -> list[Tensor]:
        return results(y, end if isinstance(end, tuple) else (end,), inputs)

    def of_packed() -> list[Tensor]:
        y, end = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return flat(pad_packed_sequence(y)[0], end)

    both(of_packed)
    both(lambda: flat(*layer(x, lengths=lengths)))
    both(lambda: flat(*layer(x, reset=reset)))


@pytest.mark.parametrize("kind", KINDS)
def test_other_derivatives(kind: str) -> None:
    options = {"gate_activation": "silu"} if kind in GATED else {}
    layer, x, _ = case(kind, hidden=3, activation="softplus", **options)
    names = list(dict(layer.named_parameters()))

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))[0]

    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, atol=1e-4)
    with torch.no_grad():
        tangent = torch.randn_like(x)
        _, got = jvp(lambda v: layer(v)[0], (x,), (tangent,))
        step = 1e-6 * tangent
        about = (layer(x + step)[0] - layer(x - step)[0]) / 2e-6
    torch.testing.assert_close(got, about, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str) -> None:
    layer, x, _ = case(kind, torch.float32, activation="elu")
    inputs = [x, *layer.parameters()]
    torch._dynamo.reset()  # each kind of layer is one more version of the same code
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for f in (layer, graph):
        y, _ = f(x)
        grads = torch.autograd.grad((y * y).sum(), inputs)
        if f is layer:
            eager = (y, *grads)
    for a, b in zip((y, *grads), eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_frozen_and_stepped(kind: str, dtype: torch.dtype) -> None:
    """All types have kernels; freeze and step use them."""
    layer, x, _ = case(kind, torch.float32, activation="silu")
    exact, _ = layer(x)
    half = copy.deepcopy(layer).to(dtype)
    y, _ = half(x.detach().to(dtype))
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    half.freeze()
    with torch.inference_mode():
        frozen, _ = half(x.detach().to(dtype))
        torch.testing.assert_close(frozen, y, rtol=0.02, atol=0.02)
        state, steps = None, []
        for x_t in x.detach().to(dtype):
            out, state = half.step(x_t, state)
            steps.append(out)
        torch.testing.assert_close(torch.stack(steps), y, rtol=0.05, atol=0.05)


def test_float32_frozen_is_the_same() -> None:
    layer, x, _ = case("LSTM", torch.float32, activation="gelu", cell_clip=1.0)
    with torch.inference_mode():
        y, _ = layer(x)
        layer.freeze()
        torch.testing.assert_close(layer(x)[0], y)
        torch.testing.assert_close(layer.step(x[0])[0], y[0])


def test_functions() -> None:
    x = torch.randn(5, 3, 4)
    for name, kind in (("lstm", "LSTM"), ("gru", "GRU"), ("rnn", "RNN"), ("indrnn", "IndRNN")):
        layer = KINDS[kind](4, 6, activation="selu")
        y, _ = getattr(functional, name)(x, None, layer.all_weights[0], activation="selu")
        torch.testing.assert_close(y, layer(x)[0], rtol=0, atol=0)
    layer = rnnfast.LSTM(4, 6, proj_size=3, cell_clip=0.1)
    y, _ = functional.lstm(x, None, layer.all_weights[0], cell_clip=0.1)
    torch.testing.assert_close(y, layer(x)[0], rtol=0, atol=0)


def test_what_torch_has_stays_the_cell_of_torch() -> None:
    """The usual choice, spelled out, runs the usual kernels."""
    assert rnnfast.LSTM(2, 3, activation="tanh", gate_activation="sigmoid")._chosen_cell is None
    assert rnnfast.RNN(2, 3, activation="relu").nonlinearity == "relu"
    assert rnnfast.RNN(2, 3, activation="relu").mode == "RNN_RELU"
    assert rnnfast.IndRNN(2, 3, activation="tanh")._chosen_cell is None
    assert rnnfast.RNN(2, 3, 1, "relu").activation == "relu"
    assert chosen_cell("GRU", "gru", "tanh") is cell_spec("gru")
    assert (
        rnnfast.RNN(2, 3, activation="gelu").state_dict().keys() == nn.RNN(2, 3).state_dict().keys()
    )


def test_codes_come_back() -> None:
    for spec in CELLS:
        assert cell_spec(spec.id) is spec
    spec = chosen_cell("LSTM", "lstm", "linear", "softsign", 2.5)
    assert cell_spec(spec.id) == spec and spec.clip == 2.5
    assert (spec.activation, spec.gate_activation) == ("linear", "softsign")


def test_life_of_a_layer() -> None:
    layer = rnnfast.LSTM(2, 3, activation="relu", cell_clip=2.0)
    assert repr(layer) == "LSTM(2, 3, activation=relu, cell_clip=2)"
    assert repr(rnnfast.RNN(2, 3, activation="gelu")) == "RNN(2, 3, activation=gelu)"
    assert "gate_activation=elu" in repr(rnnfast.GRU(2, 3, gate_activation="elu"))
    x = torch.randn(4, 1, 2)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x)[0], layer(x)[0], rtol=0, atol=0)
    lazy = rnnfast.LazyLSTM(3, activation="relu")
    lazy(x)
    assert type(lazy) is rnnfast.LSTM and lazy.activation == "relu"
    assert "lstm_any" in str(rnnfast.explain(layer, x))


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: rnnfast.LSTM(2, 3, activation="mish"), ValueError,
         r"activation of LSTM must be one of sigmoid, tanh, .*linear, got 'mish'"),
        (lambda: rnnfast.GRU(2, 3, gate_activation=None), ValueError,
         "gate_activation of GRU must be one of .* got None"),
        (lambda: rnnfast.IndRNN(2, 3, activation="Relu"), ValueError, "activation of IndRNN"),
        (lambda: rnnfast.LSTM(2, 3, cell_clip=0), ValueError, "cell_clip of LSTM must be a number"),
        (lambda: rnnfast.LSTM(2, 3, cell_clip=-1.0), ValueError, "above 0 or None, got -1.0"),
        (lambda: rnnfast.LSTM(2, 3, cell_clip=float("nan")), ValueError, "got nan"),
        (lambda: rnnfast.LSTM(2, 3, cell_clip=True), ValueError, "got True"),
        (lambda: rnnfast.RNN(2, 3, gate_activation="tanh"), TypeError, "gate_activation"),
        (lambda: rnnfast.GRU(2, 3, cell_clip=1.0), TypeError, "cell_clip"),
        (lambda: rnnfast.quantize(nn.Sequential(rnnfast.LSTM(2, 3, activation="relu"))),
         RuntimeError, r"quantize has no kernels .* LSTM\(activation=relu\); exclude it"),
        (lambda: functional.lstm(torch.ones(1, 1, 2), None, [], activation="x"), ValueError,
         "activation of lstm"),
    ],
)  # fmt: skip
def test_errors(make: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make()


def test_errors_of_the_operator() -> None:
    x, w_ih, w_hh = torch.ones(1, 1, 2), torch.ones(4, 2), torch.ones(4, 1)
    none = (None,) * 6
    for code, text in (
        (0 | 3 << 16, "cell lstm takes no options, got some"),
        (13 | 14 << 8, r"an activation must be a number in \[0, 13\], got 14"),
        (13 | 1 << 24, rf"cell must be an id in \[0, {len(CELLS)}\) and its options"),
        (13 | 0x7F800000 << 32, "the bound of c must be positive and finite"),
        (15 | 3 << 8, "cell rnn_any has no gates"),
        (14 | 0x3F800000 << 32, "cell gru_any has no c"),
        (-1, "cell must be an id"),
        (200, "cell must be an id"),
    ):
        with pytest.raises(RuntimeError, match=text):
            torch.ops.rnnfast.forward(x, None, None, w_ih, w_hh, *none, code, False, False)
