"""Steps in plain PyTorch of cells with stages, which are more than reference.py's one function, for
bench/variants.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rnnfast._layer import spec_of


def before_step(gx: Tensor, w_hh: Tensor, b_hh: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """A GRU with the reset gate before the product."""
    free = 2 * h.size(-1)
    x_g, x_n = gx[:, :free], gx[:, free:]
    r, z = torch.sigmoid(x_g + torch.addmm(b_hh[:free], h, w_hh[:free].t())).chunk(2, -1)
    n = torch.tanh(x_n + torch.addmm(b_hh[free:], r * h, w_hh[free:].t()))
    return (n + z * (h - n),)


def normed_step(gx: Tensor, w_hh: Tensor, b_hh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """An LSTM whose gx is normalised already; b_hh as the operators have it."""
    H = h.size(-1)
    bias, _, gain, gain_c, bias_c = b_hh.split((4 * H, 4 * H, 4 * H, H, H))
    gh = nn.functional.layer_norm(h @ w_hh.t(), (4 * H,), gain, bias)
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(nn.functional.layer_norm(c, (H,), gain_c, bias_c)), c


STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "gru_before": before_step,
    "lstm_norm": normed_step,
}


def plain(layer: Any) -> Callable[[Tensor], Tensor]:
    """The layer's numbers by torch's operators, a compiled step after the other."""
    spec = spec_of(layer)
    step = torch.compile(STEPS[spec.name])

    def run(x: Tensor) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = layer._current()[0]
        state: tuple[Tensor, ...] = (x.new_zeros(x.size(1), layer.hidden_size),) * spec.states
        y = []
        if spec.name == "lstm_norm":
            gates = w_ih.size(0)
            gain = b_hh[gates : 2 * gates]
            projected = nn.functional.layer_norm(x @ w_ih.t(), (gates,), gain, b_ih)
        else:
            projected = nn.functional.linear(x, w_ih, b_ih)
        for gx in projected.unbind(0):
            state = step(gx, w_hh, b_hh, *state)
            y.append(state[0])
        return torch.stack(y)

    return run
