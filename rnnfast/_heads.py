"""``num_heads``: W_hh of n blocks on its diagonal. Units of different heads never meet within a
layer, so each head is a pass of its own over the same input, a layer of H/n units, and the passes
stand side by side as the two directions do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .cells import CellSpec


def check(name: str, num_heads: Any, hidden_size: Any, proj_size: int = 0) -> int:
    """num_heads itself, or an error."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(
            f"rnnfast: num_heads of {name} must be an int, got {type(num_heads).__name__}"
        )
    # a hidden_size that is no number, or none that a layer can have, is for the layer to refuse
    divides = not isinstance(hidden_size, int) or (num_heads > 0 and hidden_size % num_heads == 0)
    if num_heads < 1 or not divides:
        raise ValueError(
            f"rnnfast: num_heads of {name} must be at least 1 and divide hidden_size = "
            f"{hidden_size}, got {num_heads}"
        )
    if num_heads > 1 and proj_size:
        raise ValueError(
            f"rnnfast: num_heads of {name} does not go with proj_size: a projection mixes the "
            f"units of all heads; got num_heads={num_heads}, proj_size={proj_size}"
        )
    return num_heads


def _of_each(weight: Tensor, heads: int, units: int) -> Sequence[Tensor]:
    """The rows of each head of a weight whose rows are (gate, head, unit): contiguous, all by one
    copy."""
    rows = weight.unflatten(0, (weight.size(0) // (heads * units), heads, units))
    return rows.transpose(0, 1).flatten(1, 2).unbind(0)


def split(name: str, spec: CellSpec, weights: Sequence[Any], bias: bool) -> list[Any]:
    """The weights of the passes of each head, of those of each layer and direction: w_ih (G*H, I),
    w_hh (G*H, H/n), biases (G*H) with parameters behind, whose rows are (gate, head, unit)."""
    heads, each = spec.heads, 4 if bias else 2
    rows = weights[0].size(0)
    if rows == 0 or rows % (spec.gates * heads):
        raise RuntimeError(
            f"rnnfast: w_ih of {name} with num_heads={heads} must have shape (G*H, I) with "
            f"G = {spec.gates}, got {tuple(weights[0].shape)}"
        )
    units = rows // (spec.gates * heads)
    found: list[Any] = []
    for first in range(0, len(weights), each):
        of_pass = weights[first : first + each]
        if of_pass[1].shape != (rows, units):
            raise RuntimeError(
                f"rnnfast: w_hh of {name} with num_heads={heads} must have shape "
                f"(G*H, H/num_heads) = {(rows, units)}, got {tuple(of_pass[1].shape)}"
            )
        for w in of_pass:
            if w.dim() == 0 or w.size(0) < rows or w.size(0) % (heads * units) != 0:
                raise RuntimeError(
                    f"rnnfast: weights of {name} with num_heads={heads} must have G*H = {rows} "
                    f"rows, got {tuple(w.shape)}"
                )
        split_up = [_of_each(w, heads, units) for w in of_pass]
        found += [w[k] for k in range(heads) for w in split_up]
    return found
