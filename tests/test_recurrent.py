"""rnnfast.Recurrent: cells of torch.nn and rnnfast are the layers."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from rnnfast import Recurrent

IN, H, T, B = 5, 7, 6, 3
F64 = torch.float64
CELLS = {
    "LSTM": (rnnfast.LSTM, rnnfast.LSTMCell),
    "GRU": (rnnfast.GRU, rnnfast.GRUCell),
    "RNN": (rnnfast.RNN, rnnfast.RNNCell),
    "torch LSTM": (nn.LSTM, nn.LSTMCell),
    "torch GRU": (nn.GRU, nn.GRUCell),
    "torch RNN": (nn.RNN, nn.RNNCell),
}
LENGTHS = torch.tensor([2, 6, 4])


class IndRNNCell(nn.Module):
    """What rnnfast has as a layer only."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.randn(units, inputs))
        self.weight_hh = nn.Parameter(torch.rand(units))
        self.bias_ih = nn.Parameter(torch.randn(units))
        self.bias_hh = nn.Parameter(torch.randn(units))

    def initial_state(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.size(0), self.weight_hh.size(0))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        w = nn.functional.linear(x, self.weight_ih, self.bias_ih) + self.bias_hh
        h = torch.relu(w + self.weight_hh * h)
        return h, h


CELLS["IndRNN"] = (rnnfast.IndRNN, IndRNNCell)


def pair(kind: str, layers: int = 1, two: bool = False, **options: Any) -> tuple[Any, Recurrent]:
    """A layer, and a Recurrent of its weights."""
    torch.manual_seed(0)
    layer_type, cell = CELLS[kind]
    shared = {"bidirectional": two, **options}
    layer = layer_type(IN, H, layers, dtype=F64, **shared)
    if kind == "IndRNN":
        shared["feature_dims"] = 1
    ours = Recurrent(
        lambda k, d: cell(H * (2 if two else 1) if k else IN, H).double(), layers, **shared
    )
    with torch.no_grad():
        for k, one in enumerate(ours.cells):
            end = f"_l{k // 2}" + "_reverse" * (k % 2) if two else f"_l{k}"
            for name, weight in one.named_parameters():
                weight.copy_(getattr(layer, name + end))
    return layer, ours


def tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, PackedSequence):
        return [tree.data]
    return [tree] if isinstance(tree, Tensor) else [t for part in tree for t in tensors(part)]


def same(layer: Any, ours: Any, x: Any, hx: Any = None, **call: Any) -> None:
    """Outputs, states and gradients."""
    leaves = [x.data if isinstance(x, PackedSequence) else x, *([] if hx is None else tensors(hx))]
    weights = [
        [p for _, p in sorted(m.named_parameters(), key=lambda i: order(i[0]))]
        for m in (layer, ours)
    ]
    found = []
    for module, own in zip((layer, ours), weights):
        results = tensors(module(x, hx, **call))
        torch.manual_seed(1)
        loss = sum((r * torch.randn_like(r)).sum() for r in results)
        grads = torch.autograd.grad(loss, [*leaves, *own], allow_unused=True)
        found.append((results, [0.0 * torch.ones(()) if g is None else g for g in grads]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10, check_dtype=False)


def order(name: str) -> tuple[Any, ...]:
    """weight_ih_l1_reverse and cells.3.weight_ih, in one order."""
    if name.startswith("cells."):
        _, k, kind = name.split(".")
        return (kind, int(k))
    kind, rest = name.rsplit("_l", 1)
    return (kind, int(rest.split("_")[0]) * 2 + rest.endswith("reverse"))


def inputs(two: bool = False, layers: int = 1, pairs: bool = False) -> tuple[Tensor, Any]:
    torch.manual_seed(2)
    x = torch.randn(T, B, IN, dtype=F64, requires_grad=True)
    states = torch.randn(2, layers * (2 if two else 1), B, H, dtype=F64, requires_grad=True)
    return x, tuple(states.unbind(0)) if pairs else states[0]


RESET = torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.3


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("layers", [1, 2])
def test_it_is_the_layer(kind: str, two: bool, layers: int) -> None:
    layer, ours = pair(kind, layers, two)
    x, hx = inputs(two, layers, "LSTM" in kind)
    same(layer, ours, x)
    same(layer, ours, x, hx)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    same(layer, ours, packed)
    same(layer, ours, packed, hx)
    if kind.startswith("torch"):
        return
    same(layer, ours, x, hx, reset=RESET)
    same(layer, ours, x, hx, lengths=LENGTHS)
    same(layer, ours, x, hx, lengths=LENGTHS, reset=RESET)
    rows = pack_padded_sequence(RESET, LENGTHS, enforce_sorted=False)
    same(layer, ours, packed, hx, reset=rows)
    same(layer, ours, packed, hx, reset=rows.data)


@pytest.mark.parametrize("kind", CELLS)
def test_forms_of_input(kind: str) -> None:
    layer, ours = pair(kind, 2, True, batch_first=True)
    x, hx = inputs(True, 2, "LSTM" in kind)
    same(layer, ours, x.detach().transpose(0, 1).requires_grad_(), hx)
    one = [s[:, 0] for s in hx] if "LSTM" in kind else hx[:, 0]
    same(layer, ours, x.detach()[:, 0].requires_grad_(), tuple(one) if "LSTM" in kind else one)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    torch.testing.assert_close(ours(packed), layer(packed))
    if not kind.startswith("torch"):
        y = x.detach().transpose(0, 1).requires_grad_()
        same(layer, ours, y, hx, lengths=LENGTHS, reset=RESET.t())
        same(layer, ours, x.detach()[:, 0].requires_grad_(), reset=RESET[:, 0])
    empty = torch.zeros(0, T, IN, dtype=F64)
    torch.testing.assert_close(ours(empty), layer(empty))


def test_ties_of_a_packed_order() -> None:
    """The order of a PackedSequence is its own, not that of a stable sort."""
    layer, ours = pair("GRU")
    x, h = inputs()
    packed = pack_padded_sequence(x[:, [2, 1, 0]], torch.tensor([4, 4, 2]))
    turned = PackedSequence(
        packed.data, packed.batch_sizes, torch.tensor([2, 1, 0]), torch.tensor([2, 1, 0])
    )
    same(layer, ours, turned, h)
    assert torch.equal(ours(turned)[0].sorted_indices, turned.sorted_indices)


def test_dropout_lies_between_layers() -> None:
    layer, ours = pair("LSTM", 3, dropout=0.5)
    x, hx = inputs(False, 3, True)
    same(layer.eval(), ours.eval(), x, hx)
    ours.train()
    torch.manual_seed(4)
    y, _ = ours(x)
    torch.manual_seed(4)
    z = x
    for k, cell in enumerate(ours.cells):
        z, _ = Recurrent(cell)(z)
        z = nn.functional.dropout(z, 0.5) if k < 2 else z
    torch.testing.assert_close(y, z)
    assert not torch.equal(y, ours(x)[0]) and torch.equal(ours.eval()(x)[0], layer(x)[0])


# ------------------------------------------------------------------------------- masks with holes


def valid_only(
    ours: Recurrent, x: Tensor, h: Tensor, mask: Tensor, reset: Tensor
) -> tuple[Tensor, Tensor]:
    """Row by row, without the masked steps; a reset at one holds for the next that counts."""
    ys, states = torch.zeros(*x.shape[:2], ours(x)[0].size(2), dtype=F64), []
    for b in range(x.size(1)):
        keep = [t for t in range(x.size(0)) if mask[t, b]]
        cuts = [
            bool(reset[(keep[i - 1] + 1 if i else 0) : t + 1, b].any()) for i, t in enumerate(keep)
        ]
        state = h[:, b]
        if keep:
            y, state = ours(x[keep, b], state, reset=torch.tensor(cuts))
            ys[keep, b] = y
        states.append(state)
    return ys, torch.stack(states, 1)


@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("seed", range(4))
def test_masks_with_holes(two: bool, seed: int) -> None:
    _, ours = pair("GRU", 2, two)
    x, h = inputs(two, 2)
    torch.manual_seed(seed)
    mask, reset = torch.rand(T, B) < 0.6, torch.rand(T, B) < 0.3
    mask[:, 0] = False  # a row without steps keeps its state
    junk = torch.where(mask.unsqueeze(-1), x, float("nan"))
    want = valid_only(ours, x, h, mask, reset)
    got = ours(junk, h, reset, mask=mask)
    torch.testing.assert_close(got, want)
    got[0].sum().backward()  # what stands in the holes is not read
    assert x.grad is not None and bool(x.grad.isfinite().all())
    assert torch.equal(x.grad.abs().sum(-1) > 0, mask)


def test_a_mask_may_be_lengths() -> None:
    layer, ours = pair("LSTM", 2, True)
    x, hx = inputs(True, 2, True)
    mask = torch.arange(T).unsqueeze(1) < LENGTHS
    torch.testing.assert_close(ours(x, hx, RESET, mask=mask), layer(x, hx, RESET, LENGTHS))


@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
def test_return_last(two: bool) -> None:
    _, ours = pair("LSTM", 2, two)
    last = Recurrent(list(ours.cells), 2, bidirectional=two, return_last=True)
    x, _ = inputs()
    ends = LENGTHS - 1
    y, state = ours(x, lengths=LENGTHS)
    got, got_state = last(x, lengths=LENGTHS)
    want = y[ends, torch.arange(B), :H]
    if two:
        want = torch.cat([want, y[0, :, H:]], -1)
    torch.testing.assert_close((got, got_state), (want, state))
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    torch.testing.assert_close(last(packed)[0], want)
    torch.testing.assert_close(last(x)[0][0], last(x[:, 0])[0])
    none = last(x, mask=torch.zeros(T, B, dtype=torch.bool))[0]
    assert none.shape == want.shape and not none.any()


# --------------------------------------------------------------------------- what looks on in torch


def test_derivatives() -> None:
    _, ours = pair("LSTM", 1, True)
    x = torch.randn(3, 2, IN, dtype=F64, requires_grad=True)
    call = {"lengths": torch.tensor([3, 2]), "reset": RESET[:3, :2]}

    def f(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(ours(x, **call)))

    assert torch.autograd.gradcheck(f, x)
    small = Recurrent(nn.GRUCell(2, 2).double())

    def packed(x: Tensor) -> Tensor:
        rows = pack_padded_sequence(x, torch.tensor([1, 2]), enforce_sorted=False)
        return small(rows)[0].data

    z = torch.randn(2, 2, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(packed, z)
    assert torch.autograd.gradgradcheck(lambda x: small(x, lengths=torch.tensor([1, 2]))[0], z)
    y = torch.randn(2, 1, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: small(x)[0], y)


@pytest.mark.parametrize("kind", ["LSTM", "torch GRU", "IndRNN"])
def test_transforms(kind: str) -> None:
    _, ours = pair(kind, 1, True)
    x, _ = inputs()
    x = x.detach()
    each = torch.stack([x, 2 * x])
    want = torch.stack([ours(i)[0] for i in each])
    torch.testing.assert_close(vmap(lambda i: ours(i)[0])(each), want)
    n = torch.stack([LENGTHS, LENGTHS.flip(0)])
    got = vmap(lambda i, n: ours(i, lengths=n)[0])(each, n)
    torch.testing.assert_close(got[1], ours(each[1], lengths=n[1])[0])
    _, dy = jvp(lambda i: ours(i, lengths=LENGTHS)[0], (x,), (x,))
    step = 1e-6
    slope = (
        ours(x * (1 + step), lengths=LENGTHS)[0] - ours(x * (1 - step), lengths=LENGTHS)[0]
    ) / (2 * step)
    torch.testing.assert_close(dy, slope, rtol=1e-5, atol=1e-7)
    with forward_ad.dual_level():
        dual = ours(forward_ad.make_dual(x, x), lengths=LENGTHS)[0]
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, dy)
    weights = {k: p.detach() for k, p in ours.named_parameters()}

    def loss(weights: Any, x: Tensor) -> Tensor:
        return functional_call(ours, weights, (x.unsqueeze(1),))[0].square().sum()

    grads = vmap(grad(loss), in_dims=(None, 1))(weights, x)
    alone = grad(loss)(weights, x[:, 1])
    for name in weights:
        torch.testing.assert_close(grads[name][1], alone[name])


@pytest.mark.parametrize("kind", ["LSTM", "torch GRU"])
def test_compile(kind: str) -> None:
    _, ours = pair(kind, 1, True)
    x, hx = inputs(True, 1, "LSTM" in kind)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    same(ours, compiled_as(ours, compiled), x, hx, lengths=LENGTHS, reset=RESET)
    with pytest.raises(RuntimeError, match="lengths"):
        compiled(x, hx, lengths=torch.tensor([2, 7, 4]), reset=RESET)


def test_other_graphs() -> None:
    """Any batch, torch.export with lengths; packed input is refused, or breaks the graph."""
    _, ours = pair("torch GRU", 1, True)
    x, _ = inputs()
    x = x.detach()[:3]
    lengths = torch.tensor([1, 3, 2])
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (x, x[:, :2], x[:2]):
        torch.testing.assert_close(compiled(batch), ours(batch))
    exported = torch.export.export(ours, (x, None, None, lengths)).module()
    torch.testing.assert_close(exported(x, None, None, lengths), ours(x, lengths=lengths))
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    with pytest.raises(Exception, match="a graph takes padded input with lengths"):
        compiled(packed)
    broken = torch.compile(ours, backend="aot_eager")
    torch.testing.assert_close(broken(packed)[0].data, ours(packed)[0].data)


def test_another_device() -> None:
    """Every tensor that the loop makes lies where the input does: on meta it would not run."""
    _, ours = pair("LSTM", 2, True)
    x = torch.randn(T, B, IN, dtype=F64, device="meta")
    mask = torch.ones(T, B, dtype=torch.bool, device="meta")
    y, (h, _) = ours.to("meta")(x, reset=mask, mask=mask)
    assert y.is_meta and y.shape == (T, B, 2 * H) and h.shape == (4, B, H)


def compiled_as(ours: Recurrent, compiled: Any) -> Any:
    class Wrapped(nn.Module):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return ours.named_parameters()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return compiled(*args, **kwargs)

    return Wrapped()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "IndRNN"])
def test_autocast(kind: str) -> None:
    """A state may change its dtype at the first step, as a layer's does."""
    _, ours = pair(kind, 1, True)
    ours.float()
    x, hx = inputs(True, 1, kind == "LSTM")
    x = x.detach().float()
    hx = tuple(h.detach().float() for h in hx) if kind == "LSTM" else hx.detach().float()
    want, _ = ours(x, hx, RESET, LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = ours(x, hx, RESET, LENGTHS)
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


def test_life_of_the_module() -> None:
    _, ours = pair("LSTM", 2, True)
    x, _ = inputs()
    want = ours(x)
    assert list(ours.state_dict())[:2] == ["cells.0.weight_ih", "cells.0.weight_hh"]
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    _, other = pair("LSTM", 2, True)
    other.load_state_dict(torch.load(file))
    for one in (other, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(one(x), want)
    assert "num_layers=2, bidirectional=True" in repr(ours) and "batch_first" not in repr(ours)
    assert repr(Recurrent(nn.GRUCell(1, 2))) == (
        "Recurrent(\n  (cells): ModuleList(\n    (0): GRUCell(1, 2)\n  )\n)"
    )
    assert ours.float()(x.float())[0].dtype == torch.float32


def test_a_start_of_ones_own_of_a_known_cell() -> None:
    class Learned(nn.GRUCell):
        def __init__(self) -> None:
            super().__init__(IN, H, dtype=F64)
            self.h0 = nn.Parameter(torch.randn(H, dtype=F64))

        def initial_state(self, x: Tensor) -> Tensor:
            return self.h0.expand(x.size(0), H)

    cell, x = Learned(), torch.randn(T, B, IN, dtype=F64)
    layer = Recurrent(cell)
    torch.testing.assert_close(layer(x)[0], layer(x, cell.h0.expand(1, B, H))[0])
    layer(x)[0].sum().backward()
    assert cell.h0.grad is not None and cell.h0.grad.abs().min() > 0


def test_step_of_a_layer() -> None:
    layer, ours = pair("LSTM", 2, batch_first=True)
    x, _ = inputs()
    mine = theirs = None
    for t in range(T):
        y, mine = ours.step(x[t], mine, RESET[t])
        want, theirs = layer.step(x[t], theirs, RESET[t])
        torch.testing.assert_close((y, mine), (want, theirs))
    y, _ = ours.step(x[0, 0], None, True)
    torch.testing.assert_close(y, layer.step(x[0, 0])[0])
    with pytest.raises(RuntimeError, match="rnnfast: step needs a layer of one direction"):
        pair("GRU", 1, True)[1].step(x[0])


# ------------------------------------------------------------------------------------ the document

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "own_cell.md"


def test_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks of Python, one after the other, as a reader would, and its headers as files."""
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(python|cpp)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks].count("python") > 6
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "own_cell"}
    torch.manual_seed(0)
    for kind, block in blocks:
        if kind == "cpp":  # the first line names it
            Path(re.findall(r"^// (\w+\.h):", block)[0]).write_text(block)
        else:
            exec(compile(block, str(DOCUMENT), "exec"), names)
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    assert max(names["errors"].values()) < 1e-5
