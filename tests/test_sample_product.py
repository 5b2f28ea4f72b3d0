"""``rnnfast::sample_product``: a weight's gradient for every sample, by itself."""

from __future__ import annotations

import oracle
import pytest
import torch
from rounded import ISAS
from test_guard_bands import before_a_forbidden_page
from torch import Tensor

import rnnfast
from rnnfast.ops import sample_product

# T, samples, rows of a step that each has, M, N: tails of vectors and tiles, more rows than are
# packed together, more columns than a panel is wide, samples that threads share unevenly
SIZES = [
    (1, 1, 1, 1, 1),
    (5, 3, 1, 7, 5),
    (3, 4, 5, 33, 17),
    (600, 2, 2, 9, 70),
    (50, 8, 1, 512, 128),
    (2, 3, 1, 96, 260),
]


def operands(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    T, V, B, M, N = sizes
    return torch.randn(T, V * B, M, dtype=dtype), torch.randn(T, V * B, N, dtype=dtype), V


def expected(left: Tensor, right: Tensor, samples: int) -> Tensor:
    left, right = (t.double().unflatten(1, (samples, -1)) for t in (left, right))
    return torch.einsum("tvbm,tvbn->vmn", left, right)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_threads(sizes: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    left, right, samples = operands(sizes, dtype)
    with rnnfast.use_engine("cpu", isa=isa):
        torch.set_num_threads(1)
        one = sample_product(left, right, samples)
        torch.set_num_threads(2)
        two = sample_product(left, right, samples)
    exact = expected(left, right, samples)
    bound = 4 * torch.finfo(dtype).eps * expected(left.abs(), right.abs(), samples)
    assert ((one.double() - exact).abs() <= bound).all()
    assert torch.equal(one, two)


def test_strided_operands_are_those_that_are_meant() -> None:
    left, right, samples = operands((6, 3, 2, 10, 12), torch.float64)
    given = (left.transpose(0, 1).contiguous().transpose(0, 1), right.mT.contiguous().mT, samples)
    assert torch.equal(sample_product(*given), sample_product(left, right, samples))


@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 0, 3), (5, 4, 0)], ids=str)
def test_nothing_to_add_up(shape: tuple[int, ...]) -> None:
    left, right = torch.randn(shape), torch.randn(*shape[:2], 6)
    found = sample_product(left, right, 2)
    assert found.shape == (2, shape[2], 6)
    assert not found.any()


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_behind_the_operands_is_read(isa: str) -> None:
    for columns in (1, 5, 6, 7, 17, 48, 50):
        left, right = torch.randn(4, 3, columns), torch.randn(4, 3, columns + 2)
        with rnnfast.use_engine("cpu", isa=isa):
            found = sample_product(*map(before_a_forbidden_page, (left, right)), 3)
            assert torch.equal(found, sample_product(left, right, 3))


def test_derivatives() -> None:
    left, right, samples = operands((4, 3, 2, 5, 6), torch.float64)
    args = (left.requires_grad_(), right.requires_grad_(), samples)
    assert torch.autograd.gradcheck(sample_product, args)
    assert torch.autograd.gradgradcheck(sample_product, args)


def test_opcheck() -> None:
    left, right, samples = operands((4, 3, 2, 10, 12), torch.float32)
    torch.library.opcheck(sample_product, (left, right.requires_grad_(), samples))


def test_gate_gradients_have_no_derivative() -> None:
    x, w_ih, w_hh = torch.randn(2, 3, 4), torch.randn(5, 4, requires_grad=True), torch.eye(5)
    y, _, _, saved = torch.ops.rnnfast.forward(
        x, None, None, w_ih, w_hh, *(None,) * 6, oracle.CELL_IDS["rnn_tanh"], False, True
    )
    gates = torch.ops.rnnfast.gate_gradients(
        y, None, None, x, None, None, w_ih, w_hh, *(None,) * 5, y, saved,
        oracle.CELL_IDS["rnn_tanh"], False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="gate_gradients has no derivative"):
        gates[0].sum().backward()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"samples": 0}, "samples must divide V\\*B = 6, got 0"),
        ({"samples": 4}, "samples must divide V\\*B = 6, got 4"),
        ({"samples": -3}, "samples must divide"),
        ({"left": torch.randn(6, 10)}, "left must be a float32 or float64 CPU tensor"),
        ({"left": torch.randn(4, 6, 10).half()}, "left must be a float32 or float64 CPU tensor"),
        ({"left": torch.ones(4, 6, 10, dtype=torch.int64)}, "left must be a float32 or float64"),
        ({"right": torch.randn(4, 6, 12).double()}, "right must be .* of left's type"),
        ({"right": torch.randn(4, 5, 12)}, "right must have shape"),
        ({"right": torch.randn(3, 6, 12)}, "right must have shape"),
        ({"right": torch.randn(4, 6, 12, 1)}, "right must be"),
    ],
)
def test_nonsense(change: dict[str, object], sentence: str) -> None:
    left, right, samples = operands((4, 3, 2, 10, 12), torch.float32)
    given = {"left": left, "right": right, "samples": samples, **change}
    with pytest.raises(RuntimeError, match=sentence):
        sample_product(*given.values())
