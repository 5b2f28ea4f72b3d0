"""A layer as a plain loop over its steps, with the masks that the layer draws for a seed: what
zoneout and recurrent_dropout are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from test_modules import leaves_of
from test_regularize import seeded
from torch import Tensor

from rnnfast import reference
from rnnfast.cells import cell_spec


def pair(zoneout: Any) -> tuple[float, float]:
    return zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)


def run(
    layer: Any, x: Tensor, hx: Sequence[Tensor] | None = None, reset: Tensor | None = None
) -> list[Tensor]:
    """y and the last states of all layers and directions."""
    spec = cell_spec(layer.mode.lower()) if layer._chosen_cell is None else layer._chosen_cell
    directions = 2 if layer.bidirectional else 1
    each = len(layer._flat_weights_names) // (layer.num_layers * directions)
    hidden, p = layer.hidden_size, layer.recurrent_dropout if layer.training else 0.0
    sizes = [layer.proj_size or hidden, hidden][: spec.states]
    parts = pair(layer.zoneout)[: spec.states]
    steps, batch = x.shape[:2]
    ends: list[list[Tensor]] = []
    for k in range(layer.num_layers):
        drawn = []
        for _ in range(directions):
            kept = torch.rand(batch, sizes[0]) >= p if p else torch.ones(batch, sizes[0])
            draws = layer.training and any(parts)
            u = torch.rand(steps, batch, spec.states, hidden) if draws else None
            zone = None if u is None else [u[:, :, s] < q for s, q in enumerate(parts)]
            drawn.append((kept.to(x.dtype) / (1 - p), zone))
        outs = []
        for d, (factor, zone) in enumerate(drawn):
            i = k * directions + d
            w_ih, w_hh, b_ih, b_hh, *w_hr = layer._weights()[i * each : (i + 1) * each]
            state = [x.new_zeros(batch, n) for n in sizes] if hx is None else [s[i] for s in hx]
            y = [x] * steps
            for t in reversed(range(steps)) if d else range(steps):
                if reset is not None and t + d < steps:
                    state = [torch.where(reset[t + d, :, None], 0, s) for s in state]
                gx, gh = x[t] @ w_ih.t() + b_ih, (factor * state[0]) @ w_hh.t() + b_hh
                new = list(reference.cell_step(spec, gx, gh, tuple(state)))
                if w_hr:
                    new[0] = new[0] @ w_hr[0].t()
                if zone is not None:
                    new = [torch.where(z[t], a, b) for z, a, b in zip(zone, state, new)]
                elif any(parts):
                    new = [q * a + (1 - q) * b for q, a, b in zip(parts, state, new)]
                state = new
                y[t] = state[0]
            outs.append(torch.stack(y))
            ends.append(state)
        x = torch.cat(outs, -1)
    return [x, *(torch.stack(parts) for parts in zip(*ends))]


def gradients(out: list[Tensor], x: Tensor, layer: Any) -> list[Tensor]:
    """Outputs, and gradients of x and of the weights."""
    loss = sum((k + 1) * o.square().sum() for k, o in enumerate(out))
    return [*out, *torch.autograd.grad(loss, [x, *layer.parameters()])]


def results(layer: Any, call: Any, x: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    """`gradients` of a call of the layer, or of what stands for it, with the masks of one seed."""
    return gradients(leaves_of(seeded(call, x, *args, **kwargs)), x, layer)


def results_of_loop(layer: Any, x: Tensor, *args: Any) -> list[Tensor]:
    return gradients(seeded(run, layer, x, *args), x, layer)
