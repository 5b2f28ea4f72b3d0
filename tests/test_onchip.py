"""The on-chip kernels, unchanged, on the device of the host: threads, warps and shared memory.

Numbers are held against the step engine's, which test_on_host.py holds against float64: both round
the same things at the same places, so they agree to a fraction of a rounding. What this can't show:
anything about speed, or a fault that only the hardware's own order of threads brings out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import cases
import on_host
import pytest
import tolerance
import torch
from cases import Case
from passes import at_once, needs_of, one_by_one, passes_of
from test_on_host import run
from torch import Tensor

import rnnfast._core as core
from rnnfast import _cuda
from rnnfast.cells import CELLS

DEVICE = on_host.operators()
SEED, CAPABILITY, LAUNCHES_LEFT, FLAG, SHARED = range(5)  # of DEVICE.set
STEP, ONCHIP = range(2)  # of DEVICE.cuda_set_kernel
LSTM, GRU, RNN_TANH, RNN_RELU, INDRNN = range(5)
DENSE = (LSTM, GRU, RNN_TANH, RNN_RELU)
TYPES = {"half": (torch.bfloat16, torch.float16), "tf32": (torch.float32,)}
HOPPER = 227 << 10
# What a gradient of 16 bits, or a product of TF32, is rounded to.
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-11}


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    on_host.fill_fresh_memory(0x01)
    DEVICE.set(FLAG, 1)
    yield
    on_host.fill_fresh_memory(0)
    for field, value in enumerate((0, 90, -1, 0, HOPPER)):
        DEVICE.set(field, value)
    DEVICE.cuda_set_kernel(-1)


def near(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        if not b.numel():
            continue
        error = tolerance.biggest(a.double() - b.double()) / (tolerance.biggest(b.double()) + 1e-9)
        assert error <= 4 * EPS[dtype], f"result {k}: {error / EPS[dtype]:.2f} roundings"


def both(how: Any, given: tuple[Any, ...], cell: int, chained: bool, dtype: torch.dtype) -> None:
    """Forward and backward by either kernel, and the on-chip one really ran."""
    results = []
    for kernel in (STEP, ONCHIP):
        DEVICE.cuda_set_kernel(kernel)
        results.append(how(DEVICE, *given, cell, chained))
        assert DEVICE.cuda_last_run(6) == kernel
    for got, want in zip(results[1], results[0], strict=True):
        near(got, want, dtype)


# --------------------------------------------------------------------------- every tile


TILES = [tile for tile in core.onchip_tiles() if tile["built"]]


def sizes_of(tile: dict[str, Any]) -> list[int]:
    """The tile's largest layer, an odd one, and the smallest that is not another tile's."""
    smaller = [
        t["hidden"]
        for t in TILES
        if all(t[key] == tile[key] for key in ("gates", "operand", "backward"))
        and t["hidden"] < tile["hidden"]
    ]
    return [tile["hidden"], tile["hidden"] - 1, max(smaller, default=0) + 1]


@pytest.mark.parametrize(
    ("tile", "hidden"),
    [(tile, hidden) for tile in TILES for hidden in sizes_of(tile)],
    ids=lambda v: (
        str(v)
        if isinstance(v, int)
        else f"{v['gates']}gates-{v['operand']}-{'backward' if v['backward'] else 'forward'}"
    ),
)
def test_every_tile(tile: dict[str, Any], hidden: int) -> None:
    """Three steps, two tiles of the batch, states and resets: forward or backward, by every cell
    and dtype that the tile serves."""
    for cell in DENSE:
        if CELLS[cell].gates != tile["gates"]:
            continue
        for dtype in TYPES[tile["operand"]]:
            x, (p,), _ = passes_of(cell, 1, False, dtype=dtype, steps=3, batch=9, hidden=hidden)
            *t, reset = p.values()
            forward: dict[int, Any] = {}
            backward: dict[int, Any] = {}
            for kernel in (STEP, ONCHIP):
                DEVICE.cuda_set_kernel(STEP if tile["backward"] else kernel)
                forward[kernel] = DEVICE.forward(x, *t, None, reset, None, cell, False, True)
                if not tile["backward"]:
                    assert DEVICE.launches(0) == (1 if kernel == ONCHIP else 3)
                    continue
                y, h_n, c_n, saved = forward[kernel]
                DEVICE.cuda_set_kernel(kernel)
                backward[kernel] = DEVICE.backward(
                    torch.cos(y), torch.sin(h_n), torch.sin(c_n), x, *t, None, reset, y, saved,
                    cell, False, needs_of(p),
                )  # fmt: skip
                assert DEVICE.cuda_last_run(6) == kernel
            results = backward if tile["backward"] else forward
            near(list(results[ONCHIP]), list(results[STEP]), dtype)


# --------------------------------------------------------------------------- numbers


NUMBERS = [
    Case(cell, 5, 11, 5, 17, dtype, reverse=packed, packed=packed)
    for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for packed in (False, True)
]


@pytest.mark.parametrize("case", NUMBERS, ids=str)
def test_against_float64(case: Case) -> None:
    problem = cases.build(case)
    ref = cases.run_oracle(problem)
    DEVICE.cuda_set_kernel(ONCHIP)
    eps = 2 * EPS[case.dtype]
    for name, value in run(problem).items():
        assert value.dtype == case.dtype
        scale = tolerance.biggest(ref[name])
        error = tolerance.biggest(value.double() - ref[name])
        assert error <= 6 * eps * scale, f"{name}: {error / eps / scale:.1f} roundings"
    assert DEVICE.cuda_last_run(6) == ONCHIP


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"packed": True},
    "packed_without_states": {"packed": True, "state": False, "reset": False},
    "without_anything": {"state": False, "reset": False, "bias": False},
    "one_row": {"batch": 1},
    "packed_many_rows": {"packed": True, "batch": 29, "steps": 11},
}


@pytest.mark.parametrize("cell", DENSE, ids=[CELLS[cell].name for cell in DENSE])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chained", [False, True], ids=["directions", "layers"])
def test_directions_and_layers(cell: int, form: str, chained: bool) -> None:
    """One by one, and at the same time on streams of their own."""
    options = {"dtype": torch.bfloat16, "steps": 7, "batch": 9, **FORMS[form]}
    given = passes_of(cell, 3 if chained else 2, chained, **options)
    both(one_by_one, given, cell, chained, torch.bfloat16)
    both(at_once, given, cell, chained, torch.bfloat16)


@pytest.mark.parametrize("cell", [LSTM, GRU], ids=["lstm", "gru"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_several_launches_for_one_sequence(cell: int, packed: bool) -> None:
    """Stacked layers follow each other by chunks of steps, a launch each, which hand the states to
    one another; rows end, or start, in any of them. More steps, too, than one launch of
    copy_offsets takes."""
    steps = 1100 if packed else 530
    given = passes_of(
        cell, 2, True, dtype=torch.float16, steps=steps, batch=3 if packed else 1, packed=packed
    )
    both(at_once, given, cell, True, torch.float16)
    if packed:  # against time: rows start late
        x, passes, sizes = given
        *t, reset = passes[0].values()
        results = []
        for kernel in (STEP, ONCHIP):
            DEVICE.cuda_set_kernel(kernel)
            results.append(DEVICE.forward(x, *t, sizes, reset, None, cell, True, True))
        near(list(results[1]), list(results[0]), torch.float16)


@pytest.mark.parametrize("cell", [LSTM, GRU], ids=["lstm", "gru"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "tf32"])
def test_any_order_of_warps_and_streams_gives_the_same_bits(cell: int, dtype: torch.dtype) -> None:
    """A result that depends on which warp comes first is a missing barrier."""
    given = passes_of(cell, 2, False, dtype=dtype, steps=5, batch=9, hidden=40)
    DEVICE.cuda_set_kernel(ONCHIP)
    first: list[Tensor] | None = None
    for seed in range(12):
        DEVICE.set(SEED, seed)
        bits = [t for side in at_once(DEVICE, *given, cell, False) for t in side]
        first = first or bits
        assert all(tolerance.same_bits(a, b) for a, b in zip(bits, first, strict=True)), seed


def test_rows_do_not_know_each_other() -> None:
    """A row's bits do not depend on where in the batch it is, nor on a NaN beside it."""
    x, (p,), _ = passes_of(GRU, 1, False, dtype=torch.bfloat16, steps=4, batch=19, reset=False)
    *t, reset = p.values()
    DEVICE.cuda_set_kernel(ONCHIP)
    y = DEVICE.forward(x, *t, None, reset, None, GRU, False, False)[0]
    order = torch.randperm(19)
    moved = [x[:, order].contiguous(), t[0][order].contiguous(), t[1], *t[2:]]
    again = DEVICE.forward(*moved, None, reset, None, GRU, False, False)[0]
    assert tolerance.same_bits(again, y[:, order])
    x = x.clone()
    x[1, 4] = float("nan")
    spoiled = DEVICE.forward(x, *t, None, reset, None, GRU, False, False)[0]
    assert spoiled[1:, 4].isnan().all()
    others = [row for row in range(19) if row != 4]
    assert tolerance.same_bits(spoiled[:, others], y[:, others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_large_numbers(dtype: torch.dtype) -> None:
    """Infinities where the dtype has no larger number, and no NaN where there was none."""
    x, (p,), _ = passes_of(RNN_RELU, 1, False, dtype=dtype, steps=3, batch=2, reset=False)
    *t, reset = p.values()
    results = []
    for kernel in (STEP, ONCHIP):
        DEVICE.cuda_set_kernel(kernel)
        y = DEVICE.forward(x * torch.finfo(dtype).max ** 0.5, *t, None, reset, None, RNN_RELU,
                           False, False)[0]  # fmt: skip
        results.append(y)
    near([results[1]], [results[0]], dtype)


# --------------------------------------------------------------------------- the choice


def passes(cell: int = LSTM, **changes: Any) -> _cuda.Passes:
    given: dict[str, Any] = {
        "cell": cell, "sizes": (100, 32, 64, 128, 128), "itemsize": 2, "capability": 90,
        "shared_bytes": HOPPER,
    }  # fmt: skip
    return _cuda.Passes(**(given | changes))


def test_the_step_engine_is_the_choice_until_it_is_measured() -> None:
    assert passes().choose()[3] == "step"
    assert passes().choose(kernel=ONCHIP)[3] == "onchip"
    assert passes().choose(kernel=STEP)[3] == "step"


WHY_NOT = [
    ({"cell": INDRNN}, "needs a dense recurrence, got indrnn_tanh"),
    ({"sizes": (100, 32, 64, 128, 32)}, "no projection, got one from H = 128 to P = 32"),
    ({"itemsize": 4}, "float32 products without TF32"),
    ({"itemsize": 8}, "float64 products"),
    ({"sizes": (100, 32, 64, 193, 193)}, r"up to H = 192 units in one block, got H = 193"),
    ({"sizes": (100, 32, 64, 177, 177), "backward": True}, "up to H = 176 units"),
    ({"itemsize": 4, "tf32": True, "sizes": (9, 8, 8, 129, 129)}, "up to H = 128 units"),
    ({"shared_bytes": 99 << 10, "sizes": (9, 8, 8, 192, 192)}, "bytes of shared memory a block"),
]


@pytest.mark.parametrize(("changes", "words"), WHY_NOT)
def test_what_it_refuses(changes: dict[str, Any], words: str) -> None:
    assert re.search(words, passes(**changes).why_not_onchip())
    assert passes(**changes).choose(kernel=ONCHIP)[3] == "step"


def test_a_forced_kernel_that_cannot_run_is_an_error() -> None:
    x, (p,), _ = passes_of(INDRNN, 1, False, dtype=torch.float16)
    *t, reset = p.values()
    DEVICE.cuda_set_kernel(ONCHIP)
    words = r"rnnfast: .*needs a dense recurrence, got indrnn_tanh.*\(use_engine forces"
    with pytest.raises(RuntimeError, match=words):
        DEVICE.forward(x, *t, None, reset, None, INDRNN, False, False)
    with pytest.raises(RuntimeError, match="kernel must be -1"):
        DEVICE.cuda_set_kernel(2)


def test_a_failed_launch_is_told() -> None:
    x, (p,), _ = passes_of(LSTM, 1, False, dtype=torch.bfloat16)
    *t, reset = p.values()
    DEVICE.cuda_set_kernel(ONCHIP)
    DEVICE.set(LAUNCHES_LEFT, 0)
    words = r"failed in onchip_forward \(lstm, bfloat16, T=37 B=3 I=4 H=5\): cudaErrorUnknown"
    with pytest.raises(RuntimeError, match=words):
        DEVICE.forward(x, *t, None, reset, None, LSTM, False, False)


def test_empty_batch() -> None:
    DEVICE.cuda_set_kernel(ONCHIP)
    x, (p,), _ = passes_of(LSTM, 1, False, dtype=torch.bfloat16, batch=0, reset=False)
    *t, reset = p.values()
    y, h_n, _, _ = DEVICE.forward(x, *t, None, reset, None, LSTM, False, True)
    assert y.shape == (37, 0, 5) and h_n.shape == (0, 5)
