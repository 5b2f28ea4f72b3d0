"""One step of a layer, for streaming. A small layer's step is over sooner than the checks of a
whole call, so that the common case has a short way, which leaves them to the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _cast, _hx, _regularize, _reset, _run, engine, ops
from ._checks import check_dense
from ._modes import is_transformed, nothing_is_watching
from .cells import CellSpec

_forward = ops.forward
_below_autograd = ops.below_autograd
_is_grad_enabled = torch.is_grad_enabled
_is_inference = torch.is_inference_mode_enabled
_is_compiling = torch.compiler.is_compiling
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_tracing = torch._C._get_tracing_state


def _text(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _short_way(
    layer: Any,
    spec: CellSpec,
    input: Any,
    state: Any,
    reset: Any,
    weights: Sequence[Any],
    packed: Any,
) -> tuple[Tensor, Any] | None:
    """A step of one layer with nothing to differentiate, trace or cast. Only forms are looked at:
    the operator checks the rest. None: go the long way, which also says what is wrong."""
    if (
        _is_grad_enabled()
        or type(input) is not Tensor
        or not input.is_cpu
        or layer.num_layers != 1
        or layer.bidirectional
        or spec.heads != 1
        or spec.states > 2
        or engine.forced != "auto"
        or _is_any_autocast_enabled()
        or is_transformed()
        or _tracing() is not None
    ):
        return None
    batched = input.dim() == 2
    if not batched and (input.dim() != 1 or reset is not None):
        return None
    h = c = None
    try:
        if state is not None:
            if spec.states == 1:
                h = state
            elif type(state) is tuple and len(state) == 2:
                h, c = state
            else:
                return None
            if type(h) is not Tensor or h.dim() != (3 if batched else 2):
                return None
            if spec.states == 2 and type(c) is not Tensor:
                return None
            if batched:
                h = h.squeeze(0)
            elif c is not None:
                c = c.unsqueeze(1)
        if reset is not None:
            if type(reset) is not Tensor:
                return None
            reset = reset.unsqueeze(0)
        b_ih, b_hh = weights[2:4] if len(weights) >= 4 else (None, None)
        args = (
            input.unsqueeze(0) if batched else input.view(1, 1, -1), h, c, weights[0], weights[1],
            b_ih, b_hh, weights[-1] if len(weights) % 2 else None, None, reset,
            None if packed is None else packed[0], spec.id, False, False,
        )  # fmt: skip
        if _is_inference():
            y, h_n, c_n, _ = _forward(*args)
        else:
            with _below_autograd():
                y, h_n, c_n, _ = _forward(*args)
    except RuntimeError:
        return None
    # y and h_n hold the same numbers: of one step, each has the other's shape
    if batched:
        return h_n, (y if spec.states == 1 else (y, c_n))
    return y.view(-1), (h_n if spec.states == 1 else (h_n, c_n.squeeze(1)))


def _checked_input(layer: Any, input: Any, weight: Tensor) -> Tensor:
    if layer.bidirectional:
        raise RuntimeError(
            "rnnfast: step needs a layer of one direction, got bidirectional=True: the second "
            "direction begins at the end of the sequence, and a stream has none"
        )
    wanted = layer.input_size
    if isinstance(input, Tensor):
        check_dense(input, "input")
    if not isinstance(input, Tensor) or input.dim() not in (1, 2) or input.size(-1) != wanted:
        raise RuntimeError(
            f"rnnfast: input must have shape (B, I) or (I,) with I = {wanted}, got {_text(input)}"
        )
    if input.dtype != weight.dtype:
        input = _cast.match_input(input, weight, True)
    if not input.is_cpu or not weight.is_cpu:
        _cast.check_device(input, weight)
    return input


def _raise_state(name: str, letters: str, sizes: tuple[int, ...], found: Any) -> NoReturn:
    raise RuntimeError(f"rnnfast: {name} must have shape {letters} = {sizes}, got {_text(found)}")


def _checked_states(
    layer: Any, spec: CellSpec, state: Any, batch: tuple[int, ...], weight: Tensor
) -> list[Tensor]:
    """h and what else the cell carries, of shape (L, *batch, features)."""
    names, states = ["state"], [state]
    widths = [("P" if layer.proj_size else "H", layer.proj_size or layer.hidden_size)]
    if spec.states > 1:
        if not isinstance(state, (tuple, list)) or len(state) != spec.states:
            wanted = ", ".join(_hx.names(spec.states))
            raise RuntimeError(f"rnnfast: state must be a tuple ({wanted}), got {_text(state)}")
        names, states = [f"state[{k}]" for k in range(spec.states)], list(state)
        widths += [("H", layer.hidden_size)] * (spec.states - 1)
    for i, (name, (letter, width)) in enumerate(zip(names, widths, strict=True)):
        sizes = (layer.num_layers, *batch, width)
        if isinstance(states[i], Tensor):
            check_dense(states[i], name)
        if not isinstance(states[i], Tensor) or states[i].shape != sizes:
            _raise_state(name, f"(L, {'B, ' if batch else ''}{letter})", sizes, states[i])
        states[i] = _cast.match_state(states[i], weight, name)
    return states


def step(layer: Any, spec: CellSpec, input: Any, state: Any, reset: Any) -> tuple[Tensor, Any]:
    """What Layer.step does."""
    compiling = _is_compiling()
    options = _regularize.of_step(type(layer).__name__, layer, spec.states)
    plain = options is None
    if (
        not compiling
        and plain
        and engine.forced == "auto"
        and not layer.bidirectional
        and not (layer.training and layer.dropout > 0)
        and nothing_is_watching()
    ):
        plan = layer._step_plan()
        done = None if plan is None else plan.run(input, state, reset)
        if done is not None:
            return done
    weights, packed = layer._current()
    if not compiling and plain:
        short = _short_way(layer, spec, input, state, reset, weights, packed)
        if short is not None:
            return short

    if packed is None and _is_any_autocast_enabled():
        weights, _ = _cast.autocast_weights(weights, weights[0].device.type)
    weight = weights[0]
    x = _checked_input(layer, input, weight)
    batched = x.dim() == 2
    batch = tuple(x.shape[:-1])
    h: Tensor | None = None
    c: Tensor | None = None
    if state is not None:
        states = _checked_states(layer, spec, state, batch, weight)
        if not batched:
            states = [s.unsqueeze(1) for s in states]
        h, c = states[0], _hx.inner(states[1:])
    if not batched and isinstance(reset, bool):
        reset = torch.full((), reset, dtype=torch.bool, device=x.device)
    if reset is not None:
        reset = _reset.check(reset, "(B,)" if batched else "()", batch, x).reshape(1, -1)
    args = (
        spec, x.unsqueeze(0) if batched else x.view(1, 1, -1), h, c, weights, layer.bias,
        layer.num_layers, 1, layer.dropout if layer.training else 0.0, None, reset, packed,
    )  # fmt: skip
    if plain:
        y, h_n, c_n = _run.stack(*args)
    else:
        y, _, h_n, c_n = _regularize.run(_run.stack, options, None, None, *args)
    y = y.squeeze(0)
    if not batched:
        y, h_n = y.squeeze(0), h_n.squeeze(1)
        c_n = c_n.squeeze(1) if spec.states > 1 else c_n
    return y, _hx.leave(h_n, c_n, spec.states)
