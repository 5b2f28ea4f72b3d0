"""Which of the engines and the reference a call goes to, by its tensors and by who looks on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _cuda, _functorch, engine
from ._checks import DTYPES
from ._modes import has_tangent
from ._modes import transforms_active as _transforms_active


def use_reference(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    without_rules: bool = False,
) -> bool:
    """Whether a call goes to reference.py; an error if nothing can run it. without_rules: packed
    rows, or a cell with parameters, for which _functorch.py has no rules."""
    if engine.forced == "reference":
        return True
    # an operator would stop functorch, and lose a tangent without a word
    if _transforms_active():
        beyond = forward_ad._current_level >= 0 or without_rules or not _fits_transforms(x)
    else:
        beyond = has_tangent((x, h0, c0, *weights))
    if beyond:
        if engine.forced != "auto":
            raise RuntimeError(
                f'rnnfast: the engine "{engine.forced}" was forced and can\'t run under these '
                "functorch transforms or forward-mode AD (vmap and one gradient it can); "
                'use_engine("auto") or use_engine("reference") can'
            )
        return True
    if x.dtype not in DTYPES:
        raise RuntimeError(
            "rnnfast: the engines compute in float32, float64, bfloat16 and float16, got "
            f"{x.dtype}; convert with .float(), or run plain torch operators with "
            'rnnfast.use_engine("reference")'
        )
    check_place(x)
    return False


def check_place(x: Tensor) -> None:
    """An error if no engine, or not the one that is forced, runs where x is."""
    if not x.is_cpu:
        _check_engine(x)
    elif engine.forced == "cuda":
        raise RuntimeError(f'rnnfast: the engine "cuda" was forced, got a tensor on {x.device}')


def _fits_transforms(x: Tensor) -> bool:
    """Whether _functorch.py has rules for the transforms in force, on tensors of an engine."""
    if torch.compiler.is_compiling() or x.numel() == 0:
        return False
    return x.dtype in DTYPES and (x.is_cpu or x.is_cuda) and _functorch.fits()


def _check_engine(x: Tensor) -> None:
    """Whether an engine runs on the device of x, which is not the CPU."""
    if x.is_meta:
        return
    if engine.forced == "cpu":
        raise RuntimeError(f'rnnfast: the engine "cpu" was forced, got a tensor on {x.device}')
    if x.is_cuda and torch.compiler.is_compiling():
        return  # the operator says so when it runs
    why = _cuda.why_not_on(x.device) if x.is_cuda else f"there is none for {x.device.type}"
    if why:
        raise RuntimeError(
            f"rnnfast: no engine can run on {x.device}: {why}; "
            "move the tensors with .cpu(), run plain torch operators with "
            'rnnfast.use_engine("reference"), or go back to torch.nn with rnnfast.restore(model)'
        )


def is_exporting() -> bool:
    """torch.compiler.is_exporting, which up to torch 2.10 is true in all that Dynamo traces."""
    return torch.compiler.is_exporting()


# torch.compiler.assume_constant_result, without its import of all of torch._dynamo
is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
