"""Weights of passes whose cell has parameters of its units: a tensor of their own in a layer, and
behind the bias in an operator's b_hh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def merge(weights: Sequence[Any], count: int, bias: bool) -> list[Any]:
    """``w_ih, w_hh, b_ih, b_hh``, and ``w_hr`` of a projection, of ``count`` passes. Each had
    ``w_ih, w_hh``, its biases if there are any, ``w_hr``, and then the parameters."""
    full: list[Any] = []
    each = len(weights) // count
    for k in range(0, len(weights), each):
        w_ih, w_hh, *rest, p = weights[k : k + each]
        b_ih, b_hh = rest[:2] if bias else (w_ih.new_zeros(w_ih.size(0)),) * 2
        full += [w_ih, w_hh, b_ih, torch.cat([b_hh, p]), *rest[2 if bias else 0 :]]
    return full
