"""The few tests that run under compute-sanitizer as well: tiny, and without cuDNN beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_cuda import (
    PRECISIONS,
    Setup,
    assert_near,
    build,
    call,
    kernel_forced,
    kernel_ran,
    module_on,
    products,
    run,
)

import rnnfast

pytestmark = [pytest.mark.cuda, pytest.mark.cuda_sanitize]

SETUPS: dict[str, Setup] = {
    "lstm, projection": Setup("LSTM", "float32", 3, 3, 5, 33, proj=7),
    "lstm, directions": Setup("LSTM", "float16", 3, 2, 5, 9, bidirectional=True, bias=False),
    "gru, layers": Setup("GRU", "bfloat16", 4, 3, 5, 33, num_layers=3, form="batch_first"),
    "gru, packed": Setup("GRU", "float64", 4, 5, 3, 9, form="packed_uneven", bidirectional=True),
    "rnn, resets": Setup("RNN_tanh", "float32", 4, 9, 1, 1, reset=True, state=False),
    "rnn, relu": Setup("RNN_relu", "float16", 2, 9, 5, 33, form="strided", loss="state"),
    "indrnn": Setup("IndRNN_tanh", "float32", 11, 9, 5, 33, form="packed", reset=True),
    "indrnn, relu": Setup("IndRNN_relu", "bfloat16", 9, 3, 5, 130, num_layers=2, loss="sum"),
}


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_forward_and_backward(setup: Setup, device: torch.device) -> None:
    """Also without gradients, and with dependent launches."""
    problem = build(setup)
    ours = module_on(problem, True, device, setup.dtype)
    got = run(problem, ours, device, setup.dtype)
    with rnnfast.use_engine("reference"):
        exact = module_on(problem, True, "cpu", torch.float64)
        want = run(problem, exact, "cpu", torch.float64)
    relative = max(1e-10, 32 * PRECISIONS[setup.precision][1])
    assert_near(list(got.values()), list(want.values()), relative)
    launches: list[Any] = ["plain", "pdl"] if device.type == "cuda" else [None]
    for launch in launches:
        with rnnfast.use_engine("auto", launch=launch), torch.no_grad():
            x, hx = problem.x.to(device, setup.dtype), problem.hx
            x = x.transpose(0, 1) if setup.form == "batch_first" else x
            outputs = call(problem, ours, x, [h.to(device, setup.dtype) for h in hx])
            assert_near(outputs, list(want.values())[: len(outputs)], relative)


# Weights in shared memory beside those in registers, several warps, blocks with rows that end or
# begin early, units that fill no tile.
ON_CHIP: dict[str, Setup] = {
    "lstm, packed": Setup(
        "LSTM", "float16", 3, 17, 5, 33, form="packed_uneven", bidirectional=True
    ),
    "lstm, largest": Setup("LSTM", "bfloat16", 3, 2, 5, 176),
    "lstm, tf32": Setup("LSTM", "tf32", 3, 9, 5, 127, reset=True, state=False),
    "gru, layers": Setup("GRU", "bfloat16", 4, 9, 5, 65, num_layers=2, reset=True, bias=False),
    "gru, largest": Setup("GRU", "float16", 2, 3, 5, 192, loss="sum"),
    "rnn, largest": Setup("RNN_tanh", "float16", 3, 9, 5, 255, form="packed", loss="state"),
    "rnn, relu": Setup("RNN_relu", "tf32", 2, 9, 5, 31, form="batch_first"),
}


@pytest.mark.parametrize("setup", ON_CHIP.values(), ids=ON_CHIP)
def test_on_chip(setup: Setup, device: torch.device) -> None:
    """Racecheck and synccheck have something to say of these: they share memory."""
    problem = build(setup)
    with products(setup.precision == "tf32"), kernel_forced("onchip"):
        got = run(problem, module_on(problem, True, device, setup.dtype), device, setup.dtype)
        assert kernel_ran() == "onchip"
    with rnnfast.use_engine("reference"):
        exact = module_on(problem, True, "cpu", torch.float64)
        want = run(problem, exact, "cpu", torch.float64)
    relative = 32 * PRECISIONS[setup.precision][1]
    assert_near(list(got.values()), list(want.values()), relative)
