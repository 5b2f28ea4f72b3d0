"""rnnfast.quantize: int8 weights against a model of what becomes bytes, and the modules."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from typing import Any

import oracle
import pytest
import rounded
import tolerance
import torch
from cases import Case, Problem, Tensors
from rounded import ISAS
from tolerance import biggest
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import rnnfast
from rnnfast.quantize import quantize_rows

cells = pytest.mark.parametrize("cell", oracle.CELLS)
MATRICES = ("w_ih", "w_hh", "w_hr")
f32_eps = torch.finfo(torch.float32).eps


def bytes_of(problem: Problem) -> tuple[list[Tensor | None], Tensors, Tensors]:
    """pack_int8's arguments, views without memory in place of the matrices, and the float64
    matrices that the bytes stand for."""
    args: list[Tensor | None] = []
    views, exact = {}, {}
    for name in MATRICES:
        w = problem.inputs[name]
        if w is None or w.dim() == 1:
            args += [w, None]
            continue
        numbers, scale = quantize_rows(w, name)
        args += [numbers, scale]
        views[name] = torch.full((), float("nan")).expand(w.shape)
        exact[name] = numbers.double() * scale.double()[:, None]
    return args, views, exact


@pytest.mark.parametrize("isa", ISAS)
@cells
def test_forward_is_the_model(cell: str, isa: str) -> None:
    """Rows as bytes by the model's arithmetic, then float64: float32 differs by ulps only."""
    for case in rounded.shapes(cell, torch.float32):
        problem = rounded.problem_of(case)
        args, views, exact = bytes_of(problem)
        torch.set_num_threads(case.threads)
        with rnnfast.use_engine("cpu", isa=isa):
            packed = torch.ops.rnnfast.pack_int8(*args, oracle.CELL_IDS[cell])
            ours = rounded.forward(problem, packed, views)
        if case.batch:
            ran = rnnfast.last_run()
            assert ran["isa"] == isa and ran["kernel_ih"] == "packed"
        torch.set_num_threads(1)
        want = rounded.model(problem, rounded.to_bytes(isa), ours["y"], exact)
        for name, value in want.items():
            # an m before a projection that float32 puts into the neighbouring byte
            hidden = 1 / 127 if case.proj else 0.0
            allowed = (32 * f32_eps + hidden) * max(biggest(value), 1e-3)
            error = biggest(ours[name].double() - value)
            assert error <= allowed, f"{case} {isa} {name}: off by {error:.3g}"


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_bytes_do_not_saturate(isa: str) -> None:
    """u8 * s8 in pairs exceeds 16 bits (255*127*2), and its sums must neither saturate nor wrap."""
    longest = 1 << 16
    for columns in (1, 2, 3, 64, 1000, longest):
        for x_sign, w_sign in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            w = torch.full((18, columns), float(w_sign))
            w[3] *= -1
            x = torch.full((3, 2, columns), float(x_sign))
            x[1] *= -1
            x[2, 0, ::2] *= -1
            numbers, scale = quantize_rows(w, "w")
            zero = torch.zeros(18)
            with rnnfast.use_engine("cpu", isa=isa):
                packed = torch.ops.rnnfast.pack_int8(numbers, scale, zero, None, None, None, 5)
                y = torch.ops.rnnfast.forward(
                    x, None, None, w, zero, None, None, None, None, None, packed, 5, False, False
                )[0]
            torch.testing.assert_close(y, (x @ w.t()).relu(), rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"at most 65536 columns.*got \(6, 65537\)"):
        w = torch.zeros(6, longest + 1, dtype=torch.int8)
        torch.ops.rnnfast.pack_int8(w, torch.ones(6), torch.zeros(6), None, None, None, 5)


@pytest.mark.parametrize("isa", ISAS)
def test_zero_tiny_huge_and_infinite_rows(isa: str) -> None:
    layer = rnnfast.RNN(40, 33, nonlinearity="relu")
    quantized = rnnfast.quantize(layer)
    x = torch.randn(2, 40, 40)
    clean = x.clone()
    x[0, 1], clean[0, 1] = 0.0, 0.0
    x[0, 2] = torch.rand(40) * 1e-37  # the inverse of the scale would overflow
    x[0, 3] = torch.rand(40) * 1e-44
    x[0, 4] = (torch.rand(40) * 2 - 1) * 3.4e38
    x[0, 5, 39], x[0, 20, 0], x[1, 33, 7] = float("nan"), float("inf"), float("-inf")
    with rnnfast.use_engine("cpu", isa=isa):
        y, want = quantized(x)[0], quantized(clean)[0]
    usual = [b for b in range(40) if b not in (2, 3, 4, 5, 20, 33)]
    assert tolerance.same_bits(y[:, usual], want[:, usual])
    for b in (2, 3):  # numbers so small that only the biases are left
        torch.testing.assert_close(y[0, b], want[0, 1])
    assert bool(y[0, 4].isfinite().all()) and biggest(y[0, 4]) > 1e37
    # what can't be told in bytes is lost as a whole, and looks like it
    assert bool(y[0, [5, 20]].isnan().all()) and bool(y[1, [5, 20, 33]].isnan().all())
    assert bool(y[0, 33].isfinite().all())


def test_weights_that_are_zero_or_subnormal_or_infinite() -> None:
    layer = rnnfast.RNN(4, 4)
    with torch.no_grad():
        layer.weight_ih_l0[0] = 0
        layer.weight_ih_l0[1] = 1e-45
        layer.weight_ih_l0[2] = 3e38
    quantized = rnnfast.quantize(layer)
    assert bool((quantized.weight_ih_l0_scale > 0).all())
    assert quantized.weight_ih_l0[:2].count_nonzero() == 0
    assert bool(quantized(torch.ones(2, 1, 4))[0].isfinite().all())
    with torch.no_grad():
        layer.weight_hh_l0[3, 3] = float("inf")
    with pytest.raises(RuntimeError, match="quantize needs finite weights, weight_hh_l0 is not"):
        rnnfast.quantize(layer)


def test_rows_of_weights_are_rounded_to_the_nearest() -> None:
    w = torch.randn(50, 70)
    numbers, scale = quantize_rows(w, "w")
    assert numbers.dtype == torch.int8 and int(numbers.abs().max()) == 127
    assert bool(((numbers * scale[:, None] - w).abs() <= scale[:, None] * 0.5001).all())
    assert bool((numbers.abs().amax(1) == 127).all())


# --------------------------------------------------------------------------- the modules

LAYERS: dict[str, Any] = {
    "LSTM": lambda **k: rnnfast.LSTM(20, 33, 2, bidirectional=True, **k),
    "LSTM proj": lambda **k: rnnfast.LSTM(20, 33, proj_size=7, **k),
    "GRU": lambda **k: rnnfast.GRU(20, 33, 2, **k),
    "RNN": lambda **k: rnnfast.RNN(20, 33, bias=False, bidirectional=True, **k),
    "IndRNN": lambda **k: rnnfast.IndRNN(20, 33, nonlinearity="tanh", **k),
    "nn.LSTM": lambda **k: nn.LSTM(20, 33, 2, proj_size=7, bidirectional=True, **k),
    "nn.GRU": lambda **k: nn.GRU(20, 33, **k),
    "nn.RNN": lambda **k: nn.RNN(20, 33, 2, nonlinearity="tanh", **k),
}


@pytest.fixture(params=LAYERS)
def make(request: pytest.FixtureRequest) -> Any:
    return LAYERS[request.param]


def trained_like(layer: Any) -> Any:
    """Heavier tails than the initial weights, and units of different sizes."""
    gen = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in layer.parameters():
            noise = torch.randn(p.shape, generator=gen)
            size = torch.rand(p.shape[:1], generator=gen) + 0.5
            tails = noise * noise.abs().sqrt() * size.view(-1, *[1] * (p.dim() - 1))
            p.copy_(0.6 * tails / 33**0.5)
    return layer


def _outputs(out: Any) -> list[Tensor]:
    y, state = out
    return [getattr(y, "data", y), *(state if isinstance(state, tuple) else (state,))]


# of y, 40 steps; found: 0.009 to 0.017 of the largest value (RNN: 0.051), and 0.007 to 0.014 of
# the root mean square
LARGEST_ERROR, MEAN_ERROR = 0.07, 0.02


def test_error_against_float32(make: Any) -> None:
    layer = trained_like(make())
    quantized = rnnfast.quantize(copy.deepcopy(layer))
    assert quantized.__class__.__name__ == "Quantized" + layer.__class__.__name__
    x = torch.randn(40, 16, 20)
    with torch.no_grad():
        want = layer(x)[0]
    got = quantized(x)[0]
    assert got.dtype == torch.float32 and not got.requires_grad
    error = biggest(got - want) / biggest(want)
    assert 1e-4 < error < LARGEST_ERROR
    assert float((got - want).square().mean().sqrt() / want.square().mean().sqrt()) < MEAN_ERROR


def test_all_forms_of_input(make: Any) -> None:
    layer = make()
    plain = rnnfast.quantize(copy.deepcopy(layer))
    turned = rnnfast.quantize(make(batch_first=True))
    turned.load_state_dict(plain.state_dict())
    x = torch.randn(6, 3, 20)
    lengths = (6, 4, 1)
    want = _outputs(plain(x))
    got = _outputs(turned(x.transpose(0, 1)))
    assert all(
        tolerance.same_bits(a, b)
        for a, b in zip([got[0].transpose(0, 1), *got[1:]], want, strict=True)
    )
    alone = _outputs(plain(x[:, 1]))
    for a, b in zip(alone, want, strict=True):
        torch.testing.assert_close(a, b[:, 1], rtol=1e-5, atol=1e-6)
    # the state carried: the same as in one go, since the state is float32
    state = plain(x[:2])[1]
    if not plain.bidirectional:
        both = torch.cat([plain(x[:2])[0], plain(x[2:], state)[0]])
        torch.testing.assert_close(both, want[0], rtol=1e-5, atol=1e-6)
    ragged = pack_sequence([x[:n, b] for b, n in enumerate(lengths)])
    y, state = plain(ragged)
    assert isinstance(y, PackedSequence)
    padded, _ = pad_packed_sequence(y)
    for b, n in enumerate(lengths):
        one, one_state = plain(x[:n, b])
        torch.testing.assert_close(padded[:n, b], one, rtol=1e-5, atol=1e-6)
        for a, c in zip(_outputs((y, state))[1:], _outputs((one, one_state))[1:], strict=True):
            torch.testing.assert_close(a[:, b], c, rtol=1e-5, atol=1e-6)
    shuffled = pack_sequence([x[:n, b] for b, n in enumerate((1, 6, 4))], enforce_sorted=False)
    again, _ = pad_packed_sequence(plain(shuffled)[0])
    torch.testing.assert_close(again[:6, 1], plain(x[:, 1])[0], rtol=1e-5, atol=1e-6)
    assert plain(torch.zeros(3, 0, 20))[0].shape == (3, 0, want[0].shape[-1])


def test_copies_on_every_instruction_set(make: Any) -> None:
    """Panels belong to an instruction set and never travel; the bytes and scales do."""
    quantized = rnnfast.quantize(make())
    x = torch.randn(5, 18, 20)
    for isa in ISAS:
        with rnnfast.use_engine("cpu", isa=isa):
            want = quantized(x)[0]
            assert quantized._packed is not None
            loaded = rnnfast.quantize(make())
            loaded(x)  # packs bytes that are not these
            loaded.load_state_dict(quantized.state_dict())
            file = io.BytesIO()
            torch.save(quantized, file)
            file.seek(0)
            saved = torch.load(file, weights_only=False)
            moved = copy.deepcopy(quantized).half().double().to("meta")
            for other in (
                copy.deepcopy(quantized),
                pickle.loads(pickle.dumps(quantized)),
                loaded,
                saved,
                moved,
            ):
                assert other._packed is None
                assert tolerance.same_bits(other(x)[0], want), isa
    assert "_packed" not in quantized.state_dict()
    wrong = rnnfast.quantize(rnnfast.GRU(20, 34))
    with pytest.raises(RuntimeError, match="size mismatch|Missing key"):
        wrong.load_state_dict(quantized.state_dict())


def test_float_checkpoints_are_not_taken_for_bytes() -> None:
    layer = rnnfast.GRU(20, 33)
    with pytest.raises(RuntimeError, match="weight_ih_l0_scale"):
        rnnfast.quantize(copy.deepcopy(layer)).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_layers_of_other_types_become_float32s(dtype: torch.dtype) -> None:
    layer = rnnfast.LSTM(20, 33, dtype=dtype)
    want = rnnfast.quantize(copy.deepcopy(layer).float())
    got = rnnfast.quantize(layer)
    x = torch.randn(3, 2, 20)
    assert tolerance.same_bits(got(x)[0], want(x)[0])
    with pytest.raises(ValueError, match="does not match weight dtype"):
        got(x.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert got(x.to(torch.bfloat16))[0].dtype == torch.float32


def test_a_quarter_of_the_memory() -> None:
    layer = rnnfast.LSTM(512, 512, 2)
    floats = sum(p.numel() * 4 for p in layer.parameters())
    quantized = rnnfast.quantize(layer)
    assert list(quantized.parameters()) == []
    held = sum(b.numel() * b.element_size() for b in quantized.buffers())
    assert held < 0.26 * floats
    quantized(torch.zeros(1, 1, 512))
    assert sum(p.numel() for p in quantized._packed) < 0.26 * floats


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
        self.same = self.one
        self.all = nn.ModuleList([self.one[1], rnnfast.GRU(4, 4), nn.GRUCell(4, 4)])


class Derived(nn.LSTM):
    pass


def test_models_containers_ties_and_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rnnfast")
    model = Tied()
    model.derived = Derived(4, 4)
    model.wide = nn.RNN((1 << 16) + 1, 1)
    model.weird = torch.nn.utils.parametrizations.weight_norm(nn.GRU(4, 4), "weight_hh_l0")
    cell = model.all[2]
    assert rnnfast.quantize(model) is model
    assert type(model.one[1]) is rnnfast.QuantizedLSTM
    assert model.one[1] is model.same[1] is model.all[0]
    assert type(model.all[1]) is rnnfast.QuantizedGRU and model.all[2] is cell
    assert type(model.derived) is Derived and type(model.wide) is nn.RNN
    log = caplog.text
    for text in (
        "quantized one.1 (LSTM)",
        "quantized all.1 (GRU)",
        "left all.2 (GRUCell) alone: cells keep",
        "left derived (Derived) alone: its class",
        "left wide (RNN) alone: weight_ih_l0 has more than 65536 columns",
        "left weird (ParametrizedGRU) alone",
    ):
        assert text in log
    assert rnnfast.quantize(model) is model, "what is quantized stays so"
    assert type(model.one[1]) is rnnfast.QuantizedLSTM


def test_exclude() -> None:
    for name in ("one.1", "all.0", "same.1"):
        model = Tied()
        layer = model.one[1]
        rnnfast.quantize(model, exclude=[name])
        assert model.one[1] is model.same[1] is model.all[0] is layer, (
            "excluded under all its names"
        )
        assert type(model.all[1]) is rnnfast.QuantizedGRU
    gru = rnnfast.GRU(4, 4)
    assert rnnfast.quantize(nn.ModuleDict({"rnn": gru}), exclude="rnn")["rnn"] is gru
    assert rnnfast.quantize(gru, exclude=[""]) is gru
    with pytest.raises(RuntimeError, match="exclude must name modules of the model, got 'two'"):
        rnnfast.quantize(Tied(), exclude=["one.1", "two"])
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module, got list"):
        rnnfast.quantize([gru])


def test_accelerated_and_frozen_layers() -> None:
    plain = nn.Sequential(nn.GRU(20, 33))
    fast = rnnfast.accelerate(copy.deepcopy(plain))
    frozen = copy.deepcopy(fast)
    frozen[0].freeze()
    x = torch.randn(3, 2, 20)
    want = rnnfast.quantize(plain)(x)[0]
    for model in (fast, frozen):
        assert tolerance.same_bits(rnnfast.quantize(model)(x)[0], want)
        assert type(rnnfast.restore(rnnfast.accelerate(model))[0]) is rnnfast.QuantizedGRU


def test_training_mode_dropout_and_hooks_are_gone() -> None:
    layer = rnnfast.LSTM(20, 33, 2, dropout=0.9)
    quantized = rnnfast.quantize(layer.train())
    x = torch.randn(3, 2, 20)
    assert not quantized.training
    assert tolerance.same_bits(quantized(x)[0], quantized.train()(x)[0])


def test_gradients_are_refused(make: Any) -> None:
    quantized = rnnfast.quantize(make())
    x = torch.randn(3, 2, 20, requires_grad=True)
    with pytest.raises(RuntimeError, match="quantized layer gives no gradients"):
        quantized(x)
    with torch.no_grad():
        assert not quantized(x)[0].requires_grad


def test_reference_and_transforms(make: Any) -> None:
    """With the weights that the bytes stand for; only rows are not rounded."""
    quantized = rnnfast.quantize(make())
    x = torch.randn(4, 3, 20)
    fast = quantized(x)[0]
    with rnnfast.use_engine("reference"):
        slow = quantized(x)[0]
        assert rnnfast.last_run()["engine"] == "reference"
    assert biggest(fast - slow) <= 0.03 * biggest(slow)
    mapped = torch.func.vmap(lambda one: quantized(one)[0], in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(mapped, slow, rtol=1e-5, atol=1e-6)
    _, tangent = torch.func.jvp(lambda one: quantized(one)[0], (x,), (torch.randn_like(x),))
    assert biggest(tangent) > 1e-3


def test_compiled_and_exported(make: Any) -> None:
    quantized = rnnfast.quantize(make())
    x = torch.randn(3, 2, 20)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
        first = compiled(x)[0]  # before the layer itself has packed
        want = quantized(x)[0]
        assert tolerance.same_bits(first, want) and tolerance.same_bits(compiled(x)[0], want)
        exported = torch.export.export(quantized, (x,)).module()
        assert tolerance.same_bits(exported(x)[0], want)
    assert all(type(p) is Tensor for p in quantized._packed), "a traced tensor was kept"


def test_explain_and_last_run_tell_the_same() -> None:
    model = nn.Sequential(rnnfast.quantize(rnnfast.LSTM(16, 33, 2, bidirectional=True)))
    x = torch.randn(7, 2, 16)
    for isa in ISAS:
        with rnnfast.use_engine("cpu", isa=isa):
            rows = rnnfast.explain(model, x).rows
            model(x)
            ran = rnnfast.last_run()
        assert [row.layer for row in rows] == ["0.l0", "0.l0_reverse", "0.l1", "0.l1_reverse"]
        for row in rows:
            assert row.shape.endswith("int8") and "T=7 B=2" in row.shape
            told = (row.engine, row.isa, row.split, row.kernel)
            assert told == tuple(ran[k] for k in ("engine", "isa", "split", "kernel_ih"))
            assert row.isa == isa and "quantize" in row.reason
    single = rnnfast.explain(model[0], x.transpose(0, 1)[:, :5]).rows[0]
    assert "T=2 B=5" in single.shape
    by_name = rnnfast.explain("gru", input_size=5, hidden_size=9, dtype=torch.int8).rows[0]
    assert by_name.shape.endswith("int8") and by_name.kernel == "packed"


def test_operator_errors() -> None:
    numbers, scale = quantize_rows(torch.randn(27, 5), "w")
    hh, hh_scale = quantize_rows(torch.randn(27, 9), "w")
    pack = torch.ops.rnnfast.pack_int8
    good = [numbers, scale, hh, hh_scale, None, None, 1]

    def fails(text: str, **bad: Any) -> None:
        names = ("w_ih", "scale_ih", "w_hh", "scale_hh", "w_hr", "scale_hr", "cell")
        args = [bad.get(n, g) for n, g in zip(names, good, strict=True)]
        with pytest.raises(RuntimeError, match=text):
            pack(*args)

    fails("w_ih must be an int8 CPU tensor of two dimensions", w_ih=numbers.float())
    fails("scale_ih must be a float32 CPU tensor", scale_ih=scale.double())
    fails("scale_ih must have shape", scale_ih=scale[:-1])
    fails("scale_hh must be given", scale_hh=None)
    fails("w_hh must have shape", w_hh=numbers)
    fails("scale_hr must be given with w_hr", w_hr=hh)
    fails("w_hr is for lstm only", w_hr=hh, scale_hr=hh_scale)
    packed = pack(*good)
    x = torch.randn(3, 2, 5)
    views = [torch.zeros(27, 5), torch.zeros(27, 9), None, None, None]
    run = torch.ops.rnnfast.forward
    run(x, None, None, *views, None, None, packed, 1, False, False)
    with pytest.raises(RuntimeError, match="packed was made for another"):
        run(x, None, None, *views, None, None, packed[:-1], 1, False, False)
    if rnnfast.engine.active_isa() != "portable":
        with (
            rnnfast.use_engine("cpu", isa="portable"),
            pytest.raises(RuntimeError, match="packed was made for another"),
        ):
            run(x, None, None, *views, None, None, packed, 1, False, False)
    wide = [None if v is None else v.double() for v in views]
    with pytest.raises(RuntimeError, match="packed was made for another"):
        run(x.double(), None, None, *wide, None, None, packed, 1, False, False)


def test_threads_and_repeats_do_not_change_a_bit() -> None:
    shapes = [Case(c, 9, 40, 65, 130) for c in oracle.CELLS] + [Case("gru", 3, 5, 40, 450)]
    for case in shapes:
        problem = rounded.problem_of(case)
        args, views, _ = bytes_of(problem)
        for isa in ISAS:
            with rnnfast.use_engine("cpu", isa=isa):
                packed = torch.ops.rnnfast.pack_int8(*args, oracle.CELL_IDS[case.cell])
                one = rounded.forward(problem, packed, views)
                torch.set_num_threads(2)
                for split in ("batch", "units"):
                    with rnnfast.use_engine("cpu", split=split):
                        two = rounded.forward(problem, packed, views)
                    assert all(tolerance.same_bits(one[k], two[k]) for k in one), f"{case} {isa}"
                torch.set_num_threads(1)


def test_weights_that_change_are_packed_anew() -> None:
    layer = rnnfast.quantize(rnnfast.LSTM(5, 7))
    x = torch.randn(4, 2, 5)
    with torch.no_grad():
        before, _ = layer(x)
        layer.weight_ih_l0.zero_()
        changed, _ = layer(x)
        assert not torch.equal(before, changed)
        layer.bias_ih_l0 = torch.ones(28)
        assert not torch.equal(changed, layer(x)[0])
    layer.flatten_parameters()


def test_step_needs_both_states() -> None:
    layer = rnnfast.LSTM(8, 16)
    x, h = torch.randn(3, 8), torch.zeros(1, 3, 16)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            with pytest.raises(RuntimeError, match=r"state\[1\] must have shape"):
                layer.step(x, (h, None))
            with pytest.raises(RuntimeError, match="state must be a tuple"):
                layer.step(x, 3)
