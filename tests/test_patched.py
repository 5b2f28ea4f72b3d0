"""rnnfast.patched: other people's code builds torch.nn's layers, and gets ours."""

from __future__ import annotations

import importlib
import io
import pickle
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import works
from torch import Tensor, nn

import rnnfast

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
PLACES = (torch.nn, torch.nn.modules, torch.nn.modules.rnn)
PLAIN = {name: getattr(nn, name) for name in NAMES}


def is_torchs() -> bool:
    return all(getattr(place, name) is PLAIN[name] for place in PLACES for name in NAMES)


LIBRARY = '''
"""A sequence to sequence library, as others write it."""
import torch
from torch import nn
from torch.nn import GRUCell
from torch.nn.modules.rnn import RNN


class VariationalLSTM(nn.LSTM):
    """Derived from torch.nn's, with one mask for all steps."""

    def __init__(self, *args, keep=0.9, **kwargs):
        super().__init__(*args, **kwargs)
        self.keep = keep

    def forward(self, input, hx=None):
        if self.training:
            mask = torch.empty_like(input[:1]).bernoulli_(self.keep) / self.keep
            input = input * mask
        self.check_forward_args(input, hx, None) if hx is not None else None
        return super().forward(input, hx)


class Encoder(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.rnn = VariationalLSTM(size, size, num_layers=2, bidirectional=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
        output, (h, c) = self.rnn(packed) if not self.training else self.rnn(x)
        if not self.training:
            output, _ = nn.utils.rnn.pad_packed_sequence(output)
        return output, h[:1] + h[1:2]


class Decoder(nn.Module):
    def __init__(self, size):
        super().__init__()
        kinds = {"gru": nn.GRU, "rnn": RNN}
        self.layers = nn.ModuleDict({k: kind(size, size) for k, kind in kinds.items()})
        self.cells = nn.ModuleList([GRUCell(size, size), torch.nn.LSTMCell(size, size)])

    def forward(self, x, state):
        for layer in self.layers.values():
            assert isinstance(layer, nn.RNNBase)
            x, _ = layer(x, state)
        h = self.cells[0](x[-1], state[0])
        return self.cells[1](h, (h, h))[0]


class Seq2Seq(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.encoder, self.decoder = Encoder(size), Decoder(size)

    def forward(self, x, lengths):
        output, state = self.encoder(x, lengths)
        return self.decoder(output[..., : x.size(-1)], state)
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of somebody else's that was not imported yet."""
    (tmp_path / "others_seq2seq.py").write_text(LIBRARY, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "others_seq2seq", raising=False)
    return "others_seq2seq"


def rnns(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))]


def test_a_model_of_somebody_else(library: str) -> None:
    with rnnfast.patched():
        theirs = importlib.import_module(library)
        model = theirs.Seq2Seq(8)
        assert isinstance(model.encoder.rnn, nn.LSTM)
    assert is_torchs() and not isinstance(model.encoder.rnn, nn.LSTM)
    assert [type(m).__module__.split(".")[0] for m in rnns(model)] == [library] + ["rnnfast"] * 4
    assert isinstance(model.encoder.rnn, rnnfast.LSTM)
    del sys.modules[library]
    plain = importlib.import_module(library).Seq2Seq(8)
    plain.load_state_dict(model.state_dict())
    assert isinstance(plain.encoder.rnn, nn.LSTM)
    x, lengths = torch.randn(6, 3, 8), torch.tensor([6, 4, 1])
    for training in (False, True):
        outcomes = []
        for one in (model, plain):
            one.train(training)
            one.zero_grad()
            torch.manual_seed(3)
            y = one(x, lengths)
            y.square().sum().backward()
            outcomes.append([y.detach(), *(p.grad for p in one.parameters())])
        for a, b in zip(*outcomes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@works.row(
    "accelerate and patched",
    "`with rnnfast.patched():` code that builds or derives from `torch.nn.LSTM`, `GRU`, `RNN` and "
    "the cells gets rnnfast's",
    torch_nn="has none",
    error="AttributeError.*patched",
)
def test_layers_built_within(library: Any, device: torch.device) -> None:
    with library.patched():

        class Mine(nn.LSTM):
            def forward(self, input: Tensor, hx: Any = None) -> Any:
                return super().forward(2 * input, hx)

        layers = [kind(5, 9, device=device) for kind in (nn.LSTM, nn.modules.GRU, nn.RNN, Mine)]
        cells = [getattr(nn, name)(5, 9, device=device) for name in NAMES[3:]]
        twin = pickle.loads(pickle.dumps(nn.ModuleList(layers[:3])))
    assert is_torchs()
    for one, kind in zip([*layers, *cells], [*NAMES[:3], "LSTM", *NAMES[3:]], strict=True):
        assert isinstance(one, getattr(library, kind)) and not isinstance(one, PLAIN[kind])
    assert [type(m) for m in twin] == [type(m) for m in layers[:3]]
    x = torch.randn(3, 2, 5, device=device)
    plain = nn.LSTM(5, 9, device=device)
    plain.load_state_dict(layers[3].state_dict())
    torch.testing.assert_close(layers[3](x)[0], plain(2 * x)[0], rtol=1e-4, atol=1e-5)


def test_names_are_back_after_an_exception_and_nesting() -> None:
    with pytest.raises(KeyError), rnnfast.patched():
        raise KeyError
    assert is_torchs()
    with rnnfast.patched():
        with pytest.raises(KeyError), rnnfast.patched():
            raise KeyError
        assert nn.LSTM is rnnfast.LSTM and torch.nn.modules.rnn.GRUCell is rnnfast.GRUCell
    assert is_torchs()

    @rnnfast.patched()
    def build() -> nn.Module:
        return nn.GRU(5, 9)

    for _ in range(2):
        assert type(build()) is rnnfast.GRU and is_torchs()


def test_contexts_overlap_in_threads() -> None:
    """Whichever is left last puts torch's names back, in whatever order they were entered."""
    entered, leave = threading.Event(), threading.Event()
    seen: list[bool] = []

    def other() -> None:
        with rnnfast.patched():
            entered.set()
            leave.wait(30)
            seen.append(nn.LSTM is rnnfast.LSTM)

    thread = threading.Thread(target=other)
    with rnnfast.patched():
        thread.start()
        assert entered.wait(30)
    seen.append(nn.LSTM is rnnfast.LSTM)  # the other one is still inside
    leave.set()
    thread.join(30)
    assert seen == [True, True] and is_torchs()


def test_what_somebody_else_had_bound_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(nn.LSTM):
        pass

    monkeypatch.setattr(nn, "LSTM", Theirs)
    with rnnfast.patched():
        assert nn.LSTM is rnnfast.LSTM
    assert nn.LSTM is Theirs and torch.nn.modules.rnn.LSTM is PLAIN["LSTM"]


def test_names_bound_before_are_out_of_reach() -> None:
    """As the docstring says."""
    early = types.SimpleNamespace(LSTM=nn.LSTM)

    class Early(nn.GRU):
        pass

    with rnnfast.patched():
        assert type(early.LSTM(5, 9)) is PLAIN["LSTM"]
        assert isinstance(Early(5, 9), PLAIN["GRU"]) and not isinstance(Early(5, 9), nn.GRU)
        y, _ = Early(5, 9)(torch.randn(3, 2, 5))
        assert y.shape == (3, 2, 9)
        with pytest.raises(pickle.PicklingError, match="LSTM"):
            pickle.dumps(early.LSTM(5, 9))
    pickle.dumps(early.LSTM(5, 9))


def test_whole_models_saved_by_torch_load_as_ours() -> None:
    file = io.BytesIO()
    plain = nn.Sequential(nn.GRU(5, 9, 2))
    torch.save(plain, file)
    file.seek(0)
    with rnnfast.patched():
        model = torch.load(file, weights_only=False)
    assert type(model[0]) is rnnfast.GRU
    x = torch.randn(4, 2, 5)
    torch.testing.assert_close(model(x)[0], plain(x)[0], rtol=1e-5, atol=1e-6)
    model(x)[0].sum().backward()
    for a, b in zip(pickle.loads(pickle.dumps(model)).parameters(), plain.parameters()):
        assert torch.equal(a, b)


def test_accelerate_restore_and_explain_within() -> None:
    """They mean torch's own classes, whatever the names say."""
    plain = nn.Sequential(nn.LSTM(5, 9))
    with rnnfast.patched():
        assert "torch.nn" in str(rnnfast.explain(plain))
        rnnfast.accelerate(plain)
        assert type(plain[0]) is rnnfast.LSTM
        rnnfast.restore(plain)
        assert type(plain[0]) is PLAIN["LSTM"]
        built = rnnfast.accelerate(nn.Sequential(nn.LSTM(5, 9)))
        rnnfast.restore(built)
    assert type(built[0]) is rnnfast.LSTM
