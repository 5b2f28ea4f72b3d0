"""Tensors of a call that must have the dtype and device of the weights: casts of autocast, and
errors in torch.nn's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

is_any_autocast_enabled = torch._C._is_any_autocast_enabled

_TYPE_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.bool: "Bool",
}


def _raise_dtypes(found: Tensor, weight: Tensor, who: str) -> NoReturn:
    """torch.nn's text, and ours with the names after it."""
    a, b = (_TYPE_NAMES.get(t.dtype, str(t.dtype)) for t in (found, weight))
    raise RuntimeError(
        f"mat1 and mat2 must have the same dtype, but got {a} and {b} "
        f"(rnnfast: {who} is {found.dtype}, the weights are {weight.dtype})"
    )


def refuse_input(found: Any) -> NoReturn:
    """The type of torch.nn's error, which only misses a method."""
    raise AttributeError(
        f"rnnfast: input must be a tensor or a PackedSequence, got {type(found).__name__}"
    )


def _castable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and is_any_autocast_enabled()


def autocast_weights(
    weights: Sequence[Tensor | None], device: str
) -> tuple[Sequence[Any], torch.dtype | None]:
    """Under autocast, the weights in its dtype (float64 stays, as in torch's operators)."""
    if not torch.is_autocast_enabled(device):
        return weights, None
    dtype = torch.get_autocast_dtype(device)
    if all(w is None or w.dtype == dtype or w.dtype == torch.float64 for w in weights):
        return weights, None
    cast = [w if w is None or w.dtype == torch.float64 else w.to(dtype) for w in weights]
    return cast, dtype


def match_input(x: Tensor, weight: Tensor, layer: bool) -> Tensor:
    """Under autocast, the input in the dtype of the weights; else an error as torch.nn's."""
    if _castable(x):
        return x.to(weight.dtype)
    if layer and not is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
        )
    _raise_dtypes(x, weight, "input")


def check_device(x: Tensor, weight: Tensor) -> None:
    if x.device != weight.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{x.device} and parameter tensor at {weight.device}"
        )


def match_state(state: Tensor, weight: Tensor, who: str) -> Tensor:
    if state.device != weight.device:
        raise RuntimeError(
            "Input and hidden tensors are not at the same device, found input tensor at "
            f"{weight.device} and hidden tensor at {state.device}"
        )
    if state.dtype == weight.dtype:
        return state
    if _castable(state):
        return state.to(weight.dtype)
    _raise_dtypes(state, weight, who)
