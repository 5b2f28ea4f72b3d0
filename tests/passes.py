"""Passes of the operators with their numbers, and ways to run them: one by one, or in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnfast.cells import CELLS


def needs_of(given: dict[str, Any]) -> int:
    """Asks for every gradient that a pass has: bits of dx, dh0, dc0, then the weights'."""
    names = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
    optional = ("b_ih", "b_hh", "w_hr")
    return sum(
        1 << k for k, name in enumerate(names) if name not in optional or given[name] is not None
    )


def passes_of(
    cell: int, count: int, chained: bool, *, proj: bool = False, packed: bool = False,
    dtype: torch.dtype = torch.float64, steps: int = 37, state: bool = True, reset: bool = True,
    batch: int = 3, hidden: int = 5, bias: bool = True,
) -> tuple[Tensor, list[dict[str, Any]], Tensor | None]:  # fmt: skip
    """x, what each pass is given, and batch_sizes."""
    spec = CELLS[cell]
    torch.manual_seed(cell)
    inputs = 4
    out = 2 if proj else hidden
    sizes = None
    if packed:
        sizes = torch.tensor([max(1, batch - t * batch // steps) for t in range(steps)])
    scale = (5 / hidden) ** 0.5  # large layers don't saturate
    rows = steps * batch if sizes is None else int(sizes.sum())

    def numbers(*shape: int) -> Tensor:
        return (torch.randn(*shape) * 0.3).to(dtype)

    x = numbers(rows, inputs) if packed else numbers(steps, batch, inputs)
    passes = []
    for i in range(count):
        below = out if chained and i > 0 else inputs
        gates = spec.gates * hidden
        mask = torch.rand(rows) < 0.2
        passes.append(
            {
                "h0": numbers(batch, out) if state else None,
                "c0": numbers(spec.states - 1, batch, hidden) if state else None,
                "w_ih": numbers(gates, below),
                "w_hh": numbers(gates, out) * scale
                if spec.dense
                else numbers(hidden * spec.diagonal),
                "b_ih": numbers(gates) if bias else None,
                "b_hh": numbers(gates + spec.parameters * hidden) if bias else None,
                "w_hr": numbers(out, hidden) if proj else None,
                "reset": (mask if packed else mask.view(steps, batch)) if reset else None,
            }
        )
    return x, passes, sizes


def one_by_one(
    ops: Any, x: Tensor, passes: list[dict[str, Any]], sizes: Tensor | None, cell: int,
    chained: bool,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Results of forward and of backward of all passes, in the group operators' order."""
    forward: list[tuple[Tensor, ...]] = []
    for i, p in enumerate(passes):
        given = forward[-1][0] if chained and i else x
        *t, reset = p.values()
        forward.append(
            ops.forward(given, *t, sizes, reset, None, cell, not chained and i == 1, True)
        )
    grads: list[Any] = [None] * len(passes)
    dy = None
    for i in reversed(range(len(passes))):
        y, h_n, c_n, saved = forward[i]
        if not chained or dy is None:
            dy = torch.cos(y)
        *t, reset = passes[i].values()
        given = forward[i - 1][0] if chained and i else x
        needs = needs_of(passes[i])
        grads[i] = ops.backward(
            dy, torch.sin(h_n), torch.sin(c_n), given, *t, sizes, reset, y, saved, cell,
            not chained and i == 1, needs,
        )  # fmt: skip
        dy = grads[i][0] if chained else None
    return [t for out in forward for t in out], [t for g in grads for t in g]


def at_once(
    ops: Any, x: Tensor, passes: list[dict[str, Any]], sizes: Tensor | None, cell: int,
    chained: bool,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    given = [t for p in passes for t in (*p.values(), None)]
    forward = ops.forward_group(x, given, sizes, cell, chained, True)
    tensors = []
    for i, p in enumerate(passes):
        y, h_n, c_n, saved = forward[4 * i : 4 * i + 4]
        dy = torch.cos(y) if not chained or i + 1 == len(passes) else None
        tensors += [*p.values(), y, saved, dy, torch.sin(h_n), torch.sin(c_n)]
    needs = [needs_of(p) for p in passes]
    return forward, ops.backward_group(x, tensors, sizes, cell, chained, needs)
