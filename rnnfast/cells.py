"""The cells by name and number; the same ids as csrc/cells/list.h."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CELLS", "CellSpec", "cell_spec"]


@dataclass(frozen=True)
class CellSpec:
    """What the Python side has to know of a cell.

    Args:
        name: the cell's name, the one that :mod:`rnnfast.functional` uses
        id: the ``cell`` argument of the dispatcher's operators
        gates: number of gates ``G``; weights stack them in PyTorch's order
        states: number of states ``S`` carried from step to step; the first is ``h``
        saved: gate planes that the forward pass keeps for the backward pass
        diagonal: whether the recurrence is ``u * h`` (``w_hh`` of shape ``(G*H,)``)
        dense: whether the recurrence is ``w_hh @ h``; where it is neither, w_hh is empty, ``(0,)``,
            and a step sees the one before it only through the states
        split_gates: whether the gradients of a gate's input and hidden side differ
    """

    name: str
    id: int
    gates: int
    states: int
    saved: int
    diagonal: bool = False
    split_gates: bool = False
    dense: bool = True

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
)

_BY_NAME = {spec.name: spec for spec in CELLS}


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
    elif cell in _BY_NAME:
        return _BY_NAME[cell]
    raise RuntimeError(
        f"rnnfast: cell must be one of {', '.join(_BY_NAME)} or an id below {len(CELLS)}, "
        f"got {cell!r}"
    )
