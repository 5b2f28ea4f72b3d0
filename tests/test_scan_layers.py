"""MinGRU, MinLSTM and QRNN: against their papers' equations, in every form that a layer has."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import on_host
import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import functional

f64 = torch.float64
DEVICE = on_host.operators()


# --------------------------------------------------------------------------- the papers


def g(x: Tensor) -> Tensor:
    """Feng et al. 2024, appendix B."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def min_gru(gates: Tensor, state: Tensor, candidate: Callable[[Tensor], Tensor] = g) -> Any:
    k, n = gates.chunk(2, -1)
    z = torch.sigmoid(k)
    h = (1 - z) * state + z * candidate(n)
    return h, h


def min_lstm(gates: Tensor, state: Tensor, candidate: Callable[[Tensor], Tensor] = g) -> Any:
    f, i, n = gates.chunk(3, -1)
    diff = torch.nn.functional.softplus(-f) - torch.nn.functional.softplus(-i)
    h = torch.sigmoid(-diff) * state + torch.sigmoid(diff) * candidate(n)
    return h, h


def qrnn(gates: Tensor, state: Tensor) -> Any:
    parts = gates.chunk(gates.size(-1) // state.size(-1), -1)
    z, f = torch.tanh(parts[0]), torch.sigmoid(parts[1])
    i = torch.sigmoid(parts[3]) if len(parts) == 4 else 1 - f
    c = f * state + i * z
    return (c if len(parts) == 2 else torch.sigmoid(parts[2]) * c), c


def identity(x: Tensor) -> Tensor:
    return x


# a layer, how it is made, and its step: gates and the state that is carried to output and state
KINDS: dict[str, tuple[Any, dict[str, Any], Callable[..., Any]]] = {
    "min_gru": (rnnfast.MinGRU, {}, min_gru),
    "min_gru_linear": (
        rnnfast.MinGRU,
        {"nonlinearity": "identity"},
        lambda gates, state: min_gru(gates, state, identity),
    ),
    "min_lstm": (rnnfast.MinLSTM, {}, min_lstm),
    "min_lstm_linear": (
        rnnfast.MinLSTM,
        {"nonlinearity": "identity"},
        lambda gates, state: min_lstm(gates, state, identity),
    ),
    "qrnn_f": (rnnfast.QRNN, {"pooling": "f", "kernel_size": 1}, qrnn),
    "qrnn_fo": (rnnfast.QRNN, {}, qrnn),
    "qrnn_ifo": (rnnfast.QRNN, {"pooling": "ifo", "kernel_size": 3}, qrnn),
}
each = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, *sizes: int, dtype: torch.dtype = f64, **options: Any) -> Any:
    torch.manual_seed(len(kind))
    layer, own, _ = KINDS[kind]
    made = layer(*sizes, dtype=dtype, **(own | options))
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(3)
    return made


def inner(layer: Any, state: Any) -> Any:
    """The state that is carried; h of QRNN with fo- and ifo-pooling is not."""
    return state[1] if isinstance(state, tuple) else state


def as_hx(layer: Any, state: Tensor | None) -> Any:
    if state is None or getattr(layer, "pooling", "f") == "f":
        return state
    return torch.full_like(state, torch.nan), state  # h_0 has no part


def oracle(
    kind: str, layer: Any, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x (T, B, I), state (L*D, B, H), reset (T, B): output and last states, a step and a row of
    one sequence after the other."""
    step = KINDS[kind][2]
    directions = 2 if layer.bidirectional else 1
    size = getattr(layer, "kernel_size", 1)
    ends = []
    for level in range(layer.num_layers):
        seen = []
        for t in range(x.size(0)):
            parts, gone = [x[t]], torch.zeros(x.size(1), 1, dtype=torch.bool)
            for k in range(1, size):
                if reset is not None and t - k + 1 >= 0:
                    gone = gone | reset[t - k + 1].unsqueeze(-1)
                before = x[t - k] if t >= k else torch.zeros_like(x[t])
                parts.append(torch.where(gone, 0, before))
            seen.append(torch.cat(parts, -1))
        outs = []
        for d in range(directions):
            suffix = f"_l{level}" + "_reverse" * d
            w = getattr(layer, "weight_ih" + suffix)
            b = getattr(layer, "bias_ih" + suffix) if layer.bias else 0
            k = level * directions + d
            h = x.new_zeros(x.size(1), layer.hidden_size) if state is None else state[k]
            ys = [h] * x.size(0)
            order = range(x.size(0))
            for t in reversed(order) if d else order:
                if reset is not None:
                    cut = reset[t] if d == 0 else reset[t + 1] if t + 1 < x.size(0) else None
                    h = h if cut is None else torch.where(cut.unsqueeze(-1), 0, h)
                ys[t], h = step(seen[t] @ w.t() + b, h)
            outs.append(torch.stack(ys))
            ends.append(h)
        x = torch.cat(outs, -1)
    return x, torch.stack(ends)


def close(found: Any, want: Any, **how: Any) -> None:
    torch.testing.assert_close(found, want, **({"rtol": 1e-10, "atol": 1e-11} | how))


def gradients(outputs: Any, leaves: Any) -> Any:
    gen = torch.Generator().manual_seed(5)
    loss = sum(
        (o * torch.randn(o.shape, generator=gen, dtype=f64).to(o.dtype)).sum() for o in outputs
    )
    return torch.autograd.grad(loss, leaves)


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": False, "batch_first": True},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "recompute": True},
)


@each
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients(kind: str, options: dict[str, Any]) -> None:
    layer = make(kind, 5, 19, **options)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    x = torch.randn(70, 3, 5, dtype=f64, requires_grad=True)
    state = torch.randn(count, 3, 19, dtype=f64, requires_grad=True)
    reset = torch.rand(70, 3) < 0.1
    leaves = [x, state, *layer.parameters()]
    given = x.transpose(0, 1) if layer.batch_first else x
    cut = reset.t() if layer.batch_first else reset
    y, end = layer(given, as_hx(layer, state), reset=cut)
    y = y.transpose(0, 1) if layer.batch_first else y
    found, want = (y, inner(layer, end)), oracle(kind, layer, x, state, reset)
    close(found, want)
    close(gradients(found, leaves), gradients(want, leaves))
    close(layer(given)[0], oracle(kind, layer, x)[0].transpose(0, int(layer.batch_first)))


@each
def test_float32_and_halves(kind: str) -> None:
    layer = make(kind, 9, 33)
    x = torch.randn(40, 4, 9, dtype=f64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = copy.deepcopy(layer).to(dtype)
        same = copy.deepcopy(low).double()  # the same numbers
        given = x.to(dtype)
        exact = oracle(kind, same, given.double())[0]
        found = [(y := low(given)[0]), *gradients([y], list(low.parameters()))]
        want = [exact, *gradients([exact], list(same.parameters()))]
        for mine, right in zip(found, want, strict=True):
            assert mine.dtype == dtype
            bound = 20 * torch.finfo(dtype).eps * right.abs().max()
            assert (mine.double() - right).abs().max() <= bound


@each
def test_gradcheck_to_the_second_order(kind: str) -> None:
    layer = make(kind, 2, 3)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(4, 2, 2, dtype=f64, requires_grad=True)
    state = torch.randn(1, 2, 3, dtype=f64, requires_grad=True)

    def f(x: Tensor, state: Tensor, *weights: Tensor) -> Any:
        given = dict(zip(names, weights, strict=True))
        hx = (torch.zeros_like(state), state) if as_hx(layer, state) is not state else state
        y, end = torch.func.functional_call(layer, given, (x, hx))
        return y, inner(layer, end)

    leaves = (x, state, *(w.detach().requires_grad_() for w in layer.parameters()))
    assert gradcheck(f, leaves, check_batched_grad=True)
    assert gradgradcheck(f, leaves)


@each
def test_packed_lengths_unbatched_and_functional(kind: str) -> None:
    layer = make(kind, 5, 18, num_layers=2, bidirectional=True)
    lengths = torch.tensor([7, 2, 5])
    x = torch.randn(7, 3, 5, dtype=f64)
    reset = torch.rand(7, 3) < 0.2
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    cut = pack_padded_sequence(reset, lengths, enforce_sorted=False)
    y, end = layer(packed, reset=cut)
    assert isinstance(y, PackedSequence)
    padded = pad_packed_sequence(y)[0]
    with_lengths, its_end = layer(
        torch.where(torch.arange(7)[:, None, None] < lengths[:, None], x, torch.nan),
        reset=reset,
        lengths=lengths,
    )
    close(with_lengths, padded)
    close(inner(layer, its_end), inner(layer, end))
    for b, length in enumerate(lengths):
        one, state = layer(x[:length, b], reset=reset[:length, b])
        close(padded[:length, b], one)
        close(inner(layer, end)[:, b], inner(layer, state))
    if getattr(layer, "kernel_size", 1) == 1:
        function = getattr(functional, kind.removesuffix("_linear").removesuffix("_f"))
        own = {k: v for k, v in KINDS[kind][1].items() if k != "kernel_size"}
        weights = [w for names in layer.all_weights for w in names]
        other, _ = function(x, None, weights, num_layers=2, bidirectional=True, **own)
        assert torch.equal(other, layer(x)[0])


@each
def test_steps_give_what_a_sequence_gives(kind: str) -> None:
    layer = make(kind, 5, 18, num_layers=2, **({"kernel_size": 1} if "qrnn" in kind else {}))
    x = torch.randn(6, 3, 5, dtype=f64)
    want, last = layer(x)
    for frozen in (False, True):
        if frozen:
            layer.eval().freeze()
        state = None
        with torch.no_grad():
            for t in range(6):
                y, state = layer.step(x[t], state)
                close(y, want[t])
            close(inner(layer, state), inner(layer, last))
            close(layer(x)[0], want)


@each
def test_compiled_whole_and_vmapped(kind: str) -> None:
    torch._dynamo.reset()
    layer = make(kind, 5, 18, num_layers=2)
    x = torch.randn(6, 3, 5, dtype=f64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = list(layer.parameters())
    close(
        gradients(compiled(x)[:1], leaves),
        gradients(layer(x)[:1], leaves),
    )
    many = torch.randn(2, 6, 3, 5, dtype=f64)
    close(torch.func.vmap(lambda x: layer(x)[0])(many), torch.stack([layer(x)[0] for x in many]))
    names = dict(layer.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, (x,))[0].sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(names, many)
    one = torch.autograd.grad(loss(names, many[1]), leaves)
    close([w[1] for w in found.values()], list(one))


@each
def test_copies_dropout_threads_and_explain(kind: str) -> None:
    layer = make(kind, 5, 40, num_layers=2, dropout=0.5, dtype=torch.float32)
    x = torch.randn(30, 4, 5)
    torch.manual_seed(1)
    one = layer(x)[0]
    assert not torch.equal(one, layer(x)[0])
    layer.eval()
    want = layer(x)[0]
    torch.set_num_threads(2)
    assert torch.equal(layer(x)[0], want)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], want)
    fresh = make(kind, 5, 40, num_layers=2, dtype=torch.float32).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x)[0], want)
    assert not [name for name in layer.state_dict() if "_hh" in name]
    assert "cpu" in str(rnnfast.explain(layer, x)) and type(layer).__name__ in repr(layer)


@pytest.mark.parametrize("reverse", [False, True])
@each
def test_on_the_device_of_loops(kind: str, reverse: bool) -> None:
    """The CUDA engine's kernels, all steps in one launch, with resets and packed rows."""
    spec = rnnfast.cells.cell_spec(kind)
    T, B, H = 9, 3, 7
    gates = spec.gates * H
    x, w, b = (torch.randn(s, dtype=f64) for s in ((T, B, 4), (gates, 4), (gates,)))
    h0 = torch.randn(B, H, dtype=f64)
    c0 = torch.randn(1, B, H, dtype=f64) if spec.states == 2 else None
    reset = torch.rand(T, B) < 0.3
    sizes = torch.tensor([3, 3, 2, 2, 1])
    dc = None if c0 is None else torch.randn_like(c0)
    for given, batch_sizes, cut in (
        (x, None, reset),
        (x, None, None),
        (x.flatten(0, 1)[: sizes.sum()], sizes, reset.flatten()[: sizes.sum()]),
    ):
        args = (given, h0, c0, w, w.new_empty(0), b, w.new_empty(0), None, batch_sizes, cut)
        results = []
        for library in (DEVICE, torch.ops.rnnfast):
            y, h_n, c_n, saved = library.forward(*args, None, spec.id, reverse, True)
            dy = torch.linspace(-1, 1, y.numel(), dtype=f64).view_as(y)
            grads = library.backward(
                dy, h0, dc, *args, y, saved, spec.id, reverse, 1 + 2 + 8 + 32 + 4 * (dc is not None)
            )
            results.append([y, h_n, c_n, *grads])
        close(*results)


@each
def test_masks_and_options_around_the_cells(kind: str) -> None:
    layer = make(kind, 18, 18, num_layers=2, **({"kernel_size": 1} if "qrnn" in kind else {}))
    x, valid = torch.randn(9, 3, 18, dtype=f64), torch.rand(9, 3) < 0.6
    want, end = layer(x)
    y, found = layer(x, mask=torch.ones(9, 3, dtype=torch.bool))
    close((y, found), (want, end))
    y = layer(x, mask=valid)[0]
    for b in range(3):
        if valid[:, b].any():
            close(y[valid[:, b], b], layer(x[valid[:, b], b])[0])
    layer.return_last = True
    last = layer(x)[0]
    close(last, want[-1])
    packed = pack_padded_sequence(x, torch.tensor([9, 2, 5]), enforce_sorted=False)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    close(compiled(packed)[0], layer(packed)[0])
    layer.weight_dropout = 0.5
    with pytest.raises(RuntimeError, match="weight_dropout is for layers with a w_hh, which"):
        layer(x)


# --------------------------------------------------------------------------- extremes, errors


def test_gates_of_min_lstm_where_both_vanish() -> None:
    """f and i of 1e-60: their ratio is what counts. And where one of them is far larger."""
    layer = rnnfast.MinLSTM(1, 1, bias=False, nonlinearity="identity", dtype=torch.float32)
    for f, i in ((-140.0, -139.0), (-300.0, 300.0), (300.0, -300.0), (-3e4, -3e4), (50.0, 50.0)):
        with torch.no_grad():
            layer.weight_ih_l0.copy_(torch.tensor([[f], [i], [1.0]]))
        h0 = torch.full((1, 1, 1), 2.0, requires_grad=True)
        y, _ = layer(torch.ones(1, 1, 1), h0)
        logs = [-torch.nn.functional.softplus(torch.tensor(-v, dtype=f64)) for v in (f, i)]
        share = torch.sigmoid(logs[0] - logs[1])
        close(y.detach().double().squeeze(), 2 * share + (1 - share), rtol=1e-6, atol=1e-7)
        (dh0,) = torch.autograd.grad(y.sum(), h0)
        close(dh0.double().squeeze(), share, rtol=1e-6, atol=1e-7)
        assert all(w.isfinite().all() for w in gradients(layer(torch.ones(1, 1, 1))[:1],
                                                         list(layer.parameters())))  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: rnnfast.MinGRU(3, 4, nonlinearity="tanh"),
            ValueError,
            "must be 'g' or 'identity'",
        ),
        (lambda: rnnfast.QRNN(3, 4, pooling="o"), ValueError, "pooling must be 'f', 'fo' or 'ifo'"),
        (lambda: rnnfast.QRNN(3, 4, kernel_size=0), ValueError, "kernel_size must be an int >= 1"),
        (lambda: rnnfast.MinGRU(0, 4), ValueError, "input_size must be greater than zero"),
        (lambda: rnnfast.MinGRU(3, 4)(torch.ones(2, 1, 5)), RuntimeError, "Expected 3, got 5"),
        (lambda: rnnfast.QRNN(3, 4)(torch.ones(2, 1, 5)), RuntimeError, "Expected 3, got 5"),
        (
            lambda: rnnfast.QRNN(3, 4, 2)(torch.ones(2, 1, 3), (torch.ones(1, 1, 4),) * 2),
            RuntimeError,
            r"hx must hold L\*D = 2 states, got \(1, 1, 4\)",
        ),
        (
            lambda: rnnfast.QRNN(3, 4)(torch.ones(2, 1, 3), mask=torch.ones(2, 1) > 0),
            RuntimeError,
            "mask of QRNN needs kernel_size=1, got 2",
        ),
        (lambda: rnnfast.QRNN(3, 4).step(torch.ones(1, 3)), RuntimeError, "needs kernel_size=1"),
        (
            lambda: functional.min_gru(torch.ones(2, 1, 3), None, [torch.ones(8, 3)] * 3),
            RuntimeError,
            "weights must hold 2 tensors for each of 1 layers and directions = 2, got 3",
        ),
        (
            lambda: functional.qrnn(torch.ones(2, 1, 3), None, [torch.ones(8, 3)], bias=False),
            RuntimeError,
            r"w_ih must have shape \(G\*H, I\) with G = 3 for qrnn_fo, got \(8, 3\)",
        ),
    ],
)
def test_errors(call: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_the_operators_refuse_a_hidden_side() -> None:
    x, w, b = torch.ones(2, 1, 3), torch.ones(8, 3), torch.ones(8)
    cell = rnnfast.cells.cell_spec("min_gru").id
    forward = torch.ops.rnnfast.forward
    with pytest.raises(RuntimeError, match=r"w_hh must have shape \(0,\) = \(0,\), got \(8, 4\)"):
        forward(x, None, None, w, torch.ones(8, 4), b, None, None, None, None, None, cell, False,
                False)  # fmt: skip
    with pytest.raises(RuntimeError, match=r"b_hh must have shape \(G\*H,\) = \(8,\), got \(0,\)"):
        forward(x, None, None, w, torch.ones(8, 8), b, w[:0, 0], None, None, None, None, 2,
                False, False)  # fmt: skip
    with pytest.raises(RuntimeError, match=r"w_hh must have shape .* = \(8, 8\), got \(0,\)"):
        forward(x, None, None, w, w[:0, 0], b, None, None, None, None, None, 2, False, False)


@pytest.mark.parametrize("reset", [torch.zeros(2, 5, dtype=torch.bool), torch.zeros(5, 2), [True]])
@pytest.mark.parametrize("kernel_size", [1, 2])
def test_reset_is_checked_before_the_convolution(reset: Any, kernel_size: int) -> None:
    layer = rnnfast.QRNN(3, 4, kernel_size=kernel_size)
    with pytest.raises(RuntimeError, match=r"rnnfast: reset must be .* \(T, B\) = \(5, 2\)"):
        layer(torch.randn(5, 2, 3), None, reset)
