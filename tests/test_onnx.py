"""The ONNX standard's own test vectors for LSTM, GRU and RNN, computed by our layers."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rnnfast

# ONNX keeps LSTM's gates as i o f c and GRU's as z r h; ours, as torch's, are i f g o and r z n.
GATE_ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}

NAMES = [
    *(
        f"test_lstm_{s}"
        for s in ("defaults", "with_initial_bias", "batchwise", "reverse", "bidirectional")
    ),
    *(
        f"test_gru_{s}"
        for s in (
            "defaults",
            "with_initial_bias",
            "batchwise",
            "reverse",
            "bidirectional",
            "seq_length",
        )
    ),
    *(f"test_simple_rnn_{s}" for s in ("defaults", "with_initial_bias", "batchwise", "reverse")),
    "test_simple_rnn_bidirectional",
    "test_rnn_seq_length",
    "test_lstm_with_peepholes",
]


@functools.cache
def vectors() -> dict[str, Any]:
    onnx = pytest.importorskip("onnx")
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tests = load_model_tests(kind="node")
    found = {}
    for test in tests:
        if len(test.model.graph.node) == 1 and test.model.graph.node[0].op_type in GATE_ORDER:
            node = test.model.graph.node[0]
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            ((inputs, outputs),) = test.data_sets
            names = [name for name in node.output if name]
            found[test.name] = (
                node.op_type,
                attributes,
                dict(zip(node.input, map(np.asarray, inputs), strict=True)),
                dict(zip(names, map(np.asarray, outputs), strict=True)),
            )
    return found


def to_torch_order(op: str, rows: np.ndarray) -> Tensor:
    gates = np.split(rows, len(GATE_ORDER[op]))
    return torch.from_numpy(np.concatenate([gates[k] for k in GATE_ORDER[op]]))


def test_every_vector_is_accounted_for() -> None:
    assert set(vectors()) == set(NAMES)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_onnx_vector(name: str, engine: str) -> None:
    op, attributes, inputs, outputs = vectors()[name]
    way = attributes.get("direction", b"forward").decode()
    batch_first = bool(attributes.get("layout", 0))
    weights = []
    for d in range(inputs["W"].shape[0]):
        weights += [to_torch_order(op, inputs["W"][d]), to_torch_order(op, inputs["R"][d])]
        if "B" in inputs:
            weights += [to_torch_order(op, half) for half in np.split(inputs["B"][d], 2)]
        if "P" in inputs:  # i o f
            p = torch.from_numpy(inputs["P"][d].copy()).chunk(3)
            weights.append(torch.cat([p[0], p[2], p[1]]))
    x = torch.from_numpy(inputs["X"].copy())
    x = x.flip(1 if batch_first else 0) if way == "reverse" else x
    function = getattr(rnnfast.functional, "rnn_tanh" if op == "RNN" else op.lower())
    with_lengths = "sequence_lens" in inputs
    options: dict[str, Any] = {"peephole": True} if "P" in inputs else {}
    if op == "GRU":
        options = {"reset_after": bool(attributes.get("linear_before_reset", 0))}
    hx = [torch.from_numpy(inputs[k].copy()) for k in ("initial_h", "initial_c") if k in inputs]
    with rnnfast.use_engine(engine):
        y, state = function(
            x,
            None if not hx else hx[0] if op != "LSTM" else tuple(hx),
            weights,
            bias="B" in inputs,
            batch_first=batch_first,
            bidirectional=way == "bidirectional",
            lengths=torch.from_numpy(inputs["sequence_lens"].copy()) if with_lengths else None,
            **options,
        )
    h_n, c_n = state if op == "LSTM" else (state, None)
    if way == "reverse":
        y = y.flip(1 if batch_first else 0)
    # ONNX: Y (T, D, B, H), or (B, T, D, H) with layout 1, whose states have the batch first too
    ways = 2 if way == "bidirectional" else 1
    split = y.unflatten(-1, (ways, -1))
    ours = {
        "Y": split if batch_first else split.transpose(1, 2),
        "Y_h": h_n.transpose(0, 1) if batch_first else h_n,
        "Y_c": c_n,
    }
    assert outputs, "a vector without outputs would prove nothing"
    for key, want in outputs.items():
        torch.testing.assert_close(ours[key], torch.from_numpy(want.copy()), rtol=1e-5, atol=1e-6)
