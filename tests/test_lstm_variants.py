"""LSTMs with coupled gates and with peepholes, against plain loops in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import variants
from torch import Tensor
from variants import f64, results

import rnnfast
from rnnfast import functional

COUPLED: dict[str, Any] = {"coupled": True}
PEEPHOLE: dict[str, Any] = {"peephole": True}


def plain(layer: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Any]:
    """One layer step by step, gate by gate, by slices of its attributes."""
    H = layer.hidden_size
    w, u = layer.weight_ih_l0, layer.weight_hh_l0
    b = layer.bias_ih_l0 + layer.bias_hh_l0
    p = getattr(layer, "weight_ph_l0", None)
    names = "fgo" if layer.coupled else "ifgo"
    y = []
    for x_t in x:

        def gate(name: str, seen: Tensor | None = None) -> Tensor:
            k = slice(names.index(name) * H, (names.index(name) + 1) * H)
            a = x_t @ w[k].t() + h @ u[k].t() + b[k]  # noqa: B023
            if p is not None and seen is not None:
                q = "ifo".index(name)
                a = a + p[q * H : (q + 1) * H] * seen
            return torch.tanh(a) if name == "g" else torch.sigmoid(a)

        f = gate("f", c)
        i = 1 - f if layer.coupled else gate("i", c)
        c = f * c + i * gate("g")
        if layer.cell_clip is not None:
            c = c.clamp(-layer.cell_clip, layer.cell_clip)
        h = gate("o", c) * torch.tanh(c)
        y.append(h)
    return torch.stack(y), (h, c)


@pytest.mark.parametrize("options", [COUPLED, PEEPHOLE], ids=["coupled", "peephole"])
class TestVariant:
    @pytest.mark.parametrize("hidden", [1, 19, 40])
    @pytest.mark.parametrize("clip", [None, 0.25])
    def test_as_the_equations_say(self, options: Any, hidden: int, clip: float | None) -> None:
        torch.manual_seed(3)
        layer = rnnfast.LSTM(4, hidden, dtype=f64, cell_clip=clip, **options)
        x = torch.randn(5, 3, 4, dtype=f64, requires_grad=True)
        h, c = (torch.randn(3, hidden, dtype=f64, requires_grad=True) for _ in range(2))
        inputs = [x, h, c, *layer.parameters()]
        y, end = layer(x, (h.unsqueeze(0), c.unsqueeze(0)))
        got = results(y, [e.squeeze(0) for e in end], inputs)
        for a, b in zip(got, results(*plain(layer, x, h, c), inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("proj_size", [0, 3])
    def test_every_sequence(self, options: Any, bias: bool, proj_size: int) -> None:
        torch.manual_seed(0)
        layer = rnnfast.LSTM(
            4, 6, 2, bias, bidirectional=True, proj_size=proj_size, activation="gelu", dtype=f64,
            recompute=bias, **options,
        )  # fmt: skip
        variants.check_every_sequence(layer, 4)

    def test_derivatives(self, options: Any) -> None:
        torch.manual_seed(0)
        layer = rnnfast.LSTM(2, 3, dtype=f64, **options)
        x = torch.randn(4, 2, 2, dtype=f64, requires_grad=True)
        variants.check_derivatives(layer, x)
        variants.check_per_sample_gradients(layer, x)

    def test_ways_to_run(self, options: Any) -> None:
        torch.manual_seed(0)
        layer = rnnfast.LSTM(5, 35, **options)
        x = torch.randn(6, 7, 5, requires_grad=True)
        variants.check_threads(layer, x)
        variants.check_compiled(layer, x)
        variants.check_sixteen_bits(layer, x)
        variants.check_frozen_and_stepped(layer, x)

    def test_function(self, options: Any) -> None:
        x = torch.randn(5, 3, 4)
        for bias in (True, False):
            layer = rnnfast.LSTM(4, 6, 2, bias, proj_size=3, **options)
            weights = [w for names in layer.all_weights for w in names]
            y, _ = functional.lstm(x, None, weights, num_layers=2, bias=bias, **options)
            torch.testing.assert_close(y, layer(x)[0], rtol=0, atol=0)

    def test_loads_its_own_state(self, options: Any) -> None:
        a, b = rnnfast.LSTM(4, 6, **options), rnnfast.LSTM(4, 6, **options)
        b.load_state_dict(a.state_dict())
        x = torch.randn(5, 3, 4)
        torch.testing.assert_close(a(x)[0], b(x)[0], rtol=0, atol=0)
        assert repr(a) == repr(b) and f"{next(iter(options))}=True" in repr(a)

    def test_other_engines_say_no(self, options: Any) -> None:
        layer = rnnfast.LSTM(4, 6, **options).eval()
        with pytest.raises(RuntimeError, match="no kernels for the cell of LSTM"):
            rnnfast.quantize(layer)
        text = str(rnnfast.explain(layer, torch.randn(5, 3, 4)))
        assert next(iter(options)) in text


@pytest.mark.parametrize("option", ["coupled", "peephole"])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_flags_are_bools(option: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{option} of LSTM must be a bool"):
        rnnfast.LSTM(3, 4, **{option: value})


def test_coupled_has_three_gates() -> None:
    layer = rnnfast.LSTM(4, 6, coupled=True, forget_bias=1.5)
    assert layer.weight_ih_l0.shape == (18, 4) and layer.weight_hh_l0.shape == (18, 6)
    assert (layer.bias_ih_l0[:6] == 1.5).all() and (layer.bias_hh_l0[:6] == 0).all()
    assert not (layer.bias_ih_l0[6:12] == 1.5).any()


def test_no_coupled_peepholes() -> None:
    with pytest.raises(ValueError, match="coupled and peephole of LSTM can't be combined"):
        rnnfast.LSTM(3, 4, coupled=True, peephole=True)


def test_peepholes_are_parameters() -> None:
    layer = rnnfast.LSTM(4, 6, 2, bidirectional=True, peephole=True)
    found = [name for name, _ in layer.named_parameters() if "ph" in name]
    assert found == [f"weight_ph_l{k}{end}" for k in (0, 1) for end in ("", "_reverse")]
    assert layer.weight_ph_l0.shape == (18,)
