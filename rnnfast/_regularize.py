"""What the layers may do around their cells: dropped recurrent weights, one mask a sequence on
input or h, states that stay as they were, residual connections, the last step alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _masks, _rows
from ._masked import Masks
from .cells import CellSpec, zoneout_cell


class Options(NamedTuple):
    """Of one call: probabilities are zero outside of training."""

    weight_dropout: float = 0.0
    input_dropout: float = 0.0
    residual: bool = False
    return_last: bool = False
    recurrent_dropout: float = 0.0
    zoneout: Any = 0.0  # once checked (p_h, p_c), or 0.0
    draws: bool = False  # whether zoneout is drawn, else expected


PLAIN = Options()
NAMES = Options._fields[:-1]


def _is_probability(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value < 1


def _pair(name: str, zoneout: Any, states: int) -> tuple[float, float] | float:
    pair = zoneout if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
    if pair is zoneout and states == 1:
        raise ValueError(
            f"rnnfast: zoneout of {name} must be a number in [0, 1), since its only state is h, "
            f"got {zoneout!r}"
        )
    if len(pair) != 2 or not all(map(_is_probability, pair)):
        wanted = "a number in [0, 1)" + (", or a pair of them for h and c" if states > 1 else "")
        raise ValueError(f"rnnfast: zoneout of {name} must be {wanted}, got {zoneout!r}")
    return (float(pair[0]), float(pair[1])) if any(pair) else 0.0


def check(name: str, options: Options, states: int = 1) -> Options:
    """The options themselves, or an error. states: of the cell."""
    for option, value in zip(NAMES, options):
        if option == "zoneout":
            options = options._replace(zoneout=_pair(name, value, states))
        elif isinstance(getattr(PLAIN, option), bool):
            if value is not True and value is not False:
                raise TypeError(
                    f"rnnfast: {option} of {name} must be a bool, got {type(value).__name__}"
                )
        elif not _is_probability(value):
            raise ValueError(
                f"rnnfast: {option} of {name} must be a number in [0, 1), got {value!r}"
            )
    return options


def _now(options: Options, training: bool) -> Options | None:
    if not training:
        options = options._replace(weight_dropout=0.0, input_dropout=0.0, recurrent_dropout=0.0)
    elif options.zoneout:
        options = options._replace(draws=True)
    return options if any(options) else None


def of_module(name: str, module: Any, states: int) -> Options | None:
    """The options of a call of a layer now, None for none: they are attributes, which may be set at
    any time. states: of its cell."""
    own = module.__dict__
    if not (
        "weight_dropout" in own
        or "input_dropout" in own
        or "residual" in own
        or "return_last" in own
        or "recurrent_dropout" in own
        or "zoneout" in own
    ):  # and not by value: a compiler of dynamic sizes begins anew where it meets a float
        return None
    found = Options(
        module.weight_dropout, module.input_dropout, module.residual, module.return_last,
        module.recurrent_dropout, module.zoneout,
    )  # fmt: skip
    return _now(check(name, found, states), module.training)


def of_step(name: str, module: Any, states: int) -> Options | None:
    """The options of one step of a stream, whose output is that of the last step anyway."""
    options = of_module(name, module, states)
    if options is None:
        return None
    for option in ("weight_dropout", "input_dropout", "recurrent_dropout"):
        if getattr(options, option):
            raise RuntimeError(
                f"rnnfast: {option} has one mask a sequence, and step would draw one a step; call "
                "forward with the sequence, or eval() for a stream"
            )
    options = options._replace(return_last=False)
    return options if any(options) else None


def of_function(name: str, training: bool, states: int, *options: Any) -> Options | None:
    """The options of a call of a function, None for none; in the order of NAMES."""
    return _now(check(name, Options(*options), states), training)


def text(module: Any) -> str:
    """Those that are set, as extra_repr has them."""
    return "".join(f", {name}={getattr(module, name)}" for name in NAMES if getattr(module, name))


def _drop_weights(weights: Sequence[Any], each: int, p: float, packed: Any) -> list[Any]:
    """The weights of all passes with a mask of its own on each w_hh, which is the second of
    `each`."""
    if packed is not None:
        raise RuntimeError(
            "rnnfast: weight_dropout drops weights anew in each call in training, got a frozen "
            "layer, whose weights were packed before; call eval() or unfreeze()"
        )
    return [torch.dropout(w, p, True) if i % each == 1 else w for i, w in enumerate(weights)]


class _Sequences:
    """Where the steps of each sequence stand: in padded x, or among packed rows."""

    def __init__(
        self,
        x: Tensor,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        order: Tensor | None,
        h0: Tensor | None,
    ) -> None:
        self._lengths, self._order = lengths, order
        self._sizes = None if batch_sizes is None else _rows.on_device(batch_sizes, x.device)
        self._of_row: Tensor | None = None  # the sequence of each packed row
        if batch_sizes is None:
            self._batch = x.size(1)
        elif order is not None:
            self._batch = order.size(0)
        elif h0 is not None:
            self._batch = h0.size(1)
        elif torch.compiler.is_compiling():
            self._batch = x.size(0)  # at least as many; a graph must not read how many
        else:
            self._batch = int(batch_sizes[0])

    def drop(self, x: Tensor, p: float) -> Tensor:
        """x with one mask (B, features) at all steps of a sequence, scaled by 1/(1-p). It is drawn
        in the order of the batch: packing changes no mask."""
        mask = torch.dropout(x.new_ones(self._batch, x.size(-1)), p, True)
        if self._sizes is not None:
            if self._of_row is None:
                self._of_row = _rows.places(self._sizes, x.size(0))[1]
                if self._order is not None:
                    self._of_row = self._order[self._of_row]
            mask = mask.index_select(0, self._of_row)
        return x * mask

    def kept(self, x: Tensor, features: int, p: float) -> Tensor:
        """Which of h's features enter the product in each sequence, (B, features), in the order of
        the states. Drawn as the mask of x."""
        mask = torch.rand(self._batch, features, device=x.device) >= p
        return mask if self._order is None else mask.index_select(0, self._order)

    def without_padding(self, x: Tensor) -> Tensor:
        """x with zeros where a graph has padding: a layer's own output has them."""
        if self._lengths is None:
            return x
        valid = torch.arange(x.size(0), device=x.device).unsqueeze(1) < self._lengths.to(x.device)
        return torch.where(valid.unsqueeze(-1), x, 0)

    def ends(self, x: Tensor, directions: int, batch: int) -> Tensor:
        """(B, features): x at the last step of each sequence, for a second direction (the second
        half of the features) at the first."""
        if self._sizes is not None:
            last = x.index_select(0, _rows.last_rows(self._sizes, batch))
        elif self._lengths is not None:
            at = (self._lengths.to(x.device) - 1).view(1, -1, 1)
            last = x.gather(0, at.expand(-1, -1, x.size(-1))).squeeze(0)
        else:
            last = x[-1]
        if directions == 1:
            return last
        first = x[:batch] if self._sizes is not None else x[0]
        half = x.size(-1) // 2
        return torch.cat([last[:, :half], first[:, half:]], -1)


def _of_last_layer(h_n: Tensor, directions: int) -> Tensor:
    # no view: it would change with h_n
    return h_n[-1].clone() if directions == 1 else torch.cat([h_n[-2], h_n[-1]], -1)


def _masks_of_layer(
    options: Options,
    sequences: _Sequences,
    spec: CellSpec,
    x: Tensor,
    weights: Sequence[Any],
    passes: int,
) -> list[Masks] | None:
    """What is drawn inside the recurrences of a layer, None for nothing."""
    p, zoneout = options.recurrent_dropout, options.zoneout or None
    if not p and zoneout is None:
        return None
    hidden = weights[0].size(0) // spec.gates
    return [
        _masks.draw(
            spec, x, sequences.kept(x, weights[1].size(-1), p) if p else None, p, zoneout,
            options.draws, hidden,
        )
        for _ in range(passes)
    ]  # fmt: skip


def _layer_by_layer(
    stack: Callable[..., Any],
    options: Options,
    spec: Any,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Any],
    bias: bool,
    num_layers: int,
    directions: int,
    dropout: float,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    packed: Sequence[Tensor] | None,
    lengths: Tensor | None,
    recompute: bool,
    order: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """y, what is added to its last step, h_n, c_n: with something of torch's between the layers."""
    sequences = _Sequences(x, batch_sizes, lengths, order, h0)
    each = len(weights) // num_layers
    if h0 is None and order is not None and torch.compiler.is_compiling():
        # one batch for all layers: of packed rows alone, each would have one of unknown size
        out = weights[1].size(-1) if spec.has_hidden_side else weights[0].size(0) // spec.gates
        out *= spec.heads
        h0 = x.new_zeros(num_layers * directions, order.size(0), out)
    y = sequences.without_padding(x) if options.residual else x
    added: Tensor | None = None
    states: list[tuple[Tensor, Tensor]] = []

    def of(k: int, part: Sequence[Any] | Tensor | None, each: int = 1) -> Any:
        """Those of layer k, of which each direction has so many."""
        each *= directions
        return None if part is None else part[k * each : (k + 1) * each]

    for k in range(num_layers):
        entered, last = y, k == num_layers - 1
        if options.input_dropout:
            y = sequences.drop(y, options.input_dropout)
        y, h_n, c_n = stack(
            spec, y, of(k, h0), of(k, c0, spec.states - 1), weights[k * each : (k + 1) * each],
            bias, 1, directions, 0.0, batch_sizes, reset, of(k, packed, spec.heads), lengths,
            recompute, last and options.return_last,
            _masks_of_layer(
                options, sequences, spec, y, weights[k * each :], directions * spec.heads
            ),
        )  # fmt: skip
        states.append((h_n, c_n))
        if options.residual and entered.size(-1) == directions * h_n.size(-1):
            if last and options.return_last:
                added = sequences.ends(entered, directions, h_n.size(1))
            else:
                y = entered + y
        if dropout and not last:
            y = torch.dropout(y, dropout, True)
    return y, added, torch.cat([h for h, _ in states]), torch.cat([c for _, c in states])


def run(
    stack: Callable[..., Any],
    options: Options | None,
    empty: Tensor | None,
    order: Tensor | None,
    spec: Any,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Any],
    bias: bool,
    num_layers: int,
    directions: int,
    dropout: float,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    packed: Sequence[Tensor] | None,
    lengths: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """_run.stack (`stack`) with options: y, its last step if that alone is asked for, h_n, c_n.
    empty: which sequences have no step, only one of zeros; order: that of packed rows."""
    options = options or PLAIN
    if options.zoneout:
        spec = zoneout_cell(spec)
        if len(weights) // (num_layers * directions) % 2:
            raise RuntimeError("rnnfast: zoneout has no form with a projection (proj_size)")
    if options.recurrent_dropout and (not spec.dense or spec.stages):
        raise RuntimeError(
            "rnnfast: recurrent_dropout drops h where it enters W_hh, a matrix, in a step of one "
            f"product and a pointwise function, which the cell {spec.name} has not; it must be 0, "
            f"got {options.recurrent_dropout!r}"
        )
    if options.weight_dropout:
        each = len(weights) // (num_layers * directions * spec.heads)
        weights = _drop_weights(weights, each, options.weight_dropout, packed)
    given = h0, c0
    if empty is not None:  # a state that nothing is computed from reaches no gradient
        h0, c0 = (None if s is None else torch.where(empty, 0, s) for s in given)
    args = (
        spec, x, h0, c0, weights, bias, num_layers, directions, dropout, batch_sizes, reset, packed,
        lengths, recompute,
    )  # fmt: skip
    added: Tensor | None = None
    inside = options.recurrent_dropout or options.zoneout
    if options.residual or options.input_dropout or inside:
        y, added, h_n, c_n = _layer_by_layer(stack, options, *args, order)
        if empty is not None and added is not None:
            added = torch.where(empty, 0, added)
    else:
        y, h_n, c_n = stack(*args, options.return_last)
    if empty is not None:
        h_n = torch.where(empty, 0 if given[0] is None else given[0], h_n)
        if spec.states > 1:
            c_n = torch.where(empty, 0 if given[1] is None else given[1], c_n)
    if not options.return_last:
        return y, None, h_n, c_n
    last = _of_last_layer(h_n, directions)
    return y, last if added is None else last + added, h_n, c_n
