"""The loop of :class:`rnnfast.Recurrent`: one cell over all steps of one direction, in torch's
autograd, and the checks of what a user's cell returns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import _nested, _reset, cell_modules

_is_any_autocast_enabled = torch._C._is_any_autocast_enabled

# cells that return their state only, which may be a pair
_PAIR = (nn.LSTMCell, cell_modules.LSTMCell)
OURS = (*_PAIR, nn.GRUCell, nn.RNNCell, cell_modules.GRUCell, cell_modules.RNNCell)


def fail(expected: str, found: str) -> NoReturn:
    raise RuntimeError(f"rnnfast: Recurrent: {expected}, got {found}")


def made(cell: Any, num_layers: int, directions: int) -> list[nn.Module]:
    """The cells, one for each layer and direction."""
    count = num_layers * directions
    if isinstance(cell, nn.Module) and not isinstance(cell, nn.ModuleList):
        if count > 1:
            raise ValueError(
                f"rnnfast: Recurrent needs {count} cells (num_layers = {num_layers}, directions = "
                f"{directions}), got one module, whose weights all would share; give a function "
                "of layer and direction, or a list of modules"
            )
        cells = [cell]
    elif isinstance(cell, Iterable) and not isinstance(cell, (type, Tensor)):
        cells = list(cell)
    elif callable(cell) and not isinstance(cell, type):
        cells = [
            cell(layer, direction) for layer in range(num_layers) for direction in range(directions)
        ]
    else:
        found = f"the class {cell.__name__}" if isinstance(cell, type) else type(cell).__name__
        raise TypeError(
            "rnnfast: Recurrent takes a cell (a module), a list of modules, or a function of layer "
            f"and direction that makes one, got {found}"
        )
    if len(cells) != count:
        raise ValueError(
            f"rnnfast: Recurrent needs {count} cells (num_layers = {num_layers}, directions = "
            f"{directions}), layer by layer, got {len(cells)}"
        )
    for i, module in enumerate(cells):
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"rnnfast: cells of Recurrent must be modules, got {type(module).__name__} for "
                f"layer {i // directions}, direction {i % directions}"
            )
        if any(module is other for other in cells[:i]):
            raise ValueError(
                f"rnnfast: Recurrent needs a module of its own for each layer and direction, got "
                f"one {type(module).__name__} twice; to share weights, give two modules the same "
                "parameters"
            )
    return cells


def _cuts(reset: Tensor, valid: Tensor | None, reverse: bool) -> list[Tensor]:
    """(B,) for each step: whether a new sequence begins between it and the valid step before it
    in this direction. A reset at a masked step counts at the next valid one."""
    if valid is None:
        return list((_reset.of_backward_direction(reset, None) if reverse else reset).unbind(0))
    steps = reset.size(0)
    cuts = list(reset.unbind(0))
    pending = begun = torch.zeros_like(reset[0])
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        if not reverse:
            pending = pending | reset[t]
        elif t + 1 < steps:  # behind a row's last valid step, resets say nothing
            pending = (pending | reset[t + 1]) & begun
        cuts[t] = pending
        pending, begun = pending & ~valid[t], begun | valid[t]
    return cuts


def _select(mask: Tensor, yes: list[Tensor], no: list[Tensor]) -> list[Tensor]:
    """Leaf by leaf; mask (B,). (The dtype is that of ``yes``: under autocast a state may get
    another at its first step.)"""
    return [
        torch.where(mask.reshape(-1, *[1] * (y.dim() - 1)), y, n.to(y.dtype))
        for y, n in zip(yes, no)
    ]


def _without(masked: Tensor, leaf: Tensor) -> Tensor:
    """Zeros where it is masked, whatever stands there."""
    return leaf.masked_fill(masked.reshape(*masked.shape, *[1] * (leaf.dim() - masked.dim())), 0)


class Cell:
    """A user's cell with its name in errors, and what it returned first, which the rest must be
    like."""

    def __init__(self, module: nn.Module, index: int) -> None:
        self.module = module
        self.name = f"cells.{index} ({type(module).__name__})"
        self.output: Any = None

    def initial_state(self, x: Any, batch: int) -> Any:
        """That of a sequence, of the input of one step; None if the cell has none."""
        module = self.module
        method = getattr(module, "initial_state", None)
        if method is None and isinstance(module, OURS):
            if not isinstance(x, Tensor):
                fail(f"input of {self.name} must be a tensor", _nested.text(x))
            zeros = x.new_zeros(batch, module.hidden_size)
            return (zeros, zeros) if isinstance(module, _PAIR) else zeros
        if method is None:
            return None
        who = f"initial_state of {self.name}"
        if not callable(method):
            fail(f"{who} must be a method", type(method).__name__)
        state = method(x)
        for leaf, path in zip(_nested.leaves(state, who, fail), _nested.paths(state, who)):
            if leaf.dim() < 1 or leaf.size(0) != batch:
                fail(f"{path} must have shape (B, *) with B = {batch}", f"{tuple(leaf.shape)}")
        return state

    def given_state(self, hx: Any, initial: Any, batch: int, cast: bool) -> Any:
        """A caller's state, in the form of the cell's own."""
        at = f"hx for {self.name}"
        if initial is None:
            for leaf, path in zip(_nested.leaves(hx, at, fail), _nested.paths(hx, at)):
                if leaf.dim() < 1 or leaf.size(0) != batch:
                    fail(f"{path} must have shape (B, *) with B = {batch}", f"{tuple(leaf.shape)}")
            return hx
        leaves = self._alike(hx, initial, at, "", cast)
        return _nested.rebuild(initial, leaves)

    def _alike(self, tree: Any, like: Any, path: str, when: str, cast: bool) -> list[Tensor]:
        """Leaves in the structure, shapes and dtypes of another state."""
        leaves = _nested.leaves_as(tree, like, path, fail)
        wanted = _nested.leaves(like, path, fail)
        for i, (leaf, want) in enumerate(zip(leaves, wanted)):
            if leaf.shape != want.shape or (leaf.dtype != want.dtype and not cast):
                at = _nested.paths(like, path)[i]
                fail(
                    f"{at} must have shape {tuple(want.shape)} of {want.dtype}",
                    f"{tuple(leaf.shape)} of {leaf.dtype}{when}",
                )
        return leaves

    def __call__(self, x: Any, state: Any, t: int, batch: int, cast: bool) -> tuple[Any, Any]:
        """Leaves of output and new state of a step, checked."""
        result = self.module(x, state)
        if isinstance(self.module, OURS):
            output, new = (result[0] if isinstance(self.module, _PAIR) else result), result
        elif isinstance(result, tuple) and len(result) == 2:
            output, new = result
        else:
            fail(
                f"{self.name} must return a tuple (output, state) (cells of torch.nn and rnnfast "
                "may return the state alone)",
                _nested.text(result),
            )
        when = f" at step {t}; a cell returns (output, state)"
        leaves = self._alike(new, state, f"state of {self.name}", when, cast)
        path = f"output of {self.name}"
        if self.output is None:
            self.output = output
        outputs = _nested.leaves_as(output, self.output, path, fail)
        first = _nested.leaves(self.output, path, fail)
        for i, (leaf, like) in enumerate(zip(outputs, first)):
            if leaf.dim() < 1 or leaf.size(0) != batch or leaf.shape != like.shape:
                at = _nested.paths(self.output, path)[i]
                want = "one shape (B, *) at all steps" if leaf.dim() else "shape (B, *)"
                fail(f"{at} must have {want} with B = {batch}", f"{tuple(leaf.shape)} at step {t}")
        return outputs, leaves


def _inputs(leaves: list[Tensor], like: Any) -> list[Any]:
    """Input of every step."""
    steps: Iterator[tuple[Tensor, ...]] = zip(*(leaf.unbind(0) for leaf in leaves))
    return [_nested.rebuild(like, list(step)) for step in steps]


def direction(
    cell: Cell,
    x: Any,
    hx: Any,
    valid: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    last: bool,
) -> tuple[Any, Any]:
    """Output (T, B, ...), or (B, ...) of the last step, and final state of one cell."""
    flat = _nested.leaves(x, "input", fail)
    if not flat:
        fail(f"input of {cell.name} must hold a tensor", _nested.text(x))
    batch = flat[0].size(1)
    cast = _is_any_autocast_enabled()
    masked = None if valid is None else ~valid
    if masked is not None:
        flat = [_without(masked, leaf) for leaf in flat]
    inputs = _inputs(flat, x)
    order = range(len(inputs) - 1, -1, -1) if reverse else range(len(inputs))

    initial = None
    if (
        hx is None
        or reset is not None
        or hasattr(cell.module, "initial_state")
        or isinstance(cell.module, OURS)
    ):
        initial = cell.initial_state(inputs[order[0]], batch)
    if initial is None and (hx is None or reset is not None):
        why = "hx was not given" if hx is None else "reset was given"
        raise RuntimeError(
            f"rnnfast: Recurrent: {cell.name} has no method initial_state, and {why}: define "
            "initial_state(self, input), which takes the input of one step and returns the state "
            "before the first, tensors of shape (B, *)"
        )
    like = initial if hx is None else cell.given_state(hx, initial, batch, cast)
    state = _nested.leaves(like, "hx", fail)
    begin = [] if initial is None else _nested.leaves(initial, "hx", fail)
    cuts = None if reset is None else _cuts(reset, valid, reverse)

    outputs: list[list[Tensor]] = [[]] * len(inputs)
    final: list[Tensor] = []
    for t in order:
        entering = state
        if cuts is not None:
            cut = _select(cuts[t], begin, state)
            entering = [s.to(kept.dtype) for s, kept in zip(cut, state)]
        output, new = cell(inputs[t], _nested.rebuild(like, entering), t, batch, cast)
        state = new if valid is None else _select(valid[t], new, state)
        if not last:
            outputs[t] = output if masked is None else [_without(masked[t], y) for y in output]
        elif valid is None:
            final = output
        else:
            final = _select(valid[t], output, final or [torch.zeros_like(y) for y in output])
    y = final if last else [torch.stack(leaf) for leaf in zip(*outputs)]
    return _nested.rebuild(cell.output, y), _nested.rebuild(like, state)


def concatenated(one: Any, other: Any, dims: int) -> Any:
    """Outputs of two directions, leaf by leaf, in the last dimension."""
    ones = _nested.leaves(one, "output", fail)
    others = _nested.leaves_as(other, one, "output of the second direction", fail)
    for a, b, path in zip(ones, others, _nested.paths(one, "output")):
        if a.dim() <= dims or a.shape[:-1] != b.shape[:-1]:
            fail(
                f"{path} of two directions must have shapes that can be concatenated in the last "
                f"dimension, behind T and B",
                f"{tuple(a.shape)} and {tuple(b.shape)}",
            )
    return _nested.rebuild(one, [torch.cat(pair, -1) for pair in zip(ones, others)])
