"""``functional.linear_scan``: values, derivatives of every kind, threads, long sequences."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from rounded import ISAS
from test_guard_bands import before_a_forbidden_page
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.func import grad, jacrev, jvp, vmap

import rnnfast
from rnnfast import reference
from rnnfast.functional import linear_scan

TARGETS = [isa for isa in ISAS if isa in ("portable", "avx2", "avx512", "neon")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# T, B, H: single numbers, tails of vectors, states in registers and not, more columns than go
# together, and (the long ones) chunks with and without a last part
SIZES = [
    (1, 1, 1),
    (3, 1, 7),
    (7, 3, 17),
    (40, 2, 100),
    (9, 1, 300),
    (3, 2, 20000),
    (4096, 1, 1),
    (5003, 2, 9),
]


def operands(sizes: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(sum(sizes))
    a = torch.rand(sizes, generator=gen, dtype=torch.float64) * 1.6 - 0.6
    b = torch.randn(sizes, generator=gen, dtype=torch.float64)
    h0 = torch.randn(sizes[1:], generator=gen, dtype=torch.float64)
    return a.to(dtype), b.to(dtype), h0.to(dtype)


def gradients(f: Any, args: Any, dh: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in args]
    h = f(*leaves)
    return [h.detach(), *torch.autograd.grad(h, leaves, dh.to(h.dtype))]


def reference_scan(*args: Tensor, reverse: bool = False) -> Tensor:
    return reference.scan(*(t.double() for t in args), reverse=reverse)


@functools.cache
def problem(sizes: Any, dtype: torch.dtype, reverse: bool) -> Any:
    """Operands, dh, and in float64 h and the gradients of a, b and h0."""
    args = operands(sizes, dtype)
    dh = torch.randn(sizes, dtype=torch.float64).to(dtype)
    a, b, h0, d = (t.double().numpy() for t in (*args, dh))
    order = range(sizes[0] - 1, -1, -1) if reverse else range(sizes[0])
    h, da, db = np.empty_like(a), np.empty_like(a), np.empty_like(a)
    entered = np.empty_like(a)
    state, carried = h0, np.zeros_like(h0)
    for t in order:
        entered[t] = state
        state = h[t] = a[t] * state + b[t]
    for t in reversed(order):
        db[t] = d[t] + carried
        carried = a[t] * db[t]
    da = db * entered
    return args, dh, [torch.from_numpy(t) for t in (h, da, db, carried)]


@pytest.mark.parametrize("isa", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_gradients_and_threads(sizes: Any, dtype: torch.dtype, isa: str) -> None:
    """Against float64, and the same bits on one thread and two."""
    eps = torch.finfo(dtype).eps
    for reverse in (False, True):
        args, dh, exact = problem(sizes, dtype, reverse)

        def ours(*args: Tensor, reverse: bool = reverse) -> Tensor:
            return linear_scan(*args, reverse=reverse)

        with rnnfast.use_engine("cpu", isa=isa):
            torch.set_num_threads(1)
            one = gradients(ours, args, dh)
            torch.set_num_threads(2)
            two = gradients(ours, args, dh)
        for mine, same, want in zip(one, two, exact, strict=True):
            assert mine.dtype == dtype
            assert torch.equal(mine, same)
            assert (mine.double() - want).abs().max() <= 8 * eps * want.abs().max()


@pytest.mark.parametrize("shape", [(5,), (4, 3), (4, 2, 3, 5), (0, 2, 3), (4, 0, 3), (4, 3, 0)])
def test_shapes(shape: Any) -> None:
    args = operands(shape)
    dh = torch.randn(shape, dtype=torch.float64)
    found = gradients(linear_scan, args, dh)
    if 0 not in shape:
        for mine, want in zip(found, gradients(reference_scan, args, dh), strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)
    assert [t.shape for t in found] == [args[0].shape, *(t.shape for t in args)]
    assert linear_scan(*args[:2]).shape == args[0].shape


def test_strides_are_followed() -> None:
    """Views with gaps, in another order or expanded, as they are."""
    T, B, H = 30, 4, 21
    a, b, h0 = operands((T, B, H))
    want = linear_scan(a, b, h0)
    by_batch = a.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(linear_scan(by_batch, b, h0), want)
    wide = torch.zeros(T, B, 2 * H, dtype=a.dtype)
    wide[..., :H] = b
    assert torch.equal(linear_scan(a, wide[..., :H], h0), want)
    assert torch.equal(linear_scan(a, b.mT.contiguous().mT, h0.t().contiguous().t()), want)
    constant = a[:1, :1].expand(T, B, H)
    assert torch.equal(linear_scan(constant, b, h0), linear_scan(constant.clone(), b, h0))
    loss = linear_scan(by_batch.requires_grad_(), b, h0).sum()  # an expanded gradient
    (da,) = torch.autograd.grad(loss, by_batch)
    assert torch.equal(da, gradients(linear_scan, (a, b, h0), torch.ones_like(a))[1])


@pytest.mark.parametrize("isa", TARGETS)
def test_no_operand_is_read_beyond_its_end(isa: str) -> None:
    with rnnfast.use_engine("cpu", isa=isa):
        for sizes in ((3, 1, 5), (7, 3, 17), (9, 1, 300), (4100, 1, 17)):
            for dtype in (torch.float32, torch.float16):
                a, b, h0 = operands(sizes, dtype)
                near = [before_a_forbidden_page(t) for t in (a, b, h0)]
                dh = before_a_forbidden_page(torch.randn(sizes).to(dtype))
                same = torch.ops.rnnfast.scan(*near, False)
                assert torch.equal(same, linear_scan(a, b, h0))
                h = before_a_forbidden_page(same)
                torch.ops.rnnfast.scan_backward(dh, near[0], h, near[2], False, 7)


LONG = (20000, 1, 4)  # in chunks


@pytest.mark.parametrize("factor", [1e-30, 0.0, 0.5, -0.9, 1.0, -1.0, 1.002])
def test_long_sequences_of_any_factor(factor: float) -> None:
    """Chunks are joined by products of a, which may vanish or grow beyond all bounds."""
    T, B, H = LONG
    a = torch.full(LONG, factor)
    a[1000, :, 2] = 0  # one column is cut
    b = torch.randn(LONG) * (factor != 1.002)
    h0 = torch.full((B, H), 1e-8 if factor > 1 else 1.0)
    found = linear_scan(a, b, h0).double()
    want = reference_scan(a, b, h0)
    scale = want.abs().cummax(0).values
    # what a step after the other may lose in float32: a rounding a step
    bound = 2.0**-23 * (T if factor > 1 else 300) * scale + 1e-37
    assert ((found - want).abs() <= bound).all()
    assert found.isfinite().all()


def test_growth_that_overflows_in_a_chunk_only() -> None:
    """2^4096 from a zero start; but what enters is exactly the point that stays where it is."""
    a = torch.full(LONG, 2.0)
    found = linear_scan(a, torch.ones(LONG), -torch.ones(LONG[1:]))
    assert torch.equal(found, -torch.ones(LONG))
    assert torch.equal(linear_scan(a, torch.zeros(LONG)), torch.zeros(LONG))
    a[12000:] = 0.5
    grown = linear_scan(a, torch.zeros(LONG), torch.ones(LONG[1:]))
    assert grown[11999].isinf().all() and grown[-1].isinf().all()


def test_nan_and_inf_stay_in_their_column() -> None:
    for sizes in (LONG, (50, 3, 40)):
        a, b, h0 = operands(sizes, torch.float32)
        want = linear_scan(a, b, h0)
        b[20, 0, 1] = torch.nan
        b[30, 0, 2] = torch.inf
        a[30, 0, 3] = torch.nan
        found = linear_scan(a, b, h0)
        assert found[20:, 0, 1].isnan().all() and found[30:, 0, 3].isnan().all()
        assert torch.equal(found[:20], want[:20])
        rest = torch.ones(sizes[1:], dtype=torch.bool)
        rest[0, 1:4] = False
        assert torch.equal(found[:, rest], want[:, rest])


# --------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 2, 3), (6, 1, 9)], ids=str)
def test_gradcheck_to_the_second_order_and_forward(sizes: Any, reverse: bool) -> None:
    args = [t.requires_grad_() for t in operands(sizes)]

    def f(*args: Tensor) -> Tensor:
        return linear_scan(*args, reverse=reverse)

    assert gradcheck(f, args, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, args)
    assert gradcheck(lambda a, b: f(a, b), args[:2], check_forward_ad=True)


def test_only_the_gradients_asked_for() -> None:
    args = operands((5, 2, 3))
    dh = torch.randn(5, 2, 3, dtype=torch.float64)
    every = gradients(linear_scan, args, dh)[1:]
    for k in range(3):
        given = [t.clone().requires_grad_(j == k) for j, t in enumerate(args)]
        (found,) = torch.autograd.grad(linear_scan(*given), given[k], dh)
        assert torch.equal(found, every[k])


def test_third_order_agrees_with_the_reference() -> None:
    def third(f: Any) -> Tensor:
        a, b, h0 = (t.requires_grad_() for t in operands((4, 1, 2)))
        value = f(a, b, h0).pow(2).sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sum(), a, create_graph=True)
        return value.detach()

    torch.testing.assert_close(third(linear_scan), third(reference_scan))


def test_transforms_agree_with_the_reference() -> None:
    a, b, h0 = operands((6, 2, 5))
    many = torch.stack([b, 2 * b, -b], 2)
    tangents = tuple(torch.randn_like(t) for t in (a, b, h0))

    def loss(f: Any) -> Any:
        return lambda a, b, h0: f(a, b, h0).sin().sum()

    def all_of(f: Any) -> list[Tensor]:
        per_sample = vmap(grad(loss(f), (0, 1, 2)), (None, 2, None))(a, many, h0)
        return [
            vmap(f, (None, 2, None))(a, many, h0),
            *per_sample,
            *jvp(f, (a, b, h0), tangents),
            jvp(grad(loss(f)), (a, b, h0), tangents)[1],
            jacrev(f)(a[:3, :1], b[:3, :1], h0[:1]),
            vmap(vmap(f, (0, 0, 0)), (0, 0, None))(
                torch.stack([a, a]).movedim(2, 1).unsqueeze(3),
                torch.stack([b, a]).movedim(2, 1).unsqueeze(3),
                h0.unsqueeze(1),
            ),
        ]

    for mine, want in zip(all_of(linear_scan), all_of(reference_scan), strict=True):
        torch.testing.assert_close(mine, want)


def test_dual_tensors() -> None:
    a, b, h0 = operands((5, 2, 3))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(a, torch.ones_like(a))
        found = forward_ad.unpack_dual(linear_scan(dual, b, h0)).tangent
        want = forward_ad.unpack_dual(reference_scan(dual, b, h0)).tangent
        assert found is not None and want is not None
        torch.testing.assert_close(found, want)
        with pytest.raises(RuntimeError, match="can't carry tangents"):
            torch.ops.rnnfast.scan(dual, b, h0, False)


def test_one_graph_that_does_not_grow() -> None:
    """Compiled whole, with T dynamic; two operators, whatever T is."""
    torch._dynamo.reset()

    def f(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        return linear_scan(a.sigmoid(), b, h0) * 2

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (3, 9):
        args = operands((steps, 2, 5))
        dh = torch.randn_like(args[0])
        for mine, want in zip(gradients(compiled, args, dh), gradients(f, args, dh), strict=True):
            torch.testing.assert_close(mine, want)
    counts = []
    for steps in (10, 1000):
        leaves = [t.requires_grad_() for t in operands((steps, 2, 5))]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            linear_scan(*leaves).sum().backward()
        counts.append(sum(event.count for event in profile.key_averages()))
    assert counts[0] == counts[1]


def test_opcheck() -> None:
    a, b, h0 = operands((4, 2, 3))
    leaves = [t.requires_grad_() for t in (a, b, h0)]
    torch.library.opcheck(torch.ops.rnnfast.scan.default, (*leaves, False))
    h = linear_scan(a, b, h0).detach()
    torch.library.opcheck(
        torch.ops.rnnfast.scan_backward.default,
        (torch.ones_like(h).requires_grad_(), a, h.requires_grad_(), h0, True, 7),
    )


# --------------------------------------------------------------------------- bad calls


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"a": [1.0]}, TypeError, "a must be a tensor, got list"),
        ({"h0": 0.0}, TypeError, "h0 must be a tensor, got float"),
        ({"reverse": 1}, TypeError, "reverse must be a bool, got int"),
        ({"a": torch.tensor(1.0)}, RuntimeError, r"a must have shape \(T, \*\), got \(\)"),
        (
            {"b": torch.ones(4, 2, 4)},
            RuntimeError,
            r"b must have shape \(T, \*\) = \(4, 2, 3\) of a, got \(4, 2, 4\)",
        ),
        (
            {"h0": torch.ones(3)},
            RuntimeError,
            r"h0 must have shape \(\*\) = \(2, 3\) of a, got \(3,\)",
        ),
        ({"b": torch.ones(4, 2, 3).double()}, RuntimeError, "b must have the dtype of a"),
        ({"b": torch.ones(4, 2, 3, device="meta")}, RuntimeError, "on the same device as a"),
        ({"a": torch.ones(4, 2, 3).to_sparse()}, NotImplementedError, "a must be a dense tensor"),
    ],
    ids=str,
)
def test_bad_calls(change: Any, error: Any, text: str) -> None:
    given = {"a": torch.ones(4, 2, 3), "b": torch.ones(4, 2, 3), "h0": torch.ones(2, 3)} | change
    with pytest.raises(error, match=text):
        linear_scan(given.pop("a"), given.pop("b"), **given)


def test_other_types_run_in_the_reference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.ones(4, 2, 3, dtype=torch.int64), torch.ones(4, 2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="engines compute in float32, float64"):
        linear_scan(a, b)
    with rnnfast.use_engine("reference"):
        assert linear_scan(a, b)[:, 0, 0].tolist() == [1, 2, 3, 4]
    monkeypatch.setattr(rnnfast.engine, "forced", "cuda")
    with pytest.raises(RuntimeError, match='"cuda" was forced, got a tensor on cpu'):
        linear_scan(a.float(), b.float())


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((torch.ones(4, 3), torch.ones(4, 3), None, False), r"a must have shape \(T, B, H\)"),
        (
            (torch.ones(4, 2, 3), torch.ones(4, 2, 2), None, False),
            r"b must have shape \(T, B, H\) = \(4, 2, 3\), got \(4, 2, 2\)",
        ),
        (
            (torch.ones(4, 2, 3), torch.ones(4, 2, 3), torch.ones(2), False),
            r"h0 must have shape \(B, H\) = \(2, 3\), got \(2,\)",
        ),
        (
            (torch.ones(4, 2, 3), torch.ones(4, 2, 3).half(), None, False),
            "b must have the dtype of a, float32, got float16",
        ),
        (
            (torch.ones(4, 2, 3).int(), torch.ones(4, 2, 3).int(), None, False),
            "a must be float32, float64, bfloat16 or float16, got int32",
        ),
    ],
    ids=["rank", "b", "h0", "dtype", "int"],
)
def test_the_operator_checks_too(args: Any, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        torch.ops.rnnfast.scan(*args)
    h = torch.ones(4, 2, 3)
    with pytest.raises(RuntimeError, match=r"h must have shape \(T, B, H\) = \(4, 2, 3\)"):
        torch.ops.rnnfast.scan_backward(h, h, h[:3], None, False, 7)
