"""Shapes and layouts that nobody thought of, drawn by hypothesis, always the same ones."""

from __future__ import annotations

import cases
import oracle
import tolerance
import torch
from cases import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

import rnnfast

BOUNDED = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def any_case(draw: DrawFn) -> Case:
    cell = draw(st.sampled_from(oracle.CELLS))
    hidden = draw(st.one_of(st.integers(1, 40), st.integers(41, 150)))
    proj = draw(st.integers(0, hidden - 1)) if cell == "lstm" and draw(st.booleans()) else 0
    packed = draw(st.booleans())
    return Case(
        cell,
        seq_len=draw(st.integers(1, 12)),
        batch=draw(st.integers(1 if packed else 0, 20)),
        input_size=draw(st.integers(1, 70)),
        hidden=hidden,
        dtype=draw(st.sampled_from(cases.DTYPES)),
        proj=proj,
        bias=draw(st.booleans()),
        state=draw(st.booleans()),
        reverse=draw(st.booleans()),
        packed=packed,
        layout="contiguous" if packed else draw(st.sampled_from(cases.LAYOUTS)),
        loss=draw(st.sampled_from(cases.LOSSES)),
        threads=draw(st.integers(1, 3)),
    )


@BOUNDED
@given(case=any_case(), kernel=st.sampled_from([None, "packed", "direct"]))
def test_any_shape(case: Case, kernel: str | None) -> None:
    problem, ref, peer = cases.solved(case)
    torch.set_num_threads(case.threads)
    with rnnfast.use_engine("cpu", kernel=kernel):
        ours = cases.run_rnnfast(problem)
    tolerance.check(ours, peer, ref, case.dtype)


@st.composite
def any_view(draw: DrawFn, values: Tensor) -> Tensor:
    """The same values in another memory layout: a slice, a stride, a permutation, an offset."""
    order = draw(st.permutations(range(values.dim())))
    inverse = [order.index(d) for d in range(values.dim())]
    permuted = values.permute(order).contiguous()
    steps = [draw(st.integers(1, 3)) for _ in range(values.dim())]
    before = [draw(st.integers(0, 2)) for _ in range(values.dim())]
    shape = [b + n * s + 1 for n, s, b in zip(permuted.shape, steps, before, strict=True)]
    buffer = values.new_full(shape, float("nan"))
    inside = buffer[
        tuple(slice(b, b + n * s, s) for n, s, b in zip(permuted.shape, steps, before, strict=True))
    ]
    inside.copy_(permuted)
    return inside.permute(inverse)


@BOUNDED
@given(data=st.data())
def test_any_layout_of_every_operand(data: st.DataObject) -> None:
    """x, states, weights and incoming gradients all as odd views."""
    cell = data.draw(st.sampled_from(oracle.CELLS), label="cell")
    case = Case(
        cell,
        seq_len=data.draw(st.integers(1, 4), label="T"),
        batch=data.draw(st.integers(1, 7), label="B"),
        input_size=data.draw(st.integers(1, 9), label="I"),
        hidden=data.draw(st.integers(2, 20), label="H"),
        proj=1 if cell == "lstm" and data.draw(st.booleans(), label="proj") else 0,
        dtype=data.draw(st.sampled_from(cases.DTYPES), label="dtype"),
        packed=data.draw(st.booleans(), label="packed"),
        reverse=data.draw(st.booleans(), label="reverse"),
    )
    problem, ref, peer = cases.solved(case)
    leaves, args = cases.op_inputs(problem, grad=False)
    views = {k: data.draw(any_view(v), label=k) for k, v in leaves.items()}
    for name, value in leaves.items():
        assert torch.equal(views[name], value)
        views[name].requires_grad_()
    args = [*cases.op_operands(views), *args[8:]]
    y, h_n, c_n, _ = torch.ops.rnnfast.forward(
        *args, None, oracle.CELL_IDS[cell], case.reverse, True
    )
    outputs = {"y": y, "h_n": h_n} | ({"c_n": c_n[0]} if cell == "lstm" else {})
    packed = cases._pack_cotangents(problem)
    odd = {k: data.draw(any_view(v), label=f"d{k}") for k, v in packed.cotangents.items()}
    grads = cases._gradients(cases.Problem(case, problem.inputs, odd), views, outputs)
    ours = {k: v.detach() for k, v in outputs.items()} | grads
    tolerance.check(ours, peer, ref, case.dtype)
