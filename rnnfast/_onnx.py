"""rnnfast's operators in ONNX: standard LSTM, GRU and RNN nodes, one for each direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _batch_norm, _last, _lengths, _masked, ops
from .cells import cell_spec

__all__ = ["onnx_translations"]

# name of the cell -> node, the order of ONNX's gates in ours, attributes
_NODES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2), {}),  # i f g o -> i o f c
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # r z n -> z r h
    "gru_before": ("GRU", (1, 0, 2), {"linear_before_reset": 0}),
    "rnn_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
    "indrnn_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),
    "indrnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
}


def _refuse(what: str, instead: str) -> None:
    raise NotImplementedError(f"rnnfast: ONNX has no {what}; {instead}")


def _node(
    op: Any,
    x: Any,
    h0: Any,
    c0: Any,
    w_ih: Any,
    w_hh: Any,
    b_ih: Any,
    b_hh: Any,
    lengths: Any,
    cell: int,
    reverse: bool,
) -> tuple[Any, Any, Any, Any]:
    spec = cell_spec(cell)
    chosen = cell >> 8 != 0
    if spec.name not in _NODES or chosen:
        _refuse(
            f"node for {spec.name}{' with chosen activations' * (chosen and spec.stages)}",
            "export it under use_engine('reference'), step by step",
        )
    name, order, attributes = _NODES[spec.name]
    hidden = w_ih.shape[0] // spec.gates

    def first_axis(value: Any) -> Any:
        return op.Unsqueeze(value, op.Constant(value_ints=[0]))

    def in_order(value: Any) -> Any:
        if len(order) == 1:
            return value
        rows = [row for k in order for row in range(k * hidden, (k + 1) * hidden)]
        return op.Gather(value, op.Constant(value_ints=rows), axis=0)

    if spec.diagonal:  # u as a matrix: RNN has no other recurrence
        eye = op.EyeLike(op.ConstantOfShape(op.Constant(value_ints=[hidden, hidden])), dtype=1)
        w_hh = op.Mul(op.CastLike(eye, w_hh), w_hh)
    bias = None
    if b_ih is not None:
        bias = first_axis(op.Concat(in_order(b_ih), in_order(b_hh), axis=0))
    states = [None if h0 is None else first_axis(h0)]
    if spec.states == 2:
        states.append(c0)  # has the axis of directions already
    y, h_n, *rest = getattr(op, name)(
        x,
        first_axis(in_order(w_ih)),
        first_axis(in_order(w_hh)),
        bias,
        None if lengths is None else op.Cast(lengths, to=6),  # int32
        *states,
        hidden_size=hidden,
        direction="reverse" if reverse else "forward",
        **attributes,
    )
    axis = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    nothing = op.Slice(h_n, zero, zero, zero)  # c_n of cells without one, and what backward needs
    return op.Squeeze(y, axis), op.Squeeze(h_n, zero), rest[0] if rest else nothing, nothing


def onnx_translations() -> dict[Any, Callable[..., Any]]:
    """What ``torch.onnx.export`` needs to know of the layers.

    Give it as ``custom_translation_table``: each direction of each layer becomes a standard LSTM,
    GRU (``linear_before_reset=1``, or 0 for ``reset_after=False``) or RNN node, with dynamic
    :math:`T` and :math:`B` if they are asked for, initial states and ``lengths``
    (``sequence_lens`` of the nodes). The weights keep their order in the file and are put into
    ONNX's by nodes that runtimes fold when they load it.
    An IndRNN is an RNN whose recurrent matrix is diagonal, :math:`H^2` numbers. A frozen layer is
    exported with its plain weights.

    Needs onnx and onnxscript, which the package itself does not.

    Returns:
        a table from operators to functions

    Raises:
        ImportError: without onnxscript
        NotImplementedError: in the export, for what ONNX has no node for: ``proj_size``, ``reset``,
            packed input (give ``lengths``), ``zoneout``, BatchNormLSTM and quantized layers

    Example::

        >>> torch.onnx.export(
        ...     model.eval(), (x,), "model.onnx", dynamo=True,
        ...     custom_translation_table=rnnfast.onnx_translations(),
        ... )
    """
    try:
        from onnxscript import opset18 as op
    except ImportError as error:
        raise ImportError(
            "rnnfast: export to ONNX needs onnx and onnxscript; pip install onnx onnxscript"
        ) from error

    def quantized(*_: Any) -> None:
        _refuse("int8 weights for its recurrent nodes", "export the layer before quantize()")

    def check(w_hr: Any, reset: Any, packed: Any, save: bool) -> None:
        if w_hr is not None:
            _refuse("projection (proj_size)", "a layer without it and a Linear come nearest")
        if reset is not None:
            _refuse("reset masks", "export without reset, and cut sequences with lengths")
        if packed is not None:
            quantized()
        if save:
            _refuse("backward pass", "export under torch.no_grad(), or through torch.export")

    def forward(
        x: Any, h0: Any, c0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, w_hr: Any,
        batch_sizes: Any, reset: Any, packed: Any, cell: int, reverse: bool, save: bool,
    ) -> Any:  # fmt: skip
        check(w_hr, reset, packed, save)
        if batch_sizes is not None:
            _refuse("packed input", "call the layer with padded input and lengths=")
        return _node(op, x, h0, c0, w_ih, w_hh, b_ih, b_hh, None, cell, reverse)

    def forward_lengths(
        x: Any, h0: Any, c0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, w_hr: Any,
        lengths: Any, reset: Any, packed: Any, cell: int, reverse: bool, save: bool,
    ) -> Any:  # fmt: skip
        check(w_hr, reset, packed, save)
        return _node(op, x, h0, c0, w_ih, w_hh, b_ih, b_hh, lengths, cell, reverse)

    def forward_last(
        x: Any, h0: Any, c0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, w_hr: Any,
        batch_sizes: Any, reset: Any, packed: Any, cell: int, reverse: bool,
    ) -> Any:  # fmt: skip
        outputs = forward(
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reset, packed, cell, reverse,
            False,
        )  # fmt: skip
        return outputs[1:3]

    def masked(*_: Any) -> None:
        _refuse("zoneout", "set zoneout = 0 if the states may go without it")

    def batch_normalised(*_: Any) -> None:
        _refuse("statistics of a batch in a recurrence", "export a model without BatchNormLSTM")

    return {
        _masked.forward: masked,
        _batch_norm.forward: batch_normalised,
        ops.forward: forward,
        _last.forward_last: forward_last,
        _lengths.forward: forward_lengths,
        ops.pack_int8: quantized,
    }
