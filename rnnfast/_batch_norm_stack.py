"""Layers with recurrent batch normalisation above one another, for rnnfast.BatchNormLSTM and
rnnfast.functional.batch_norm_lstm: input and hx in any of their forms, running statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _batch_norm, _cast, _hx, _lengths
from ._checks import check_batch_sizes, check_dense, check_lengths_kind
from ._rows import on_device, places

# Tensors of a direction, in the order of the operator; without a bias the fifth is missing.
WEIGHTS = ("weight_ih", "weight_hh", "gain_ih", "gain_hh", "bias", "gain_c", "bias_c")


class Stack(NamedTuple):
    """Options and tensors; of each layer and direction those of WEIGHTS (None: no bias) and
    running statistics (S, 9H), which training moves in place."""

    weights: Sequence[Sequence[Tensor | None]]
    means: Sequence[Tensor]
    variances: Sequence[Tensor]
    num_layers: int
    batch_first: bool
    dropout: float
    bidirectional: bool
    training: bool
    eps: float
    momentum: float


def refuse(what: str, why: str) -> NoReturn:
    raise RuntimeError(f"rnnfast: BatchNormLSTM takes no {what}: {why}")


def _number(option: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"rnnfast: {option} of BatchNormLSTM must be a number, got {type(value).__name__}"
        )
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"rnnfast: {option} of BatchNormLSTM must be a number that a float can hold, got an "
            f"int of {int(value).bit_length()} bits"
        ) from None


def numbers(eps: Any, momentum: Any) -> tuple[float, float]:
    """Both, checked."""
    found = _number("eps", eps), _number("momentum", momentum)
    if not 0 <= found[1] <= 1:
        raise ValueError(f"rnnfast: momentum of BatchNormLSTM must be in [0, 1], got {momentum}")
    if not 0 < found[0] < math.inf:
        raise ValueError(f"rnnfast: eps of BatchNormLSTM must be positive, got {eps}")
    return found


def check_flag(option: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(
            f"rnnfast: {option} of BatchNormLSTM must be a bool, got {type(value).__name__}"
        )


def _backwards(batch_sizes: Tensor) -> Tensor:
    """Where the rows of each sequence, packed, stand from its last step to its first."""
    count = int(batch_sizes.sum())
    step, column = places(batch_sizes, count)
    length = (batch_sizes.unsqueeze(1) > torch.arange(int(batch_sizes[0]))).sum(0)
    first = torch.cumsum(batch_sizes, 0) - batch_sizes
    return first[length[column] - 1 - step] + column


def run(stack: Stack, input: Any, hx: Any, lengths: Any) -> Any:
    """As the layer's call."""
    if not isinstance(input, (Tensor, PackedSequence)):
        _cast.refuse_input(input)
    if _cast.is_any_autocast_enabled():
        stack = _autocast(stack)
    rows = None
    if lengths is not None:
        check_lengths_kind(lengths, input)
        entered = _lengths.enter(input, None, lengths, stack.batch_first)
        if entered.lengths is not None:
            refuse("lengths in a graph", "give a PackedSequence, or leave the layer out")
        input, rows = entered.input, entered.rows
    batch_sizes = order = back = None
    batched = True
    if isinstance(input, PackedSequence):
        x, batch_sizes, order, back = input
        check_dense(x, "input")
        check_batch_sizes(batch_sizes, x.size(0))
        batch = int(batch_sizes[0])
    else:
        x = input
        check_dense(x, "input")
        if x.dim() not in (2, 3):
            raise ValueError(
                f"BatchNormLSTM: Expected input to be 2D or 3D, got {x.dim()}D instead"
            )
        batched = x.dim() == 3
        x = x.unsqueeze(1) if not batched else x.transpose(0, 1) if stack.batch_first else x
        batch = x.size(1)
        if x.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    weight: Any = stack.weights[0][0]
    if x.size(-1) != weight.size(1):
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. Expected "
            f"{weight.size(1)}, got {x.size(-1)}"
        )
    if x.dtype != weight.dtype:
        x = _cast.match_input(x, weight, True)
    _cast.check_device(x, weight)
    if stack.training and batch < 2:
        raise ValueError(
            "Expected more than 1 value per channel when training, got a batch of "
            f"{batch} (rnnfast: BatchNormLSTM; call eval() to use the running statistics)"
        )
    size = (len(stack.weights), batch, weight.size(0) // 4)
    h0: Any
    c0: Any
    if hx is None:
        h0 = c0 = x.new_zeros(size)
    else:
        states = _hx.take(hx, 2, batched, batch_sizes is not None)
        h0, c0 = _hx.fit(states, batched, (size, size), weight, order)
    y, h_n, c_n = _layers(stack, x, h0, c0, batch_sizes)

    if back is not None:
        h_n, c_n = h_n.index_select(1, back), c_n.index_select(1, back)
    if not batched:
        return y.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
    if rows is not None:
        y = _lengths.pad(y, rows)
    elif batch_sizes is not None:
        return PackedSequence(y, batch_sizes, order, back), (h_n, c_n)
    return y.transpose(0, 1) if stack.batch_first else y, (h_n, c_n)


def _autocast(stack: Stack) -> Stack:
    """With the parameters in autocast's dtype; statistics stay in their own."""
    first: Any = stack.weights[0][0]
    flat = [w for weights in stack.weights for w in weights]
    cast, _ = _cast.autocast_weights(flat, first.device.type)
    each = len(WEIGHTS)
    return stack._replace(weights=[cast[k : k + each] for k in range(0, len(flat), each)])


def _layers(
    stack: Stack, x: Tensor, h0: Any, c0: Any, batch_sizes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    backwards: Tensor | None = None
    if stack.bidirectional and batch_sizes is not None:
        backwards = on_device(_backwards(batch_sizes), x.device)

    def turned(rows: Tensor) -> Tensor:
        return rows.flip(0) if backwards is None else rows.index_select(0, backwards)

    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    found: list[tuple[Tensor, Tensor]] = []  # statistics that were used
    for layer in range(stack.num_layers):
        if layer > 0 and stack.dropout > 0 and stack.training:
            x = torch.dropout(x, stack.dropout, True)
        outs: list[Tensor] = []
        for reverse in range(1 + stack.bidirectional):
            k = len(h_n)
            y, h, c, *statistics = _batch_norm.run(
                turned(x) if reverse else x, h0[k], c0[k : k + 1], *stack.weights[k],
                stack.means[k], stack.variances[k], batch_sizes, stack.training, stack.eps,
            )  # fmt: skip
            found.append((statistics[0], statistics[1]))
            outs.append(turned(y) if reverse else y)
            h_n.append(h)
            c_n.append(c)
        x = torch.cat(outs, -1) if len(outs) > 1 else outs[0]
    if stack.training:  # after the last layer: a call that raises has moved none
        count = x.size(1) if batch_sizes is None else batch_sizes
        for mean, var, (of_mean, of_var) in zip(stack.means, stack.variances, found, strict=True):
            _follow(mean, var, of_mean, of_var, count, stack.momentum)
    return x, torch.stack(h_n), torch.cat(c_n)


@torch.no_grad()
def _follow(
    mean: Tensor, var: Tensor, of_mean: Tensor, of_var: Tensor, rows: Tensor | int, m: float
) -> None:
    """Moves the running statistics towards those of each step, in their order."""
    own = mean.size(0) - 1
    if isinstance(rows, Tensor):  # never growing: steps with a variance come first
        steps = int((rows > 1).sum())
        n = on_device(rows[:steps].unsqueeze(1), var.device).to(of_var.dtype)
        of_mean, of_var = of_mean[:steps], of_var[:steps] * (n / (n - 1))
    else:
        steps = of_mean.size(0)
        of_var = of_var * (rows / (rows - 1))
    first, late = min(steps, own), max(steps - own, 0)
    for running, found in ((mean, of_mean.to(mean)), (var, of_var.to(var))):
        running[:first].lerp_(found[:first], m)
        if late:
            # as if each had been averaged in after the other
            ago = torch.arange(late - 1, -1, -1, dtype=torch.float64, device=found.device)
            weight = (m * (1 - m) ** ago.unsqueeze(1)).to(found)
            running[own].mul_((1 - m) ** late).add_((weight * found[own:]).sum(0))
