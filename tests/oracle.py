"""The float64 oracle: every cell, one direction and whole stacks, in plain differentiable torch.

Written from the equations in torch.nn's documentation and in arXiv:1803.04831, step by step, with
no line shared with the package. ``test_oracle.py`` proves that it equals torch.nn in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1, "indrnn_tanh": 1, "indrnn_relu": 1}
CELL_IDS = {name: number for number, name in enumerate(GATES)}
CELLS = tuple(GATES)
TORCH_CELLS = CELLS[:4]

State = tuple[Tensor, "Tensor | None"]
# What rows become as they enter a product: rounded to 16 bits, or to bytes with a scale.
Enter = Callable[[Tensor], Tensor]


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


def step(
    cell: str,
    x: Tensor,
    state: State,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None = None,
    margins: list[float] | None = None,
    enter: Enter = _as_it_is,
    seen: Tensor | None = None,
) -> State:
    """One time step of one cell; ``margins`` collects how near relu came to its kink.

    ``seen`` takes the place of h in its product, not in the cell.
    """
    h, c = state
    gx = enter(x) @ w_ih.t()
    if cell.startswith("indrnn"):
        gh = h * w_hh
    else:
        gh = enter(h if seen is None else seen) @ w_hh.t()
    if b_ih is not None:
        gx = gx + b_ih
    if b_hh is not None:
        gh = gh + b_hh
    if cell == "lstm":
        assert c is not None
        i, f, g, o = (gx + gh).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h if w_hr is None else enter(h) @ w_hr.t()), c
    if cell == "gru":
        xr, xz, xn = gx.chunk(3, 1)
        hr, hz, hn = gh.chunk(3, 1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * hn)
        return (1 - z) * n + z * h, None
    a = gx + gh
    if cell.endswith("tanh"):
        return torch.tanh(a), None
    if margins is not None and a.numel():
        margins.append(float(a.detach().abs().min()))
    return torch.relu(a), None


def direction(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    *,
    reverse: bool = False,
    lengths: Sequence[int] | None = None,
    margins: list[float] | None = None,
    enter: Enter = _as_it_is,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One direction of one layer: x (T, B, I) -> y (T, B, P), h_n (B, P), c_n (B, H) or None.

    ``enter`` models what an engine rounds; ``seen`` is the y (T, B, P) that the engine gave: each
    step then multiplies that of the step before, so that roundings to the other side do not grow.

    ``weights`` is (w_ih, w_hh, b_ih, b_hh, w_hr), None where absent. Sequence b ends after
    ``lengths[b]`` steps: its state stays as it is and y is zero from there on.
    """
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    assert w_ih is not None and w_hh is not None
    seq_len, batch, _ = x.shape
    hidden = w_ih.shape[0] // GATES[cell]
    h = x.new_zeros(batch, hidden if w_hr is None else w_hr.shape[0]) if h0 is None else h0
    c = None
    if cell == "lstm":
        c = x.new_zeros(batch, hidden) if c0 is None else c0
    alive_until = (
        torch.full((batch, 1), seq_len) if lengths is None else torch.tensor(lengths)[:, None]
    )
    ys: list[Tensor] = [x] * seq_len
    before: Tensor | None = None
    for t in reversed(range(seq_len)) if reverse else range(seq_len):
        alive = alive_until > t
        h_new, c_new = step(
            cell, x[t], (h, c), w_ih, w_hh, b_ih, b_hh, w_hr, margins, enter, before
        )
        if seen is not None:
            before = torch.where(alive, seen[t], h if before is None else before)
        ys[t] = torch.where(alive, h_new, torch.zeros_like(h_new))
        h = torch.where(alive, h_new, h)
        if c is not None and c_new is not None:
            c = torch.where(alive, c_new, c)
    return torch.stack(ys), h, c


def stack(
    cell: str,
    x: Tensor,
    hx: State | None,
    flat: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    bidirectional: bool = False,
    proj: bool = False,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A whole network without dropout; ``flat`` in the order of torch's ``_flat_weights``."""
    directions = 2 if bidirectional else 1
    per = 2 + 2 * bias + proj
    h_n, c_n = [], []
    for layer in range(num_layers):
        outs = []
        for d in range(directions):
            k = layer * directions + d
            w = list(flat[k * per : (k + 1) * per])
            w_hr = w.pop() if proj else None
            b_ih, b_hh = (w[2], w[3]) if bias else (None, None)
            h0 = None if hx is None else hx[0][k]
            c0 = None if hx is None or hx[1] is None else hx[1][k]
            y, h, c = direction(
                cell, x, h0, c0, (w[0], w[1], b_ih, b_hh, w_hr), reverse=d == 1, lengths=lengths
            )
            outs.append(y)
            h_n.append(h)
            c_n.append(c)
        x = torch.cat(outs, 2)
    stacked_c = torch.stack([c for c in c_n if c is not None]) if cell == "lstm" else None
    return x, torch.stack(h_n), stacked_c


def batch_sizes_of(lengths: Sequence[int]) -> list[int]:
    """(T,) number of sequences alive at each step; lengths must not increase."""
    return [sum(length > t for length in lengths) for t in range(max(lengths))]


def pack_rows(padded: Tensor, lengths: Sequence[int]) -> Tensor:
    """(T, B, F) -> (N, F), the valid rows in the order of a PackedSequence."""
    return torch.cat([padded[t, :n] for t, n in enumerate(batch_sizes_of(lengths))])
