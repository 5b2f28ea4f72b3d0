"""Weights of passes whose cell has parameters of its units: a tensor of their own in a layer, and
behind the bias in an operator's b_hh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import _norm
from ._checks import check_dtypes, check_shape
from .cells import CellSpec


def names_of(spec: CellSpec) -> dict[str, int]:
    """The tensors of parameters of a pass, in order, and how many numbers of a unit each has."""
    if spec.norms:
        return _norm.names_of(spec)
    if not spec.parameters:
        return {}
    return {"weight_p" if spec.is_own else "weight_ph": spec.parameters}


def tensors_of(spec: CellSpec) -> int:
    """How many tensors of parameters a pass has."""
    return len(names_of(spec))


def _check(spec: CellSpec, w_ih: Any, b_hh: Any, own: Sequence[Any]) -> None:
    """One by one: behind each other only their sum would be looked at."""
    if w_ih.dim() != 2 or w_ih.size(0) % spec.gates:
        return  # for the checks of w_ih itself
    hidden = w_ih.size(0) // spec.gates
    check_shape("b_hh", b_hh, "(G*H,)", (spec.gates * hidden,))
    for (name, of_unit), tensor in zip(names_of(spec).items(), own, strict=True):
        check_dtypes(name, tensor, b_hh, "b_hh")
        letters = "(H,)" if of_unit == 1 else f"({of_unit}*H,)"
        check_shape(name, tensor, letters, (of_unit * hidden,))


def merge(spec: CellSpec, weights: Sequence[Any], count: int, bias: bool) -> list[Any]:
    """``w_ih, w_hh, b_ih, b_hh``, and ``w_hr`` of a projection, of ``count`` passes. Each had
    ``w_ih, w_hh``, its biases if there are any, ``w_hr``, and then its parameters."""
    full: list[Any] = []
    each, own = len(weights) // count, tensors_of(spec)
    for k in range(0, len(weights), each):
        w_ih, w_hh, *rest = weights[k : k + each - own]
        b_ih, b_hh = rest[:2] if bias else (w_ih.new_zeros(w_ih.size(0)),) * 2
        _check(spec, w_ih, b_hh, weights[k + each - own : k + each])
        full += [
            w_ih,
            w_hh,
            b_ih,
            torch.cat([b_hh, *weights[k + each - own : k + each]]),
            *rest[2 if bias else 0 :],
        ]
    return full
