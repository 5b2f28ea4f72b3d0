"""Recurrent with nested inputs, states and outputs, and cells of any dimensions."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from test_recurrent import F64, IN, LENGTHS, RESET, B, H, T, inputs
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import Recurrent

Both = namedtuple("Both", ["hidden", "memory"])


@dataclasses.dataclass
class Held:
    hidden: Tensor
    memory: Tensor


FORMS = {
    "tuple": lambda h, m: (h, m),
    "list": lambda h, m: [h, m],
    "dict": lambda h, m: {"hidden": h, "memory": m},
    "named tuple": Both,
    "dataclass": Held,
    "deep": lambda h, m: {"hidden": [h], "memory": ({"it": m},)},
}


def opened(form: str, state: Any) -> tuple[Tensor, Tensor]:
    if form in ("tuple", "list", "named tuple"):
        return state[0], state[1]
    if form == "deep":
        return state["hidden"][0], state["memory"][0]["it"]
    return (state["hidden"], state["memory"]) if form == "dict" else (state.hidden, state.memory)


class Nested(nn.Module):
    """Attends to what it wrote into a memory (B, slots, H): nested in, out and between."""

    def __init__(self, form: str, inputs: int = IN, units: int = H) -> None:
        super().__init__()
        self.form, self.units = form, units
        self.write = nn.Linear(inputs + 2 * units, units, dtype=F64)
        self.start = nn.Parameter(torch.randn(units, dtype=F64))

    def initial_state(self, x: Any) -> Any:
        a, _ = opened(self.form, x)
        h = self.start.expand(a.size(0), -1)
        return FORMS[self.form](h, a.new_zeros(a.size(0), 4, self.units))

    def forward(self, x: Any, state: Any) -> Any:
        a, gate = opened(self.form, x)
        h, memory = opened(self.form, state)
        weight = torch.softmax((memory @ h.unsqueeze(-1)).squeeze(-1), -1)
        read = (weight.unsqueeze(1) @ memory).squeeze(1)
        h = torch.tanh(self.write(torch.cat([a, h, read], -1))) * gate.unsqueeze(-1)
        memory = torch.cat([memory[:, 1:], h.unsqueeze(1)], 1)
        return FORMS[self.form](h, gate), FORMS[self.form](h, memory)


def nested(form: str) -> tuple[Recurrent, Any, Tensor, Tensor]:
    torch.manual_seed(5)
    a, gate = torch.randn(T, B, IN, dtype=F64, requires_grad=True), torch.rand(T, B, dtype=F64)
    return Recurrent(Nested(form)), FORMS[form](a, gate), a, gate


@pytest.mark.parametrize("form", FORMS)
def test_nested(form: str) -> None:
    layer, x, a, gate = nested(form)
    output, state = layer(x)
    assert type(output) is type(x) and type(state) is type(x)
    cell: Any = layer.cells[0]
    s, ys = cell.initial_state(FORMS[form](a[0], gate[0])), []
    for t in range(T):
        y, s = cell(FORMS[form](a[t], gate[t]), s)
        ys.append(opened(form, y))
    torch.testing.assert_close(opened(form, output)[0], torch.stack([y for y, _ in ys]))
    torch.testing.assert_close(opened(form, output)[1], gate)
    want = [i.unsqueeze(0) for i in opened(form, s)]
    torch.testing.assert_close(list(opened(form, state)), want)
    # a state that comes back, chunk by chunk and step by step
    state, got = None, []
    for chunk in (slice(0, 2), slice(2, T)):
        y, state = layer(FORMS[form](a[chunk], gate[chunk]), state)
        got.append(opened(form, y)[0])
    torch.testing.assert_close(torch.cat(got), opened(form, output)[0])
    state = None
    for t in range(T):
        y, state = layer.step(FORMS[form](a[t], gate[t]), state)
        torch.testing.assert_close(opened(form, y)[0], got[0][t] if t < 2 else got[1][t - 2])


@pytest.mark.parametrize("form", FORMS)
def test_nested_rows_of_their_own(form: str) -> None:
    """Lengths, resets to a learned state: as each row alone."""
    layer, _x, a, gate = nested(form)
    x = FORMS[form](a, gate)
    output, state = layer(x, lengths=LENGTHS, reset=RESET)
    for b, n in enumerate(LENGTHS.tolist()):
        one = FORMS[form](a[:n, b : b + 1], gate[:n, b : b + 1])
        y, s = layer(one, reset=RESET[:n, b : b + 1])
        for all_, alone in zip(opened(form, output), opened(form, y)):
            torch.testing.assert_close(all_[:n, b], alone[:, 0])
            assert not all_[n:, b].any()
        for all_, alone in zip(opened(form, state), opened(form, s)):
            torch.testing.assert_close(all_[:, b], alone[:, 0])
    start = layer.cells[0].start
    loss = opened(form, output)[0].sum()
    assert torch.autograd.grad(loss, start)[0].abs().sum() > 0


@pytest.mark.parametrize("form", FORMS)
def test_nested_compiles(form: str) -> None:
    layer, x, _, _ = nested(form)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    call = {"lengths": LENGTHS, "reset": RESET}
    got, want = compiled(x, **call), layer(x, **call)
    for one, other in zip(got, want):
        torch.testing.assert_close(opened(form, one), opened(form, other))


class Both2(Nested):
    """Of tensors in, and a dict out."""

    def initial_state(self, x: Any) -> Any:
        return x.new_zeros(x.size(0), self.units)

    def forward(self, x: Any, h: Any) -> Any:
        h = torch.tanh(self.write(torch.cat([x, h, h], -1)))
        return {"y": h, "n": h.norm(dim=-1, keepdim=True)}, h


def test_nested_outputs_of_two_directions() -> None:
    layer = Recurrent(lambda k, d: Both2("dict"), bidirectional=True, feature_dims=1)
    x, _ = inputs()
    output, state = layer(x)
    assert output["y"].shape == (T, B, 2 * H) and output["n"].shape == (T, B, 2)
    assert state.shape == (2, B, H)
    torch.testing.assert_close(layer(x[:, 0])[0]["y"], output["y"][:, 0])
    packed = layer(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))[0]
    padded = layer(x, lengths=LENGTHS)[0]
    torch.testing.assert_close(pad_packed_sequence(packed["n"])[0], padded["n"])


def test_states_that_differ() -> None:
    cells = [rnnfast.LSTMCell(IN, H), rnnfast.GRUCell(H, 4)]
    layer = Recurrent(cells, 2, stack_states=False)
    x = torch.randn(T, B, IN)
    y, state = layer(x)
    assert isinstance(state, list) and [s.shape[-1] for s in state[0]] == [H, H]
    assert state[1].shape == (B, 4) and y.shape == (T, B, 4)
    torch.testing.assert_close(layer(x[2:], layer(x[:2])[1])[0], y[2:])
    one = layer(x[:, 0])
    torch.testing.assert_close(one[0], y[:, 0])
    assert one[1][1].shape == (4,)
    torch.testing.assert_close(layer(x[2:, 0], layer(x[:2, 0])[1])[0], y[2:, 0])
    with pytest.raises(RuntimeError, match=r"state of cells.1 must be a tuple of 2 like that of "):
        Recurrent(cells, 2)(x)


def test_any_dimensions() -> None:
    """Token ids in, images in: what lies behind T and B is the cell's."""

    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.cell = nn.Embedding(9, IN), nn.GRUCell(IN, H)

        def initial_state(self, ids: Tensor) -> Tensor:
            return torch.zeros(ids.size(0), H)

        def forward(self, ids: Tensor, h: Tensor) -> Any:
            h = self.cell(self.table(ids), h)
            return h, h

    ids = torch.randint(9, (T, B))
    layer = Recurrent(Ids())
    y, _ = layer(ids, lengths=LENGTHS)
    want = Recurrent(layer.cells[0].cell)(layer.cells[0].table(ids), lengths=LENGTHS)[0]
    torch.testing.assert_close(y, want)
    known = Recurrent(layer.cells[0], feature_dims=0)
    torch.testing.assert_close(known(ids[:, 1])[0], layer(ids)[0][:, 1])

    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv2d(4, 2, 3, padding=1)

        def initial_state(self, x: Tensor) -> Tensor:
            return x.new_zeros(x.size(0), 2, *x.shape[2:])

        def forward(self, x: Tensor, h: Tensor) -> Any:
            h = torch.tanh(self.mix(torch.cat([x, h], 1)))
            return h, h

    y, h = Recurrent(Image())(torch.randn(T, B, 2, 8, 8), lengths=LENGTHS, reset=RESET)
    assert y.shape == (T, B, 2, 8, 8) and h.shape == (1, B, 2, 8, 8)


def test_a_cell_without_tensors_in_its_state() -> None:
    class Plain(nn.Linear):
        def initial_state(self, x: Tensor) -> Any:
            return ()

        def forward(self, x: Tensor, state: Any) -> Any:  # type: ignore[override]
            return super().forward(x), state

    x = torch.randn(T, B, IN)
    layer = Recurrent(Plain(IN, H))
    y, state = layer(x, lengths=LENGTHS, reset=RESET)
    assert y.shape == (T, B, H) and state == ()
