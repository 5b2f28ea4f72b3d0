"""One problem: weights, input and gradients that every peer gets, and the check of results."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .shapes import GATES, Shape

Results = dict[str, np.ndarray]

# float32 sums of up to T*B*(I+H) terms in another order: relative to the largest value of a tensor
TOLERANCE = {"y": 1e-4, "h_n": 1e-4, "c_n": 1e-4, "gradient": 1e-3}
# the same with fewer bits, against float32: weights and rows are rounded, everybody's in their way
LOOSE = {"bfloat16": 0.04, "float16": 0.01, "tfloat32": 0.01, "int8": 0.1}


@dataclass
class Problem:
    """Data of one shape in torch's layout and names; the same for every peer (fixed seed)."""

    shape: Shape
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        s = self.shape
        generator = torch.Generator(self.device).manual_seed(1234)

        def uniform(*size: int) -> torch.Tensor:
            bound = 1 / math.sqrt(s.H)
            empty = torch.empty(size, device=self.device)
            return empty.uniform_(-bound, bound, generator=generator)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=self.device)

        rows = GATES[s.cell] * s.H
        for layer, columns in enumerate(s.layer_inputs()):
            for suffix in ("", "_reverse")[: s.directions]:
                tail = f"l{layer}{suffix}"
                self.weights[f"weight_ih_{tail}"] = uniform(rows, columns)
                recurrent = (s.H,) if s.cell == "indrnn" else (rows, s.H)
                self.weights[f"weight_hh_{tail}"] = uniform(*recurrent)
                self.weights[f"bias_ih_{tail}"] = uniform(rows)
                self.weights[f"bias_hh_{tail}"] = uniform(rows)

        self.lengths = torch.tensor(s.lengths())  # where packing wants them: not on a GPU
        mask = torch.arange(s.T)[:, None] < self.lengths[None, :]
        self.mask = mask.to(self.device)  # (T, B), True on valid steps
        self.x = normal(s.T, s.B, s.input_size) * self.mask[..., None]
        self.dy = normal(s.T, s.B, s.directions * s.H) * self.mask[..., None]
        states = s.layers * s.directions, s.B, s.H
        self.h0 = normal(*states) * 0.5
        self.c0 = normal(*states) * 0.5

    def rounded(self, dtype: torch.dtype, device: torch.device) -> Problem:
        """The same numbers as a layer of this dtype sees them, in float32 on another device."""

        def seen(value: torch.Tensor) -> torch.Tensor:
            return value.to(dtype).to(device, torch.float32)

        other = copy.copy(self)
        other.shape, other.device = replace(self.shape, dtype="float32"), device
        other.weights = {name: seen(value) for name, value in self.weights.items()}
        for name in ("x", "dy", "h0", "c0"):
            setattr(other, name, seen(getattr(self, name)))
        other.mask = self.mask.to(device)
        return other

    @property
    def has_state(self) -> bool:
        """Streaming passes the state in; everything else starts from zeros."""
        return self.shape.mode == "streaming"

    def hx(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        """Initial state as torch's modules take it."""
        if not self.has_state:
            return None
        return (self.h0, self.c0) if self.shape.cell == "lstm" else self.h0

    def pack(self, padded: torch.Tensor) -> PackedSequence:
        return pack_padded_sequence(padded, self.lengths)

    def pad(self, data: torch.Tensor) -> torch.Tensor:
        """(N, F) in packed order -> (T, B, F), zeros after each sequence's end."""
        like = self.pack(self.x)
        packed = PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)
        return pad_packed_sequence(packed, total_length=self.shape.T)[0]


Values = Mapping[str, np.ndarray | torch.Tensor]


def _tensor(value: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.from_numpy(np.require(value, requirements="W"))  # some peers' are read-only


def errors(got: Values, wanted: Values) -> dict[str, float]:
    """Greatest difference of each tensor that both have, relative to its largest value."""
    found = {}
    for name in wanted:
        if name not in got:
            continue
        value, reference = _tensor(got[name]), _tensor(wanted[name])
        if not value.numel():
            found[name] = 0.0
            continue
        scale = max(float(reference.abs().max()), 1e-6)
        found[name] = float((value.to(reference.device) - reference).abs().max()) / scale
    return found


def difference(got: Values, wanted: Values, dtype: str = "float32") -> str | None:
    """What is wrong with results of a dtype, in a few words, or None when they agree with the
    reference, which is float32's."""
    if "y" not in got:
        return "no output"
    missing = [name for name in wanted if name.startswith("d") and name not in got]
    if missing:
        return f"no gradient {missing[0]}"
    for name, reference in wanted.items():
        if name in got and got[name].shape != reference.shape:
            came, expected = tuple(got[name].shape), tuple(reference.shape)
            return f"{name} has shape {came}, not {expected}"
    for name, error in errors(got, wanted).items():
        allowed = LOOSE.get(dtype) or TOLERANCE.get(name, TOLERANCE["gradient"])
        if not error <= allowed:  # a NaN must not pass
            return f"{name} is off by {error:.1e} of its largest value (allowed {allowed:.0e})"
    return None
