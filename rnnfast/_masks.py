"""Masks inside the recurrence: how they are drawn, and the way of a pass with them, one direction
of one layer (operators: _masked.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _lengths, _masked, _modes, _recompute, engine, ops, reference
from ._checks import check_weights
from ._masked import Masks
from ._modes import refuse_tangents, transforms_active
from ._route import is_exporting
from .cells import CellSpec, may_zone_out, zoneout_cell

__all__ = ["Masks", "direction", "draw"]


def _zone(x: Tensor, features: int, parts: tuple[float, ...]) -> Tensor:
    """Where each state of each row of x stays, (..., S, H), with these probabilities."""
    drawn = torch.rand((*x.shape[:-1], len(parts), features), device=x.device)
    if len(set(parts)) == 1:
        return drawn < parts[0]
    return drawn < torch.tensor(parts, device=x.device).unsqueeze(-1)


def draw(
    spec: CellSpec,
    x: Tensor,
    h_kept: Tensor | None,
    p: float,
    zoneout: tuple[float, float] | None,
    draws: bool,
    hidden: int,
) -> Masks:
    """Of one pass over x.

    Args:
        h_kept: which entries of h enter the product, where they are dropped with probability p
        zoneout: probabilities of h and of c staying as they were, if any
        draws: whether that is drawn; else it is expected
    """
    scale = 1.0 if h_kept is None else 1.0 / (1.0 - p)
    if zoneout is None:
        return Masks(h_kept=h_kept, h_scale=scale)
    if draws:
        return Masks(_zone(x, hidden, zoneout[: spec.states]), h_kept, h_scale=scale)
    return Masks(None, h_kept, *zoneout, scale)


def _of_lengths(
    use_ref: bool,
    spec: CellSpec,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Any,
    reset: Tensor | None,
    packed: Tensor | None,
    reverse: bool,
    lengths: Tensor,
    recompute: bool,
    masks: Masks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of padded x in a graph, whose lengths have no values yet: padding is a step at which all of
    the state stays."""
    if weights[4] is not None:  # zoneout has no form with a projection
        return _lengths.reference_of(
            spec, x, h0, c0, weights, lengths, reset, reverse, **masks.of_reference
        )
    if not may_zone_out(spec):  # padding keeps the states as zoneout does
        raise RuntimeError(
            "rnnfast: recurrent_dropout with lengths in a graph is for the cells of LSTM, GRU and "
            f"RNN, got cell {spec.name}; pack the input, or leave the layer out of the graph"
        )
    valid = _lengths.valid_steps(lengths, x)
    padding = ~valid.view(*valid.shape, 1, 1)
    hidden = weights[0].size(0) // spec.gates
    zone = padding.expand(-1, -1, spec.states, hidden)
    zone = zone if masks.zone is None else zone | masks.zone
    x = torch.where(valid.unsqueeze(-1), x, 0)
    rest: Any = (None, reset, packed, reverse, None, recompute, masks._replace(zone=zone))
    y, h_n, c_n = direction(use_ref, zoneout_cell(spec), x, h0, c0, *weights, *rest)
    return torch.where(valid.unsqueeze(-1), y, 0), h_n, c_n


def direction(
    use_ref: bool,
    spec: CellSpec,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    packed: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    recompute: bool,
    masks: Masks,
) -> tuple[Tensor, Tensor, Tensor]:
    """_run.direction with masks: (y, h_n, c_n)."""
    weights: Any = (w_ih, w_hh, b_ih, b_hh, w_hr)
    if lengths is not None:
        return _of_lengths(
            use_ref, spec, x, h0, c0, weights, reset, packed, reverse, lengths, recompute, masks
        )
    if not transforms_active():
        x = refuse_tangents(x)
    elif not use_ref and engine.forced != "auto":
        raise RuntimeError(
            f'rnnfast: the engine "{engine.forced}" was forced and can\'t run zoneout or '
            'recurrent_dropout under functorch transforms; use_engine("auto") can'
        )
    tensors = (x, h0, c0, *weights, batch_sizes, reset)
    if use_ref or transforms_active():
        check_weights(spec, x, *weights)
        if not torch.compiler.is_compiling():
            engine.note_reference()
        return reference.forward(*tensors, cell=spec, reverse=reverse, **masks.of_reference)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if save:
        ops.refuse_packed(packed)
        save = not is_exporting()  # as in _run.direction
    if save and recompute:
        return _recompute.run(*tensors, spec.id, reverse, masks=masks)
    args = (*tensors, *masks[:2], packed, *masks.numbers, spec.id, reverse, save)
    if not _modes.is_eager(args):
        return _masked.forward(*args)[:3]
    if save:
        return _masked.Eager.apply(*args)[:3]
    with ops.below_autograd():
        return _masked.forward(*args)[:3]
