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
        diagonal: whether the recurrence is ``u * h`` (``w_hh`` of shape ``(G*H,)``) and not
            ``w_hh @ h``
        split_gates: whether the gradients of a gate's input and hidden side differ
    """

    name: str
    id: int
    gates: int
    states: int
    saved: int
    diagonal: bool
    split_gates: bool = False


CELLS: tuple[CellSpec, ...] = (
    CellSpec("lstm", 0, gates=4, states=2, saved=4, diagonal=False),
    CellSpec("gru", 1, gates=3, states=1, saved=4, diagonal=False, split_gates=True),
    CellSpec("rnn_tanh", 2, gates=1, states=1, saved=0, diagonal=False),
    CellSpec("rnn_relu", 3, gates=1, states=1, saved=0, diagonal=False),
    CellSpec("indrnn_tanh", 4, gates=1, states=1, saved=0, diagonal=True),
    CellSpec("indrnn_relu", 5, gates=1, states=1, saved=0, diagonal=True),
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
