"""num_heads: against torch.nn's layers whose W_hh has zeros off its blocks, in every form that a
layer has."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Iterator
from typing import Any

import on_host
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from rnnfast import functional

f64 = torch.float64
KINDS: dict[str, tuple[Any, Any, int]] = {
    "LSTM": (rnnfast.LSTM, nn.LSTM, 4),
    "GRU": (rnnfast.GRU, nn.GRU, 3),
}


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def dense(w_hh: Tensor, gates: int) -> Tensor:
    """(G*H, H/n) as the matrix (G*H, H) of a layer without heads."""
    blocks = (torch.block_diag(*gate.split(w_hh.size(1))) for gate in w_hh.chunk(gates))
    return torch.cat(list(blocks))


def make(kind: str, heads: int = 3, hidden: int = 12, **options: Any) -> Any:
    return KINDS[kind][0](7, hidden, num_heads=heads, **{"dtype": f64} | options)


def torch_call(layer: Any, *args: Any) -> Any:
    """torch.nn's layer, as a function of the parameters of ours."""
    kind = type(layer).__name__
    _, theirs, gates = KINDS[kind]
    twin = theirs(
        layer.input_size, layer.hidden_size, layer.num_layers, layer.bias, layer.batch_first,
        bidirectional=layer.bidirectional, device="meta",
    )  # fmt: skip
    weights = {
        name: dense(w, gates) if "weight_hh" in name else w for name, w in layer.named_parameters()
    }
    return torch.func.functional_call(twin, weights, args)


def flat(y: Any, end: Any) -> list[Tensor]:
    y = pad_packed_sequence(y)[0] if isinstance(y, nn.utils.rnn.PackedSequence) else y
    return [y, *(end if isinstance(end, tuple) else (end,))]


def with_gradients(outs: list[Tensor], inputs: Any) -> list[Tensor]:
    """Outputs, and the gradients of a sum in which all of them count."""
    loss = sum(
        (o * torch.linspace(-1, 1.5, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outs
    )
    return [*outs, *torch.autograd.grad(loss, inputs)]


def same(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-11) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def state_of(layer: Any, batch: int) -> Any:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    shape = (count, batch, layer.hidden_size)
    h, c = (torch.randn(shape, dtype=f64, requires_grad=True) for _ in range(2))
    return (h, c) if isinstance(layer, rnnfast.LSTM) else h


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two heads": {"heads": 2},
    "a unit a head": {"heads": 12},
    "layers": {"num_layers": 3},
    "directions": {"bidirectional": True, "num_layers": 2},
    "no bias": {"bias": False, "num_layers": 2},
    "batch first": {"batch_first": True},
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_as_torch_computes_it(kind: str, options: str, threads: int) -> None:
    torch.set_num_threads(threads)
    layer = make(kind, **OPTIONS[options])
    x = torch.randn(5, 4, 7, dtype=f64, requires_grad=True)
    hx = state_of(layer, 5 if layer.batch_first else 4)
    inputs = [x, *(hx if isinstance(hx, tuple) else (hx,)), *layer.parameters()]
    got = with_gradients(flat(*layer(x, hx)), inputs)
    same(got, with_gradients(flat(*torch_call(layer, x, hx)), inputs))
    with torch.no_grad():  # and without keeping anything
        same(flat(*layer(x, hx)), got[: len(got) - len(inputs)])
        same(flat(*layer(x[:, 0], None)), flat(*torch_call(layer, x[:, 0], None)))


@pytest.mark.parametrize("split", ["serial", "batch", "units", "directions"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_split(kind: str, split: str) -> None:
    torch.set_num_threads(2)
    layer = make(kind, 3, 96, bidirectional=True)
    x = torch.randn(40, 9, 7, dtype=f64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    with rnnfast.use_engine("cpu", split=split):
        got = with_gradients(flat(*layer(x)), inputs)
    same(got, with_gradients(flat(*torch_call(layer, x)), inputs), 1e-10)


def test_heads_run_side_by_side() -> None:
    torch.set_num_threads(2)
    layer = make("LSTM", 4, 32, dtype=torch.float32)
    x = torch.randn(20, 3, 7)
    row = rnnfast.explain(layer, x).rows[0]
    assert "H=32 heads=4" in row.shape
    with rnnfast.use_engine("cpu", split="directions"), torch.no_grad():
        row = rnnfast.explain(layer, x).rows[0]
        assert (row.split, row.threads) == ("directions", 2)
        seen = set()
        for _ in range(50):  # a busy machine may give one thread only, now and then
            layer(x)
            seen.add(rnnfast.last_run()["split"])
            if "directions" in seen:
                break
            time.sleep(0.05)
    assert "directions" in seen


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_sequences(kind: str) -> None:
    """Packed, lengths, mask, resets, return_last, against the layer without heads."""
    layer = make(kind, num_layers=2, bidirectional=True)
    plain = KINDS[kind][0](7, 12, 2, bidirectional=True, dtype=f64)
    gates = KINDS[kind][2]

    def twin(**options: Any) -> Any:
        weights = {
            n: dense(w, gates) if "weight_hh" in n else w for n, w in layer.named_parameters()
        }
        return torch.func.functional_call(plain, weights, (x,), options)

    x = torch.randn(70, 3, 7, dtype=f64, requires_grad=True)
    lengths = torch.tensor([70, 3, 41])
    inputs = [x, *layer.parameters()]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected = with_gradients(flat(*twin(lengths=lengths)), inputs)
    same(with_gradients(flat(*layer(packed)), inputs), expected, 1e-10)
    mask = torch.rand(70, 3) < 0.7
    reset = torch.rand(70, 3) < 0.1
    for options in ({"lengths": lengths}, {"mask": mask}, {"reset": reset}):
        got = with_gradients(flat(*layer(x, **options)), inputs)
        same(got, with_gradients(flat(*twin(**options)), inputs), 1e-10)
    layer.return_last = plain.return_last = True
    same(with_gradients(flat(*layer(x)), inputs), with_gradients(flat(*twin()), inputs), 1e-10)
    with torch.no_grad():
        same(flat(*layer(x)), flat(*twin()), 1e-10)
    with rnnfast.use_engine("reference"):
        same(flat(*layer(x)), flat(*twin()), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_heads(kind: str) -> None:
    layer = make(kind, num_layers=2, bidirectional=True)
    x = torch.randn(70, 3, 7, dtype=f64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    for options in ({}, {"reset": torch.rand(70, 3) < 0.1}):
        expected = with_gradients(flat(*layer(x, **options)), inputs)
        layer.recompute = True
        same(with_gradients(flat(*layer(x, **options)), inputs), expected, 1e-10)
        layer.recompute = False


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(kind: str) -> None:
    layer = make(kind, 2, 4)
    x = torch.randn(3, 2, 7, dtype=f64, requires_grad=True)
    names = list(dict(layer.named_parameters()))

    def call(x: Tensor, *weights: Tensor) -> Any:
        weight_of = dict(zip(names, weights, strict=True))
        return tuple(flat(*torch.func.functional_call(layer, weight_of, (x,))))

    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, atol=1e-4)
    tangent = torch.randn_like(x)
    with torch.no_grad():
        _, got = jvp(lambda v: layer(v)[0], (x,), (tangent,))
        step = 1e-6 * tangent
        about = (layer(x + step)[0] - layer(x - step)[0]) / 2e-6
    torch.testing.assert_close(got, about, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_each_sample(kind: str) -> None:
    layer = make(kind, 2, 4, bidirectional=True)
    weights = dict(layer.named_parameters())
    x = torch.randn(3, 5, 7, dtype=f64)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, (x,))[0].square().sum()

    got = vmap(grad(loss), (None, 1))(weights, x)
    for k in range(5):
        each = torch.autograd.grad(loss(weights, x[:, k]), list(weights.values()))
        same([got[name][k] for name in weights], list(each), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str) -> None:
    layer = make(kind, num_layers=2, bidirectional=True, dtype=torch.float32)
    x = torch.randn(5, 4, 7, requires_grad=True)
    inputs = [x, *layer.parameters()]
    torch._dynamo.reset()  # each kind of layer is one more version of the same code
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for options in ({}, {"lengths": torch.tensor([5, 2, 3, 1])}):
        got = with_gradients(flat(*graph(x, **options)), inputs)
        same(got, with_gradients(flat(*layer(x, **options)), inputs), 1e-5)


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", KINDS)
def test_calls_do_not_grow_with_the_sequence(kind: str) -> None:
    layer = make(kind)
    found = set()
    for steps in (2, 50):
        with Count() as count:
            layer(torch.randn(steps, 3, 7, dtype=f64))[0].sum().backward()
        found.add(count.calls)
    assert len(found) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_and_stepped(kind: str) -> None:
    layer = make(kind, num_layers=2, dtype=torch.float32).eval()
    x = torch.randn(4, 3, 7)
    with torch.no_grad():
        expected, end = layer(x)

        def stepped() -> list[Tensor]:
            state, ys = None, []
            for x_t in x:
                y, state = layer.step(x_t, state)
                ys.append(y)
            return flat(torch.stack(ys), state)

        same(stepped(), flat(expected, end), 1e-6)
        layer.freeze()
        same(flat(*layer(x)), flat(expected, end), 1e-6)
        same(stepped(), flat(expected, end), 1e-6)
        assert "freeze()" in rnnfast.explain(layer, x).rows[0].reason
        same([layer.step(x[0, 0])[0]], [expected[0, 0]], 1e-6)
        layer.weight_hh_l0.mul_(2)
        with pytest.raises(RuntimeError, match="weight_hh_l0 was changed since freeze"):
            layer(x)
        layer.unfreeze()
        assert not torch.equal(layer(x)[0], expected)
    single = make(kind, dtype=torch.float32).eval()
    with torch.inference_mode():
        same([single.step(x[0])[0]], [single(x[:1])[0][0]], 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits(kind: str, dtype: torch.dtype) -> None:
    layer = make(kind, dtype=torch.float32)
    x = torch.randn(5, 4, 7)
    half = copy.deepcopy(layer).to(dtype)
    y, _ = half(x.to(dtype))
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), layer(x)[0], rtol=0.05, atol=0.05)
    assert half.weight_hh_l0.grad is not None and half.weight_hh_l0.grad.isfinite().all()
    with torch.autocast("cpu", dtype=dtype):
        assert layer(x)[0].dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_options_around_the_cell(kind: str) -> None:
    layer = make(kind, num_layers=2, weight_dropout=0.5, input_dropout=0.5, dropout=0.5)
    x = torch.randn(6, 4, 7, dtype=f64)
    lengths = torch.tensor([6, 2, 3, 1])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    hx = state_of(layer, 4)
    ys = []
    for _ in range(2):
        torch.manual_seed(5)
        ys.append(flat(*layer(packed, hx)))
    same(*ys)
    assert not torch.equal(ys[0][0], flat(*layer(packed, hx))[0])
    layer.eval()
    twin = make(kind, num_layers=2)
    twin.load_state_dict(layer.state_dict())
    same(flat(*layer(packed, hx)), flat(*twin(packed, hx)))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {"peephole": True}),
        ("LSTM", {"peephole": True, "bias": False, "num_layers": 2}),
        ("LSTM", {"coupled": True, "bidirectional": True}),
        ("GRU", {"reset_after": False, "num_layers": 2}),
    ],
    ids=str,
)
def test_other_cells(kind: str, options: dict[str, Any]) -> None:
    layer = make(kind, **options)
    plain = KINDS[kind][0](7, 12, **options, dtype=f64)
    gates = layer.weight_ih_l0.size(0) // 12
    weights = {n: dense(w, gates) if "weight_hh" in n else w for n, w in layer.named_parameters()}
    x = torch.randn(5, 4, 7, dtype=f64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = with_gradients(flat(*torch.func.functional_call(plain, weights, (x,))), inputs)
    same(with_gradients(flat(*layer(x)), inputs), expected)
    one_way = {k: v for k, v in options.items() if k != "bidirectional"}
    streamed = make(kind, **one_way)
    y, _ = streamed.step(x[0])
    same([y], [streamed(x[:1])[0][0]])


def test_chosen_activations_and_forget_bias() -> None:
    layer = make("LSTM", 2, 4, activation="relu", cell_clip=0.2, forget_bias=1.0)
    assert (layer.bias_ih_l0[4:8] == 1).all() and (layer.bias_hh_l0[4:8] == 0).all()
    x = torch.randn(3, 2, 7, dtype=f64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    got = with_gradients(flat(*layer(x)), inputs)
    with rnnfast.use_engine("reference"):
        same(got, with_gradients(flat(*layer(x)), inputs))
    y, _ = functional.lstm(
        x, None, layer.all_weights[0], activation="relu", cell_clip=0.2, num_heads=2
    )
    same([y], [got[0]])


def test_functions() -> None:
    x = torch.randn(3, 2, 7, dtype=f64)
    for kind, function in (("LSTM", functional.lstm), ("GRU", functional.gru)):
        layer = make(kind, num_layers=2, bidirectional=True)
        weights = [w for each in layer.all_weights for w in each]
        y, _ = function(x, None, weights, num_layers=2, bidirectional=True, num_heads=3)
        same([y], [layer(x)[0]])


def test_life_of_a_layer() -> None:
    layer = rnnfast.LSTM(2, 6, num_heads=3, activation="relu")
    assert repr(layer) == "LSTM(2, 6, activation=relu, num_heads=3)"
    assert (layer.num_heads, rnnfast.GRU(2, 6).num_heads) == (3, 1)
    assert layer.weight_hh_l0.shape == (24, 2) and layer.weight_ih_l0.shape == (24, 2)
    assert float(layer.weight_hh_l0.detach().abs().max()) <= 6**-0.5
    torch.manual_seed(1)
    first = rnnfast.GRU(2, 6, num_heads=2).state_dict()
    torch.manual_seed(1)
    layer_again = rnnfast.GRU(2, 6, num_heads=2)
    same(list(first.values()), list(layer_again.state_dict().values()))
    layer_again.load_state_dict(first)
    x = torch.randn(4, 1, 2)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.double().float()):
        same([other(x)[0]], [layer(x)[0]], 0)
    lazy = rnnfast.LazyGRU(6, num_heads=3)
    lazy(x)
    assert type(lazy) is rnnfast.GRU and lazy.num_heads == 3 and lazy.weight_hh_l0.shape == (18, 2)
    meta = rnnfast.LSTM(2, 6, num_heads=3, device="meta")
    assert meta.weight_hh_l0.is_meta
    program = torch.export.export(layer.eval(), (x,))
    same([program.module()(x)[0]], [layer(x)[0]], 1e-6)
    quantized = rnnfast.quantize(nn.Sequential(rnnfast.LSTM(2, 6, num_heads=3), rnnfast.GRU(6, 4)))
    assert type(quantized[0]) is rnnfast.LSTM and type(quantized[1]) is rnnfast.QuantizedGRU


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_device_of_loops(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_host.stand_in(monkeypatch)
    layer = make(kind, 3, 12, bidirectional=True)
    x = torch.randn(5, 4, 7, dtype=f64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    got = with_gradients(flat(*layer(x)), inputs)
    same(got, with_gradients(flat(*torch_call(layer, x)), inputs))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: rnnfast.LSTM(2, 6, num_heads=4), ValueError,
         "num_heads of LSTM must be at least 1 and divide hidden_size = 6, got 4"),
        (lambda: rnnfast.GRU(2, 6, num_heads=0), ValueError, "num_heads of GRU .* got 0"),
        (lambda: rnnfast.GRU(2, 6, num_heads=-2), ValueError, "got -2"),
        (lambda: rnnfast.GRU(2, 6, num_heads=2.0), TypeError, "must be an int, got float"),
        (lambda: rnnfast.LSTM(2, 6, num_heads=True), TypeError, "must be an int, got bool"),
        (lambda: rnnfast.LSTM(2, 6, num_heads=3, proj_size=2), ValueError,
         "num_heads of LSTM does not go with proj_size.* got num_heads=3, proj_size=2"),
        (lambda: rnnfast.LSTM(2, -6, num_heads=3), ValueError, "hidden_size must be greater"),
        (lambda: rnnfast.LSTM(2, "6", num_heads=3), TypeError, "hidden_size should be of type int"),
        (lambda: rnnfast.RNN(2, 6, num_heads=3), TypeError, "num_heads"),
        (lambda: functional.gru(torch.ones(1, 1, 2), None, [torch.ones(18, 2), torch.ones(18, 6)],
                                bias=False, num_heads=3), RuntimeError,
         r"w_hh of GRU with num_heads=3 must have shape \(G\*H, H/num_heads\) = \(18, 2\), "
         r"got \(18, 6\)"),
        (lambda: functional.gru(torch.ones(1, 1, 2), None, [torch.ones(18, 2), torch.ones(18, 2)],
                                bias=False, num_heads=4), ValueError, "divide hidden_size = 6"),
        (lambda: functional.gru(torch.ones(1, 1, 2), None, [torch.ones(18, 2), torch.ones(18, 2)],
                                bias=False), RuntimeError, "w_hh must have shape"),
        (lambda: functional.lstm(torch.ones(1, 1, 2), None,
                                 [torch.ones(8, n) if n else torch.ones(7) for n in (2, 1, 0, 0)],
                                 num_heads=2), RuntimeError, r"have G\*H = 8 rows, got \(7,\)"),
        (lambda: rnnfast.LSTM(2, 6, num_heads=3)(torch.ones(1, 1, 2), (torch.ones(1, 1, 2),) * 2),
         RuntimeError, r"Expected hidden\[0\] size \(1, 1, 6\), got \[1, 1, 2\]"),
    ],
)  # fmt: skip
def test_errors(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_errors_of_the_operators() -> None:
    x, none = torch.ones(1, 1, 2), (None,) * 5
    passes = [None, None, torch.ones(4, 2), torch.ones(4, 1), *none]
    run = torch.ops.rnnfast.forward_group
    for given, chained, heads, text in (
        (passes * 3, False, 2, "9 tensors or None for each of 2 heads of one direction or two"),
        (passes, False, 1, "of two directions"),
        (passes * 2, False, 0, "heads must be at least 1"),
        (passes * 2, True, 2, "and 1 for layers, got 2"),
        (passes * 2, False, -(2**40), "heads must be at least 1"),
    ):
        with pytest.raises(RuntimeError, match=text):
            run(x, given, None, 0, chained, False, heads)
    assert len(run(x, passes * 4, None, 0, False, False, 2)) == 16
