"""What 16-bit and int8 layers round, as a float64 model, and the shapes they are tested on.

Both round rows as they enter a product and nothing else but their results. The model multiplies
the h that the engine gave (``seen``), so that it must agree to the rounding of one step.
"""

from __future__ import annotations

from collections.abc import Callable

import cases
import oracle
import torch
from cases import Case, Problem, Tensors
from torch import Tensor

import rnnfast

HALVES = (torch.bfloat16, torch.float16)
ISAS = rnnfast.engine.available_isas()

# Around a vector, a block of k (32 or 64), a tile of rows (16, 32); T, B, I, H
_SIZES = (
    (1, 1, 1, 1, {}),
    (1, 4, 32, 16, {"state": False}),
    (1, 5, 31, 17, {"bias": False}),
    (3, 16, 33, 33, {"reverse": True}),
    (2, 17, 64, 100, {"layout": "strided"}),
    (5, 31, 5, 64, {"packed": True}),
    (2, 33, 63, 48, {"layout": "batch_first", "threads": 2}),
    (7, 40, 65, 15, {"packed": True, "reverse": True, "state": False}),
    (4, 32, 96, 65, {"threads": 2, "layout": "offset"}),
    (130, 1, 3, 31, {}),  # two chunks
    (9, 20, 40, 130, {"threads": 2, "layout": "expanded"}),
    (3, 0, 5, 8, {}),
)
_PROJECTED = (
    (3, 5, 16, 33, {"proj": 7}),
    (2, 34, 31, 64, {"proj": 32, "packed": True}),
    (4, 9, 5, 130, {"proj": 31, "reverse": True, "threads": 2}),
)
# recurrent weights beyond a private cache in 16 bits: threads share units
LARGE = {"lstm": 400, "gru": 450, "rnn_tanh": 750, "rnn_relu": 740}


def shapes(cell: str, dtype: torch.dtype) -> list[Case]:
    sizes = _SIZES + (_PROJECTED if cell == "lstm" else ())
    found = [Case(cell, t, b, i, h, dtype, **more) for t, b, i, h, more in sizes]
    if cell in LARGE:
        found.append(Case(cell, 2, 3, 40, LARGE[cell], dtype, threads=2))
    else:
        found.append(Case(cell, 4, 20, 40, 700, dtype, threads=2))
    return found


def problem_of(case: Case) -> Problem:
    """As cases.build, without a care for relu's kink: forward has none."""
    return cases._draw(case, len(str(case)))


def forward(problem: Problem, packed: Tensor | None, inputs: Tensors | None = None) -> Tensors:
    """y (T, B, P) with zeros where a sequence has ended, h_n, c_n."""
    case = problem.case
    _, args = cases.op_inputs(problem, grad=False)
    if inputs is not None:
        args[:8] = [inputs.get(k, a) for k, a in zip(problem.inputs, args, strict=False)]
    cell = oracle.CELL_IDS[case.cell]
    y, h_n, c_n, _ = torch.ops.rnnfast.forward(*args, packed, cell, case.reverse, False)
    out = {"y": y if case.lengths is None else padded(y, case.lengths), "h_n": h_n}
    return out | ({"c_n": c_n[0]} if case.cell == "lstm" else {})


def padded(rows: Tensor, lengths: list[int]) -> Tensor:
    full = rows.new_zeros(max(lengths), len(lengths), rows.size(1))
    first = 0
    for t, count in enumerate(oracle.batch_sizes_of(lengths)):
        full[t, :count] = rows[first : first + count]
        first += count
    return full


def model(
    problem: Problem,
    enter: Callable[[Tensor], Tensor],
    seen: Tensor | None,
    weights: Tensors | None = None,
) -> Tensors:
    """float64, with what `enter` does to rows; `weights` stand in for the problem's."""
    case = problem.case
    wide = {k: cases._as64(v) for k, v in (problem.inputs | (weights or {})).items()}
    assert wide["x"] is not None
    y, h_n, c_n = oracle.direction(
        case.cell,
        wide["x"].contiguous(),
        wide["h0"],
        wide["c0"],
        [wide[k] for k in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")],
        reverse=case.reverse,
        lengths=case.lengths,
        enter=enter,
        seen=None if seen is None else seen.double(),
    )
    return {"y": y, "h_n": h_n} | ({} if c_n is None else {"c_n": c_n})


def to_half(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda rows: rows.to(dtype).double()


def to_bytes(isa: str) -> Callable[[Tensor], Tensor]:
    """Each row as bytes times a scale, the arithmetic in float32 as the kernels have it.

    Only portable kernels round twice where the others have an FMA.
    """

    def quantized(rows: Tensor) -> Tensor:
        rows = rows.float()
        largest = rows.abs().amax(-1, keepdim=True)
        finite = rows.isfinite().all(-1, keepdim=True)
        # tensors, since torch divides a number by multiplying with the inverse
        inverse = torch.full_like(largest, 127) / largest
        inverse = torch.where((largest > 1e-30) & finite, inverse, torch.zeros_like(inverse))
        clean = torch.where(finite, rows, torch.zeros_like(rows))
        exact = clean.double() * inverse.double()
        numbers = torch.round(clean * inverse if isa == "portable" else exact)
        scale = largest / torch.full_like(largest, 127)
        scale = torch.where(finite, scale, torch.full_like(scale, float("nan")))
        return numbers.double() * scale.double()

    return quantized
