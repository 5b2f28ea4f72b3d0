"""The cells by name and number; the same ids as csrc/cells/list.h, the same codes as
csrc/core/cell_code.h."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["ACTIVATIONS", "CELLS", "CellSpec", "cell_spec", "chosen_cell", "zoneout_cell"]

#: The activations that a layer may choose, by the names of :mod:`torch.nn.functional`; csrc numbers
#: them from 1 on.
ACTIVATIONS = (
    "sigmoid", "tanh", "relu", "hard_sigmoid", "hard_tanh", "softsign", "elu", "selu", "gelu",
    "silu", "softplus", "leaky_relu", "linear",
)  # fmt: skip


#: The low byte of the codes of cells that rnnfast.load_cell made.
OWN_CELL = 0xFF


@dataclass(frozen=True)
class CellSpec:
    """What the Python side has to know of a cell.

    Args:
        name: the cell's name, the one that :mod:`rnnfast.functional` uses
        id: the ``cell`` argument of the dispatcher's operators: a number of csrc/cells/list.h, and
            in higher bits what was chosen
        gates: number of gates ``G``; weights stack them in PyTorch's order
        states: number of states ``S`` carried from step to step; the first is ``h``
        saved: gate planes that the forward pass keeps for the backward pass
        diagonal: whether the recurrence is ``u * h`` (``w_hh`` of shape ``(G*H,)``)
        dense: whether the recurrence is ``w_hh @ h``; where it is neither, w_hh is empty, ``(0,)``,
            and a step sees the one before it only through the states
        split_gates: whether the gradients of a gate's input and hidden side differ
        parameters: numbers ``K`` that each unit has besides weights and biases; they stand behind
            the bias in ``b_hh``, of shape ``((G+K)*H,)``
        options: whether a call may choose activations
        stages: whether a step is more than a product and a pointwise function
        norms: whether the gates are normalised
        activation, gate_activation: those of the state and of the gates
        clip: bound of the LSTM's ``c``, 0 for none
        keeps: whether a part of the states may stay as it was (``name`` then ends with
            ``_zoneout``)
        heads: number of blocks on the diagonal of W_hh, each a call of its own for the operators
    """

    name: str
    id: int
    gates: int
    states: int
    saved: int
    diagonal: bool = False
    split_gates: bool = False
    dense: bool = True
    parameters: int = 0
    options: bool = False
    stages: bool = False
    norms: bool = False
    activation: str = "tanh"
    gate_activation: str = "sigmoid"
    clip: float = 0.0
    keeps: bool = False
    heads: int = 1

    @property
    def planes(self) -> int:
        """What the engine keeps of a step for backward, y aside."""
        return self.saved + self.states - 1

    @property
    def is_own(self) -> bool:
        """Whether rnnfast.load_cell made it."""
        return self.id & 0xFF == OWN_CELL

    @property
    def has_hidden_side(self) -> bool:
        """Whether h enters the gates; else w_hh is empty, and b_hh may be."""
        return self.dense or self.diagonal


CELLS: tuple[CellSpec, ...] = (
    CellSpec("lstm", 0, gates=4, states=2, saved=4),
    CellSpec("gru", 1, gates=3, states=1, saved=4, split_gates=True),
    CellSpec("rnn_tanh", 2, gates=1, states=1, saved=0),
    CellSpec("rnn_relu", 3, gates=1, states=1, saved=0),
    CellSpec("indrnn_tanh", 4, gates=1, states=1, saved=0, diagonal=True, dense=False),
    CellSpec("indrnn_relu", 5, gates=1, states=1, saved=0, diagonal=True, dense=False),
    CellSpec("min_gru", 6, gates=2, states=1, saved=2, dense=False),
    CellSpec("min_gru_linear", 7, gates=2, states=1, saved=2, dense=False),
    CellSpec("min_lstm", 8, gates=3, states=1, saved=5, dense=False),
    CellSpec("min_lstm_linear", 9, gates=3, states=1, saved=5, dense=False),
    CellSpec("qrnn_f", 10, gates=2, states=1, saved=2, dense=False),
    CellSpec("qrnn_fo", 11, gates=3, states=2, saved=3, dense=False),
    CellSpec("qrnn_ifo", 12, gates=4, states=2, saved=4, dense=False),
    CellSpec("lstm_any", 13, gates=4, states=2, saved=4, options=True),
    CellSpec("gru_any", 14, gates=3, states=1, saved=4, split_gates=True, options=True),
    CellSpec("rnn_any", 15, gates=1, states=1, saved=1, options=True),
    CellSpec(
        "indrnn_any", 16, gates=1, states=1, saved=1, diagonal=True, dense=False, options=True
    ),
    CellSpec("peephole_lstm", 17, gates=4, states=2, saved=4, parameters=3, options=True),
    CellSpec("sru", 18, gates=4, states=2, saved=4, parameters=2, dense=False),
    CellSpec("coupled_lstm", 19, gates=3, states=2, saved=3, options=True),
    CellSpec("gru_before", 20, gates=3, states=1, saved=3, options=True, stages=True),
    CellSpec(
        "lstm_norm",
        21,
        gates=4,
        states=2,
        saved=12,
        parameters=10,
        split_gates=True,
        options=True,
        stages=True,
        norms=True,
    ),
    CellSpec(
        "gru_norm",
        22,
        gates=3,
        states=1,
        saved=10,
        parameters=6,
        split_gates=True,
        options=True,
        stages=True,
        norms=True,
    ),
    CellSpec(
        "rnn_norm",
        23,
        gates=1,
        states=1,
        saved=3,
        parameters=2,
        split_gates=True,
        options=True,
        stages=True,
        norms=True,
    ),
    CellSpec(
        "indrnn_norm",
        24,
        gates=1,
        states=1,
        saved=2,
        parameters=1,
        diagonal=True,
        dense=False,
        split_gates=True,
        options=True,
        stages=True,
        norms=True,
    ),
    CellSpec("lstm_zoneout", 25, gates=4, states=2, saved=5, options=True, keeps=True),
    CellSpec(
        "gru_zoneout", 26, gates=3, states=1, saved=4, split_gates=True, options=True, keeps=True
    ),
    CellSpec("rnn_zoneout", 27, gates=1, states=1, saved=1, options=True, keeps=True),
    CellSpec("slstm", 28, gates=4, states=4, saved=5),
    CellSpec("slstm_exp", 29, gates=4, states=4, saved=4),
)

_BY_NAME = {spec.name: spec for spec in CELLS}
#: Those that load_cell added to this process, by their codes.
own_cells: dict[int, CellSpec] = {}
#: The codes of those that it compiled for CUDA, too.
own_on_cuda: set[int] = set()


def cell_spec(cell: str | int | CellSpec) -> CellSpec:
    """Return the :class:`CellSpec` of a name or id.

    Raises:
        RuntimeError: if there is no such cell

    Example::

        >>> cell_spec("gru").gates
        3
    """
    if isinstance(cell, CellSpec):
        return cell
    if isinstance(cell, int):
        if 0 <= cell < len(CELLS):
            return CELLS[cell]
        if cell in own_cells:
            return own_cells[cell]
        if cell > 0 and cell & 0xFF == OWN_CELL:
            raise RuntimeError(
                f"rnnfast: cell {cell} is one of rnnfast.load_cell that this process has not "
                "loaded; call load_cell with its header first"
            )
        if 0 <= cell & 0xFF < len(CELLS) and CELLS[cell & 0xFF].options:
            return _of_code(cell)
    elif cell in _BY_NAME:
        return _BY_NAME[cell]
    raise RuntimeError(
        f"rnnfast: cell must be one of {', '.join(_BY_NAME)} or an id below {len(CELLS)}, "
        f"got {cell!r}"
    )


@functools.lru_cache(maxsize=256)
def _of_code(code: int) -> CellSpec:
    spec = CELLS[code & 0xFF]
    gate, state = code >> 8 & 0xFF, code >> 16 & 0xFF
    has_not = (gate and spec.gates == 1) or (code >> 32 and spec.states == 1)
    if max(gate, state) > len(ACTIVATIONS) or code >> 24 & 0xFF or has_not:
        raise RuntimeError(f"rnnfast: cell has options that there are not, got {code}")
    return replace(
        spec,
        id=code,
        activation=ACTIVATIONS[state - 1] if state else spec.activation,
        gate_activation=ACTIVATIONS[gate - 1] if gate else spec.gate_activation,
        clip=struct.unpack("<f", struct.pack("<I", code >> 32 & 0xFFFFFFFF))[0],
    )


def _number(who: str, name: str, activation: Any) -> int:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"rnnfast: {name} of {who} must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    return ACTIVATIONS.index(activation) + 1


def chosen_cell(
    who: str,
    kind: str,
    activation: Any,
    gate_activation: Any = "sigmoid",
    cell_clip: Any = None,
) -> CellSpec:
    """The cell of a layer with these activations: one with fixed ones, where there is one.

    Args:
        who: the layer's name, for errors
        kind: ``lstm``, ``coupled_lstm``, ``peephole_lstm``, ``gru``, ``gru_before``, ``rnn``,
            ``indrnn``, or one of the usual ones with ``_norm``
        activation, gate_activation: names of :data:`ACTIVATIONS`
        cell_clip: bound of the LSTM's ``c``, or ``None``

    Raises:
        ValueError: an activation that there is not, a bound that is no number above 0

    Example::

        >>> chosen_cell("LSTM", "lstm", "relu").activation
        'relu'
    """
    gate = _number(who, "gate_activation", gate_activation)
    code = _number(who, "activation", activation) << 16
    if not kind.startswith(("rnn", "indrnn")):
        code |= gate << 8
    if cell_clip is not None:
        is_number = isinstance(cell_clip, (int, float)) and not isinstance(cell_clip, bool)
        # rounded to float32, in which the engines have it
        if not is_number or not 1e-30 <= cell_clip < 3e38:
            raise ValueError(
                f"rnnfast: cell_clip of {who} must be a number above 0 or None, got {cell_clip!r}"
            )
        code |= struct.unpack("<I", struct.pack("<f", cell_clip))[0] << 32
    fixed = f"{kind}_{activation}" if kind.endswith("rnn") else kind
    if fixed in _BY_NAME and kind.endswith("rnn"):
        return _BY_NAME[fixed]
    if (activation, gate_activation, cell_clip) == ("tanh", "sigmoid", None):
        return _BY_NAME[fixed]
    any_of = f"{kind}_any"
    return _of_code(_BY_NAME[any_of if any_of in _BY_NAME else kind].id | code)


def may_zone_out(spec: CellSpec) -> bool:
    """Whether zoneout_cell has a form of it."""
    names = ("lstm", "lstm_any", "gru", "gru_any", "rnn_tanh", "rnn_relu", "rnn_any")
    return spec.keeps or spec.name in names


def zoneout_cell(spec: CellSpec) -> CellSpec:
    """The same cell, of whose states a part may stay as it was.

    Args:
        spec: an LSTM's, a GRU's or an RNN's cell

    Raises:
        RuntimeError: a cell that has no form with zoneout

    Example::

        >>> zoneout_cell(cell_spec("rnn_relu")).activation
        'relu'
    """
    if spec.keeps:
        return spec
    if not may_zone_out(spec):
        raise RuntimeError(
            f"rnnfast: zoneout is for the cells of LSTM, GRU and RNN, got cell {spec.name}"
        )
    kind, options = _BY_NAME[spec.name.partition("_")[0] + "_zoneout"], spec.id & ~0xFF
    activation = spec.activation
    if spec.name == "rnn_relu":
        activation = "relu"
        options = _number("RNN", "activation", activation) << 16
    return replace(
        kind,
        id=kind.id | options,
        activation=activation,
        gate_activation=spec.gate_activation,
        clip=spec.clip,
        heads=spec.heads,
    )
