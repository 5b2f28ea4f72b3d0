"""rnnfast.accelerate: the swap in place and everything it has to leave as it was."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from typing import Any

import pytest
import tolerance
import torch
from torch import Tensor, nn

import rnnfast


class Tagger(nn.Module):
    """Every recurrent class of torch.nn in one model, one of them used twice, one nested."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.lstm = nn.LSTM(5, 9, num_layers=2, bidirectional=True, batch_first=True)
        self.inner = nn.ModuleDict({"gru": nn.GRU(18, 9), "list": nn.ModuleList([nn.RNN(9, 9)])})
        self.again = self.inner["gru"]
        self.lstm_cell, self.gru_cell = nn.LSTMCell(9, 9), nn.GRUCell(9, 9)
        self.rnn_cell = nn.RNNCell(9, 9, nonlinearity="relu")
        self.head = nn.Linear(9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.embed(tokens))
        x, _ = self.inner["gru"](x.transpose(0, 1))
        x, _ = self.inner["list"][0](x)
        h, _ = self.lstm_cell(x[-1])
        return self.head(self.rnn_cell(self.gru_cell(h)))


SWAPPED = {
    "lstm": "LSTM",
    "inner.gru": "GRU",
    "inner.list.0": "RNN",
    "lstm_cell": "LSTMCell",
    "gru_cell": "GRUCell",
    "rnn_cell": "RNNCell",
}


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 11, (4, 7))


def test_swaps_every_recurrent_module(tokens: Tensor) -> None:
    model = Tagger()
    want = model(tokens)
    want.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert rnnfast.accelerate(model) is model
    for path, name in SWAPPED.items():
        assert type(model.get_submodule(path)) is getattr(rnnfast, name)
    assert model.again is model.inner["gru"]
    assert type(model.embed) is nn.Embedding and type(model.head) is nn.Linear
    got = model(tokens)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got.sum().backward()
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_the_swapped_layers_really_run() -> None:
    model = rnnfast.accelerate(nn.Sequential(nn.LSTM(5, 9)))
    before = torch.ops.rnnfast.last_run(5)
    model(torch.randn(3, 2, 5))
    assert torch.ops.rnnfast.last_run(5) == before + 1
    rnnfast.restore(model)
    model(torch.randn(3, 2, 5))
    assert torch.ops.rnnfast.last_run(5) == before + 1


def test_parameters_are_the_same_objects_and_optimizers_stay_valid(tokens: Tensor) -> None:
    models = [Tagger(), None]
    models[1] = copy.deepcopy(models[0])
    losses = []
    for k, model in enumerate(models):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        names = {name: id(p) for name, p in model.named_parameters()}
        mine = []
        for step in range(6):
            if k == 1 and step == 3:
                rnnfast.accelerate(model)  # in the middle of training
            optimizer.zero_grad()
            loss = model(tokens).square().mean()
            loss.backward()
            optimizer.step()
            mine.append(float(loss.detach()))
        assert {name: id(p) for name, p in model.named_parameters()} == names
        losses.append(mine)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_state_dict_is_unchanged() -> None:
    model = Tagger()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rnnfast.accelerate(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(tolerance.same_bits(after[k], before[k]) for k in before)
    Tagger().load_state_dict(after)
    model.load_state_dict(Tagger().state_dict())


def test_restore_undoes_it(tokens: Tensor) -> None:
    model = Tagger()
    want = model(tokens)
    types = {name: type(m) for name, m in model.named_modules()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    rnnfast.accelerate(model)
    assert rnnfast.restore(model) is model
    assert {name: type(m) for name, m in model.named_modules()} == types
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert tolerance.same_bits(model(tokens).detach(), want.detach())


def test_restore_after_copying(tokens: Tensor) -> None:
    model = rnnfast.accelerate(Tagger())
    want = model(tokens)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.lstm) is rnnfast.LSTM
        assert tolerance.same_bits(twin(tokens).detach(), want.detach())
        rnnfast.restore(twin)
        assert type(twin.lstm) is nn.LSTM
        torch.testing.assert_close(twin(tokens), want, rtol=1e-5, atol=1e-6)


def test_twice_is_once() -> None:
    model = rnnfast.accelerate(rnnfast.accelerate(Tagger()))
    rnnfast.restore(model)
    assert type(model.lstm) is nn.LSTM
    rnnfast.restore(model)
    assert type(model.lstm) is nn.LSTM


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_a_model_that_is_itself_a_layer(name: str) -> None:
    layer = getattr(nn, name)(5, 9)
    assert rnnfast.accelerate(layer) is layer
    assert type(layer) is getattr(rnnfast, name)
    assert type(rnnfast.restore(layer)) is getattr(nn, name)


def test_training_flags_hooks_and_options_are_kept() -> None:
    model = nn.Sequential(nn.LSTM(5, 9, num_layers=2, dropout=0.5, batch_first=True))
    model[0].eval()
    calls: list[str] = []
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    model[0].weight_hh_l0.register_hook(lambda g: calls.append("gradient"))
    model[0].note = "mine"
    model[0].weight_ih_l1.requires_grad_(False)
    rnnfast.accelerate(model)
    layer = model[0]
    assert not layer.training and model.training
    assert (layer.note, layer.dropout, layer.batch_first, layer.num_layers) == (
        "mine",
        0.5,
        True,
        2,
    )
    layer(torch.randn(2, 3, 5, requires_grad=True))[0].sum().backward()
    assert sorted(calls) == ["after", "backward", "before", "gradient"]
    assert layer.weight_ih_l1.grad is None and layer.weight_hh_l1.grad is not None


def test_tied_weights_stay_tied() -> None:
    model = nn.ModuleList([nn.LSTM(9, 9), nn.LSTM(9, 9), nn.Linear(9, 36)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    model[0].weight_ih_l0 = model[2].weight
    rnnfast.accelerate(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    assert model[0].weight_ih_l0 is model[2].weight
    x = torch.randn(3, 2, 9)
    first = model[1](x)[0]
    with torch.no_grad():
        model[0].weight_hh_l0.mul_(3)
    assert not torch.equal(model[1](x)[0], first)


class MyLSTM(nn.LSTM):
    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return super().forward(*args, **kwargs)


def test_subclasses_and_parametrized_layers_are_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever changed the class may have changed what it means; the log says so."""
    model = nn.ModuleDict({"mine": MyLSTM(5, 9), "plain": nn.LSTM(5, 9), "normed": nn.GRU(5, 9)})
    nn.utils.parametrizations.weight_norm(model["normed"], "weight_hh_l0")
    normed = type(model["normed"])
    with caplog.at_level(logging.INFO, logger="rnnfast"):
        rnnfast.accelerate(model)
    assert type(model["mine"]) is MyLSTM and type(model["normed"]) is normed
    assert type(model["plain"]) is rnnfast.LSTM
    assert {record.name.split(".")[0] for record in caplog.records} == {"rnnfast"}
    text = caplog.text
    assert "plain" in text and "mine" in text and "MyLSTM" in text and "normed" in text


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    model = rnnfast.accelerate(Tagger())
    model(torch.zeros(2, 3, dtype=torch.int64))
    rnnfast.restore(model)
    assert capfd.readouterr().out == ""


def flatten(module: nn.Module) -> Tensor:
    """All parameters become views of one buffer, in the order of parameters()."""
    total = sum(p.numel() for p in module.parameters())
    buffer, start = torch.empty(total), 0
    for p in module.parameters():
        view = buffer[start : start + p.numel()].view_as(p)
        view.copy_(p.detach())
        p.data = view
        start += p.numel()
    return buffer


def flatten_as_cudnn(layer: nn.RNNBase) -> None:
    """What flatten_parameters() leaves behind on a GPU: one buffer that only the parameters hold,
    matrices before biases, each part at an aligned place."""
    parts = sorted(layer.parameters(), key=lambda p: -p.dim())
    places, end = [], 0
    for p in parts:
        places.append(end)
        end += (p.numel() + 31) // 32 * 32
    buffer = torch.empty(end)
    for p, start in zip(parts, places, strict=True):
        p.data = buffer[start : start + p.numel()].view_as(p).copy_(p.detach())


@pytest.mark.parametrize("how", [flatten, flatten_as_cudnn, "pickled"])
def test_flattened_parameters_get_storage_of_their_own(how: Any) -> None:
    layer = nn.LSTM(5, 9, num_layers=2)
    x = torch.randn(3, 2, 5)
    want = layer(x)[0]
    if how == "pickled":
        flatten_as_cudnn(layer)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        layer = torch.load(file, weights_only=False)
        assert len({p.untyped_storage().data_ptr() for p in layer.parameters()}) == 1
    else:
        how(layer)
    objects = {name: (id(p), p.detach().clone()) for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    rnnfast.accelerate(nn.Sequential(layer))
    for name, p in layer.named_parameters():
        assert id(p) == objects[name][0]
        assert tolerance.same_bits(p.detach(), objects[name][1])
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
        assert p.storage_offset() == 0 and p.requires_grad and p.is_leaf
    y = layer(x)[0]
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
    y.sum().backward()
    optimizer.step()
    assert not torch.equal(layer(x)[0], y)


def test_a_flat_buffer_that_somebody_holds_stays_whole() -> None:
    """An optimizer over one flat buffer goes on training the layers in it."""
    models = [
        nn.LSTM(5, 9),  # alone it fills the buffer as cuDNN's would
        nn.ModuleList([nn.LSTM(5, 9, 2), nn.GRU(9, 9), nn.LSTMCell(5, 9)]),
        nn.Sequential(nn.Linear(3, 3), nn.GRU(5, 9)),
    ]
    for model in models:
        buffer = flatten(model)
        rnnfast.accelerate(model)
        buffer.fill_(0.5)
        assert all((p == 0.5).all() for p in model.parameters())


def test_views_of_what_is_not_their_own_buffer_stay_views() -> None:
    layers = nn.ModuleList([nn.GRU(5, 9), nn.GRU(5, 9)])
    flatten(layers)  # nobody else holds it, but it is not one layer's
    wide = nn.Parameter(torch.randn(27, 10)[:, :5])
    layers[1].weight_ih_l0 = wide
    pointers = [p.data_ptr() for p in layers.parameters()]
    rnnfast.accelerate(layers)
    assert [p.data_ptr() for p in layers.parameters()] == pointers


def test_other_packages_are_not_taken_for_rnnfast(caplog: pytest.LogCaptureFixture) -> None:
    class Mine(rnnfast.LSTM):
        pass

    foreign = type("FastLSTM", (nn.LSTM,), {"__module__": "rnnfast_ext.layers"})
    model = nn.ModuleDict({"foreign": foreign(5, 9), "mine": Mine(5, 9)})
    with caplog.at_level(logging.INFO, logger="rnnfast"):
        rnnfast.accelerate(model)
    said = {r.getMessage().split()[1]: r.getMessage() for r in caplog.records}
    assert "its class FastLSTM is derived from torch.nn's" in said["foreign"]
    assert "one of rnnfast's already" in said["mine"]


def test_parameters_of_their_own_keep_their_memory() -> None:
    layer = nn.GRU(5, 9)
    pointers = [p.data_ptr() for p in layer.parameters()]
    rnnfast.accelerate(layer)
    assert [p.data_ptr() for p in layer.parameters()] == pointers


def test_a_model_without_recurrent_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    assert rnnfast.accelerate(model) is model


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises((TypeError, RuntimeError), match="rnnfast"):
        rnnfast.accelerate(3)  # type: ignore[arg-type]
