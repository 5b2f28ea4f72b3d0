"""The torch-free core through the development module: maths, kernels, cells, choices, symbols."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rnnfast import _core  # built with RNNFAST_DEV=1, as `make test` does
from rnnfast.cells import CELLS

ISAS = _core.isas()
DTYPES = {np.float32: (_core.math32, _core.product32), np.float64: (_core.math64, _core.product64)}


def _reference(function: str, x: np.ndarray) -> np.ndarray:
    """In extended precision, from the same bits of x."""
    wide = x.astype(np.longdouble)
    with np.errstate(over="ignore"):
        if function == "exp":
            return np.exp(wide)
        if function == "tanh":
            return np.tanh(wide)
        return 1 / (1 + np.exp(-wide))


def _arguments(dtype: type, function: str) -> np.ndarray:
    limit = {np.float32: 87.0, np.float64: 700.0}[dtype]
    limit = 20.0 if function == "tanh" else limit
    random = np.random.default_rng(0)
    spread = random.uniform(-limit, limit, 40_000)
    small = random.uniform(-1, 1, 40_000) * np.exp2(random.uniform(-20, 2, 40_000))
    return np.concatenate([spread, small, [0.0, -0.0, 1.0, -1.0, limit, -limit]]).astype(dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize(("function", "bound"), [("exp", 2), ("sigmoid", 3), ("tanh", 3)])
def test_ulp(isa: str, dtype: type, function: str, bound: int) -> None:
    """The bounds that csrc/core/math.h and docs/numerics.md state, with FMA and without."""
    x = _arguments(dtype, function)
    got = DTYPES[dtype][0](isa, function, x)
    expected = _reference(function, x)
    ulp = np.spacing(np.abs(expected).astype(dtype)).astype(np.longdouble)
    error = np.max(np.abs(got.astype(np.longdouble) - expected) / ulp)
    assert error <= bound, f"{function} on {isa}: {error:.2f} ulp"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_special_values(isa: str, dtype: type) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0], dtype)
    math = DTYPES[dtype][0]
    tanh, sigmoid, exp = (math(isa, name, x) for name in ("tanh", "sigmoid", "exp"))
    assert np.isnan([tanh[0], sigmoid[0], exp[0]]).all()
    np.testing.assert_array_equal(tanh[1:], np.array([1, -1, 1, -1, 0], dtype))
    np.testing.assert_allclose(sigmoid[1:], np.array([1, 0, 1, 0, 0.5], dtype), atol=1e-37)
    assert exp[5] == 1 and np.isfinite(exp[1]) and exp[2] < 1e-37


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "direct"])
def test_product(isa: str, dtype: type, packed: bool) -> None:
    """Both micro-kernels, for every height and width of a tile and around their edges."""
    random = np.random.default_rng(0)
    product = DTYPES[dtype][1]
    for rows, units, k in [
        (r, u, k)
        for r in range(1, 14)
        for u in (1, 7, 11, 16, 20, 24, 33, 44, 65)
        for k in (1, 5, 16, 300)
    ]:
        a = random.standard_normal((rows, k)).astype(dtype)
        w = random.standard_normal((units, k)).astype(dtype)
        expected = a.astype(np.longdouble) @ w.astype(np.longdouble).T
        scale = np.abs(a).astype(np.longdouble) @ np.abs(w).astype(np.longdouble).T
        error = np.max(np.abs(product(isa, packed, a, w) - expected) / scale)
        assert error < 20 * np.finfo(dtype).eps, (rows, units, k)


HALVES = [torch.bfloat16, torch.float16]


def _bits(halves: torch.Tensor) -> np.ndarray:
    return halves.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_widening_is_exact(isa: str, dtype: torch.dtype) -> None:
    """All 65536 numbers, and one fewer: the last vector is a part of one."""
    bits = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    for count in (2**16, 2**16 - 1, 3):
        got = _core.widen(isa, dtype == torch.bfloat16, bits[:count])
        nan = np.isnan(expected[:count])
        np.testing.assert_array_equal(np.isnan(got), nan)
        np.testing.assert_array_equal(
            got.view(np.uint32)[~nan], expected[:count].view(np.uint32)[~nan]
        )


def _floats(dtype: torch.dtype) -> np.ndarray:
    """Random bits, every 16-bit number with what lies half-way to its neighbours, and beside it."""
    random = np.random.default_rng(0)
    any_bits = random.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    exact = halves[halves.isfinite()].double().sort().values
    ties = ((exact[1:] + exact[:-1]) / 2).float().numpy()
    ties = ties[np.isfinite(ties)]
    near = [np.nextafter(ties, np.float32(to)) for to in (-np.inf, np.inf)]
    largest = np.float32(torch.finfo(dtype).max)
    half = np.float32(65520.0 if dtype == torch.float16 else 3.3961775e38)  # a tie with infinity
    edges = [0.0, -0.0, np.inf, -np.inf, np.nan, largest, half, -half]
    edges += [np.nextafter(half, np.float32(0)), 1e-45, 3e-8, 2.0**-25, 1e-8]
    return np.concatenate([any_bits.view(np.float32), ties, *near, np.array(edges, np.float32)])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_narrowing_rounds_as_torch(isa: str, dtype: torch.dtype) -> None:
    """To the nearest, ties to even; subnormal numbers, overflow; a NaN stays one, sign kept."""
    values = _floats(dtype)
    expected = torch.from_numpy(values).to(dtype)
    got = _core.narrow(isa, dtype == torch.bfloat16, values)
    nan = np.isnan(values)
    np.testing.assert_array_equal(got[~nan], _bits(expected)[~nan])
    back = torch.from_numpy(got.view(np.int16)).view(dtype)
    assert bool(back[torch.from_numpy(nan)].isnan().all())


def test_cells_are_those_of_python() -> None:
    """csrc/cells/list.h and rnnfast/cells.py name the same cells."""
    ours = [
        {
            "id": c.id,
            "name": c.name,
            "gates": c.gates,
            "states": c.states,
            "saved": c.saved,
            "parameters": c.parameters,
            "dense": c.dense,
            "diagonal": c.diagonal,
            "stages": c.stages,
        }
        for c in sorted(CELLS, key=lambda c: c.id)
    ]
    assert _core.cells() == ours


@pytest.mark.parametrize("cell", [c["name"] for c in _core.cells()])
def test_cell_backward(cell: str) -> None:
    """The gate maths alone, against central differences, in double precision."""
    info = next(c for c in _core.cells() if c["name"] == cell)
    random = np.random.default_rng(3)
    gx, gh = random.standard_normal((2, info["gates"]))
    state, weight = random.standard_normal((2, info["states"]))
    p = random.standard_normal(info["parameters"])
    got = _core.cell(cell, gx, gh, state, weight, p=p)

    def value(gx: np.ndarray, gh: np.ndarray, state: np.ndarray, p: np.ndarray) -> float:
        return float(np.dot(_core.cell(cell, gx, gh, state, weight, p=p)["state"], weight))

    for name, at, gradient in (
        ("gx", 0, got["dgx"]),
        ("gh", 1, got["dgh"]),
        ("state", 2, got["dstate"]),
        ("p", 3, got["dp"]),
    ):
        for i in range(len(gradient)):
            point = [gx.copy(), gh.copy(), state.copy(), p.copy()]
            point[at][i] += 1e-6
            above = value(*point)
            point[at][i] -= 2e-6
            expected = (above - value(*point)) / 2e-6
            assert gradient[i] == pytest.approx(expected, abs=1e-8), (name, i)


LSTM, GRU, INDRNN = 0, 1, 5
CHOICES = [
    # cell, T, B, I, H, threads -> threads, split, kernel_ih, kernel_hh
    ((LSTM, 1, 1, 64, 64, 2), (1, "serial", "direct", "direct")),  # too small to wake anybody
    # packing would cost more than the step
    ((LSTM, 1, 1, 512, 512, 2), (2, "units", "direct", "direct")),
    ((LSTM, 100, 1, 512, 512, 2), (2, "units", "packed", "packed")),
    ((LSTM, 50, 32, 256, 256, 2), (2, "batch", "packed", "packed")),  # w_hh fits the private cache
    ((LSTM, 1, 1, 256, 256, 2), (2, "units", "direct", "direct")),  # two caches hold the weights
    ((LSTM, 1, 64, 512, 512, 2), (2, "units", "direct", "direct")),  # too few rows to repay packing
    ((LSTM, 1, 128, 512, 512, 2), (2, "units", "packed", "packed")),
    ((LSTM, 100, 64, 512, 512, 2), (2, "units", "packed", "packed")),  # it does not
    ((LSTM, 1000, 128, 32, 32, 2), (2, "batch", "packed", "packed")),
    ((LSTM, 100, 1, 512, 512, 8), (8, "units", "packed", "packed")),
    ((LSTM, 100, 64, 512, 512, 1), (1, "serial", "packed", "packed")),
    ((GRU, 1000, 16, 64, 64, 2), (2, "batch", "packed", "packed")),
    ((INDRNN, 500, 32, 128, 128, 2), (2, "batch", "packed", "none")),
    # a barrier a step would cost more
    ((LSTM, 200, 1, 32, 32, 8), (1, "serial", "packed", "packed")),
]


@pytest.mark.parametrize(("shape", "expected"), CHOICES, ids=[str(shape) for shape, _ in CHOICES])
def test_choose_engine(shape: tuple[int, ...], expected: tuple[object, ...]) -> None:
    cell, T, B, I, H, threads = shape  # noqa: E741 (the input size)
    got = _core.choose(cell, T, B, I, H, H, T * B, 4, threads)
    assert (got["threads"], got["split"], got["kernel_ih"], got["kernel_hh"]) == expected


GROUPS = [
    # cell, T, B, I, H, count, chained, backward, threads -> teams, threads of each, chunk rows
    ((LSTM, 100, 1, 64, 64, 2, True, False, 2), (2, 1, 8)),  # too short for a barrier a step
    ((GRU, 1000, 1, 64, 64, 2, True, False, 2), (2, 1, 62)),
    ((GRU, 1000, 1, 64, 64, 2, True, True, 2), (2, 1, 128)),  # two chunks of backward
    ((LSTM, 100, 1, 64, 64, 2, True, True, 2), (1, 1, 128)),  # one chunk: nothing to follow
    ((LSTM, 100, 1, 256, 256, 2, True, False, 2), (1, 2, 128)),  # half the weights in each cache
    ((LSTM, 100, 64, 512, 512, 2, True, False, 2), (1, 2, 128)),  # units keep both busy
    ((LSTM, 1, 1, 64, 64, 2, True, False, 2), (1, 1, 128)),  # one step: the second would wait
    ((LSTM, 100, 1, 64, 64, 3, True, False, 8), (3, 1, 8)),
    ((LSTM, 100, 1, 64, 64, 8, True, False, 8), (8, 1, 8)),
    ((LSTM, 1000, 2, 32, 32, 6, True, False, 4), (2, 2, 125)),  # two rows for two threads each
    ((LSTM, 100, 1, 64, 64, 2, True, False, 1), (1, 1, 128)),
    ((GRU, 100, 16, 256, 256, 2, False, False, 2), (2, 1, 128)),
    ((LSTM, 100, 1, 256, 256, 2, False, False, 2), (1, 2, 128)),
]


@pytest.mark.parametrize(("group", "expected"), GROUPS)
def test_choose_group(group: tuple[Any, ...], expected: tuple[int, ...]) -> None:
    assert _core.choose_group(*group) == expected


def test_choose_group_forced() -> None:
    group = (LSTM, 100, 64, 512, 512, 3, True, False, 2)
    layers, directions, units = 4, 3, 2
    assert _core.choose_group(*group, layers)[0] == 2
    assert _core.choose_group(*group, directions) == _core.choose_group(*group)
    small = (LSTM, 100, 1, 64, 64, 2, True, False, 2)
    assert _core.choose_group(*small)[0] == 2 and _core.choose_group(*small, units)[0] == 1


def test_no_weak_symbols_in_kernels() -> None:
    """An ISA's object keeps its code to itself: the linker may hand a weak copy to everybody."""
    objects = sorted(
        (Path(__file__).parents[1] / "build").glob("dev/CMakeFiles/kernels_*.dir/**/*kernels.cpp.o")
    )
    assert {"kernels_portable.dir"} <= {path.parents[2].name for path in objects}, (
        "build with RNNFAST_DEV=1 first"
    )
    for path in objects:
        lines = subprocess.run(
            ["nm", str(path)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        weak = [line for line in lines if line.split()[-2] in "WVuwv"]
        assert not weak, f"{path.parents[2].name}: {weak[:3]}"
        exported = [line for line in lines if line.split()[-2] in "TDRB"]
        tables = {"narrow": ["kNarrow"], "batch": ["kBatchNorm32", "kBatchNorm64"]}
        names = tables.get(path.name.partition("_")[0], ["kernel_table"])
        assert len(exported) == len(names)
        assert all(any(name in line for line in exported) for name in names)
