"""zoneout: against a plain loop with the same masks, its expectation, every kind of sequence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import works
from plain_loop import pair, results, results_of_loop
from test_modules import leaves_of
from test_regularize import same, seeded
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast import functional
from rnnfast._masked import Masks
from rnnfast._masked import forward as forward_masked
from rnnfast.cells import cell_spec, zoneout_cell

f64 = torch.float64
T, B, H = 6, 4, 9
KINDS: dict[str, dict[str, Any]] = {
    "LSTM": {"zoneout": (0.3, 0.6)},
    "LSTM one number": {"zoneout": 0.4, "activation": "softsign", "cell_clip": 0.3},
    "LSTM of c": {"zoneout": (0.0, 0.5)},
    "GRU": {"zoneout": 0.4},
    "RNN": {"zoneout": 0.4},
    "RNN relu": {"zoneout": 0.4, "nonlinearity": "relu"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, **options: Any) -> Any:
    given: Any = {"dtype": f64, **KINDS[kind], **options}
    return getattr(rnnfast, kind.split()[0])(5, H, **given)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@kinds
def test_against_a_loop(kind: str, training: bool) -> None:
    """Outputs and gradients, in stacks of both directions, with states and resets."""
    layer = make(kind, num_layers=2, bidirectional=True).train(training)
    x = torch.randn(T, B, 5, dtype=f64, requires_grad=True)
    same(results(layer, layer, x), results_of_loop(layer, x))
    hx = [torch.randn(4, B, H, dtype=f64) for _ in range(2 if "LSTM" in kind else 1)]
    reset = torch.rand(T, B) < 0.3
    given = tuple(hx) if len(hx) == 2 else hx[0]
    same(results(layer, layer, x, given, reset), results_of_loop(layer, x, hx, reset))
    if training:
        assert not torch.equal(layer(x)[0], layer(x)[0])
    else:
        same(leaves_of(layer(x)), leaves_of(layer(x)), exact=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@kinds
def test_gradcheck(kind: str, training: bool) -> None:
    """With the masks fixed, and of the expectation; the operator's second derivatives, too."""
    layer = make(kind).train(training)
    hidden = (1, 2, H)
    shapes = [(4, 2, 5), hidden, *([hidden] if "LSTM" in kind else [])]
    args = [torch.randn(s, dtype=f64, requires_grad=True) for s in shapes]
    names = [n for n, _ in layer.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def run(*tensors: Tensor) -> Any:
        x, *hx = tensors[: -len(names)]
        given = tuple(hx) if len(hx) == 2 else hx[0]
        params = dict(zip(names, tensors[-len(names) :], strict=True))
        return tuple(leaves_of(seeded(functional_call, layer, params, (x, given))))

    assert gradcheck(run, (*args, *weights))
    spec = zoneout_cell(layer._chosen_cell or cell_spec(layer.mode.lower()))
    if spec.clip or "relu" in kind:
        return  # not smooth
    x, h0 = (torch.randn(s, dtype=f64, requires_grad=True) for s in ((3, 2, 3), (2, 3)))
    w = [torch.randn(spec.gates * 3, 3, dtype=f64, requires_grad=True) for _ in range(2)]
    c0 = [torch.randn(1, 2, 3, dtype=f64, requires_grad=True) for _ in range(spec.states - 1)]
    zone = torch.rand(3, 2, spec.states, 3) < 0.5 if training else None
    keep = (0.0, 0.0) if training else (0.3, 0.6)
    none: Any = (None,) * 5

    def operator(x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, *c0: Tensor) -> Any:
        c = c0[0] if c0 else None
        numbers: Any = (*keep, 1.0, spec.id, False, True)
        out = forward_masked(x, h0, c, w_ih, w_hh, *none, zone, None, None, *numbers)
        return out[: 1 + spec.states]

    assert gradgradcheck(operator, (x, h0, *w, *c0))


@kinds
def test_exact_expectation(kind: str) -> None:
    """One step in eval is the mean over all masks, each with its probability: of h in closed form,
    since a step is linear in its mask; over many drawn masks, statistically."""
    layer = make(kind)
    p = pair(layer.zoneout)
    x, h0 = torch.randn(1, B, 5, dtype=f64), torch.randn(1, B, H, dtype=f64)
    hx: Any = (h0, torch.randn(1, B, H, dtype=f64)) if "LSTM" in kind else h0
    plain = make(kind, zoneout=0.0)
    plain.load_state_dict(layer.state_dict())
    before, after = leaves_of(hx), leaves_of(plain(x, hx))[1:]
    want = [q * a + (1 - q) * b for q, a, b in zip(p, before, after)]
    same(leaves_of(layer.eval()(x, hx))[1:], want)
    layer.train()
    many = 4000
    wide = x.expand(1, B, 5).repeat(1, many, 1), [s.repeat(1, many, 1) for s in before]
    given = tuple(wide[1]) if len(wide[1]) == 2 else wide[1][0]
    for got, a, b, mean in zip(leaves_of(seeded(layer, wide[0], given))[1:], before, after, want):
        drawn = got.unflatten(1, (many, B))
        stays = (drawn == a.unsqueeze(1)).all(0)
        # each entry is the old or the new one, exactly, and their mean is that of eval
        assert bool(((drawn == a.unsqueeze(1)) | (drawn - b.unsqueeze(1)).abs().lt(1e-12)).all())
        spread = (a - b).abs() * 0.5 / many**0.5
        error = (drawn.mean(1) - mean).abs()
        assert bool((error <= 5 * spread + 1e-12).all()) and not bool(stays.all())


@kinds
def test_every_kind_of_sequence(kind: str) -> None:
    """Packed in any order, lengths, masks with holes, batch first and unbatched input: in eval the
    numbers of each row alone, in training those of a loop over the rows that were drawn."""
    layer = make(kind, num_layers=2, bidirectional=True).eval()
    x, n = torch.randn(T, B, 5, dtype=f64), torch.tensor([2, 6, 1, 4])
    valid = torch.arange(T).unsqueeze(1) < n
    alone = [leaves_of(layer(x[: n[b], b])) for b in range(B)]
    want = [
        torch.stack([nn.functional.pad(a[0], (0, 0, 0, T - len(a[0]))) for a in alone], 1),
        *(torch.stack([a[k] for a in alone], 1) for k in range(1, len(alone[0]))),
    ]
    same(leaves_of(layer(x, lengths=n)), want)
    same(leaves_of(layer(x, mask=valid)), want)
    out, state = layer(pack_padded_sequence(x, n, enforce_sorted=False))
    same([pad_packed_sequence(out)[0], *leaves_of(state)], want)
    layer.batch_first = True
    y, state = layer(x.transpose(0, 1), lengths=n)
    same([y.transpose(0, 1), *leaves_of(state)], want)
    layer.batch_first, layer.return_last = False, True
    same([layer(x, lengths=n)[0]], [torch.cat([want[1][2], want[1][3]], -1)])
    layer.return_last = False
    layer.train()
    y, state = seeded(layer, x, lengths=n)
    out, end = seeded(layer, pack_padded_sequence(x, n, enforce_sorted=False))
    same([pad_packed_sequence(out)[0], *leaves_of(end)], [y, *leaves_of(state)], exact=True)
    assert bool((y[~valid] == 0).all())
    # a state that never moves stays what it was, also where rows begin late or end early
    frozen = make(kind, num_layers=1, bidirectional=True)
    frozen.zoneout = (0.999999, 0.999999) if "LSTM" in kind else 0.999999
    h0 = torch.randn(2, B, H, dtype=f64)
    hx: Any = (h0, torch.randn(2, B, H, dtype=f64)) if "LSTM" in kind else h0
    _, state = seeded(frozen, x, hx, lengths=n)
    same(leaves_of(state), leaves_of(hx), exact=True)


@kinds
def test_with_everything_else(kind: str) -> None:
    """reset, recompute, the reference, checkpoints, functions and the other options give the same
    for the same masks."""
    layer = make(
        kind, num_layers=2, weight_dropout=0.2, input_dropout=0.3, recurrent_dropout=0.4,
        dropout=0.2,
    )  # fmt: skip
    x, reset = torch.randn(T, B, 5, dtype=f64, requires_grad=True), torch.rand(T, B) < 0.3
    want = results(layer, layer, x, None, reset)
    layer.recompute = True
    same(results(layer, layer, x, None, reset), want)
    layer.recompute = False
    with rnnfast.use_engine("reference"):
        same(results(layer, layer, x, None, reset), want)
    for reentrant in (False, True):
        torch.manual_seed(7)
        again = checkpoint(
            lambda x: tuple(leaves_of(layer(x, None, reset))), x, use_reentrant=reentrant
        )
        for p in (x, *layer.parameters()):
            p.grad = None
        sum((k + 1) * o.square().sum() for k, o in enumerate(again)).backward()
        same([*again, x.grad, *(p.grad for p in layer.parameters())], want, exact=True)
    more = {k: v for k, v in KINDS[kind].items() if k != "nonlinearity"}
    name = {"RNN": "rnn_tanh", "RNN relu": "rnn_relu"}.get(kind, kind.split()[0].lower())
    out = seeded(
        getattr(functional, name), x, None, layer._weights(), num_layers=2, reset=reset,
        dropout=0.2, training=True, weight_dropout=0.2, input_dropout=0.3, recurrent_dropout=0.4,
        **more,
    )  # fmt: skip
    same(leaves_of(out), want[: len(leaves_of(out))], exact=True)
    twin = copy.deepcopy(layer)
    same(results(twin, twin, x, None, reset), want, exact=True)
    assert f"zoneout={KINDS[kind]['zoneout']}" in repr(twin) == repr(layer)


@kinds
def test_recompute_of_long_sequences(kind: str) -> None:
    """Over chunks of steps: padded and packed, gradients of gradients, too."""
    layer = make(kind, recurrent_dropout=0.3)
    x = torch.randn(150, 3, 5, dtype=f64, requires_grad=True)
    n = torch.tensor([150, 90, 20])
    for call in (layer, lambda x: layer(x, lengths=n)):
        wants = []
        for recompute in (False, True):
            layer.recompute = recompute
            wants.append(results(layer, call, x))
        same(*wants)
    layer.eval()
    same(leaves_of(layer(x)), leaves_of(copy.deepcopy(layer)(x)), exact=True)
    layer.recompute = False
    y = layer(x)[0]
    layer.recompute = True
    same([layer(x)[0]], [y])


def test_step_and_frozen_layers() -> None:
    """In eval steps of a stream are those of the sequence; in training each step draws."""
    for kind in KINDS:
        layer = make(kind, num_layers=2).eval()
        x = torch.randn(T, B, 5, dtype=f64)
        with torch.no_grad():
            want = leaves_of(layer(x))
            for _ in range(2):
                state, y = None, []
                for t in range(T):
                    out, state = layer.step(x[t], state)
                    y.append(out)
                same([torch.stack(y), *leaves_of(state)], want)
                same(leaves_of(layer(x)), want)
                layer.freeze()
            layer.unfreeze().train()
            one, other = (leaves_of(layer.step(x[0])) for _ in range(2))
            assert not all(map(torch.equal, one, other))
        layer.recurrent_dropout = 0.5
        with pytest.raises(RuntimeError, match="recurrent_dropout has one mask a sequence"):
            layer.step(x[0])


def test_one_operator_whatever_t_is() -> None:
    layer = rnnfast.LSTM(5, 9, 2, bidirectional=True, zoneout=(0.1, 0.2), recurrent_dropout=0.3)
    counts = []
    for steps in (10, 100):
        n = torch.linspace(steps, steps // 2, B).long()
        for args in ({"lengths": n}, {}):
            with torch.profiler.profile() as profile:
                layer(torch.randn(steps, B, 5, requires_grad=True), **args)[0].sum().backward()
            counts.append(len([e for e in profile.events() if e.name.startswith("aten::")]))
    assert counts[:2] == counts[2:]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN relu"])
def test_in_graphs(kind: str, training: bool) -> None:
    """One graph, with lengths and packed rows, too; padding leaves no trace."""
    torch._dynamo.reset()
    layer = make(kind, num_layers=2, bidirectional=True, recurrent_dropout=0.3).train(training)
    x, n = torch.randn(T, B, 5, dtype=f64, requires_grad=True), torch.tensor([2, 6, 1, 4])
    torch._dynamo.reset()  # each kind of layer is one more version of the same code
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    same(results(layer, traced, x), results(layer, layer, x))
    packed = pack_padded_sequence(x, n, enforce_sorted=False)
    same(leaves_of(seeded(traced, packed)), leaves_of(seeded(layer, packed)))
    spoilt = x.detach().masked_fill(torch.arange(T).view(-1, 1, 1) >= n.view(-1, 1), torch.nan)
    spoilt.requires_grad_()
    got = results(layer, traced, spoilt, lengths=n)
    assert all(bool(g.isfinite().all()) for g in got)
    if not training:
        same(got, results(layer, layer, spoilt, lengths=n))


@works.row(
    "Compilers and export",
    "`zoneout` in `torch.compile(fullgraph=True)`, training: masks inside the recurrence, by seed",
    torch_nn="no such option",
    error="unexpected keyword argument 'zoneout'",
    cuda=False,
)
def test_inductor(library: Any, device: torch.device) -> None:
    """Masks of Inductor's own: each entry of h is the one before or a new one."""
    torch._dynamo.reset()
    layer = library.GRU(5, 9, zoneout=0.5, dtype=f64)
    traced = torch.compile(layer, fullgraph=True)
    x = torch.randn(40, B, 5, dtype=f64)
    y = traced(x)[0]
    stays = (y[1:] == y[:-1]).double().mean()
    assert abs(float(stays) - 0.5) < 5 * (0.25 / y.numel()) ** 0.5
    same([seeded(traced, x)[0]], [seeded(traced, x)[0]], exact=True)
    y.sum().backward()
    assert bool(layer.weight_hh_l0.grad.isfinite().all())


def test_exported_and_truncated() -> None:
    """The expectation in an exported program of any T; each chunk of a long sequence draws."""
    layer = rnnfast.LSTM(5, 9, 2, zoneout=(0.1, 0.5), dtype=f64).eval()
    x = torch.randn(11, B, 5, dtype=f64)
    with torch.no_grad():
        dynamic = {"input": {0: torch.export.Dim("steps", min=2)}}
        program = torch.export.export(layer, (x[:T],), dynamic_shapes=dynamic)
        same([program.module()(x)[0]], [layer(x)[0]])
        chunks = list(rnnfast.truncated(layer, x, steps=4))
        same([torch.cat([y for y, _ in chunks])], [layer(x)[0]])


def test_transforms() -> None:
    """vmap draws as torch's dropout does, per-sample gradients and tangents are right."""
    layer = rnnfast.LSTM(5, 9, 2, zoneout=(0.3, 0.5), recurrent_dropout=0.2, dtype=f64)
    x = torch.randn(3, T, B, 5, dtype=f64)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda one: layer(one)[0])(x)
    want = torch.stack([seeded(layer, one)[0] for one in x])
    same([seeded(vmap(lambda one: layer(one)[0], randomness="same"), x)], [want])
    one = seeded(vmap(lambda one: layer(one)[0], randomness="different"), x[:1].expand_as(x))
    assert not torch.equal(one[0], one[1])
    weights = {k: p.detach() for k, p in layer.named_parameters()}

    def loss(weights: Any, one: Tensor) -> Tensor:
        return functional_call(layer, weights, (one,))[0].sum()

    each = seeded(vmap(grad(loss), in_dims=(None, 0), randomness="same"), weights, x)
    for k, sample in enumerate(x):
        found = torch.autograd.grad(seeded(layer, sample)[0].sum(), list(layer.parameters()))
        same([each[name][k] for name in weights], list(found))
    layer.eval()
    _, tangent = jvp(lambda one: layer(one)[0], (x[0],), (x[1],))
    eps = 1e-6
    near = (layer(x[0] + eps * x[1])[0] - layer(x[0] - eps * x[1])[0]) / (2 * eps)
    torch.testing.assert_close(tangent, near, rtol=1e-6, atol=1e-7)
    with rnnfast.use_engine("cpu"), pytest.raises(RuntimeError, match="was forced and can't run"):
        vmap(lambda one: layer(one)[0])(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@kinds
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    """Against float64, the masks being the same."""
    layer = make(kind, recurrent_dropout=0.3, dtype=torch.float32).to(dtype)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(T, B, 5, dtype=dtype, requires_grad=True)
    got, want = (
        results(layer, layer, x),
        results(exact, exact, x.detach().double().requires_grad_()),
    )
    eps = torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        error = (a.double() - b).detach().abs().max()
        assert float(error) <= 30 * eps * (1 + float(b.detach().abs().max()))


def test_threads_and_splits_give_the_same_bits() -> None:
    layer = rnnfast.LSTM(40, 70, zoneout=(0.2, 0.3), recurrent_dropout=0.3)
    x = torch.randn(20, 8, 40, requires_grad=True)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for split in ("batch", "units") if count > 1 else ("serial",):
                with rnnfast.use_engine("cpu", split=split, kernel="packed"):
                    found.append(results(layer, layer, x))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        same(other, found[0], exact=True)


def test_infinite_states_leave_no_trace() -> None:
    """What is not kept does not count, even where it is infinite."""
    spec = zoneout_cell(cell_spec("rnn_relu"))
    x = torch.tensor([[[torch.inf]], [[1.0]]], dtype=f64)
    one = torch.ones(1, 1, dtype=f64)
    zone = torch.tensor([True, False]).view(2, 1, 1, 1)
    numbers: Any = (0.0, 0.0, 1.0, spec.id, False, True)
    none: Any = (None,) * 5
    y = forward_masked(x, None, None, one, one, *none, zone, None, None, *numbers)[0]
    assert y.flatten().tolist() == [0.0, 1.0]
    assert not Masks().there


WRONG: tuple[Any, ...] = (-0.1, 1.0, 1.5, float("nan"), True, "0.5", None, (0.1, 1.0), (0.1,))


def test_what_is_no_probability_raises() -> None:
    for wrong in WRONG:
        words = r"rnnfast: zoneout of LSTM must be a number in \[0, 1\), or a pair of them for h"
        with pytest.raises(ValueError, match=words):
            rnnfast.LSTM(5, 9, zoneout=wrong)
        if not wrong:
            continue
        layer = rnnfast.LSTM(5, 9)
        layer.zoneout = wrong  # as dropout, it may be set at any time
        with pytest.raises(ValueError, match=words):
            layer(torch.randn(T, B, 5))
    for wrong in (*WRONG[:-2], (0.1, 0.1)):
        with pytest.raises(ValueError, match=r"zoneout of GRU must be a number in \[0, 1\), "):
            rnnfast.GRU(5, 9, zoneout=wrong)
    weights = list(rnnfast.GRU(5, 9).parameters())
    with pytest.raises(ValueError, match=r"its only state is h, got \(0.1, 0.1\)"):
        functional.gru(torch.randn(T, B, 5), None, weights, zoneout=(0.1, 0.1))


def test_what_has_no_meaning_raises() -> None:
    with pytest.raises(ValueError, match="zoneout of LSTM has no form with a projection"):
        rnnfast.LSTM(5, 9, proj_size=4, zoneout=0.1)
    layer: Any = rnnfast.LSTM(5, 9, proj_size=4)
    layer.zoneout = 0.1
    with pytest.raises(RuntimeError, match="zoneout has no form with a projection"):
        layer(torch.randn(T, B, 5))
    normed = rnnfast.GRU(5, 9, layer_norm=True)
    for other in (rnnfast.IndRNN(5, 9), rnnfast.MinGRU(5, 9), normed):
        other.zoneout = 0.1
        with pytest.raises(RuntimeError, match="zoneout is for the cells of LSTM, GRU and RNN"):
            other(torch.randn(T, B, 5))
    with pytest.raises(RuntimeError, match="quantize has no kernels for zoneout"):
        rnnfast.quantize(rnnfast.LSTM(5, 9, zoneout=0.1))
    model = rnnfast.accelerate(nn.ModuleDict({"a": nn.GRU(5, 9)}))
    swapped: Any = model["a"]
    swapped.zoneout = 0.1
    with pytest.raises(RuntimeError, match="got a with zoneout=0.1; set them"):
        rnnfast.restore(model)


def test_operator_checks() -> None:
    """What the kernel says, the fake kernel says, too."""
    x, w_ih, w_hh = torch.randn(T, B, 5), torch.randn(4 * H, 5), torch.randn(4 * H, H)
    flags = {"dtype": torch.bool}
    zone, kept = torch.zeros(T, B, 2, H, **flags), torch.zeros(B, H, **flags)
    cell = cell_spec("lstm_zoneout").id

    def run(device: str, zone: Any = None, kept: Any = None, keep: Any = 0.0, cell: int = cell,
            w_hr: Any = None) -> Any:  # fmt: skip
        w = w_hh if w_hr is None else w_hh[:, : w_hr.size(0)]
        tensors = (x, None, None, w_ih, w, None, None, w_hr, None, None, zone, kept, None)
        there = [t.to(device) if isinstance(t, Tensor) else t for t in tensors]
        return forward_masked(*there, keep, 0.0, 1.0, cell, False, True)

    wrong: list[tuple[dict[str, Any], str]] = [
        ({"zone": zone, "cell": 0}, "zone, keep_h and keep_c are for cells of zoneout, got cell l"),
        ({"keep": 0.5, "cell": 0}, "zone, keep_h and keep_c are for cells of zoneout"),
        ({"keep": 1.5}, r"keep_h and keep_c must be in \[0, 1\], got 1.5"),
        ({"zone": zone[:1]}, r"zone must have shape \(T, B, S, H\) = \(6, 4, 2, 9\), got"),
        ({"zone": zone.float()}, "zone must be bool, got float32"),
        ({"zone": zone, "w_hr": torch.randn(3, H)}, "w_hr is for lstm only, got cell lstm_z"),
        ({"kept": kept[:, 1:]}, r"h_kept must have shape \(B, H\)"),
        ({"kept": kept.float()}, "h_kept must be bool, got float32"),
    ]
    for given, words in wrong:
        for device in ("cpu", "meta"):
            with pytest.raises(RuntimeError, match=words):
                run(device, **given)
    for device in ("cpu", "meta"):
        assert run(device, zone, kept)[0].shape == (T, B, H)
