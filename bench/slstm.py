"""SLSTM against a loop over time with one compiled step, and against an LSTM of its size: rows of
``python -m bench extras``, or alone by ``python -m bench.slstm``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import rnnfast

HEADS = 4

Weights = tuple[Tensor, Tensor, Tensor]


def step(
    gx: Tensor, w_hh: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As Beck et al. 2024 write it: gx (B, 4, n, H/n), w_hh (n, H/n, 4H/n), states (B, n, H/n)."""
    gh = torch.bmm(h.transpose(0, 1), w_hh).unflatten(-1, (4, -1)).permute(1, 2, 0, 3)
    i, f, g, o = (gx + gh).unbind(1)
    log_f = F.logsigmoid(f) + m
    new_m = torch.where(n == 0, i, torch.maximum(log_f, i))
    i, f = torch.exp(i - new_m), torch.exp(log_f - new_m)
    c = f * c + i * torch.tanh(g)
    n = f * n + i
    return torch.sigmoid(o) * c / n, c, n, new_m


def by_steps(x: Tensor, layer: rnnfast.SLSTM, compiled: Callable[..., Any]) -> Tensor:
    w_ih, w_hh, b_ih, b_hh = layer.parameters()
    heads, units = layer.num_heads, layer.hidden_size // layer.num_heads
    gx = F.linear(x, w_ih, b_ih + b_hh).unflatten(-1, (4, heads, units))
    blocks = w_hh.unflatten(0, (4, heads, units)).permute(1, 3, 0, 2).flatten(2).contiguous()
    state = (x.new_zeros(x.size(1), heads, units),) * 4
    y = []
    for gx_t in gx.unbind(0):
        state = compiled(gx_t, blocks, *state)
        y.append(state[0])
    return torch.stack(y).flatten(2)


def calls(T: int, B: int, H: int, heads: int, training: bool) -> dict[str, Callable[[], Any]]:
    """Ours, the loop, and our LSTM without heads, after a look at whether the first two agree."""
    torch._dynamo.reset()
    compiled = torch.compile(step, dynamic=False)
    layer, lstm, x = rnnfast.SLSTM(H, H, num_heads=heads), rnnfast.LSTM(H, H), torch.randn(T, B, H)
    ways: dict[str, tuple[Any, Any]] = {
        "ours": (lambda: layer(x)[0], layer),
        "loop": (lambda: by_steps(x, layer, compiled), layer),
        "lstm": (lambda: lstm(x)[0], lstm),
    }
    with torch.no_grad():
        torch.testing.assert_close(ways["ours"][0](), ways["loop"][0](), rtol=1e-3, atol=1e-4)

    def run(call: Callable[[], Tensor], module: torch.nn.Module) -> Any:
        if training:
            return torch.autograd.grad(call().sum(), list(module.parameters()))
        with torch.no_grad():
            return call()

    return {name: partial(run, *way) for name, way in ways.items()}


SHAPES = ((100, 32, 256, 1), (100, 32, 256, HEADS), (100, 1, 256, HEADS), (100, 8, 512, HEADS))


def rows(rounds: int) -> list[tuple[str, tuple[int, int, int], str]]:
    """What, shape and figure of each."""
    from .extras import median_ms

    found = []
    for T, B, H, heads in SHAPES:
        for training in (False, True):
            ms = median_ms(calls(T, B, H, heads, training), rounds)
            what = f"SLSTM of {heads} heads over a loop, {'training' if training else 'inference'}"
            text = f"{ms['loop'] / ms['ours']:.2f}x, {ms['ours'] / ms['lstm']:.2f} of an LSTM"
            found.append((what, (T, B, H), text))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.slstm", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    for what, shape, text in rows(parser.parse_args().rounds):
        print(f"{what:45} T%d B%d H%d  " % shape + text, flush=True)
