"""functional.batch_norm_lstm: the layer without a module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_batch_norm import X, layer, make
from torch import Tensor
from variants import f64

from rnnfast import functional


def tensors_of(one: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    names = [name for k in range(one.num_layers) for name in one._suffixes(k)]
    weights = [w for direction in one._stack().weights for w in direction]
    means, variances = (
        [getattr(one, f"running_{which}{name}") for name in names] for which in ("mean", "var")
    )
    return [w for w in weights if w is not None], means, variances


@pytest.mark.parametrize("lengths", [None, [5, 3, 1]])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_function_is_the_layer(training: bool, bias: bool, lengths: Any) -> None:
    one = make(4, 6, 2, bidirectional=True, bias=bias, batch_first=True, momentum=0.3, dropout=0.2)
    one.train(training)
    other, x = copy.deepcopy(one), torch.randn(3, 5, 4, dtype=f64)
    hx = torch.randn(4, 3, 6, dtype=f64), torch.randn(4, 3, 6, dtype=f64)
    n = None if lengths is None else torch.tensor(lengths)
    weights, means, variances = tensors_of(other)
    torch.manual_seed(1)
    got = functional.batch_norm_lstm(
        x, hx, weights, means, variances, num_layers=2, bidirectional=True, bias=bias,
        batch_first=True, momentum=0.3, dropout=0.2, training=training, lengths=n, eps=other.eps,
    )  # fmt: skip
    torch.manual_seed(1)
    want = one(x, hx, lengths=n)
    pairs = [(got[0], want[0]), *zip(got[1], want[1], strict=True)]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), one.buffers(), strict=True))
    leaves, others = list(one.parameters()), list(other.parameters())
    grads = [torch.autograd.grad(y.sum(), of) for y, of in ((got[0], others), (want[0], leaves))]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def call(**changed: Any) -> Any:
    one = layer()
    weights, means, variances = tensors_of(one)
    given: dict[str, Any] = {
        "input": X, "hx": None, "weights": weights, "running_mean": means,
        "running_var": variances, "training": True,
    }  # fmt: skip
    return functional.batch_norm_lstm(**given | changed)


ONES = torch.ones(24)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"weights": [ONES] * 6}, RuntimeError, "weights must hold 7 tensors .* = 7, got 6"),
        ({"weights": [ONES] * 7}, RuntimeError, r"w_ih must have shape \(4\*H, I\), got \(24,\)"),
        ({"weights": ONES}, TypeError, "weights must be a list of tensors, got Tensor"),
        ({"weights": [1] * 7}, TypeError, r"weights\[0\] must be a tensor, got int"),
        ({"running_mean": ONES}, TypeError, "running_mean must be a list of tensors, got Tensor"),
        ({"running_mean": []}, RuntimeError, "running_mean must hold 1 tensors .* got 0"),
        (
            {"running_var": [torch.ones(3, 54)]}, RuntimeError,
            r"running_var\[0\] must have shape \(S, 9\*H\) = \(4, 54\), got \(3, 54\)",
        ),
        (
            {"running_mean": [torch.ones(0, 54)]}, RuntimeError,
            r"running_mean\[0\] must have shape \(S, 9\*H\) = \(1, 54\), got \(0, 54\)",
        ),
        (
            {"running_var": [torch.ones(4, 54, device="meta")]}, RuntimeError,
            r"running_var\[0\] must be on the device of weights\[0\], cpu, got meta",
        ),
        ({"running_mean": [torch.ones(4, 54, dtype=f64)]}, RuntimeError, "dtype of x, float32"),
        ({"bidirectional": "a"}, TypeError, "bidirectional .* must be a bool, got str"),
        ({"training": 1}, TypeError, "training of BatchNormLSTM must be a bool, got int"),
        ({"momentum": None}, TypeError, "momentum .* must be a number, got NoneType"),
        ({"momentum": 2}, ValueError, r"momentum .* must be in \[0, 1\], got 2"),
        ({"eps": 0.0}, ValueError, "eps of BatchNormLSTM must be positive, got 0.0"),
        ({"num_layers": 0}, RuntimeError, "num_layers must be an int >= 1, got 0"),
        ({"input": X[:, :1]}, ValueError, "Expected more than 1 value per channel"),
        ({"input": X[..., :2]}, RuntimeError, "Expected 5, got 2"),
    ],
)  # fmt: skip
def test_errors_of_the_function(changed: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call(**changed)


def test_a_call_that_raises_moves_no_statistics() -> None:
    weights, means, variances = tensors_of(layer(num_layers=2))
    weights[8] = weights[8][:, 1:]  # W_hh of the second layer
    before = [t.clone() for t in (*means, *variances)]
    with pytest.raises(RuntimeError, match="w_hh must have shape"):
        functional.batch_norm_lstm(X, None, weights, means, variances, num_layers=2, training=True)
    assert all(map(torch.equal, before, (*means, *variances)))


@pytest.mark.parametrize("training", [False, True])
def test_transforms(training: bool) -> None:
    """In training with running statistics made inside the function, as torch's."""
    weights, means, variances = tensors_of(make(5, 6, 1))
    found, x = (*means, *variances), torch.randn(4, 3, 5, dtype=f64)

    def loss(x: Tensor, *weights: Tensor) -> Tensor:
        mean, var = ([t.clone()] for t in found)
        y, (h, c) = functional.batch_norm_lstm(x, None, weights, mean, var, training=training)
        return y.square().sum() + h.sum() + c.sum()

    leaves = [w.detach().requires_grad_() for w in weights]
    wanted = torch.autograd.grad(loss(x, *leaves), leaves)
    numbers = tuple(range(1, len(leaves) + 1))
    torch.testing.assert_close(torch.func.grad(loss, argnums=numbers)(x, *leaves), wanted)
    if not training:  # statistics of a sample go into no running ones of all
        many = torch.stack([x, 2 * x])
        each = torch.func.vmap(lambda x: loss(x, *leaves))(many)
        torch.testing.assert_close(each, torch.stack([loss(x, *leaves) for x in many]))
