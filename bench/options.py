"""Options of the layers against the quickest way to the same numbers in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast

P = 0.5
HEADS = 4


def _step(call: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A training step of what a call gives."""
    return torch.autograd.grad(call(*args, **kwargs).sum(), list(layer.parameters()))


def plain_step(
    act: Callable[[Tensor], Tensor], gx: Tensor, gh: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """A step of an LSTM or a GRU with another activation."""
    if gx.size(-1) == 4 * h.size(-1):
        i, f, g, o = (gx + gh).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * act(g)
        return torch.sigmoid(o) * act(c), c
    (x_r, x_z, x_n), (h_r, h_z, h_n) = gx.chunk(3, -1), gh.chunk(3, -1)
    n = act(x_n + torch.sigmoid(x_r + h_r) * h_n)
    z = torch.sigmoid(x_z + h_z)
    return n + z * (h - n), c


def zoneout_step(
    gx: Tensor, gh: Tensor, h: Tensor, c: Tensor, stays: Tensor
) -> tuple[Tensor, Tensor]:
    """A step of an LSTM or a GRU that leaves entries of its states as they were."""
    h_new, c_new = plain_step(torch.tanh, gx, gh, h, c)
    return torch.where(stays[0], h, h_new), torch.where(stays[-1], c, c_new)


def plain_ways(layer: Any, x: Tensor, mask: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What a user of torch.nn writes, by the name of the option."""
    steps, batch, features = x.shape
    lengths, order = mask.sum(0), torch.argsort(~mask, dim=0, stable=True).unsqueeze(-1)

    def dropped() -> Tensor:
        weights = dict(layer.named_parameters())
        weights["weight_hh_l0"] = torch.dropout(weights["weight_hh_l0"], P, True)
        return torch.func.functional_call(layer, weights, (x,))[0]

    def one_mask() -> Tensor:
        return layer(x * torch.dropout(x.new_ones(batch, features), P, True))[0]

    def valid_steps() -> Tensor:
        front = torch.take_along_dim(x, order, 0)
        packed = pack_padded_sequence(front, lengths, enforce_sorted=False)
        y, _ = pad_packed_sequence(layer(packed)[0], total_length=steps)
        return torch.zeros_like(y).scatter(0, order.expand_as(y), y)

    # Dynamo would unroll the loop over time, so only a step is compiled
    relu_step = torch.compile(partial(plain_step, torch.relu))
    tanh_step = torch.compile(partial(plain_step, torch.tanh))
    stay_step = torch.compile(zoneout_step)
    w_ih, w_hh, b_ih, b_hh = layer.parameters()
    hidden, states = layer.hidden_size, 2 if isinstance(layer, nn.LSTM) else 1

    def loop(step: Callable[..., Any], factor: Tensor | None = None, more: Any = None) -> Tensor:
        h = c = x.new_zeros(batch, hidden)
        y = []
        for t, gx in enumerate(nn.functional.linear(x, w_ih, b_ih).unbind(0)):
            entering = h if factor is None else h * factor
            given = () if more is None else (more[t],)
            h, c = step(gx, torch.addmm(b_hh, entering, w_hh.t()), h, c, *given)
            y.append(h)
        return torch.stack(y)

    def other_activation() -> Tensor:
        return loop(relu_step)

    def dropped_h() -> Tensor:
        return loop(tanh_step, torch.dropout(x.new_ones(batch, hidden), P, True))

    def zoned_out() -> Tensor:
        return loop(stay_step, None, torch.rand(steps, states, batch, hidden) < P)

    def last() -> Tensor:
        state = layer(x)[1]
        return state[0][-1] if isinstance(state, tuple) else state[-1]

    return {
        "weight_dropout": dropped,
        "input_dropout": one_mask,
        "mask": valid_steps,
        "return_last": last,
        "activation": other_activation,
        "recurrent_dropout": dropped_h,
        "zoneout": zoned_out,
    }


def calls_of_options(cell: str, T: int, B: int, H: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """For each option: our step with it, torch.nn's, and our step without any."""
    x, mask = torch.randn(T, B, H), torch.rand(T, B) < 0.75
    mask[0] = True  # torch.nn's packed input has no empty rows
    layers = {
        option: getattr(rnnfast, cell)(H, H, **made)
        for option, made in (
            ("weight_dropout", {"weight_dropout": P}),
            ("input_dropout", {"input_dropout": P}),
            ("mask", {}),
            ("return_last", {"return_last": True}),
            ("activation", {"activation": "relu"}),
            ("recurrent_dropout", {"recurrent_dropout": P}),
            ("zoneout", {"zoneout": P}),
            ("num_heads", {"num_heads": HEADS}),
        )
    }
    heads = nn.ModuleList(getattr(nn, cell)(H, H // HEADS) for _ in range(HEADS))
    theirs, bare = getattr(nn, cell)(H, H), layers["mask"]
    plain = plain_ways(theirs, x, mask)
    plain["num_heads"] = lambda: torch.cat([head(x)[0] for head in heads], -1)
    return {
        option: {
            "ours": partial(
                _step, lambda x, layer=layer, **k: layer(x, **k)[0], layer, x,
                **({"mask": mask} if option == "mask" else {}),
            ),
            "theirs": partial(_step, plain[option], heads if option == "num_heads" else theirs),
            "without": partial(_step, lambda x: bare(x)[0], bare, x),
        }
        for option, layer in layers.items()
    }  # fmt: skip
