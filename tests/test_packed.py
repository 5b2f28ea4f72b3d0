"""PackedSequence: torch.nn's results and gradients, and not one step of padding computed."""

from __future__ import annotations

import copy
from typing import Any

import cases
import oracle
import pytest
import tolerance
import torch
from pairwise import pairwise
from test_modules import LAYERS, leaves_of, pair
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import rnnfast

LENGTHS = {
    "falling": [9, 7, 4, 1],
    "even": [5, 5, 5],
    "one": [6],
    "steps of one": [1, 1, 1, 1, 1],
    "long tail": [40, 3, 3, 2, 1, 1, 1],
    "uneven": [2, 9, 1, 5, 5, 7, 3],
}
ROWS = pairwise(
    {
        "name": tuple(LAYERS),
        "lengths": tuple(LENGTHS),
        "num_layers": (1, 2),
        "bias": (True, False),
        "batch_first": (False, True),
        "bidirectional": (False, True),
        "dtype": cases.DTYPES,
        "state": (True, False),
        "hidden": (1, 16, 17, 33),
    }
)


def run(module: nn.Module, padded: Tensor, lengths: list[int], hx: Any, batch_first: bool) -> Any:
    """Padded in, packed through the layer, gradients of everything back."""
    x = padded.detach().clone().requires_grad_()
    hx = None if hx is None else [h.detach().clone().requires_grad_() for h in hx]
    state = None if hx is None else (tuple(hx) if len(hx) > 1 else hx[0])
    in_order = lengths == sorted(lengths, reverse=True)
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first, enforce_sorted=in_order)
    y, last = module(packed, state)
    assert isinstance(y, PackedSequence)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        got, want = getattr(y, name), getattr(packed, name)
        assert (got is None) == (want is None) and (want is None or torch.equal(got, want))
    unpacked, _ = pad_packed_sequence(y, batch_first)
    outputs = [unpacked, *leaves_of(last)]
    generator = torch.Generator().manual_seed(11)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    module.zero_grad()
    torch.autograd.backward(
        outputs, [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    )
    results = {f"out{i}": out.detach() for i, out in enumerate(outputs)} | {"dx": x.grad}
    results |= {f"dhx{i}": h.grad for i, h in enumerate(hx or [])}
    return results | {f"d{name}": p.grad for name, p in module.named_parameters()}


def make_state(module: Any, batch: int, dtype: torch.dtype) -> list[Tensor]:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or module.hidden_size]
    widths += [module.hidden_size] * (module.mode == "LSTM")
    return [torch.randn(rows, batch, width, dtype=dtype) for width in widths]


def compare(ours: Any, theirs: Any, lengths: list[int], state: bool, dtype: torch.dtype) -> None:
    batch, longest = len(lengths), max(lengths)
    shape = (batch, longest, 5) if ours.batch_first else (longest, batch, 5)
    x = torch.randn(shape, dtype=dtype)
    hx = make_state(theirs, batch, dtype) if state else None

    def run_exactly(layer: Any, x: Tensor, hx: list[Tensor] | None) -> cases.Tensors:
        state = None if hx is None else [h.double() for h in hx]
        layer = copy.deepcopy(layer).double()
        return run(layer, x.double(), lengths, state, ours.batch_first)

    def noisy(seed: int) -> cases.Tensors:
        gen = torch.Generator().manual_seed(seed)
        twin = copy.deepcopy(theirs)
        for p in twin.parameters():
            p.data = tolerance.last_bits(p, gen)
        state = None if hx is None else [tolerance.last_bits(h, gen) for h in hx]
        return run(twin, tolerance.last_bits(x, gen), lengths, state, ours.batch_first)

    peer = tolerance.Peer(run(theirs, x, lengths, hx, ours.batch_first), noisy)
    result = run(ours, x, lengths, hx, ours.batch_first)
    tolerance.check(result, peer, run_exactly(theirs, x, hx), dtype)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_packed_parity(row: dict[str, Any]) -> None:
    row = dict(row)
    name, lengths, state = row.pop("name"), LENGTHS[row.pop("lengths")], row.pop("state")
    ours, theirs = pair(name, 5, row.pop("hidden"), **row)
    compare(ours, theirs, lengths, state, row["dtype"])


@pytest.mark.parametrize("lengths", ["falling", "uneven"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["f32", "f64"])
def test_packed_projection(dtype: torch.dtype, lengths: str) -> None:
    ours, theirs = pair("LSTM", 5, 17, num_layers=2, bidirectional=True, proj_size=4, dtype=dtype)
    compare(ours, theirs, LENGTHS[lengths], True, dtype)


def test_packed_dropout_draws_the_same_masks() -> None:
    ours, theirs = pair("GRU", 5, 17, num_layers=3, dropout=0.4, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 5) for n in (7, 4, 4, 2)])
    results = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        results.append(leaves_of(module(packed)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_packed_indrnn_against_single_sequences() -> None:
    layer = rnnfast.IndRNN(5, 17, 2, bidirectional=True, dtype=torch.float64)
    sequences = [torch.randn(n, 5, dtype=torch.float64) for n in (3, 9, 1, 5)]
    y, h_n = layer(pack_sequence(sequences, enforce_sorted=False))
    padded, _ = pad_packed_sequence(y)
    for b, sequence in enumerate(sequences):
        want, state = layer(sequence)
        torch.testing.assert_close(padded[: len(sequence), b], want, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(h_n[:, b], state, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", oracle.CELLS)
def test_op_allocates_valid_rows_only(cell: str) -> None:
    """What grows with time has N = sum(lengths) rows: no padded step is there to be computed."""
    case = cases.Case(cell, 40, 7, 5, 17, packed=True)
    _, args = cases.op_inputs(cases.build(case))
    assert case.lengths is not None
    n = sum(case.lengths)
    assert n < 40 * 7
    y, h_n, _, saved = torch.ops.rnnfast.forward(*args, None, oracle.CELL_IDS[cell], False, True)
    assert y.shape == (n, 17) and h_n.shape == (7, 17)
    assert saved.shape[0] == n


@pytest.mark.parametrize("name", LAYERS)
def test_padding_is_never_read(name: str) -> None:
    """NaN in the padded steps reaches no output, no state and no gradient."""
    ours, _ = pair(name, 5, 17, num_layers=2, bidirectional=True)
    lengths = torch.tensor([9, 5, 2])
    x = torch.randn(9, 3, 5)
    for b, length in enumerate(lengths):
        x[length:, b] = float("nan")
    x.requires_grad_()
    y, state = ours(pack_padded_sequence(x, lengths))
    padded, _ = pad_packed_sequence(y)
    loss = padded.sum() + sum(s.sum() for s in leaves_of(state))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_each_sequence_as_if_alone(name: str) -> None:
    """What stands beside a sequence in the batch does not reach it."""
    ours, _ = pair(name, 5, 17, num_layers=2, bidirectional=True, dtype=torch.float64)
    sequences = [torch.randn(n, 5, dtype=torch.float64) for n in (9, 1, 6, 6)]
    y, state = ours(pack_sequence(sequences, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(y)
    assert lengths.tolist() == [9, 1, 6, 6]
    for b, sequence in enumerate(sequences):
        want, alone = ours(sequence)
        torch.testing.assert_close(padded[: len(sequence), b], want, rtol=1e-10, atol=1e-12)
        assert not padded[len(sequence) :, b].any()
        for got, expected in zip(leaves_of(state), leaves_of(alone), strict=True):
            torch.testing.assert_close(got[:, b], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_packed_on_meta(name: str, state: bool) -> None:
    """batch_sizes lies on the CPU even then, and tells the batch where no state does."""
    layer = pair(name, 5, 9, num_layers=2, bidirectional=True)[0].to("meta")
    sizes = torch.tensor([3, 2, 2])
    hx = torch.empty(4, 3, 9, device="meta") if state else None
    x = PackedSequence(torch.empty(7, 5, device="meta", requires_grad=True), sizes)
    y, last = layer(x, (hx, hx) if state and name == "LSTM" else hx)
    assert y.data.shape == (7, 18) and y.data.is_meta
    assert all(s.shape == (4, 3, 9) and s.is_meta for s in leaves_of(last))
    y.data.sum().backward()
    assert x.data.grad.shape == (7, 5)
    with pytest.raises(RuntimeError, match="rnnfast: x must have as many rows"):
        layer(PackedSequence(torch.empty(6, 5, device="meta"), sizes))
