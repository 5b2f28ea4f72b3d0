r"""The layers and cells without modules: weights are passed in.

Layer form: ``lstm(input, hx, weights, num_layers=1, ...)``, where ``weights`` is the flat list of
torch.nn: for every layer and direction ``w_ih, w_hh, b_ih, b_hh, w_hr``, without the biases if
``bias=False`` and without ``w_hr`` if there is no projection. Cell form:
``lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)``, as :func:`torch.lstm_cell`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _heads, _norm, _parameters, _regularize, _run
from ._cell_functions import gru_cell, lstm_cell, rnn_relu_cell, rnn_tanh_cell
from ._checks import check_dense
from ._signatures import Input as Form
from ._signatures import States
from .batch_norm_functional import batch_norm_lstm
from .cells import CellSpec, cell_spec, chosen_cell
from .gru import kind_of as gru_kind_of
from .lstm import kind_of
from .scan import linear_scan
from .scan_functional import min_gru, min_lstm, qrnn
from .slstm_functional import slstm
from .sru import sru

__all__ = [
    "batch_norm_lstm",
    "gru",
    "gru_cell",
    "indrnn",
    "indrnn_relu",
    "indrnn_tanh",
    "linear_scan",
    "lstm",
    "lstm_cell",
    "min_gru",
    "min_lstm",
    "qrnn",
    "rnn",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
    "slstm",
    "sru",
]

Input = Tensor | PackedSequence

_RNN_TANH = cell_spec("rnn_tanh")
_RNN_RELU = cell_spec("rnn_relu")
_INDRNN_TANH = cell_spec("indrnn_tanh")
_INDRNN_RELU = cell_spec("indrnn_relu")

_LAYER_DOC = r"""{what}

    {equation}

    Args:
        input: the sequence, a tensor or a :class:`torch.nn.utils.rnn.PackedSequence`
        hx: initial state{pair}; ``None`` means zeros
        weights: flat list, for each layer and direction ``{weights}``
        num_layers: number of layers :math:`L`
        bias: whether ``weights`` has ``b_ih, b_hh``
        batch_first: input and output are :math:`(B, T, *)`
        dropout: probability of an element being zeroed between layers
        training: whether any dropout is applied
        bidirectional: two directions, :math:`D = 2`
        reset: true at the first step of each new sequence, as :class:`rnnfast.LSTM` takes it
        lengths: valid steps of each row of padded input, as :class:`rnnfast.LSTM` takes them
        recompute: {recompute}
        mask: true at the valid steps of padded input, as :class:`rnnfast.LSTM` takes it
        weight_dropout, input_dropout: probability of an entry of w_hh (one mask a call), and of a
            feature of a layer's input (one mask a sequence), being zeroed in training
        return_last: the output is that of the last step only{residual}{inside}{activation}

    Shape:
        - input: :math:`(T, B, I)`, :math:`(B, T, I)` if ``batch_first``, :math:`(T, I)`, or packed
        - hx: :math:`(D \cdot L, B, H)`, or :math:`(D \cdot L, H)` for unbatched input{projection}
        - reset, mask: bool, input's shape without the features
        - lengths: integers, :math:`(B)`
        - Output: ``(output, {out})`` of the same forms, :math:`D \cdot H` features; with
          ``return_last`` an output of :math:`(B, D \cdot H)`

    Raises:
        RuntimeError: a size, device or number of weights that does not fit
        ValueError: an input of the wrong rank or dtype, ``dropout`` outside of [0, 1],
            another probability outside of [0, 1)
        TypeError: weights, hx or options of another type

    Example::

        >>> x, layer = torch.randn(5, 3, 10), rnnfast.{module}
        >>> output, {out_names} = rnnfast.functional.{name}(x, None, layer.all_weights[0])
    """


def _check_options(num_layers: Any, bias: Any, dropout: Any) -> None:
    """What torch.nn's layers refuse when they are made."""
    if not isinstance(bias, bool):
        raise TypeError(f"rnnfast: bias must be a bool, got {type(bias).__name__}")
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
        raise RuntimeError(f"rnnfast: num_layers must be an int >= 1, got {num_layers!r}")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"rnnfast: dropout must be a number in [0, 1], got {dropout!r}")


def _layer(
    name: str,
    spec: CellSpec,
    input: Input,
    hx: Any,
    reset: Any,
    weights: Sequence[Tensor],
    num_layers: int,
    bias: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    bidirectional: bool,
    lengths: Tensor | None,
    recompute: bool,
    mask: Tensor | None,
    weight_dropout: float,
    input_dropout: float,
    return_last: bool,
    residual: bool = False,
    recurrent_dropout: float = 0.0,
    zoneout: float | tuple[float, float] = 0.0,
    num_heads: int = 1,
) -> tuple[Any, Any]:
    _check_options(num_layers, bias, dropout)
    options = _regularize.of_function(
        name, training, spec.states, weight_dropout, input_dropout, residual, return_last,
        recurrent_dropout, zoneout,
    )  # fmt: skip
    count = num_layers * (2 if bidirectional else 1)
    own = _parameters.tensors_of(spec)
    each = (4 if bias else 2) + own
    if not isinstance(weights, Iterable):
        raise TypeError(f"rnnfast: weights must be a list of tensors, got {type(weights).__name__}")
    weights = list(weights)
    has_proj = spec.states == 2
    proj = has_proj and len(weights) == count * (each + 1)
    if len(weights) != count * (each + proj):
        raise RuntimeError(
            f"rnnfast: weights must hold {each} tensors for each of {count} layers and directions "
            f"= {count * each}{' (one more each with w_hr)' if has_proj else ''}, "
            f"got {len(weights)}"
        )
    for k, w in enumerate(weights):
        if not isinstance(w, Tensor):
            raise TypeError(f"rnnfast: weights[{k}] must be a tensor, got {type(w).__name__}")
        if w.layout is not torch.strided:
            check_dense(w, f"weights[{k}]")
    w_ih, w_hr = weights[0], weights[4 if bias else 2] if proj else None
    if w_ih.dim() != 2:
        raise RuntimeError(f"rnnfast: w_ih must have shape (G*H, I), got {tuple(w_ih.shape)}")
    if w_hr is not None and w_hr.dim() != 2:
        raise RuntimeError(f"rnnfast: w_hr must have shape (P, H), got {tuple(w_hr.shape)}")
    if spec.parameters:
        weights, bias = _parameters.merge(spec, weights, count, bias), True
    hidden_size, proj_size = w_ih.size(0) // spec.gates, 0 if w_hr is None else w_hr.size(0)
    if _heads.check(name, num_heads, hidden_size, proj_size) > 1:
        spec = replace(spec, heads=num_heads)
        weights = _heads.split(name, spec, weights, bias)
    return _run.layer(
        name, spec, input, hx, reset, weights, w_ih.size(1), hidden_size, proj_size, num_layers,
        bias, batch_first, dropout if training else 0.0, bidirectional, None, lengths, recompute,
        mask, options,
    )  # fmt: skip


def lstm(
    input: Form,
    hx: States | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    reset: Input | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
    mask: Tensor | None = None,
    weight_dropout: float = 0.0,
    input_dropout: float = 0.0,
    return_last: bool = False,
    recurrent_dropout: float = 0.0,
    zoneout: float | tuple[float, float] = 0.0,
    activation: str = "tanh",
    gate_activation: str = "sigmoid",
    cell_clip: float | None = None,
    coupled: bool = False,
    peephole: bool = False,
    num_heads: int = 1,
    layer_norm: bool = False,
) -> tuple[Form, States]:
    if isinstance(hx, (tuple, list)) and len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    kind = _norm.kind_of(
        "lstm", kind_of("lstm", coupled, peephole), "lstm", layer_norm, coupled=coupled,
        peephole=peephole, cell_clip=cell_clip is not None, num_heads=num_heads != 1,
    )  # fmt: skip
    spec = chosen_cell("lstm", kind, activation, gate_activation, cell_clip)
    return _layer(
        "LSTM", spec, input, hx, reset, weights, num_layers, bias, batch_first, dropout,
        training, bidirectional, lengths, recompute, mask, weight_dropout, input_dropout,
        return_last, False, recurrent_dropout, zoneout, num_heads,
    )  # fmt: skip


def gru(
    input: Form,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    reset: Input | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
    mask: Tensor | None = None,
    weight_dropout: float = 0.0,
    input_dropout: float = 0.0,
    return_last: bool = False,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    activation: str = "tanh",
    gate_activation: str = "sigmoid",
    reset_after: bool = True,
    num_heads: int = 1,
    layer_norm: bool = False,
) -> tuple[Form, Tensor]:
    kind = _norm.kind_of(
        "gru", gru_kind_of("gru", reset_after), "gru", layer_norm,
        **{"reset_after=False": not reset_after, "num_heads": num_heads != 1},
    )  # fmt: skip
    spec = chosen_cell("gru", kind, activation, gate_activation)
    return _layer(
        "GRU", spec, input, hx, reset, weights, num_layers, bias, batch_first, dropout,
        training, bidirectional, lengths, recompute, mask, weight_dropout, input_dropout,
        return_last, False, recurrent_dropout, zoneout, num_heads,
    )  # fmt: skip


def rnn_tanh(
    input: Form,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    reset: Input | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
    mask: Tensor | None = None,
    weight_dropout: float = 0.0,
    input_dropout: float = 0.0,
    return_last: bool = False,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
) -> tuple[Form, Tensor]:
    return _layer(
        "RNN", _RNN_TANH, input, hx, reset, weights, num_layers, bias, batch_first, dropout,
        training, bidirectional, lengths, recompute, mask, weight_dropout, input_dropout,
        return_last, False, recurrent_dropout, zoneout,
    )  # fmt: skip


def rnn_relu(
    input: Form,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    reset: Input | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
    mask: Tensor | None = None,
    weight_dropout: float = 0.0,
    input_dropout: float = 0.0,
    return_last: bool = False,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
) -> tuple[Form, Tensor]:
    return _layer(
        "RNN", _RNN_RELU, input, hx, reset, weights, num_layers, bias, batch_first, dropout,
        training, bidirectional, lengths, recompute, mask, weight_dropout, input_dropout,
        return_last, False, recurrent_dropout, zoneout,
    )  # fmt: skip


def indrnn_tanh(
    input: Form,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    reset: Input | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
    mask: Tensor | None = None,
    weight_dropout: float = 0.0,
    input_dropout: float = 0.0,
    return_last: bool = False,
    residual: bool = False,
) -> tuple[Form, Tensor]:
    return _layer(
        "IndRNN", _INDRNN_TANH, input, hx, reset, weights, num_layers, bias, batch_first, dropout,
        training, bidirectional, lengths, recompute, mask, weight_dropout, input_dropout,
        return_last, residual,
    )  # fmt: skip


def indrnn_relu(
    input: Form,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    reset: Input | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
    mask: Tensor | None = None,
    weight_dropout: float = 0.0,
    input_dropout: float = 0.0,
    return_last: bool = False,
    residual: bool = False,
) -> tuple[Form, Tensor]:
    return _layer(
        "IndRNN", _INDRNN_RELU, input, hx, reset, weights, num_layers, bias, batch_first, dropout,
        training, bidirectional, lengths, recompute, mask, weight_dropout, input_dropout,
        return_last, residual,
    )  # fmt: skip


def rnn(
    input: Form,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    activation: str = "tanh",
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    reset: Input | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
    mask: Tensor | None = None,
    weight_dropout: float = 0.0,
    input_dropout: float = 0.0,
    return_last: bool = False,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    layer_norm: bool = False,
) -> tuple[Form, Tensor]:
    spec = chosen_cell("rnn", _norm.kind_of("rnn", "rnn", "rnn", layer_norm), activation)
    return _layer(
        "RNN", spec, input, hx, reset, weights,
        num_layers, bias, batch_first, dropout, training, bidirectional, lengths, recompute, mask,
        weight_dropout, input_dropout, return_last, False, recurrent_dropout, zoneout,
    )  # fmt: skip


def indrnn(
    input: Form,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    activation: str = "relu",
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    reset: Input | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
    mask: Tensor | None = None,
    weight_dropout: float = 0.0,
    input_dropout: float = 0.0,
    return_last: bool = False,
    residual: bool = False,
    layer_norm: bool = False,
) -> tuple[Form, Tensor]:
    kind = _norm.kind_of("indrnn", "indrnn", "indrnn", layer_norm)
    return _layer(
        "IndRNN", chosen_cell("indrnn", kind, activation), input, hx, reset, weights,
        num_layers, bias, batch_first, dropout, training, bidirectional, lengths, recompute, mask,
        weight_dropout, input_dropout, return_last, residual,
    )  # fmt: skip


_RNN_EQUATION = ":math:`h_t = {act}(W_{{ih}} x_t + b_{{ih}} + W_{{hh}} h_{{t-1}} + b_{{hh}})`"
_INDRNN_EQUATION = ":math:`h_t = {act}(W_{{ih}} x_t + b_{{ih}} + u \\odot h_{{t-1}} + b_{{hh}})`"
_RECOMPUTE = (
    "keep only the states every 64 steps for backward, and compute what lies between\n"
    "            anew there"
)
_RESIDUAL = "\n        residual: as :class:`rnnfast.IndRNN` has it"
_INSIDE = (
    "\n        recurrent_dropout: probability of a feature of h being zeroed on its way into w_hh"
    "\n            in training, one mask a sequence"
    "\n        zoneout: probability of an entry of a state staying as it was at a step in training,"
    "\n            and the part that stays else"
)
_PAIR = "; a pair: of h and of c"
_ONE_ACTIVATION = "\n        activation: one of :data:`rnnfast.ACTIVATIONS`"
_TWO_ACTIVATIONS = "\n        activation, gate_activation: two of :data:`rnnfast.ACTIVATIONS`"
_HEADS = (
    "\n        num_heads: blocks of w_hh, (G*H, H/num_heads), as :class:`rnnfast.LSTM` has them"
)
_LAYER_NORM = """
        layer_norm: as :class:`rnnfast.LSTM` has it; ``weights`` has its parameters behind the
            others of each layer and direction"""
_ACTIVATION = {
    "lstm": _TWO_ACTIVATIONS
    + """
        cell_clip: bound of c, or ``None``
        coupled: the input gate is 1 - f: gates f, g, o
        peephole: the gates see c; ``weights`` has p_i, p_f, p_o, one tensor ``(3H,)``, behind the
            others of each layer and direction"""
    + _HEADS
    + _LAYER_NORM,
    "gru": _TWO_ACTIVATIONS
    + "\n        reset_after: as :class:`rnnfast.GRU` has it"
    + _HEADS
    + _LAYER_NORM,
    "rnn": _ONE_ACTIVATION + _LAYER_NORM,
    "indrnn": _ONE_ACTIVATION + _LAYER_NORM,
}
_NOTHING_KEPT = "taken, and changes nothing: nothing is kept beyond input and output"
_DOCS: tuple[tuple[Any, str, str, str], ...] = (
    (
        lstm,
        "LSTM(10, 20)",
        "LSTM (Hochreiter & Schmidhuber 1997; with projection, Sak et al. 2014).",
        "As :class:`rnnfast.LSTM`; a projection is there if ``w_hr`` is.",
    ),
    (
        gru,
        "GRU(10, 20)",
        "GRU (Cho et al. 2014), the reset gate after the product, or before it.",
        "As :class:`rnnfast.GRU`.",
    ),
    (
        rnn_tanh,
        "RNN(10, 20)",
        "Elman RNN (Elman 1990) with tanh.",
        _RNN_EQUATION.format(act=r"\tanh"),
    ),
    (
        rnn_relu,
        "RNN(10, 20, nonlinearity='relu')",
        "Elman RNN (Elman 1990) with relu.",
        _RNN_EQUATION.format(act=r"\text{relu}"),
    ),
    (
        indrnn_tanh,
        "IndRNN(10, 20, nonlinearity='tanh')",
        "IndRNN (Li et al. 2018, arXiv:1803.04831) with tanh; ``w_hh`` is :math:`u`, (H).",
        _INDRNN_EQUATION.format(act=r"\tanh"),
    ),
    (
        indrnn_relu,
        "IndRNN(10, 20)",
        "IndRNN (Li et al. 2018, arXiv:1803.04831) with relu; ``w_hh`` is :math:`u`, (H).",
        _INDRNN_EQUATION.format(act=r"\text{relu}"),
    ),
    (
        rnn,
        "RNN(10, 20)",
        "Elman RNN (Elman 1990) with any activation.",
        _RNN_EQUATION.format(act=r"\text{act}"),
    ),
    (
        indrnn,
        "IndRNN(10, 20)",
        "IndRNN (Li et al. 2018, arXiv:1803.04831) with any activation; ``w_hh`` is :math:`u`, "
        "(H).",
        _INDRNN_EQUATION.format(act=r"\text{act}"),
    ),
)
for _function, _module, _what, _equation in _DOCS:
    _two = _function is lstm
    _function.__doc__ = _LAYER_DOC.format(
        what=_what,
        equation=_equation,
        name=_function.__name__,
        module=_module,
        pair=" ``(h_0, c_0)``" if _two else " ``h_0``",
        weights="w_ih, w_hh, b_ih, b_hh[, w_hr]" if _two else "w_ih, w_hh, b_ih, b_hh",
        projection="; with a projection h_0 has proj_size features" if _two else "",
        out="(h_n, c_n)" if _two else "h_n",
        out_names="(h_n, c_n)" if _two else "h_n",
        activation=_ACTIVATION.get(_function.__name__, ""),
        residual=_RESIDUAL if "indrnn" in _function.__name__ else "",
        inside="" if "indrnn" in _function.__name__ else _INSIDE + _PAIR * _two,
        recompute=_NOTHING_KEPT if "rnn_" in _function.__name__ else _RECOMPUTE,
    )
