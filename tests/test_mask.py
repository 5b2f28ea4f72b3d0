"""mask=: the valid steps of each row alone, wherever they stand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import works
from test_lengths import WAYS, f64, state_of, through_an_operator
from test_modules import leaves_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast

T, B = 6, 4
MASKS: dict[str, Tensor] = {  # (T, B)
    "right": torch.arange(T).unsqueeze(1) < torch.tensor([2, 6, 1, 4]),
    "left": torch.arange(T).unsqueeze(1) >= torch.tensor([3, 0, 5, 1]),
    "holes": torch.tensor(
        [[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1]]
    )
    .bool()
    .t(),
    "empty rows": torch.tensor([[0] * 6, [1, 0, 0, 1, 1, 0], [0] * 6, [0, 0, 0, 0, 0, 1]])
    .bool()
    .t(),
    "nothing": torch.zeros(T, B, dtype=torch.bool),
    "all": torch.ones(T, B, dtype=torch.bool),
}
KINDS: dict[str, Any] = {
    "LSTM of two, two ways, projected": lambda: rnnfast.LSTM(
        5, 9, 2, bidirectional=True, proj_size=4, dtype=f64
    ),
    "GRU, batch first": lambda: rnnfast.GRU(5, 9, 2, batch_first=True, dtype=f64),
    "RNN": lambda: rnnfast.RNN(5, 9, bias=False, bidirectional=True, dtype=f64),
    "IndRNN": lambda: rnnfast.IndRNN(5, 9, 2, residual=True, dtype=f64),
}


@pytest.fixture(params=KINDS)
def layer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def turned(layer: Any, mask: Tensor) -> Tensor:
    return mask.t() if layer.batch_first else mask


def example(layer: Any) -> tuple[Tensor, Any, Tensor]:
    shape = (B, T) if layer.batch_first else (T, B)
    x = torch.randn(*shape, 5, dtype=f64, requires_grad=True)
    return x, state_of(layer, B), torch.rand(shape) < 0.3


def by_rows(layer: Any, x: Tensor, hx: Any, reset: Tensor | None, mask: Tensor) -> list[Tensor]:
    """Each row by itself, its valid steps next to one another."""
    one = copy.copy(layer)
    one.batch_first = False
    if layer.batch_first:
        x, mask, reset = x.transpose(0, 1), mask.t(), None if reset is None else reset.t()
    states = state_of(layer, x.size(1)) if hx is None else hx
    states = [torch.zeros_like(s) if hx is None else s for s in leaves_of(states)]
    outs, ends = [], []
    for b in range(x.size(1)):
        h = tuple(s[:, b] for s in states)
        steps = mask[:, b].nonzero().squeeze(1).tolist()
        width = (layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional)
        y = [x.new_zeros(width)] * x.size(0)
        if steps:
            cuts, pending = [], False
            for t in range(x.size(0)):
                pending |= reset is not None and bool(reset[t, b])
                if t in steps:
                    cuts.append(pending)
                    pending = False
            found, end = one(x[steps, b], h if len(h) == 2 else h[0], torch.tensor(cuts))
            for k, t in enumerate(steps):
                y[t] = found[k]
            h = tuple(leaves_of(end))
        outs.append(torch.stack(y))
        ends.append(h)
    y = torch.stack(outs, 1)
    return [
        y.transpose(0, 1) if layer.batch_first else y,
        *(torch.stack(parts, 1) for parts in zip(*ends)),
    ]


RUNS = [
    *((way, given, case) for way in ("eager", "operator") for given in (0, 1) for case in MASKS),
    ("compiled", 1, "empty rows"),
]


@pytest.mark.parametrize(("way", "given", "case"), RUNS)
def test_as_row_by_row(layer: Any, way: str, given: int, case: str) -> None:
    mask = turned(layer, MASKS[case])
    x, hx, reset = example(layer)
    if not given:
        hx = reset = None
    want = by_rows(layer, x, hx, reset, mask)
    got = leaves_of(WAYS[way](layer, x, hx, reset, mask=mask))
    inputs = [x, *([] if hx is None else leaves_of(hx)), *layer.parameters()]
    seeds = [torch.randn_like(t) for t in want]
    wanted = torch.autograd.grad(
        [t for t in want if t.requires_grad], inputs,
        [s for s, t in zip(seeds, want) if t.requires_grad], allow_unused=True,
        materialize_grads=True,
    ) if any(t.requires_grad for t in want) else [torch.zeros_like(i) for i in inputs]  # fmt: skip
    found = torch.autograd.grad(got, inputs, seeds)
    for a, b in zip([*got, *found], [*want, *wanted], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", ["eager", "operator"])
@pytest.mark.parametrize("case", ["holes", "empty rows", "left"])
def test_what_is_masked_is_never_read(layer: Any, way: str, case: str) -> None:
    """NaN there reaches nothing, gradients there are zero, whatever comes back from above."""
    mask = turned(layer, MASKS[case])
    x, hx, _ = example(layer)
    want = leaves_of(layer(x, hx, mask=mask))
    spoilt = torch.where(mask.unsqueeze(-1), x.detach(), torch.nan).requires_grad_()
    got = leaves_of(WAYS[way](layer, spoilt, hx, mask=mask))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert not got[0][~mask].any()
    seed = torch.where(mask.unsqueeze(-1), torch.randn_like(got[0]), torch.nan)
    dx, *others = torch.autograd.grad(got[0], [spoilt, *layer.parameters()], seed)
    assert not dx[~mask].any()
    assert all(bool(g.isfinite().all()) for g in (dx, *others))


@pytest.mark.parametrize("way", ["eager", "operator"])
def test_the_state_of_an_empty_row_is_what_it_was(way: str) -> None:
    """Numbers that are none included, and it reaches no weight."""
    layer, mask = rnnfast.LSTM(5, 9, dtype=f64), MASKS["empty rows"]
    x, (h, c), _ = example(layer)
    h, c = h.detach(), c.detach()
    h[:, 0], c[:, 2] = torch.nan, torch.inf
    y, (h_n, c_n) = WAYS[way](layer, x, (h, c), mask=mask)
    empty = torch.tensor([0, 2])
    torch.testing.assert_close(h_n[:, empty], h[:, empty], equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(c_n[:, empty], c[:, empty], rtol=0, atol=0)
    gradients = torch.autograd.grad(y.sum(), list(layer.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradients)


def test_right_padding_is_lengths_to_the_bit(layer: Any) -> None:
    x, hx, reset = example(layer)
    lengths, mask = torch.tensor([2, 6, 1, 4]), turned(layer, MASKS["right"])
    results = []
    for given in ({"lengths": lengths}, {"mask": mask}):
        out = leaves_of(layer(x, hx, reset & mask, **given))
        results.append([*out, *torch.autograd.grad(out[0].sum(), [x, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_only_valid_steps_are_computed() -> None:
    layer, mask = rnnfast.LSTM(5, 9), MASKS["holes"]
    with torch.profiler.profile(record_shapes=True) as profile:
        layer(torch.randn(T, B, 5, requires_grad=True), mask=mask)[0].sum().backward()
    shapes = {e.name: e.input_shapes for e in profile.events() if e.name.startswith("rnnfast::")}
    assert shapes["rnnfast::forward"][0] == [int(mask.sum()), 5]
    assert shapes["rnnfast::backward"][3] == [int(mask.sum()), 5]


@pytest.mark.parametrize(
    ("way", "first"),
    [
        ("eager", False),
        ("eager", True),
        ("operator", False),
        ("operator", True),
        ("compiled", True),
    ],
)
def test_unbatched(way: str, first: bool) -> None:
    layer = rnnfast.LSTM(5, 9, bidirectional=True, batch_first=first, dtype=f64)
    x, mask = torch.randn(T, 5, dtype=f64), MASKS["holes"][:, 0]
    hx = torch.randn(2, 9, dtype=f64), torch.randn(2, 9, dtype=f64)
    reset = torch.tensor([0, 1, 0, 0, 0, 0]).bool()
    y, state = WAYS[way](layer, x, hx, reset, mask=mask)
    want, end = layer(x[mask], hx, torch.tensor([0, 1, 0, 0]).bool())
    torch.testing.assert_close(y, torch.zeros(T, 18, dtype=f64).index_put((mask,), want))
    torch.testing.assert_close(state, end)
    torch.testing.assert_close(layer(x, hx, reset, mask=torch.ones_like(mask)), layer(x, hx, reset))


def test_without_modules_frozen_quantized_and_an_empty_batch() -> None:
    layer, mask = rnnfast.GRU(5, 9, 2).eval(), MASKS["empty rows"]
    x = torch.randn(T, B, 5)
    want = layer(x, mask=mask)
    weights = [w for of_layer in layer.all_weights for w in of_layer]
    got = rnnfast.functional.gru(x, None, weights, num_layers=2, mask=mask)
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        frozen = copy.deepcopy(layer).freeze()
        for way in WAYS.values():
            torch.testing.assert_close(way(frozen, x, mask=mask), want, rtol=1e-4, atol=1e-5)
        quantized = rnnfast.quantize(copy.deepcopy(layer))
        y, h = quantized(x, mask=mask)
        one, end = quantized(x[MASKS["empty rows"][:, 1], 1])
        torch.testing.assert_close(y[MASKS["empty rows"][:, 1], 1], one)
        torch.testing.assert_close(h[:, 1], end)
        assert not h[:, 0].any()
    for way in WAYS.values():
        y, h = way(layer, x[:, :0], mask=mask[:, :0])
        assert y.shape == (T, 0, 9) and h.shape == (2, 0, 9)


def test_other_engines_and_types() -> None:
    layer, mask = rnnfast.GRU(5, 9, bidirectional=True, recompute=True), MASKS["holes"]
    x, reset = torch.randn(T, B, 5), torch.rand(T, B) < 0.3
    want = layer(x, None, reset, mask=mask)
    with rnnfast.use_engine("reference"):
        for way in ("eager", "operator"):
            torch.testing.assert_close(WAYS[way](layer, x, None, reset, mask=mask), want)
    with torch.autocast("cpu"):
        assert layer(x, mask=mask)[0].dtype == torch.bfloat16
    half = copy.deepcopy(layer).half()
    y, _ = half(x.half(), None, reset, mask=mask)
    torch.testing.assert_close(y.float(), want[0], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("run", [lambda layer, **k: layer(**k), through_an_operator])
def test_second_derivatives(run: Any) -> None:
    mask = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 1, 0]]).bool()
    layer = rnnfast.LSTM(2, 3, bidirectional=True, dtype=f64)
    x = torch.randn(3, 3, 2, dtype=f64, requires_grad=True)
    h = torch.randn(2, 3, 3, dtype=f64, requires_grad=True)

    def f(x: Tensor, h: Tensor) -> Any:
        return tuple(leaves_of(run(layer, input=x, hx=(h, h), mask=mask)))

    assert torch.autograd.gradcheck(f, (x, h))
    assert torch.autograd.gradgradcheck(f, (x, h), atol=1e-6)


def test_transforms(layer: Any) -> None:
    """vmap, per-sample gradients and jvp; masks themselves can't be batched."""
    mask = turned(layer, MASKS["empty rows"])
    x, v = torch.randn(2, 3, *example(layer)[0].shape, dtype=f64).unbind(0)
    got = vmap(lambda one: layer(one, mask=mask)[0])(x)
    want = torch.stack([layer(one, mask=mask)[0] for one in x])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    weights = {k: p.detach() for k, p in layer.named_parameters()}

    def loss(weights: Any, one: Tensor) -> Tensor:
        return functional_call(layer, weights, (one,), {"mask": mask})[0].square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for k, one in enumerate(x):
        layer.zero_grad()
        layer(one, mask=mask)[0].square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(gradients[name][k], p.grad, rtol=1e-9, atol=1e-11)
    _, tangent = jvp(lambda one: layer(one, mask=mask)[0], (x[0],), (v[0],))
    ahead, behind = (layer(x[0] + s * 1e-6 * v[0], mask=mask)[0] for s in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match="rnnfast: mask can't be batched by vmap"):
        vmap(lambda one, m: layer(one, mask=m)[0])(x, mask.expand(3, *mask.shape))


WRONG: dict[str, Any] = {
    "integers": torch.ones(T, B, dtype=torch.int64),
    "shape": torch.ones(B, T, dtype=torch.bool),
    "a row": torch.ones(T, dtype=torch.bool),
    "a list": [[True] * B] * T,
    "meta": torch.ones(T, B, dtype=torch.bool, device="meta"),
}


@pytest.mark.parametrize("way", WAYS)
def test_wrong_masks_raise(way: str) -> None:
    layer, x = rnnfast.GRU(5, 9), torch.randn(T, B, 5)
    for wrong in WRONG if way != "compiled" else ("integers", "shape"):
        with pytest.raises(Exception, match=r"rnnfast: mask must be a bool tensor .*= \(6, 4\)"):
            WAYS[way](layer, x, mask=WRONG[wrong])
    with pytest.raises(Exception, match=r"rnnfast: reset must be a bool tensor .*= \(6, 4\)"):
        WAYS[way](layer, x, None, WRONG["shape"], mask=MASKS["holes"])


def test_what_a_mask_does_not_go_with() -> None:
    layer, x, mask = rnnfast.GRU(5, 9), torch.randn(T, B, 5), MASKS["right"]
    lengths = torch.tensor([2, 6, 1, 4])
    with pytest.raises(RuntimeError, match="rnnfast: lengths or mask say .*, got both"):
        layer(x, lengths=lengths, mask=mask)
    with pytest.raises(RuntimeError, match="rnnfast: mask is for padded input"):
        layer(pack_padded_sequence(x, lengths, enforce_sorted=False), mask=mask)
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D"):
        layer(x[0, 0], mask=mask)
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        layer(x[:0], mask=mask[:0])
    with pytest.raises(TypeError, match="mask"):
        layer.step(x[0], mask=mask[0])
    with pytest.raises(RuntimeError, match="For unbatched 2-D input, hx should also be 2-D"):
        layer(x[:, 0], torch.randn(1, 1, 9), mask=mask[:, 0])


def test_exported_with_dynamic_sizes() -> None:
    layer = rnnfast.LSTM(5, 9, 2, bidirectional=True, batch_first=True).eval()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return self.layer(x, mask=mask)

    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("steps", min=2)}
    shapes = {"x": sizes, "mask": sizes}
    args = torch.randn(B, T, 5), MASKS["holes"].t()
    with torch.no_grad():
        program = torch.export.export(Model(), args, dynamic_shapes=shapes)
        for batch, steps in ((B, T), (3, 11)):
            x, mask = torch.randn(batch, steps, 5), torch.rand(batch, steps) < 0.5
            mask[0] = False
            want, got = leaves_of(layer(x, mask=mask)), leaves_of(program.module()(x, mask))
            torch.testing.assert_close(got, want)


def test_onnx_of_a_masked_layer() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = rnnfast.GRU(5, 9, bidirectional=True, return_last=True)

        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return self.layer(x, mask=mask)

    model = Model().eval()
    with torch.no_grad():
        program = torch.onnx.export(
            model, (torch.randn(T, B, 5), MASKS["holes"]), dynamo=True, verbose=False,
            dynamic_shapes={"x": {0: "T", 1: "B"}, "mask": {0: "T", 1: "B"}},
            custom_translation_table=rnnfast.onnx_translations(),
        )  # fmt: skip
        there = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        names = [one.name for one in there.get_inputs()]
        for steps, batch in ((T, B), (9, 3)):
            x, mask = torch.randn(steps, batch, 5), torch.rand(steps, batch) < 0.5
            mask[:, 0] = False
            got = there.run(None, {names[0]: x.numpy(), names[1]: mask.numpy()})
            for a, b in zip(got, model(x, mask), strict=True):
                torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-4, atol=1e-5)


@works.row(
    "Compilers and export",
    "`mask` of valid steps with holes and empty rows in a compiled graph, training; one graph for "
    "all of them",
    torch_nn="no: no `mask`, and no graph of a layer",
    error="Attempted to (wrap RNN, GRU, or LSTM|call function marked as skipped)|function call",
)
def test_masks_in_a_graph(library: Any, device: torch.device) -> None:
    layer = library.LSTM(5, 9, bidirectional=True, device=device)
    x = torch.randn(T, B, 5, device=device)
    masks = [mask.contiguous().to(device) for mask in MASKS.values()]  # strides are guarded
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(layer, fullgraph=True, backend=counter)
    for mask in masks:
        y, _ = traced(x, mask=mask)
        want, _ = layer(x, mask=mask)
        torch.testing.assert_close(y, want)
        got = torch.autograd.grad(y.sum(), list(layer.parameters()))
        torch.testing.assert_close(got, torch.autograd.grad(want.sum(), list(layer.parameters())))
    assert counter.frame_count == 1


def test_inductor_compiles_it() -> None:
    layer, x = rnnfast.GRU(5, 9), torch.randn(T, B, 5, requires_grad=True)
    torch._dynamo.reset()
    traced = torch.compile(layer, fullgraph=True)
    mask = MASKS["empty rows"]
    reset = torch.rand(T, B) < 0.3
    y, want = traced(x, None, reset, mask=mask)[0], layer(x, None, reset, mask=mask)[0]
    torch.testing.assert_close(y, want)
    for a, b in zip(*(torch.autograd.grad(t.sum(), [x, *layer.parameters()]) for t in (y, want))):
        torch.testing.assert_close(a, b)
