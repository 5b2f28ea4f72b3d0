"""The on-chip kernel of the CUDA engine: its numbers at every tile, against float64 and the step
engine, and rows that know nothing of each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import CUDA_TESTS_ON
from on_cuda import (
    FORMS,
    LOSSES,
    PRECISIONS,
    Setup,
    assert_near,
    build,
    check,
    check_tensor,
    inputs_of,
    kernel_forced,
    kernel_ran,
    leaves_of,
    module_on,
    on_cpu,
    products,
    results_of,
    run_exactly,
    run_ours,
    run_peer,
    run_peer_again,
    same_bits,
    spoil_free_memory,
)
from pairwise import pairwise
from tolerance import Peer
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

pytestmark = pytest.mark.cuda

KINDS = ("LSTM", "GRU", "RNN_tanh", "RNN_relu")
ROUNDED = ("tf32", "float16", "bfloat16")

kinds = pytest.mark.parametrize("kind", KINDS)
precisions = pytest.mark.parametrize("precision", ROUNDED)


def hidden_sizes(kind: str, precision: str) -> tuple[int, ...]:
    """Nine of them: each tile full, one short of full or just begun."""
    if kind.startswith("RNN"):
        if precision == "tf32":
            return 1, 16, 33, 64, 65, 72, 120, 127, 128
        return 1, 33, 72, 127, 128, 129, 200, 255, 256
    if precision == "tf32":
        return 1, 31, 32, 33, 64, 65, 72, 127, 128
    most = 176 if kind == "LSTM" else 192
    return 1, 31, 32, 40, 64, 65, 128, most - 1, most


def setups() -> list[Setup]:
    """Each pair of options, and each size of each cell and type."""
    factors: dict[str, Any] = {
        "what": [(kind, precision) for kind in KINDS for precision in ROUNDED],
        "size": range(9),
        "batch": (1, 7, 8, 9, 33),
        "seq_len": (1, 2, 17),
        "input_size": (1, 5, 33),
        "form": FORMS,
        "num_layers": (1, 1, 2, 3),
        "bidirectional": (False, False, True),
        "reset": (False, False, True),
        "loss": LOSSES,
        "bias": (True, False),
        "state": (True, False),
    }
    found = []
    for row in pairwise(factors):
        row["kind"], row["precision"] = row.pop("what")
        row["hidden"] = hidden_sizes(row["kind"], row["precision"])[row.pop("size")]
        row["bias"] |= row["kind"].endswith("relu")  # see on_cuda.build
        found.append(Setup(**row))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("setup", setups(), ids=str)
def test_numbers(setup: Setup, device: torch.device) -> None:
    check(setup, device, "onchip")


LARGE = [
    # more blocks than a device has multiprocessors
    Setup("LSTM", "float16", 3, 1100, 5, 64),
    Setup("LSTM", "tf32", 3, 1100, 5, 33, form="packed_uneven"),
    Setup("GRU", "bfloat16", 3, 1100, 5, 128, bidirectional=True),
    Setup("RNN_tanh", "bfloat16", 3, 1100, 5, 200),
    # many steps; of packed ones more than a launch that copies their places takes
    *(Setup(kind, precision, 300, 9, 5, 48) for kind in KINDS for precision in ROUNDED),
    Setup("LSTM", "bfloat16", 300, 8, 5, 176),
    Setup("GRU", "float16", 500, 17, 5, 33, form="packed"),
    Setup("LSTM", "tf32", 961, 9, 5, 33, form="packed_uneven", bidirectional=True),
    # several launches a pass, each with a chunk of the steps
    Setup("LSTM", "float16", 40, 33, 5, 65, num_layers=3),
    Setup("GRU", "tf32", 40, 33, 5, 33, num_layers=3, reset=True),
    Setup("RNN_tanh", "bfloat16", 40, 33, 5, 33, num_layers=3, form="packed_uneven", reset=True),
    Setup("LSTM", "bfloat16", 40, 33, 5, 33, num_layers=2, form="packed", reset=True),
]


@pytest.mark.parametrize("setup", LARGE, ids=str)
def test_many_rows_and_steps(setup: Setup, device: torch.device) -> None:
    check(setup, device, "onchip")


@pytest.mark.parametrize(("precision", "hidden"), [("float16", 177), ("bfloat16", 192)])
def test_lstms_that_backward_does_not_hold(
    precision: str, hidden: int, device: torch.device
) -> None:
    """Forward holds more units than backward: inference runs, training says so at once."""
    setup = Setup("LSTM", precision, 5, 9, 5, hidden, reset=True)
    problem = build(setup)
    layer = module_on(problem, True, device, setup.dtype)
    x, hx = inputs_of(problem, device, setup.dtype)
    mask = None if problem.mask is None else problem.mask.to(device)
    with kernel_forced("onchip"):
        with pytest.raises(RuntimeError, match=r"H = 176 units .*backward, got H = .*forces"):
            layer(x, tuple(hx), mask)
        with torch.no_grad():
            y, last = layer(x, tuple(hx), mask)
        assert kernel_ran() == "onchip"
    ref, peer = run_exactly(problem), on_cpu(run_peer(problem, device))
    again = Peer(peer, lambda seed: on_cpu(run_peer_again(problem, device, seed)))
    for name, value in zip(("y", "state0", "state1"), (y, *last), strict=True):
        assert not check_tensor(name, value.detach().cpu(), again, ref[name], precision)


@precisions
@kinds
def test_as_the_step_engine(kind: str, precision: str, device: torch.device) -> None:
    """The same numbers to within roundings; the library's own choice is still the step engine."""
    problem = build(Setup(kind, precision, 17, 9, 5, 72, num_layers=2, bidirectional=True))
    found = {}
    for kernel in ("onchip", "step"):
        with kernel_forced(kernel):
            found[kernel] = run_ours(problem, device)
            assert kernel_ran() == kernel
    assert_near(
        list(found["onchip"].values()),
        list(found["step"].values()),
        8 * PRECISIONS[precision][1],
    )
    assert same_bits(list(run_ours(problem, device).values()), list(found["step"].values()))


@kinds
def test_without_gradients(kind: str, device: torch.device) -> None:
    """The bits of a call that saves for backward."""
    options: list[dict[str, Any]] = [
        {},
        {"bidirectional": True},
        {"num_layers": 3},
        {"form": "packed_uneven"},
    ]
    for k, more in enumerate(options):
        problem = build(Setup(kind, ROUNDED[(KINDS.index(kind) + k) % 3], 5, 4, 7, 33, **more))
        layer = module_on(problem, True, device, problem.setup.dtype)
        x, _ = inputs_of(problem, device, problem.setup.dtype)
        given: Any = x
        if problem.setup.lengths is not None:
            given = pack_padded_sequence(
                x, torch.tensor(problem.setup.lengths), enforce_sorted=False
            )
        with products(True), kernel_forced("onchip"):
            want = [t.detach() for t in leaves_of(layer(given))]
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    assert same_bits(leaves_of(layer(given)), want)
                    assert kernel_ran() == "onchip"


@precisions
@kinds
def test_the_same_bits_at_every_run(kind: str, precision: str, device: torch.device) -> None:
    """Twenty of them, in memory of another content."""
    problem = build(Setup(kind, precision, 21, 40, 17, 65, num_layers=2, form="packed_uneven"))
    first: list[Tensor] = []
    with kernel_forced("onchip"):
        for _ in range(20 if CUDA_TESTS_ON == "cuda" else 3):
            if CUDA_TESTS_ON == "cuda":
                spoil_free_memory()
            results = list(run_ours(problem, device).values())
            first = first or results
            assert same_bits(results, first)
            assert all(bool(t.isfinite().all()) for t in results)


@precisions
@kinds
def test_a_row_is_the_same_in_every_place(kind: str, precision: str, device: torch.device) -> None:
    """Of any block, beside any others, alone: the same bits. With one input the projection is one
    multiplication, so that nothing here rests on the order of cuBLAS's sums; dx and the weights'
    gradients do."""
    setup = Setup(kind, precision, 17, 37, 1, 65, state=True)
    problem = build(setup)
    layer = module_on(problem, True, device, setup.dtype)
    with torch.no_grad():  # exact in TF32, too
        layer.weight_ih_l0.copy_(layer.weight_ih_l0.bfloat16())
    x, hx = inputs_of(problem, device, setup.dtype)
    x, states = x.detach().bfloat16().to(setup.dtype), [h.detach() for h in hx]
    cotangents = [c.to(device, setup.dtype) for c in problem.cotangents]

    def run(order: Tensor) -> list[Tensor]:
        hx = [h[:, order].clone().requires_grad_() for h in states]
        given: Any = tuple(hx) if len(hx) > 1 else hx[0]
        outputs = leaves_of(layer(x[:, order], given))
        grads = torch.autograd.grad(outputs, hx, [c[:, order] for c in cotangents])
        assert kernel_ran() == "onchip"
        return [*(out.detach() for out in outputs), *grads]

    with products(True), kernel_forced("onchip"):
        want = run(torch.arange(37, device=device))
        for places in (torch.randperm(37), torch.arange(36, -1, -1), torch.tensor([19]).expand(12)):
            order = places.to(device)
            assert same_bits(run(order), [t[:, order] for t in want])
        for place in (0, 7, 8, 36):
            order = torch.tensor([place], device=device)
            assert same_bits(run(order), [t[:, order] for t in want])


@kinds
def test_nan_stays_in_its_sequence(kind: str, device: torch.device) -> None:
    """Rows of a block are columns of the same products."""
    precision = ROUNDED[KINDS.index(kind) % 3]
    problem = build(Setup(kind, precision, 4, 20, 33, 40))
    layer = module_on(problem, True, device, problem.setup.dtype)
    bad = [5, 18]
    others = [b for b in range(20) if b not in bad]
    found = []
    for spoilt in (False, True):
        x = problem.x.to(device, problem.setup.dtype)
        if spoilt:
            x[1, bad[0], 32], x[1, bad[1], 0] = float("nan"), float("inf")
        x.requires_grad_()
        with products(True), kernel_forced("onchip"):
            y, _ = layer(x)
            (dx,) = torch.autograd.grad(y.sum(), x)
        found.append([y.detach()[:, others], dx[:, others]])
    assert same_bits(*found)
    assert bool(y[1:, bad[0]].isnan().all())


@kinds
def test_padding_is_never_read(kind: str, device: torch.device) -> None:
    problem = build(Setup(kind, "bfloat16", 9, 3, 5, 17, num_layers=2, bidirectional=True))
    layer = module_on(problem, True, device, torch.bfloat16)
    x, lengths = problem.x.bfloat16(), torch.tensor([9, 5, 2])
    for b, length in enumerate(lengths):
        x[length:, b] = float("nan")
    x = x.to(device).requires_grad_()
    with kernel_forced("onchip"):
        y, state = layer(pack_padded_sequence(x, lengths))
        loss = y.data.sum() + sum(s.sum() for s in leaves_of(state))
        grads = torch.autograd.grad(loss, [x, *layer.parameters()])
    assert all(bool(t.isfinite().all()) for t in (loss, *grads))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=["layers", "directions"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_only_the_gradients_asked_for(
    kind: str, options: dict[str, Any], device: torch.device
) -> None:
    problem = build(Setup(kind, "float16", 5, 3, 5, 17, num_layers=2, **options))
    for wanted in ("x", "hx", "weight_hh_l0", "bias_ih_l1", "x weight_ih_l1"):
        found = []
        for some in (True, False):
            layer = module_on(problem, True, device, torch.float16)
            x, hx = inputs_of(problem, device, torch.float16)
            leaves = {"x": x, "hx": hx[0]} | dict(layer.named_parameters())
            if some:
                for name, leaf in leaves.items():
                    leaf.requires_grad_(name in wanted.split())
                for h in hx[1:]:
                    h.requires_grad_(False)
            with kernel_forced("onchip"):
                y, last = layer(x, tuple(hx) if len(hx) > 1 else hx[0])
                loss = y.float().square().sum() + sum(s.float().sum() for s in leaves_of(last))
                grads = torch.autograd.grad(loss, [leaves[name] for name in wanted.split()])
            found.append(grads)
        assert_near(found[0], found[1], 2**-9)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_tanh"])
def test_empty_batches_single_steps_and_eval_mode(kind: str, device: torch.device) -> None:
    problem = build(Setup(kind, "float16", 6, 4, 7, 33, num_layers=2))
    layer = module_on(problem, True, device, torch.float16)
    x, hx = inputs_of(problem, device, torch.float16)
    reset = (torch.rand(6, 4) < 0.3).to(device)
    state: Any = tuple(hx) if len(hx) > 1 else hx[0]
    with kernel_forced("onchip"):
        with torch.no_grad():
            want, last = layer(x, state, reset)
            ys = []
            for t in range(6):
                y, state = layer.step(x[t], state, reset[t])
                ys.append(y)
            assert kernel_ran() == "onchip"
        assert_near([torch.stack(ys), *leaves_of(state)], [want, *leaves_of(last)], 2**-9)
        assert same_bits(results_of(layer.eval(), x), results_of(layer.train(), x))
        empty = torch.zeros(5, 0, 7, device=device, dtype=torch.float16, requires_grad=True)
        y, last = layer(empty)
        (y.sum() + sum(s.sum() for s in leaves_of(last))).backward()
    assert y.shape == (5, 0, 33) and empty.grad is not None
    for p in layer.parameters():
        assert torch.equal(p.grad, torch.zeros_like(p))
