"""float16 and bfloat16 layers on the CPU: what is rounded where, gradients, layers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import cases
import oracle
import pytest
import rounded
import tolerance
import torch
from cases import Case, Problem, Tensors
from rounded import HALVES, ISAS
from tolerance import biggest
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import rnnfast

bf16 = torch.bfloat16
halves = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
cells = pytest.mark.parametrize("cell", oracle.CELLS)


def rounding(dtype: torch.dtype, value: Tensor) -> Tensor:
    """Half an ulp of each number, at most: what rounding to the type may cost."""
    info = torch.finfo(dtype)
    return (value.abs() * info.eps / 2).clamp_min(info.smallest_normal * info.eps / 2)


def check_model(problem: Problem, ours: Tensors, where: str) -> None:
    """Results are the float64 model's, rounded once; float32 sums cost a few float32 ulp."""
    dtype, proj = problem.case.dtype, problem.case.proj
    want = rounded.model(problem, rounded.to_half(dtype), ours["y"])
    for name, value in want.items():
        if not value.numel():
            continue
        # sums of float32 and, in front of a projection, an m that nobody sees and that float32
        # may round to the other side
        sums = 32 * torch.finfo(torch.float32).eps * max(biggest(value), 1e-3)
        hidden = torch.finfo(dtype).eps if proj else 0.0
        allowed = 1.001 * rounding(dtype, value) + sums + hidden
        error = (ours[name].double() - value).abs()
        assert ours[name].dtype == dtype
        assert bool((error <= allowed).all()), (
            f"{problem.case} {where} {name}: off by {float((error - allowed).max()):.3g} more than"
            " a rounding"
        )


@pytest.mark.parametrize("kernel", ["packed", "direct", "frozen"])
@pytest.mark.parametrize("isa", ISAS)
@halves
@cells
def test_forward_is_the_model(cell: str, dtype: torch.dtype, isa: str, kernel: str) -> None:
    for case in rounded.shapes(cell, dtype):
        problem = rounded.problem_of(case)
        torch.set_num_threads(case.threads)
        forced = "packed" if kernel == "frozen" else kernel
        with rnnfast.use_engine("cpu", isa=isa, kernel=forced):
            w = [problem.inputs[k] for k in ("w_ih", "w_hh", "w_hr")]
            packed = None
            if kernel == "frozen":
                packed = torch.ops.rnnfast.pack(*w, oracle.CELL_IDS[cell])
            ours = rounded.forward(problem, packed)
        if case.batch:
            ran = rnnfast.last_run()
            dot = dtype == bf16 and kernel != "direct"
            assert ran["isa"] == rnnfast.engine.ran_isa(isa, dot) and ran["kernel_ih"] == forced
        torch.set_num_threads(1)
        check_model(problem, ours, f"{isa} {kernel}")


@halves
@cells
def test_the_shapes_take_every_split(cell: str, dtype: torch.dtype) -> None:
    number = oracle.CELL_IDS[cell]
    shapes = [c for c in rounded.shapes(cell, dtype) if c.threads == 2 and not c.proj]
    sizes = [(c.seq_len, c.batch, c.input_size, c.hidden, c.hidden) for c in shapes]
    splits = {rnnfast.engine.choose(number, each, 2, 2)[4] for each in sizes}
    if cell in rounded.LARGE:
        assert "units" in splits
    else:
        assert "batch" in splits


@halves
@cells
def test_error_is_that_of_the_model_and_of_torch(cell: str, dtype: torch.dtype) -> None:
    """Against exact arithmetic: rounding h at each step and y once explain the error, and torch.nn
    in the same type has no smaller one."""
    for case in [
        Case(cell, 40, 5, 16, 33, dtype),
        Case(cell, 7, 33, 40, 100, dtype, packed=True),
        Case(cell, 3, 6, 5, 64, dtype, reverse=True),
    ]:
        problem = rounded.problem_of(case)
        exact = rounded.model(problem, lambda rows: rows, None)
        modelled = rounded.model(problem, rounded.to_half(dtype), None)
        ours = rounded.forward(problem, None)
        peer: Tensors | None = None
        if cell in oracle.TORCH_CELLS:
            peer = cases.run_torch(problem)
            assert peer is not None
            if case.lengths is not None:
                peer["y"] = rounded.padded(peer["y"], case.lengths)
        for name, ref in exact.items():
            half_ulp = torch.finfo(dtype).eps / 2 * biggest(ref)
            error = biggest(ours[name].double() - ref)
            by_model = biggest(modelled[name].to(dtype).double() - ref)
            assert error <= by_model + half_ulp, f"{case} {name}: {error:.3g}, model {by_model:.3g}"
            if peer is not None:
                theirs = biggest(peer[name].double() - ref)
                assert error <= theirs + half_ulp, f"{case} {name}: {error:.3g}, torch {theirs:.3g}"


@halves
@cells
def test_instruction_sets_and_kernels_agree(cell: str, dtype: torch.dtype) -> None:
    """To a few ulp: a float32 sum on the other side of a tie moves h by an ulp at most."""
    problem = rounded.problem_of(Case(cell, 5, 33, 33, 65, dtype))
    results = []
    for isa in ISAS:
        for kernel in ("packed", "direct"):
            with rnnfast.use_engine("cpu", isa=isa, kernel=kernel):
                results.append(rounded.forward(problem, None))
    for other in results[1:]:
        for name, value in results[0].items():
            gap = biggest(other[name].double() - value.double())
            assert gap <= 2 * torch.finfo(dtype).eps * biggest(value.double()), name


@pytest.mark.parametrize("isa", ISAS)
@halves
def test_threads_do_not_change_a_bit(dtype: torch.dtype, isa: str) -> None:
    large = [Case(cell, 3, 9, 40, hidden, dtype) for cell, hidden in rounded.LARGE.items()]
    small = [Case(cell, 9, 40, 65, 130, dtype) for cell in oracle.CELLS]
    for case in [*large, *small, Case("lstm", 5, 40, 16, 100, dtype, proj=17, packed=True)]:
        problem = rounded.problem_of(case)
        for kernel in ("packed", "direct"):
            with rnnfast.use_engine("cpu", isa=isa, kernel=kernel):
                one = rounded.forward(problem, None)
                torch.set_num_threads(2)
                for split in ("batch", "units"):
                    with rnnfast.use_engine("cpu", split=split):
                        two = rounded.forward(problem, None)
                    assert all(tolerance.same_bits(one[k], two[k]) for k in one), f"{case} {split}"
                torch.set_num_threads(1)
    torch.set_num_threads(2)
    problem = rounded.problem_of(small[0])
    for split in ("batch", "units"):
        assert cases.is_taken(split, lambda: rounded.forward(problem, None))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_threads_whose_rows_have_all_ended(kind: str, dtype: torch.dtype, isa: str) -> None:
    """Most rows end within the first chunk of steps: then most threads have nothing to do."""
    layer = getattr(rnnfast, kind)(8, 24, dtype=dtype)
    lengths = [300, 290, *[3] * 30]
    packed = pack_sequence([torch.randn(n, 8, dtype=dtype) for n in lengths])

    def run(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        with torch.no_grad(), rnnfast.use_engine("cpu", isa=isa, split="batch"):
            return layer(packed)[0].data

    alone = run(1)
    assert torch.equal(run(2), alone)
    assert torch.equal(run(4), alone)


# --------------------------------------------------------------------------- gradients


def gradient_cases(cell: str, dtype: torch.dtype) -> list[Case]:
    found = [
        Case(cell, 1, 1, 1, 1, dtype),
        Case(cell, 3, 2, 5, 7, dtype, reverse=True),
        Case(cell, 4, 3, 3, 4, dtype, packed=True, bias=False),
        Case(cell, 2, 2, 4, 5, dtype, state=False, loss="y"),
        Case(cell, 3, 2, 4, 5, dtype, loss="state"),
    ]
    if not cell.endswith("relu"):  # more numbers than would keep away from its kink
        found.append(Case(cell, 12, 17, 33, 40, dtype, threads=2))
    if cell == "lstm":
        found.append(Case(cell, 3, 5, 6, 17, dtype, proj=6))
    return found


def away_from_the_kink(case: Case) -> Problem:
    """relu's derivative jumps where h, which is rounded, may make the difference."""
    for seed in range(2000):
        problem = cases._draw(case, seed)
        margins: list[float] = []
        wide = {k: cases._as64(v) for k, v in problem.inputs.items()}
        cases._oracle_outputs(problem, wide, margins)
        if min(margins, default=1.0) > 4 * torch.finfo(case.dtype).eps:
            return problem
    raise AssertionError(f"no draw of {case} keeps away from relu's kink")


@halves
@cells
def test_gradients(cell: str, dtype: torch.dtype) -> None:
    """Against the float64 oracle at the same 16-bit numbers.

    Forward rounded h at each step and gave y rounded, backward reads both, and each gradient is
    rounded once: a few ulp of the largest, and about what torch.nn loses in the type.
    """
    for case in gradient_cases(cell, dtype):
        problem = away_from_the_kink(case)
        ref = cases.run_oracle(problem)
        peer = cases.run_torch(problem)
        torch.set_num_threads(case.threads)
        ours = cases.run_rnnfast(problem)
        torch.set_num_threads(1)
        assert ours.keys() == ref.keys()
        for name, value in ref.items():
            assert ours[name].dtype == dtype and ours[name].shape == value.shape
            error = biggest(ours[name].double() - value)
            ulp = torch.finfo(dtype).eps * biggest(value)
            assert error <= 2 * ulp, f"{case} {name}: {error / ulp:.2f} ulp of the largest"
            if peer is not None:
                theirs = biggest(peer[name].double() - value)
                assert error <= 1.5 * theirs + ulp, (
                    f"{case} {name}: {error:.3g}, torch {theirs:.3g}"
                )


@halves
@cells
def test_backward_is_float32s_on_what_forward_left(cell: str, dtype: torch.dtype) -> None:
    """Widened once, rounded once: the bits of the float32 operator on the same numbers."""
    case = Case(cell, 5, 7, 9, 33, dtype)
    problem = rounded.problem_of(case)
    _, args = cases.op_inputs(problem, grad=False)
    number = oracle.CELL_IDS[cell]
    y, _, _, saved = torch.ops.rnnfast.forward(*args, None, number, False, True)
    assert saved.dtype == torch.float32
    needs = sum(1 << k for k, a in enumerate(args[:8]) if a is not None)
    dy = torch.randn(y.shape).to(dtype)
    ours = torch.ops.rnnfast.backward(dy, None, None, *args, y, saved, number, False, needs)
    wide = [None if a is None else a.float() for a in (dy, None, None, *args[:8], None, None, y)]
    theirs = torch.ops.rnnfast.backward(*wide, saved, number, False, needs)
    for got, want in zip(ours, theirs, strict=True):
        assert tolerance.same_bits(got, want.to(dtype))


LAYERS: dict[str, Any] = {
    "LSTM": lambda **k: rnnfast.LSTM(5, 9, 2, bidirectional=True, **k),
    "LSTM proj": lambda **k: rnnfast.LSTM(5, 9, proj_size=4, **k),
    "GRU": lambda **k: rnnfast.GRU(5, 9, batch_first=True, **k),
    "RNN": lambda **k: rnnfast.RNN(5, 9, bias=False, **k),
    "IndRNN": lambda **k: rnnfast.IndRNN(5, 9, nonlinearity="tanh", **k),
}


@pytest.fixture(params=LAYERS)
def make(request: pytest.FixtureRequest) -> Any:
    return LAYERS[request.param]


def test_double_backward(make: Any) -> None:
    """In 16 bits, through the reference: near float64's."""
    layer = make(dtype=bf16)
    wide = copy.deepcopy(layer).double()
    found = []
    for module in (layer, wide):
        dtype = next(module.parameters()).dtype
        gen = torch.Generator().manual_seed(1)
        x = torch.randn(3, 2, 5, generator=gen).to(bf16).to(dtype).requires_grad_()
        (dx,) = torch.autograd.grad(module(x)[0].double().square().sum(), x, create_graph=True)
        weight = module.weight_ih_l0
        found.append(torch.autograd.grad(dx.double().square().sum(), [x, weight]))
    for got, want in zip(*found, strict=True):
        assert got.dtype == bf16
        assert biggest(got.double() - want) <= 8 * torch.finfo(bf16).eps * biggest(want)


# --------------------------------------------------------------------------- layers as a whole


@halves
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_layers_against_torch(kind: str, dtype: torch.dtype) -> None:
    """Two layers, two directions, each way of giving input; y is rounded between layers."""
    theirs = getattr(nn, kind)(11, 33, 2, bidirectional=True, dtype=dtype)
    ours = rnnfast.accelerate(copy.deepcopy(theirs))
    exact = copy.deepcopy(theirs).double()
    assert type(ours) is getattr(rnnfast, kind), "16-bit layers are swapped"
    x = torch.randn(9, 6, 11).to(dtype)
    ragged = pack_sequence([x[:n, b] for b, n in enumerate((9, 7, 7, 3, 2, 1))])
    wide = ragged._replace(data=ragged.data.double())
    h0 = torch.randn(4, 6, 33).to(dtype)
    hx: Any = (h0, h0 / 2) if kind == "LSTM" else h0
    hx64: Any = (h0.double(), h0.double() / 2) if kind == "LSTM" else h0.double()
    for given, given64 in (
        ((x,), (x.double(),)),
        ((x, hx), (x.double(), hx64)),
        ((ragged,), (wide,)),
    ):
        with torch.no_grad():
            outs = [m(*a) for m, a in ((ours, given), (theirs, given), (exact, given64))]
        for got, peer, ref in zip(*map(_tensors, outs), strict=True):
            assert got.dtype == dtype
            allowed = biggest(peer.double() - ref) + torch.finfo(dtype).eps / 2 * biggest(ref)
            assert biggest(got.double() - ref) <= allowed
    assert type(rnnfast.restore(ours)) is getattr(nn, kind)


def _tensors(out: Any) -> list[Tensor]:
    y, state = out
    return [getattr(y, "data", y), *(state if isinstance(state, tuple) else (state,))]


@halves
def test_freeze_gives_the_bits_of_packing_each_time(make: Any, dtype: torch.dtype) -> None:
    layer = make(dtype=dtype)
    x = torch.randn(6, 40, 5).to(dtype)
    for isa in ISAS:
        with rnnfast.use_engine("cpu", isa=isa, kernel="packed"), torch.no_grad():
            want = layer(x)[0]
            frozen = copy.deepcopy(layer).freeze()
            for other in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
                assert other._frozen is not None
                assert tolerance.same_bits(other(x)[0], want)


def test_frozen_errors() -> None:
    layer = rnnfast.GRU(5, 9, dtype=bf16).freeze()
    x = torch.randn(3, 2, 5).to(bf16)
    with pytest.raises(RuntimeError, match="gives no gradients"):
        layer(x)
    with torch.no_grad():
        isa = rnnfast.engine.active_isa()
        if isa != "portable":
            with (
                pytest.raises(RuntimeError, match=f"frozen for {isa}, and portable"),
                rnnfast.use_engine("cpu", isa="portable"),
            ):
                layer(x)
        layer.float()  # packs anew
        assert layer(x.float())[0].dtype == torch.float32
        # a pack of another dtype is refused
        w = rnnfast.GRU(5, 9, dtype=torch.float16)
        packed = torch.ops.rnnfast.pack(w.weight_ih_l0, w.weight_hh_l0, None, 1)
        b = layer.to(bf16)
        weights = [b.weight_ih_l0, b.weight_hh_l0, None, None, None]
        with pytest.raises(RuntimeError, match="packed was made for another"):
            torch.ops.rnnfast.forward(x, None, None, *weights, None, None, packed, 1, False, False)
    message = "freeze.. needs float32, float64, bfloat16 or float16 weights"
    with pytest.raises(RuntimeError, match=message):
        rnnfast.GRU(5, 9, dtype=bf16).to("meta").freeze()


def test_copies_and_state_dicts(make: Any) -> None:
    layer = make(dtype=bf16)
    x = torch.randn(4, 2, 5).to(bf16)
    want = layer(x)[0]
    other = make()  # float32: load_state_dict casts, as torch.nn's does
    other.load_state_dict(layer.state_dict())
    fresh = make(dtype=bf16)
    fresh.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = make(dtype=bf16)
    loaded.load_state_dict(torch.load(file))
    for copied in (fresh, loaded, other.to(bf16), copy.deepcopy(layer)):
        assert tolerance.same_bits(copied(x)[0], want)


def test_empty_batches_and_unbatched_input(make: Any) -> None:
    layer = make(dtype=bf16)
    batch_first = layer.batch_first
    empty = torch.zeros((0, 3, 5) if batch_first else (3, 0, 5), dtype=bf16)
    y, state = layer(empty)
    assert y.numel() == 0 and y.dtype == bf16 and _tensors((y, state))[1].dtype == bf16
    x = torch.randn(3, 5).to(bf16)
    alone, _ = layer(x)
    batch, _ = layer(x[None] if batch_first else x[:, None])
    # a batch of one and no batch are the same call
    assert tolerance.same_bits(alone, batch.squeeze(0 if batch_first else 1))


@halves
@pytest.mark.parametrize("kernel", ["packed", "direct"])
def test_nan_and_infinity_stay_in_their_sequence(dtype: torch.dtype, kernel: str) -> None:
    for isa in ISAS:
        for number, gates in ((0, 4), (1, 3), (2, 1), (5, 1)):
            w_ih = torch.randn(gates * 17, 33).to(dtype) / 6
            w_hh = torch.rand(17).to(dtype) if number > 3 else w_ih[:, :17].contiguous()
            x = torch.randn(3, 40, 33).to(dtype)
            bad = x.clone()
            bad[1, 5, 32], bad[1, 20, 0], bad[1, 33] = float("nan"), float("inf"), float("-inf")
            with rnnfast.use_engine("cpu", isa=isa, kernel=kernel):
                clean, spoilt = (
                    torch.ops.rnnfast.forward(
                        each,
                        None,
                        None,
                        w_ih,
                        w_hh,
                        None,
                        None,
                        None,
                        None,
                        None,
                        None,
                        number,
                        False,
                        False,
                    )[0]
                    for each in (x, bad)
                )
            others = [b for b in range(40) if b not in (5, 20, 33)]
            assert tolerance.same_bits(clean[:, others], spoilt[:, others])
            assert bool(spoilt[1:, 5].isnan().all()), f"{isa}: a NaN was swallowed"


def test_operator_errors() -> None:
    w = rnnfast.GRU(5, 9, dtype=bf16)
    x = torch.randn(3, 2, 5)
    weights = [w.weight_ih_l0, w.weight_hh_l0, None, None, None]
    run = torch.ops.rnnfast.forward
    with pytest.raises(RuntimeError, match="w_ih must have the dtype of x, float32, got bfloat16"):
        run(x, None, None, *weights, None, None, None, 1, False, False)
    with pytest.raises(RuntimeError, match="h0 must have the dtype of x, bfloat16, got float16"):
        h0 = torch.zeros(2, 9, dtype=torch.float16)
        run(x.to(bf16), h0, None, *weights, None, None, None, 1, False, False)
    x = x.to(bf16)
    y, _, _, saved = run(x, None, None, *weights, None, None, None, 1, False, True)
    args = [y, None, None, x, None, None, *weights, None, None, y]
    with pytest.raises(RuntimeError, match="saved must have"):
        torch.ops.rnnfast.backward(*args, saved.to(bf16), 1, False, 1)
    with pytest.raises(ValueError, match="does not match weight dtype"):
        w(x.float())
    with pytest.raises(ValueError, match="does not match weight dtype"):
        w(x.half())


@halves
def test_opcheck(dtype: torch.dtype) -> None:
    for number, gates in ((0, 4),) if dtype == bf16 else ((5, 1),):
        w_hh = torch.rand(6) if number > 3 else torch.randn(gates * 6, 6)
        leaves = [torch.randn(3, 2, 5), None, None, torch.randn(gates * 6, 5), w_hh]
        args = [None if t is None else t.to(dtype).requires_grad_() for t in leaves]
        rest = [None] * 6
        torch.library.opcheck(
            torch.ops.rnnfast.forward.default, (*args, *rest, number, False, True)
        )


def test_explain_and_last_run_tell_the_same() -> None:
    for dtype in HALVES:
        for isa in ISAS:
            for seq_len in (1, 30):
                layer = rnnfast.LSTM(16, 33, dtype=dtype).requires_grad_(False)
                x = torch.randn(seq_len, 2, 16).to(dtype)
                with rnnfast.use_engine("cpu", isa=isa):
                    (row,) = rnnfast.explain(layer, x).rows
                    layer(x)
                    ran = rnnfast.last_run()
                assert str(dtype).removeprefix("torch.") in row.shape
                told = (row.engine, row.isa, row.threads, row.split, row.kernel)
                assert told == tuple(
                    ran[k] for k in ("engine", "isa", "threads", "split", "kernel_ih")
                )


@pytest.mark.parametrize("cast", [False, True], ids=["bfloat16", "autocast"])
def test_compiled(make: Any, cast: bool) -> None:
    layer = make() if cast else make(dtype=bf16)
    x = torch.randn(3, 2, 5)
    x = (x if cast else x.to(bf16)).requires_grad_()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=bf16, enabled=cast):
            return layer(x)[0]

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    found = []
    for each in (run, compiled):
        y = each(x)
        assert y.dtype == bf16
        grads = torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])
        found.append([y, *grads])
    assert all(tolerance.same_bits(a, b) for a, b in zip(*found, strict=True))
