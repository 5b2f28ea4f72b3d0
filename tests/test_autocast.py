"""torch.autocast on the CPU: layers and cells compute in its dtype, parameters stay float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tolerance
import torch
from test_half import LAYERS, _tensors, bf16, halves
from tolerance import biggest
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import rnnfast
import rnnfast.functional as F


def _run(module: nn.Module, x: Tensor, dtype: torch.dtype | None) -> tuple[list[Tensor], Any]:
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=dtype or bf16, enabled=dtype is not None):
        out = module(x)
    outs = list(out) if isinstance(out, tuple) and not isinstance(out[1], tuple) else None
    if outs is None:
        outs = [out] if isinstance(out, Tensor) else _tensors(out)
    loss = sum(o.float().square().sum() for o in outs)
    return outs, torch.autograd.grad(loss, [x, *module.parameters()])


CELLS: dict[str, Any] = {
    "LSTMCell": lambda **k: rnnfast.LSTMCell(5, 9, **k),
    "GRUCell": lambda **k: rnnfast.GRUCell(5, 9, **k),
    "RNNCell": lambda **k: rnnfast.RNNCell(5, 9, **k),
}


@halves
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_autocast_is_a_16_bit_layer_with_float32_parameters(name: str, dtype: torch.dtype) -> None:
    module = (LAYERS | CELLS)[name]()
    x = torch.randn(*((3, 2, 5) if name in LAYERS else (4, 5)))
    outs, grads = _run(module, x, dtype)
    assert all(o.dtype == dtype for o in outs)
    assert all(g.dtype == torch.float32 for g in grads)
    half = copy.deepcopy(module).to(dtype)
    want, want_grads = _run(half, x.to(dtype), None)
    assert all(tolerance.same_bits(a, b) for a, b in zip(outs, want, strict=True))
    assert all(torch.equal(a, b.float()) for a, b in zip(grads, want_grads, strict=True))
    # and near float32's
    plain, plain_grads = _run(module, x, None)
    for got, full in zip([*outs, *grads], [*plain, *plain_grads], strict=True):
        assert biggest((got.float() - full).detach()) <= 6 * torch.finfo(dtype).eps * biggest(
            full.detach()
        )


def test_autocast_with_states_packed_and_functional() -> None:
    lstm, gru = rnnfast.LSTM(5, 9), rnnfast.GRU(5, 9)
    x, h = torch.randn(3, 2, 5), torch.randn(1, 2, 9)
    with torch.autocast("cpu", dtype=bf16):
        assert {t.dtype for t in _tensors(lstm(x, (h, h.to(bf16))))} == {bf16}
        assert {t.dtype for t in _tensors(gru(pack_sequence([x[:, 0], x[:2, 1]])))} == {bf16}
        w = list(gru.parameters())
        assert F.gru(x, None, w)[0].dtype == bf16
        assert F.gru_cell(x[0], None, *w).dtype == bf16
        assert gru.double()(x)[0].dtype == torch.float64, "float64 stays"
        frozen = rnnfast.GRU(5, 9).freeze().requires_grad_(False)
        assert frozen(x.to(bf16))[0].dtype == torch.float32, "a frozen layer keeps its dtype"
        with rnnfast.use_engine("reference"):
            assert lstm(x)[0].dtype == bf16


def test_training_with_a_gradient_scaler() -> None:
    """float16 by autocast: losses fall as in float32, and an overflow skips its step."""
    losses: dict[bool, list[float]] = {}
    for cast in (False, True):
        torch.manual_seed(0)
        layer, head = rnnfast.LSTM(5, 16), nn.Linear(16, 1)
        parameters = [*layer.parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(parameters, 0.5)
        scaler = torch.amp.GradScaler("cpu", enabled=cast)
        x = torch.randn(7, 8, 5)
        want = x.sum((0, 2), keepdim=False)[:, None] / 6
        losses[cast] = []
        for _ in range(15):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16, enabled=cast):
                loss = nn.functional.mse_loss(head(layer(x)[0][-1]).float(), want)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[cast].append(float(loss.detach()))
        if cast:
            before = layer.weight_ih_l0.detach().clone()
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = layer(x)[0].float().sum()
            scaler.scale(loss * 1e30).backward()
            scaler.step(optimizer)
            assert torch.equal(before, layer.weight_ih_l0), "infinite gradients were applied"
    assert losses[True][-1] < 0.7 * losses[True][0]
    torch.testing.assert_close(
        torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=0.02, atol=1e-3
    )
