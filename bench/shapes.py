"""The grid, as data: every shape that is measured, and what it costs in operations and bytes.

Shapes are only ever added, so that results of different versions can be laid side by side.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

GATES = {"lstm": 4, "gru": 3, "rnn": 1, "indrnn": 1}
MODES = ("streaming", "inference", "forward", "training")
# bytes of a weight; int8: float32 layers with int8 weights; tfloat32: float32 layers whose products
# may round to TF32, on a GPU
WEIGHT_BYTES = {"float32": 4, "tfloat32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Shape:
    """One point of the grid: a cell, a mode and sizes (letters as in the library's errors).

    ``streaming`` is inference of T = 1 with the state passed in, ``forward`` the half of
    ``training`` that keeps what backward needs; ``packed`` is a PackedSequence with lengths spread
    evenly over [T/2, T].
    """

    cell: str
    mode: str
    T: int
    B: int
    H: int
    I: int = 0  # noqa: E741 (0 stands for H)
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    dtype: str = "float32"

    @property
    def input_size(self) -> int:
        return self.I or self.H

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def short(self) -> str:
        """The sizes alone, for tables and plots that name cell and mode elsewhere."""
        parts = [f"T{self.T}", f"B{self.B}"]
        if self.I:
            parts.append(f"I{self.I}")
        parts.append(f"H{self.H}")
        if self.layers > 1:
            parts.append(f"{self.layers}layers")
        if self.bidirectional:
            parts.append("bi")
        if self.packed:
            parts.append("packed")
        if self.dtype != "float32":
            parts.append(self.dtype)
        return " ".join(parts)

    @property
    def name(self) -> str:
        return "-".join([self.cell, self.mode, *self.short.split()])

    def columns(self) -> dict[str, Any]:
        """What a row of a result file says of the shape; table.shape_of reads it back."""
        return {
            "cell": self.cell,
            "mode": self.mode,
            "dtype": self.dtype,
            "T": self.T,
            "B": self.B,
            "I": self.input_size,
            "H": self.H,
            "layers": self.layers,
            "bidirectional": self.bidirectional,
            "packed": self.packed,
        }

    def lengths(self) -> list[int]:
        """Length of every sequence, longest first."""
        if not self.packed:
            return [self.T] * self.B
        first, span = (self.T + 1) // 2, self.T - (self.T + 1) // 2
        return [first + round(span * (self.B - 1 - b) / max(self.B - 1, 1)) for b in range(self.B)]

    def layer_inputs(self) -> list[int]:
        """Input size of each layer."""
        return [self.input_size] + [self.directions * self.H] * (self.layers - 1)

    def flops(self) -> float:
        """2*N*G*H*(I+H) a layer and direction (N valid steps; diagonal cells: I+1); training 3x."""
        steps = sum(self.lengths())
        recurrent = 1 if self.cell == "indrnn" else self.H
        columns = sum(size + recurrent for size in self.layer_inputs())
        forward = 2.0 * steps * GATES[self.cell] * self.H * columns * self.directions
        return forward * (3 if self.mode == "training" else 1)

    @property
    def _weight(self) -> int:
        return WEIGHT_BYTES[self.dtype]

    def weight_bytes(self) -> int:
        """Bytes of W_ih and W_hh of all layers and directions: the working set of one call."""
        recurrent = 1 if self.cell == "indrnn" else self.H
        columns = sum(size + recurrent for size in self.layer_inputs())
        return self._weight * GATES[self.cell] * self.H * columns * self.directions

    def recurrent_bytes(self) -> int:
        """Bytes of W_hh of one layer and direction: the working set of one step."""
        recurrent = 1 if self.cell == "indrnn" else self.H
        return self._weight * GATES[self.cell] * self.H * recurrent

    def read_bytes(self) -> float:
        """Bytes of weights that must be read: W_hh every step and W_ih once.

        Training reads them forward and backward, and writes the gradients once.
        """
        hh = self.recurrent_bytes() * self.layers * self.directions
        ih = self.weight_bytes() - hh
        forward = float(self.T * hh + ih)
        return 2 * forward + hh + ih if self.mode == "training" else forward


def _shapes(cells: str, mode: str, *sizes: tuple[int, ...], **more: object) -> list[Shape]:
    """Sizes are (T, B, H) or (T, B, H, I)."""
    make: Any = Shape
    return [make(cell, mode, *size, **more) for cell in cells.split() for size in sizes]


_GATED = "lstm gru"
_DENSE = "lstm gru rnn"

FULL: list[Shape] = [
    # one step at a time: speech, control, and everything else that can't wait
    *_shapes(_DENSE, "streaming", (1, 1, 64), (1, 1, 128), (1, 1, 256), (1, 1, 512), (1, 1, 1024)),
    *_shapes(_GATED, "streaming", (1, 8, 256), (1, 32, 512), (1, 128, 128)),
    # batch 1: bound by reading the weights
    *_shapes(_DENSE, "inference", (100, 1, 512), (2000, 1, 128)),
    *_shapes(_GATED, "inference", (200, 1, 32), (100, 1, 1024)),
    # small and middle batches, then the sizes where arithmetic is the limit
    *_shapes(_DENSE, "inference", (512, 8, 128), (50, 32, 256), (64, 96, 640, 400)),
    *_shapes(_GATED, "inference", (2000, 16, 64), (100, 64, 512), (20, 4, 512), (10, 128, 1024)),
    *_shapes(_GATED, "inference", (1000, 128, 32)),
    *_shapes(_DENSE, "inference", (100, 16, 256), bidirectional=True),
    *_shapes(_GATED, "inference", (100, 16, 256), layers=2),
    *_shapes("lstm", "inference", (50, 16, 256), layers=2, bidirectional=True),
    *_shapes(_DENSE, "inference", (100, 32, 256), packed=True),
    *_shapes("indrnn", "inference", (100, 1, 512), (50, 32, 256), (1000, 16, 128)),
    *_shapes(_DENSE, "training", (512, 8, 128), (1000, 16, 64), (50, 32, 256), (100, 64, 512)),
    *_shapes(_GATED, "training", (100, 1, 256), (64, 96, 640, 400), (2000, 2, 32)),
    *_shapes(_GATED, "training", (10, 128, 1024), (20, 128, 128)),
    *_shapes(_DENSE, "training", (100, 16, 256), bidirectional=True),
    *_shapes(_GATED, "training", (100, 16, 256), layers=2),
    *_shapes(_DENSE, "training", (100, 32, 256), packed=True),
    *_shapes("indrnn", "training", (50, 32, 256), (1000, 16, 128)),
    # fewer bits: half and a quarter of the bytes, and instructions of their own
    *_shapes(_GATED, "streaming", (1, 1, 512), dtype="bfloat16"),
    *_shapes(_GATED, "inference", (100, 1, 512), (50, 32, 256), (100, 64, 512), dtype="bfloat16"),
    *_shapes(_GATED, "streaming", (1, 1, 512), dtype="int8"),
    *_shapes(_GATED, "inference", (100, 1, 512), (100, 16, 256), (100, 64, 512), dtype="int8"),
]

README: list[Shape] = [
    *_shapes("lstm", "streaming", (1, 1, 128)),
    *_shapes(_GATED, "streaming", (1, 1, 512)),
    *_shapes("lstm", "inference", (100, 1, 512)),
    *_shapes(_DENSE, "inference", (50, 32, 256)),
    *_shapes("gru", "inference", (100, 16, 256), bidirectional=True),
    *_shapes("lstm", "inference", (100, 32, 256), packed=True),
    *_shapes(_GATED, "training", (100, 64, 512)),
    *_shapes("rnn", "training", (512, 8, 128)),
    *_shapes("gru", "training", (100, 32, 256), packed=True),
    *_shapes("indrnn", "training", (1000, 16, 128)),
]

SMOKE: list[Shape] = [
    *_shapes("lstm", "streaming", (1, 1, 64)),
    *_shapes(_DENSE, "inference", (20, 8, 64)),
    *_shapes("lstm", "inference", (20, 8, 64), packed=True),
    *_shapes(_GATED, "training", (20, 8, 64)),
    *_shapes("indrnn", "training", (20, 8, 64)),
    *_shapes("gru", "training", (20, 4, 48, 40), layers=2, bidirectional=True),
]

SETS: dict[str, list[Shape]] = {"smoke": SMOKE, "readme": README, "full": FULL}


def every() -> list[Shape]:
    """All shapes of all sets, each once."""
    return list(dict.fromkeys([*FULL, *README, *SMOKE]))


def select(words: list[str]) -> list[Shape]:
    """Shapes of the named sets, or whose names match the patterns; ValueError if none does."""
    chosen: list[Shape] = []
    for word in words:
        if word in SETS:
            found = SETS[word]
        else:
            found = [shape for shape in every() if fnmatch.fnmatch(shape.name, word)]
        if not found:
            raise ValueError(
                f"bench: no set or shape is called {word!r}; `python -m bench list` names them"
            )
        chosen += found
    return list(dict.fromkeys(chosen))
