"""Recurrent batch normalisation against a plain loop of torch.nn.functional.batch_norm, in float64
and in every form that the layer has."""

from __future__ import annotations

import copy
import itertools
import os
from typing import Any

import pytest
import torch
import works
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from variants import f64

import rnnfast
from rnnfast import _batch_norm, engine, reference


class Plain(nn.Module):
    """One direction of one layer of `layer`, a step and a row of Python after the other: running
    statistics are batch_norm's own, and padding is cut off before anything reads it."""

    def __init__(self, layer: Any, suffix: str = "_l0") -> None:
        super().__init__()
        self.layer, self.suffix = layer, suffix
        H = layer.hidden_size
        self.mean, self.var = (
            [list(one.split((4 * H, 4 * H, H))) for one in self.of(name).clone()]
            for name in ("running_mean", "running_var")
        )

        self.before = copy.deepcopy((self.mean, self.var))

    def of(self, name: str) -> Tensor:
        return getattr(self.layer, name + self.suffix)

    def running(self) -> tuple[Tensor, Tensor]:
        return tuple(torch.stack([torch.cat(one) for one in s]) for s in (self.mean, self.var))

    def normal(self, v: Tensor, t: int, which: int, gain: Tensor, bias: Tensor | None) -> Tensor:
        at, own = min(t, self.layer.max_steps - 1), self.layer.training and v.size(0) > 1
        mean, var = (self.mean, self.var) if own else self.before
        return batch_norm(
            v, mean[at][which], var[at][which], gain, bias, own, self.layer.momentum,
            self.layer.eps,
        )  # fmt: skip

    def forward(self, rows: list[Tensor], h0: Tensor, c0: Tensor) -> tuple[list[Tensor], Any, Any]:
        """Of sequences (t_b, I), in any order: outputs (t_b, H) and final states (B, H)."""
        h, c = list(h0), list(c0)
        y: list[list[Tensor]] = [[] for _ in rows]
        for t in range(max(row.size(0) for row in rows)):
            now = [b for b, row in enumerate(rows) if t < row.size(0)]
            x_t = torch.stack([rows[b][t] for b in now])
            h_t, c_t = (torch.stack([s[b] for b in now]) for s in (h, c))
            bias = self.of("bias") if self.layer.bias else None
            a = self.normal(x_t @ self.of("weight_ih").t(), t, 0, self.of("gain_ih"), bias)
            a = a + self.normal(h_t @ self.of("weight_hh").t(), t, 1, self.of("gain_hh"), None)
            i, f, g, o = a.chunk(4, -1)
            c_t = torch.sigmoid(f) * c_t + torch.sigmoid(i) * torch.tanh(g)
            z = self.normal(c_t, t, 2, self.of("gain_c"), self.of("bias_c"))
            h_t = torch.sigmoid(o) * torch.tanh(z)
            for k, b in enumerate(now):
                h[b], c[b] = h_t[k], c_t[k]
                y[b].append(h_t[k])
        return [torch.stack(one) for one in y], torch.stack(h), torch.stack(c)


def make(*args: Any, seed: int = 0, **options: Any) -> Any:
    """A layer whose parameters and statistics all differ."""
    torch.manual_seed(seed)
    options = {"max_steps": 3, "dtype": f64} | options
    layer = rnnfast.BatchNormLSTM(*args, **options)
    with torch.no_grad():
        for name, w in layer.named_parameters():
            w.add_(torch.randn_like(w) * 0.3 + (0.5 if "gain" in name else 0.0))
        for name, buffer in layer.named_buffers():
            buffer.add_(torch.rand_like(buffer) * (0.5 if "var" in name else 1.0))
    return layer


def gradients(y: Tensor, h: Tensor, c: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(7)
    loss = sum((t * torch.randn_like(t)).sum() for t in (y, h, c))
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, wanted))


def close(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lengths", [None, [5, 3, 5, 1, 2], [4, 6, 3, 3, 1]])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hidden", [7, 19])
@pytest.mark.parametrize("bias", [True, False])
def test_as_the_paper_says(bias: bool, hidden: int, training: bool, lengths: Any) -> None:
    """Outputs, final states, every gradient, and the running statistics, beyond max_steps too."""
    layer = make(4, hidden, bias=bias, momentum=0.3).train(training)
    x = torch.randn(6, 5, 4, dtype=f64, requires_grad=True)
    h, c = (torch.randn(1, 5, hidden, dtype=f64, requires_grad=True) for _ in range(2))
    plain = Plain(layer)
    counts = lengths or [6] * 5
    want, want_h, want_c = plain([x[:n, b] for b, n in enumerate(counts)], h[0], c[0])
    wanted = [x, h, c, *layer.parameters()]
    want_y = nn.utils.rnn.pad_sequence(want)
    want_y = nn.functional.pad(want_y, (0, 0, 0, 0, 0, 6 - want_y.size(0)))
    y, (h_n, c_n) = layer(x, (h, c), lengths=None if lengths is None else torch.tensor(lengths))
    close([y, h_n[0], c_n[0]], [want_y, want_h, want_c])
    close(gradients(y, h_n[0], c_n[0], wanted), gradients(want_y, want_h, want_c, wanted))
    close([layer.running_mean_l0, layer.running_var_l0], plain.running())
    if not training:
        assert torch.equal(layer.running_mean_l0, make(4, hidden, bias=bias).running_mean_l0)


@pytest.mark.parametrize("lengths", [None, [5, 2, 3]])
@pytest.mark.parametrize("training", [True, False])
def test_layers_and_directions(training: bool, lengths: Any) -> None:
    """The second direction's first step is the last of each sequence."""
    layer = make(4, 6, 2, bidirectional=True, batch_first=True).train(training)
    x, counts = torch.randn(3, 5, 4, dtype=f64), lengths or [5] * 3
    plains = {name: Plain(layer, name) for k in (0, 1) for name in layer._suffixes(k)}
    rows, hs, cs, zeros = [x[b, :n] for b, n in enumerate(counts)], [], [], x.new_zeros(3, 6)
    for k in (0, 1):
        up, h, c = plains[f"_l{k}"](rows, zeros, zeros)
        down, h2, c2 = plains[f"_l{k}_reverse"]([r.flip(0) for r in rows], zeros, zeros)
        rows = [torch.cat([a, b.flip(0)], -1) for a, b in zip(up, down, strict=True)]
        hs, cs = [*hs, h, h2], [*cs, c, c2]
    y, (h_n, c_n) = layer(x, lengths=None if lengths is None else torch.tensor(lengths))
    want = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    close([y, h_n, c_n], [want, torch.stack(hs), torch.stack(cs)])
    for name, plain in plains.items():
        running = [getattr(layer, f"running_{s}{name}") for s in ("mean", "var")]
        close(running, plain.running())


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_is_lengths(enforce_sorted: bool) -> None:
    layer = make(4, 6, bidirectional=True)
    other = copy.deepcopy(layer)
    lengths = torch.tensor([5, 4, 4, 2] if enforce_sorted else [4, 2, 5, 4])
    x = torch.randn(5, 4, 4, dtype=f64)
    hx = torch.randn(2, 4, 6, dtype=f64), torch.randn(2, 4, 6, dtype=f64)
    y, states = layer(x, hx, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    out, packed_states = other(packed, hx)
    assert isinstance(out, PackedSequence)
    close([pad_packed_sequence(out)[0], *packed_states], [y, *states])
    close(other.state_dict().values(), layer.state_dict().values())


def test_padding_is_never_read() -> None:
    layer, x = make(4, 6), torch.randn(5, 3, 4, dtype=f64)
    lengths = torch.tensor([2, 5, 3])
    for b, n in enumerate(lengths.tolist()):
        x[n:, b] = float("nan")
    y, (h_n, c_n) = layer(x, lengths=lengths)
    for found in (y, h_n, c_n, *layer.buffers()):
        assert found.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", [None, [3, 3, 2, 1]])
def test_derivatives(training: bool, sizes: Any) -> None:
    """Of the operator, to the second order."""
    torch.manual_seed(0)
    H = 3
    batch_sizes = None if sizes is None else torch.tensor(sizes)
    shapes = [
        (3, 3, 2) if sizes is None else (9, 2), (3, H), (1, 3, H), (4 * H, 2), (4 * H, H),
        (4 * H,), (4 * H,), (4 * H,), (H,), (H,),
    ]  # fmt: skip
    args = [torch.randn(shape, dtype=f64, requires_grad=True) for shape in shapes]
    mean, var = torch.randn(2, 9 * H, dtype=f64), torch.rand(2, 9 * H, dtype=f64) + 0.5

    def call(*args: Tensor) -> Any:
        return _batch_norm.run(*args, mean, var, batch_sizes, training, 1e-2)[:3]

    assert torch.autograd.gradcheck(call, args)
    assert torch.autograd.gradgradcheck(call, args, atol=1e-4)
    run = (*args, mean, var, batch_sizes, training, 1e-2)
    close(_batch_norm.forward(*run, True)[:5], reference.batch_norm_lstm(*run))


def test_operator() -> None:
    """Schema, fake kernels, and autograd in the dispatcher, as torch checks them."""
    layer = make(3, 5, dtype=torch.float32)
    names = ("weight_ih", "weight_hh", "gain_ih", "gain_hh", "bias", "gain_c", "bias_c")
    weights = [getattr(layer, f"{name}_l0") for name in names]
    for training, save in itertools.product((True, False), repeat=2):
        args = (
            torch.randn(4, 3, 3), torch.randn(3, 5), torch.randn(1, 3, 5), *weights,
            layer.running_mean_l0, layer.running_var_l0, None, training, 1e-5, save,
        )  # fmt: skip
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(_batch_norm.forward, args, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    x = torch.randn(9, 70, 33, dtype=dtype)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        layer = make(33, 150, dtype=dtype, max_steps=4)
        inputs = x.clone().requires_grad_()
        y, (h_n, c_n) = layer(inputs)
        grads = gradients(y, h_n, c_n, [inputs, *layer.parameters()])
        found.append([y, h_n, c_n, *grads, *layer.buffers()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_seeds_and_dropout() -> None:
    layers = [make(4, 6, 2, dropout=0.5, seed=3) for _ in range(2)]
    x, out = torch.randn(4, 3, 4, dtype=f64), []
    for layer in layers:
        torch.manual_seed(5)
        out.append(layer(x)[0])
    assert torch.equal(*out)
    assert not torch.equal(out[0], layers[0](x)[0])
    layers[0].eval()
    assert torch.equal(layers[0](x)[0], layers[0](x)[0])


def test_state_dict() -> None:
    layer, x = make(4, 6, 2, bidirectional=True, max_steps=5), torch.randn(7, 3, 4, dtype=f64)
    layer(x)
    assert layer.running_var_l1_reverse.shape == (5, 54)
    other = rnnfast.BatchNormLSTM(4, 6, 2, bidirectional=True, max_steps=5, dtype=f64)
    other.load_state_dict(layer.state_dict())
    for one in (layer, other):
        one.eval()
    assert torch.equal(layer(x)[0], other(x)[0])
    layer.reset_parameters()
    assert (layer.gain_c_l0 == 0.1).all() and (layer.bias_l1 == 0).all()
    assert (layer.running_var_l0 == 1).all() and (layer.running_mean_l0 == 0).all()


@pytest.mark.parametrize("uneven", [False, True])
def test_several_chunks(uneven: bool) -> None:
    """More rows than the engine takes together, against the reference."""
    layer = make(4, 20, max_steps=50)
    x = torch.randn(60, 24, 4, dtype=f64, requires_grad=True)
    lengths = torch.randint(1, 61, (24,)) if uneven else None
    found = []
    for name in ("cpu", "reference"):
        one = copy.deepcopy(layer)
        with rnnfast.use_engine(name):
            y, (h_n, c_n) = one(x, lengths=lengths)
            grads = gradients(y, h_n, c_n, [x, *one.parameters()])
        found.append([y, h_n, c_n, *grads, *one.buffers()])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    layer = make(5, 9, dtype=torch.float32)
    with torch.no_grad():
        for w in (*layer.parameters(), *layer.buffers()):
            w.copy_(w.to(dtype))
    half = copy.deepcopy(layer).to(dtype)
    x = torch.randn(4, 6, 5).to(dtype)
    y, want = half(x.requires_grad_())[0], layer(x.float())[0]
    assert y.dtype == dtype
    torch.testing.assert_close(y, want.to(dtype))
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype and half.weight_hh_l0.grad.dtype == dtype


def test_forced_reference_and_unbatched() -> None:
    layer, x = make(4, 6), torch.randn(5, 3, 4, dtype=f64)
    other = copy.deepcopy(layer)
    with rnnfast.use_engine("reference"):
        want = other(x)[0]
    close([layer(x)[0], *layer.buffers()], [want, *other.buffers()])
    layer.eval()
    y, (h_n, _) = layer(x[:, 1])
    close([y, h_n], [layer(x)[0][:, 1], layer(x)[1][0][:, 1]])
    with torch.no_grad():
        assert torch.equal(layer(x[:, 1])[0], y)


@works.row(
    "Compilers and export",
    "`BatchNormLSTM`, recurrent batch normalisation, in `torch.compile(fullgraph=True)`, training",
    torch_nn="no such layer",
    error="has no attribute 'BatchNormLSTM'",
)
def test_compiled(library: Any, device: torch.device) -> None:
    assert library.BatchNormLSTM is rnnfast.BatchNormLSTM
    layer = make(4, 6, 2, bidirectional=True, dtype=torch.float32).to(device)
    other, x = copy.deepcopy(layer), torch.randn(5, 3, 4, device=device)
    torch._dynamo.reset()  # each kind of layer is one more version of the same code
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        losses = [m(x)[0].square().sum() for m in (compiled, other)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(layer.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_it_learns_and_evaluates() -> None:
    """Running statistics that followed training serve eval: the losses agree."""
    torch.manual_seed(0)
    layer, head = rnnfast.BatchNormLSTM(1, 16, max_steps=10), nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.01)
    x = torch.randn(10, 64, 1)
    losses = []
    for _ in range(120):
        loss = (head(layer(x)[0][-1]) - x.sum(0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    layer.eval()
    with torch.no_grad():
        late = float((head(layer(x)[0][-1]) - x.sum(0)).square().mean())
    assert losses[-1] < 0.3 * losses[0] and late < 2 * losses[-1] + 0.1 * losses[0]


X = torch.zeros(4, 3, 5)


def layer(**options: Any) -> Any:
    return rnnfast.BatchNormLSTM(5, 6, **({"max_steps": 4} | options))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: layer(max_steps=0), ValueError, "max_steps of BatchNormLSTM must be at least 1"),
        (lambda: layer(max_steps=2.0), TypeError, "max_steps .* must be an int, got float"),
        (lambda: layer(momentum=1.5), ValueError, r"momentum .* must be in \[0, 1\], got 1.5"),
        (lambda: layer(momentum=10**5000), ValueError, "momentum .* got an int of 16610 bits"),
        (
            lambda: layer(eps=10**400),
            ValueError,
            "eps .* a float can hold, got an int of 1329 bits",
        ),
        (lambda: layer(momentum=float("nan")), ValueError, r"must be in \[0, 1\], got nan"),
        (lambda: layer(momentum=None), TypeError, "momentum .* must be a number, got NoneType"),
        (lambda: layer(bidirectional="a"), TypeError, "bidirectional .* must be a bool, got str"),
        (lambda: layer(eps=0), ValueError, "eps of BatchNormLSTM must be positive, got 0"),
        (lambda: layer(dropout=2.0), ValueError, "dropout"),
        (lambda: rnnfast.BatchNormLSTM(5, 0, max_steps=1), ValueError, "hidden_size must be"),
        (lambda: layer()(X[:, :1]), ValueError, "Expected more than 1 value per channel .* of 1"),
        (lambda: layer()(X[:, 0]), ValueError, "Expected more than 1 value per channel"),
        (lambda: layer()(X[:, :0]), ValueError, "got a batch of 0"),
        (lambda: layer()(X[:0]), RuntimeError, "sequence length to be larger than 0"),
        (lambda: layer()(X[..., :2]), RuntimeError, "Expected 5, got 2"),
        (lambda: layer()(X.double()), ValueError, "does not match weight dtype"),
        (lambda: layer()(X, torch.zeros(1, 3, 6)), IndexError, "hx must be a tuple"),
        (
            lambda: layer()(X, (torch.zeros(1, 3, 5), torch.zeros(1, 3, 6))),
            RuntimeError,
            r"Expected hidden\[0\] size \(1, 3, 6\)",
        ),
        (lambda: layer()(X, reset=X[..., 0] > 0), RuntimeError, "takes no reset"),
        (lambda: layer()(X, mask=X[..., 0] > 0), RuntimeError, "takes no mask: give lengths"),
        (lambda: layer()(X, lengths=torch.tensor([4, 5, 1])), RuntimeError, "lengths must be at"),
        (lambda: layer().freeze(), RuntimeError, r"takes no freeze\(\)"),
        (lambda: layer().step(X[0]), RuntimeError, r"takes no step\(\)"),
        (lambda: layer()([1]), AttributeError, "must be a tensor or a PackedSequence"),
        (lambda: layer()(X.to_sparse()), NotImplementedError, "must be a dense tensor"),
    ],
)
def test_errors(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_other_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    with rnnfast.use_engine("cpu"):
        assert layer()(X)[0].shape == (4, 3, 6)
    assert layer(device="meta")(X.to("meta"))[0].shape == (4, 3, 6)
    monkeypatch.setattr(engine, "forced", "cuda")
    with pytest.raises(RuntimeError, match='engine "cuda" was forced, got a tensor on cpu'):
        layer()(X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """The bits of a layer of the type, whose statistics are float32; gradients are float32."""
    one = make(5, 9, 2, bidirectional=True, dtype=torch.float32)
    half = copy.deepcopy(one)
    with torch.no_grad():
        for w in half.parameters():
            w.copy_(w.to(dtype))
    x = torch.randn(4, 6, 5)
    with rnnfast.use_engine(name):
        with torch.autocast("cpu", dtype=dtype):
            y, (h_n, _) = one(x)
            assert y.dtype == h_n.dtype == dtype
            assert one(x, (h_n, h_n.float()))[0].dtype == dtype
            assert copy.deepcopy(one).double()(x)[0].dtype == f64, "float64 stays"
        grads = torch.autograd.grad(y.float().sum(), list(one.parameters()))
        assert all(g.dtype == torch.float32 for g in grads)
        if name == "cpu":  # one layer, since between layers y is rounded
            a, b = (rnnfast.BatchNormLSTM(5, 9, max_steps=2) for _ in range(2))
            with torch.no_grad():
                for p, q in zip(a.parameters(), b.parameters(), strict=True):
                    q.copy_(p.to(dtype))
            with torch.autocast("cpu", dtype=dtype):
                got = a(x)[0]
            assert torch.equal(got, b(x.to(dtype).float())[0].to(dtype))
            close(a.buffers(), b.buffers())


def test_max_steps_is_what_the_buffers_have() -> None:
    one = layer(max_steps=2)
    assert one.max_steps == 2
    with pytest.raises(AttributeError):
        one.max_steps = 9
    assert one(X)[0].shape == (4, 3, 6)


@pytest.mark.parametrize("threads", [1, 2])
def test_explain(threads: int) -> None:
    torch.set_num_threads(threads)
    one = layer(num_layers=2, bidirectional=True)
    rows = rnnfast.explain(one, X).rows
    assert [row.layer for row in rows] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert rows[2].shape == "batch_norm_lstm T=4 B=3 I=12 H=6 float32 train"
    assert {(row.engine, row.threads, row.split) for row in rows} == {("cpu", 1, "serial")}
    large = rnnfast.explain(rnnfast.BatchNormLSTM(64, 256, max_steps=1), batch=64).rows[0]
    if threads > 1 and len(os.sched_getaffinity(0)) > 1:  # a machine may have one processor
        assert large.threads == 2
        assert large.split == "units" and "2 threads take hidden units" in large.reason
    inside = nn.ModuleDict({"a": one, "b": rnnfast.GRU(6, 6)})
    assert len(rnnfast.explain(inside).rows) == 5
    with rnnfast.use_engine("reference"):
        assert rnnfast.explain(one, X).rows[0].engine == "reference"
    assert rnnfast.explain(one.to(torch.float16), X).rows[0].engine == "cpu"
    assert rnnfast.explain(one.to(torch.float8_e5m2), X).rows[0].engine == "none"


def test_what_ran_is_told() -> None:
    one = layer()
    with rnnfast.use_engine("reference"):
        one(X)
    assert rnnfast.last_run()["engine"] == "reference"
    y = one(X)[0]
    ran = rnnfast.last_run()
    assert (ran["engine"], ran["threads"], ran["split"]) == ("cpu", 1, "serial")
    assert ran["kernel_hh"] == "packed"
    with rnnfast.use_engine("reference"):
        layer()(X)
    y.sum().backward()
    assert rnnfast.last_run()["engine"] == "cpu"


def test_operator_errors() -> None:
    one = layer()
    names = ("weight_ih", "weight_hh", "gain_ih", "gain_hh", "bias", "gain_c", "bias_c")
    weights = [getattr(one, f"{name}_l0") for name in names]
    h, mean = torch.zeros(3, 6), one.running_mean_l0
    good = [X, h, h[None], *weights, mean, mean, None, True, 1e-5, False]
    for at, bad, words in (
        (5, torch.zeros(7), r"gain_ih must have shape \(4\*H,\) = \(24,\), got \(7,\)"),
        (7, torch.zeros(6), r"bias must have shape \(4\*H,\) = \(24,\), got \(6,\)"),
        (8, torch.zeros(6).double(), "gain_c must have the dtype of x, float32, got float64"),
        (10, mean[:0], r"running_mean must have shape \(max_steps, 9\*H\), got \(0, 54\)"),
        (11, mean[:, 1:], r"running_var must have shape \(max_steps, 9\*H\) = \(4, 54\)"),
        (14, 0.0, "eps must be positive, got 0"),
        (12, torch.tensor([3, 3]), r"x must have shape \(N, I\)"),
    ):
        args = list(good)
        args[at] = bad
        with pytest.raises(RuntimeError, match=f"rnnfast: {words}"):
            _batch_norm.forward(*args)
    with pytest.raises(RuntimeError, match="x must be float32 or float64, got bfloat16"):
        _batch_norm.forward(*(a.bfloat16() if isinstance(a, Tensor) else a for a in good))


def test_repr() -> None:
    assert repr(layer()) == "BatchNormLSTM(5, 6, max_steps=4)"
    text = repr(layer(bidirectional=True, momentum=0.5))
    assert text == "BatchNormLSTM(5, 6, bidirectional=True, max_steps=4, momentum=0.5)"
