"""Bad input: torch.nn's exception and words where it has them, else ours; nothing changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import cases
import pytest
import tolerance
import torch
from test_modules import CELLS, LAYERS, leaves_of, pair
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast

f64 = torch.float64


def caught(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as info:
        call()
    return info.value


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


# Calls of a layer (input_size 5, hidden_size 9) that torch.nn refuses in Python, before its kernel.
# lambda lstm: (input, hx); lstm tells whether the state is a pair.
LAYER_CALLS: dict[str, Callable[[bool], tuple[Any, Any]]] = {
    "rank 1": lambda lstm: (rand(5), None),
    "rank 4": lambda lstm: (rand(2, 3, 4, 5), None),
    "rank 0": lambda lstm: (torch.tensor(1.0), None),
    "input size": lambda lstm: (rand(4, 3, 6), None),
    "input size, unbatched": lambda lstm: (rand(4, 6), None),
    "input size, packed": lambda lstm: (pack_padded_sequence(rand(4, 3, 6), [4, 2, 1]), None),
    "dtype": lambda lstm: (rand(4, 3, 5, dtype=f64), None),
    "half": lambda lstm: (rand(4, 3, 5).half(), None),
    "integers": lambda lstm: (torch.ones(4, 3, 5, dtype=torch.int64), None),
    "booleans": lambda lstm: (torch.ones(4, 3, 5, dtype=torch.bool), None),
    "complex": lambda lstm: (torch.ones(4, 3, 5, dtype=torch.complex64), None),
    "no steps": lambda lstm: (rand(0, 3, 5), None),
    "hx batch": lambda lstm: (rand(4, 3, 5), states(lstm, 1, 4, 9)),
    "hx layers": lambda lstm: (rand(4, 3, 5), states(lstm, 2, 3, 9)),
    "hx size": lambda lstm: (rand(4, 3, 5), states(lstm, 1, 3, 8)),
    "hx rank 2": lambda lstm: (rand(4, 3, 5), states(lstm, 1, 9)),
    "hx rank 3, unbatched": lambda lstm: (rand(4, 5), states(lstm, 1, 3, 9)),
    "hx size, unbatched": lambda lstm: (rand(4, 5), states(lstm, 1, 8)),
    "hx, packed": lambda lstm: (
        pack_padded_sequence(rand(4, 3, 5), [4, 2, 1]),
        states(lstm, 1, 2, 9),
    ),
    "hx transposed": lambda lstm: (rand(4, 3, 5), states(lstm, 3, 1, 9)),
}


def states(lstm: bool, *shape: int) -> Any:
    return (rand(*shape), rand(*shape)) if lstm else rand(*shape)


@pytest.mark.parametrize("what", LAYER_CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_errors_are_those_of_torch(name: str, what: str) -> None:
    ours, theirs = pair(name, 5, 9)
    x, hx = LAYER_CALLS[what](name == "LSTM")
    want, got = caught(lambda: theirs(x, hx)), caught(lambda: ours(x, hx))
    assert type(got) is type(want)
    if name == "LSTM" and "packed" in what:
        # nn.LSTM leaves a packed input to its kernel's words; nn.GRU and nn.RNN check it in theirs
        gru = nn.GRU(5, 9)
        want = caught(lambda: gru(x, None if hx is None else hx[0]))
        want = type(want)(str(want).replace("hidden size", "hidden[0] size"))
    assert str(got) == str(want)


LSTM_CALLS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "cx size": lambda: (rand(4, 3, 5), (rand(1, 3, 9), rand(1, 3, 8))),
    "cx batch": lambda: (rand(4, 3, 5), (rand(1, 3, 9), rand(1, 2, 9))),
    "cx rank": lambda: (rand(4, 3, 5), (rand(1, 3, 9), rand(1, 9))),
    "cx rank, unbatched": lambda: (rand(4, 5), (rand(1, 9), rand(1, 3, 9))),
}


@pytest.mark.parametrize("what", LSTM_CALLS)
def test_lstm_errors_are_those_of_torch(what: str) -> None:
    ours, theirs = pair("LSTM", 5, 9)
    x, hx = LSTM_CALLS[what]()
    want, got = caught(lambda: theirs(x, hx)), caught(lambda: ours(x, hx))
    assert (type(got), str(got)) == (type(want), str(want))


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_projected_state(name: str) -> None:
    options = {"proj_size": 4} if name == "LSTM" else {"bidirectional": True}
    ours, theirs = pair(name, 5, 9, **options)
    hx = states(name == "LSTM", 1, 3, 9)
    want, got = (caught(lambda m=m: m(rand(4, 3, 5), hx)) for m in (theirs, ours))
    assert (type(got), str(got)) == (type(want), str(want))


CONSTRUCTIONS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((5, 0), {}),
    ((5, -3), {}),
    ((0, 9), {}),
    ((5, 9.0), {}),
    ((5.0, 9), {}),
    ((5, 9, 0), {}),
    ((5, 9), {"dropout": 1.5}),
    ((5, 9), {"dropout": -0.1}),
    ((5, 9), {"dropout": "lots"}),
    ((5, 9), {"bias": 1}),
    ((5, 9), {"batch_first": None}),
    ((5, 9), {"proj_size": 9}),
    ((5, 9), {"proj_size": -1}),
    ((5, 9), {"unknown": 1}),
    ((), {}),
]


@pytest.mark.parametrize(("args", "options"), CONSTRUCTIONS)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_construction_errors_are_those_of_torch(
    name: str, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    want = caught(lambda: getattr(nn, name)(*args, **options))
    got = caught(lambda: getattr(rnnfast, name)(*args, **options))
    assert type(got) is type(want)
    if not isinstance(want, TypeError) or "should be of type" in str(want):
        assert str(got) == str(want)


def test_unknown_nonlinearity_is_refused() -> None:
    for module in (nn.RNN, rnnfast.RNN):
        with pytest.raises(
            ValueError, match="Unknown nonlinearity 'gelu'. Select from 'tanh' or 'relu'."
        ):
            module(5, 9, nonlinearity="gelu")
    for cell in (nn.RNNCell, rnnfast.RNNCell):
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: gelu"):
            cell(5, 9, nonlinearity="gelu")(rand(3, 5))


def test_dropout_on_one_layer_warns_as_torch_does() -> None:
    with pytest.warns(
        UserWarning, match="dropout option adds dropout after all but last recurrent layer"
    ):
        rnnfast.LSTM(5, 9, dropout=0.5)


CELL_CALLS: dict[str, Callable[[bool], tuple[Any, Any]]] = {
    "rank 3": lambda lstm: (rand(2, 3, 5), None),
    "rank 0": lambda lstm: (torch.tensor(1.0), None),
    "input size": lambda lstm: (rand(3, 6), None),
    "hidden size": lambda lstm: (rand(3, 5), states(lstm, 3, 8)),
    "hidden batch": lambda lstm: (rand(3, 5), states(lstm, 2, 9)),
    "hidden rank": lambda lstm: (rand(3, 5), states(lstm, 1, 3, 9)),
}


@pytest.mark.parametrize("what", CELL_CALLS)
@pytest.mark.parametrize("name", CELLS)
def test_cell_errors_are_those_of_torch(name: str, what: str) -> None:
    ours, theirs = pair(name, 5, 9)
    x, hx = CELL_CALLS[what](name == "LSTMCell")
    want, got = caught(lambda: theirs(x, hx)), caught(lambda: ours(x, hx))
    assert type(got) is type(want)
    assert str(got) == str(want)


# --------------------------------------------------------- where torch.nn has no words of its own


@pytest.mark.parametrize("name", LAYERS)
def test_replaced_weight_of_another_size(name: str) -> None:
    layer, _ = pair(name, 5, 9)
    rows = layer.weight_hh_l0.shape[0]
    layer.weight_hh_l0 = nn.Parameter(rand(rows, 7))
    with pytest.raises(
        RuntimeError, match=rf"rnnfast: w_hh must have shape .*\({rows}, 9\), got \({rows}, 7\)"
    ):
        layer(rand(4, 3, 5))
    layer, _ = pair(name, 5, 9)
    layer.bias_ih_l0 = nn.Parameter(rand(rows + 1))
    with pytest.raises(RuntimeError, match="rnnfast: b_ih must have shape"):
        layer(rand(4, 3, 5))


@pytest.mark.parametrize("name", CELLS)
def test_replaced_weight_of_a_cell(name: str) -> None:
    """torch's cells check their weights in words of their own; where they do not, ours serve."""
    for change in ("weight_hh", "weight_ih", "bias_hh", "bias_ih"):
        ours, theirs = pair(name, 5, 9)
        for cell in (ours, theirs):
            value = getattr(cell, change)
            setattr(cell, change, nn.Parameter(value.detach()[..., :-2].clone()))
        want, got = (caught(lambda m=m: m(rand(3, 5))) for m in (theirs, ours))
        assert type(got) is type(want)
        assert str(got) == str(want) or str(got).startswith("rnnfast: "), str(got)


@pytest.mark.parametrize("name", LAYERS)
def test_mixed_dtypes_and_devices(name: str) -> None:
    lstm = name == "LSTM"
    layer, _ = pair(name, 5, 9)
    hx = (rand(1, 3, 9, dtype=f64),) * 2 if lstm else rand(1, 3, 9, dtype=f64)
    with pytest.raises((RuntimeError, ValueError), match="(?i)dtype|float64|double"):
        layer(rand(4, 3, 5), hx)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        layer(rand(4, 3, 5).to("meta"))
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach().double())
    with pytest.raises((RuntimeError, ValueError), match="(?i)dtype|float64|double"):
        layer(rand(4, 3, 5))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_unsupported_dtype_says_what_works(name: str, dtype: torch.dtype) -> None:
    layer = pair(name, 5, 9)[0].to(dtype)
    with pytest.raises(RuntimeError, match=rf"rnnfast: .*{str(dtype).split('.')[1]}.*reference"):
        layer(rand(4, 3, 5).to(dtype))
    if dtype.is_complex and "relu" not in name:
        with rnnfast.use_engine("reference"):
            assert layer(rand(4, 3, 5).to(dtype))[0].dtype == dtype


def test_things_that_are_no_tensors() -> None:
    for name in LAYERS:
        ours, theirs = pair(name, 5, 9)
        for x in (None, [[1.0] * 5], 3, "abc"):
            want, got = caught(lambda: theirs(x)), caught(lambda: ours(x))  # noqa: B023
            assert type(got) is type(want)


def packed(rows: int, sizes: list[int]) -> PackedSequence:
    return PackedSequence(rand(rows, 5), torch.tensor(sizes, dtype=torch.int64))


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (6, [3, 2]),
        (4, [3, 2]),
        (5, [2, 3]),
        (3, [3, 0]),
        (2, [3, -1]),
        (0, []),
        (3, [2**62, 2**62, 3]),
    ],
)
@pytest.mark.parametrize("name", LAYERS)
def test_hand_made_packed_sequences(name: str, rows: int, sizes: list[int]) -> None:
    """Batch sizes that don't add up, increase, vanish, are negative or overflow."""
    layer, _ = pair(name, 5, 9)
    with pytest.raises((RuntimeError, IndexError)):
        layer(packed(rows, sizes))
    y, _ = layer(packed(5, [3, 2]))
    assert torch.isfinite(y.data).all()


BATCH_SIZES = {
    "grows": ([2, 3], "batch_sizes must be positive and must not grow, got 3 at step 1"),
    "too many": ([2, 2, 2], "x must have as many rows as batch_sizes add up to, got 5 rows"),
    "negative": ([5, -1], "batch_sizes must be positive and must not grow, got -1 at step 1"),
    "none": ([], "x must hold at least one step (T >= 1), got T = 0"),
    "zero": ([0], "batch_sizes must be positive and must not grow, got 0 at step 0"),
    "huge": ([2**62, 5], f"batch_sizes must be positive and must not grow, got {2**62} at step 0"),
    "matrix": (
        [[2, 3]],
        "batch_sizes must be a one-dimensional int64 CPU tensor of shape (T,), got (1, 2) of int64",
    ),
}


@pytest.mark.parametrize("what", BATCH_SIZES)
@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_bad_batch_sizes_in_the_same_words(name: str, engine: str, what: str) -> None:
    """The reference engine never reaches the operators, and refuses what they refuse."""
    sizes, text = BATCH_SIZES[what]
    layer, _ = pair(name, 5, 9)
    x = PackedSequence(rand(5, 5), torch.tensor(sizes, dtype=torch.int64))
    with rnnfast.use_engine(engine), pytest.raises(RuntimeError, match=re.escape(text)):
        layer(x)
    hx = states(name == "LSTM", 1, 5, 9)  # a state fits [5, -1] alone
    with rnnfast.use_engine(engine), pytest.raises(RuntimeError):
        layer(x, hx)


@pytest.mark.parametrize("route", ["cpu", "reference", "meta"])
def test_wrong_weights_in_the_same_words(route: str) -> None:
    """Kernel, reference engine and fake kernel (meta tensors) check the weights alike."""

    def message(change: str, value: Tensor) -> str:
        layer = rnnfast.LSTM(5, 9, proj_size=4)
        setattr(layer, change, nn.Parameter(value))
        if route == "meta":
            layer = layer.to("meta")
        x = rand(4, 3, 5).to("meta" if route == "meta" else "cpu")
        with rnnfast.use_engine("reference" if route == "reference" else "auto"):
            error = caught(lambda: layer(x))
        assert type(error) is RuntimeError
        return str(error)

    shape = "rnnfast: {} must have shape {}, got {}"
    w_hr = shape.format("w_hr", "(P, H) = (4, 9)", "{}")
    assert message("weight_hr_l0", rand(4, 8)) == w_hr.format("(4, 8)")
    assert message("weight_hr_l0", rand(36)) == shape.format("w_hr", "(P, H)", "(36,)")
    text = "rnnfast: w_hr must have the dtype of x, float32, got float64"
    assert message("weight_hr_l0", rand(4, 9, dtype=f64)) == text
    text = "rnnfast: w_hh must have the dtype of x, float32, got float64"
    assert message("weight_hh_l0", rand(36, 4, dtype=f64)) == text
    w_hh = shape.format("w_hh", "(G*H, P) = (36, 4)", "(36, 9)")
    assert message("weight_hh_l0", rand(36, 9)) == w_hh
    b_hh = shape.format("b_hh", "(G*H,) = (36,)", "(35,)")
    assert message("bias_hh_l0", rand(35)) == b_hh


def test_meta_layers_run_and_refuse_wrong_states() -> None:
    args = (rand(4, 3, 5), rand(3, 9), None, rand(27, 5), rand(27, 9), *[None] * 6)
    args = tuple(a if a is None else a.to("meta") for a in args)
    forward = torch.ops.rnnfast.forward
    assert forward(*args, 1, False, False)[0].shape == (4, 3, 9)
    for h0 in (rand(2, 9), rand(3, 8), rand(1, 3, 9), rand(3, 9, dtype=f64)):
        with pytest.raises(RuntimeError, match="rnnfast: h0 must have"):
            forward(args[0], h0.to("meta"), *args[2:], 1, False, False)


FUNCTIONAL_CALLS: dict[str, Callable[[list[Tensor]], Any]] = {
    "too few weights": lambda w: rnnfast.functional.lstm(rand(4, 3, 5), None, w[:3]),
    "too many weights": lambda w: rnnfast.functional.lstm(rand(4, 3, 5), None, [*w, *w]),
    "no weights": lambda w: rnnfast.functional.lstm(rand(4, 3, 5), None, []),
    "layers": lambda w: rnnfast.functional.lstm(rand(4, 3, 5), None, w, num_layers=2),
    "directions": lambda w: rnnfast.functional.lstm(rand(4, 3, 5), None, w, bidirectional=True),
    "another cell": lambda w: rnnfast.functional.gru(rand(4, 3, 5), None, w),
    "rank": lambda w: rnnfast.functional.lstm(rand(5), None, w),
    "size": lambda w: rnnfast.functional.lstm(rand(4, 3, 6), None, w),
    "state": lambda w: rnnfast.functional.lstm(rand(4, 3, 5), (rand(1, 2, 9), rand(1, 2, 9)), w),
    "half a state": lambda w: rnnfast.functional.lstm(rand(4, 3, 5), (rand(1, 3, 9),), w),
    "no steps": lambda w: rnnfast.functional.lstm(rand(0, 3, 5), None, w),
    "transposed weight": lambda w: rnnfast.functional.lstm(rand(4, 3, 5), None, [w[0].t(), *w[1:]]),
}


@pytest.mark.parametrize("what", FUNCTIONAL_CALLS)
def test_functional_refuses(what: str) -> None:
    weights = [rand(36, 5), rand(36, 9), rand(36), rand(36)]
    kept = cases.clones(weights)
    with pytest.raises((RuntimeError, ValueError)):
        FUNCTIONAL_CALLS[what](weights)
    assert all(tolerance.same_bits(a, b) for a, b in zip(weights, kept, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_a_failing_layer_call_changes_nothing(name: str) -> None:
    layer, theirs = pair(name, 5, 9)
    x = rand(4, 3, 5)
    want = layer(x)
    for what in LAYER_CALLS:
        bad, hx = LAYER_CALLS[what](name == "LSTM")
        caught(lambda: layer(bad, hx))  # noqa: B023
    for a, b in zip(layer.parameters(), theirs.parameters(), strict=True):
        assert tolerance.same_bits(a.detach(), b.detach())
    for a, b in zip(leaves_of(layer(x)), leaves_of(want), strict=True):
        assert tolerance.same_bits(a.detach(), b.detach())
