"""Weights packed once and kept: what layer.freeze() holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, is_
from typing import NoReturn

import torch
from torch import Tensor

from . import engine, ops
from ._checks import DTYPES
from ._step_plan import StepPlan
from .cells import CellSpec

_address, _version = Tensor.data_ptr, attrgetter("_version")


def why_not(parameters: Mapping[str, Tensor | None], names: Sequence[str]) -> str | None:
    """Why a layer can't be frozen, if it can't."""
    for name in names:
        weight = parameters.get(name)
        if weight is None:
            return (
                f"freeze() needs weights that are parameters, and {name} is computed from others "
                "at every call (by a parametrization, say); make it a parameter again with "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
        if not weight.is_cpu or weight.dtype not in DTYPES:
            return (
                "freeze() needs float32, float64, bfloat16 or float16 weights on the CPU, "
                f"{name} is {weight.dtype} on {weight.device}"
            )
    return None


class Frozen:
    """Packed weights of a layer, and what they were made from."""

    def __init__(
        self,
        spec: CellSpec,
        parameters: Mapping[str, Tensor | None],
        names: Sequence[str],
        count: int,
        complete: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    ) -> None:
        why = why_not(parameters, names)
        if why is not None:
            raise RuntimeError(f"rnnfast: {why}")
        weights = [w for w in (parameters[name] for name in names) if w is not None]
        self.weights = tuple(weights)
        #: as a call takes them
        self.arguments = tuple(complete(weights))
        # they keep the memory: were it freed, other weights could come to lie at the same address
        self._memory = tuple(weight.detach() for weight in weights)
        self._names = tuple(names)
        # a tensor made in inference mode has no version, and can't be changed outside of it
        self._versioned = [w for w in weights if not w.is_inference()]
        self._state = self._look(weights)
        self._isa_changes = engine.isa_changes
        self._isa = engine.active_isa()
        self._spec = spec
        self._plan: StepPlan | None = None
        self._packed: list[Tensor] = []
        with torch.no_grad():
            each = len(self.arguments) // count
            for i in range(count):
                w = self.arguments[i * each : (i + 1) * each]
                self._packed.append(ops.pack(w[0], w[1], w[-1] if each % 2 else None, spec.id))

    def _look(self, weights: Sequence[Tensor]) -> tuple[list[int], list[int]]:
        return list(map(_address, weights)), list(map(_version, self._versioned))

    def _changed(self, state: tuple[list[int], list[int]]) -> list[str]:
        names = dict(zip(map(id, self.weights), self._names, strict=True))
        pairs = [
            *zip(self.weights, state[0], self._state[0], strict=True),
            *zip(self._versioned, state[1], self._state[1], strict=True),
        ]
        return [names[id(weight)] for weight, now, then in pairs if now != then]

    def _raise(self, names: list[str], what: str) -> NoReturn:
        raise RuntimeError(
            f"rnnfast: {names[0]} was {what} since freeze(); call freeze() again, or unfreeze()"
        )

    def step_plan(self) -> StepPlan:
        """How a step of the layer, which has one direction, runs without operators."""
        plan = self._plan
        if plan is None:
            memory = [w.detach() for w in self.arguments]
            plan = self._plan = StepPlan(self._spec, memory, self._packed)
        return plan

    def bytes(self, index: int) -> int:
        """What the packed weights of one layer and direction take."""
        return self._packed[index].nbytes

    def packed(self, parameters: Mapping[str, Tensor | None], spec: CellSpec) -> list[Tensor]:
        """The packed weights, if `weights` and the cell still are those of the layer."""
        if spec is not self._spec and spec.id != self._spec.id:
            raise RuntimeError(
                f"rnnfast: the layer was frozen with the cell {self._spec.name}, and has "
                f"{spec.name} now that its zoneout is another; call freeze() again, or unfreeze()"
            )
        # the loops of a call run in C; the slow ones only find the name for the error
        if not all(map(is_, self.weights, map(parameters.get, self._names))):
            replaced = [n for n, w in zip(self._names, self.weights) if parameters.get(n) is not w]
            self._raise(replaced, "replaced")
        weights = self.weights
        if (
            list(map(_address, weights)) != self._state[0]
            or list(map(_version, self._versioned)) != self._state[1]
        ):
            self._raise(self._changed(self._look(weights)), "changed")
        if engine.isa_changes != self._isa_changes:
            if engine.active_isa() != self._isa:
                raise RuntimeError(
                    f"rnnfast: the layer was frozen for {self._isa}, and {engine.active_isa()} is "
                    "in force; call freeze() again, or unfreeze()"
                )
            self._isa_changes = engine.isa_changes
        return self._packed
