"""One problem: weights, input and gradients that every peer gets, and the check of results."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .shapes import GATES, Shape

Results = dict[str, np.ndarray]

# float32 sums of up to T*B*(I+H) terms in another order: relative to the largest value of a tensor
TOLERANCE = {"y": 1e-4, "h_n": 1e-4, "c_n": 1e-4, "gradient": 1e-3}
# the same with fewer bits, against float32: weights and rows are rounded, everybody's in their way
LOOSE = {"bfloat16": 0.04, "float16": 0.01, "int8": 0.1}


@dataclass
class Problem:
    """Data of one shape in torch's layout and names; the same for every peer (fixed seed)."""

    shape: Shape
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        s = self.shape
        generator = torch.Generator().manual_seed(1234)

        def uniform(*size: int) -> torch.Tensor:
            bound = 1 / math.sqrt(s.H)
            return torch.empty(size).uniform_(-bound, bound, generator=generator)

        rows = GATES[s.cell] * s.H
        for layer, columns in enumerate(s.layer_inputs()):
            for suffix in ("", "_reverse")[: s.directions]:
                tail = f"l{layer}{suffix}"
                self.weights[f"weight_ih_{tail}"] = uniform(rows, columns)
                recurrent = (s.H,) if s.cell == "indrnn" else (rows, s.H)
                self.weights[f"weight_hh_{tail}"] = uniform(*recurrent)
                self.weights[f"bias_ih_{tail}"] = uniform(rows)
                self.weights[f"bias_hh_{tail}"] = uniform(rows)

        self.lengths = torch.tensor(s.lengths())
        self.mask = (
            torch.arange(s.T)[:, None] < self.lengths[None, :]
        )  # (T, B), True on valid steps
        self.x = torch.randn(s.T, s.B, s.input_size, generator=generator) * self.mask[..., None]
        width = s.directions * s.H
        self.dy = torch.randn(s.T, s.B, width, generator=generator) * self.mask[..., None]
        states = s.layers * s.directions, s.B, s.H
        self.h0 = torch.randn(states, generator=generator) * 0.5
        self.c0 = torch.randn(states, generator=generator) * 0.5

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


def difference(got: Results, wanted: Results, dtype: str = "float32") -> str | None:
    """What is wrong with results of a dtype, in a few words, or None when they agree with the
    reference, which is float32's."""
    if "y" not in got:
        return "no output"
    missing = [name for name in wanted if name.startswith("d") and name not in got]
    if missing:
        return f"no gradient {missing[0]}"
    for name, reference in wanted.items():
        if name not in got:
            continue
        if got[name].shape != reference.shape:
            return f"{name} has shape {got[name].shape}, not {reference.shape}"
        scale = max(float(np.abs(reference).max(initial=0.0)), 1e-6)
        error = float(np.abs(got[name] - reference).max(initial=0.0)) / scale
        allowed = LOOSE.get(dtype) or TOLERANCE.get(name, TOLERANCE["gradient"])
        if not error <= allowed:  # a NaN must not pass
            return f"{name} is off by {error:.1e} of its largest value (allowed {allowed:.0e})"
    return None
