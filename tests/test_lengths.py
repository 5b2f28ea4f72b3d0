"""lengths=: what packing, the layer and padding give, eager and in graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import works
from test_modules import leaves_of
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

import rnnfast

f64 = torch.float64
LENGTHS = {
    "any order": [2, 6, 1, 4],
    "sorted": [6, 4, 2, 1],
    "none is T": [3, 2, 5, 2],
    "all are T": [6, 6, 6, 6],
    "all are one": [1, 1, 1, 1],
}
KINDS: dict[str, Any] = {
    "LSTM": lambda: rnnfast.LSTM(5, 9, dtype=f64),
    "LSTM of two, two ways, projected": lambda: rnnfast.LSTM(
        5, 9, 2, bidirectional=True, proj_size=4, dtype=f64
    ),
    "GRU, batch first": lambda: rnnfast.GRU(
        5, 9, 2, bidirectional=True, batch_first=True, dtype=f64
    ),
    "RNN": lambda: rnnfast.RNN(5, 9, 2, bias=False, dtype=f64),
    "IndRNN": lambda: rnnfast.IndRNN(5, 9, bidirectional=True, dtype=f64),
}


@pytest.fixture(params=KINDS)
def layer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def state_of(layer: Any, batch: int) -> Any:
    count = layer.num_layers * (1 + layer.bidirectional)
    h = torch.randn(count, batch, layer.proj_size or layer.hidden_size, dtype=f64)
    if not isinstance(layer, rnnfast.LSTM):
        return h.requires_grad_()
    c = torch.randn(count, batch, layer.hidden_size, dtype=f64)
    return h.requires_grad_(), c.requires_grad_()


def by_packing(layer: Any, x: Tensor, hx: Any, reset: Tensor | None, n: Tensor) -> list[Tensor]:
    first = layer.batch_first
    packed = pack_padded_sequence(x, n, first, enforce_sorted=False)
    if reset is not None:
        reset = pack_padded_sequence(reset, n, first, enforce_sorted=False)
    y, state = layer(packed, hx, reset)
    y, _ = pad_packed_sequence(y, first, total_length=x.size(1 if first else 0))
    return leaves_of((y, state))


def example(layer: Any, steps: int = 6, batch: int = 4) -> tuple[Tensor, Any, Tensor]:
    shape = (batch, steps) if layer.batch_first else (steps, batch)
    x = torch.randn(*shape, 5, dtype=f64, requires_grad=True)
    return x, state_of(layer, batch), torch.rand(shape) < 0.3


def through_an_operator(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """As a graph runs it, without compiling one."""
    with FlopCounterMode(display=False):
        return layer(*args, **kwargs)


def compiled(layer: Any, *args: Any, **kwargs: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend="aot_eager")(*args, **kwargs)


WAYS: dict[str, Any] = {
    "eager": lambda layer, *args, **kwargs: layer(*args, **kwargs),
    "operator": through_an_operator,
    "compiled": compiled,
}


RUNS = [
    (way, given, case)
    for way in WAYS
    for given in ("plain", "hx and reset")
    for case in LENGTHS
    if way != "compiled" or (given, case) in (("plain", "any order"), ("hx and reset", "none is T"))
]


@pytest.mark.parametrize(("way", "given", "case"), RUNS)
def test_as_by_packing(layer: Any, way: str, given: str, case: str) -> None:
    n = torch.tensor(LENGTHS[case])
    x, hx, reset = example(layer)
    if given == "plain":
        hx = reset = None
    want = by_packing(layer, x, hx, reset, n)
    got = leaves_of(WAYS[way](layer, x, hx, reset, n))
    inputs = [x, *([] if hx is None else leaves_of(hx)), *layer.parameters()]
    seeds = [torch.randn_like(t) for t in want]
    gradients = [torch.autograd.grad(ts, inputs, seeds) for ts in (got, want)]
    for a, b in zip([*got, *gradients[0]], [*want, *gradients[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("way", "kind"),
    [*((way, kind) for way in ("eager", "operator") for kind in KINDS), ("compiled", "IndRNN")],
)
def test_padding_is_never_read(way: str, kind: str) -> None:
    """NaN there reaches nothing, and gradients there are zero, NaN from above included."""
    layer = KINDS[kind]()
    n = torch.tensor([2, 6, 1, 4])
    x, hx, _ = example(layer)
    valid = torch.arange(6).unsqueeze(1) < n
    valid = (valid.t() if layer.batch_first else valid).unsqueeze(-1)
    want = leaves_of(layer(x, hx, lengths=n))
    spoilt = torch.where(valid, x.detach(), torch.nan).requires_grad_()
    mask = torch.rand(valid.shape[:2]) < 0.3
    got = leaves_of(WAYS[way](layer, spoilt, hx, lengths=n))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert not got[0].masked_select(~valid).any()
    seed = torch.where(valid, torch.randn_like(got[0]), torch.nan)
    dx, *others = torch.autograd.grad(got[0], [spoilt, *layer.parameters()], seed)
    assert not dx.masked_select(~valid).any()
    assert all(bool(g.isfinite().all()) for g in (dx, *others))
    # neither is the mask's padding, which the second direction would meet first
    outs = [
        leaves_of(WAYS[way](layer, x, hx, mask | fill, n))
        for fill in (~valid.squeeze(-1), torch.zeros_like(mask))
    ]
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_any_integers(dtype: torch.dtype) -> None:
    layer, x, n = rnnfast.GRU(5, 9), torch.randn(6, 4, 5), torch.tensor([2, 6, 1, 4])
    for way in ("eager", "operator"):
        got = WAYS[way](layer, x, lengths=n.to(dtype))
        torch.testing.assert_close(got, layer(x, lengths=n))


def test_only_valid_steps_are_computed() -> None:
    layer, n = rnnfast.LSTM(5, 9), torch.tensor([2, 6, 1, 4])
    with torch.profiler.profile(record_shapes=True) as profile:
        layer(torch.randn(6, 4, 5, requires_grad=True), lengths=n)[0].sum().backward()
    shapes = {e.name: e.input_shapes for e in profile.events() if e.name.startswith("rnnfast::")}
    assert shapes["rnnfast::forward"][0] == [13, 5]
    assert shapes["rnnfast::backward"][3] == [13, 5]


def operator_arguments(given: bool) -> tuple[Any, ...]:
    """Those of a forward from x to reset, lengths left out."""
    w_ih, w_hh = (torch.randn(36, k, dtype=f64, requires_grad=True) for k in (5, 9))
    x = torch.randn(6, 4, 5, dtype=f64, requires_grad=True)
    h = torch.randn(4, 9, dtype=f64, requires_grad=True) if given else None
    c = torch.randn(1, 4, 9, dtype=f64) if given else None
    return x, h, c, w_ih, w_hh, None, None, None, (torch.rand(6, 4) < 0.3) if given else None


@pytest.mark.parametrize("reverse", [False, True])
def test_the_operators_compute_valid_steps_only(reverse: bool) -> None:
    """Of what forward keeps, which has room for all steps, they write and read the rows of these;
    of everything else nothing behind the lengths."""
    *tensors, reset = operator_arguments(True)
    n = torch.tensor([2, 6, 1, 4])
    valid = (torch.arange(6).unsqueeze(1) < n).unsqueeze(-1)
    inputs = [None if t is None else t.detach() for t in tensors]
    forward, backward = torch.ops.rnnfast.forward_lengths, torch.ops.rnnfast.backward_lengths
    y, h_n, c_n, saved = forward(*inputs, n, reset, None, 0, reverse, True)
    assert saved.shape[0] == 24
    assert bool((saved[:13] != 0).flatten(1).any(1).all()) and not saved[13:].any()
    dy = torch.randn_like(y)
    want = backward(dy, h_n, c_n, *inputs, n, reset, y, saved, 0, reverse, 31)
    saved[13:] = torch.nan
    for t in (y, dy, inputs[0]):
        t.masked_fill_(~valid, torch.nan)
    got = backward(dy, h_n, c_n, *inputs, n, reset, y, saved, 0, reverse, 31)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


LAYOUTS: dict[str, Any] = {
    "rows": lambda x: x,
    "batch first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every other": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 2)[::2, :, ::2],
    "one step for all": lambda x: x[:1].expand_as(x),
    "one number for all": lambda x: x[:1, :1, :1].expand_as(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_types_and_layouts(layout: str, dtype: torch.dtype) -> None:
    """The operators read x and dy wherever they lie, in what an eager call computes."""
    layer = rnnfast.GRU(5, 9, bidirectional=True, dtype=dtype)
    n = torch.tensor([2, 0, 6, 0, 1, 0, 4])[::2]
    shaped = LAYOUTS[layout]
    x = shaped(torch.randn(6, 4, 5, dtype=dtype)).requires_grad_()
    seed = shaped(torch.randn(6, 4, 18, dtype=dtype))
    results = []
    for way in ("eager", "operator"):
        y, h = WAYS[way](layer, x, lengths=n)
        results.append((y, h, *torch.autograd.grad(y, [x, *layer.parameters()], seed)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_an_empty_batch_and_no_steps() -> None:
    layer = rnnfast.LSTM(5, 9)
    none = torch.zeros(0, dtype=torch.int64)
    for way in WAYS.values():
        y, (h, c) = way(layer, torch.randn(6, 0, 5), lengths=none)
        assert y.shape == (6, 0, 9) and h.shape == c.shape == (1, 0, 9)
        with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
            way(layer, torch.randn(0, 3, 5), lengths=torch.ones(3, dtype=torch.int64))


def test_without_modules_frozen_and_quantized() -> None:
    layer, x, n = rnnfast.LSTM(5, 9, 2).eval(), torch.randn(6, 4, 5), torch.tensor([2, 6, 1, 4])
    want = layer(x, lengths=n)
    weights = [w for of_layer in layer.all_weights for w in of_layer]
    torch.testing.assert_close(
        rnnfast.functional.lstm(x, None, weights, num_layers=2, lengths=n), want
    )
    with torch.no_grad():
        frozen = copy.deepcopy(layer).freeze()
        for way in WAYS.values():
            torch.testing.assert_close(way(frozen, x, lengths=n), want, rtol=1e-4, atol=1e-5)
        quantized = rnnfast.quantize(copy.deepcopy(layer))
        packed = pack_padded_sequence(x, n, enforce_sorted=False)
        got, want = quantized(x, lengths=n), quantized(packed)
        torch.testing.assert_close(got[0], pad_packed_sequence(want[0], total_length=6)[0])
        torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("kind", ["LSTM", "IndRNN"])
def test_the_reference_engine(kind: str) -> None:
    layer, n = KINDS[kind](), torch.tensor([2, 3, 1])
    x, hx, reset = example(layer, 3, 3)
    want = leaves_of(layer(x, hx, reset, n))
    with rnnfast.use_engine("reference"):
        for way in WAYS.values():
            for a, b in zip(leaves_of(way(layer, x, hx, reset, n)), want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        with pytest.raises(RuntimeError, match="rnnfast: lengths must be at least 1"):
            compiled(layer, x, hx, reset, n + 1)


@pytest.mark.parametrize("way", ["eager", "operator"])
def test_second_derivatives(way: str) -> None:
    n = torch.tensor([2, 3, 1])
    for layer in (
        rnnfast.LSTM(2, 3, bidirectional=True, dtype=f64),
        rnnfast.GRU(2, 3, dtype=f64),
    ):
        x = torch.randn(3, 3, 2, dtype=f64, requires_grad=True)
        h = torch.randn(1 + layer.bidirectional, 3, 3, dtype=f64, requires_grad=True)

        def run(x: Tensor, h: Tensor, layer: Any = layer) -> Any:
            hx = (h, h) if isinstance(layer, rnnfast.LSTM) else h
            return tuple(leaves_of(layer(x, hx, lengths=n)))

        def traced(x: Tensor, h: Tensor, run: Any = run) -> Any:
            with FlopCounterMode(display=False):
                return run(x, h)

        f = run if way == "eager" else traced
        assert torch.autograd.gradcheck(f, (x, h))
        assert torch.autograd.gradgradcheck(f, (x, h), atol=1e-6)


def test_transforms(layer: Any) -> None:
    """vmap, per-sample gradients and jvp; lengths themselves can't be batched."""
    n = torch.tensor([2, 6, 1, 4])
    x, v = torch.randn(2, 3, *example(layer)[0].shape, dtype=f64).unbind(0)
    got = vmap(lambda one: layer(one, lengths=n)[0])(x)
    want = torch.stack([layer(one, lengths=n)[0] for one in x])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    weights = {k: p.detach() for k, p in layer.named_parameters()}

    def loss(weights: Any, one: Tensor) -> Tensor:
        return functional_call(layer, weights, (one,), {"lengths": n})[0].square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for k, one in enumerate(x):
        layer.zero_grad()
        layer(one, lengths=n)[0].square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(gradients[name][k], p.grad, rtol=1e-9, atol=1e-11)
    _, tangent = jvp(lambda one: layer(one, lengths=n)[0], (x[0],), (v[0],))
    ahead, behind = (layer(x[0] + s * 1e-6 * v[0], lengths=n)[0] for s in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match="rnnfast: lengths can't be batched by vmap"):
        vmap(lambda one, m: layer(one, lengths=m)[0])(x, n.expand(3, 4))


WRONG: dict[str, Any] = {
    "float": torch.tensor([2.0, 6.0, 1.0, 4.0]),
    "bool": torch.ones(4, dtype=torch.bool),
    "two dimensions": torch.ones(4, 1, dtype=torch.int64),
    "too few": torch.tensor([2, 6, 1]),
    "a list": [2, 6, 1, 4],
    "zero": torch.tensor([2, 0, 1, 4]),
    "negative": torch.tensor([2, 6, -1, 4]),
    "beyond T": torch.tensor([2, 7, 1, 4]),
}


@pytest.mark.parametrize(
    ("way", "wrong"),
    [
        *((way, wrong) for way in ("eager", "operator") for wrong in WRONG),
        *(("compiled", wrong) for wrong in ("float", "too few", "zero", "beyond T")),
    ],
)
def test_wrong_lengths_raise(way: str, wrong: str) -> None:
    """In a graph a value is wrong when it runs."""
    layer, x = rnnfast.GRU(5, 9), torch.randn(6, 4, 5)
    with pytest.raises(Exception, match="rnnfast: lengths must (be an integer|have shape|be at l)"):
        WAYS[way](layer, x, lengths=WRONG[wrong])


def test_other_input_raises() -> None:
    layer, n = rnnfast.GRU(5, 9), torch.tensor([3])
    with pytest.raises(RuntimeError, match="rnnfast: lengths are for batched input"):
        layer(torch.randn(4, 5), lengths=n)
    with pytest.raises(RuntimeError, match="rnnfast: lengths are for padded input"):
        layer(PackedSequence(torch.randn(3, 5), torch.tensor([1, 1, 1])), lengths=n)
    x, reset = torch.randn(6, 4, 5), torch.zeros(4, 6, dtype=torch.bool)
    for way in WAYS.values():
        with pytest.raises(Exception, match=r"rnnfast: reset must be .* \(T, B\) = \(6, 4\)"):
            way(layer, x, None, reset, torch.tensor([2, 6, 1, 4]))


@pytest.mark.parametrize("case", ["any order", "all are T"])
@pytest.mark.parametrize("given", [False, True], ids=["plain", "hx and reset"])
def test_the_operators_keep_their_word(case: str, given: bool) -> None:
    """torch's own checks of schemas, fake kernels and derivatives."""
    n = torch.tensor(LENGTHS[case])
    *tensors, reset = operator_arguments(given)
    inputs = (*tensors, n, reset)
    forward, backward = torch.ops.rnnfast.forward_lengths, torch.ops.rnnfast.backward_lengths
    torch.library.opcheck(forward, (*inputs, None, 0, given, True))
    y, h_n, c_n, saved = (t.detach() for t in forward(*inputs, None, 0, given, True))
    # its own derivative is test_second_derivatives'
    inputs = tuple(t.detach() if isinstance(t, Tensor) else t for t in inputs)
    needs = 1 | 8 | 16 | (2 if given else 0)
    args = (torch.randn_like(y), h_n, c_n, *inputs, y, saved, 0, given, needs)
    torch.library.opcheck(backward, args)
    torch.library.opcheck(torch.ops.rnnfast.checked_lengths, (n.int(), 6))


def test_no_cuda_graph_may_hold_the_operators() -> None:
    """They read lengths on the host. Inductor asks the tags of what it compiles."""
    from torch._inductor import utils

    operators = torch.ops.rnnfast
    for name in ("forward_lengths", "backward_lengths", "checked_lengths"):
        node = torch.fx.Graph().call_function(getattr(operators, name).default)
        assert utils.is_cudagraph_unsafe_fx_node(node)
    node = torch.fx.Graph().call_function(operators.forward.default)
    assert not utils.is_cudagraph_unsafe_fx_node(node)


@works.row(
    "Compilers and export",
    "`lengths` of padded input in a compiled graph, training; wrong ones raise when it runs",
    torch_nn="no: pack_padded_sequence can't be traced",
    error="Attempted to (wrap RNN, GRU, or LSTM|call function marked as skipped)",
)
def test_lengths_in_a_graph(library: Any, device: torch.device) -> None:
    layer = library.LSTM(5, 9, bidirectional=True, device=device)
    x, n = torch.randn(6, 4, 5, device=device), torch.tensor([2, 6, 1, 4], device=device)

    def run(x: Tensor, n: Tensor) -> Tensor:
        if library is nn:
            packed = pack_padded_sequence(x, n, enforce_sorted=False)
            return pad_packed_sequence(layer(packed)[0], total_length=6)[0]
        return layer(x, lengths=n)[0]

    torch._dynamo.reset()
    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    y = traced(x, n)
    torch.testing.assert_close(y, run(x, n))
    got = torch.autograd.grad(y.sum(), list(layer.parameters()))
    want = torch.autograd.grad(run(x, n).sum(), list(layer.parameters()))
    torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError, match="rnnfast: lengths must be at least 1 and at most T = 6"):
        traced(x, n + 1)
