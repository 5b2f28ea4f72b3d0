"""Weights packed once and kept: what layer.freeze() holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import engine, ops
from .cells import CellSpec


def _version(weight: Tensor) -> int:
    # a tensor made in inference mode has no version, and can't be changed outside of it
    return -1 if weight.is_inference() else weight._version


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
        if not weight.is_cpu or weight.dtype not in (torch.float32, torch.float64):
            return (
                "freeze() needs float32 or float64 weights on the CPU, "
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
    ) -> None:
        why = why_not(parameters, names)
        if why is not None:
            raise RuntimeError(f"rnnfast: {why}")
        weights = [w for w in (parameters[name] for name in names) if w is not None]
        each = len(weights) // count
        self._weights = tuple(weights)
        # they keep the memory: were it freed, other weights could come to lie at the same address
        self._memory = tuple(weight.detach() for weight in weights)
        self._names = tuple(names)
        self._state = self._look(weights)
        self._isa_changes = engine.isa_changes
        self._isa = engine.active_isa()
        self._packed: list[Tensor] = []
        with torch.no_grad():
            for i in range(count):
                w = weights[i * each : (i + 1) * each]
                self._packed.append(ops.pack(w[0], w[1], w[-1] if each % 2 else None, spec.id))

    @staticmethod
    def _look(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
        return [(w.data_ptr(), _version(w)) for w in weights]

    def packed(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The packed weights, if they still are those of the layer."""
        for mine, now, name in zip(self._weights, weights, self._names, strict=True):
            if mine is not now:
                raise RuntimeError(
                    f"rnnfast: {name} was replaced since freeze(); call freeze() again, or "
                    "unfreeze()"
                )
        state = self._look(weights)
        if state != self._state:
            changed = [n for n, a, b in zip(self._names, state, self._state, strict=True) if a != b]
            raise RuntimeError(
                f"rnnfast: {changed[0]} was changed since freeze(); call freeze() again, or "
                "unfreeze()"
            )
        if engine.isa_changes != self._isa_changes:
            if engine.active_isa() != self._isa:
                raise RuntimeError(
                    f"rnnfast: the layer was frozen for {self._isa}, and {engine.active_isa()} is "
                    "in force; call freeze() again, or unfreeze()"
                )
            self._isa_changes = engine.isa_changes
        return self._packed
