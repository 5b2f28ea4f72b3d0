"""weight_dropout, input_dropout and forget_bias: whose masks, drawn when, and what else changes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from test_modules import leaves_of
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast import functional

f64 = torch.float64
T, B = 6, 4
LAYERS: dict[str, Any] = {
    "LSTM": lambda **o: rnnfast.LSTM(5, 9, 2, bidirectional=True, proj_size=4, dtype=f64, **o),
    "GRU": lambda **o: rnnfast.GRU(5, 9, 2, dtype=f64, **o),
    "RNN": lambda **o: rnnfast.RNN(5, 9, bidirectional=True, bias=False, dtype=f64, **o),
    "IndRNN": lambda **o: rnnfast.IndRNN(5, 9, 2, dtype=f64, **o),
}


def seeded(call: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return call(*args, **kwargs)


def results(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Outputs and all gradients."""
    out = leaves_of(seeded(layer, x, *args, **kwargs))
    loss = sum((k + 1) * o.square().sum() for k, o in enumerate(out))
    return [*out, *torch.autograd.grad(loss, [x, *layer.parameters()])]


def same(got: list[Tensor], want: list[Tensor], exact: bool = False) -> None:
    for a, b in zip(got, want, strict=True):
        rtol, atol = (0.0, 0.0) if exact else (1e-9, 1e-11)
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def dropped_by_hand(layer: Any, p: float) -> Any:
    """A plain copy with the masks of this seed on its recurrent weights."""
    twin = copy.deepcopy(layer)
    twin.weight_dropout = 0.0
    with torch.no_grad():
        torch.manual_seed(7)
        for name, w in twin.named_parameters():
            if name.startswith("weight_hh"):
                w.copy_(torch.dropout(w, p, True))
    return twin


@pytest.mark.parametrize("name", LAYERS)
def test_dropped_weights_are_those_of_the_seed(name: str) -> None:
    """Forward is that of the dropped weights, and so are gradients, times each mask."""
    p = 0.5
    layer = LAYERS[name](weight_dropout=p)
    twin, x = dropped_by_hand(layer, p), torch.randn(T, B, 5, dtype=f64, requires_grad=True)
    got, want = results(layer, x), results(twin, x)
    count = len(got) - len(list(layer.parameters()))
    for k, (key, w) in enumerate(twin.named_parameters()):
        if key.startswith("weight_hh"):
            want[count + k] = want[count + k] * (w != 0) / (1 - p)
            assert 0.2 < (w == 0).double().mean() < 0.8
    same(got, want)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    plain = copy.deepcopy(layer)
    plain.weight_dropout = 0.0
    same(leaves_of(layer(x)), leaves_of(plain(x)), exact=True)


def test_the_expectation_is_the_layer_itself() -> None:
    """Over all masks, each with its probability, of a recurrence that is linear in the mask: IndRNN
    in the linear part of relu, after two steps."""
    p = 0.25
    layer = rnnfast.IndRNN(3, 2, weight_dropout=p, dtype=f64)
    with torch.no_grad():
        for w in layer.parameters():
            w.abs_()
    x = torch.rand(2, 1, 3, dtype=f64)
    plain = copy.deepcopy(layer).eval()(x)[0][1, 0]
    found: dict[tuple[bool, ...], Tensor] = {}
    while len(found) < 4:
        y = layer(x)[0]
        kept = tuple(bool(v) for v in (y[1, 0] > layer.eval()(x[1:])[0][0, 0] + 1e-12))
        layer.train()
        found[kept] = y[1, 0]
    mean = sum((1 - p) ** sum(k) * p ** (2 - sum(k)) * y for k, y in found.items())
    torch.testing.assert_close(mean, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LAYERS)
def test_input_masks_hold_for_a_sequence(name: str) -> None:
    """As torch.dropout on one step, at all steps: of x, and of what each layer hands on."""
    p = 0.4
    layer = LAYERS[name](input_dropout=p)
    x = torch.randn(T, B, 5, dtype=f64, requires_grad=True)
    got = results(layer, x)
    each = len(layer._flat_weights_names) // layer.num_layers

    def by_hand(x: Tensor) -> Any:
        ends = []
        for k in range(layer.num_layers):
            mask = torch.dropout(x.new_ones(B, x.size(-1)), p, True)
            weights = layer._weights()[k * each : (k + 1) * each]
            kind = "indrnn_relu" if name == "IndRNN" else "rnn_tanh" if name == "RNN" else name
            x, end = getattr(functional, kind.lower())(
                x * mask, None, weights, bias=layer.bias, bidirectional=layer.bidirectional
            )
            ends.append(leaves_of(end))
        return [x, *(torch.cat(parts) for parts in zip(*ends))]

    out = seeded(by_hand, x)
    loss = sum((k + 1) * o.square().sum() for k, o in enumerate(out))
    same(got, [*out, *torch.autograd.grad(loss, [x, *layer.parameters()])])
    layer.eval()
    plain = copy.deepcopy(layer)
    plain.input_dropout = 0.0
    same(leaves_of(layer(x)), leaves_of(plain(x)), exact=True)


@pytest.mark.parametrize("name", LAYERS)
def test_masks_follow_their_sequences(name: str) -> None:
    """Packed in any order, with lengths, with a mask, batch first: the masks of a seed are those of
    the padded batch."""
    layer = LAYERS[name](input_dropout=0.4, weight_dropout=0.3)
    x, n = torch.randn(T, B, 5, dtype=f64), torch.tensor([2, 6, 1, 4])
    valid = torch.arange(T).unsqueeze(1) < n
    y, end = seeded(layer, x, lengths=n)
    packed = pack_padded_sequence(x, n, enforce_sorted=False)
    out, state = seeded(layer, packed)
    assert isinstance(out, PackedSequence)
    same([pad_packed_sequence(out)[0], *leaves_of(state)], [y, *leaves_of(end)])
    order = n.argsort(descending=True)
    in_order = seeded(layer, pack_padded_sequence(x, n, enforce_sorted=False))
    assert in_order[0].sorted_indices.tolist() == order.tolist()
    same(leaves_of(seeded(layer, x, mask=valid)), [y, *leaves_of(end)])
    if not layer.bidirectional:
        whole, _ = seeded(layer, x)
        same([whole[valid]], [y[valid]])  # what is behind a row's end changes nothing before
    layer.batch_first = True
    turned, state = seeded(layer, x.transpose(0, 1), lengths=n)
    same([turned.transpose(0, 1), *leaves_of(state)], [y, *leaves_of(end)])
    layer.batch_first = False
    alone = seeded(layer, x[:, :1])
    same([o.squeeze(1) for o in leaves_of(alone)], leaves_of(seeded(layer, x[:, 0])))


@pytest.mark.parametrize("name", LAYERS)
def test_with_everything_else(name: str) -> None:
    """reset, recompute, the reference, dropout between layers and weights without a module give
    what they give without masks, of the same masks."""
    make = LAYERS[name]
    layer = make(weight_dropout=0.3, input_dropout=0.4)
    if layer.num_layers > 1:
        layer.dropout = 0.2
    x, reset = torch.randn(T, B, 5, dtype=f64, requires_grad=True), torch.rand(T, B) < 0.3
    want = results(layer, x, None, reset)
    layer.recompute = True
    same(results(layer, x, None, reset), want)
    layer.recompute = False
    with rnnfast.use_engine("reference"):
        same(results(layer, x, None, reset), want)
    names = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh", "IndRNN": "indrnn_relu"}
    out = seeded(
        getattr(functional, names[name]), x, None, layer._weights(), num_layers=layer.num_layers,
        bias=layer.bias, bidirectional=layer.bidirectional, reset=reset, dropout=layer.dropout,
        training=True, weight_dropout=0.3, input_dropout=0.4,
    )  # fmt: skip
    same(leaves_of(out), want[: len(leaves_of(out))], exact=True)
    for reentrant in (False, True):  # the reentrant one looks for tensors in no inner tuple
        torch.manual_seed(7)
        again = checkpoint(
            lambda x: tuple(leaves_of(layer(x, None, reset))), x, use_reentrant=reentrant
        )
        loss = sum((k + 1) * o.square().sum() for k, o in enumerate(again))
        for p in (x, *layer.parameters()):
            p.grad = None
        loss.backward()
        same([*again, x.grad, *(p.grad for p in layer.parameters())], want, exact=True)
    with io.BytesIO() as file:
        torch.save(layer, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    same(results(loaded, x, None, reset), want, exact=True)
    assert repr(loaded) == repr(layer) and "weight_dropout=0.3, input_dropout=0.4" in repr(layer)


def test_one_operator_whatever_t_is() -> None:
    """Masks cost as many calls of the dispatcher for 100 steps as for 10."""
    layer = rnnfast.GRU(5, 9, 2, bidirectional=True, weight_dropout=0.3, input_dropout=0.4)
    counts = []
    for steps in (10, 100):
        n = torch.linspace(steps, steps // 2, B).long()
        for args in ({"lengths": n}, {}):
            with torch.profiler.profile() as profile:
                layer(torch.randn(steps, B, 5, requires_grad=True), **args)[0].sum().backward()
            counts.append(len([e for e in profile.events() if e.name.startswith("aten::")]))
    assert counts[:2] == counts[2:]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_in_graphs(backend: str) -> None:
    """Inductor draws masks of its own: a dropped weight must have no gradient, and a kept one the
    gradient of the weights that forward saw."""
    torch._dynamo.reset()
    layer = rnnfast.IndRNN(5, 9, weight_dropout=0.5, input_dropout=0.5, dtype=f64)
    with torch.no_grad():
        for p in layer.parameters():
            p.abs_().add_(0.1)
    x = torch.ones(2, 3, 5, dtype=f64)

    def run(x: Tensor) -> Any:
        y, _ = layer(x)
        return y

    for call in (run, lambda x: checkpoint(run, x, use_reentrant=False)):
        traced = torch.compile(call, fullgraph=True, backend=backend)
        y = seeded(traced, x)
        torch.testing.assert_close(seeded(traced, x), y)
        assert not torch.equal(traced(x), y)
        # h_1 = W x', h_2 = W x' + u' h_1, all of it above zero
        kept = (y[1] - y[0]).abs().sum(0) > 1e-12
        torch.testing.assert_close(
            (y[1] - y[0])[:, kept], (2 * layer.weight_hh_l0 * y[0])[:, kept].detach()
        )
        y = seeded(traced, x)
        du = torch.autograd.grad(y.sum(), layer.weight_hh_l0)[0]
        torch.testing.assert_close(du, torch.where(kept, 2 * y[0].sum(0), 0).detach())
        assert 0 < int(kept.sum()) < 9


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_packed_rows_in_a_graph(name: str) -> None:
    layer = LAYERS[name](weight_dropout=0.3, input_dropout=0.4)
    torch._dynamo.reset()
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    n = torch.tensor([2, 6, 1, 4])
    packed = pack_padded_sequence(torch.randn(T, B, 5, dtype=f64), n, enforce_sorted=False)
    same(leaves_of(seeded(traced, packed)), leaves_of(seeded(layer, packed)))


def test_transforms() -> None:
    """vmap refuses and draws as torch's dropout does."""
    layer = rnnfast.LSTM(5, 9, 2, weight_dropout=0.3, input_dropout=0.4, dtype=f64)
    x = torch.randn(3, T, B, 5, dtype=f64)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda one: layer(one)[0])(x)
    want = torch.stack([seeded(layer, one)[0] for one in x])
    got = seeded(vmap(lambda one: layer(one)[0], randomness="same"), x)
    same([got], [want])
    one = seeded(vmap(lambda one: layer(one)[0], randomness="different"), x[:1].expand(3, T, B, 5))
    assert not torch.equal(one[0], one[1])
    weights = {k: p.detach() for k, p in layer.named_parameters()}

    def loss(weights: Any, one: Tensor) -> Tensor:
        return functional_call(layer, weights, (one,))[0].sum()

    each = seeded(vmap(grad(loss), in_dims=(None, 0), randomness="same"), weights, x)
    for k, sample in enumerate(x):
        found = torch.autograd.grad(seeded(layer, sample)[0].sum(), list(layer.parameters()))
        same([each[name][k] for name in weights], list(found))


WRONG = (-0.1, 1.0, 1.5, float("nan"), True, "0.5", None)


@pytest.mark.parametrize("option", ["weight_dropout", "input_dropout"])
def test_what_is_no_probability_raises(option: str) -> None:
    for wrong in WRONG:
        words = rf"rnnfast: {option} of GRU must be a number in \[0, 1\), got"
        with pytest.raises(ValueError, match=words):
            rnnfast.GRU(5, 9, **{option: wrong})
        if wrong is not None:
            layer = rnnfast.GRU(5, 9)
            setattr(layer, option, wrong)  # as dropout, it may be set at any time
            with pytest.raises(ValueError, match=words):
                layer(torch.randn(T, B, 5))
    weights = list(rnnfast.GRU(5, 9).parameters())
    with pytest.raises(ValueError, match=rf"rnnfast: {option} of GRU must be a number"):
        functional.gru(torch.randn(T, B, 5), None, weights, **{option: 2.0})


def test_what_has_no_meaning_raises() -> None:
    layer, x = rnnfast.GRU(5, 9, weight_dropout=0.5).freeze(), torch.randn(T, B, 5)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="weight_dropout drops weights anew .* a frozen"):
            layer(x)
        layer.eval()
        layer(x)
        layer.unfreeze().train()
        layer(x)
    for option in ("weight_dropout", "input_dropout"):
        layer = rnnfast.GRU(5, 9, **{option: 0.5})
        with pytest.raises(RuntimeError, match=rf"rnnfast: {option} has one mask a sequence"):
            layer.step(x[0])
        layer.eval().step(x[0])


def test_quantized_and_lazy_layers() -> None:
    layer = rnnfast.LazyLSTM(9, 2, weight_dropout=0.3, input_dropout=0.4, forget_bias=1.0)
    x = torch.randn(T, B, 5)
    layer(x)
    assert type(layer) is rnnfast.LSTM and layer.weight_dropout == 0.3 and layer.forget_bias == 1
    quantized = rnnfast.quantize(copy.deepcopy(layer)).train()
    torch.testing.assert_close(quantized(x), quantized(x), rtol=0, atol=0)
    assert repr(quantized) == "QuantizedLSTM(5, 9, num_layers=2, weights=int8)"


def test_restore_refuses_what_torch_has_not() -> None:
    model = rnnfast.accelerate(nn.ModuleDict({"a": nn.GRU(5, 9), "b": nn.LSTM(5, 9)}))
    b: Any = model["b"]
    for option, value in (("weight_dropout", 0.5), ("return_last", True)):
        setattr(b, option, value)
        words = rf"rnnfast: restore gives back .* got b with {option}={value}; set them"
        with pytest.raises(RuntimeError, match=words):
            rnnfast.restore(model)
        assert type(model["a"]) is rnnfast.GRU, "nothing is changed"
        setattr(b, option, type(value)(0))
    rnnfast.restore(model)
    assert type(b) is nn.LSTM and "return_last" not in vars(b)


@pytest.mark.parametrize("value", [1.0, -2, 0.0])
def test_forget_bias(value: float) -> None:
    """The sum of both biases of the forget gate is it; all else is drawn as without it."""
    options: Any = {"num_layers": 2, "bidirectional": True, "proj_size": 4}
    layer = seeded(lambda: rnnfast.LSTM(5, 9, forget_bias=value, **options))
    plain = seeded(lambda: nn.LSTM(5, 9, **options))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    for again in range(2):
        for name, w in plain.named_parameters():
            found, want = layer.get_parameter(name).detach(), w.detach().clone()
            if name.startswith("bias"):
                want[9:18] = value if name.startswith("bias_ih") else 0.0
            torch.testing.assert_close(found, want, rtol=0, atol=0)
        if not again:
            seeded(layer.reset_parameters)
            seeded(plain.reset_parameters)
    assert f"forget_bias={value}" in repr(layer)
    assert "forget_bias" not in repr(rnnfast.LSTM(5, 9))


def test_forget_bias_errors() -> None:
    with pytest.raises(ValueError, match="rnnfast: forget_bias .* bias=False has none"):
        rnnfast.LSTM(5, 9, bias=False, forget_bias=1.0)
    with pytest.raises(ValueError, match="rnnfast: forget_bias of LSTM must be finite, got nan"):
        rnnfast.LSTM(5, 9, forget_bias=float("nan"))
    for wrong in ("1", True):
        with pytest.raises(TypeError, match="rnnfast: forget_bias of LSTM must be a number"):
            rnnfast.LSTM(5, 9, forget_bias=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="forget_bias"):
        rnnfast.GRU(5, 9, forget_bias=1.0)
