"""Whether a cell of one's own computes what its reference says, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .cells import CellSpec
from .load_cell import LoadedLayer

__all__ = ["check_cell"]

# whole vectors of every instruction set, pairs of them and a rest
_UNITS = 43
_F64 = torch.float64


class _Step:
    """One step of one sequence whose pre-activations are the biases: w_hh and x are zero, so that
    the gradients of biases and states are what the cell's backward gives."""

    def __init__(self, spec: CellSpec) -> None:
        self.spec = spec
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return 1.5 * torch.randn(*shape, dtype=_F64, generator=generator)

        H, G, K, S = _UNITS, spec.gates, spec.parameters, spec.states
        hidden = (G if spec.has_hidden_side else 0, K)
        self.values = {"gx": draw(G, H), "gh": draw(hidden[0], H), "p": draw(K, H)}
        self.values["state"] = draw(S, H)
        self.weight = draw(S, H)  # of the states in the sum that is differentiated

    def run(self, values: dict[str, Tensor], by_reference: bool) -> Tensor:
        """The new states, (S, H)."""
        spec, H = self.spec, _UNITS
        hidden = values["gh"]
        if not spec.has_hidden_side and spec.parameters:  # b_hh has room for gates all the same
            hidden = hidden.new_zeros(spec.gates, H)
        w_hh = hidden.new_zeros(
            (spec.gates * H, H) if spec.dense else (H,) if spec.diagonal else (0,)
        )
        inputs: tuple[Any, ...] = (
            hidden.new_zeros(1, 1, 1), values["state"][:1], values["state"][1:].unsqueeze(1),
            hidden.new_zeros(spec.gates * H, 1), w_hh, values["gx"].flatten(),
            torch.cat([hidden.flatten(), values["p"].flatten()]), None, None, None,
        )  # fmt: skip
        if by_reference:
            _, h, c = reference.forward(*inputs, cell=spec)
        else:
            _, h, c, _ = ops.forward(*inputs, None, spec.id, False, True)
        return torch.cat([h, c.squeeze(1)])

    def gradients(self, by_reference: bool) -> dict[str, Tensor]:
        """By automatic differentiation of the reference, or by the cell's backward."""
        leaves = {name: v.clone().requires_grad_() for name, v in self.values.items()}
        total = (self.weight * self.run(leaves, by_reference)).sum()
        found = torch.autograd.grad(
            total, list(leaves.values()), materialize_grads=True, allow_unused=True
        )
        return dict(zip(leaves, found))

    def differences(self) -> dict[str, Tensor]:
        """The gradients by differences of the cell's forward: units do not see one another."""
        found, width = {}, 1e-6
        for name, value in self.values.items():
            found[name] = torch.zeros_like(value)
            for k in range(value.size(0)):
                ends = []
                for sign in (1, -1):
                    moved = value.clone()
                    moved[k] += sign * width
                    ends.append(self.run({**self.values, name: moved}, False))
                found[name][k] = (self.weight * (ends[0] - ends[1])).sum(0) / (2 * width)
        return found


def _compare(
    what: str, names: list[str], got: Tensor, want: Tensor, tolerance: float
) -> dict[str, tuple[float, str]]:
    """The largest error of each row, and a text where that is too much."""
    found = {}
    for name, g, w in zip(names, got, want):
        error = (g - w).abs() / (1 + w.abs())
        worst = int(error.nan_to_num(torch.inf).argmax())
        largest = float(error[worst])
        wrong = not largest <= tolerance
        text = f"{name}: {what} gives {float(g[worst]):.6g}, and it is {float(w[worst]):.6g}"
        found[name] = (largest, text if wrong else "")
    return found


def _compare_layers(spec: CellSpec, dtype: torch.dtype) -> dict[str, tuple[float, str]]:
    """A layer of several steps, sequences and units with w_hh, against the reference in float64."""
    T, B, input_size, H = 5, 3, 4, 21
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=_F64, generator=generator)

    gates = spec.gates * H
    names = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")
    empty = not (spec.has_hidden_side or spec.parameters)
    given = [
        draw(T, B, input_size), draw(B, H), draw(spec.states - 1, B, H),
        0.3 * draw(gates, input_size),
        0.3 * draw(*((gates, H) if spec.dense else (H if spec.diagonal else 0,))), draw(gates),
        draw(0 if empty else gates + spec.parameters * H),
    ]  # fmt: skip
    weights = draw(T, B, H), draw(B, H), draw(spec.states - 1, B, H)
    results = []
    for by_reference in (False, True):
        to = _F64 if by_reference else dtype
        leaves = [t.to(to).requires_grad_() for t in given]
        inputs: tuple[Any, ...] = (*leaves, None, None, None)
        if by_reference:
            out = reference.forward(*inputs, cell=spec)
        else:
            out = ops.forward(*inputs, None, spec.id, False, True)[:3]
        total = torch.stack([(w.to(to) * o).sum() for w, o in zip(weights, out) if o.numel()]).sum()
        grads = torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True)
        results.append([*(o.detach() for o in out), *grads])
    of = f"a layer of {str(dtype).removeprefix('torch.')}"
    tolerance = 1e-9 if dtype == _F64 else 1e-3
    found: dict[str, tuple[float, str]] = {}
    labels = ("y", "h_n", "c_n", *(f"d{name}" for name in names))
    for name, got, want in zip(labels, *results):
        if want.numel():
            label = f"{name} of {of}"
            rows = got.double().reshape(1, -1), want.reshape(1, -1)
            found |= _compare("the engine", [label], *rows, tolerance)
    return found


def check_cell(cell: type[LoadedLayer]) -> dict[str, float]:
    r"""Check a cell that :func:`rnnfast.load_cell` compiled, and say which quantity is wrong.

    One step in float64, with random pre-activations and states: the new states against the
    reference, and what backward gives against the reference differentiated by torch. Then a layer
    of several steps, in float64 and float32. Without a reference, backward is compared with
    differences of the cell's own forward, and there is no layer.

    Args:
        cell: what load_cell returned

    Returns:
        the largest error of each quantity, relative to one plus its size: ``state[k]`` of forward;
        ``dgx[g]``, ``dgh[g]``, ``dstate[k]`` and ``dp[k]`` of backward; those of the layer

    Raises:
        RuntimeError: naming each quantity that is wrong, with a number of it and the right one
        TypeError: if ``cell`` is something else

    Example::

        >>> Mgu = rnnfast.load_cell("mgu.h", reference=step)  # doctest: +SKIP
        >>> rnnfast.check_cell(Mgu)["dgx[0]"] < 1e-9          # doctest: +SKIP
        True
    """
    if not isinstance(cell, type) or not issubclass(cell, LoadedLayer) or cell is LoadedLayer:
        raise TypeError(f"rnnfast: check_cell needs what load_cell returned, got {cell!r}")
    spec = cell.spec
    step = _Step(spec)
    found: dict[str, tuple[float, str]] = {}
    known = spec.id in reference.own_steps
    if known:
        with torch.no_grad():
            got, want = step.run(step.values, False), step.run(step.values, True)
        names = [f"state[{k}]" for k in range(spec.states)]
        found |= _compare("forward", names, got, want, 1e-9)
    wanted = step.gradients(True) if known else step.differences()
    for name, got in step.gradients(False).items():
        names = [f"d{name}[{k}]" for k in range(len(got))]
        found |= _compare("backward", names, got, wanted[name], 1e-9 if known else 1e-5)
    if known and not any(text for _, text in found.values()):  # else they are wrong, too
        found |= _compare_layers(spec, _F64)
        found |= _compare_layers(spec, torch.float32)
    wrong = [text for _, text in found.values() if text]
    if wrong:
        other = "its reference" if known else "the differences of its forward"
        hint = ""
        if any(text.startswith("dgh") for text in wrong) and not spec.split_gates:
            hint = "\nkSplitGates is false, so that dgx stands for dgh"
        raise RuntimeError(
            f"rnnfast: {spec.name} is not what {other} says:\n  " + "\n  ".join(wrong) + hint
        )
    return {name: error for name, (error, _) in found.items()}
