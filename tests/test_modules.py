"""Layers and cells against torch.nn: numbers, gradients, state, checkpoints, behaviour."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import cases
import pytest
import tolerance
import torch
from pairwise import pairwise
from torch import Tensor, nn

import rnnfast

LAYERS: dict[str, dict[str, Any]] = {
    "LSTM": {},
    "GRU": {},
    "RNN": {},
    "RNN relu": {"nonlinearity": "relu"},
}
CELLS: dict[str, dict[str, Any]] = {
    "LSTMCell": {},
    "GRUCell": {},
    "RNNCell": {},
    "RNNCell relu": {"nonlinearity": "relu"},
}


def pair(
    name: str, *args: Any, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, Any]:
    """Our module and torch.nn's with the same parameters."""
    kind = name.split()[0]
    options = {**(LAYERS | CELLS)[name], **options, "dtype": dtype}
    theirs = getattr(nn, kind)(*args, **options)
    ours = getattr(rnnfast, kind)(*args, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def leaves_of(result: Any) -> list[Tensor]:
    """The tensors of a nested output, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, nn.utils.rnn.PackedSequence):
        return [result.data]
    return [leaf for part in result for leaf in leaves_of(part)]


def run(module: nn.Module, x: Any, hx: Any, cotangents: list[Tensor]) -> cases.Tensors:
    """Outputs and all gradients of one call."""
    x = x.detach().clone().requires_grad_()
    hx = None if hx is None else [h.detach().clone().requires_grad_() for h in hx]
    state = None if hx is None else (tuple(hx) if len(hx) > 1 else hx[0])
    module.zero_grad()
    outputs = leaves_of(module(x, state))
    torch.autograd.backward(outputs, [c.to(x.dtype) for c in cotangents])
    results = {f"out{i}": out.detach() for i, out in enumerate(outputs)} | {"dx": x.grad}
    results |= {f"dhx{i}": h.grad for i, h in enumerate(hx or [])}
    return results | {f"d{name}": p.grad for name, p in module.named_parameters()}


def noisy(
    theirs: nn.Module, x: Tensor, hx: Any, cotangents: list[Tensor], seed: int
) -> tolerance.Tensors:
    """torch.nn again, on numbers that differ by less than a rounding."""
    gen = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(theirs)
    for p in twin.parameters():
        p.data = tolerance.last_bits(p, gen)
    state = None if hx is None else [tolerance.last_bits(h, gen) for h in hx]
    return run(twin, tolerance.last_bits(x, gen), state, cotangents)


def run_exactly(theirs: nn.Module, x: Tensor, hx: Any, cotangents: list[Tensor]) -> cases.Tensors:
    state = None if hx is None else [h.double() for h in hx]
    return run(copy.deepcopy(theirs).double(), x.double(), state, cotangents)


def compare(ours: nn.Module, theirs: nn.Module, x: Tensor, hx: list[Tensor] | None) -> None:
    """The tolerance rule with torch.nn in float64 as the reference, outputs and every gradient."""
    state = None if hx is None else (tuple(hx) if len(hx) > 1 else hx[0])
    with torch.no_grad():
        cotangents = [torch.randn_like(out) for out in leaves_of(theirs(x, state))]
    ref = run_exactly(theirs, x, hx, cotangents)
    peer = tolerance.Peer(
        run(theirs, x, hx, cotangents), lambda seed: noisy(theirs, x, hx, cotangents, seed)
    )
    tolerance.check(run(ours, x, hx, cotangents), peer, ref, x.dtype)


ROWS = pairwise(
    {
        "name": tuple(LAYERS),
        "num_layers": (1, 2, 3),
        "bias": (True, False),
        "batch_first": (False, True),
        "bidirectional": (False, True),
        "dtype": cases.DTYPES,
        "batched": (True, False),
        "state": (True, False),
        "hidden": (1, 3, 8, 17, 33, 64),
        "batch": (1, 2, 5, 7),
        "seq_len": (1, 2, 7),
    }
)
PROJ_ROWS = pairwise(
    {
        "proj_size": (1, 5, 16),
        "num_layers": (1, 2, 3),
        "bias": (True, False),
        "batch_first": (False, True),
        "bidirectional": (False, True),
        "dtype": cases.DTYPES,
        "batched": (True, False),
        "state": (True, False),
        "hidden": (17, 33),
        "batch": (1, 5),
        "seq_len": (1, 7),
    }
)


def row_id(row: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in row.items()).replace("torch.", "").replace(" ", "_")


@pytest.mark.parametrize("row", ROWS + [{"name": "LSTM", **row} for row in PROJ_ROWS], ids=row_id)
def test_layer_parity(row: dict[str, Any]) -> None:
    row = dict(row)
    batched, state = row.pop("batched"), row.pop("state")
    hidden, batch, seq_len = row.pop("hidden"), row.pop("batch"), row.pop("seq_len")
    name, dtype = row.pop("name"), row["dtype"]
    ours, theirs = pair(name, 5, hidden, **row)
    lead = (batch,) if batched else ()
    shape = (*lead, seq_len, 5) if row["batch_first"] else (seq_len, *lead, 5)
    x = torch.randn(shape, dtype=dtype)
    hx = None
    if state:
        rows = row["num_layers"] * (1 + row["bidirectional"])
        widths = [row.get("proj_size") or hidden] + [hidden] * (name == "LSTM")
        hx = [torch.randn(rows, *lead, width, dtype=dtype) for width in widths]
    keep_from_the_kink(theirs, x, hx)
    compare(ours, theirs, x, hx)


def keep_from_the_kink(theirs: nn.Module, x: Tensor, hx: list[Tensor] | None) -> None:
    """relu within rounding of zero has no defined gradient: such a draw would test nothing."""
    if getattr(theirs, "nonlinearity", "") != "relu":
        return
    exact = copy.deepcopy(theirs).double()
    state = None if hx is None else hx[0].double()
    with torch.no_grad():
        outputs = leaves_of(exact(x.double(), state))
    smallest = [float(out[out > 0].min()) for out in outputs if (out > 0).any()]
    assert min(smallest, default=1.0) > 1e-6, "choose another seed"


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["f32", "f64"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_cell_parity(name: str, dtype: torch.dtype, bias: bool, batched: bool) -> None:
    for hidden in (1, 17, 64):
        ours, theirs = pair(name, 5, hidden, bias=bias, dtype=dtype)
        lead = (6,) if batched else ()
        x = torch.randn(*lead, 5, dtype=dtype)
        states = [torch.randn(*lead, hidden, dtype=dtype) for _ in range(1 + (name == "LSTMCell"))]
        for hx in (None, states):
            compare(ours, theirs, x, hx)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["f32", "f64"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_draws_the_same_masks(name: str, dtype: torch.dtype, batch_first: bool) -> None:
    ours, theirs = pair(
        name,
        5,
        17,
        num_layers=3,
        dropout=0.4,
        bidirectional=True,
        batch_first=batch_first,
        dtype=dtype,
    )
    x = torch.randn(4, 6, 5, dtype=dtype)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(7)
        out = leaves_of(module(x))
        module.zero_grad()
        out[0].square().sum().backward()
        results.append([*out, *(p.grad for p in module.parameters())])
    tight = (
        {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    )
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **tight)
    torch.manual_seed(7)
    first = leaves_of(ours(x))[0]
    assert not torch.equal(first, leaves_of(ours(x))[0]), "dropout did nothing in training"
    ours.eval(), theirs.eval()
    torch.testing.assert_close(leaves_of(ours(x))[0], leaves_of(theirs(x))[0], **tight)
    assert tolerance.same_bits(leaves_of(ours(x))[0], leaves_of(ours(x))[0])


def test_dropout_is_read_at_each_call() -> None:
    ours, theirs = pair("LSTM", 5, 17, num_layers=2)
    ours.dropout = theirs.dropout = 1.0
    x = torch.randn(4, 6, 5)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_empty_batch(name: str, batch_first: bool) -> None:
    ours, theirs = pair(name, 5, 17, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn((0, 4, 5) if batch_first else (4, 0, 5), requires_grad=True)
    got, want = leaves_of(ours(x)), leaves_of(theirs(x))
    assert [g.shape for g in got] == [w.shape for w in want]
    sum(g.sum() for g in got).backward()
    assert x.grad is not None and x.grad.shape == x.shape
    for parameter in ours.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("name", LAYERS)
def test_empty_sequence_raises_as_torch_does(name: str) -> None:
    ours, theirs = pair(name, 5, 17)
    for module in (theirs, ours):
        with pytest.raises(
            RuntimeError, match="Expected sequence length to be larger than 0 in RNN"
        ):
            module(torch.randn(0, 3, 5))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "dropout": 0.25},
]


@pytest.mark.parametrize(
    "options", [*OPTIONS, {"proj_size": 4, "num_layers": 2, "bidirectional": True}]
)
@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_both_ways_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    if "proj_size" in options and name != "LSTM":
        with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
            getattr(rnnfast, name.split()[0])(5, 9, **options)
        return
    kind, options = name.split()[0], {**LAYERS[name], **options}
    theirs, ours = getattr(nn, kind)(5, 9, **options), getattr(rnnfast, kind)(5, 9, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    ours.load_state_dict(torch.load(buffer), strict=True)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert tolerance.same_bits(a.detach(), b.detach())
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert tolerance.same_bits(a.detach(), b.detach())
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours.all_weights[0][0] is ours.weight_ih_l0


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_same_seed_same_parameters(name: str) -> None:
    kind, options = name.split()[0], (LAYERS | CELLS)[name]
    torch.manual_seed(3)
    theirs = getattr(nn, kind)(5, 9, **options)
    torch.manual_seed(3)
    ours = getattr(rnnfast, kind)(5, 9, **options)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert tolerance.same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_attributes_and_repr(name: str) -> None:
    kind = name.split()[0]
    extra = OPTIONS if name in LAYERS else [{}, {"bias": False}]
    for options in extra:
        options = {**(LAYERS | CELLS)[name], **options}
        theirs, ours = getattr(nn, kind)(5, 9, **options), getattr(rnnfast, kind)(5, 9, **options)
        # torch.nn.RNN's repr does not tell
        hidden = ", nonlinearity=relu" if name == "RNN relu" else ""
        assert repr(ours) == repr(theirs)[:-1] + hidden + ")"
        public = {k: v for k, v in vars(theirs).items() if not k.startswith("_")}
        for key, value in public.items():
            assert getattr(ours, key) == value, key
        assert [k for k, _ in ours.named_parameters()] == [k for k, _ in theirs.named_parameters()]
    if name in LAYERS:
        assert isinstance(ours, nn.RNNBase)
        assert ours.mode == theirs.mode
    else:
        assert isinstance(ours, nn.RNNCellBase)
    assert not isinstance(ours, getattr(nn, kind))


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


ALL_MODULES: list[Callable[[], nn.Module]] = [
    lambda: rnnfast.LSTM(5, 9, 2, bidirectional=True, proj_size=4),
    lambda: rnnfast.GRU(5, 9, 2, bias=False),
    lambda: rnnfast.RNN(5, 9, nonlinearity="relu"),
    lambda: rnnfast.IndRNN(5, 9, 2, nonlinearity="tanh", bidirectional=True),
    lambda: rnnfast.LSTMCell(5, 9),
    lambda: rnnfast.GRUCell(5, 9),
    lambda: rnnfast.RNNCell(5, 9),
]


@pytest.mark.parametrize("copied", [through_pickle, through_torch_save, copy.deepcopy])
@pytest.mark.parametrize("make", ALL_MODULES)
def test_pickle_and_copies(make: Callable[[], nn.Module], copied: Callable[..., nn.Module]) -> None:
    module = make()
    x = torch.randn(3, 5) if "Cell" in type(module).__name__ else torch.randn(4, 3, 5)
    want = leaves_of(module(x))
    for stage in range(2):
        twin = copied(module)
        assert type(twin) is type(module) and repr(twin) == repr(module)
        for a, b in zip(leaves_of(twin(x)), want, strict=True):
            assert tolerance.same_bits(a.detach(), b.detach())
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        # a copy has parameters of its own, and computes with them
        assert tolerance.same_bits(leaves_of(module(x))[0].detach(), want[0].detach())
        assert not torch.equal(leaves_of(twin(x))[0], want[0])
        if stage == 0:
            leaves_of(module(x))[0].sum().backward()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["f32", "f64"])
def test_indrnn_layer(
    nonlinearity: str, bidirectional: bool, batch_first: bool, dtype: torch.dtype
) -> None:
    """IndRNN is nn.RNN with diagonal recurrent matrices."""
    options = {
        "num_layers": 2,
        "nonlinearity": nonlinearity,
        "bidirectional": bidirectional,
        "batch_first": batch_first,
        "dtype": dtype,
    }
    ours, theirs = rnnfast.IndRNN(5, 17, **options), nn.RNN(5, 17, **options)
    state = ours.state_dict()
    assert {tuple(v.shape) for k, v in state.items() if "weight_hh" in k} == {(17,)}
    theirs.load_state_dict({k: v.diag() if "weight_hh" in k else v for k, v in state.items()})
    x = torch.randn(7, 6, 5, dtype=dtype)
    # the state's batch is 6 or 7 by batch_first
    batch = 7 if batch_first else 6
    hx = [torch.randn(4 if bidirectional else 2, batch, 17, dtype=dtype)]
    keep_from_the_kink(theirs, x, hx)
    cotangents = [torch.randn_like(out) for out in leaves_of(theirs(x, hx[0]))]
    exact = copy.deepcopy(theirs).double()
    ref = run(exact, x.double(), [hx[0].double()], cotangents)
    peer, got = run(theirs, x, hx, cotangents), run(ours, x, hx, cotangents)
    for results in (ref, peer):
        for key in [k for k in results if "weight_hh" in k]:
            results[key] = results[key].diagonal()
    tolerance.check(got, peer, ref, dtype)


def test_indrnn_defaults_and_unbatched() -> None:
    layer = rnnfast.IndRNN(5, 9)
    assert layer.nonlinearity == "relu" and layer.num_layers == 1 and not layer.batch_first
    x = torch.randn(4, 5)
    y, h = layer(x)
    assert y.shape == (4, 9) and h.shape == (1, 9)
    torch.testing.assert_close(y, layer(x[:, None])[0][:, 0])
    with pytest.raises(ValueError, match="nonlinearity"):
        rnnfast.IndRNN(5, 9, nonlinearity="sigmoid")


def test_replaced_and_tied_parameters_are_used() -> None:
    """Weights are read at each call: assignment, tying, a write through .data, load with assign."""
    ours, theirs = pair("LSTM", 9, 9, num_layers=2)
    x = torch.randn(4, 3, 9)
    for module in (ours, theirs):
        torch.manual_seed(5)
        module.weight_hh_l0 = nn.Parameter(torch.randn(36, 9) / 3)
        module.weight_ih_l1 = module.weight_ih_l0
        module.bias_ih_l0.data.fill_(0.25)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    replacement = {k: v * 0.5 for k, v in theirs.state_dict().items()}
    for module in (ours, theirs):
        module.load_state_dict(replacement, assign=True)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def test_weight_norm_and_functional_call() -> None:
    ours, theirs = pair("GRU", 5, 9)
    x = torch.randn(4, 3, 5)
    for module in (ours, theirs):
        nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
        module.parametrizations.weight_hh_l0.original0.data.mul_(1.5)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    ours(x)[0].sum().backward()
    assert ours.parametrizations.weight_hh_l0.original0.grad.abs().sum() > 0
    ours, theirs = pair("GRU", 5, 9)
    swapped = {k: v.detach() * 2 for k, v in theirs.named_parameters()}
    got, want = (torch.func.functional_call(m, swapped, (x,))[0] for m in (ours, theirs))
    torch.testing.assert_close(got, want)


def test_parameters_own_their_storage() -> None:
    """What safetensors, FSDP and swapping need: no parameter is a view of a common buffer."""
    layer = rnnfast.LSTM(5, 9, 2, bidirectional=True)
    layer.flatten_parameters()
    pointers = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    assert len(pointers) == len(list(layer.parameters()))
    for p in layer.parameters():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()


def test_hooks_training_flag_and_dtype_moves() -> None:
    layer = rnnfast.GRU(5, 9, num_layers=2, dropout=0.5)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(4, 3, 5)
    layer.eval()
    assert tolerance.same_bits(layer(x)[0].detach(), layer(x)[0].detach())
    assert len(calls) == 2
    y, h = layer.double()(x.double())
    assert y.dtype == h.dtype == torch.float64
    assert layer.float()(x)[0].dtype == torch.float32
    assert rnnfast.GRU(5, 9, device="meta").weight_ih_l0.is_meta
    assert nn.utils.skip_init(rnnfast.LSTM, 5, 9).weight_ih_l0.shape == (36, 5)


@pytest.mark.parametrize("name", LAYERS)
def test_inference_mode_and_no_grad(name: str) -> None:
    ours, theirs = pair(name, 5, 17, num_layers=2)
    x = torch.randn(7, 5, 5)
    want = leaves_of(theirs(x))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = leaves_of(ours(x))
        assert not any(g.requires_grad for g in got)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)


def test_training_lowers_the_loss_as_torch_does() -> None:
    """Twenty steps of Adam from the same start: the losses agree to four digits, and fall."""
    ours, theirs = pair("LSTM", 5, 17, num_layers=2, batch_first=True)
    x, target = torch.randn(6, 12, 5), torch.randn(6, 12, 17) / 4
    losses = []
    for module in (ours, theirs):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        mine = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (module(x)[0] - target).square().mean()
            loss.backward()
            optimizer.step()
            mine.append(float(loss.detach()))
        losses.append(mine)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]
