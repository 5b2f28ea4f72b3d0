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
                # what is kept is for a backward that must be able to run, too
                save = tile["backward"] or hidden <= 128
                forward[kernel] = DEVICE.forward(x, *t, None, reset, None, cell, False, save)
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


# dtype and options; each of them for every cell
GIVEN: list[tuple[torch.dtype, dict[str, Any]]] = [
    (dtype, {"packed": packed, "reverse": reverse})
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for packed in (False, True)
    for reverse in (False, True)
]
GIVEN += [
    (torch.float16, {"loss": "state"}),  # no gradient of y
    (torch.float16, {"loss": "state", "packed": True}),
    (torch.float16, {"layout": "expanded"}),
    (torch.float32, {"loss": "y", "state": False, "bias": False, "reverse": True}),
]
NUMBERS = [
    Case(cell, 5, 11, 5, 17, dtype, **options)
    for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for dtype, options in GIVEN
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


def dy_of(y: Tensor, form: str) -> Tensor | None:
    """A gradient of y as autograd may bring it."""
    if form == "none":
        return None
    if form == "expanded":  # over steps and rows
        return torch.cos(y.flatten(0, -2)[0]).expand_as(y)
    if form == "one_for_all_steps":  # packed: for all rows
        return torch.cos(y[:1]).expand_as(y)
    wide = y.new_full((*y.shape[:-1], 2 * y.shape[-1] + 3), float("nan"))
    wide[..., 3 : 3 + y.shape[-1]] = torch.cos(y)
    return wide[..., 3 : 3 + y.shape[-1]]


def backward_of(cell: int, dtype: torch.dtype, **options: Any) -> tuple[Tensor, int, Any]:
    """y, a mask of all gradients, and backward of a pass by kernel, dy and the gradients asked
    for."""
    options = {"dtype": dtype, "steps": 5, "batch": 11, "hidden": 17, **options}
    x, (p,), sizes = passes_of(cell, 1, False, **options)
    *t, reset = p.values()
    DEVICE.cuda_set_kernel(STEP)
    y, h_n, c_n, saved = DEVICE.forward(x, *t, sizes, reset, None, cell, False, True)

    def backward(kernel: int, dy: Tensor | None, needs: int) -> list[Tensor]:
        DEVICE.cuda_set_kernel(kernel)
        found = DEVICE.backward(dy, torch.sin(h_n), torch.sin(c_n), x, *t, sizes, reset, y, saved,
                                cell, False, needs)  # fmt: skip
        assert DEVICE.cuda_last_run(6) == kernel
        return list(found)

    return y, needs_of(p), backward


@pytest.mark.parametrize("cell", DENSE, ids=[CELLS[cell].name for cell in DENSE])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("form", ["none", "expanded", "one_for_all_steps", "wide"])
def test_gradients_of_y_in_any_layout(cell: int, packed: bool, form: str) -> None:
    """As by the step kernel, and with the bits of a dense dy (None: of zeros)."""
    y, needs, backward = backward_of(cell, torch.bfloat16, packed=packed)
    dy = dy_of(y, form)
    got = backward(ONCHIP, dy, needs)
    near(got, backward(STEP, dy, needs), torch.bfloat16)
    dense = torch.zeros_like(y) if dy is None else dy.contiguous()
    assert all(map(torch.equal, got, backward(ONCHIP, dense, needs)))


NEEDS = {"dx": 1, "dh0": 2, "dc0": 4, "dw_ih": 8, "dw_hh": 16, "db_hh": 64, "weights": 0x78,
         "dh0_dc0_dw_hh": 0x16}  # fmt: skip


@pytest.mark.parametrize("cell", [LSTM, GRU, RNN_TANH], ids=["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("state", [False, True], ids=["nostate", "state"])
def test_only_the_gradients_asked_for(cell: int, packed: bool, state: bool) -> None:
    """As by the step kernel, and with the bits that they have among all."""
    y, all_needs, backward = backward_of(
        cell, torch.float16, packed=packed, state=state, reset=state
    )
    dy = torch.cos(y)
    whole = backward(ONCHIP, dy, all_needs)
    for name, needs in NEEDS.items():
        got = backward(ONCHIP, dy, needs)
        near(got, backward(STEP, dy, needs), torch.float16)
        for k, (found, same) in enumerate(zip(got, whole, strict=True)):
            asked = bool(needs >> k & 1)
            assert torch.equal(found, same) if asked else not found.numel(), f"{name}: result {k}"


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


@pytest.mark.parametrize("hidden", [5, 31, 32])
@pytest.mark.parametrize("cell", [RNN_TANH, RNN_RELU], ids=["tanh", "relu"])
def test_infinities_stay_what_they_are(cell: int, hidden: int) -> None:
    """relu overflows, or tanh's gradient; units beyond the layer's, whose weights are zeros, must
    not make NaNs of that for the others."""
    x, w_ih = torch.ones(12, 2, 1).half(), torch.full((hidden, 1), 3.0).half()
    w_hh = torch.full((hidden, hidden), 1.0 if cell == RNN_RELU else 30.0).half()
    given = (x, None, None, w_ih, w_hh, None, None, None, None, None)
    results = []
    for kernel in (STEP, ONCHIP):
        DEVICE.cuda_set_kernel(kernel)
        y, _, _, saved = DEVICE.forward(*given, None, cell, False, True)
        if cell == RNN_TANH:
            y = y * 0.5  # slopes that do not vanish
        dx = DEVICE.backward(torch.full_like(y, 1e4), None, None, *given, y, saved, cell, False, 1)[
            0
        ]
        results.append((y, dx))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got.isinf(), want.isinf()) and torch.equal(got.isnan(), want.isnan())
        finite = want.isfinite()
        near([got[finite]], [want[finite]], torch.float16)
    assert results[0][0 if cell == RNN_RELU else 1].isinf().any()


def test_no_launch_is_dependent() -> None:
    x, (p,), _ = passes_of(LSTM, 1, False, dtype=torch.bfloat16)
    *t, reset = p.values()
    DEVICE.cuda_set_kernel(ONCHIP)
    DEVICE.cuda_set_launch(1)
    DEVICE.forward(x, *t, None, reset, None, LSTM, False, False)
    DEVICE.cuda_set_launch(-1)
    assert DEVICE.launches(1) == 0 and DEVICE.cuda_last_run(2) == 0


def test_training_that_backward_can_not_take_fails_in_forward() -> None:
    x, (p,), _ = passes_of(LSTM, 1, False, dtype=torch.bfloat16, steps=2, hidden=180)
    *t, reset = p.values()
    DEVICE.cuda_set_kernel(ONCHIP)
    DEVICE.forward(x, *t, None, reset, None, LSTM, False, False)
    with pytest.raises(RuntimeError, match="H = 176 units in one block in backward, got H = 180"):
        DEVICE.forward(x, *t, None, reset, None, LSTM, False, True)


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
    ({"itemsize": 4}, "no float32 products without TF32, which torch.backends.cudnn.rnn"),
    ({"itemsize": 8}, "float64 products"),
    ({"sizes": (100, 32, 64, 193, 193)}, r"up to H = 192 units in one block, got H = 193"),
    ({"sizes": (9, 32, 64, 177, 177), "backward": True}, "H = 176 units in one block in backward"),
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
