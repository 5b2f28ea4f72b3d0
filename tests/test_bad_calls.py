"""Every public call with what it does not take: torch.nn's type of error where torch.nn has the
call, words that say what was expected, and no tensor changed. (test_errors.py has the calls whose
words are torch.nn's.)"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from test_errors import caught, rand
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from rnnfast import functional

KINDS = ("LSTM", "GRU", "RNN", "IndRNN")
# Words of torch.nn's that say what was expected. (Those of a missing method are not among them.)
WORDS = re.compile(
    r"^rnnfast: |\(rnnfast: |Expected (hidden|sequence|input)|^input\.size\(-1\) must|"
    r"^Input and (parameter|hidden) tensors are not|^For (un)?batched |"
    r"^RNN input dtype|expects two hidden states|Expected (input|hx|hidden)[\[\]\d]* to be|"
    r"^input must have|^(input|hidden\d?) has inconsistent|should be of type|^Unknown nonlinearity|"
    r"unexpected keyword argument|^dropout should be|^weight_ih first dim must"
)
Make = Callable[[], Any]

NO_TENSORS: dict[str, Make] = {
    "None": lambda: None,
    "list": lambda: [[[1.0] * 5] * 3] * 4,
    "array": lambda: np.zeros((4, 3, 5), np.float32),
    "str": lambda: "abc",
    "int": lambda: 3,
    "bool": lambda: True,
    "dict": lambda: {"a": 1},
    "tuple": lambda: (rand(4, 3, 5),),
    "module": lambda: nn.Linear(2, 2),
}
# as an input of the right shape; what works (conjugates, negatives) is not among them
STRANGE: dict[str, Make] = {
    "int64": lambda: torch.ones(4, 3, 5, dtype=torch.int64),
    "bool": lambda: torch.ones(4, 3, 5, dtype=torch.bool),
    "complex": lambda: torch.ones(4, 3, 5, dtype=torch.complex64),
    "half": lambda: rand(4, 3, 5).half(),
    "float8": lambda: rand(4, 3, 5).to(torch.float8_e5m2),
    "sparse": lambda: rand(4, 3, 5).to_sparse(),
    "mkldnn": lambda: rand(4, 3, 5).to_mkldnn(),
    "csr": lambda: rand(4, 5).to_sparse_csr(),
    "jagged": lambda: torch.nested.nested_tensor([rand(3, 5), rand(2, 5)], layout=torch.jagged),
    "meta": lambda: rand(4, 3, 5).to("meta"),
    "no features": lambda: rand(4, 3, 0),
    "no steps": lambda: rand(0, 3, 5),
    "number": lambda: torch.tensor(1.0),
    "5-D": lambda: rand(1, 1, 1, 1, 5),
}
if not torch.backends.mkldnn.is_available():
    del STRANGE["mkldnn"]


def x() -> Tensor:
    return rand(4, 3, 5)


def packed() -> PackedSequence:
    return pack_padded_sequence(x(), [4, 2, 1])


def state(kind: str) -> Any:
    return (rand(1, 3, 9), rand(1, 3, 9)) if kind == "LSTM" else rand(1, 3, 9)


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors_of(one)


def picture(values: Any) -> list[Any]:
    found = []
    for tensor in tensors_of(values):
        if nn.parameter.is_lazy(tensor):
            continue
        numbers: Any = tensor.shape
        with suppress(RuntimeError):  # of a tensor without numbers
            numbers = tensor.detach().to_dense().tolist()
        found.append((id(tensor), tensor._version, str(numbers)))
    return found


def check(ours: Callable[..., Any], args: tuple[Any, ...], theirs: Any = None, **given: Any) -> str:
    """The call raises in words; its type of error is torch.nn's, where torch.nn has the call."""
    before = picture((ours, *args, *given.values()))
    error = caught(lambda: ours(*args, **given))
    said = f"{type(error).__name__}: {error}"
    if theirs is not None:
        want = caught(lambda: theirs(*args, **given))
        assert isinstance(error, type(want)), f"{said}; torch.nn: {type(want).__name__}: {want}"
        if str(error) == str(want) and not isinstance(want, (AttributeError, IndexError, KeyError)):
            return said
    # str() of a KeyError has quotes around it
    assert WORDS.search(str(error.args[0])), said
    assert picture((ours, *args, *given.values())) == before
    return said


def layers(kind: str) -> tuple[Any, Any]:
    ours = getattr(rnnfast, kind)(5, 9)
    return ours, getattr(nn, kind)(5, 9) if hasattr(nn, kind) else None


# --------------------------------------------------------------------------- layers


@pytest.mark.parametrize("what", NO_TENSORS)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_no_tensors(kind: str, what: str) -> None:
    ours, theirs = layers(kind)
    make = NO_TENSORS[what]
    lengths, reset = torch.tensor([4, 2, 1]), torch.zeros(4, 3, dtype=torch.bool)
    check(ours, (make(),), theirs)
    said = check(ours, (make(),), lengths=lengths)
    assert said == check(ours, (make(),), reset=reset)
    assert said.startswith("AttributeError: rnnfast: input must be a tensor or a PackedSequence")
    check(ours.step, (make(),))
    if what == "None":
        return
    for given in (x(), packed(), rand(4, 5)):
        # of a packed input torch.nn calls the array's size, which is a number
        same = not (what == "array" and kind != "LSTM" and isinstance(given, PackedSequence))
        check(ours, (given, make()), theirs if same else None)
        check(ours, (given,), reset=make())
        check(ours, (given,), lengths=make())
    check(ours.step, (rand(3, 5), make()))
    check(ours.step, (rand(3, 5), None, make()))


@pytest.mark.parametrize("what", NO_TENSORS)
def test_half_of_a_pair_is_no_tensor(what: str) -> None:
    ours, theirs = layers("LSTM")
    make = NO_TENSORS[what]
    for given, h in ((x(), rand(1, 3, 9)), (packed(), rand(1, 3, 9)), (rand(4, 5), rand(1, 9))):
        for hx in ((h, make()), (make(), h), [make(), make()]):
            check(ours, (given, hx), theirs)
    for hx in ((rand(1, 3, 9), make()), (make(), rand(1, 3, 9))):
        check(ours.step, (rand(3, 5), hx))


PAIRS: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda h: (),
    "one": lambda h: (h,),
    "three": lambda h: (h, h, h),
    "nested": lambda h: ((h, h), h),
    "one nested": lambda h: ((h, h),),
    "two None": lambda h: (None, None),
    "one tensor": lambda h: h,
    "two in one tensor": lambda h: torch.stack([h, h]),
    "number": lambda h: torch.tensor(1.0),
    "lists": lambda h: [[1.0]],
    "dict": lambda h: {0: h, 1: h},
    "empty dict": lambda h: {},
}


@pytest.mark.parametrize("what", PAIRS)
def test_wrong_pairs(what: str) -> None:
    ours, theirs = layers("LSTM")
    for given, h in ((x(), rand(1, 3, 9)), (packed(), rand(1, 3, 9)), (rand(4, 5), rand(1, 9))):
        # without a batch torch.nn takes the first two of whatever has two
        taken = h.dim() == 2 and what in ("three", "two in one tensor", "dict")
        check(ours, (given, PAIRS[what](h)), None if taken else theirs)
    check(ours.step, (rand(3, 5), PAIRS[what](rand(1, 3, 9))))


@pytest.mark.parametrize("what", STRANGE)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_strange_tensors(kind: str, what: str) -> None:
    ours, theirs = layers(kind)
    make = STRANGE[what]
    said = check(ours, (make(),), theirs)
    if what in ("sparse", "mkldnn", "csr", "jagged"):
        assert "must be a dense tensor (torch.strided), got " in said
    check(ours, (make(),), lengths=torch.tensor([4, 2, 1]))
    hx = (make(), make()) if kind == "LSTM" else make()
    check(ours, (x(), hx), theirs)
    check(ours.step, (make(),))
    check(ours.step, (rand(3, 5), hx))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "int64": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "double": lambda t: t.double(),
    "float8": lambda t: t.to(torch.float8_e5m2),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
}
if "mkldnn" in STRANGE:
    LAYOUTS["mkldnn"] = lambda t: t.to_mkldnn()


@pytest.mark.parametrize("what", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_states_of_the_right_shape(kind: str, what: str) -> None:
    ours, theirs = layers(kind)
    turn, h = LAYOUTS[what], rand(1, 3, 9)
    if kind != "LSTM":
        taken = what == "sparse" and kind == "RNN"  # by torch.nn
        check(ours, (x(), turn(h)), None if taken else theirs)
        check(ours.step, (rand(3, 5), turn(h)))
        return
    for hx in ((turn(h), turn(h)), (h, turn(h)), (turn(h), h)):
        # torch.nn's LSTM takes a sparse h_0 beside a dense c_0
        taken = what == "sparse" and hx[1] is h
        check(ours, (x(), hx), None if taken else theirs)
        check(ours.step, (rand(3, 5), hx))


LENGTHS: dict[str, Make] = {
    "list": lambda: [4, 2, 1],
    "array": lambda: np.array([4, 2, 1]),
    "zero": lambda: torch.tensor([4, 0, 1]),
    "negative": lambda: torch.tensor([4, -1, 1]),
    "above T": lambda: torch.tensor([4, 5, 1]),
    "huge": lambda: torch.tensor([4, 2**62, 1]),
    "least": lambda: torch.tensor([4, -(2**63), 1]),
    "float": lambda: torch.tensor([4.0, 2.0, 1.0]),
    "float with a gradient": lambda: torch.tensor([4.0, 2.0, 1.0], requires_grad=True),
    "bool": lambda: torch.tensor([True, True, True]),
    "complex": lambda: torch.tensor([4j, 2, 1]),
    "matrix": lambda: torch.tensor([[4, 2, 1]]),
    "number": lambda: torch.tensor(4),
    "too few": lambda: torch.tensor([4, 2]),
    "too many": lambda: torch.tensor([4, 2, 1, 1]),
    "none": lambda: torch.tensor([], dtype=torch.int64),
    "sparse": lambda: torch.tensor([4, 2, 1]).to_sparse(),
    "meta": lambda: torch.tensor([4, 2, 1], device="meta"),
    "packed": packed,
}


@pytest.mark.parametrize("what", LENGTHS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_wrong_lengths(kind: str, what: str) -> None:
    ours, _ = layers(kind)
    for given in (x(), packed(), rand(4, 5), rand(0, 3, 5), rand(4, 3, 6), x().double()):
        check(ours, (given,), lengths=LENGTHS[what]())
    check(ours.eval().freeze(), (x(),), lengths=LENGTHS[what]())
    check(rnnfast.quantize(ours), (x(),), lengths=LENGTHS[what]())


def test_right_lengths_with_something_wrong() -> None:
    ours, _ = layers("LSTM")
    lengths = torch.tensor([4, 2, 1])
    mask = pack_padded_sequence(torch.zeros(4, 3, dtype=torch.bool), [4, 2, 1])
    for given, hx, reset in (
        (packed(), None, None),
        (rand(4, 5), None, None),
        (rand(4, 3, 6), None, None),
        (x(), (rand(1, 2, 9), rand(1, 2, 9)), None),
        (x(), (rand(1, 3, 9), None), None),
        (x(), None, mask),
        (x(), None, torch.zeros(3, 4, dtype=torch.bool)),
    ):
        check(ours, (given, hx, reset, lengths))


def _mask(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


RESETS: dict[str, Make] = {
    "int64": lambda: _mask(4, 3).long(),
    "uint8": lambda: _mask(4, 3).byte(),
    "float": lambda: rand(4, 3),
    "transposed": lambda: _mask(3, 4),
    "3-D": lambda: _mask(4, 3, 1),
    "number": lambda: torch.tensor(True),
    "sparse": lambda: torch.ones(4, 3, dtype=torch.bool).to_sparse(),
    "meta": lambda: _mask(4, 3).to("meta"),
    "packed otherwise": lambda: pack_padded_sequence(_mask(4, 3), [4, 3, 1]),
    "packed numbers": lambda: pack_padded_sequence(rand(4, 3), [4, 2, 1]),
    "packed 3-D": lambda: pack_padded_sequence(_mask(4, 3, 2), [4, 2, 1]),
}


@pytest.mark.parametrize("what", RESETS)
def test_wrong_resets(what: str) -> None:
    ours, _ = layers("GRU")
    for given in (x(), packed(), rand(4, 5)):
        check(ours, (given, None, RESETS[what]()))
    check(ours, (x(), None, RESETS[what](), torch.tensor([4, 2, 1])))
    check(ours.step, (rand(3, 5), None, RESETS[what]()))


# --------------------------------------------------------------------------- layers made of layers


def turned(kind: str) -> dict[str, Any]:
    return {
        "frozen": getattr(rnnfast, kind)(5, 9).eval().freeze(),
        "quantized": rnnfast.quantize(getattr(rnnfast, kind)(5, 9)),
        "lazy": getattr(rnnfast, f"Lazy{kind}")(9),
        "accelerated": rnnfast.accelerate(getattr(nn, kind)(5, 9)),
    }


@pytest.mark.parametrize("how", ["frozen", "quantized", "lazy", "accelerated"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_other_layers(kind: str, how: str) -> None:
    """In no_grad, where calls of frozen and quantized ones are shortest."""
    with torch.no_grad():
        for make in (*NO_TENSORS.values(), *STRANGE.values()):
            layer = turned(kind)[how]
            given = make()
            if how != "lazy" or given is None or not isinstance(given, Tensor):
                check(layer, (given,))
            if how != "lazy":
                check(layer.step, (given,))
                if given is not None:
                    check(layer, (x(), given))
                    check(layer.step, (rand(3, 5), given))


# --------------------------------------------------------------------------- cells and functions


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(kind: str) -> None:
    ours, theirs = getattr(rnnfast, kind)(5, 9), getattr(nn, kind)(5, 9)
    two, h = kind == "LSTMCell", rand(3, 9)
    for what, make in NO_TENSORS.items():
        check(ours, (make(),), theirs)
        if what != "None":
            want = caught(lambda m=make: theirs(rand(3, 5), m()))
            got = caught(lambda m=make: ours(rand(3, 5), m()))
            assert isinstance(got, type(want))
    for what, turn in LAYOUTS.items():
        check(ours, (turn(rand(3, 5)),), None if what == "sparse" else theirs)  # torch takes it
        hx = (turn(h), turn(h)) if two else turn(h)
        check(ours, (rand(3, 5), hx), None if what == "sparse" else theirs)
    if two:
        for hx in ((), (h,), (h, h, h), h, torch.stack([h, h]), {0: h, 1: h}):
            want, got = (caught(lambda m=m, s=hx: m(rand(3, 5), s)) for m in (theirs, ours))
            assert isinstance(got, type(want)), hx


def _weights(name: str) -> list[Tensor]:
    if name == "batch_norm_lstm":
        return [rand(36, 5), rand(36, 9), rand(36), rand(36), rand(36), rand(9), rand(9)]
    gates = {"lstm": 4, "gru": 3}.get(name.removesuffix("_cell"), 1)
    recurrent = rand(9) if name.startswith("indrnn") else rand(9 * gates, 9)
    return [rand(9 * gates, 5), recurrent, rand(9 * gates), rand(9 * gates)]


@pytest.mark.parametrize("name", [n for n in functional.__all__ if not n.endswith("_cell")])
def test_functions(name: str) -> None:
    function, w = getattr(functional, name), _weights(name)
    if name == "batch_norm_lstm":
        running: dict[str, Any] = {k: [torch.ones(4, 81)] for k in ("running_mean", "running_var")}
        for make in NO_TENSORS.values():
            for which in running:
                check(function, (x(), None, w), **running | {which: make()})
                check(function, (x(), None, w), **running | {which: [make()]})
        function = functools.partial(function, **running)
    for what, make in NO_TENSORS.items():
        check(function, (make(), None, w))
        check(function, (x(), None, make()))
        for k in range(4):
            check(function, (x(), None, [*w[:k], make(), *w[k + 1 :]]))
        if what != "None":
            check(function, (x(), make(), w))
            check(function, (x(), None, w), reset=make())
            check(function, (x(), None, w), lengths=make())
        if what not in ("int", "bool"):
            check(function, (x(), None, w), num_layers=make())
        if what != "bool":
            check(function, (x(), None, w), bias=make())
            check(function, (x(), None, w), recompute=make())
        check(function, (x(), None, w), dropout=make(), training=True)
    for make in STRANGE.values():
        check(function, (make(), None, w))
    for turn in (*LAYOUTS.values(), lambda t: t[..., :-1], lambda t: t.unsqueeze(0), torch.sum):
        for k in range(4):
            check(function, (x(), None, [*w[:k], turn(w[k]), *w[k + 1 :]]))
    if name == "lstm":
        for hr in (torch.tensor(1.0), rand(9), rand(2, 8), rand(2, 9, 1)):
            check(function, (x(), None, [*w, hr]))
    for dropout in (-0.1, 1.5, float("nan")):
        check(function, (x(), None, w), dropout=dropout, training=True)
    for count in (0, -1, 2, 2**40):
        check(function, (x(), None, w), num_layers=count)


@pytest.mark.parametrize("name", [n for n in functional.__all__ if n.endswith("_cell")])
def test_cell_functions(name: str) -> None:
    function, theirs, w = getattr(functional, name), getattr(torch, name), _weights(name)
    h = rand(3, 9)
    hx: Any = (h, h) if name == "lstm_cell" else h
    for what, make in NO_TENSORS.items():
        check(function, (make(), hx, *w), theirs)
        if what == "None":  # zeros; torch's cells take none
            function(rand(3, 5), None, *w)
        else:  # a list of the wrong length is one more thing that is wrong
            check(function, (rand(3, 5), make(), *w), None if what == "list" else theirs)
        for k in range(4):
            if k < 2 or what != "None":
                check(function, (rand(3, 5), hx, *w[:k], make(), *w[k + 1 :]), theirs)
        if name == "lstm_cell":
            check(function, (rand(3, 5), (h, make()), *w), theirs)
            check(function, (rand(3, 5), (make(), h), *w), theirs)
    for turn in (*LAYOUTS.values(), lambda t: t[..., :-1], lambda t: t.unsqueeze(0), torch.sum):
        check(function, (turn(rand(3, 5)), hx, *w))
        for k in range(4):
            check(function, (rand(3, 5), hx, *w[:k], turn(w[k]), *w[k + 1 :]))


# --------------------------------------------------------------------------- what takes models


@pytest.mark.parametrize("what", NO_TENSORS)
def test_functions_of_models(what: str) -> None:
    make, layer = NO_TENSORS[what], rnnfast.GRU(5, 9)
    model = nn.Sequential(layer)
    if what != "module":
        for function in (rnnfast.accelerate, rnnfast.restore, rnnfast.quantize, rnnfast.explain):
            check(function, (make(),))
    if what not in ("dict", "list"):  # a dict's keys are names
        check(rnnfast.quantize, (model,), exclude=make())
    check(rnnfast.truncated, (make(), x()), steps=2)
    if what not in ("list", "array", "str", "dict", "tuple"):
        check(rnnfast.truncated, (layer, make()))
    if what != "int":
        check(rnnfast.truncated, (layer, x()), steps=make())
        check(rnnfast.explain, (layer,), seq_len=make())
        check(rnnfast.explain, (layer,), batch=make())
    if what != "None":
        check(lambda *args: next(rnnfast.truncated(*args, steps=2)), (layer, x(), make()))
        check(lambda r: next(rnnfast.truncated(layer, x(), steps=2, reset=r)), (make(),))
        check(rnnfast.explain, (layer, make()))
        for option in ("isa", "kernel", "split", "launch"):
            check(rnnfast.use_engine, ("cpu",), **{option: make()})
    check(rnnfast.use_engine, (make(),))


@pytest.mark.parametrize("what", STRANGE)
def test_streams_and_explanations_of_strange_tensors(what: str) -> None:
    layer, make = rnnfast.GRU(5, 9), STRANGE[what]
    check(lambda z: list(rnnfast.truncated(layer, z, steps=2)), (make(),))
    if what in ("sparse", "mkldnn", "csr", "jagged", "number", "5-D"):  # others have a shape
        check(rnnfast.explain, (layer, make()))


def test_without_cuda() -> None:
    if torch.cuda.is_available():
        return  # there it works
    check(rnnfast.use_engine, ("cuda",))
    for library in (rnnfast, nn):
        with pytest.raises((RuntimeError, AssertionError), match="CUDA|cuda"):
            library.GRU(5, 9).to("cuda")
