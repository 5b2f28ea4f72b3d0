"""recurrent_dropout: one mask a sequence on h where it enters W_hh, against a plain loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain_loop import gradients, results, results_of_loop
from test_modules import leaves_of
from test_regularize import same, seeded
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast import functional
from rnnfast._masked import forward as forward_masked
from rnnfast.cells import cell_spec

f64 = torch.float64
T, B, H = 6, 4, 9
P = 0.4
KINDS: dict[str, dict[str, Any]] = {
    "LSTM": {},
    "LSTM projected": {"proj_size": 4},
    "LSTM chosen": {"activation": "softsign"},
    "GRU": {},
    "RNN": {},
    "RNN relu": {"nonlinearity": "relu"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, **options: Any) -> Any:
    given: Any = {"dtype": f64, "recurrent_dropout": P, **KINDS[kind], **options}
    return getattr(rnnfast, kind.split()[0])(5, H, **given)


def states_of(kind: str, count: int) -> list[Tensor]:
    out = KINDS[kind].get("proj_size", H)
    sizes = (out, H) if "LSTM" in kind else (out,)
    return [torch.randn(count, B, n, dtype=f64) for n in sizes]


@kinds
def test_against_a_loop(kind: str) -> None:
    """Outputs and gradients, in stacks of both directions, with states and resets."""
    layer = make(kind, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, 5, dtype=f64, requires_grad=True)
    same(results(layer, layer, x), results_of_loop(layer, x))
    hx, reset = states_of(kind, 4), torch.rand(T, B) < 0.3
    given = tuple(hx) if len(hx) == 2 else hx[0]
    same(results(layer, layer, x, given, reset), results_of_loop(layer, x, hx, reset))
    assert not torch.equal(layer(x)[0], layer(x)[0])
    plain = make(kind, num_layers=2, bidirectional=True, recurrent_dropout=0.0)
    plain.load_state_dict(layer.state_dict())
    same(leaves_of(layer.eval()(x)), leaves_of(plain(x)), exact=True)


@kinds
def test_gradcheck(kind: str) -> None:
    """With the masks fixed; the operator's second derivatives, too."""
    layer = make(kind)
    names = [n for n, _ in layer.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    hx = [s[:, :2].clone().requires_grad_() for s in states_of(kind, 1)]
    x = torch.randn(4, 2, 5, dtype=f64, requires_grad=True)

    def run(*tensors: Tensor) -> Any:
        x, *hx = tensors[: -len(names)]
        given = tuple(hx) if len(hx) == 2 else hx[0]
        params = dict(zip(names, tensors[-len(names) :], strict=True))
        return tuple(leaves_of(seeded(functional_call, layer, params, (x, given))))

    assert gradcheck(run, (x, *hx, *weights))
    if kind not in ("LSTM", "GRU"):
        return
    spec = cell_spec(kind.lower())
    kept = torch.rand(2, 3) < 0.5
    x, h0 = (torch.randn(s, dtype=f64, requires_grad=True) for s in ((3, 2, 3), (2, 3)))
    w = [torch.randn(spec.gates * 3, 3, dtype=f64, requires_grad=True) for _ in range(2)]
    none: Any = (None,) * 6

    def operator(x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor) -> Any:
        return forward_masked(
            x, h0, None, w_ih, w_hh, *none, kept, None, 0.0, 0.0, 2.0, spec.id, False, True
        )[:2]

    assert gradgradcheck(operator, (x, h0, *w))


def test_exact_expectation() -> None:
    """Of a recurrence that is linear in its mask (relu, all numbers above zero, two steps): the
    mean over all masks, each with its probability, is the layer in eval."""
    layer = rnnfast.RNN(3, 3, nonlinearity="relu", recurrent_dropout=0.25, dtype=f64)
    with torch.no_grad():
        for w in layer.parameters():
            w.abs_()
    x = torch.rand(2, 1, 3, dtype=f64)
    plain = layer.eval()(x)[0]
    layer.train()
    w_hh = layer.weight_hh_l0.detach()
    mean = torch.zeros(3, dtype=f64)
    found = {}
    while len(found) < 8:
        y = layer(x)[0].detach()
        entered = torch.linalg.solve(w_hh, (y[1, 0] - plain[1, 0]) + w_hh @ plain[0, 0])
        kept = tuple(bool(v > 1e-9) for v in entered)
        assert torch.allclose(entered, torch.tensor(kept) * plain[0, 0] / 0.75)
        found[kept] = y[1, 0]
    mean = sum(0.75 ** sum(k) * 0.25 ** (3 - sum(k)) * y for k, y in found.items())
    torch.testing.assert_close(mean, plain[1, 0].detach(), rtol=1e-12, atol=1e-14)


def test_how_often() -> None:
    """Each feature of each sequence is dropped with probability p, for the whole sequence."""
    layer = rnnfast.RNN(1, 30, nonlinearity="relu", bias=False, recurrent_dropout=P, dtype=f64)
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
        layer.weight_hh_l0.copy_(torch.eye(30, dtype=f64))
        y = layer(torch.zeros(3, 500, 1, dtype=f64), torch.ones(1, 500, 30, dtype=f64))[0]
    dropped = y[0] == 0
    torch.testing.assert_close(y[0], torch.where(dropped, 0, 1 / (1 - P)).to(f64))
    torch.testing.assert_close(y[2], y[0] ** 3)
    spread = (P * (1 - P) / dropped.numel()) ** 0.5
    assert abs(float(dropped.double().mean()) - P) < 5 * spread


@kinds
def test_masks_follow_their_sequences(kind: str) -> None:
    """Packed in any order, with lengths, with a mask, batch first: the masks of a seed are those of
    the padded batch."""
    layer = make(kind, num_layers=2, bidirectional=True)
    x, n = torch.randn(T, B, 5, dtype=f64, requires_grad=True), torch.tensor([2, 6, 1, 4])
    valid = torch.arange(T).unsqueeze(1) < n
    y, end = seeded(layer, x, lengths=n)
    want = gradients([y, *leaves_of(end)], x, layer)
    out, state = seeded(layer, pack_padded_sequence(x, n, enforce_sorted=False))
    same(gradients([pad_packed_sequence(out)[0], *leaves_of(state)], x, layer), want)
    same(results(layer, layer, x, mask=valid), want)
    with rnnfast.use_engine("reference"):
        same(results(layer, layer, x, lengths=n), want)
    layer.batch_first = True
    turned, state = seeded(layer, x.transpose(0, 1), lengths=n)
    same(gradients([turned.transpose(0, 1), *leaves_of(state)], x, layer), want)
    layer.batch_first = False
    one = make(kind)
    whole, _ = seeded(one, x)
    same([seeded(one, x, lengths=n)[0][valid]], [whole[valid]])
    alone = seeded(layer, x[:, :1])
    same([o.squeeze(1) for o in leaves_of(alone)], leaves_of(seeded(layer, x[:, 0])))
    layer.return_last = True
    same([seeded(layer, x, lengths=n)[0]], [torch.cat(list(leaves_of(end)[0][2:]), -1)])


@kinds
def test_with_everything_else(kind: str) -> None:
    """reset, recompute, the reference, checkpoints and functions give the same for the same
    masks."""
    layer = make(kind, num_layers=2, weight_dropout=0.2, input_dropout=0.3, dropout=0.2)
    x, reset = torch.randn(T, B, 5, dtype=f64, requires_grad=True), torch.rand(T, B) < 0.3
    want = results(layer, layer, x, None, reset)
    layer.recompute = True
    same(results(layer, layer, x, None, reset), want)
    layer.recompute = False
    with rnnfast.use_engine("reference"):
        same(results(layer, layer, x, None, reset), want)
    for reentrant in (False, True):
        torch.manual_seed(7)
        again = checkpoint(
            lambda x: tuple(leaves_of(layer(x, None, reset))), x, use_reentrant=reentrant
        )
        for p in (x, *layer.parameters()):
            p.grad = None
        sum((k + 1) * o.square().sum() for k, o in enumerate(again)).backward()
        same([*again, x.grad, *(p.grad for p in layer.parameters())], want, exact=True)
    more = {k: v for k, v in KINDS[kind].items() if k == "activation"}
    name = {"RNN": "rnn_tanh", "RNN relu": "rnn_relu"}.get(kind, kind.split()[0].lower())
    out = seeded(
        getattr(functional, name), x, None, layer._weights(), num_layers=2, reset=reset,
        dropout=0.2, training=True, weight_dropout=0.2, input_dropout=0.3, recurrent_dropout=P,
        **more,
    )  # fmt: skip
    same(leaves_of(out), want[: len(leaves_of(out))], exact=True)
    same(results(layer, layer, x, None, reset), want, exact=True)
    assert f"recurrent_dropout={P}" in repr(layer)


@kinds
def test_recompute_of_long_sequences(kind: str) -> None:
    layer = make(kind)
    x = torch.randn(150, 3, 5, dtype=f64, requires_grad=True)
    n = torch.tensor([150, 90, 20])
    for call in (layer, lambda x: layer(x, lengths=n)):
        wants = []
        for recompute in (False, True):
            layer.recompute = recompute
            wants.append(results(layer, call, x))
        same(*wants)


@kinds
def test_in_graphs(kind: str) -> None:
    """One graph, with lengths and packed rows, too; padding leaves no trace."""
    torch._dynamo.reset()
    layer = make(kind, num_layers=2, bidirectional=True)
    x, n = torch.randn(T, B, 5, dtype=f64, requires_grad=True), torch.tensor([2, 6, 1, 4])
    torch._dynamo.reset()  # each kind of layer is one more version of the same code
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    same(results(layer, traced, x), results(layer, layer, x))
    packed = pack_padded_sequence(x, n, enforce_sorted=False)
    same(leaves_of(seeded(traced, packed)), leaves_of(seeded(layer, packed)))
    in_order = pack_padded_sequence(x, n.sort(descending=True).values)
    for t in leaves_of(seeded(traced, in_order)):
        assert bool(t.isfinite().all())
    spoilt = x.detach().masked_fill(torch.arange(T).view(-1, 1, 1) >= n.view(-1, 1), torch.nan)
    spoilt.requires_grad_()
    got = results(layer, traced, spoilt, lengths=n)
    same(got, results(layer, layer, spoilt, lengths=n))


def test_lengths_in_a_graph_of_other_cells() -> None:
    """A sentence, where the padding would need a cell that keeps its states."""
    torch._dynamo.reset()
    layer = rnnfast.LSTM(5, 6, coupled=True, recurrent_dropout=P)
    x, n = torch.randn(T, B, 5), torch.tensor([2, 6, 1, 4])
    assert layer(x, lengths=n)[0].isfinite().all()
    traced = torch.compile(layer, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="with lengths in a graph is for.*coupled_lstm; pack"):
        traced(x, lengths=n)


def test_inductor_and_checkpoints() -> None:
    torch._dynamo.reset()
    layer = rnnfast.RNN(1, 30, nonlinearity="relu", bias=False, recurrent_dropout=P, dtype=f64)
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
        layer.weight_hh_l0.copy_(torch.eye(30, dtype=f64))
    h0 = torch.ones(1, 50, 30, dtype=f64, requires_grad=True)
    x = torch.zeros(3, 50, 1, dtype=f64)

    def run(h0: Tensor) -> Tensor:
        return layer(x, h0)[0]

    for call in (run, lambda h0: checkpoint(run, h0, use_reentrant=False)):
        torch._dynamo.reset()  # each kind of layer is one more version of the same code
        traced = torch.compile(call, fullgraph=True)
        y = seeded(traced, h0)
        same([seeded(traced, h0)], [y], exact=True)
        (dh0,) = torch.autograd.grad(y[2].sum(), h0)
        same([dh0[0]], [y[2].detach()])  # y_2 = h_0 m^3: the mask of backward is that of forward
        assert 0.3 < float((y[0] == 0).double().mean()) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@kinds
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    """Against float64, the masks being the same."""
    layer = make(kind, dtype=torch.float32).to(dtype)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(T, B, 5, dtype=dtype, requires_grad=True)
    got, want = (
        results(layer, layer, x),
        results(exact, exact, x.detach().double().requires_grad_()),
    )
    eps = torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        error = (a.double() - b).detach().abs().max()
        assert float(error) <= 30 * eps * (1 + float(b.detach().abs().max()))


@pytest.mark.parametrize("kind", ["LSTM", "LSTM projected", "GRU"])
def test_threads_and_splits_give_the_same_bits(kind: str) -> None:
    name, p = kind.split()[0], 30 if "projected" in kind else 0
    more = {"proj_size": p} if p else {}
    layer = getattr(rnnfast, name)(40, 70, recurrent_dropout=P, **more)
    x = torch.randn(20, 8, 40, requires_grad=True)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for split in ("batch", "units") if count > 1 else ("serial",):
                with rnnfast.use_engine("cpu", split=split, kernel="packed"):
                    found.append(results(layer, layer, x))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        same(other, found[0], exact=True)


WRONG: tuple[Any, ...] = (-0.1, 1.0, 1.5, float("nan"), True, "0.5", None)


def test_what_is_no_probability_raises() -> None:
    for wrong in WRONG:
        words = r"rnnfast: recurrent_dropout of GRU must be a number in \[0, 1\), got"
        with pytest.raises(ValueError, match=words):
            rnnfast.GRU(5, 9, recurrent_dropout=wrong)
        layer = rnnfast.GRU(5, 9)
        layer.recurrent_dropout = wrong  # as dropout, it may be set at any time
        with pytest.raises(ValueError, match=words):
            layer(torch.randn(T, B, 5))
    weights = list(rnnfast.GRU(5, 9).parameters())
    with pytest.raises(ValueError, match="rnnfast: recurrent_dropout of GRU must be a number"):
        functional.gru(torch.randn(T, B, 5), None, weights, recurrent_dropout=2.0)


def test_what_has_no_meaning_raises() -> None:
    x = torch.randn(T, B, 5)
    staged = (rnnfast.GRU(5, 9, reset_after=False), rnnfast.LSTM(5, 9, layer_norm=True))
    for layer in (rnnfast.IndRNN(5, 9), rnnfast.MinGRU(5, 9), *staged):
        layer.recurrent_dropout = 0.5
        with pytest.raises(RuntimeError, match="recurrent_dropout drops h where it enters W_hh"):
            layer(x)
        layer.eval()(x)
    gru = rnnfast.GRU(5, 9, recurrent_dropout=0.5)
    with pytest.raises(RuntimeError, match="recurrent_dropout has one mask a sequence"):
        gru.step(x[0])
    gru.eval().step(x[0])


def test_quantized_lazy_and_restored_layers() -> None:
    x, gru = torch.randn(T, B, 5), rnnfast.GRU(5, 9, recurrent_dropout=0.5)
    quantized = rnnfast.quantize(gru).train()
    torch.testing.assert_close(quantized(x), quantized(x), rtol=0, atol=0)
    lazy = rnnfast.LazyGRU(9, recurrent_dropout=0.3)
    lazy(x)
    assert type(lazy) is rnnfast.GRU and lazy.recurrent_dropout == 0.3
    model = rnnfast.accelerate(nn.ModuleDict({"a": nn.GRU(5, 9)}))
    swapped: Any = model["a"]
    swapped.recurrent_dropout = 0.1
    with pytest.raises(RuntimeError, match="got a with recurrent_dropout=0.1; set them"):
        rnnfast.restore(model)
