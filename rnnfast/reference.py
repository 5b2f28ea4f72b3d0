"""Every cell in plain, differentiable torch operators: slow, and right everywhere.

It is what the fast engines are measured against, and what runs where they cannot: functorch
transforms, forward-mode AD, derivatives above the first, other dtypes and devices under
``rnnfast.use_engine("reference")``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .cells import CellSpec, cell_spec

__all__ = ["batch_norm_lstm", "cell_step", "forward", "scan"]

#: The steps of cells that rnnfast.load_cell made, by their codes, where they were given: of gx, gh
#: (tensors of each gate), state and, of a cell with parameters, p.
own_steps: dict[int, Callable[..., tuple[Tensor, ...]]] = {}


def cell_step(
    spec: CellSpec,
    gx: Tensor,
    gh: Tensor,
    state: tuple[Tensor, ...],
    p: Sequence[Tensor] = (),
    linked: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    r"""One step of a cell, from pre-activations to the next state.

    Args:
        spec: the cell
        gx: input side ``w_ih x + b_ih``
        gh: hidden side ``w_hh h + b_hh``
        state: ``(h,)``, ``(h, c)`` or ``(h, c, n, m)``, each :math:`(N, H)`
        p: the parameters of a cell that has some
        linked: what stands between the halves of a cell: of the GRU with the reset gate before
            the product, that product (``gh`` is of its other gates only); of the LSTM with layer
            normalisation, that of c

    Shape:
        - gx, gh: :math:`(N, G \cdot H)`
        - p: each :math:`(H)`
        - Output: the new state, shapes as ``state``
    """
    if spec.is_own:
        return _own_step(spec, gx, gh, state, p)
    act, gate = _activation(spec.activation), _activation(spec.gate_activation)
    if spec.name in ("lstm", "lstm_any", "lstm_norm", "lstm_zoneout"):
        # Hochreiter & Schmidhuber 1997; forget gate of Gers et al. 2000
        i, f, g, o = (gx + gh).chunk(4, -1)
        c = gate(f) * state[1] + gate(i) * act(g)
        if spec.clip:
            c = c.clamp(-spec.clip, spec.clip)
        return gate(o) * act(c if linked is None else linked(c)), c
    if spec.name == "coupled_lstm":
        # Greff et al. 2017, arXiv:1503.04069
        f, g, o = (gx + gh).chunk(3, -1)
        c = gate(f) * state[1] + (1 - gate(f)) * act(g)
        if spec.clip:
            c = c.clamp(-spec.clip, spec.clip)
        return gate(o) * act(c), c
    if spec.name == "peephole_lstm":
        # Gers & Schmidhuber 2000
        i, f, g, o = (gx + gh).chunk(4, -1)
        c = gate(f + p[1] * state[1]) * state[1] + gate(i + p[0] * state[1]) * act(g)
        if spec.clip:
            c = c.clamp(-spec.clip, spec.clip)
        return gate(o + p[2] * c) * act(c), c
    if spec.name in ("gru", "gru_any", "gru_norm", "gru_zoneout"):
        # Cho et al. 2014, with the reset after the product, as cuDNN and torch.nn have it
        x_r, x_z, x_n = gx.chunk(3, -1)
        h_r, h_z, h_n = gh.chunk(3, -1)
        r, z = gate(x_r + h_r), gate(x_z + h_z)
        n = act(x_n + r * h_n)
        return ((1 - z) * n + z * state[0],)
    if spec.name == "sru":
        # Lei et al. 2018, arXiv:1709.02755
        x, f, r, skip = (gx + gh).chunk(4, -1)
        f, r = torch.sigmoid(f + p[0] * state[1]), torch.sigmoid(r + p[1] * state[1])
        c = f * state[1] + (1 - f) * x
        return r * c + (1 - r) * skip, c
    if spec.name == "gru_before":
        # Cho et al. 2014, arXiv:1406.1078
        assert linked is not None
        x_r, x_z, x_n = gx.chunk(3, -1)
        h_r, h_z = gh.chunk(2, -1)
        r, z = gate(x_r + h_r), gate(x_z + h_z)
        n = act(x_n + linked(r * state[0]))
        return ((1 - z) * n + z * state[0],)
    if spec.name.startswith("slstm"):
        return _slstm_step(spec, gx + gh, state)
    if spec.name.startswith(("min_", "qrnn_")):
        return _scan_cell_step(spec, gx + gh, state)
    # Elman 1990; IndRNN (Li et al. 2018, arXiv:1803.04831) differs in gh only
    if spec.name.endswith("relu"):
        act = torch.relu
    return (act(gx + gh),)


def _slstm_step(spec: CellSpec, gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Beck et al. 2024, arXiv:2405.04517, stabilised."""
    _, c, n, m = state
    log_i, f, g, o = gates.chunk(4, -1)
    carried = m + (f if spec.name == "slstm_exp" else functional.logsigmoid(f))
    # zeros carry nothing on, whatever their m: the input gate's scale is the one to take
    of_input = (log_i >= carried) | ((c == 0) & (n == 0))
    m = torch.where(of_input, log_i, carried)
    i_scaled = torch.exp(log_i - m)
    f_scaled = torch.exp((carried - m).clamp(max=80))  # above 0 only where it scales zeros
    c = f_scaled * c + i_scaled * torch.tanh(g)
    n = f_scaled * n + i_scaled
    return torch.sigmoid(o) * c / n, c, n, m


# torch's names where they differ; its hardsigmoid has a sixth of float32 precision in float64
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "hard_sigmoid": lambda x: functional.relu6(x + 3) / 6,
    "hard_tanh": functional.hardtanh,
    "linear": lambda x: x,
}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    found = _FUNCTIONS.get(name)
    return getattr(functional, name) if found is None else found


def _own_step(
    spec: CellSpec, gx: Tensor, gh: Tensor, state: tuple[Tensor, ...], p: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    step = own_steps.get(spec.id)
    if step is None:
        raise RuntimeError(
            f"rnnfast: cell {spec.name} has no reference: higher derivatives, forward mode, other "
            "transforms of torch.func than vmap and one gradient, and "
            'rnnfast.use_engine("reference") need its step in torch operators, '
            "load_cell(path, reference=step)"
        )
    gates = (gx.chunk(spec.gates, -1), gh.chunk(spec.gates, -1))
    new = step(*gates, state, p) if spec.parameters else step(*gates, state)
    if isinstance(new, Tensor):
        new = (new,)
    if not isinstance(new, (tuple, list)) or len(new) != spec.states:
        found = len(new) if isinstance(new, (tuple, list)) else type(new).__name__
        raise RuntimeError(
            f"rnnfast: reference of {spec.name} must return its {spec.states} states, got {found}"
        )
    for k, (one, before) in enumerate(zip(new, state)):
        if not isinstance(one, Tensor) or one.shape != before.shape:
            shape = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
            raise RuntimeError(
                f"rnnfast: state {k} that the reference of {spec.name} returns must have shape "
                f"(B, H) = {tuple(before.shape)}, got {shape}"
            )
    return tuple(new)


def _scan_cell_step(spec: CellSpec, gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The cells that are linear in their states."""
    first, second, *rest = gates.chunk(spec.gates, -1)
    if spec.name.startswith("qrnn"):
        # Bradbury et al. 2017, arXiv:1611.01576
        z, f = torch.tanh(first), torch.sigmoid(second)
        i = torch.sigmoid(rest[1]) if spec.name == "qrnn_ifo" else 1 - f
        pooled = f * state[-1] + i * z
        return (pooled,) if spec.states == 1 else (torch.sigmoid(rest[0]) * pooled, pooled)
    # Feng et al. 2024, arXiv:2410.01201
    n = second if spec.name.startswith("min_gru") else rest[0]
    if not spec.name.endswith("linear"):
        n = torch.where(n >= 0, n + 0.5, torch.sigmoid(n))
    if spec.name.startswith("min_gru"):
        z = torch.sigmoid(first)
        return ((1 - z) * state[0] + z * n,)
    log = torch.nn.functional.logsigmoid
    ratio = log(first) - log(second)
    return (torch.sigmoid(ratio) * state[0] + torch.sigmoid(-ratio) * n,)


class _Norms:
    """Layer normalisation (Ba et al. 2016, arXiv:1607.06450) of both sides of the gates, and of the
    LSTM's c on its way into h."""

    def __init__(self, spec: CellSpec, hidden: int, b_hh: Tensor | None) -> None:
        gates = spec.gates * hidden
        # the gates r and z of a GRU are normalised together, and n by itself
        self._groups = [2 * hidden, hidden] if spec.name == "gru_norm" else [gates]
        self.b_hh, self.inputs, self.hidden, self._c = b_hh, None, None, (None, None)
        if b_hh is None:
            return
        sizes = [gates] * (3 if spec.dense else 2) + [hidden] * (2 if spec.states == 2 else 0)
        self.b_hh, self.inputs, *rest = b_hh.split(sizes)
        if spec.dense:
            self.hidden = rest[0]
        if spec.states == 2:
            self._c = rest[1], rest[2]

    def of_gates(self, gates: Tensor, gain: Tensor | None) -> Tensor:
        normed = torch.cat([_normalised(part) for part in gates.split(self._groups, -1)], -1)
        return normed if gain is None else normed * gain

    def of_c(self, c: Tensor) -> Tensor:
        gain, bias = self._c
        return _normalised(c) if gain is None else _normalised(c) * gain + bias


def _normalised(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:])


def _packed_index(batch_sizes: Tensor, batch: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where row (t, b) of a padded batch lies among the packed rows, and the way back.

    Index arithmetic only, no value is read by Python, so that it also works on fake tensors.
    """
    steps = batch_sizes.size(0)
    column = torch.arange(batch, device=batch_sizes.device)
    valid = column < batch_sizes.unsqueeze(1)  # (T, B)
    first = torch.cumsum(batch_sizes, 0) - batch_sizes
    to_packed = torch.where(valid, first.unsqueeze(1) + column, rows).reshape(-1)
    flat = torch.arange(steps * batch, device=batch_sizes.device)
    to_padded = flat.new_zeros(rows + 1).scatter(0, to_packed, flat)[:rows]
    return valid, to_packed.clamp(max=max(rows - 1, 0)), to_padded


def forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    zone: Tensor | None = None,
    h_kept: Tensor | None = None,
    *,
    cell: CellSpec | str | int,
    reverse: bool = False,
    keep: Sequence[float] = (0.0, 0.0),
    h_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""One direction of one layer, as ``torch.ops.rnnfast.forward`` without what it saves.

    Args:
        x: input
        h0, c0: initial state; ``None`` means zeros
        w_ih, w_hh, b_ih, b_hh: weights in PyTorch's layout and gate order
        w_hr: projection of the LSTM with ``proj_size``, or ``None``
        batch_sizes: as in :class:`torch.nn.utils.rnn.PackedSequence`, or ``None``
        reset: where it is true, the state that enters the step of that row is zero, whatever was
            there before; or ``None``
        zone: where it is true a state stays as it was (zoneout; Krueger et al. 2017,
            arXiv:1606.01305), or ``None``
        h_kept: which entries of h enter the product with w_hh, ``h_scale`` times, the others as
            zeros (Gal & Ghahramani 2016, arXiv:1512.05287); ``None`` for all
        cell: name, id or :class:`~rnnfast.cells.CellSpec`
        reverse: run time backwards; ``y[t]`` still belongs to ``x[t]``
        keep: what part of h, and of the other states, stays where ``zone`` is false
        h_scale: factor of what enters the product, with ``h_kept``

    Shape:
        - x: :math:`(T, B, I)`, or packed :math:`(\sum_t n_t, I)`
        - h0: :math:`(B, P)`, :math:`P` = proj_size or hidden_size
        - c0: :math:`(S-1, B, H)`
        - w_ih: :math:`(G \cdot H, I)`
        - w_hh: :math:`(G \cdot H, P)`, or :math:`(G \cdot H)` for a diagonal recurrence, or
          :math:`(0)` where there is none
        - b_ih, b_hh: :math:`(G \cdot H)`; b_hh of a cell with :math:`K` parameters
          :math:`((G + K) \cdot H)`
        - w_hr: :math:`(P, H)`
        - batch_sizes: :math:`(T)`, int64
        - reset: :math:`(T, B)`, or packed :math:`(\sum_t n_t)`, bool
        - zone: :math:`(T, B, S, H)`, or packed :math:`(\sum_t n_t, S, H)`, bool
        - h_kept: :math:`(B, P)`, bool
        - Output: ``y`` :math:`(T, B, P)` or :math:`(\sum_t n_t, P)`, ``h_n`` :math:`(B, P)`,
          ``c_n`` :math:`(S-1, B, H)`

    Example::

        >>> x, w_ih, w_hh = torch.randn(5, 2, 3), torch.randn(4, 3), torch.randn(4, 4)
        >>> y, h_n, _ = forward(x, None, None, w_ih, w_hh, None, None, cell="rnn_tanh")
        >>> y.shape, h_n.shape
        (torch.Size([5, 2, 4]), torch.Size([2, 4]))
    """
    spec = cell_spec(cell)
    hidden = w_ih.size(0) // spec.gates
    valid: Tensor | None = None
    to_padded: Tensor | None = None
    if batch_sizes is not None:
        batch = h0.size(0) if h0 is not None else int(batch_sizes[0])
        valid, to_packed, to_padded = _packed_index(batch_sizes, batch, x.size(0))
        valid, to_packed, to_padded = (i.to(x.device) for i in (valid, to_packed, to_padded))
        x = x[to_packed].unflatten(0, (-1, batch)) if batch else x.new_zeros(0, 0, x.size(1))
        if reset is not None:
            reset = reset[to_packed].unflatten(0, (-1, batch)) & valid if batch else None
        if zone is not None:
            zone = zone[to_packed].unflatten(0, (-1, batch)) if batch else None
        # what stands in place of a missing row must not leak a NaN of another sequence
        valid = valid.unsqueeze(-1)
        x = torch.where(valid, x, 0)
    steps, batch = x.size(0), x.size(1)
    h = x.new_zeros(batch, hidden if w_hr is None else w_hr.size(0)) if h0 is None else h0
    rest = tuple(c0.unbind(0)) if c0 is not None else ()
    if spec.states > 1 and not rest:
        rest = (x.new_zeros(batch, hidden),) * (spec.states - 1)

    p: tuple[Tensor, ...] = ()
    norms: _Norms | None = None
    if spec.norms:
        norms = _Norms(spec, hidden, b_hh)
        b_hh = norms.b_hh
    elif spec.parameters:
        if b_hh is None:
            p = (w_ih.new_zeros(hidden),) * spec.parameters
        else:
            b_hh, of_units = b_hh.split((spec.gates * hidden, spec.parameters * hidden))
            p = of_units.chunk(spec.parameters)
    gx = x @ w_ih.t()
    if norms is not None:
        gx = norms.of_gates(gx, norms.inputs)
    if b_ih is not None:
        gx = gx + b_ih
    if reset is not None:
        reset = reset.unsqueeze(-1)
    linked: Callable[[Tensor], Tensor] | None = None
    if spec.name == "gru_before":
        free = 2 * hidden
        w_link, b_link = w_hh[free:].t(), None if b_hh is None else b_hh[free:]
        w_hh, b_hh = w_hh[:free], None if b_hh is None else b_hh[:free]

        def linked(link: Tensor) -> Tensor:
            product = link @ w_link
            return product if b_link is None else product + b_link

    if h_kept is not None:
        h_kept = h_kept[:batch]

    def mixed(t: int, s: int, before: Tensor, after: Tensor) -> Tensor:
        part = keep[min(s, 1)]
        out = part * before + (1 - part) * after if part else after
        return out if zone is None else torch.where(zone[t][:, s], before, out)

    if norms is not None and spec.states == 2:
        linked = norms.of_c
    y: list[Tensor] = [h] * steps
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        if reset is not None:  # where() and no product: a NaN in the old state ends here
            h = torch.where(reset[t], 0, h)
            rest = tuple(torch.where(reset[t], 0, state) for state in rest)
        # expanded by hand: torch.func loses the level of an older pullback in a broadcast product
        entering = h if h_kept is None else torch.where(h_kept, h * h_scale, 0)
        if spec.diagonal:
            gh = h * w_hh.expand_as(h)
        elif spec.dense:
            gh = entering @ w_hh.t()
            if norms is not None:
                gh = norms.of_gates(gh, norms.hidden)
        else:
            gh = torch.zeros_like(gx[t])
        if b_hh is not None and (spec.has_hidden_side or b_hh.size(0) > 0):
            gh = gh + b_hh
        new = cell_step(spec, gx[t], gh, (h, *rest), p, linked)
        if zone is not None or any(keep):
            new = tuple(mixed(t, s, b, a) for s, (b, a) in enumerate(zip((h, *rest), new)))
        out = new[0] if w_hr is None else new[0] @ w_hr.t()
        if valid is not None:
            out = torch.where(valid[t], out, h)
            new = (out, *(torch.where(valid[t], a, b) for a, b in zip(new[1:], rest, strict=True)))
        h, rest = out, new[1:]
        y[t] = h
    stacked = torch.stack(y) if steps else x.new_zeros(0, batch, h.size(-1))
    if to_padded is not None:
        stacked = stacked.flatten(0, 1)[to_padded]
    c_n = torch.stack(rest) if rest else x.new_zeros(0, batch, hidden)
    return stacked, h, c_n


def scan(a: Tensor, b: Tensor, h0: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    r""":math:`h_t = a_t h_{t-1} + b_t` over the first dimension, a step after the other.

    Args:
        a, b: the factors and what is added
        h0: :math:`h_{-1}`; ``None`` means zeros
        reverse: from the last step to the first

    Shape:
        - a, b: :math:`(T, *)`; h0: :math:`(*)`
        - Output: as a
    """
    h = torch.zeros_like(b[0]) if h0 is None and b.size(0) else h0
    steps: list[Tensor] = []
    for t in range(a.size(0) - 1, -1, -1) if reverse else range(a.size(0)):
        assert h is not None
        h = a[t] * h + b[t]
        steps.append(h)
    if not steps:
        return torch.zeros_like(b)
    return torch.stack(steps[::-1] if reverse else steps)


def batch_norm_lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    gain_ih: Tensor,
    gain_hh: Tensor,
    bias: Tensor | None,
    gain_c: Tensor,
    bias_c: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batch_sizes: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""``torch.ops.rnnfast.batch_norm_forward`` without what it saves: ``y``, ``h_n``, ``c_n``, and
    the means and biased variances that each step was normalised by.

    Args:
        x, h0, c0, batch_sizes: as :func:`forward` takes them
        w_ih, w_hh, gain_ih, gain_hh, bias, gain_c, bias_c: the parameters
        running_mean, running_var: read by steps of one row, and by all outside of training
        training: statistics of each step's rows
        eps: added to variances

    Shape:
        - w_ih: :math:`(4H, I)`; w_hh: :math:`(4H, H)`; gain_ih, gain_hh, bias: :math:`(4H)`;
          gain_c, bias_c: :math:`(H)`
        - running_mean, running_var: :math:`(S, 9H)`; steps beyond :math:`S` share the last row
        - means, variances: :math:`(T, 9H)`
    """
    if batch_sizes is None:
        sizes = [x.size(1)] * x.size(0)
        gx = (x @ w_ih.t()).flatten(0, 1)
    else:
        sizes = batch_sizes.tolist()
        gx = x @ w_ih.t()
    hidden = w_hh.size(1)
    h, c = h0, c0[0]
    y, ends, means, variances = [], [], [], []
    for t, (gx_t, rows) in enumerate(zip(gx.split(sizes), sizes, strict=True)):
        if rows < h.size(0):
            ends.append((h[rows:], c[rows:]))
            h, c = h[:rows], c[:rows]
        own = training and rows > 1
        at = min(t, running_mean.size(0) - 1)
        running = zip(
            running_mean[at].split((4 * hidden, 4 * hidden, hidden)),
            running_var[at].split((4 * hidden, 4 * hidden, hidden)),
            strict=True,
        )
        used: list[tuple[Tensor, Tensor]] = []

        def normal(v: Tensor, own: bool = own, running: Any = running, used: Any = used) -> Tensor:
            mean, var = next(running)
            if own:
                mean, var = v.mean(0), v.var(0, unbiased=False)
            used.append((mean, var))
            return (v - mean) / torch.sqrt(var + eps)

        a = gain_ih * normal(gx_t) + gain_hh * normal(h @ w_hh.t())
        i, f, g, o = (a if bias is None else a + bias).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * torch.tanh(gain_c * normal(c) + bias_c)
        y.append(h)
        means.append(torch.cat([mean for mean, _ in used]))
        variances.append(torch.cat([var for _, var in used]))
    ends.append((h, c))
    h_n, c_n = (torch.cat(parts) for parts in zip(*ends[::-1], strict=True))
    out = torch.cat(y) if batch_sizes is not None else torch.stack(y)
    return out, h_n, c_n.unsqueeze(0), torch.stack(means), torch.stack(variances)
