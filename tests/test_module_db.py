"""torch's own samples and error inputs for its recurrent modules, with our class in their place."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from test_modules import leaves_of
from torch import nn
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db

import rnnfast

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
INFOS = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls in {getattr(nn, name) for name in NAMES}
}
# How many samples torch 2.13 has for a dtype and a mode, and how many wrong calls: no fewer may be
# tested, so that a list which comes back short or empty does not pass.
SAMPLES = {"LSTM": 32, "GRU": 32, "RNN": 64, "LSTMCell": 2, "GRUCell": 2, "RNNCell": 3}
ERRORS = {"LSTM": 14, "GRU": 14, "RNN": 14, "LSTMCell": 4, "GRUCell": 6, "RNNCell": 6}


def samples(info: ModuleInfo, dtype: torch.dtype, training: bool, packed: bool) -> list[Any]:
    options = {"with_packed_sequence": True} if packed else {}
    return list(
        info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=True, training=training, **options
        )
    )


def test_all_six_are_in_the_data_base() -> None:
    assert set(INFOS) == set(NAMES)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", NAMES)
def test_samples(name: str, dtype: torch.dtype, training: bool) -> None:
    """torch's no-batch-dimension reference, and torch's own module: outputs and gradients."""
    info = INFOS[name]
    packed = name in ("GRU", "RNN")
    found = samples(info, dtype, training, packed)
    assert len(found) >= SAMPLES[name]
    close = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    )
    for sample in found:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        ours = getattr(rnnfast, name)(*args, **kwargs, dtype=dtype).train(training)
        theirs = info.module_cls(*args, **kwargs, dtype=dtype).train(training)
        theirs.load_state_dict(ours.state_dict())
        inputs = sample.forward_input
        results = []
        for module in (ours, theirs):
            outputs = leaves_of(module(*inputs.args, **inputs.kwargs))
            leaves = [t for t in leaves_of(inputs.args) if t.requires_grad] + [*module.parameters()]
            loss = sum((out * out.detach().cos()).sum() for out in outputs)
            results.append([*outputs, *torch.autograd.grad(loss, leaves)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, **close)
        if sample.reference_fn is not None and not isinstance(
            inputs.args[0], nn.utils.rnn.PackedSequence
        ):
            want = sample.reference_fn(ours, *inputs.args, **inputs.kwargs)
            got = ours(*inputs.args, **inputs.kwargs)
            for a, b in zip(leaves_of(got), leaves_of(want), strict=True):
                torch.testing.assert_close(a, b, **close)


def error_inputs() -> list[Any]:
    found = []
    for name in NAMES:
        info = INFOS[name]
        for k, error in enumerate(
            info.module_error_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=False, training=False
            )
        ):
            found.append(pytest.param(name, error, id=f"{name}-{k}"))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_error_inputs_are_there(name: str) -> None:
    assert sum(param.values[0] == name for param in error_inputs()) >= ERRORS[name]


@pytest.mark.parametrize(("name", "error"), error_inputs())
def test_error_inputs(name: str, error: Any) -> None:
    """Type and text as torch's own suite demands, and word for word what torch.nn says."""
    constructor = error.module_error_input.constructor_input
    forward = error.module_error_input.forward_input

    def provoke(cls: type[nn.Module]) -> Exception:
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex) as caught:
                cls(*constructor.args, **constructor.kwargs)
        else:
            module = cls(*constructor.args, **constructor.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex) as caught:
                module(*forward.args, **forward.kwargs)
        return caught.value

    theirs, ours = provoke(getattr(nn, name)), provoke(getattr(rnnfast, name))
    assert type(ours) is type(theirs)
    assert re.sub(r"rnnfast", "torch.nn", str(ours)) == str(theirs)
