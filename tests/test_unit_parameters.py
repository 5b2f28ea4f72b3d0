"""Parameters of units (peepholes, gains of layer normalisation) ride behind b_hh in an operator:
each is looked at before, since their sum alone would hide that two are exchanged. And what else
a layer looks at before it makes a cell of its options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rnnfast

F = rnnfast.functional
IN, H = 3, 4
KINDS: dict[str, tuple[Any, Any, dict[str, bool]]] = {
    "peephole": (rnnfast.LSTM, F.lstm, {"peephole": True}),
    "LSTM norm": (rnnfast.LSTM, F.lstm, {"layer_norm": True}),
    "GRU norm": (rnnfast.GRU, F.gru, {"layer_norm": True}),
    "RNN norm": (rnnfast.RNN, F.rnn, {"layer_norm": True}),
}
# Of each: the tensors of a pass that are replaced by some of these lengths, and what is said.
WRONG = [
    ("peephole", {3: 3 * H, 4: 4 * H}, r"b_hh must have shape \(G\*H,\) = \(16,\), got \(12,\)"),
    ("peephole", {4: 2 * H}, r"weight_ph must have shape \(3\*H,\) = \(12,\), got \(8,\)"),
    ("LSTM norm", {4: H, 5: H, 6: 4 * H, 7: 4 * H}, r"norm_ih must have shape \(4\*H,\) = \(16,\)"),
    ("LSTM norm", {4: 2 * H, 5: 6 * H}, r"norm_ih must have shape \(4\*H,\) = \(16,\), got \(8,\)"),
    ("LSTM norm", {6: H - 1, 7: H + 1}, r"norm_c must have shape \(H,\) = \(4,\), got \(3,\)"),
    ("GRU norm", {3: 2 * H, 4: 4 * H}, r"b_hh must have shape \(G\*H,\) = \(12,\), got \(8,\)"),
    ("RNN norm", {4: 2 * H, 5: 0}, r"norm_ih must have shape \(H,\) = \(4,\), got \(8,\)"),
]


@pytest.mark.parametrize(("kind", "sizes", "sentence"), WRONG)
def test_each_is_looked_at(kind: str, sizes: dict[int, int], sentence: str) -> None:
    layer_class, function, options = KINDS[kind]
    layer, x = layer_class(IN, H, **options), torch.randn(5, 2, IN)
    weights = list(layer.all_weights[0])
    right = function(x, None, weights, **options)[0]
    torch.testing.assert_close(right, layer(x)[0])
    assert sum(sizes.values()) == sum(weights[k].numel() for k in sizes) or len(sizes) == 1
    for k, size in sizes.items():
        weights[k] = torch.ones(size)
        setattr(layer, layer._all_weights[0][k], nn.Parameter(torch.ones(size)))
    for call in (lambda: function(x, None, weights, **options), lambda: layer(x)):
        with pytest.raises(RuntimeError, match=sentence):
            call()


def test_their_types_and_dimensions() -> None:
    layer, x = rnnfast.LSTM(IN, H, peephole=True), torch.randn(5, 2, IN)
    weights = list(layer.all_weights[0])
    with pytest.raises(RuntimeError, match="weight_ph must have the dtype of b_hh, float32, got"):
        F.lstm(x, None, [*weights[:4], weights[4].double()], peephole=True)
    with pytest.raises(RuntimeError, match=r"weight_ph must have shape \(3\*H,\) = \(12,\), got"):
        F.lstm(x, None, [*weights[:4], weights[4].view(3, H)], peephole=True)


@pytest.mark.parametrize("before", [0.0, 0.3])
def test_a_frozen_layer_has_the_cell_that_it_was_frozen_with(before: float) -> None:
    layer, x = rnnfast.LSTM(IN, H, zoneout=before).eval(), torch.randn(5, 2, IN)
    with torch.no_grad():
        want = layer.freeze()(x)[0]
        other = copy.deepcopy(layer).unfreeze()
        other.zoneout = layer.zoneout = 0.3 - before
        for call in (lambda: layer(x), lambda: layer.step(x[0])):
            with pytest.raises(RuntimeError, match=r"was frozen with the cell lstm.*freeze\(\) ag"):
                call()
        torch.testing.assert_close(layer.freeze()(x)[0], other(x)[0])
        layer.zoneout = before
        torch.testing.assert_close(layer.unfreeze()(x)[0], want)


NO_FORM: list[tuple[Any, dict[str, Any], str]] = [
    (rnnfast.LSTM, {"layer_norm": True, "recurrent_dropout": 0.2}, "layer_norm=True"),
    (rnnfast.GRU, {"reset_after": False, "recurrent_dropout": 0.2}, "reset_after=False"),
    (rnnfast.LSTM, {"layer_norm": True, "zoneout": 0.2}, "layer_norm=True"),
    (rnnfast.LSTM, {"coupled": True, "zoneout": 0.2}, "coupled=True"),
    (rnnfast.LSTM, {"peephole": True, "zoneout": 0.2}, "peephole=True"),
    (rnnfast.GRU, {"reset_after": False, "zoneout": 0.2}, "reset_after=False"),
    (rnnfast.RNN, {"layer_norm": True, "zoneout": 0.2}, "layer_norm=True"),
]


@pytest.mark.parametrize(("kind", "options", "other"), NO_FORM)
def test_regularisers_that_a_cell_has_no_form_with(kind: Any, options: Any, other: str) -> None:
    option = list(options)[1]
    sentence = f"{option} of {kind.__name__} has no form with {other}, got {option}="
    with pytest.raises(ValueError, match=sentence):
        kind(IN, H, **options)


def test_quantize_swaps_all_or_none() -> None:
    model = nn.Sequential(rnnfast.LSTM(IN, H), rnnfast.LSTM(H, H, layer_norm=True)).eval()
    with pytest.raises(RuntimeError, match=r"no kernels .* LSTM\(layer_norm=True\); exclude it"):
        rnnfast.quantize(model)
    assert type(model[0]) is rnnfast.LSTM
    assert type(rnnfast.quantize(model, exclude=["1"])[0]) is rnnfast.QuantizedLSTM


def test_rows_of_heads() -> None:
    x = torch.randn(5, 2, IN)
    for rows in (0, 9, 12):
        weights = [
            torch.zeros(rows, IN),
            torch.zeros(rows, 1),
            torch.zeros(rows),
            torch.zeros(rows),
        ]
        with pytest.raises((RuntimeError, ValueError), match="num_heads"):
            F.lstm(x, None, weights, num_heads=2)
