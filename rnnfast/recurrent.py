"""A layer of any Python cell: a loop over the steps, in torch's own autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import _lengths, _nested, _reset, _unroll
from ._checks import check_batch_sizes, check_dense, has_values
from ._modes import is_vmapped
from ._rows import places
from ._unroll import fail as _fail

__all__ = ["Recurrent"]

#: A module; one for each layer and direction; or what makes one of their numbers.
Cells = nn.Module | Iterable[nn.Module] | Callable[[int, int], nn.Module]


class _PackedRows(_lengths.Rows):
    """Where the rows of a PackedSequence lie in its batch's own order."""

    def __init__(self, packed: PackedSequence) -> None:
        sizes, device = packed.batch_sizes, packed.data.device
        check_batch_sizes(sizes, packed.data.size(0))
        self.batch_sizes, self.count = sizes, packed.data.size(0)
        step, column = places(sizes, self.count)
        column = column.to(device)
        if packed.sorted_indices is not None:
            column = packed.sorted_indices[column]
        self.shape = (sizes.size(0), int(sizes[0]))
        self.at = (step.to(device), column)
        self.sorted, self.unsorted = packed.sorted_indices, packed.unsorted_indices


class _Call(NamedTuple):
    """A call in the one form that the loop takes: leaves (T, B, ...)."""

    input: Any
    valid: Tensor | None  # (T, B), None: all
    reset: Tensor | None  # (T, B)
    rows: _PackedRows | None
    batched: bool


def _mask(name: str, mask: Any, letters: str, sizes: tuple[int, ...], x: Tensor) -> Tensor:
    wanted = f"{name} must be a bool tensor on {x.device} of shape {letters} = {sizes}"
    if not isinstance(mask, Tensor):
        _fail(wanted, type(mask).__name__)
    if mask.dtype != torch.bool or mask.shape != sizes or mask.device != x.device:
        _fail(wanted, f"{tuple(mask.shape)} of {mask.dtype} on {mask.device}")
    return mask


def _valid_steps(lengths: Any, steps: int, batch: int, device: torch.device) -> Tensor | None:
    """The mask (T, B) of lengths; None where Python can see that it is all true."""
    if not isinstance(lengths, Tensor):
        _fail(
            f"lengths must be an integer tensor of shape (B,) = ({batch},)", type(lengths).__name__
        )
    check_dense(lengths, "lengths")
    _lengths._check_form(lengths, batch)
    if has_values(lengths):
        if bool((_lengths._read(lengths, steps) == steps).all()):
            return None
    elif not is_vmapped(lengths):
        lengths = _lengths._checked(lengths, steps)
    return _lengths._valid(lengths, steps).to(device)


class Recurrent(nn.Module):
    r"""A layer of your own cell: any module that computes one step.

    .. math::
        y_t, s_t = \text{cell}(x_t, s_{t-1})

    The loop over the steps, layers and directions, packed and padded batches, resets and initial
    states are here; the step is the cell's. Input, output and state may be nested: tuples, lists,
    dicts, named tuples and dataclasses of tensors. It is plain autograd, a call of the cell for
    each step, and as slow as that: for trying an idea out. ``docs/own_cell.md`` has an example.

    A cell is called as ``cell(input, state)`` and returns ``(output, state)``, the state like the
    one it got. A sequence begins with ``cell.initial_state(input)``, ``input`` being that of one
    step, or with ``hx``. Cells of torch.nn and rnnfast (``LSTMCell``, ``GRUCell``, ``RNNCell`` and
    their subclasses) need no such method, begin with zeros and return the state only. The state
    that a sequence begins with is computed once a call and direction, for all sequences and resets:
    it may depend on weights, and on the sizes, dtype and device of ``input``, not on its values.

    Args:
        cell: the module of one layer and one direction; for several a function of ``layer`` and
            ``direction`` (0 or 1) that makes one, called in order, or a list of :math:`D \cdot L`
            of them, layer by layer
        num_layers: number of layers :math:`L`, each fed by the output of the one before
        bidirectional: two directions (:math:`D = 2`), outputs concatenated in the last dimension
        batch_first: input and output are :math:`(B, T, *)`; states stay as they are
        dropout: probability of an element of an output being zeroed between layers in training
        return_last: the output is that of each sequence's last step only, :math:`(B, *)`; the
            second direction's last step is the sequence's first
        stack_states: states of all layers and directions are one, with a leading dimension of
            :math:`D \cdot L`; otherwise a list of :math:`D \cdot L`, for cells whose states differ
        feature_dims: dimensions of an input behind T and B, so that one of fewer dimensions is
            known to be unbatched. ``None``: 1 for cells of torch.nn and rnnfast; others are
            always batched

    Inputs: input, hx, reset, lengths, mask
        As the layers', and ``mask``, true at valid steps, for padding wherever it stands: the state
        goes past the others unchanged, and the output is zero there.

    Shape:
        - input: each tensor :math:`(T, B, *)`, :math:`(B, T, *)` if ``batch_first``,
          :math:`(T, *)` if unbatched, or a :class:`~torch.nn.utils.rnn.PackedSequence`
        - hx, state: each tensor :math:`(D \cdot L, B, *)`, without B if unbatched; with
          ``stack_states=False`` a list of :math:`D \cdot L`, each tensor :math:`(B, *)`
        - reset, mask: bool, :math:`(T, B)`, :math:`(B, T)` if ``batch_first``, :math:`(T)` if
          unbatched; reset may be packed like the input
        - lengths: integers, :math:`(B)`, valid steps of the rows of padded input
        - output: each tensor in the form of input

    Outputs: output, state

    Attributes:
        cells: the modules, a :class:`torch.nn.ModuleList` of :math:`D \cdot L`, layer by layer

    Raises:
        TypeError: ``cell`` is no module and makes none
        ValueError: another number of cells, one module twice, a probability outside [0, 1)
        RuntimeError: an input, a state or what a cell returns does not fit, with its place

    Example::

        >>> class MGU(torch.nn.Module):                        # arXiv:1603.09420
        ...     def __init__(self, inputs, units):
        ...         super().__init__()
        ...         self.units = units
        ...         self.f = torch.nn.Linear(inputs + units, units)
        ...         self.n = torch.nn.Linear(inputs + units, units)
        ...     def initial_state(self, x):                    # x (B, I)
        ...         return x.new_zeros(x.size(0), self.units)
        ...     def forward(self, x, h):
        ...         f = torch.sigmoid(self.f(torch.cat([x, h], -1)))
        ...         n = torch.tanh(self.n(torch.cat([x, f * h], -1)))
        ...         h = (1 - f) * h + f * n
        ...         return h, h
        >>> layer = rnnfast.Recurrent(
        ...     lambda layer, direction: MGU(40 if layer else 10, 20), 2, bidirectional=True
        ... )
        >>> output, state = layer(torch.randn(5, 3, 10), lengths=torch.tensor([2, 5, 1]))
        >>> output.shape, state.shape
        (torch.Size([5, 3, 40]), torch.Size([4, 3, 20]))
    """

    def __init__(
        self,
        cell: Cells,
        num_layers: int = 1,
        *,
        bidirectional: bool = False,
        batch_first: bool = False,
        dropout: float = 0.0,
        return_last: bool = False,
        stack_states: bool = True,
        feature_dims: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_layers", num_layers, 1),
            ("feature_dims", feature_dims, 0),
        ):
            if name == "feature_dims" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"rnnfast: {name} of Recurrent must be an int >= {least}, got {value!r}"
                )
        if (
            isinstance(dropout, bool)
            or not isinstance(dropout, (int, float))
            or not 0 <= dropout < 1
        ):
            raise ValueError(f"rnnfast: dropout of Recurrent must lie in [0, 1), got {dropout!r}")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "rnnfast: dropout of Recurrent lies between layers, and there is one layer only: "
                f"dropout={dropout} does nothing",
                stacklevel=2,
            )
        self.num_layers = num_layers
        self.bidirectional = bidirectional
        self.batch_first = batch_first
        self.dropout = dropout
        self.return_last = return_last
        self.stack_states = stack_states
        self.cells = nn.ModuleList(_unroll.made(cell, num_layers, 2 if bidirectional else 1))
        if feature_dims is None and isinstance(self.cells[0], _unroll.OURS):
            feature_dims = 1
        self.feature_dims = feature_dims

    if TYPE_CHECKING:  # a module's calls give Any

        def __call__(
            self,
            input: Any,
            hx: Any = None,
            reset: Any = None,
            lengths: Any = None,
            mask: Any = None,
        ) -> tuple[Any, Any]: ...

    def forward(
        self, input: Any, hx: Any = None, reset: Any = None, lengths: Any = None, mask: Any = None
    ) -> tuple[Any, Any]:
        """Run the layer.

        Args:
            input: the sequence, nested or not, or a :class:`torch.nn.utils.rnn.PackedSequence`
            hx: initial state; ``None`` for the cell's own
            reset: bool, true at the first step of each new sequence: the cell's initial state
                enters that step in place of the state before it (or of ``hx``). The second
                direction is cut between the same two steps
            lengths: number of valid steps of each row of padded input
            mask: bool, true at valid steps, with holes where you like; in place of ``lengths``. A
                reset at a masked step holds for the next valid one

        Shape: as in the class.

        Raises:
            RuntimeError: what does not fit, with its place

        Example::

            >>> layer = rnnfast.Recurrent(rnnfast.LSTMCell(10, 20))
            >>> mask = torch.rand(5, 3) < 0.8                      # (T, B)
            >>> output, (h, c) = layer(torch.randn(5, 3, 10), mask=mask)
        """
        call = self._enter(input, reset, lengths, mask)
        output, state = self._run(call, hx, self.return_last)
        return self._leave(call, output, input), state

    def step(self, input: Any, state: Any = None, reset: Any = None) -> tuple[Any, Any]:
        r"""Run one step, for streams whose next input is not known yet.

        The same as :meth:`forward` on a sequence of one step. Hooks of the layer do not run.

        Args:
            input: features of this step
            state: as the call before returned it; ``None`` for the cell's own
            reset: bool, true where a new sequence begins with this step

        Shape:
            - input, output: each tensor :math:`(B, *)`, or :math:`(*)` if unbatched
            - state: as ``hx`` of :meth:`forward`
            - reset: :math:`(B)`, or a bool for unbatched input

        Returns:
            ``(output, state)``

        Raises:
            RuntimeError: a bidirectional layer; what does not fit

        Example::

            >>> layer, state = rnnfast.Recurrent(rnnfast.GRUCell(10, 20)), None
            >>> for x in stream:                                   # each (B, 10)
            ...     y, state = layer.step(x, state)
        """
        if self.bidirectional:
            raise RuntimeError(
                "rnnfast: step needs a layer of one direction, got bidirectional=True: the second "
                "direction begins at the end of the sequence, and a stream has none"
            )
        leaves = _nested.leaves(input, "input", _fail)
        if reset is not None:
            reset = torch.as_tensor(reset, device=leaves[0].device if leaves else None).unsqueeze(0)
        sequence = _nested.rebuild(input, [leaf.unsqueeze(0) for leaf in leaves])
        call = self._enter(sequence, reset, None, None, batch_first=False)
        output, state = self._run(call, state, True)
        return self._unbatched(output, call, 0), state

    def extra_repr(self) -> str:
        """What differs from a default."""
        usual = {"num_layers": 1, "dropout": 0.0, "stack_states": True}
        names = [
            "num_layers",
            "bidirectional",
            "batch_first",
            "dropout",
            "return_last",
            "stack_states",
        ]
        found = {name: getattr(self, name) for name in names}
        return ", ".join(f"{n}={v}" for n, v in found.items() if v != usual.get(n, False))

    # ------------------------------------------------------------------- from and to a user's form

    def _enter(
        self, input: Any, reset: Any, lengths: Any, mask: Any, batch_first: bool | None = None
    ) -> _Call:
        batch_first = self.batch_first if batch_first is None else batch_first
        if lengths is not None and mask is not None:
            _fail("lengths or mask say which steps are valid", "both")
        if isinstance(input, PackedSequence):
            if lengths is not None or mask is not None:
                which = "mask" if lengths is None else "lengths"
                _fail(f"{which} is for padded input", "a PackedSequence, which has its own lengths")
            if torch.compiler.is_compiling():  # how many rows there are is no shape
                _fail("a graph takes padded input with lengths", "a PackedSequence")
            rows = _PackedRows(input)
            if reset is not None:
                reset = rows.pad(_reset.of_packed(reset, input, input.data))
            every = torch.ones(rows.count, dtype=torch.bool, device=input.data.device)
            return _Call(_lengths.pad(input.data, rows), rows.pad(every), reset, rows, True)

        leaves = _nested.leaves(input, "input", _fail)
        if not leaves:
            _fail("input must hold a tensor", _nested.text(input))
        at = _nested.paths(input, "input")
        batched = self._is_batched(leaves, at)
        if not batched:
            if lengths is not None:
                _fail("lengths are for batched input", f"{leaves[0].dim()} dimensions")
            leaves = [leaf.unsqueeze(1) for leaf in leaves]
        elif batch_first:
            leaves = [leaf.transpose(0, 1) for leaf in leaves]
        steps, batch = leaves[0].shape[:2]
        for leaf, path in zip(leaves, at):
            if leaf.shape[:2] != (steps, batch):
                turn = -1 if batched and batch_first else 1
                order = "(B, T)" if turn < 0 else "(T, B)"
                like, found = (list(i.shape[:2])[::turn] for i in (leaves[0], leaf))
                _fail(
                    f"{path} must begin with {order} = {tuple(like)} like {at[0]}",
                    f"{tuple(found)}",
                )
        if steps < 1:
            _fail("input must hold at least one step (T >= 1)", "T = 0")

        letters = "(T, B)"
        sizes: tuple[int, ...] = (steps, batch)
        if not batched:
            letters, sizes = "(T,)", (steps,)
        elif batch_first:
            letters, sizes = "(B, T)", (batch, steps)
        masks: list[Any] = []
        for name, given in (("reset", reset), ("mask", mask)):
            if given is None:
                masks.append(None)
                continue
            checked = _mask(name, given, letters, sizes, leaves[0])
            turned = checked.t() if batched and batch_first else checked
            masks.append(turned if batched else turned.unsqueeze(1))
        valid: Tensor | None = masks[1]
        if lengths is not None:
            valid = _valid_steps(lengths, steps, batch, leaves[0].device)
        return _Call(_nested.rebuild(input, leaves), valid, masks[0], None, batched)

    def _is_batched(self, leaves: list[Tensor], at: list[str]) -> bool:
        features = self.feature_dims
        for leaf, path in zip(leaves, at):
            check_dense(leaf, path)
            if features is None:
                if leaf.dim() < 2:
                    _fail(f"{path} must be (T, B, *)", f"shape {tuple(leaf.shape)}")
            elif leaf.dim() not in (features + 1, features + 2) or leaf.dim() != leaves[0].dim():
                _fail(
                    f"{path} must have {features + 2} dimensions, {features + 1} if unbatched, "
                    "like all inputs",
                    f"shape {tuple(leaf.shape)}",
                )
        return features is None or leaves[0].dim() == features + 2

    def _leave(self, call: _Call, output: Any, input: Any) -> Any:
        if self.return_last:
            return self._unbatched(output, call, 0)
        if not call.batched:
            return self._unbatched(output, call, 1)
        leaves: list[Any] = list(_nested.leaves(output, "output", _fail))
        if call.rows is not None:
            form = (input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            leaves = [PackedSequence(_lengths.pack(leaf, call.rows), *form) for leaf in leaves]
        elif self.batch_first:
            leaves = [leaf.transpose(0, 1) for leaf in leaves]
        return _nested.rebuild(output, leaves)

    @staticmethod
    def _unbatched(tree: Any, call: _Call, dim: int) -> Any:
        if call.batched:
            return tree
        leaves = _nested.leaves(tree, "output", _fail)
        return _nested.rebuild(tree, [leaf.squeeze(dim) for leaf in leaves])

    def _split(self, hx: Any, batched: bool) -> list[Any]:
        """The initial state of each cell."""
        count = len(self.cells)
        if hx is None:
            return [None] * count
        if not self.stack_states:
            if not isinstance(hx, (list, tuple)) or len(hx) != count:
                _fail(f"hx must be a list of D*L = {count} states", _nested.text(hx))
            each = list(hx)
        else:
            leaves = _nested.leaves(hx, "hx", _fail)
            for leaf, path in zip(leaves, _nested.paths(hx, "hx")):
                if leaf.dim() < (2 if batched else 1) or leaf.size(0) != count:
                    letters = "(D*L, B, *)" if batched else "(D*L, *)"
                    _fail(f"{path} must be {letters} with D*L = {count}", f"{tuple(leaf.shape)}")
            states = [leaf.unbind(0) for leaf in leaves]
            each = [_nested.rebuild(hx, [s[k] for s in states]) for k in range(count)]
        if not batched:
            flat = [_nested.leaves(s, "hx", _fail) for s in each]
            each = [_nested.rebuild(s, [i.unsqueeze(0) for i in f]) for s, f in zip(each, flat)]
        return each

    def _join(self, states: list[Any], batched: bool) -> Any:
        flat = [_nested.leaves(s, "state", _fail) for s in states]
        if not batched:
            flat = [[leaf.squeeze(0) for leaf in leaves] for leaves in flat]
        each = [_nested.rebuild(s, leaves) for s, leaves in zip(states, flat)]
        if not self.stack_states:
            return each

        def differ(expected: str, found: str) -> NoReturn:
            raise RuntimeError(
                f"rnnfast: Recurrent: {expected} like that of cells.0, got {found}; "
                "Recurrent(..., stack_states=False) returns a list of states that differ"
            )

        like = each[0]
        for k, state in enumerate(each):
            flat[k] = _nested.leaves_as(state, like, f"state of cells.{k}", differ)
            for i, (leaf, first) in enumerate(zip(flat[k], flat[0])):
                if leaf.shape != first.shape or leaf.dtype != first.dtype:
                    at = _nested.paths(like, f"state of cells.{k}")[i]
                    differ(
                        f"{at} must have shape {tuple(first.shape)} of {first.dtype}",
                        f"{tuple(leaf.shape)} of {leaf.dtype}",
                    )
        return _nested.rebuild(like, [torch.stack(leaves) for leaves in zip(*flat)])

    def _run(self, call: _Call, hx: Any, last: bool) -> tuple[Any, Any]:
        x = call.input
        given = self._split(hx, call.batched)
        states: list[Any] = []
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            top = layer == self.num_layers - 1
            outputs = []
            for reverse in range(directions):
                k = layer * directions + reverse
                output, state = _unroll.direction(
                    _unroll.Cell(self.cells[k], k), x, given[k], call.valid, call.reset,
                    bool(reverse), last and top,
                )  # fmt: skip
                outputs.append(output)
                states.append(state)
            x = outputs[0]
            if self.bidirectional:
                x = _unroll.concatenated(outputs[0], outputs[1], 1 if last and top else 2)
            if self.dropout > 0 and self.training and not top:
                leaves = _nested.leaves(x, "output", _fail)
                dropped = [
                    nn.functional.dropout(i, self.dropout) if i.is_floating_point() else i
                    for i in leaves
                ]
                x = _nested.rebuild(x, dropped)
        return x, self._join(states, call.batched)
