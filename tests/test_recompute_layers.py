"""Layers with recompute=True: every form of input, every transform, everything else as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tolerance
import torch
from test_modules import leaves_of
from test_recompute import close, f64, kept_beyond, short_chunks  # noqa: F401
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast import _recompute, functional, ops

LAYERS: dict[str, Callable[..., Any]] = {
    "LSTM": lambda **k: rnnfast.LSTM(5, 9, 2, bidirectional=True, dropout=0.4, **k),
    "LSTM proj": lambda **k: rnnfast.LSTM(5, 9, 2, proj_size=4, batch_first=True, **k),
    "GRU": lambda **k: rnnfast.GRU(5, 9, bidirectional=True, bias=False, **k),
    "GRU stack": lambda **k: rnnfast.GRU(5, 9, 3, **k),
    "RNN": lambda **k: rnnfast.RNN(5, 9, 2, **k),
    "IndRNN": lambda **k: rnnfast.IndRNN(5, 9, nonlinearity="tanh", **k),
}


def twins(make: Callable[..., Any], dtype: torch.dtype = f64) -> list[Any]:
    lean, plain = make(recompute=True, dtype=dtype), make(dtype=dtype)
    plain.load_state_dict(lean.state_dict(), strict=True)
    return [lean, plain]


def results(layer: Any, x: Tensor, call: Callable[[Tensor], Any], *more: Tensor) -> list[Tensor]:
    torch.manual_seed(7)  # of dropout
    out = leaves_of(call(x))
    loss = sum(
        ((k + 1) * o.float() if o.dtype != f64 else o).square().sum() for k, o in enumerate(out)
    )
    return [*out, *torch.autograd.grad(loss, [x, *layer.parameters(), *more])]


FORMS = ("padded", "unbatched", "state", "packed", "unsorted", "reset", "packed reset", "lengths")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, form: str) -> None:
    pair = twins(LAYERS[name])
    layer = pair[0]
    batch_first = layer.batch_first
    shape = (3, 7, 5) if batch_first else (7, 3, 5)
    x = torch.randn((7, 5) if form == "unbatched" else shape, dtype=f64, requires_grad=True)
    lengths = torch.tensor([3, 7, 5] if form in ("unsorted", "lengths") else [7, 4, 2])
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or 9] + [9] * isinstance(layer, rnnfast.LSTM)
    hx = [torch.randn(count, 3, n, dtype=f64, requires_grad=True) for n in sizes]
    state = tuple(hx) if len(hx) == 2 else hx[0]
    reset = torch.rand(shape[:2]) < 0.4

    def pack(data: Tensor) -> PackedSequence:
        return pack_padded_sequence(data, lengths, batch_first, enforce_sorted=form != "unsorted")

    calls: dict[str, Callable[[Any, Tensor], Any]] = {
        "padded": lambda one, z: one(z),
        "unbatched": lambda one, z: one(z),
        "state": lambda one, z: one(z, state),
        "packed": lambda one, z: one(pack(z), state),
        "unsorted": lambda one, z: one(pack(z), state),
        "reset": lambda one, z: one(z, state, reset),
        "packed reset": lambda one, z: one(pack(z), None, pack(reset)),
        "lengths": lambda one, z: one(z, state, lengths=lengths),
    }
    more = [] if form in ("padded", "unbatched", "packed reset") else hx
    got, want = (results(one, x, lambda z, o=one: calls[form](o, z), *more) for one in pair)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["LSTM proj", "GRU"])
def test_16_bits(name: str, dtype: torch.dtype) -> None:
    """States between chunks are rounded, so as close to float64 as a plain layer is, not equal."""
    make = LAYERS[name]
    pair = twins(make, dtype)
    exact = make(dtype=f64)
    exact.load_state_dict(pair[0].state_dict())
    shape = (13, 40, 5) if exact.batch_first else (40, 13, 5)
    x = torch.randn(shape).to(dtype)
    want = results(exact, x.double().requires_grad_(), exact)
    lean, plain = (results(one, x.clone().requires_grad_(), one) for one in pair)
    for a, b, ref in zip(lean, plain, want, strict=True):
        errors = [
            float((t.double() - ref).detach().abs().max() / ref.detach().abs().max())
            for t in (a, b)
        ]
        assert a.dtype == dtype
        assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(dtype).eps, errors


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_autocast(name: str) -> None:
    pair = twins(LAYERS[name], torch.float32)
    x = torch.randn(9, 3, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (results(one, x, one) for one in pair)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.03 * float(b.abs().max()))


Call = tuple[str, int, bool]  # the operator, rows, whether forward saves what backward reads


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The engines' calls from now on: of forward, of backward, and weights that are packed."""
    calls: list[Call] = []
    forward, backward, pack = ops.forward, ops.backward, ops.pack

    def rows_of(x: Tensor) -> int:
        return x.numel() // x.shape[-1]

    def look_forward(*args: Any) -> Any:
        calls.append(("forward", rows_of(args[0]), args[13]))
        return forward(*args)

    def look_backward(*args: Any) -> Any:
        calls.append(("backward", rows_of(args[3]), False))
        return backward(*args)

    def look_pack(*args: Any) -> Any:
        calls.append(("pack", 0, False))
        return pack(*args)

    monkeypatch.setattr(ops, "forward", look_forward)
    monkeypatch.setattr(ops, "backward", look_backward)
    monkeypatch.setattr(ops, "pack", look_pack)
    return calls


@pytest.mark.parametrize("form", ["padded", "packed", "one chunk"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_each_step_runs_forward_twice_and_backward_once(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound of the price that a machine's noise does not move: a step's backward multiplies
    twice what its forward does, so (1 + 1 + 2) / (1 + 2) = 4/3 of a plain layer's arithmetic, and
    the weights are packed twice, whatever T is."""
    lengths = torch.tensor([7, 4, 2])
    every, sizes = {  # steps of a chunk, and the rows of each
        "padded": (2, [6, 6, 6, 3]),
        "packed": (2, [6, 4, 2, 1]),
        "one chunk": (7, [21]),
    }[form]
    x = torch.randn(7, 3, 5, requires_grad=True)
    counted: list[list[Call]] = []
    for recompute in (True, False):
        layer = getattr(rnnfast, name)(5, 9, recompute=recompute)
        given = pack_padded_sequence(x, lengths) if form == "packed" else x
        with monkeypatch.context() as patch, rnnfast.use_engine("cpu", kernel="packed"):
            patch.setattr(_recompute, "EVERY", every)
            calls = watched(patch)
            leaves_of(layer(given))[0].sum().backward()
        counted.append([call for call in calls if call[0] != "pack"])
        assert len(calls) - len(counted[-1]) == (2 if recompute else 0)
    anew = [
        call
        for rows in reversed(sizes)
        for call in (("forward", rows, True), ("backward", rows, False))
    ]
    assert counted[0] == [*(("forward", rows, False) for rows in sizes), *anew]
    total = sum(sizes)
    assert counted[1] == [("forward", total, True), ("backward", total, False)]
    work = {"forward": 1, "backward": 2}
    lean, plain = (sum(work[what] * rows for what, rows, _ in calls) for calls in counted)
    assert lean * 3 == plain * 4


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("name", ["RNN", "IndRNN"])
def test_cells_that_keep_nothing_are_left_alone(name: str, kept: bool) -> None:
    layer = LAYERS[name](recompute=kept)
    x = torch.randn(64, 3, 5, requires_grad=True)
    y, _ = layer(x)
    assert "Recompute" not in type(y.grad_fn).__name__
    if layer.num_layers == 1:
        # an empty tensor may have any address
        assert kept_beyond(layer, x) == 0


def test_no_gradient_no_chunks() -> None:
    layer = rnnfast.GRU(5, 9, recompute=True)
    x = torch.randn(9, 3, 5)
    with torch.no_grad():
        assert layer(x)[0].grad_fn is None
        layer.freeze()
        layer(x)
    with pytest.raises(RuntimeError, match="frozen or quantized layer gives no gradients"):
        layer(x)
    layer.unfreeze().requires_grad_(False)
    assert layer(x)[0].grad_fn is None


@pytest.mark.parametrize("name", LAYERS)
def test_transforms_and_higher_derivatives(name: str) -> None:
    lean, plain = twins(LAYERS[name])
    for one in (lean, plain):
        one.dropout = 0.0
    x, v = torch.randn(2, 3, 5, dtype=f64), torch.randn(2, 3, 5, dtype=f64)
    parameters = dict(plain.named_parameters())

    def loss(p: Any, one: Tensor, layer: Any) -> Tensor:
        return functional_call(layer, p, (one,))[0].pow(3).sum()

    def all_of(layer: Any) -> list[Tensor]:
        samples = vmap(lambda p, one: grad(loss)(p, one, layer), in_dims=(None, 0))(parameters, x)
        tangent = jvp(lambda one: layer(one)[0], (x,), (v,))[1]
        z = x.clone().requires_grad_()
        y = layer(z)[0]
        (first,) = torch.autograd.grad(y.pow(3).sum(), z, create_graph=True)
        penalty = torch.autograd.grad((first.norm() - 1) ** 2, [z, *layer.parameters()])
        basis = torch.eye(y.numel(), dtype=f64).view(-1, *y.shape)[:4]
        y = layer(z)[0]
        (batched,) = torch.autograd.grad(y, z, basis, is_grads_batched=True)
        return [*samples.values(), tangent, *penalty, batched]

    for a, b in zip(all_of(lean), all_of(plain), strict=True):
        torch.testing.assert_close(a, b, **close)


def test_inside_a_checkpoint_and_saved_tensors_hooks() -> None:
    lean, plain = twins(LAYERS["GRU"])
    x = torch.randn(7, 3, 5, dtype=f64, requires_grad=True)
    want = results(plain, x, plain)
    got = results(lean, x, lambda z: checkpoint(lean, z, use_reentrant=False))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        hooked = results(lean, x, lean)
    for a, b, c in zip(got, hooked, want, strict=True):
        torch.testing.assert_close(a, c, **close)
        torch.testing.assert_close(b, c, **close)


def test_backward_twice() -> None:
    layer = rnnfast.LSTM(5, 9, recompute=True)
    x = torch.randn(9, 3, 5, requires_grad=True)
    loss = layer(x)[0].square().sum()
    first = torch.autograd.grad(loss, [x, *layer.parameters()], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, [x, *layer.parameters()]), strict=True):
        assert tolerance.same_bits(a, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_changes_in_place() -> None:
    """Of weights and input they are noticed; the output is not read, and may change."""
    for changed in ("weight", "input"):
        layer = rnnfast.LSTM(5, 9, recompute=True)
        x = torch.randn(9, 3, 5)
        y, _ = layer(x)
        with torch.no_grad():
            (layer.weight_hh_l0 if changed == "weight" else x).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    lean, plain = twins(lambda **k: rnnfast.GRU(5, 9, **k))
    x = torch.randn(9, 3, 5, dtype=f64)
    y, _ = lean(x)
    y.mul_(2).sum().backward()
    (2 * plain(x)[0]).sum().backward()
    for a, b in zip(lean.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **close)


def test_compile_of_packed_and_lengths() -> None:
    torch._dynamo.reset()
    lean, plain = twins(LAYERS["GRU stack"])
    sizes, lengths = torch.tensor([3, 2, 2, 1]), torch.tensor([2, 6, 4])
    calls: list[tuple[Callable[[Any, Tensor], Any], tuple[int, ...]]] = [
        (lambda one, z: one(PackedSequence(z, sizes), None)[0].data, (8, 5)),
        (lambda one, z: one(z, None, lengths=lengths), (6, 3, 5)),
    ]
    for call, shape in calls:
        x = torch.randn(shape, dtype=f64, requires_grad=True)
        compiled = torch.compile(lambda z, f=call: f(lean, z), backend="aot_eager")
        got, want = results(lean, x, compiled), results(plain, x, lambda z, f=call: f(plain, z))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, **close)


def test_export_keeps_the_plain_operator() -> None:
    """A graph for inference has nothing to keep."""
    layer, x = rnnfast.LSTM(5, 9, recompute=True), torch.randn(9, 3, 5)
    program = torch.export.export(layer, (x,))
    assert "forward_recompute" not in program.graph_module.code
    for a, b in zip(leaves_of(program.module()(x)), leaves_of(layer(x)), strict=True):
        torch.testing.assert_close(a, b)


def test_meta_empty_and_forced_engines() -> None:
    layer = rnnfast.LSTM(5, 9, recompute=True, device="meta")
    y, _ = layer(torch.empty(9, 3, 5, device="meta"))
    y.sum().backward()
    assert layer.weight_hh_l0.grad.shape == (36, 9)
    layer = rnnfast.GRU(5, 9, recompute=True)
    layer(torch.randn(7, 0, 5))[0].sum().backward()
    assert not layer.weight_hh_l0.grad.any()
    x = torch.randn(7, 2, 5)
    want = layer(x)[0]
    for engine in ("reference", "cpu"):
        with rnnfast.use_engine(engine):
            torch.testing.assert_close(layer(x)[0], want)


def test_what_is_no_bool_is_refused() -> None:
    for kind in (rnnfast.LSTM, rnnfast.GRU, rnnfast.RNN, rnnfast.IndRNN):
        with pytest.raises(
            TypeError, match=f"rnnfast: recompute of {kind.__name__} must be a bool"
        ):
            kind(5, 9, recompute=64)
        assert kind(5, 9, recompute=True).recompute and not kind(5, 9).recompute


def test_explain_says_one_by_one() -> None:
    """Passes of such a layer do not run side by side."""
    torch.set_num_threads(2)
    with rnnfast.use_engine("cpu", split="directions"):
        x = torch.randn(40, 4, 64)
        plain, lean = (
            rnnfast.explain(rnnfast.LSTM(64, 64, bidirectional=True, recompute=r), x).rows[0]
            for r in (False, True)
        )
    assert plain.split == "directions" and lean.split != "directions"


@pytest.mark.parametrize("form", ["padded", "reset", "lengths", "packed"])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh", "indrnn_relu"])
def test_functions(name: str, form: str) -> None:
    """The functions take the option, too, and give what the layers give."""
    function = getattr(functional, name)
    make = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "indrnn_relu": "IndRNN"}[name]
    layer = getattr(rnnfast, make)(5, 9, 2, bidirectional=True, dtype=f64)
    weights = list(layer.parameters())
    x = torch.randn(7, 3, 5, dtype=f64, requires_grad=True)
    lengths = torch.tensor([7, 4, 2])
    given: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    if form == "reset":
        given["reset"] = torch.rand(7, 3) < 0.4
    if form == "lengths":
        given["lengths"] = lengths
    found = []
    for recompute in (True, False):
        input = pack_padded_sequence(x, lengths) if form == "packed" else x
        out = leaves_of(function(input, None, weights, recompute=recompute, **given))
        found.append([*out, *torch.autograd.grad(sum(o.sum() for o in out), [x, *weights])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **close)
    one = function(x, None, weights[: len(weights) // 4], recompute=True)[0]
    assert type(one.grad_fn).__name__.startswith("_Recompute") == (name in ("lstm", "gru"))
    with pytest.raises(TypeError, match="rnnfast: recompute of .* must be a bool, got int"):
        function(x, None, weights, recompute=64, **given)


def test_quantized_layers_have_nothing_to_recompute() -> None:
    model = torch.nn.Sequential(rnnfast.LSTM(5, 9, recompute=True))
    quantized = rnnfast.quantize(model)[0]
    assert quantized.recompute is False and "recompute" not in repr(quantized)
    quantized.recompute = False
    for wanted in (True, 64):
        with pytest.raises(RuntimeError, match="rnnfast: recompute is about what training keeps"):
            quantized.recompute = wanted
    twin = copy.deepcopy(quantized)
    assert twin.recompute is False
    x = torch.randn(4, 3, 5)
    assert tolerance.same_bits(twin(x)[0], quantized(x)[0])
