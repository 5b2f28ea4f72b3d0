"""Layers that take their input_size from the first input."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import works
from test_module_life import SECTION, run, same, train
from torch import nn

import rnnfast


def has_none(library: Any, device: torch.device) -> None:
    assert not any(hasattr(library, f"Lazy{kind}") for kind in ("LSTM", "GRU", "RNN", "IndRNN"))


@works.row(
    SECTION,
    "`LazyLSTM`, `LazyGRU`, `LazyRNN`, `LazyIndRNN`: `input_size` from the first input",
    torch_nn="has none",
    theirs=has_none,
)
def test_lazy_layers(library: Any, device: torch.device) -> None:
    for name in ("LSTM", "GRU", "RNN", "IndRNN"):
        layer = getattr(library, f"Lazy{name}")(9, num_layers=2, bidirectional=True, device=device)
        kind = getattr(library, name)
        assert isinstance(layer, kind) and layer.has_uninitialized_params()
        real = kind(5, 9, num_layers=2, bidirectional=True, device=device)
        names = [name for name, _ in real.named_parameters()]
        assert [name for name, _ in layer.named_parameters()] == names
        kept = layer.weight_hh_l0.detach().clone()
        copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        x = torch.randn(4, 3, 5, device=device)
        layer(x)
        assert type(layer) is kind and layer.input_size == 5
        assert 0.3 < layer.weight_ih_l0_reverse.abs().max() < 1 / 3 + 1e-6  # 1 / sqrt(H)
        assert torch.equal(layer.weight_hh_l0, kept)
        train(layer, x)
        for twin in copies:
            assert torch.equal(twin.weight_hh_l0, kept)
            twin.load_state_dict(layer.state_dict())  # brings the size, too
            assert same(run(twin, x), run(layer, x)) and twin.input_size == 5
            assert type(twin) is kind


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "IndRNN"])
def test_more_of_lazy_layers(kind: str) -> None:
    lazy, x = getattr(rnnfast, f"Lazy{kind}"), torch.randn(6, 5)
    assert "input_size" not in repr(lazy(9)) and repr(lazy(9)).startswith(f"Lazy{kind}(0, 9")
    packed = nn.utils.rnn.pack_sequence([x, x[:3]])
    for call in (lambda m: m(packed), lambda m: m(x), lambda m: m(input=x)):
        layer = lazy(9).double().float()
        call(layer)
        assert repr(layer) == repr(getattr(rnnfast, kind)(5, 9))
    options: Any = {"batch_first": True, "dtype": torch.float64, "bias": False}
    if kind == "LSTM":
        options["proj_size"] = 4
    layer = lazy(9, 2, **options)
    layer(torch.randn(3, 6, 5, dtype=torch.float64))
    assert layer.weight_ih_l0.dtype == torch.float64 and layer.num_layers == 2
    with pytest.raises(RuntimeError, match="input_size"):
        layer(torch.randn(3, 6, 4, dtype=torch.float64))
    with pytest.raises((RuntimeError, ValueError), match="uninitialized"):
        lazy(9).freeze()
    with pytest.raises((RuntimeError, ValueError), match="uninitialized"):
        torch.optim.SGD(lazy(9).parameters(), lr=0.1).param_groups[0]["params"][0].sum()
