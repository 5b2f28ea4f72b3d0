"""The dispatcher's operators by themselves: nonsense raises RuntimeError and changes nothing."""

from __future__ import annotations

from typing import Any

import cases
import oracle
import pytest
import torch
from cases import Case
from torch import Tensor

import rnnfast

f64 = torch.float64


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


SLOTS = (
    *("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr"),
    *("batch_sizes", "reset", "packed"),
)


def good_arguments(cell: str, packed_input: bool = False, proj: int = 0) -> dict[str, Any]:
    case = Case(cell, 4, 3, 5, 9, packed=packed_input, proj=proj)
    _, args = cases.op_inputs(cases.build(case), grad=False)
    named = dict(zip(SLOTS, [*args, None], strict=True))
    return {**named, "cell": oracle.CELL_IDS[cell], "reverse": False, "save": True}


def sizes(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


FORWARD_NONSENSE: dict[str, dict[str, Any]] = {
    "x rank 0": {"x": torch.tensor(1.0)},
    "x rank 1": {"x": rand(5)},
    "x rank 2": {"x": rand(4, 5)},
    "x rank 4": {"x": rand(4, 3, 5, 1)},
    "x size": {"x": rand(4, 3, 6)},
    "x batch": {"x": rand(4, 2, 5)},
    "x without steps": {"x": rand(0, 3, 5)},
    "x without features": {"x": rand(4, 3, 0)},
    "x double": {"x": rand(4, 3, 5, dtype=f64)},
    "x half": {"x": rand(4, 3, 5).half()},
    "x integers": {"x": torch.ones(4, 3, 5, dtype=torch.int64)},
    "x complex": {"x": torch.ones(4, 3, 5, dtype=torch.complex64)},
    "x sparse": {"x": rand(4, 3, 5).to_sparse()},
    "x meta": {"x": rand(4, 3, 5).to("meta")},
    "h0 rank 1": {"h0": rand(9)},
    "h0 rank 3": {"h0": rand(1, 3, 9)},
    "h0 batch": {"h0": rand(2, 9)},
    "h0 size": {"h0": rand(3, 8)},
    "h0 empty": {"h0": rand(0)},
    "h0 double": {"h0": rand(3, 9, dtype=f64)},
    "c0 rank 2": {"c0": rand(3, 9)},
    "c0 for more states": {"c0": rand(2, 3, 9)},
    "w_ih rank 1": {"w_ih": rand(36)},
    "w_ih rank 3": {"w_ih": rand(1, 36, 5)},
    "w_ih rows": {"w_ih": rand(35, 5)},
    "w_ih fewer rows": {"w_ih": rand(32, 5)},
    "w_ih columns": {"w_ih": rand(36, 6)},
    "w_ih empty": {"w_ih": rand(0, 5)},
    "w_ih double": {"w_ih": rand(36, 5, dtype=f64)},
    "w_hh rank 1": {"w_hh": rand(36)},
    "w_hh rank 3": {"w_hh": rand(36, 9, 1)},
    "w_hh rows": {"w_hh": rand(37, 9)},
    "w_hh columns": {"w_hh": rand(36, 10)},
    "w_hh transposed": {"w_hh": rand(9, 36)},
    "w_hh meta": {"w_hh": rand(36, 9).to("meta")},
    "b_ih short": {"b_ih": rand(9)},
    "b_ih rank 2": {"b_ih": rand(36, 1)},
    "b_hh long": {"b_hh": rand(37)},
    "b_hh double": {"b_hh": rand(36, dtype=f64)},
    "w_hr rank 1": {"w_hr": rand(9)},
    "w_hr columns": {"w_hr": rand(9, 8)},
    "w_hr rows": {"w_hr": rand(4, 9)},
    "batch_sizes of a padded batch": {"batch_sizes": sizes(3, 2, 1)},
    "packed nonsense": {"packed": rand(3)},
    "packed empty": {"packed": rand(0)},
    "packed double": {"packed": rand(10_000, dtype=f64)},
    "packed integers": {"packed": torch.ones(10_000, dtype=torch.int64)},
    "packed rank 2": {"packed": rand(100, 100)},
    "cell -1": {"cell": -1},
    "cell 6": {"cell": 6},
    "cell 2**40": {"cell": 2**40},
}
PACKED_NONSENSE: dict[str, dict[str, Any]] = {
    "rank 2": {"batch_sizes": sizes(3, 2, 2, 1)[None]},
    "rank 0": {"batch_sizes": torch.tensor(8)},
    "empty": {"batch_sizes": sizes()},
    "int32": {"batch_sizes": sizes(3, 2, 2, 1, dtype=torch.int32)},
    "floats": {"batch_sizes": rand(4)},
    "meta": {"batch_sizes": sizes(3, 2, 2, 1).to("meta")},
    "rising": {"batch_sizes": sizes(1, 2, 2, 3)},
    "zero": {"batch_sizes": sizes(3, 3, 2, 0)},
    "negative": {"batch_sizes": sizes(3, 3, 3, -1)},
    "all negative": {"batch_sizes": sizes(-1, -2, -2, -3)},
    "too few rows": {"batch_sizes": sizes(3, 3, 3, 3, 3)},
    "too many rows": {"batch_sizes": sizes(3)},
    "overflow": {"batch_sizes": sizes(2**62, 2**62, 2**62, 2**62 + 8)},
    "batch of the state": {"batch_sizes": sizes(2, 2, 2, 2)},
    "x rank 3": {"x": rand(4, 2, 5)},
    "x rows": {"x": rand(9, 5)},
    "x size": {"x": rand(8, 6)},
}


def refuses(op: Any, arguments: list[Any]) -> str:
    """The op raises RuntimeError (the dispatcher's own included), every operand stays as it was.
    Gives what it says."""
    tensors = [
        a for a in arguments if isinstance(a, Tensor) and a.device.type == "cpu" and not a.is_sparse
    ]
    kept, versions = cases.clones(tensors), [t._version for t in tensors]
    with pytest.raises(RuntimeError) as info:
        op(*arguments)
    assert str(info.value)
    assert all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        if not a.is_complex()
        else torch.equal(a, b)
        for a, b in zip(tensors, kept, strict=True)
    )
    assert versions == [t._version for t in tensors]
    return str(info.value)


@pytest.mark.parametrize("what", FORWARD_NONSENSE)
def test_forward_refuses(what: str) -> None:
    refuses(
        torch.ops.rnnfast.forward, [*(good_arguments("lstm") | FORWARD_NONSENSE[what]).values()]
    )


@pytest.mark.parametrize("what", PACKED_NONSENSE)
@pytest.mark.parametrize("cell", ["lstm", "indrnn_relu"])
def test_forward_refuses_packed(cell: str, what: str) -> None:
    good = good_arguments(cell, packed_input=True)
    good |= {"x": rand(8, 5), "batch_sizes": sizes(3, 2, 2, 1)}
    torch.ops.rnnfast.forward(*good.values())
    refuses(torch.ops.rnnfast.forward, [*(good | PACKED_NONSENSE[what]).values()])


@pytest.mark.parametrize(
    ("cell", "change"),
    [
        ("gru", {"w_hr": rand(4, 9)}),
        ("gru", {"c0": rand(3, 9)}),
        ("gru", {"c0": rand(1, 3, 9)}),
        ("rnn_tanh", {"w_hr": rand(9, 9)}),
        ("rnn_relu", {"c0": rand(3, 9)}),
        ("indrnn_relu", {"w_hh": rand(9, 9)}),
        ("indrnn_tanh", {"w_hh": rand(8)}),
        ("indrnn_tanh", {"w_hr": rand(4, 9)}),
        ("indrnn_relu", {"w_hh": rand(9, 1)}),
        ("gru", {"w_hh": rand(27)}),
    ],
)
def test_forward_refuses_what_the_cell_lacks(cell: str, change: dict[str, Any]) -> None:
    refuses(torch.ops.rnnfast.forward, [*(good_arguments(cell) | change).values()])


def test_op_error_names_the_operand_in_letters_and_numbers() -> None:
    good = good_arguments("lstm")
    for name, wrong, words in (
        (
            "w_hh",
            rand(36, 10),
            r"rnnfast: w_hh must have shape \(G\*H, H\) = \(36, 9\), got \(36, 10\)",
        ),
        ("b_ih", rand(9), r"rnnfast: b_ih must have shape .*\(36,?\), got \(9,?\)"),
        ("h0", rand(2, 9), r"rnnfast: h0 must have shape .*\(3, 9\), got \(2, 9\)"),
        ("x", rand(4, 3, 6), r"rnnfast: .*5.*6|rnnfast: .*6.*5"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.rnnfast.forward(*(good | {name: wrong}).values())


BACKWARD_NONSENSE: dict[str, dict[str, Any]] = {
    "dy shape": {"dy": rand(4, 3, 8)},
    "dy rank": {"dy": rand(4, 27)},
    "dy steps": {"dy": rand(3, 3, 9)},
    "dy double": {"dy": rand(4, 3, 9, dtype=f64)},
    "dy meta": {"dy": rand(4, 3, 9).to("meta")},
    "dh_n shape": {"dh_n": rand(2, 9)},
    "dh_n double": {"dh_n": rand(3, 9, dtype=f64)},
    "dc_n shape": {"dc_n": rand(1, 3, 8)},
    "dc_n states": {"dc_n": rand(2, 3, 9)},
    "y shape": {"y": rand(4, 3, 8)},
    "y steps": {"y": rand(1, 3, 9)},
    "y double": {"y": rand(4, 3, 9, dtype=f64)},
    "saved nothing": {"saved": rand(0)},
    "saved short": {"saved": rand(11, 5, 9)},
    "saved planes": {"saved": rand(12, 4, 9)},
    "saved double": {"saved": rand(12, 5, 9, dtype=f64)},
    "saved rank": {"saved": rand(12 * 5 * 9)},
    "needs too much": {"needs": 256},
    "needs negative": {"needs": -1},
    "needs a projection that is not there": {"needs": 128},
    "cell": {"cell": 6},
    "another cell": {"cell": 1},
    "x": {"x": rand(4, 3, 6)},
    "w_hh": {"w_hh": rand(36, 8)},
    "batch_sizes": {"batch_sizes": sizes(3, 3, 3, 3)},
}


def backward_arguments(cell: str = "lstm") -> dict[str, Any]:
    good = good_arguments(cell)
    y, h_n, c_n, saved = torch.ops.rnnfast.forward(*good.values())
    given = {"dy": rand(*y.shape), "dh_n": rand(*h_n.shape), "dc_n": rand(*c_n.shape)}
    if cell != "lstm":
        given["dc_n"] = None  # type: ignore[assignment]
    operands = {k: good[k] for k in SLOTS[:-1]}
    return {
        **given,
        **operands,
        "y": y,
        "saved": saved,
        "cell": good["cell"],
        "reverse": False,
        "needs": 127 if cell == "lstm" else 123,
    }


@pytest.mark.parametrize("what", BACKWARD_NONSENSE)
def test_backward_refuses(what: str) -> None:
    good = backward_arguments()
    torch.ops.rnnfast.backward(*good.values())
    refuses(torch.ops.rnnfast.backward, [*(good | BACKWARD_NONSENSE[what]).values()])


LENGTHS_NONSENSE: dict[str, Tensor] = {
    "rank 0": torch.tensor(3),
    "rank 2": sizes(2, 4, 1)[None],
    "too few": sizes(2, 4),
    "too many": sizes(2, 4, 1, 1),
    "none": sizes(),
    "floats": torch.tensor([2.0, 4.0, 1.0]),
    "complex": torch.ones(3, dtype=torch.complex64),
    "bool": torch.ones(3, dtype=torch.bool),
    "meta": sizes(2, 4, 1).to("meta"),
    "sparse": sizes(2, 4, 1).to_sparse(),
    "zero": sizes(2, 0, 1),
    "negative": sizes(2, -(2**63), 1),
    "beyond T": sizes(2, 5, 1),
    "huge": sizes(2**63 - 1, 4, 1),
}


# The operators with lengths take them where the plain ones take batch_sizes.
def refuses_lengths(op: Any, good: dict[str, Any], change: dict[str, Any]) -> None:
    said = refuses(op, [*(good | change).values()])
    if not any(isinstance(t, Tensor) and t.is_sparse for t in change.values()):
        assert said.startswith("rnnfast: ")


@pytest.mark.parametrize(
    "what", [*(k for k in FORWARD_NONSENSE if "batch_sizes" not in k), *LENGTHS_NONSENSE]
)
def test_forward_with_lengths_refuses(what: str) -> None:
    op = torch.ops.rnnfast.forward_lengths
    good = good_arguments("lstm") | {"batch_sizes": sizes(2, 4, 1)}
    op(*good.values())
    lengths = LENGTHS_NONSENSE.get(what)
    change = FORWARD_NONSENSE[what] if lengths is None else {"batch_sizes": lengths}
    refuses_lengths(op, good, change)


@pytest.mark.parametrize("what", [*BACKWARD_NONSENSE, *LENGTHS_NONSENSE])
def test_backward_with_lengths_refuses(what: str) -> None:
    op = torch.ops.rnnfast.backward_lengths
    good = backward_arguments() | {"batch_sizes": sizes(2, 4, 1)}
    op(*good.values())
    lengths = LENGTHS_NONSENSE.get(what)
    change = BACKWARD_NONSENSE[what] if lengths is None else {"batch_sizes": lengths}
    refuses_lengths(op, good, change)


@pytest.mark.parametrize("what", LENGTHS_NONSENSE)
def test_checked_lengths_refuses(what: str) -> None:
    """That of which there are three, and of any number beside them."""
    op, lengths = torch.ops.rnnfast.checked_lengths, LENGTHS_NONSENSE[what]
    if what in ("too few", "too many", "none"):
        torch.testing.assert_close(op(lengths, 4), lengths)
    elif what == "meta":
        assert op(lengths, 4).is_meta
    else:
        refuses_lengths(op, {"lengths": lengths, "steps": 4}, {"lengths": lengths})


@pytest.mark.parametrize("cell", oracle.CELLS)
def test_backward_of_nothing_is_zero(cell: str) -> None:
    good = backward_arguments(cell)
    grads = torch.ops.rnnfast.backward(*(good | {"dy": None, "dh_n": None, "dc_n": None}).values())
    assert grads[0].shape == (4, 3, 5)
    for grad in grads:
        assert torch.equal(grad, torch.zeros_like(grad))
    empty = torch.ops.rnnfast.backward(*(good | {"needs": 0}).values())
    assert all(grad.shape == (0,) for grad in empty)


@pytest.mark.parametrize(
    "arguments",
    [
        (rand(36), rand(36, 9), None, 0),
        (rand(36, 5), rand(36, 8), None, 0),
        (rand(35, 5), rand(35, 9), None, 0),
        (rand(36, 5), rand(36, 9), None, 7),
        (rand(36, 5), rand(36, 9), None, -1),
        (rand(36, 5), rand(36, 9, dtype=f64), None, 0),
        (rand(36, 5), rand(36, 4), rand(4, 8), 0),
        (rand(27, 5), rand(27, 4), rand(4, 9), 1),
        (rand(9, 5), rand(9, 9), None, 4),
        (rand(36, 5).half(), rand(36, 9), None, 0),
        (rand(36, 5).to(torch.complex64), rand(36, 9).to(torch.complex64), None, 0),
        (rand(36, 5).to("meta"), rand(36, 9), None, 0),
    ],
)
def test_pack_refuses(arguments: tuple[Any, ...]) -> None:
    refuses(torch.ops.rnnfast.pack, list(arguments))


def test_packed_weights_of_another_layer_are_refused() -> None:
    good = good_arguments("lstm")
    other = torch.ops.rnnfast.pack(rand(64, 5), rand(64, 16), None, 0)
    refuses(torch.ops.rnnfast.forward, [*(good | {"packed": other}).values()])
    mine = torch.ops.rnnfast.pack(good["w_ih"], good["w_hh"], None, 0)
    want = torch.ops.rnnfast.forward(*good.values())
    got = torch.ops.rnnfast.forward(*(good | {"packed": mine}).values())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("set_isa", (17,)),
        ("set_isa", (-2,)),
        ("set_kernel", (9,)),
        ("set_kernel", (-2,)),
        ("last_run", (99,)),
        ("last_run", (-1,)),
        ("choose", (9, 0, 1, 1, 1, 1, 1, 4, 1)),
        ("choose", (0, 99, 1, 1, 1, 1, 1, 4, 1)),
        ("choose", (4, 0, 1, 1, 1, 1, 1, 3, 1)),
        ("choose", (4, 0, -1, 1, 1, 1, 1, 4, 1)),
        ("choose", (4, 0, 1, 1, 1, 1, 1, 4, 0)),
    ],
)
def test_small_ops_refuse(op: str, arguments: tuple[int, ...]) -> None:
    refuses(getattr(torch.ops.rnnfast, op), list(arguments))
    assert torch.ops.rnnfast.isa_available(99) is False


def test_choose_survives_any_size() -> None:
    """A pure function of numbers: huge ones do not overflow into nonsense."""
    for cell in range(6):
        for big in (1, 10**4, 2**24):
            for threads in (1, 2, 64):
                split = torch.ops.rnnfast.choose(4, cell, big, big, big, big, big, 4, threads)
                used = torch.ops.rnnfast.choose(1, cell, big, big, big, big, big, 4, threads)
                assert split in (0, 1, 2) and 1 <= used <= threads


def test_freed_memory_is_an_error() -> None:
    """FSDP frees a parameter's storage between its uses; who still holds it gets a sentence."""
    layer = rnnfast.GRU(3, 4)
    layer.weight_hh_l0.untyped_storage().resize_(0)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="w_hh has no memory: its storage of 48"),
    ):
        layer(torch.randn(2, 1, 3))
    for op, more in (("forward", {}), ("forward_lengths", {"batch_sizes": sizes(2, 4, 1)})):
        for name in ("x", "reset", *more):
            good = good_arguments("lstm") | {"reset": torch.zeros(4, 3, dtype=torch.bool)} | more
            good[name] = good[name].clone()
            good[name].untyped_storage().resize_(0)
            said = "lengths" if name == "batch_sizes" else name
            with pytest.raises(RuntimeError, match=f"{said} has no memory: its storage of"):
                getattr(torch.ops.rnnfast, op)(*good.values())
