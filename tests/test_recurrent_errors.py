"""What bad cells and bad calls of Recurrent get: a sentence, and where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_recurrent import IN, LENGTHS, RESET, B, H, T
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from rnnfast import Recurrent

WRONG = [
    (lambda: Recurrent(3), TypeError, "takes a cell .* got int"),
    (lambda: Recurrent(nn.LSTMCell), TypeError, "got the class LSTMCell"),
    (lambda: Recurrent(lambda k, d: 3), TypeError, "got int for layer 0, direction 0"),
    (lambda: Recurrent([nn.GRUCell(1, 1)] * 2, 2), ValueError, "one GRUCell twice"),
    (lambda: Recurrent(nn.GRUCell(1, 1), 2), ValueError, "needs 2 cells .* got one module"),
    (lambda: Recurrent([nn.GRUCell(1, 1)], 2), ValueError, "needs 2 cells .* got 1"),
    (lambda: Recurrent(nn.GRUCell(1, 1), dropout=1.0), ValueError, r"lie in \[0, 1\), got 1.0"),
    (lambda: Recurrent(nn.GRUCell(1, 1), dropout="a"), ValueError, "got 'a'"),
    (lambda: Recurrent(nn.GRUCell(1, 1), 0), ValueError, "num_layers .* >= 1, got 0"),
    (lambda: Recurrent(nn.GRUCell(1, 1), feature_dims=-1), ValueError, "feature_dims .* got -1"),
]


@pytest.mark.parametrize(("make", "kind", "text"), WRONG, ids=[w[2] for w in WRONG])
def test_what_is_no_layer(make: Any, kind: Any, text: str) -> None:
    with pytest.raises(kind, match=f"^rnnfast: .*{text}"):
        make()


def test_dropout_of_one_layer_warns() -> None:
    with pytest.warns(UserWarning, match="dropout=0.5 does nothing"):
        Recurrent(nn.GRUCell(1, 1), dropout=0.5)


X = torch.randn(T, B, IN)
TRUE = torch.ones(T, B, dtype=torch.bool)
CALLS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no steps": (X[:0], {}, r"at least one step \(T >= 1\), got T = 0"),
    "no tensor": ([], {}, "input must hold a tensor, got a list of 0"),
    "none": (None, {}, "input must be a tensor, or tuples, lists or dicts of them, got NoneType"),
    "dimensions": (X[0, 0], {}, r"input must have 3 dimensions, 2 if unbatched.*\(5,\)"),
    "nested": ((X, X), {}, r"input of cells.0 \(LSTMCell\) must be a tensor, got a tuple of 2"),
    "batches": ((X, X[:, :2]), {}, r"input\[1\] must begin with \(T, B\) = \(6, 3\).*\(6, 2\)"),
    "state": (X, {"hx": X}, r"hx must be \(D\*L, B, \*\) with D\*L = 1, got \(6, 3, 5\)"),
    "one state": (X, {"hx": torch.zeros(1, B, H)}, r"hx for cells.0.* a tuple of 2, got a tensor"),
    "width": (X, {"hx": (torch.zeros(1, B, 4),) * 2}, r"\[0\] must have shape \(3, 7\).*\(3, 4\)"),
    "dtype": (X, {"hx": (torch.zeros(1, B, H).double(),) * 2}, "got .* of torch.float64"),
    "mask": (X, {"mask": TRUE.t()}, r"mask must be a bool .* \(T, B\) = \(6, 3\), got \(3, 6\)"),
    "mask type": (X, {"mask": TRUE.int()}, "mask must be a bool tensor .* got .* of torch.int32"),
    "reset": (X, {"reset": 1}, "reset must be a bool tensor .* got int"),
    "both": (X, {"mask": TRUE, "lengths": LENGTHS}, "lengths or mask .* got both"),
    "lengths": (X, {"lengths": torch.tensor([1, 2, 9])}, "at most T = 6, got 9 at row 2"),
    "lengths type": (X, {"lengths": [1, 2, 3]}, "lengths must be an integer tensor .* got list"),
    "lengths of one": (X[:, 0], {"lengths": LENGTHS}, "lengths are for batched input"),
    "packed": (
        pack_padded_sequence(X, LENGTHS, enforce_sorted=False),
        {"mask": TRUE},
        "mask is for padded input, got a PackedSequence",
    ),
    "packed inside": (
        [pack_padded_sequence(X, LENGTHS, enforce_sorted=False)],
        {},
        r"input\[0\] must be a tensor, .* got PackedSequence",
    ),
    "sparse": (X.to_sparse(), {}, "must be a dense tensor"),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_calls(name: str) -> None:
    layer = Recurrent(nn.LSTMCell(IN, H))
    x, call, text = CALLS[name]
    with pytest.raises((RuntimeError, NotImplementedError), match=f"rnnfast: .*{text}"):
        layer(x, **call)


class Odd(nn.Module):
    """Returns what a test wants it to."""

    def __init__(self, result: Any, start: Any = lambda x: {"h": x.new_zeros(B, H)}) -> None:
        super().__init__()
        self.result, self.t = result, -1
        if start is not None:
            self.initial_state = start

    def forward(self, x: Any, state: Any) -> Any:
        self.t += 1
        return self.result(self.t, x, state)


ODD: dict[str, tuple[Any, str]] = {
    "state only": (Odd(lambda t, x, s: s), r"must return a tuple \(output, state\).*a dict of 'h'"),
    "three": (Odd(lambda t, x, s: (x, s, s)), r"must return a tuple .* got a tuple of 3"),
    "another structure": (
        Odd(lambda t, x, s: (x, s["h"])),
        r"state of cells.0 \(Odd\) must be a dict of 'h', got a tensor",
    ),
    "another shape": (
        Odd(lambda t, x, s: (x, {"h": s["h"][:, : H - t]})),
        r"state of cells.0 \(Odd\)\['h'\] must have shape \(3, 7\).*got \(3, 6\).* at step 1",
    ),
    "another dtype": (
        Odd(lambda t, x, s: (x, {"h": s["h"].double()})),
        r"\['h'\] must have .* of torch.float32, got .* of torch.float64 at step 0",
    ),
    "no batch": (Odd(lambda t, x, s: (x.sum(), s)), r"output of .* must have shape \(B, \*\)"),
    "outputs that change": (
        Odd(lambda t, x, s: (x[:, t:], s)),
        r"output of .* one shape \(B, \*\) at all steps.* got \(3, 4\) at step 1",
    ),
    "a list that grows": (
        Odd(lambda t, x, s: ([x] * (t + 1), s)),
        r"output of .* must be a list of 1, got a list of 2",
    ),
    "no start": (Odd(lambda t, x, s: (x, s), None), r"no method initial_state, and hx was not giv"),
    "another batch": (
        Odd(lambda t, x, s: (x, s), lambda x: (x.new_zeros(1, H),)),
        r"initial_state of cells.0 \(Odd\)\[0\] must have shape \(B, \*\) with B = 3, got \(1, 7\)",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_cells(name: str) -> None:
    cell, text = ODD[name]
    with pytest.raises(RuntimeError, match=f"rnnfast: Recurrent: .*{text}"):
        Recurrent(cell)(X)


def test_a_cell_that_has_no_start() -> None:
    """It takes the caller's state; a reset has nothing to go back to."""
    layer = Recurrent(Odd(lambda t, x, s: (x + s["h"], {"h": s["h"] + 1}), None))
    hx = {"h": torch.zeros(1, B, IN)}
    y, state = layer(X, hx, lengths=LENGTHS)
    torch.testing.assert_close(state["h"][0, :, 0], LENGTHS.float())
    torch.testing.assert_close(y[1, 0], X[1, 0] + 1)
    with pytest.raises(RuntimeError, match="no method initial_state, and reset was given"):
        layer(X, hx, reset=RESET)
    with pytest.raises(RuntimeError, match=r"hx for cells.0 \(Odd\)\['h'\] must have .* B = 3"):
        layer(X, {"h": torch.zeros(1, 2, IN)})


def test_two_directions_need_features() -> None:
    def cells(k: int, d: int) -> nn.Module:
        return Odd(lambda t, x, s: (x.sum(-1), s))

    with pytest.raises(RuntimeError, match="output of two directions must have .* concatenated"):
        Recurrent(cells, bidirectional=True)(X)


def test_states_of_other_types_are_not_stacked() -> None:
    class Typed(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.dtype = dtype

        def initial_state(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(x.size(0), 1, dtype=self.dtype)

        def forward(self, x: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, s + 1

    cells = [Typed(torch.int64), Typed(torch.float32)]
    with pytest.raises(RuntimeError, match="of torch.int64 like that of cells.0, got .*float32"):
        Recurrent(cells, 2)(torch.randn(T, B, IN))
    _, (first, second) = Recurrent(cells, 2, stack_states=False)(torch.randn(T, B, IN))
    assert first.dtype == torch.int64
    assert second.dtype == torch.float32


def test_an_output_without_tensors_is_no_input() -> None:
    class Bare(nn.Module):
        def initial_state(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(x.size(0), 1)

        def forward(self, x: torch.Tensor, s: torch.Tensor) -> Any:
            return (), s

    with pytest.raises(RuntimeError, match="input of cells.1 .* must hold a tensor"):
        Recurrent([Bare(), Bare()], 2)(torch.randn(T, B, IN))
    with pytest.raises(TypeError, match="takes a cell .* got Tensor"):
        Recurrent(torch.zeros(()))  # type: ignore[arg-type]
    bare = Bare()
    bare.initial_state = 3  # type: ignore[assignment, method-assign]
    with pytest.raises(RuntimeError, match="initial_state of cells.0 .* must be a method, got int"):
        Recurrent(bare)(torch.randn(T, B, IN))
