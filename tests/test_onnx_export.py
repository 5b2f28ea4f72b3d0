"""Export to ONNX: standard nodes, and ONNX Runtime's numbers are ours. (The standard's own vectors
are in test_onnx.py.)"""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import works
from test_modules import leaves_of
from torch import Tensor, nn

import rnnfast

KINDS: dict[str, Any] = {
    "LSTM": lambda **o: rnnfast.LSTM(5, 9, **o),
    "GRU": lambda **o: rnnfast.GRU(5, 9, **o),
    "GRU, reset before": lambda **o: rnnfast.GRU(5, 9, reset_after=False, **o),
    "RNN tanh": lambda **o: rnnfast.RNN(5, 9, **o),
    "RNN relu": lambda **o: rnnfast.RNN(5, 9, nonlinearity="relu", **o),
    "IndRNN tanh": lambda **o: rnnfast.IndRNN(5, 9, nonlinearity="tanh", **o),
    "IndRNN relu": lambda **o: rnnfast.IndRNN(5, 9, **o),
}
ALL: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": True}
SHAPES = ((4, 3), (9, 5), (1, 1), (100, 2))  # (T, B)


class Model(nn.Module):
    """The forms of a call, each by name."""

    def __init__(self, layer: Any, form: str) -> None:
        super().__init__()
        self.layer, self.form = layer, form

    def forward(self, x: Tensor, *given: Tensor) -> Any:
        two = isinstance(self.layer, (rnnfast.LSTM, nn.LSTM))
        if self.form == "hx":
            return self.layer(x, given if two else given[0])
        return self.layer(x, **dict(zip([self.form], given)))


def export(model: nn.Module, args: tuple[Any, ...], shapes: Any, **options: Any) -> Any:
    pytest.importorskip("onnxscript")
    table = rnnfast.onnx_translations()
    return torch.onnx.export(
        model, args, dynamo=True, verbose=False, dynamic_shapes=shapes,
        custom_translation_table=table, **options,
    )  # fmt: skip


def session(program: Any) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString())


def run(there: Any, *args: Tensor) -> list[Tensor]:
    names = [one.name for one in there.get_inputs()]
    feed = {name: arg.numpy() for name, arg in zip(names, args, strict=True)}
    return [torch.from_numpy(np.asarray(y)) for y in there.run(None, feed)]


def nodes(program: Any, reset_after: bool = True) -> Counter[str]:
    """The recurrent nodes, and what they say of themselves."""
    found: Counter[str] = Counter()
    for node in program.model_proto.graph.node:
        assert node.domain == "", "no node but ONNX's own"
        if node.op_type in ("LSTM", "GRU", "RNN"):
            found[node.op_type] += 1
            attributes = {a.name: a for a in node.attribute}
            if node.op_type == "GRU":
                assert attributes["linear_before_reset"].i == int(reset_after)
    assert not {"Loop", "Scan"} & {node.op_type for node in program.model_proto.graph.node}
    return found


def example(model: Model, steps: int, batch: int) -> tuple[Tensor, ...]:
    layer = model.layer
    x = torch.randn((batch, steps, 5) if layer.batch_first else (steps, batch, 5))
    if model.form == "lengths":
        return x, torch.randint(1, steps + 1, (batch,))
    if model.form == "hx":
        count = layer.num_layers * (1 + layer.bidirectional)
        states = 1 + isinstance(layer, rnnfast.LSTM)
        return x, *(torch.randn(count, batch, 9) for _ in range(states))
    return (x,)


def shapes_of(model: Model) -> Any:
    first = model.layer.batch_first
    states = 1 + isinstance(model.layer, rnnfast.LSTM)
    more = {"lengths": ({0: "B"},), "hx": ({1: "B"},) * states}.get(model.form, ())
    shapes = {"x": {0: "B", 1: "T"} if first else {0: "T", 1: "B"}}
    return {**shapes, "given": more} if more else shapes


def check(layer: Any, form: str) -> None:
    model = Model(layer, form).eval()
    program = export(model, example(model, 4, 3), shapes_of(model))
    count = layer.num_layers * (1 + layer.bidirectional)
    kind = type(layer).__name__.replace("IndRNN", "RNN")
    assert nodes(program, getattr(layer, "reset_after", True)) == {kind: count}
    there = session(program)
    for steps, batch in SHAPES:
        args = example(model, steps, batch)
        with torch.no_grad():
            want = leaves_of(model(*args))
        for a, b in zip(run(there, *args), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "hx", "lengths"])
@pytest.mark.parametrize("options", [{}, ALL], ids=["one", "all"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_forms(kind: str, options: Any, form: str) -> None:
    check(KINDS[kind](**options), form)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "GRU, reset before", "IndRNN relu"])
def test_without_biases(kind: str) -> None:
    check(KINDS[kind](bias=False, bidirectional=True), "plain")


@pytest.mark.parametrize(
    "kind", ["RNN tanh", "RNN relu", "IndRNN tanh", "IndRNN relu", "GRU, reset before"]
)
def test_other_cells(kind: str) -> None:
    check(KINDS[kind](num_layers=2), "lengths" if kind == "IndRNN tanh" else "hx")


def test_a_frozen_layer_is_exported_with_its_weights() -> None:
    layer = rnnfast.GRU(5, 9).eval()
    with torch.no_grad():
        layer.freeze()
        check(layer, "plain")


def test_wrong_lengths_raise_there_too() -> None:
    model = Model(rnnfast.GRU(5, 9), "lengths").eval()
    there = session(export(model, example(model, 4, 3), shapes_of(model)))
    with pytest.raises(Exception, match="sequence_lens"):
        run(there, torch.randn(4, 3, 5), torch.tensor([1, 5, 2]))


def test_what_onnx_has_not() -> None:
    """A sentence of ours, at the end of the exporter's."""
    x, reset = torch.randn(4, 3, 5), torch.zeros(4, 3, dtype=torch.bool)
    cases: list[tuple[nn.Module, tuple[Any, ...], str]] = [
        (Model(rnnfast.LSTM(5, 9, proj_size=4), "plain"), (x,), "projection (proj_size)"),
        (Model(rnnfast.GRU(5, 9), "reset"), (x, reset), "reset masks"),
        (rnnfast.quantize(rnnfast.GRU(5, 9)), (x,), "int8 weights"),
        (
            Model(rnnfast.GRU(5, 9, activation="relu", reset_after=False), "plain"),
            (x,),
            "node for gru_before with chosen activations",
        ),
        (Model(rnnfast.LSTM(5, 9, zoneout=0.2), "plain"), (x,), "zoneout"),
        (Model(rnnfast.BatchNormLSTM(5, 9, max_steps=4), "plain"), (x,), "statistics of a batch"),
    ]
    for model, args, what in cases:
        with pytest.raises(Exception, match=re.escape(f"rnnfast: ONNX has no {what}")):
            export(model.eval(), args, None)


def test_without_onnxscript(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="rnnfast: export to ONNX needs onnx and onnxscript"):
        rnnfast.onnx_translations()


def test_every_operator_of_a_layer_is_translated() -> None:
    """To nodes, or to a sentence that says what there is no node for."""
    table = rnnfast.onnx_translations()
    assert {op.name() for op in table} == {
        "rnnfast::batch_norm_forward",
        "rnnfast::forward",
        "rnnfast::forward_last",
        "rnnfast::forward_lengths",
        "rnnfast::forward_masked",
        "rnnfast::pack_int8",
    }


def _row(library: Any, kind: str, device: torch.device, shapes: Any) -> None:
    model = Model(getattr(library, kind)(5, 9, device=device), "plain").eval()
    program = export(model, (torch.randn(4, 3, 5, device=device),), {"x": shapes})
    assert nodes(program) == {kind: 1}
    x = torch.randn(9 if "T" in shapes.values() else 4, 5, 5)
    with torch.no_grad():
        want = leaves_of(model(x.to(device)))
    for a, b in zip(run(session(program), x), want, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-5)


@works.row(
    "Compilers and export",
    "ONNX (`dynamo=True`): LSTM and GRU nodes, dynamic B; ONNX Runtime agrees",
)
def test_lstm_and_gru_nodes(library: Any, device: torch.device) -> None:
    for kind in ("LSTM", "GRU"):
        _row(library, kind, device, {1: "B"})


@works.row(
    "Compilers and export",
    "ONNX with dynamic T and B",
    torch_nn="no: the file fails at another T",
    error="ONNXRuntimeError.*Reshape",
)
def test_onnx_with_dynamic_time(library: Any, device: torch.device) -> None:
    for kind in ("LSTM", "GRU"):
        _row(library, kind, device, {0: "T", 1: "B"})


def unrolled(library: Any, device: torch.device) -> None:
    counts = []
    for steps in (4, 8):
        model = Model(library.RNN(5, 9, device=device), "plain").eval()
        program = export(model, (torch.randn(steps, 3, 5),), {"x": {1: "B"}})
        counts.append(Counter(node.op_type for node in program.model_proto.graph.node))
    assert not any("RNN" in found for found in counts)
    assert [found["Tanh"] for found in counts] == [4, 8]


@works.row(
    "Compilers and export",
    "ONNX: an RNN is a RNN node",
    torch_nn="no: unrolled over T",
    theirs=unrolled,
)
def test_rnn_nodes(library: Any, device: torch.device) -> None:
    _row(library, "RNN", device, {1: "B"})
