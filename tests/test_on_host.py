"""The CUDA engine on a device of loops: its kernels, host side and bindings, without a GPU.

What a GPU adds (its arithmetic, launches, streams, cuBLAS itself) is test_cuda*.py's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import cases
import on_host
import oracle
import pytest
import test_scan
import tolerance
import torch
from cases import Case
from passes import at_once, needs_of, one_by_one, passes_of
from torch import Tensor
from torch._subclasses import FakeTensorMode

import rnnfast
from rnnfast import _cuda
from rnnfast.cells import CELLS, CellSpec

DEVICE = on_host.operators()
CPU = torch.ops.rnnfast
SEED, CAPABILITY, LAUNCHES_LEFT, FLAG = range(4)  # of DEVICE.set

# Products of the device are three loops: large sizes would only be slow.
CASES = [case for case in cases.engine_cases() if case.hidden <= 130]


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    on_host.fill_fresh_memory(0x01)
    yield
    on_host.fill_fresh_memory(0)
    for field, value in ((SEED, 0), (CAPABILITY, 90), (LAUNCHES_LEFT, -1), (FLAG, 0)):
        DEVICE.set(field, value)
    DEVICE.cuda_set_launch(-1)


def run(problem: cases.Problem) -> tolerance.Tensors:
    """As cases.run_rnnfast, on the device."""
    case = problem.case
    leaves, args = cases.op_inputs(problem)
    cell = oracle.CELL_IDS[case.cell]
    y, h_n, c_n, _ = DEVICE.forward(*args, None, cell, case.reverse, True)
    plain = DEVICE.forward(
        *(t.detach() if isinstance(t, Tensor) else t for t in args), None, cell, case.reverse, False
    )
    assert plain[3].numel() == 0, "nothing is kept where nobody asked"
    for kept, same in zip((y, h_n, c_n), plain, strict=False):
        assert tolerance.same_bits(kept.detach(), same)
    outputs = {"y": y, "h_n": h_n}
    if case.cell == "lstm":
        outputs["c_n"] = c_n[0]
    grads = cases._gradients(cases._pack_cotangents(problem), leaves, outputs)
    return {k: v.detach() for k, v in outputs.items()} | grads


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case) -> None:
    """Every pair of options and sizes, against float64."""
    problem, ref, peer = cases.solved(case)
    tolerance.check(run(problem), peer, ref, case.dtype)


HALVES = [
    Case(cell, 5, 6, 5, 17, dtype, reverse=packed, packed=packed)
    for cell in oracle.CELLS
    for dtype in (torch.bfloat16, torch.float16)
    for packed in (False, True)
]


@pytest.mark.parametrize("case", HALVES, ids=str)
def test_halves(case: Case) -> None:
    """16 bits: rounded h and gradients of gates, all else in float32."""
    problem = cases.build(case)
    ref = cases.run_oracle(problem)
    eps = torch.finfo(case.dtype).eps
    for name, value in run(problem).items():
        assert value.dtype == case.dtype
        scale = tolerance.biggest(ref[name])
        error = tolerance.biggest(value.double() - ref[name])
        assert error <= 6 * eps * scale, f"{name}: {error / eps / scale:.1f} roundings"


SCANS = [(1, 1, 1), (7, 3, 17), (300, 2, 100), (40, 1, 700), (1030, 2, 3)]  # T, B, H


@pytest.mark.parametrize("dtype", test_scan.DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SCANS, ids=str)
def test_scans(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """One kernel for many columns, three for long sequences of few, whose chunks may grow."""
    for reverse in (False, True):
        (a, b, h0), dh, exact = test_scan.problem(sizes, dtype, reverse)
        h = DEVICE.scan(a, b, h0, reverse)
        found = [h, *DEVICE.scan_backward(dh, a, h, h0, reverse, 7)]
        for mine, want in zip(found, exact, strict=True):
            error = (mine.double() - want).abs().max()
            assert error <= 8 * torch.finfo(dtype).eps * want.abs().max()
        rows = a.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(DEVICE.scan(rows, b, h0, reverse), h)
    one = torch.ones(1030, 1, 3)
    assert torch.equal(DEVICE.scan(2 * one, one, -one[0], False), -one)
    only_b = DEVICE.scan_backward(dh, a, h, None, True, 2)
    assert [t.numel() for t in only_b] == [0, a.numel(), 0]


BATCHES = [(5, 2, 3, 1), (4, 70, 2, 33), (9, 31, 1, 8)]  # T, B, I, H


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", BATCHES, ids=str)
def test_batch_norms(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """As the CPU engine, kept planes and statistics too; columns far from zero in float32."""
    steps, batch, inputs, H = sizes
    shapes = [(steps, batch, inputs), (batch, H), (1, batch, H), (4 * H, inputs), (4 * H, H)]
    shapes += [(4 * H,)] * 3 + [(H,)] * 2 + [(3, 9 * H)]
    given = [torch.randn(shape, dtype=dtype) for shape in shapes]
    given[0] += 100
    tail = (*given[-1:], given[-1].abs() + 0.5)
    exact = dtype == torch.float64
    near = {"rtol": 1e-10, "atol": 1e-11} if exact else {"rtol": 1e-3, "atol": 1e-3}
    sizes_of = torch.tensor([batch, *[max(1, batch - 1 - t) for t in range(1, steps)]])
    for packed, training in itertools.product((False, True), repeat=2):
        x = given[0] if not packed else given[0].flatten(0, 1)[: int(sizes_of.sum())]
        rows = sizes_of if packed else None
        found = [
            ops.batch_norm_forward(x, *given[1:10], *tail, rows, training, 0.5, True)
            for ops in (CPU, DEVICE)
        ]
        for mine, want in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(mine, want, **near)
        y, h_n, c_n, mean, var, saved = found[0]
        back = (x, *given[1:10], rows, y, mean, var, saved, training, 0.5)
        for dout in ((torch.cos(y), torch.sin(h_n), torch.sin(c_n)), (None, h_n, None)):
            want, mine, without = (
                ops.batch_norm_backward(*dout, *back, needs)
                for ops, needs in ((CPU, True), (DEVICE, True), (DEVICE, False))
            )
            if exact:
                close(list(mine), list(want))
            assert without[0].numel() == 0
            assert all(torch.equal(a, b) for a, b in zip(mine[1:], without[1:], strict=True))


def test_batch_norm_errors() -> None:
    layer = rnnfast.BatchNormLSTM(4, 5, max_steps=3, dtype=torch.float64)
    weights, h = list(layer.parameters()), torch.zeros(3, 5, dtype=torch.float64)
    args = (
        torch.randn(6, 3, 4, dtype=torch.float64), h, h[None], *weights,
        *layer.buffers(), None, True, 1e-5, False,
    )  # fmt: skip
    DEVICE.set(LAUNCHES_LEFT, 2)
    words = r"failed in batch_norm_forward \(lstm, float64, T=6 B=3 I=4 H=5\): cudaErrorUnknown"
    with pytest.raises(RuntimeError, match=words):
        DEVICE.batch_norm_forward(*args)
    DEVICE.set(LAUNCHES_LEFT, -1)
    DEVICE.cuda_set_launch(1)
    DEVICE.batch_norm_forward(*args)
    assert DEVICE.launches(0) == 6 and DEVICE.cuda_last_run(6) == 0
    before = DEVICE.cuda_set_kernel(1)
    try:
        with pytest.raises(RuntimeError, match="on-chip engine has no batch normalisation"):
            DEVICE.batch_norm_forward(*args)
    finally:
        DEVICE.cuda_set_kernel(before)
    assert DEVICE.cuda_last_run(5) == 0
    DEVICE.set(FLAG, 1)
    DEVICE.batch_norm_forward(*args)
    assert DEVICE.cuda_last_run(5) == 0, "float64 has no TF32"
    DEVICE.batch_norm_forward(*(a.float() if isinstance(a, Tensor) else a for a in args))
    assert DEVICE.cuda_last_run(5) == 1
    DEVICE.set(CAPABILITY, 75)
    with pytest.raises(RuntimeError, match=r"compute capability 8.0 or higher, got 7.5"):
        DEVICE.batch_norm_forward(*args)


# --------------------------------------------------------------------------- whole passes


def close(a: list[Tensor], b: list[Tensor]) -> None:
    for got, want in zip(a, b, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


FORMS = [("plain", {}), ("packed", {"packed": True}), ("without", {"state": False, "reset": False})]


@pytest.mark.parametrize("cell", range(len(CELLS)), ids=[c.name for c in CELLS])
@pytest.mark.parametrize(("form", "options"), FORMS, ids=[name for name, _ in FORMS])
@pytest.mark.parametrize("chained", [False, True], ids=["directions", "layers"])
def test_resets_states_and_groups(
    cell: int, form: str, options: dict[str, Any], chained: bool
) -> None:
    """As the CPU engine, pass by pass and at once."""
    x, passes, sizes = passes_of(cell, 3 if chained else 2, chained, **options)
    want = one_by_one(CPU, x, passes, sizes, cell, chained)
    alone = one_by_one(DEVICE, x, passes, sizes, cell, chained)
    together = at_once(DEVICE, x, passes, sizes, cell, chained)
    for found in (alone, together):
        close(found[0], want[0])
        close(found[1], want[1])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("chained", [False, True], ids=["directions", "layers"])
def test_projection(chained: bool, packed: bool) -> None:
    x, passes, sizes = passes_of(0, 2, chained, proj=True, packed=packed)
    want = one_by_one(CPU, x, passes, sizes, 0, chained)
    for how in (one_by_one, at_once):
        found = how(DEVICE, x, passes, sizes, 0, chained)
        close(found[0], want[0])
        close(found[1], want[1])


MASKED = [
    (spec, form, options)
    for spec in CELLS
    if spec.keeps or spec.name in ("lstm", "gru", "rnn_tanh")
    for form, options in [*FORMS, ("projected", {"proj": True})]
    if form != "projected" or spec.name == "lstm"
]


@pytest.mark.parametrize(
    ("spec", "form", "options"), MASKED, ids=[f"{spec.name}-{form}" for spec, form, _ in MASKED]
)
def test_masks(spec: CellSpec, form: str, options: dict[str, Any]) -> None:
    """Zoneout, drawn and expected, and dropout of h."""
    x, (given,), sizes = passes_of(spec.id, 1, False, **options)
    *t, reset = given.values()
    zone = torch.rand(*x.shape[:-1], spec.states, 5) < 0.4
    kept = torch.rand(3, given["w_hh"].size(-1)) < 0.6
    masks: list[Any] = [(None, kept, 0.0, 0.0, 1.25)]
    if spec.keeps:
        masks += [(zone, None, 0.0, 0.0, 1.0), (zone, kept, 0.3, 0.6, 2.5)]
    for zone_or_none, h_kept, *numbers in masks:
        rows = (*t, sizes, reset, zone_or_none, h_kept)
        for reverse in (False, True):
            found = []
            for ops in (CPU, DEVICE):
                y, h_n, c_n, saved = ops.forward_masked(
                    x, *rows, None, *numbers, spec.id, reverse, True
                )
                grads = ops.backward_masked(
                    torch.cos(y), torch.sin(h_n), torch.sin(c_n), x, *rows, y, saved, *numbers,
                    spec.id, reverse, needs_of(given),
                )  # fmt: skip
                found.append([y, h_n, c_n, saved, *grads])
            close(*found)


@pytest.mark.parametrize("cell", [0, 1, 4], ids=["lstm", "gru", "indrnn_tanh"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("chained", [False, True], ids=["directions", "layers"])
def test_any_order_of_the_streams_gives_the_same_bits(
    cell: int, packed: bool, chained: bool
) -> None:
    """The device runs its streams in an order of its own: only events hold it back. A result that
    depends on the order is a missing event."""
    x, passes, sizes = passes_of(cell, 4 if chained else 2, chained, packed=packed)
    first = None
    for seed in range(25):
        DEVICE.set(SEED, seed)
        found = at_once(DEVICE, x, passes, sizes, cell, chained)
        assert DEVICE.cuda_last_run(3) == len(passes), "a stream each"
        bits = [t for side in found for t in side]
        first = first or bits
        assert all(tolerance.same_bits(a, b) for a, b in zip(bits, first, strict=True)), seed


# --------------------------------------------------------------------------- launches and errors


@pytest.mark.parametrize("launch", [0, 1], ids=_cuda.LAUNCHES)
def test_launches_a_step(launch: int) -> None:
    """A kernel a step beside its product; a recurrence without one takes all steps at once."""
    DEVICE.cuda_set_launch(launch)
    for cell, steps in ((0, 37), (1, 37), (4, 1)):
        x, (p,), _ = passes_of(cell, 1, False, reset=False)
        *t, reset = p.values()
        DEVICE.forward(x, *t, None, reset, None, cell, False, False)
        assert DEVICE.launches(0) == steps
        # what follows a product may be launched before that has ended
        assert DEVICE.launches(1) == (steps if launch == 1 and steps > 1 else 0)
        assert DEVICE.cuda_last_run(2) == launch


@pytest.mark.parametrize("after", [0, 1, 20])
@pytest.mark.parametrize("chained", [False, True], ids=["directions", "layers"])
def test_a_failed_launch_is_told(after: int, chained: bool) -> None:
    """Engine, kernel, cell, dtype and shape; and the next call is none the worse."""
    x, passes, sizes = passes_of(1, 2, chained, dtype=torch.float32)
    DEVICE.set(LAUNCHES_LEFT, after)
    words = (
        r"rnnfast: the CUDA engine failed in forward_steps \(gru, float32, "
        r"T=37 B=3 I=4 H=5\): cudaErrorUnknown"
    )
    with pytest.raises(RuntimeError, match=words):
        at_once(DEVICE, x, passes, sizes, 1, chained)
    DEVICE.set(LAUNCHES_LEFT, -1)
    at_once(DEVICE, x, passes, sizes, 1, chained)


def test_an_old_device_is_refused() -> None:
    x, (p,), _ = passes_of(0, 1, False)
    *t, reset = p.values()
    DEVICE.set(CAPABILITY, 75)
    with pytest.raises(RuntimeError, match=r"compute capability 8.0 or higher, got 7.5"):
        DEVICE.forward(x, *t, None, reset, None, 0, False, False)


def test_packed_weights_are_refused() -> None:
    x, (p,), _ = passes_of(0, 1, False)
    *t, reset = p.values()
    packed = CPU.pack(p["w_ih"], p["w_hh"], None, 0)
    with pytest.raises(RuntimeError, match="packed weights are for the CPU engine"):
        DEVICE.forward(x, *t, None, reset, packed, 0, False, False)


def test_tf32_only_where_it_is_allowed() -> None:
    """With torch's flag products of float32 round to TF32, without it whatever the handle says."""
    case = Case("lstm", 3, 4, 40, 64, torch.float32)
    problem, ref, peer = cases.solved(case)
    tolerance.check(run(problem), peer, ref, case.dtype)
    assert DEVICE.cuda_last_run(5) == 0
    DEVICE.set(FLAG, 1)
    error = tolerance.biggest(run(problem)["y"].double() - ref["y"])
    assert 1e-5 < error < 1e-2
    assert DEVICE.cuda_last_run(5) == 1


def test_torch_is_asked_for_its_flag() -> None:
    """By an operator that Python implements, which every thread and every graph reaches."""
    asked = torch.ops.rnnfast.tf32_allowed
    flags: Any = torch.backends.cudnn.rnn
    before = flags.fp32_precision
    try:
        for value in ("tf32", "ieee"):
            flags.fp32_precision = value
            assert asked() is _cuda.is_tf32_allowed() is (value == "tf32")
    finally:
        flags.fp32_precision = before


def test_double_precision_ignores_the_flag() -> None:
    DEVICE.set(FLAG, 1)
    case = Case("gru", 3, 4, 16, 17, torch.float64)
    problem, ref, peer = cases.solved(case)
    tolerance.check(run(problem), peer, ref, case.dtype)


# --------------------------------------------------------------------------- the choice


LSTM, GRU = 0, 1
# (cell, (T, B, I, H, P), itemsize, capability, count, chained, wish) -> (launch, streams, steps)
CHOICES = [
    ((LSTM, (100, 32, 512, 512, 512), 2, 90, 1, False, -1), ("plain", 1, 100)),
    ((LSTM, (100, 32, 512, 512, 512), 2, 90, 1, False, 1), ("pdl", 1, 100)),
    ((LSTM, (100, 32, 512, 512, 512), 2, 90, 1, False, 0), ("plain", 1, 100)),
    # dependent launches came with compute capability 9.0
    ((LSTM, (100, 32, 512, 512, 512), 2, 80, 1, False, 1), ("plain", 1, 100)),
    # an input projection takes 512 MiB at most: of 16 bits it is kept in 32
    ((LSTM, (1024, 256, 64, 2048, 2048), 2, 90, 1, False, -1), ("plain", 1, 64)),
    ((LSTM, (1024, 256, 64, 2048, 2048), 4, 90, 1, False, -1), ("plain", 1, 64)),
    ((LSTM, (1024, 256, 64, 2048, 2048), 8, 90, 1, False, -1), ("plain", 1, 32)),
    ((GRU, (1024, 256, 64, 2048, 2048), 4, 90, 1, False, -1), ("plain", 1, 85)),
    ((LSTM, (2, 2**20, 64, 512, 512), 4, 90, 1, False, -1), ("plain", 1, 1)),
    ((LSTM, (100, 0, 64, 512, 512), 4, 90, 1, False, -1), ("plain", 1, 100)),
    # both directions at the same time
    ((GRU, (100, 16, 256, 256, 256), 4, 90, 2, False, -1), ("plain", 2, 100)),
    # layers follow each other: 16 chunks, but of no fewer than 512 rows
    ((LSTM, (1024, 64, 256, 256, 256), 2, 90, 4, True, -1), ("plain", 4, 64)),
    ((LSTM, (1024, 1, 256, 256, 256), 2, 90, 4, True, -1), ("plain", 4, 512)),
    ((LSTM, (160, 256, 256, 256, 256), 2, 90, 2, True, -1), ("plain", 2, 10)),
    ((LSTM, (1, 64, 256, 256, 256), 2, 90, 4, True, -1), ("plain", 1, 1)),
    ((LSTM, (64, 64, 256, 256, 256), 2, 90, 12, True, -1), ("plain", 8, 8)),
]


@pytest.mark.parametrize(("given", "wanted"), CHOICES)
def test_choose_cuda(given: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    *passes, count, chained, wish = given
    assert _cuda.Passes(*passes, 0, count, chained).choose(wish)[:3] == wanted


def test_choose_cuda_refuses() -> None:
    sizes = (10, 4, 8, 8, 8)
    with pytest.raises(RuntimeError, match="capability 8.0 or higher, got 7.0"):
        _cuda.Passes(0, sizes, 4, 70).choose()
    passes = _cuda.Passes(0, sizes, 4, 90)
    with pytest.raises(RuntimeError, match="launch must be -1"):
        passes.choose(launch=2)
    with pytest.raises(RuntimeError, match="kernel must be -1"):
        passes.choose(kernel=2)
    with pytest.raises(RuntimeError, match="count must be in"):
        _cuda.Passes(0, sizes, 4, 90, count=0).choose()
    with pytest.raises(RuntimeError, match="field must be 0"):
        CPU.choose_cuda(4, 90, 0, -1, -1, False, 1, False, False, 0, *sizes, 4)


# --------------------------------------------------------------------------- the way there


@pytest.fixture
def _no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake parameters need none, and a torch without CUDA could not draw them."""
    for kind in (torch.nn.RNNBase, torch.nn.RNNCellBase):
        monkeypatch.setattr(kind, "reset_parameters", lambda self: None)


@pytest.mark.usefixtures("_no_numbers")
def test_layers_on_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake CUDA tensors go all the way from the layers to the operators: eager calls and graphs.
    (Autograd would ask the device, which a torch without CUDA does not survive.)"""
    monkeypatch.setattr(_cuda, "why_not_on", lambda device: "")
    with FakeTensorMode(), torch.no_grad():
        x, row = torch.empty(5, 3, 4, device="cuda"), torch.empty(3, 4, device="cuda")
        stacked = rnnfast.LSTM(4, 8, num_layers=2, bidirectional=True, device="cuda")
        y, (h_n, c_n) = stacked(x)
        assert y.shape == (5, 3, 16) and h_n.shape == c_n.shape == (4, 3, 8)
        assert y.device.type == h_n.device.type == "cuda"
        layer = rnnfast.GRU(4, 8, device="cuda")
        compiled = torch.compile(lambda x: layer(x)[0], backend="eager", fullgraph=True)
        assert compiled(x).device.type == "cuda"
        assert layer.step(row)[0].device.type == "cuda"
        assert rnnfast.LSTMCell(4, 8, device="cuda")(row)[0].device.type == "cuda"
        with (
            rnnfast.use_engine("cpu"),
            pytest.raises(RuntimeError, match='engine "cpu" was forced, got a tensor on cuda'),
        ):
            layer(x)


@pytest.mark.usefixtures("_no_numbers")
def test_without_the_engine_the_error_says_why() -> None:
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(5, 3, 4, device="cuda")
        layer = rnnfast.GRU(4, 8, device="cuda")
        if not _cuda.why_not():
            return  # it is there
        with pytest.raises(RuntimeError, match=r"no engine can run on cuda.*(has no CUDA|no CUDA)"):
            layer(x)
        plain = torch.nn.GRU(4, 8, device="cuda")
        assert type(rnnfast.accelerate(plain)) is torch.nn.GRU
        assert rnnfast.explain(layer).rows[0].engine == "none"
