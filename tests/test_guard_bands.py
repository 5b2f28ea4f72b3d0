"""Operands inside larger buffers: nothing beside them is read into a result, nothing is written."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import cases
import oracle
import pytest
import rounded
import tolerance
import torch
from cases import Case, Problem
from rounded import ISAS
from test_quantize import bytes_of
from torch import Tensor

import rnnfast

CASES = [
    *cases.small_cases(),
    *[c for c in cases.engine_cases() if c.hidden < 150 and c.layout == "contiguous"][::5],
    Case("lstm", 3, 9, 16, 320, threads=2),
]
BAND = 64  # numbers on each side: more than any vector is wide


def banded(value: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """A contiguous copy of value in the middle of a buffer, and that buffer.

    Its start is not aligned to a vector.
    """
    offset = BAND + 1
    buffer = value.new_full((value.numel() + 2 * BAND + 1,), fill)
    inside = buffer[offset : offset + value.numel()].view(value.shape)
    inside.copy_(value)
    return inside, buffer


@pytest.mark.parametrize("kernel", ["packed", "direct"])
@pytest.mark.parametrize("fill", [float("nan"), 1e30], ids=["nan", "huge"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_guard_bands(case: Case, fill: float, kernel: str) -> None:
    problem, ref, peer = cases.solved(case)
    torch.set_num_threads(case.threads)
    leaves, args = cases.op_inputs(problem, grad=False)
    inside, buffers = {}, {}
    for name, value in leaves.items():
        inside[name], buffers[name] = banded(value, fill)
    given = cases._pack_cotangents(problem).cotangents
    for name, value in given.items():
        inside["d" + name], buffers["d" + name] = banded(value, fill)
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    operands = cases.op_operands({name: inside[name] for name in leaves})
    cell = oracle.CELL_IDS[case.cell]
    with rnnfast.use_engine("cpu", kernel=kernel):
        y, h_n, c_n, saved = torch.ops.rnnfast.forward(
            *operands, *args[8:], None, cell, case.reverse, True
        )
        # what forward made goes into bands as well before backward reads it
        y_in, y_buffer = banded(y, fill)
        saved_in, saved_buffer = banded(saved, fill)
        made = y_buffer.clone(), saved_buffer.clone()
        dc_n = inside.get("dc_n")
        grads = torch.ops.rnnfast.backward(
            inside.get("dy"),
            inside.get("dh_n"),
            None if dc_n is None else dc_n[None],
            *operands,
            *args[8:],
            y_in,
            saved_in,
            cell,
            case.reverse,
            sum(1 << k for k, operand in enumerate(operands) if operand is not None),
        )
    ours = {"y": y, "h_n": h_n} | ({"c_n": c_n[0]} if case.cell == "lstm" else {})
    for name, grad in zip(problem.inputs, grads, strict=True):
        if problem.inputs[name] is not None:
            ours["d" + name] = grad.reshape(ref["d" + name].shape)
    tolerance.check(ours, peer, ref, case.dtype)
    for name, buffer in buffers.items():
        assert tolerance.same_bits(buffer, before[name]), f"the buffer of {name} was written"
    assert tolerance.same_bits(y_buffer, made[0]) and tolerance.same_bits(saved_buffer, made[1])


@pytest.mark.parametrize("cell", oracle.CELLS)
def test_outputs_do_not_overlap_inputs_or_each_other(cell: str) -> None:
    """Results are memory of their own: writing over one changes nothing else."""
    case = Case(cell, 1, 5, 5, 17)
    problem, _, _ = cases.solved(case)
    _, args = cases.op_inputs(problem, grad=False)
    out = torch.ops.rnnfast.forward(*args, None, oracle.CELL_IDS[cell], False, True)
    tensors = [t for t in [*out, *args] if t is not None and t.numel()]
    for tensor in out:
        others = [t for t in tensors if t is not tensor]
        kept, old = cases.clones(others), tensor.clone()
        tensor.fill_(7)
        assert all(tolerance.same_bits(a, b) for a, b in zip(others, kept, strict=True))
        tensor.copy_(old)


# --------------------------------------------------------------------------- 16 bits and int8

TYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.float32,
    "float32": torch.float32,
}


def before_a_forbidden_page(value: Tensor) -> Tensor:
    """A copy that ends where a page begins that nobody may read, by a crash."""
    page = mmap.PAGESIZE
    size = value.numel() * value.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    forbidden = ctypes.c_void_p(address + pages * page)
    if libc.mprotect(forbidden, ctypes.c_size_t(page), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    inside = torch.frombuffer(
        memory, dtype=value.dtype, count=value.numel(), offset=pages * page - size
    ).view(value.shape)
    return inside.copy_(value)


Place = Callable[[Tensor], Tensor]


def _results(problem: Problem, kind: str, place: Place) -> tuple[Tensor, ...]:
    """Forward with every operand where `place` puts it."""
    case, number = problem.case, oracle.CELL_IDS[problem.case.cell]
    inputs = {k: v.contiguous() for k, v in problem.inputs.items() if v is not None}
    sizes = packed = None
    if case.lengths is not None:
        inputs["x"] = oracle.pack_rows(inputs["x"], case.lengths)
        sizes = torch.tensor(oracle.batch_sizes_of(case.lengths))
    inputs = {k: place(v) for k, v in inputs.items()}
    if kind == "int8":
        args, views, _ = bytes_of(problem)
        given = [None if a is None else place(a) for a in args]
        packed = place(torch.ops.rnnfast.pack_int8(*given, number))
        inputs |= views
    operands = cases.op_operands(inputs)
    return torch.ops.rnnfast.forward(
        *operands, sizes, None, packed, number, case.reverse, kind != "int8"
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("cell", oracle.CELLS)
def test_nothing_outside_is_read_or_written(cell: str, kind: str, isa: str) -> None:
    """Forward in every type, with operands inside buffers of NaN, and with operands that end where
    memory does: the same bits."""
    for case in rounded.shapes(cell, TYPES[kind]):
        if not case.batch:
            continue
        problem = rounded.problem_of(case)
        # int8's weights are packed whatever the kernel
        for kernel in ("packed",) if kind == "int8" else ("packed", "direct"):
            buffers: list[tuple[Tensor, Tensor]] = []

            def inside_nan(value: Tensor, kept: list[tuple[Tensor, Tensor]] = buffers) -> Tensor:
                if not value.is_floating_point():
                    return value
                inside, buffer = banded(value, float("nan"))
                kept.append((buffer, buffer.clone()))
                return inside

            with rnnfast.use_engine("cpu", isa=isa, kernel=kernel):
                want = _results(problem, kind, torch.Tensor.clone)
                for place in (inside_nan, before_a_forbidden_page):
                    got = _results(problem, kind, place)
                    assert all(tolerance.same_bits(a, b) for a, b in zip(want, got, strict=True))
            for buffer, before in buffers:
                assert tolerance.same_bits(buffer, before), "an operand's buffer was written"
