"""The ONNX model of a problem, for ONNX Runtime and OpenVINO."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from .problem import Problem

# torch's gate order -> ONNX's: LSTM i f g o -> i o f c, GRU r z n -> z r h
ORDER = {"lstm": [0, 3, 1, 2], "gru": [1, 0, 2], "rnn": [0]}


def reorder(weight: np.ndarray, cell: str) -> np.ndarray:
    gates = np.split(weight, len(ORDER[cell]))
    return np.concatenate([gates[k] for k in ORDER[cell]])


def bytes_of(stack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 numbers (D, K, rows) of weights (D, rows, K), and the scale of each row (D, rows).

    Of 7 bits (ONNX Runtime's ``reduce_range``): without VNNI its sums of two products of 8 bits
    saturate at 16, and the time does not depend on the numbers.
    """
    scale = np.abs(stack).max(2) / 64
    numbers = np.rint(stack / scale[..., None]).astype(np.int8)
    return numbers.transpose(0, 2, 1), scale.astype(np.float32)


def build(problem: Problem, int8: bool = False) -> bytes:
    """A serialised model: inputs x, then lengths when packed, h0 (and c0) when streaming.

    Outputs: y (T, B, D*H), then h_n (and c_n) of one-layer models. ``int8``: ONNX Runtime's own
    DynamicQuantizeLSTM in place of LSTM.
    """
    onnx: Any = importlib.import_module("onnx")
    helper, numpy_helper, types = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    s = problem.shape
    states = ["h", "c"] if s.cell == "lstm" else ["h"]

    inputs = [helper.make_tensor_value_info("x", types.FLOAT, [s.T, s.B, s.input_size])]
    if s.packed:
        inputs.append(helper.make_tensor_value_info("lengths", types.INT32, [s.B]))
    if problem.has_state:
        for name in states:
            shape = [s.directions, s.B, s.H]
            inputs.append(helper.make_tensor_value_info(f"{name}0", types.FLOAT, shape))

    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    constant("width", np.array([s.T, s.B, s.directions * s.H], np.int64))
    constant("one", np.array([1], np.int64))
    below = "x"
    for layer in range(s.layers):
        stacks: dict[str, list[np.ndarray]] = {"W": [], "R": [], "B": []}
        for suffix in ("", "_reverse")[: s.directions]:
            part = {
                key: reorder(problem.weights[f"{key}_l{layer}{suffix}"].numpy(), s.cell)
                for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }
            stacks["W"].append(part["weight_ih"])
            stacks["R"].append(part["weight_hh"])
            stacks["B"].append(np.concatenate([part["bias_ih"], part["bias_hh"]]))
        tables = {key: np.stack(value) for key, value in stacks.items()}
        scales: list[str] = []
        for key in ("W", "R") if int8 else ():
            tables[key], scale = bytes_of(tables[key])
            scales.append(constant(f"{key}_scale{layer}", scale))
            scales.append(constant(f"{key}_zero{layer}", np.zeros(scale.shape, np.int8)))
        names = [constant(f"{key}{layer}", value) for key, value in tables.items()]
        names.append("lengths" if s.packed else "")
        if problem.has_state:
            names += [f"{name}0" for name in states]
        if int8:
            names += [""] * (7 - len(names)) + scales  # the last of the 7: peepholes
        attributes: dict[str, Any] = {"hidden_size": s.H}
        attributes["direction"] = "bidirectional" if s.bidirectional else "forward"
        if s.cell == "gru":
            attributes["linear_before_reset"] = 1
        outputs = [f"raw{layer}", *(f"{name}_n{layer}" for name in states)]
        kind = s.cell.upper()
        if int8:
            kind = f"DynamicQuantize{kind}"
            attributes["domain"] = "com.microsoft"
        nodes.append(helper.make_node(kind, [below, *names], outputs, **attributes))
        below = "y" if layer == s.layers - 1 else f"y{layer}"
        if s.bidirectional:  # (T, D, B, H) -> (T, B, D*H)
            turned = f"turned{layer}"
            nodes.append(helper.make_node("Transpose", outputs[:1], [turned], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [turned, "width"], [below]))
        else:
            nodes.append(helper.make_node("Squeeze", [outputs[0], "one"], [below]))

    results = [helper.make_tensor_value_info("y", types.FLOAT, [s.T, s.B, s.directions * s.H])]
    if s.layers == 1:
        for name in states:
            shape = [s.directions, s.B, s.H]
            results.append(helper.make_tensor_value_info(f"{name}_n0", types.FLOAT, shape))
    graph = helper.make_graph(nodes, s.name, inputs, results, constants)
    opsets = [helper.make_opsetid("", 17)]
    if int8:
        opsets.append(helper.make_opsetid("com.microsoft", 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def feeds(problem: Problem) -> dict[str, np.ndarray]:
    """The arrays of the model's inputs, in its order."""
    arrays = {"x": problem.x.numpy()}
    if problem.shape.packed:
        arrays["lengths"] = problem.lengths.numpy().astype(np.int32)
    if problem.has_state:
        arrays["h0"] = problem.h0.numpy()
        if problem.shape.cell == "lstm":
            arrays["c0"] = problem.c0.numpy()
    return arrays
