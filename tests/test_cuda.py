"""The CUDA engine's numbers: every cell, type, size and way to call it, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_cuda import (
    FORMS,
    KINDS,
    LOSSES,
    PRECISIONS,
    Setup,
    assert_near,
    build,
    check,
    inputs_of,
    leaves_of,
    module_on,
    products,
    results_of,
    same_bits,
)
from pairwise import pairwise
from torch import nn

import rnnfast

pytestmark = pytest.mark.cuda

kinds = pytest.mark.parametrize("kind", KINDS)
# T, B, I, H
SIZES = (
    (1, 1, 1, 1),
    (2, 3, 5, 33),
    (17, 1, 5, 100),
    (2, 130, 1, 33),
    (17, 3, 5, 129),
    (1, 3, 1, 129),
    (17, 130, 5, 1),
    (1, 130, 5, 100),
)


def _setup(row: dict[str, Any]) -> Setup:
    """Of a row of options, what there is: a projection for LSTMs of several units only, and a relu
    that keeps from its kink (see on_cuda.build)."""
    row = dict(row)
    row["kind"], row["precision"] = row.pop("what")
    row["seq_len"], row["batch"], row["input_size"], row["hidden"] = row.pop("sizes")
    proj = {"none": 0, "one": 1, "most": row["hidden"] - 1}[row.pop("proj")]
    row["proj"] = proj if row["kind"] == "LSTM" and proj < row["hidden"] else 0
    row["bias"] |= row["kind"].endswith("relu")
    return Setup(**row)


def setups() -> list[Setup]:
    """Each pair of options for every cell and type, and large ones on top."""
    factors: dict[str, Any] = {
        "what": [(kind, precision) for kind in KINDS for precision in PRECISIONS],
        "sizes": SIZES,
        "form": FORMS,
        "num_layers": (1, 2, 3),
        "bidirectional": (False, True),
        "reset": (False, False, True),
        "loss": LOSSES,
        "bias": (True, False),
        "state": (True, False),
        "proj": ("none", "one", "most"),
    }
    found = [_setup(row) for row in pairwise(factors)]
    for kind in KINDS:
        for precision in PRECISIONS:
            found.append(Setup(kind, precision, 17, 130, 5, 129))
    for precision in PRECISIONS:
        found += [
            Setup("LSTM", precision, 9, 5, 33, 100, proj=33, form=form, bidirectional=two)
            for form in ("contiguous", "packed_uneven")
            for two in (False, True)
        ]
        # long sums: K of 1024 and 2048, and of 3000 rows for the weights' gradients
        found.append(Setup("GRU", precision, 3, 7, 2048, 64))
        found.append(Setup("LSTM", precision, 3, 7, 16, 1024))
        found.append(Setup("RNN_tanh", precision, 30, 100, 16, 32))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("setup", setups(), ids=str)
def test_numbers(setup: Setup, device: torch.device) -> None:
    check(setup, device)


sizes = st.integers(1, 70)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(tuple(KINDS)),
    shape=st.tuples(st.integers(1, 9), sizes, sizes, sizes),
    form=st.sampled_from(FORMS),
    options=st.fixed_dictionaries(
        {
            "num_layers": st.integers(1, 3),
            "bidirectional": st.booleans(),
            "bias": st.booleans(),
            "state": st.booleans(),
            "reset": st.booleans(),
            "loss": st.sampled_from(LOSSES),
        }
    ),
)
def test_any_sizes(
    kind: str,
    shape: tuple[int, int, int, int],
    form: str,
    options: dict[str, Any],
    device: torch.device,
) -> None:
    check(Setup(kind, "float64", *shape, **options, form=form), device)


MODES: dict[str, Any] = {"no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"num_layers": 3}, {"form": "packed_uneven"}], ids=str
)
@kinds
def test_without_gradients(kind: str, options: Any, mode: str, device: torch.device) -> None:
    """The bits of a call that saves for backward."""
    problem = build(Setup(kind, "float32", 5, 4, 7, 33, **options))
    layer = module_on(problem, True, device, torch.float32)
    x, _ = inputs_of(problem, device, torch.float32)
    given: Any = x
    if "form" in options:
        given = nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor([1, 5, 3, 3]), enforce_sorted=False
        )
    want = leaves_of(layer(given))
    with MODES[mode]():
        got = leaves_of(layer(given))
    assert not any(t.requires_grad for t in got) and all(t.requires_grad for t in want)
    assert same_bits(got, [t.detach() for t in want])


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
@kinds
def test_backward_in_eval_mode(kind: str, options: Any, device: torch.device) -> None:
    """Which cuDNN refuses."""
    problem = build(Setup(kind, "float64", 5, 4, 7, 33, **options))
    layer = module_on(problem, True, device, torch.float64)
    x, _ = inputs_of(problem, device, torch.float64)
    assert same_bits(results_of(layer.eval(), x), results_of(layer.train(), x))


@pytest.mark.parametrize("num_layers", [1, 2])
@kinds
def test_dropout_and_unbatched_input(kind: str, num_layers: int, device: torch.device) -> None:
    problem = build(Setup(kind, "float64", 5, 4, 7, 33, num_layers=num_layers))
    layer = module_on(problem, True, device, torch.float64)
    x, _ = inputs_of(problem, device, torch.float64)
    together = leaves_of(layer(x))
    alone = leaves_of(layer(x[:, 2]))
    assert_near(alone, [t[:, 2] for t in together])
    layer.dropout = 0.5
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(results_of(layer, x))
    assert same_bits(*runs)
    assert (num_layers == 1) is torch.equal(runs[0][0], together[0])


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}], ids=str)
@kinds
def test_empty_batch(kind: str, options: Any, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = module_on(
            build(Setup(kind, "float32", 5, 4, 7, 33, **options)), True, device, dtype
        )
        x = torch.zeros(5, 0, 7, device=device, dtype=dtype, requires_grad=True)
        y, last = layer(x)
        assert y.shape == (5, 0, 33 * (1 + layer.bidirectional)) and y.device == x.device
        (y.sum() + sum(s.sum() for s in leaves_of(last))).backward()
        assert x.grad is not None and x.grad.shape == x.shape
        for p in layer.parameters():
            assert torch.equal(p.grad, torch.zeros_like(p))


def test_empty_sequence_raises(device: torch.device) -> None:
    layer = rnnfast.GRU(5, 9, device=device)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        layer(torch.zeros(0, 3, 5, device=device))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(cell: str, bias: bool, precision: str, device: torch.device) -> None:
    """One step and its gradients, against torch.nn in float64."""
    dtype, rounding, _ = PRECISIONS[precision]
    for batch, hidden in ((1, 1), (3, 33), (130, 100)):
        ours = getattr(rnnfast, cell)(5, hidden, bias=bias).to(dtype)
        exact = getattr(nn, cell)(5, hidden, bias=bias).double()
        exact.load_state_dict(ours.state_dict())
        ours = ours.to(device)
        x, h = torch.randn(batch, 5).to(dtype), torch.randn(batch, hidden).to(dtype)
        found = []
        for module, where, as_type in ((ours, device, dtype), (exact, "cpu", torch.float64)):
            leaves = [t.to(where, as_type).requires_grad_() for t in (x, h)]
            state = (leaves[1], leaves[1] / 2) if cell == "LSTMCell" else leaves[1]
            with products(precision == "tf32"):
                outputs = leaves_of(module(leaves[0], state))
                loss = torch.stack([out.double().square().sum() for out in outputs]).sum()
                grads = torch.autograd.grad(loss, [*leaves, *module.parameters()])
            found.append([*outputs, *grads])
        assert_near(found[0], found[1], max(1e-10, 16 * rounding))
        with products(False):
            assert_near(
                leaves_of(ours(x.to(device))), leaves_of(exact(x.double())), 16 * rounding + 1e-10
            )


@pytest.mark.parametrize("num_layers", [1, 3])
@kinds
def test_a_stream_of_steps_is_the_sequence(
    kind: str, num_layers: int, device: torch.device
) -> None:
    problem = build(Setup(kind, "float64", 6, 4, 7, 33, num_layers=num_layers))
    layer = module_on(problem, True, device, torch.float64)
    x, hx = inputs_of(problem, device, torch.float64)
    first: Any = tuple(hx) if len(hx) > 1 else hx[0]
    reset = (torch.rand(6, 4) < 0.3).to(device)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            want, last = layer(x, first, reset)
            state, ys = first, []
            for t in range(6):
                y, state = layer.step(x[t], state, reset[t])
                ys.append(y)
            assert_near([torch.stack(ys), *leaves_of(state)], [want, *leaves_of(last)])
            alone, _ = layer.step(x[0, 1])
            assert_near([alone], [layer(x[:1, 1])[0][0]])


@pytest.mark.parametrize("padding", ["nan", "inf"])
@kinds
def test_padding_is_never_read(kind: str, padding: str, device: torch.device) -> None:
    problem = build(Setup(kind, "float32", 9, 3, 5, 17, num_layers=2, bidirectional=True))
    layer = module_on(problem, True, device, torch.float32)
    x = problem.x.float()
    lengths = torch.tensor([9, 5, 2])
    for b, length in enumerate(lengths):
        x[length:, b] = float(padding)
    x = x.to(device).requires_grad_()
    y, state = layer(nn.utils.rnn.pack_padded_sequence(x, lengths))
    loss = y.data.sum() + sum(s.sum() for s in leaves_of(state))
    grads = torch.autograd.grad(loss, [x, *layer.parameters()])
    assert all(bool(t.isfinite().all()) for t in (loss, *grads))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@kinds
def test_nan_stays_in_its_sequence(kind: str, precision: str, device: torch.device) -> None:
    problem = build(Setup(kind, precision, 4, 40, 33, 17))
    layer = module_on(problem, True, device, problem.setup.dtype)
    x = problem.x.to(device, problem.setup.dtype)
    bad = x.clone()
    bad[1, 5, 32], bad[1, 20, 0] = float("nan"), float("inf")
    with torch.no_grad():
        clean, spoilt = layer(x)[0], layer(bad)[0]
    others = [b for b in range(40) if b not in (5, 20)]
    assert same_bits([clean[:, others]], [spoilt[:, others]])
    assert bool(spoilt[1:, 5].isnan().all())


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("IndRNN")])
def test_training_lowers_the_loss_as_torch_does(kind: str, device: torch.device) -> None:
    problem = build(Setup(kind, "float64", 6, 5, 4, 17, num_layers=2))
    x, target = problem.x.to(device), torch.randn(6, 5, 17, dtype=torch.float64).to(device) / 4
    losses = []
    for ours in (True, False):
        module = module_on(problem, ours, device, torch.float64)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        mine = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = (module(x)[0] - target).square().mean()
            loss.backward()
            optimizer.step()
            mine.append(loss.detach())
        losses.append(torch.stack(mine))
    assert_near(losses[:1], losses[1:], 1e-8)
    assert losses[0][-1] < losses[0][0]
