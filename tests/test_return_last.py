"""return_last: the last step of each sequence alone, and no memory for the others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import works
from test_lengths import WAYS, f64, state_of
from test_modules import leaves_of
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast import functional

T, B = 6, 4
LENGTHS = torch.tensor([2, 6, 1, 4])
LAYERS: dict[str, Any] = {
    "LSTM": lambda **o: rnnfast.LSTM(5, 9, **o),
    "LSTM of two, two ways, projected": lambda **o: rnnfast.LSTM(
        5, 9, 2, bidirectional=True, proj_size=4, **o
    ),
    "GRU, batch first": lambda **o: rnnfast.GRU(5, 9, 3, batch_first=True, **o),
    "RNN": lambda **o: rnnfast.RNN(5, 9, bidirectional=True, **o),
    "IndRNN": lambda **o: rnnfast.IndRNN(5, 9, 2, **o),
    "residual IndRNN": lambda **o: rnnfast.IndRNN(5, 5, 2, residual=True, **o),
    "residual IndRNN, two ways": lambda **o: rnnfast.IndRNN(
        5, 9, 2, bidirectional=True, residual=True, **o
    ),
}
FORMS = ("padded", "lengths", "mask", "packed", "unsorted", "unbatched")


def twins(name: str, **options: Any) -> tuple[Any, Any]:
    layer = LAYERS[name](return_last=True, **options)
    plain = copy.deepcopy(layer)
    plain.return_last = False
    return layer, plain


def given(layer: Any, form: str, dtype: Any = f64) -> tuple[Any, dict[str, Any], Tensor]:
    """Input, options, and whether a step is valid, (T, B)."""
    n = torch.full((B,), T) if form in ("padded", "unbatched") else LENGTHS
    if form == "packed":
        n = n.sort(descending=True).values
    valid = torch.arange(T).unsqueeze(1) < n
    if form == "mask":
        valid = torch.rand(T, B) < 0.5
        valid[2] = True
    x = torch.randn(T, B, 5, dtype=dtype)
    first = layer.batch_first
    if form in ("packed", "unsorted"):
        return pack_padded_sequence(x, n, enforce_sorted=form == "packed"), {}, valid
    if form == "unbatched":
        return x[:, 0], {}, valid[:, :1]
    more = {"lengths": n} if form == "lengths" else {}
    if form == "mask":
        more = {"mask": valid.t() if first else valid}
    return (x.transpose(0, 1) if first else x), more, valid


def ends(layer: Any, y: Any, valid: Tensor) -> Tensor:
    """The last valid step of each row of an output, of a second direction the first."""
    if isinstance(y, nn.utils.rnn.PackedSequence):
        y = nn.utils.rnn.pad_packed_sequence(y, total_length=T)[0]
    elif y.dim() == 2:
        y = y.unsqueeze(1)
    elif layer.batch_first:
        y = y.transpose(0, 1)
    rows = []
    for b in range(y.size(1)):
        steps = valid[:, b].nonzero().squeeze(1)
        last, first = y[steps[-1], b], y[steps[0], b]
        half = y.size(-1) // 2
        rows.append(torch.cat([last[:half], first[half:]]) if layer.bidirectional else last)
    return torch.stack(rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_last_step(name: str, form: str) -> None:
    """Training and inference; it is h_n of the last layer, but for what a residual adds."""
    layer, plain = twins(name, dtype=f64)
    x, more, valid = given(layer, form)
    hx = state_of(layer, valid.size(1))
    if form == "unbatched":
        hx = tuple(h.squeeze(1) for h in leaves_of(hx))
        hx = hx if len(hx) == 2 else hx[0]
    y, state = plain(x, hx, **more)
    want = ends(layer, y, valid)
    want = want[0] if form == "unbatched" else want
    results = []
    for out, end in ((want, state), layer(x, hx, **more)):
        loss = out.square().sum() + sum((s * s).sum() for s in leaves_of(end))
        weights = [*layer.parameters()] if results else [*plain.parameters()]
        results.append([out, *leaves_of(end), *torch.autograd.grad(loss, weights)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    if "residual" not in name:
        h_n = leaves_of(state)[0]
        parts = h_n[-2:].unbind(0) if layer.bidirectional else h_n[-1:].unbind(0)
        torch.testing.assert_close(torch.cat(parts, -1), want, rtol=0, atol=0)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for a, b in zip(leaves_of(layer(x, hx, **more)), results[0]):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "threads"),
    [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1), (torch.float16, 2)],
    ids=str,
)
@pytest.mark.parametrize("name", LAYERS)
def test_the_bits_of_the_whole_output(name: str, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    layer, plain = twins(name, dtype=dtype)
    x, more, valid = given(layer, "padded", dtype)
    for prepared in (lambda m: m, lambda m: copy.deepcopy(m).freeze()):
        with torch.no_grad():
            got, want = prepared(layer)(x, **more), prepared(plain)(x, **more)
        torch.testing.assert_close(got[0], ends(layer, want[0], valid), rtol=0, atol=0)
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)


def peak(layer: Any, x: Tensor, way: Any = None) -> int:
    """Bytes that a call has at most."""
    call = layer if way is None else way
    call(x)
    with torch.profiler.profile(profile_memory=True) as profile:
        call(x)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: rnnfast.LSTM(4, 32, **o),
        lambda **o: rnnfast.LSTM(4, 32, proj_size=16, **o),
        lambda **o: rnnfast.GRU(4, 32, bidirectional=True, **o),
        lambda **o: rnnfast.IndRNN(4, 32, **o),
    ],
)
def test_inference_has_no_memory_for_the_steps(make: Any) -> None:
    """Eager, frozen and in a graph; the whole output has T steps."""
    layer, plain = make(return_last=True).eval(), make().eval()
    short, long = torch.randn(50, 8, 4), torch.randn(400, 8, 4)
    calls = [layer, copy.deepcopy(layer).freeze()]
    if layer.bidirectional:
        torch._dynamo.reset()
        calls.append(torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True))
    with torch.no_grad():
        for call in calls:
            assert peak(call, long) == peak(call, short) < 64 * 1024
        assert peak(plain, long) - peak(plain, short) >= 350 * 8 * 16 * 4


def test_a_stack_has_memory_for_the_layers_below() -> None:
    wide, steps, batch = 64, 400, 8
    x = torch.randn(steps, batch, 4)
    layer = rnnfast.GRU(4, wide, 2, return_last=True)
    of_one = steps * batch * wide * 4
    with torch.no_grad():
        most = peak(layer, x)
        layer.return_last = False
        assert most < 1.5 * of_one and peak(layer, x) > most + 0.9 * of_one


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("operator", name) for name in LAYERS),
        ("compiled", "LSTM of two, two ways, projected"),
        ("compiled", "residual IndRNN, two ways"),
    ],
)
def test_ways(name: str, way: str) -> None:
    layer, plain = twins(name, dtype=f64)
    x, more, valid = given(layer, "lengths" if way == "compiled" else "padded")
    want = plain(x, **more)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            got = WAYS[way](layer, x, **more)
        torch.testing.assert_close(got[0], ends(layer, want[0], valid))
        torch.testing.assert_close(got[1], want[1])
        assert got[0].requires_grad is (mode is torch.enable_grad)


def test_transforms_and_other_engines() -> None:
    layer, plain = twins("LSTM of two, two ways, projected", dtype=f64)
    xs, v = torch.randn(2, 3, T, B, 5, dtype=f64).unbind(0)
    valid = torch.ones(T, B, dtype=torch.bool)
    want = torch.stack([ends(layer, plain(x)[0], valid) for x in xs])
    torch.testing.assert_close(vmap(lambda x: layer(x)[0])(xs), want)
    weights = {k: p.detach() for k, p in layer.named_parameters()}

    def loss(weights: Any, x: Tensor) -> Tensor:
        return functional_call(layer, weights, (x,))[0].square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(weights, xs)
    first = torch.autograd.grad(layer(xs[0])[0].square().sum(), list(layer.parameters()))
    for name, g in zip(weights, first):
        torch.testing.assert_close(each[name][0], g)
    _, tangent = jvp(lambda x: layer(x)[0], (xs[0],), (v[0],))
    ahead, behind = (layer(xs[0] + s * 1e-6 * v[0])[0] for s in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-7)
    with rnnfast.use_engine("reference"), torch.no_grad():
        torch.testing.assert_close(layer(xs[0])[0], want[0])
    with torch.no_grad():
        quantized = rnnfast.quantize(copy.deepcopy(layer).float())
        whole = rnnfast.quantize(copy.deepcopy(plain).float())
        x = xs[0].float()
        torch.testing.assert_close(quantized(x)[0], ends(layer, whole(x)[0], valid))
    assert repr(quantized).endswith("return_last=True, weights=int8)")


def test_functions_and_steps() -> None:
    layer, x = rnnfast.GRU(5, 9, return_last=True), torch.randn(T, B, 5)
    y, h = functional.gru(x, None, layer._weights(), return_last=True)
    torch.testing.assert_close((y, h), layer(x))
    step, state = layer.step(x[0])
    assert step.shape == (B, 9) and state.shape == (1, B, 9)
    y.data.zero_()  # a tensor of its own, no view of the state
    assert h.abs().sum() > 0
    for wrong in (1, None, "yes"):
        with pytest.raises(TypeError, match="rnnfast: return_last of GRU must be a bool, got"):
            functional.gru(x, None, layer._weights(), return_last=wrong)  # type: ignore[arg-type]
    layer.return_last = 1  # type: ignore[assignment]
    with pytest.raises(TypeError, match="rnnfast: return_last of GRU must be a bool, got int"):
        layer(x)


def test_rows_that_are_empty_keep_their_state() -> None:
    layer = rnnfast.GRU(5, 9, return_last=True, dtype=f64)
    x, h = torch.randn(T, B, 5, dtype=f64), torch.randn(1, B, 9, dtype=f64)
    mask = torch.ones(T, B, dtype=torch.bool)
    mask[:, 1] = False
    for way in WAYS.values():
        y, h_n = way(layer, x, h, mask=mask)
        torch.testing.assert_close(y, h_n[0])
        torch.testing.assert_close(y[1], h[0, 1], rtol=0, atol=0)
    y, h_n = layer(x[:, :0])
    assert y.shape == (0, 9) and h_n.shape == (1, 0, 9)


def arguments(requires_grad: bool) -> tuple[Any, ...]:
    x, h = torch.randn(T, B, 5, dtype=f64), torch.randn(B, 9, dtype=f64)
    c, b = torch.randn(1, B, 9, dtype=f64), torch.randn(36, dtype=f64)
    w_ih, w_hh = torch.randn(36, 5, dtype=f64), torch.randn(36, 9, dtype=f64)
    given = [t.requires_grad_(requires_grad) for t in (x, h, c, w_ih, w_hh, b, b.clone())]
    return (*given, None, None, torch.rand(T, B) < 0.3, None, 0, True)


def test_the_operator_keeps_its_word() -> None:
    """torch's own checks; who differentiates it gets what the ordinary operator gives."""
    operator = torch.ops.rnnfast.forward_last.default
    torch.library.opcheck(operator, arguments(False))
    args = arguments(True)
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    outs = []
    for _, h_n, c_n in ((None, *operator(*args)), torch.ops.rnnfast.forward(*args, True)[:3]):
        loss = h_n.square().sum() + c_n.square().sum()
        outs.append([h_n, c_n, *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(args[0].detach(), torch.ones_like(args[0]))
        with pytest.raises(RuntimeError, match="forward_last can't carry tangents"):
            operator(dual, *args[1:])
    with pytest.raises(RuntimeError, match="rnnfast: h0 must have shape"):
        operator(args[0], args[1][1:], *args[2:])
    group = torch.ops.rnnfast.forward_group_last
    with pytest.raises(RuntimeError, match="rnnfast: passes must hold 9 tensors"):
        group(args[0].detach(), [None] * 8, None, 0, True)


@works.row(
    "Compilers and export",
    "`return_last`: an exported many-to-one layer, and ONNX of it",
    torch_nn="no such option",
    error="unexpected keyword argument 'return_last'",
)
def test_exported(library: Any, device: torch.device) -> None:
    layer = library.LSTM(5, 9, 2, bidirectional=True, return_last=True, device=device).eval()
    x = torch.randn(T, B, 5, device=device)
    steps = torch.export.Dim("steps", min=2)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes={"input": {0: steps}})
        longer = torch.randn(11, B, 5, device=device)
        torch.testing.assert_close(program.module()(longer), layer(longer))
        if device.type == "cpu":
            assert "forward_last" in str(program.graph)


def test_onnx() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layer, x = rnnfast.LSTM(5, 9, 2, return_last=True).eval(), torch.randn(T, B, 5)
    with torch.no_grad():
        program = torch.onnx.export(
            layer, (x,), dynamo=True, verbose=False,
            custom_translation_table=rnnfast.onnx_translations(),
        )  # fmt: skip
        there = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        got = there.run(None, {there.get_inputs()[0].name: x.numpy()})
        for a, b in zip(got, leaves_of(layer(x)), strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "IndRNN"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_graph_of_two_layers_without_gradients(kind: str, bidirectional: bool) -> None:
    torch.compiler.reset()
    layer = getattr(rnnfast, kind)(3, 4, 2, bidirectional=bidirectional, return_last=True)
    x = torch.randn(5, 2, 3)
    graph = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(graph(x)[0], layer(x)[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_an_empty_row_adds_nothing_around_layers(compiled: bool) -> None:
    """A row without a valid step ends as it began, and reaches no weight's gradient."""
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = rnnfast.IndRNN(4, 4, 2, residual=True, return_last=True)
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    mask = torch.tensor([[True, False], [True, False], [False, False]])
    y, h_n = call(torch.randn(3, 2, 4), mask=mask)
    assert (y[1] == 0).all() and (h_n[:, 1] == 0).all() and (y[0] != 0).any()
    (grad,) = torch.autograd.grad(y[1].sum(), layer.bias_ih_l0)
    assert (grad == 0).all()
