"""Weights of passes whose cell has parameters of its units: a tensor of their own in a layer, and
behind the bias in an operator's b_hh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import _norm
from .cells import CellSpec


def tensors_of(spec: CellSpec) -> int:
    """How many tensors of parameters a pass has."""
    if spec.norms:
        return len(_norm.names_of(spec))
    return 1 if spec.parameters else 0


def merge(weights: Sequence[Any], count: int, bias: bool, own: int = 1) -> list[Any]:
    """``w_ih, w_hh, b_ih, b_hh``, and ``w_hr`` of a projection, of ``count`` passes. Each had
    ``w_ih, w_hh``, its biases if there are any, ``w_hr``, and then ``own`` tensors of
    parameters."""
    full: list[Any] = []
    each = len(weights) // count
    for k in range(0, len(weights), each):
        w_ih, w_hh, *rest = weights[k : k + each - own]
        b_ih, b_hh = rest[:2] if bias else (w_ih.new_zeros(w_ih.size(0)),) * 2
        full += [
            w_ih,
            w_hh,
            b_ih,
            torch.cat([b_hh, *weights[k + each - own : k + each]]),
            *rest[2 if bias else 0 :],
        ]
    return full
