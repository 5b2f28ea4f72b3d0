"""Resets within a sequence: zeros enter the steps that the mask names, no gradient leaves them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import cases
import oracle
import pytest
import tolerance
import torch
from cases import Case
from test_modules import LAYERS, leaves_of
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pad_packed_sequence,
)

import rnnfast
from rnnfast import engine

f64 = torch.float64
close = {"rtol": 1e-10, "atol": 1e-12}


def cutting_direction(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Any,
    mask: Tensor,
    *,
    reverse: bool = False,
    lengths: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The oracle, a step at a time: where the mask is true, zeros stand for the state."""
    steps, batch, _ = x.shape
    _, h, c = oracle.direction(cell, x[:1].detach() * 0, h0, c0, weights)
    h = torch.zeros_like(h) if h0 is None else h0
    if c is not None:
        c = torch.zeros_like(c) if c0 is None else c0
    ys: list[Tensor] = [x] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        cut = mask[t, :, None]
        alive = torch.tensor([steps] * batch if lengths is None else lengths)[:, None] > t
        h = torch.where(cut & alive, torch.zeros_like(h), h)
        if c is not None:
            c = torch.where(cut & alive, torch.zeros_like(c), c)
        y, h_new, c_new = oracle.direction(cell, x[t : t + 1], h, c, weights)
        ys[t] = torch.where(alive, y[0], torch.zeros_like(y[0]))
        h = torch.where(alive, h_new, h)
        if c is not None and c_new is not None:
            c = torch.where(alive, c_new, c)
    return torch.stack(ys), h, c


def mask_of(case: Case, chance: float = 0.3) -> Tensor:
    gen = torch.Generator().manual_seed(case.hidden + case.seq_len)
    return torch.rand(case.seq_len, case.batch, generator=gen) < chance


def op_mask(case: Case, mask: Tensor) -> Tensor:
    return mask if case.lengths is None else oracle.pack_rows(mask, case.lengths)


def reference_results(problem: cases.Problem, mask: Tensor) -> cases.Tensors:
    case = problem.case
    leaves = {
        k: v.detach().double().contiguous().requires_grad_()
        for k, v in problem.inputs.items()
        if v is not None
    }
    y, h_n, c_n = cutting_direction(
        case.cell,
        leaves["x"],
        leaves.get("h0"),
        leaves.get("c0"),
        [leaves.get(k) for k in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")],
        mask,
        reverse=case.reverse,
        lengths=case.lengths,
    )
    outputs = {"y": y, "h_n": h_n} | ({} if c_n is None else {"c_n": c_n})
    grads = cases._gradients(problem, leaves, outputs)
    return cases._flatten_packed(problem, {k: v.detach() for k, v in outputs.items()} | grads)


def op_results(problem: cases.Problem, mask: Tensor) -> cases.Tensors:
    case = problem.case
    leaves, args = cases.op_inputs(problem)
    args[9] = op_mask(case, mask)
    y, h_n, c_n, _ = torch.ops.rnnfast.forward(
        *args, None, oracle.CELL_IDS[case.cell], case.reverse, True
    )
    outputs = {"y": y, "h_n": h_n} | ({"c_n": c_n[0]} if case.cell == "lstm" else {})
    grads = cases._gradients(cases._pack_cotangents(problem), leaves, outputs)
    return {k: v.detach() for k, v in outputs.items()} | grads


def grid() -> list[Case]:
    found = []
    for cell in oracle.CELLS:
        for k, (steps, batch, hidden) in enumerate(
            ((1, 1, 3), (2, 5, 17), (7, 1, 16), (40, 13, 33), (9, 7, 64))
        ):
            for form in range(4):
                packed, reverse = form % 2 == 1, form >= 2
                found.append(
                    Case(cell, steps, batch, 5, hidden, f64, state=k % 2 == 0, packed=packed,
                         reverse=reverse)
                )  # fmt: skip
        # large enough for two threads: one by rows of the batch, one by units (see the test below)
        for reverse, packed in ((False, False), (True, True)):
            found.append(
                Case(cell, 12, 32, 96, 100, f64, reverse=reverse, packed=packed, threads=2)
            )
            hidden = 1000 if cell.startswith("indrnn") else 390
            found.append(
                Case(cell, 4, 3, 200, hidden, f64, reverse=reverse, packed=packed, threads=2)
            )
    for steps, batch, hidden, proj, threads in (
        (7, 6, 9, 4, 1),
        (6, 33, 80, 31, 2),
        (5, 3, 400, 150, 2),
    ):
        for packed, reverse in ((False, False), (True, True)):
            found.append(
                Case("lstm", steps, batch, 40, hidden, f64, proj=proj, packed=packed,
                     reverse=reverse, threads=threads)
            )  # fmt: skip
    return found


@pytest.mark.parametrize("case", grid(), ids=str)
def test_op_equals_the_oracle_cut_by_hand(case: Case) -> None:
    problem, mask = cases.build(case), mask_of(case)
    torch.set_num_threads(case.threads)
    ref = reference_results(problem, mask)
    for kernel in ("packed", "direct"):
        with rnnfast.use_engine("cpu", kernel=kernel):
            got = op_results(problem, mask)
        tolerance.check(got, None, ref, f64)


def test_both_splits_are_among_the_cases() -> None:
    """As the engine chooses them: on a busy machine a call may run on one thread all the same."""
    seen = set()
    for case in grid():
        if case.threads == 2 and not case.packed:
            sizes = (case.seq_len, case.batch, case.input_size, case.hidden, case.hidden)
            cell = oracle.CELL_IDS[case.cell]
            split = torch.ops.rnnfast.choose(4, cell, *sizes, 8, 2)
            seen.add((case.cell, engine.SPLITS[split]))
    assert seen >= {(cell, split) for cell in oracle.CELLS for split in ("batch", "units")}


@pytest.mark.parametrize("cell", oracle.CELLS)
def test_float32(cell: str) -> None:
    case = Case(cell, 9, 6, 5, 33)
    problem, mask = cases.build(case), mask_of(case)
    ref = reference_results(problem, mask)
    for name, got in op_results(problem, mask).items():
        torch.testing.assert_close(got.double(), ref[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cell", oracle.CELLS)
def test_the_same_bits_as_pieces(cell: str, threads: int) -> None:
    """With the kernels forced, a cut sequence is its pieces run one after the other, to the bit."""
    torch.set_num_threads(threads)
    case = Case(cell, 20, 32, 40, 64)
    problem = cases.build(case)
    _, args = cases.op_inputs(problem, grad=False)
    x, h0, c0, *rest = args
    rest = rest[:-1]
    mask = torch.zeros(20, 32, dtype=torch.bool)
    mask[[6, 7, 15]] = True
    tail = (None, oracle.CELL_IDS[cell], False, False)
    for kernel in ("packed", "direct"):
        with rnnfast.use_engine("cpu", kernel=kernel):
            got = torch.ops.rnnfast.forward(x, h0, c0, *rest, mask, *tail)
            y = []
            for begin, end in ((0, 6), (6, 7), (7, 15), (15, 20)):
                states = (h0, c0) if begin == 0 else (None, None)
                piece = torch.ops.rnnfast.forward(x[begin:end], *states, *rest, None, *tail)
                y.append(piece[0])
        for a, b in zip(got[:3], (torch.cat(y), *piece[1:3]), strict=True):
            assert tolerance.same_bits(a, b)


def as_function(case: Case) -> tuple[Callable[..., Any], list[Tensor]]:
    problem = cases.build(case)
    leaves, args = cases.op_inputs(problem)
    mask = op_mask(case, mask_of(case, 0.4))
    assert mask.any() and not mask.all()

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        operands = cases.op_operands(dict(zip(leaves, tensors, strict=True)))
        out = torch.ops.rnnfast.forward(
            *operands, args[8], mask, None, oracle.CELL_IDS[case.cell], case.reverse, True
        )
        return tuple(out[: 3 if case.cell == "lstm" else 2])

    return function, list(leaves.values())


SMALL = [
    Case(cell, 4, 3, 2, 3, f64, packed=packed, reverse=packed)
    for cell in oracle.CELLS
    for packed in (False, True)
] + [Case("lstm", 4, 2, 2, 3, f64, proj=2)]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    function, tensors = as_function(case)
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_opcheck(case: Case) -> None:
    _, args = cases.op_inputs(cases.build(case))
    args[9] = op_mask(case, mask_of(case))
    cell = oracle.CELL_IDS[case.cell]
    forward, backward = torch.ops.rnnfast.forward.default, torch.ops.rnnfast.backward.default
    torch.library.opcheck(forward, (*args, None, cell, case.reverse, True))
    with torch.no_grad():
        y, h_n, c_n, saved = forward(*args, None, cell, case.reverse, True)
    dc_n = torch.randn_like(c_n) if case.cell == "lstm" else None
    given = (torch.randn_like(y), torch.randn_like(h_n), dc_n)
    args = [a.detach() if isinstance(a, Tensor) else a for a in args]
    needs = 127 if case.cell == "lstm" else 123
    torch.library.opcheck(backward, (*given, *args, y, saved, cell, case.reverse, needs))


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_nan_in_the_state_ends_at_a_reset(name: str, engine: str) -> None:
    """A reset at t = 0 drops hx, and its gradient is zero; the rows beside it keep theirs."""
    torch.manual_seed(0)
    layer = getattr(rnnfast, name.split()[0])(5, 17, **LAYERS[name])
    x = torch.randn(4, 3, 5)
    reset = torch.zeros(4, 3, dtype=torch.bool)
    reset[0, 1] = reset[2, 0] = True
    states = [torch.randn(1, 3, 17, requires_grad=True) for _ in range(1 + (name == "LSTM"))]
    x[1, 0] = float("nan")
    x.requires_grad_()
    with torch.no_grad():
        for s in states:
            s[:, 1] = float("nan")
    with rnnfast.use_engine(engine):
        y, _ = layer(x, tuple(states) if name == "LSTM" else states[0], reset)
    assert y[0].isfinite().all() and y[1, 0].isnan().all() and y[2:].isfinite().all()
    assert y[:, 1:].isfinite().all()
    grads = torch.autograd.grad(y[2:].sum() + y[:, 1:].sum(), [x, *states])
    assert grads[0][2:].isfinite().all() and grads[0][:, 1:].isfinite().all()
    for grad in grads[1:]:
        assert torch.equal(grad[:, 1], torch.zeros_like(grad[:, 1]))
        assert grad[:, 2].abs().sum() > 0


@pytest.mark.parametrize("cell", oracle.CELLS)
def test_all_rows_reset_at_the_first_step_need_no_state(cell: str) -> None:
    case = Case(cell, 3, 4, 5, 17, f64)
    problem = cases.build(case)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0] = True
    got = op_results(problem, mask)
    plain = op_results(problem, mask & False)
    for name in ("dh0", "dc0"):
        if name in got:
            assert torch.equal(got[name], torch.zeros_like(got[name])) and plain[name].any()
    inputs = {**problem.inputs, "h0": None, "c0": None}
    none = op_results(cases.Problem(case, inputs, problem.cotangents), mask & False)
    for name, value in none.items():
        assert tolerance.same_bits(got[name], value), name


def pieces(layer: nn.Module, x: Tensor, reset: Tensor, hx: Any) -> Tensor:
    """The output of each row, its episodes run one by one."""
    rows = []
    for b in range(x.size(1)):
        starts = [t for t in range(x.size(0)) if t == 0 or reset[t, b]]
        out = []
        for begin, end in zip(starts, [*starts[1:], x.size(0)], strict=True):
            state = None
            if hx is not None:
                # a direction's own state enters at its own end of the sequence
                ways = 2 if layer.bidirectional else 1
                state = [s[:, b : b + 1].clone() for s in hx]
                for s in state:
                    for k in range(s.size(0)):
                        backwards = ways == 2 and k % 2 == 1
                        if (end != x.size(0)) if backwards else (begin > 0 or reset[0, b]):
                            s[k] = 0
                state = tuple(state) if len(state) == 2 else state[0]
            out.append(layer(x[begin:end, b : b + 1], state)[0])
        rows.append(torch.cat(out))
    return torch.cat(rows, 1)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", [*LAYERS, "IndRNN", "LSTM proj"])
def test_layer_equals_its_pieces(name: str, bidirectional: bool, state: bool) -> None:
    """One layer cut into episodes; h_0 and the h_0 of the second direction enter at their ends."""
    options: dict[str, Any] = {"proj_size": 4} if name == "LSTM proj" else LAYERS.get(name, {})
    layer = getattr(rnnfast, name.split()[0])(
        5, 9, bidirectional=bidirectional, dtype=f64, **options
    )
    x = torch.randn(11, 4, 5, dtype=f64, requires_grad=True)
    reset = torch.rand(11, 4) < 0.25
    reset[0] = torch.tensor([True, False, True, False])
    hx: Any = None
    if state:
        widths = [layer.proj_size or 9] + [9] * (layer.mode == "LSTM")
        hx = [torch.randn(1 + bidirectional, 4, w, dtype=f64, requires_grad=True) for w in widths]
    given = hx if hx is None or len(hx) == 1 else tuple(hx)
    got = layer(x, given[0] if isinstance(given, list) else given, reset)[0]
    want = pieces(layer, x, reset, hx)
    torch.testing.assert_close(got, want, **close)
    inputs = [x, *layer.parameters(), *(hx or [])]
    weight = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((want * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("name", [*LAYERS, "IndRNN"])
def test_stacks_in_all_forms(name: str, engine: str) -> None:
    """Two layers, two directions: padded, batch_first, unbatched, packed and functional agree."""
    kind, options = name.split()[0], {**LAYERS.get(name, {}), "num_layers": 2, "dtype": f64}
    layer = getattr(rnnfast, kind)(5, 9, bidirectional=True, **options)
    first = getattr(rnnfast, kind)(5, 9, bidirectional=True, batch_first=True, **options)
    first.load_state_dict(layer.state_dict())
    lengths = [4, 11, 7, 1]
    x, reset = torch.randn(11, 4, 5, dtype=f64), torch.rand(11, 4) < 0.3

    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with rnnfast.use_engine(engine):
            return module(*args, **kwargs)[0]

    want = torch.cat([pieces_of_stack(layer, x[:, b], reset[:, b]) for b in range(4)], 1)
    torch.testing.assert_close(run(layer, x, reset=reset), want, **close)
    got = run(first, x.transpose(0, 1), reset=reset.t())
    torch.testing.assert_close(got.transpose(0, 1), want, **close)
    torch.testing.assert_close(run(layer, x[:, 1], reset=reset[:, 1]), want[:, 1], **close)

    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    masks = pack_padded_sequence(reset, torch.tensor(lengths), enforce_sorted=False)
    for form in (masks, masks.data):
        got, _ = pad_packed_sequence(run(layer, packed, reset=form))
        for b, n in enumerate(lengths):
            alone = pieces_of_stack(layer, x[:n, b], reset[:n, b])
            torch.testing.assert_close(got[:n, b], alone[:, 0], **close)

    function = getattr(rnnfast.functional, layer.mode.lower())
    weights = list(layer.parameters())
    got, _ = function(x, None, weights, num_layers=2, bidirectional=True, reset=reset)
    torch.testing.assert_close(got, want, **close)


def pieces_of_stack(layer: nn.Module, x: Tensor, reset: Tensor) -> Tensor:
    """Without a state all layers are cut alike, so that whole stacks may be run by pieces."""
    return pieces(layer, x[:, None], reset[:, None], None)


def test_a_reset_reaches_the_second_direction_from_the_other_side() -> None:
    reset = torch.tensor([[True, False], [False, True], [True, False]])
    padded = rnnfast._reset.of_backward_direction(reset, None)
    assert padded.tolist() == [[False, True], [True, False], [False, False]]
    sizes = torch.tensor([3, 2, 1])
    rows = torch.tensor([True, True, True, False, True, True])
    packed = rnnfast._reset.of_backward_direction(rows, sizes)
    assert packed.tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_any_strides(layout: str) -> None:
    layer, x = rnnfast.GRU(5, 9), torch.randn(6, 4, 5)
    reset = torch.rand(6, 4) < 0.4
    if layout == "transposed":
        view = reset.t().contiguous().t()
    elif layout == "strided":
        view = torch.stack([reset, ~reset], -1)[..., 0]
    else:
        view = reset[:, :1].expand(6, 4)
    assert not view.is_contiguous()
    assert tolerance.same_bits(layer(x, reset=view)[0], layer(x, reset=view.contiguous())[0])


def test_accelerated_layers_take_resets() -> None:
    model = rnnfast.accelerate(nn.LSTM(5, 9))
    x, reset = torch.randn(6, 4, 5), torch.rand(6, 4) < 0.4
    ours = rnnfast.LSTM(5, 9)
    ours.load_state_dict(model.state_dict())
    assert tolerance.same_bits(model(x, reset=reset)[0], ours(x, None, reset)[0])
    with torch.no_grad():
        want = ours(x, None, reset)[0]
        torch.testing.assert_close(ours.freeze()(x, None, reset)[0], want)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "IndRNN"])
def test_compile_with_a_mask(name: str) -> None:
    torch._dynamo.reset()
    layer = getattr(rnnfast, name)(5, 9, 2, bidirectional=True, dtype=f64)
    x = torch.randn(6, 4, 5, dtype=f64, requires_grad=True)
    reset = torch.rand(6, 4) < 0.4
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, want = compiled(x, None, reset)[0], layer(x, None, reset)[0]
    torch.testing.assert_close(got, want, **close)
    inputs = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b, **close)


def test_compile_of_packed_masks() -> None:
    torch._dynamo.reset()
    layer = rnnfast.GRU(5, 9, 2, bidirectional=True, dtype=f64)
    sizes, rows = torch.tensor([3, 2, 1]), torch.randn(6, 5, dtype=f64)
    reset = torch.tensor([True, False, False, True, True, False])

    def run(x: Tensor, mask: Tensor) -> Tensor:
        return layer(PackedSequence(x, sizes), reset=mask)[0].data

    with torch.no_grad():
        got = torch.compile(run, backend="aot_eager")(rows, reset)
        torch.testing.assert_close(got, run(rows, reset), **close)


def test_export_with_a_mask() -> None:
    layer = rnnfast.LSTM(5, 9, bidirectional=True).eval()
    x, reset = torch.randn(6, 4, 5), torch.rand(6, 4) < 0.4
    program = torch.export.export(layer, (x,), {"reset": reset})
    for a, b in zip(
        leaves_of(program.module()(x, reset=reset)), leaves_of(layer(x, reset=reset)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_batched_gradients_with_a_mask() -> None:
    layer = rnnfast.GRU(5, 9, dtype=f64)
    x = torch.randn(3, 1, 5, dtype=f64, requires_grad=True)
    y = layer(x, reset=torch.tensor([[False], [True], [False]]))[0]
    basis = torch.eye(y.numel(), dtype=f64).view(-1, *y.shape)
    (got,) = torch.autograd.grad(y, x, basis, is_grads_batched=True, retain_graph=True)
    want = torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in basis])
    torch.testing.assert_close(got, want, **close)
    assert not want[:9, 1:].any() and not want[9:, 0].any()


def bits(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


WRONG: dict[str, tuple[Any, str]] = {
    "batch": (bits(4, 2), r"a bool tensor on cpu of shape \(T, B\) = \(4, 3\), got \(4, 2\) of"),
    "turned": (bits(3, 4), r"\(T, B\) = \(4, 3\), got \(3, 4\) of bool on cpu"),
    "rank": (bits(12), r"\(T, B\) = \(4, 3\), got \(12,\) of bool on cpu"),
    "floats": (torch.zeros(4, 3), r"\(T, B\) = \(4, 3\), got \(4, 3\) of float32 on cpu"),
    "bytes": (bits(4, 3).byte(), r"got \(4, 3\) of uint8 on cpu"),
    "meta": (bits(4, 3).to("meta"), r"got \(4, 3\) of bool on meta"),
    "a list": ([[False] * 3] * 4, r"\(T, B\) = \(4, 3\), got list"),
    "packed": (
        PackedSequence(bits(12), torch.tensor([3, 3, 3, 3])),
        r"\(T, B\) = \(4, 3\), got PackedSequence",
    ),
}


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_masks_of_a_layer(what: str, engine: str) -> None:
    layer, x = rnnfast.LSTM(5, 9), torch.randn(4, 3, 5)
    reset, words = WRONG[what]
    with (
        rnnfast.use_engine(engine),
        pytest.raises(RuntimeError, match="rnnfast: reset must be .*" + words),
    ):
        layer(x, None, reset)


def test_wrong_masks_of_other_forms() -> None:
    layer = rnnfast.GRU(5, 9)
    with pytest.raises(RuntimeError, match=r"reset must be .* of shape \(T,\) = \(4,\), got"):
        layer(torch.randn(4, 5), reset=bits(4, 1))
    first = rnnfast.GRU(5, 9, batch_first=True)
    with pytest.raises(RuntimeError, match=r"\(B, T\) = \(3, 4\), got \(4, 3\) of bool"):
        first(torch.randn(3, 4, 5), reset=bits(4, 3))
    lengths = torch.tensor([2, 4, 1])
    packed = pack_padded_sequence(torch.randn(4, 3, 5), lengths, enforce_sorted=False)
    for wrong, words in (
        (
            bits(4, 3),
            r"PackedSequence like input, .* of shape \(N,\) = \(7,\), got \(4, 3\) of bool",
        ),
        (bits(6), r"\(N,\) = \(7,\), got \(6,\) of bool"),
        (PackedSequence(bits(6), torch.tensor([3, 2, 1])), r"batch_sizes of input, \[3, 2, 1, 1\]"),
        (packed._replace(data=torch.zeros(7)), r"got \(7,\) of float32"),
        (
            PackedSequence(bits(7), packed.batch_sizes, torch.tensor([0, 1, 2])),
            r"sorted_indices = \[1, 0, 2\], got \[0, 1, 2\]",
        ),
        (PackedSequence(bits(7), packed.batch_sizes), r"got \[0, 1, 2\]"),
    ):
        with pytest.raises(RuntimeError, match="rnnfast: reset must be .*" + words):
            layer(packed, reset=wrong)


@pytest.mark.parametrize("packed", [False, True])
def test_ops_refuse_wrong_masks(packed: bool) -> None:
    case = Case("gru", 4, 3, 5, 9, packed=packed)
    _, args = cases.op_inputs(cases.build(case), grad=False)
    rows = sum(case.lengths or [12])
    letters = rf"\(N,\) = \({rows},\)" if packed else r"\(T, B\) = \(4, 3\)"
    good = bits(rows) if packed else bits(4, 3)
    for wrong, words in (
        (bits(5, 3), rf"rnnfast: reset must have shape {letters}, got \(5, 3\)"),
        (bits(rows + 1), rf"rnnfast: reset must have shape {letters}, got \({rows + 1},\)"),
        (good.float(), "rnnfast: reset must be bool, got float32"),
        (good.to("meta"), "rnnfast: reset must be on the same device as x"),
    ):
        args[9] = wrong
        with pytest.raises(RuntimeError, match=words):
            torch.ops.rnnfast.forward(*args, None, 1, False, True)
        if wrong.is_meta:
            continue
        meta = [a.to("meta") if isinstance(a, Tensor) and i != 8 else a for i, a in enumerate(args)]
        with pytest.raises(RuntimeError, match=words):
            torch.ops.rnnfast.forward(*meta, None, 1, False, True)
    args[9] = good
    assert torch.ops.rnnfast.forward(*args, None, 1, False, True)[1].shape == (3, 9)


def test_random_masks_at_random_shapes() -> None:
    rng = random.Random(5)
    for k in range(40):
        cell = rng.choice(oracle.CELLS)
        case = Case(
            cell, rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 6), rng.randint(1, 40), f64,
            packed=rng.random() < 0.5, reverse=rng.random() < 0.5, state=rng.random() < 0.5,
            bias=rng.random() < 0.5, loss=rng.choice(cases.LOSSES),
        )  # fmt: skip
        problem, mask = cases.build(case), mask_of(case, (k % 5) / 4)
        tolerance.check(op_results(problem, mask), None, reference_results(problem, mask), f64)
