"""SLSTM: against the paper's equations without a stabiliser, and in every form that a layer has."""

from __future__ import annotations

import copy
import math
from typing import Any

import on_host
import pytest
import torch
import variants
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from variants import f64, results

import rnnfast
from rnnfast import functional

FORGETS = ("sigmoid", "exp")


def states_of(layer: Any, batch: int) -> list[Tensor]:
    """Initial states whose normaliser is positive, as those that a layer gives are."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h, c, n, m = torch.randn(4, count, batch, layer.hidden_size, dtype=f64)
    return [s.requires_grad_() for s in (h, c, 0.5 + n.abs(), m)]


def dense(w_hh: Tensor) -> Tensor:
    """(4H, H/n) as the matrix (4H, H)."""
    return torch.cat([torch.block_diag(*gate.split(w_hh.size(1))) for gate in w_hh.chunk(4)])


def paper(layer: Any, x: Tensor, h: Tensor, c: Tensor, n: Tensor) -> tuple[Tensor, ...]:
    """Section 2.2 of Beck et al. 2024: one layer of one direction, without m. c and n are as they
    would be without it."""
    w_ih, w_hh = layer.weight_ih_l0, dense(layer.weight_hh_l0)
    b = layer.bias_ih_l0 + layer.bias_hh_l0
    y = []
    for x_t in x:
        i, f, z, o = (x_t @ w_ih.t() + h @ w_hh.t() + b).chunk(4, -1)
        forget = torch.exp(f) if layer.forget == "exp" else torch.sigmoid(f)
        c = forget * c + torch.exp(i) * torch.tanh(z)
        n = forget * n + torch.exp(i)
        h = torch.sigmoid(o) * (c / n)
        y.append(h)
    return torch.stack(y), h, c, n


def unstabilised(y: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> list[Tensor]:
    return [y, h, c * m.exp(), n * m.exp()]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("hidden", [3, 12, 39])
@pytest.mark.parametrize("forget", FORGETS)
def test_as_the_paper_says(forget: str, hidden: int, heads: int) -> None:
    torch.manual_seed(0)
    layer = rnnfast.SLSTM(4, hidden, num_heads=heads, forget=forget, dtype=f64)
    x = torch.randn(6, 5, 4, dtype=f64, requires_grad=True)
    hx = states_of(layer, 5)
    inputs = [x, *hx, *layer.parameters()]
    y, end = layer(x, tuple(hx))
    got = unstabilised(y, *(s[0] for s in end))
    h, c, n, m = (s[0] for s in hx)
    expected = paper(layer, x, h, c * m.exp(), n * m.exp())
    for a, b in zip(
        results(got[0], got[1:], inputs), results(expected[0], expected[1:], inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    zero = torch.zeros(5, hidden, dtype=f64)
    got_y, _ = layer(x)
    torch.testing.assert_close(got_y, paper(layer, x, zero, zero, zero)[0], rtol=1e-11, atol=0)


def of_gates(gates: Tensor, forget: str) -> tuple[Any, Any]:
    """A layer whose pre-activations are its input (T, B, 4H), and what it gives."""
    hidden = gates.size(-1) // 4
    w_ih = torch.eye(4 * hidden, dtype=gates.dtype)
    w_hh = torch.zeros(4 * hidden, hidden, dtype=gates.dtype)
    return functional.slstm(gates, None, [w_ih, w_hh], bias=False, forget=forget)


def by_softmax(gates: Tensor, forget: str) -> Tensor:
    """h without a recurrence: an average of g over the steps so far, whose weights' logarithms
    are i of that step and the forget gates since."""
    i, f, g, o = gates.to(f64).chunk(4, -1)
    log_f = f if forget == "exp" else F.logsigmoid(f)
    y = []
    for t in range(len(gates)):
        since = log_f[: t + 1].flip(0).cumsum(0).flip(0) - log_f[: t + 1]
        weights = torch.softmax(i[: t + 1] + since, 0)
        y.append(torch.sigmoid(o[t]) * (weights * torch.tanh(g[: t + 1])).sum(0))
    return torch.stack(y)


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=str)
@pytest.mark.parametrize("forget", FORGETS)
def test_numbers_of_any_size(forget: str, dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    gates = torch.randn(12, 40, 4 * 8, dtype=dtype) * size
    gates[0] = -size * 3  # the first input gate all but closed: its step is all there is
    gates[0, ..., 16:] = 0.5  # g and o
    gates.requires_grad_()
    y, end = of_gates(gates, forget)
    (slope,) = torch.autograd.grad(y.sum(), gates)
    exact = gates.detach().to(f64).requires_grad_()
    expected = by_softmax(exact, forget)
    (exact_slope,) = torch.autograd.grad(expected.sum(), exact)
    assert all(s.isfinite().all() for s in (y, slope, *end))
    # m, a sum of so many steps of that size, has lost as much as it has grown; so have weights
    loose = torch.finfo(dtype).eps * 40 * max(size, 1.0)
    torch.testing.assert_close(y.to(f64), expected, rtol=loose, atol=loose)
    torch.testing.assert_close(slope.to(f64), exact_slope, rtol=loose, atol=4 * loose)
    only_first = torch.sigmoid(torch.tensor(0.5, dtype=f64)) * math.tanh(0.5)
    torch.testing.assert_close(y[0].to(f64), only_first.expand(40, 8), rtol=1e-6, atol=0)


def test_zeros_carry_nothing_on() -> None:
    """Neither at the start nor after a reset, whatever m was, and no gradient either."""
    gates = torch.zeros(4, 1, 4, dtype=f64)
    gates[:, :, 0] = torch.tensor([-1000.0, 5.0, -1000.0, -1000.0]).view(4, 1)
    gates[:, :, 2] = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1)
    gates.requires_grad_()
    weights = [torch.eye(4, dtype=f64), torch.zeros(4, 1, dtype=f64)]
    reset = torch.tensor([[False], [False], [True], [False]])
    y, _ = functional.slstm(gates, None, weights, bias=False, reset=reset)
    alone, _ = functional.slstm(gates[2:], None, weights, bias=False)
    torch.testing.assert_close(y[2:], alone, rtol=0, atol=0)
    torch.testing.assert_close(y[2].squeeze(), 0.5 * torch.tensor(0.3, dtype=f64).tanh())
    (slope,) = torch.autograd.grad((y[2:]).sum(), gates)
    assert (slope[:2] == 0).all() and slope.isfinite().all() and (slope[2, 0, 2] != 0)
    zeros = [torch.zeros(1, 1, 1, dtype=f64) for _ in range(3)]
    far: Any = (*zeros, torch.full((1, 1, 1), 500.0, dtype=f64))
    torch.testing.assert_close(
        functional.slstm(gates[2:], far, weights, bias=False)[0], alone, rtol=0, atol=0
    )


@pytest.mark.parametrize("forget", FORGETS)
def test_all_states_and_outputs(forget: str) -> None:
    """gradcheck of every output by every input, c, n and m of both ends among them."""
    torch.manual_seed(2)
    layer = rnnfast.SLSTM(2, 4, num_heads=2, forget=forget, dtype=f64)
    x = torch.randn(3, 2, 2, dtype=f64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        weights = dict(zip(names, rest[4:], strict=True))
        y, end = torch.func.functional_call(layer, weights, (x, rest[:4]))
        return (y, *end)

    inputs = (x, *states_of(layer, 2), *layer.parameters())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, atol=1e-4)


OPTIONS: tuple[dict[str, Any], ...] = ({}, {"num_heads": 3}, {"forget": "exp", "num_heads": 2})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
class TestVariant:
    @pytest.mark.parametrize("bias", [True, False])
    def test_every_sequence(self, options: Any, bias: bool, monkeypatch: Any) -> None:
        torch.manual_seed(0)
        layer = rnnfast.SLSTM(4, 6, 2, bias, bidirectional=True, dtype=f64, **options)
        # of a normaliser below zero h may be anything
        monkeypatch.setattr(torch, "randn_like", lambda s: 0.5 + torch.rand_like(s))
        variants.check_every_sequence(layer, 4)
        layer.recompute = True
        variants.check_every_sequence(layer, 4)

    def test_derivatives(self, options: Any) -> None:
        torch.manual_seed(0)
        layer = rnnfast.SLSTM(2, 6, dtype=f64, **options)
        x = torch.randn(3, 2, 2, dtype=f64, requires_grad=True)
        variants.check_derivatives(layer, x)
        variants.check_per_sample_gradients(layer, x)

    def test_ways_to_run(self, options: Any) -> None:
        torch.manual_seed(0)
        layer = rnnfast.SLSTM(5, 36, **options)
        x = torch.randn(6, 7, 5, requires_grad=True)
        variants.check_threads(layer, x)
        variants.check_compiled(layer, x)
        variants.check_frozen_and_stepped(layer, x)
        variants.check_recompute(layer.double(), x.detach().double().requires_grad_())

    def test_function(self, options: Any) -> None:
        x = torch.randn(5, 3, 4)
        for bias in (True, False):
            layer = rnnfast.SLSTM(4, 6, 2, bias, bidirectional=True, **options)
            weights = [w for names in layer.all_weights for w in names]
            y, _ = functional.slstm(
                x, None, weights, num_layers=2, bias=bias, bidirectional=True, **options
            )
            torch.testing.assert_close(y, layer(x)[0], rtol=0, atol=0)

    def test_loads_its_own_state(self, options: Any) -> None:
        a, b = rnnfast.SLSTM(4, 6, **options), rnnfast.SLSTM(4, 6, **options)
        b.load_state_dict(a.state_dict())
        x = torch.randn(5, 3, 4)
        torch.testing.assert_close(a(x)[0], b(x)[0], rtol=0, atol=0)
        assert repr(a) == repr(b)
        for option, value in options.items():
            assert f"{option}={value}" in repr(a) and getattr(a, option) == value


def test_compiled_stacks() -> None:
    """The one operator of a stack carries all states."""
    torch.manual_seed(0)
    for options in ({"bidirectional": True}, {"num_layers": 3}):
        torch._dynamo.reset()
        layer = rnnfast.SLSTM(5, 6, **options, dtype=f64)
        x = torch.randn(6, 7, 5, dtype=f64, requires_grad=True)
        variants.check_compiled(layer, x)
        hx = tuple(states_of(layer, 7))
        torch._dynamo.reset()  # each kind of layer is one more version of the same code
        graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
        inputs = [x, *hx, *layer.parameters()]
        for given in ({}, {"lengths": torch.tensor([6, 1, 2, 3, 4, 5, 6])}):
            expected = results(*layer(x, hx, **given), inputs)
            for a, b in zip(results(*graph(x, hx, **given), inputs), expected, strict=True):
                torch.testing.assert_close(a, b)


def test_sixteen_bits() -> None:
    torch.manual_seed(0)
    layer = rnnfast.SLSTM(5, 36, num_heads=2)
    x = torch.randn(6, 7, 5)
    exact, _ = layer(x)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(layer).to(dtype)
        y, end = half(x.to(dtype))
        assert all(s.dtype == dtype for s in (y, *end))
        torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02)
        y.float().sum().backward()
        assert all(w.grad is not None and w.grad.isfinite().all() for w in half.parameters())
        with torch.autocast("cpu", dtype=dtype):
            torch.testing.assert_close(layer(x)[0].float(), exact, rtol=0.05, atol=0.02)


def test_unbatched_and_last() -> None:
    torch.manual_seed(0)
    layer = rnnfast.SLSTM(4, 6, 2, batch_first=True, bidirectional=True, num_heads=2, dtype=f64)
    x = torch.randn(7, 4, dtype=f64)
    hx = tuple(s[:, 0] for s in states_of(layer, 1))
    y, end = layer(x, hx)
    batched, batched_end = layer(x.unsqueeze(0), tuple(s.unsqueeze(1) for s in hx))
    torch.testing.assert_close(y, batched[0])
    for a, b in zip(end, batched_end, strict=True):
        assert a.shape == (4, 6)
        torch.testing.assert_close(a, b[:, 0])
    layer.return_last = True
    torch.testing.assert_close(layer(x, hx)[0], torch.cat([y[-1, :6], y[0, 6:]]))


def test_a_stream() -> None:
    torch.manual_seed(0)
    layer = rnnfast.SLSTM(4, 6, 2, num_heads=3, dtype=f64)
    x = torch.randn(9, 2, 4, dtype=f64)
    y, end = layer(x)
    chunks = list(rnnfast.truncated(layer, x, steps=4))
    torch.testing.assert_close(torch.cat([out for out, _ in chunks]), y)
    for a, b in zip(chunks[-1][1], end, strict=True):
        torch.testing.assert_close(a, b)
    reset = torch.tensor([True, False])
    stepped, _ = layer.step(x[0], end, reset)
    begun, _ = layer(x[:1], end, reset=reset.unsqueeze(0))
    torch.testing.assert_close(stepped, begun[0])


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **kwargs or {})


def test_calls_do_not_grow_with_the_sequence() -> None:
    layer = rnnfast.SLSTM(4, 6, 2, num_heads=2)
    found = set()
    for steps in (2, 50):
        with Count() as count:
            layer(torch.randn(steps, 3, 4))[0].sum().backward()
        found.add(count.calls)
    assert len(found) == 1


def test_initial_weights() -> None:
    layer = rnnfast.SLSTM(4, 12, 3, num_heads=2, bidirectional=True)
    bound = 12**-0.5
    for name, w in layer.named_parameters():
        f = w[12:24] if name.startswith("bias") else w[:0]
        others = torch.cat([w[:12], w[24:]]) if name.startswith("bias") else w
        assert others.abs().max() <= bound and others.std() > bound / 4
        if name.startswith("bias_hh"):
            assert (f == 0).all()
        elif name.startswith("bias_ih"):
            torch.testing.assert_close(f[:6], f[6:])
            torch.testing.assert_close(f[[0, 5]], torch.tensor([5.0, -7.0]))
            assert (f[1:6] < f[:5]).all()
    first, last = (getattr(layer, f"bias_ih_l{k}")[12:18] for k in (0, 2))
    torch.testing.assert_close(first[1].detach(), torch.tensor(5 - 12 * 0.2**0.3))
    torch.testing.assert_close(last[1].detach(), torch.tensor(5 - 12 * 0.2**1.6))
    exponential = rnnfast.SLSTM(4, 12, num_heads=2, forget="exp")
    usual = rnnfast.SLSTM(4, 12, num_heads=2).bias_ih_l0[12:24]
    torch.testing.assert_close(exponential.bias_ih_l0[12:24], F.logsigmoid(usual))
    assert rnnfast.SLSTM(4, 1).bias_ih_l0[1] == 5


def test_it_learns() -> None:
    """To remember the first number of a sequence."""
    torch.manual_seed(0)
    layer, head = rnnfast.SLSTM(2, 16, num_heads=2, return_last=True), nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.02)
    losses = []
    for _ in range(150):
        x = torch.randn(20, 32, 2)
        loss = F.mse_loss(head(layer(x)[0])[:, 0], x[0, :, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) / 10 < 0.2, losses[-10:]


def test_on_the_device_of_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for options in ({}, {"forget": "exp", "num_heads": 3}):
        layer = rnnfast.SLSTM(4, 12, 2, bidirectional=True, dtype=f64, **options)
        x = torch.randn(5, 3, 4, dtype=f64, requires_grad=True)
        hx = tuple(states_of(layer, 3))
        inputs = [x, *hx, *layer.parameters()]
        expected = results(*layer(x, hx), inputs)
        with monkeypatch.context() as patch:
            on_host.stand_in(patch)
            got = results(*layer(x, hx), inputs)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_other_engines() -> None:
    layer = rnnfast.SLSTM(4, 6, num_heads=2).eval()
    left = rnnfast.quantize(nn.Sequential(layer))
    assert left[0] is layer
    assert "slstm T=5" in str(rnnfast.explain(layer, torch.randn(5, 3, 4)))


def four(*shapes: tuple[int, ...]) -> Any:
    return tuple(torch.zeros(shape) for shape in shapes)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda m, x: rnnfast.SLSTM(2, 6, num_heads=4), ValueError,
         "num_heads of SLSTM must be at least 1 and divide hidden_size = 6, got 4"),
        (lambda m, x: rnnfast.SLSTM(2, 6, forget="relu"), ValueError,
         "forget of SLSTM must be 'sigmoid' or 'exp', got 'relu'"),
        (lambda m, x: rnnfast.SLSTM(2, 6, proj_size=3), ValueError, "SLSTM has no projection"),
        (lambda m, x: rnnfast.SLSTM(2, 6, nonlinearity="relu"), TypeError, "nonlinearity"),
        (lambda m, x: rnnfast.SLSTM(2, 0), ValueError, "hidden_size must be greater than zero"),
        (lambda m, x: m(x, x), TypeError,
         r"hx must be a tuple \(h_0, c_0, n_0, m_0\) of four tensors, got Tensor"),
        (lambda m, x: m(x, (x, x)), TypeError, r"of four tensors, got \(Tensor, Tensor\)"),
        (lambda m, x: m(x, (x, x, x, 1)), TypeError, r"got \(Tensor, Tensor, Tensor, int\)"),
        (lambda m, x: m(x, four((1, 3, 6), (1, 3, 6), (1, 6), (1, 3, 6))), RuntimeError,
         r"all of hx should also be 3-D but hx\[2\] is a 2-D tensor"),
        (lambda m, x: m(x, four((1, 3, 6), (1, 3, 6), (1, 3, 6), (1, 3, 5))), RuntimeError,
         r"Expected hidden\[3\] size \(1, 3, 6\), got \[1, 3, 5\]"),
        (lambda m, x: m(x, tuple(s.double() for s in four(*[(1, 3, 6)] * 4))), RuntimeError,
         r"hx\[3\]"),
        (lambda m, x: m.step(x[0], (x, x)), RuntimeError, r"state must be a tuple \(h, c, n, m\)"),
        (lambda m, x: m.step(x[0], four((1, 3, 6), (1, 3, 6), (1, 3, 5), (1, 3, 6))), RuntimeError,
         r"state\[2\] must have shape \(L, B, H\) = \(1, 3, 6\), got \(1, 3, 5\)"),
        (lambda m, x: functional.slstm(x, None, list(m.parameters()), forget="tanh"), ValueError,
         "forget of slstm"),
        (lambda m, x: functional.slstm(x, None, list(m.parameters())[:3]), RuntimeError,
         "weights must hold 4 tensors"),
    ],
)  # fmt: skip
def test_errors(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call(rnnfast.SLSTM(2, 6), torch.randn(5, 3, 2))
