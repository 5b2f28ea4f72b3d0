r"""The layers and cells without modules: weights are passed in.

Layer form: ``lstm(input, hx, weights, num_layers=1, ...)``, where ``weights`` is the flat list of
torch.nn: for every layer and direction ``w_ih, w_hh, b_ih, b_hh, w_hr``, without the biases if
``bias=False`` and without ``w_hr`` if there is no projection. Cell form:
``lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)``, as :func:`torch.lstm_cell`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _run
from ._signatures import Input as Form
from ._signatures import States
from .cells import CellSpec, cell_spec

__all__ = [
    "gru",
    "gru_cell",
    "indrnn_relu",
    "indrnn_tanh",
    "lstm",
    "lstm_cell",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
]

Input = Tensor | PackedSequence

_LSTM = cell_spec("lstm")
_GRU = cell_spec("gru")
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
        training: whether dropout is applied
        bidirectional: two directions, :math:`D = 2`
        reset: true at the first step of each new sequence, as :class:`rnnfast.LSTM` takes it
        lengths: valid steps of each row of padded input, as :class:`rnnfast.LSTM` takes them

    Shape:
        - input: :math:`(T, B, I)`, :math:`(B, T, I)` if ``batch_first``, :math:`(T, I)`, or packed
        - hx: :math:`(D \cdot L, B, H)`, or :math:`(D \cdot L, H)` for unbatched input{projection}
        - reset: bool, input's shape without the features
        - lengths: integers, :math:`(B)`
        - Output: ``(output, {out})`` of the same forms, :math:`D \cdot H` features

    Raises:
        RuntimeError: a size, device or number of weights that does not fit
        ValueError: an input of the wrong rank or dtype

    Example::

        >>> x, layer = torch.randn(5, 3, 10), rnnfast.{module}
        >>> output, {out_names} = rnnfast.functional.{name}(x, None, layer.all_weights[0])
    """

_CELL_DOC = r"""One step of {module}.

    Args:
        input: features of this step
        hx: state before it{pair}
        w_ih, w_hh: weights, gates in torch.nn's order
        b_ih, b_hh: biases, or ``None``

    Shape:
        - input: :math:`(B, I)`
        - hx: :math:`(B, H)`{each}
        - w_ih: :math:`({gates}H, I)`; w_hh: :math:`({gates}H, H)`; b_ih, b_hh: :math:`({gates}H)`
        - Output: as hx

    Raises:
        RuntimeError: a size, dtype or device that does not fit

    Example::

        >>> c = rnnfast.{module}(10, 20)
        >>> x, h = torch.randn(3, 10), torch.zeros(3, 20)
        >>> out = rnnfast.functional.{name}(
        ...     x, {hx}, c.weight_ih, c.weight_hh, c.bias_ih, c.bias_hh
        ... )
    """


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
) -> tuple[Any, Any]:
    count = num_layers * (2 if bidirectional else 1)
    each = 4 if bias else 2
    proj = spec is _LSTM and len(weights) == count * (each + 1)
    if num_layers < 1 or len(weights) != count * (each + proj):
        raise RuntimeError(
            f"rnnfast: weights must hold {each} tensors for each of {count} layers and directions "
            f"= {count * each}{' (one more each with w_hr)' if spec is _LSTM else ''}, "
            f"got {len(weights)}"
        )
    w_ih = weights[0]
    if w_ih.dim() != 2:
        raise RuntimeError(f"rnnfast: w_ih must have shape (G*H, I), got {tuple(w_ih.shape)}")
    return _run.layer(
        name,
        spec,
        input,
        hx,
        reset,
        weights,
        w_ih.size(1),
        w_ih.size(0) // spec.gates,
        weights[each].size(0) if proj else 0,
        num_layers,
        bias,
        batch_first,
        dropout if training else 0.0,
        bidirectional,
        None,
        lengths,
    )


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
) -> tuple[Form, States]:
    if hx is not None and not isinstance(hx, Tensor) and len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    return _layer(
        "LSTM", _LSTM, input, hx, reset, weights, num_layers, bias, batch_first, dropout,
        training, bidirectional, lengths,
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
) -> tuple[Form, Tensor]:
    return _layer(
        "GRU", _GRU, input, hx, reset, weights, num_layers, bias, batch_first, dropout,
        training, bidirectional, lengths,
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
) -> tuple[Form, Tensor]:
    return _layer(
        "RNN", _RNN_TANH, input, hx, reset, weights, num_layers, bias, batch_first, dropout,
        training, bidirectional, lengths,
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
) -> tuple[Form, Tensor]:
    return _layer(
        "RNN", _RNN_RELU, input, hx, reset, weights, num_layers, bias, batch_first, dropout,
        training, bidirectional, lengths,
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
) -> tuple[Form, Tensor]:
    return _layer(
        "IndRNN", _INDRNN_TANH, input, hx, reset, weights, num_layers, bias, batch_first, dropout,
        training, bidirectional, lengths,
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
) -> tuple[Form, Tensor]:
    return _layer(
        "IndRNN", _INDRNN_RELU, input, hx, reset, weights, num_layers, bias, batch_first, dropout,
        training, bidirectional, lengths,
    )  # fmt: skip


def lstm_cell(
    input: Tensor,
    hx: States | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> States:
    if len(hx) != 2:
        raise RuntimeError("lstm_cell expects two hidden states")
    h, c = _run.cell(_LSTM, input, hx[0], hx[1], w_ih, w_hh, b_ih, b_hh)
    return h, c.squeeze(0)


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    return _run.cell(_GRU, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    return _run.cell(_RNN_TANH, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    return _run.cell(_RNN_RELU, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


_RNN_EQUATION = ":math:`h_t = {act}(W_{{ih}} x_t + b_{{ih}} + W_{{hh}} h_{{t-1}} + b_{{hh}})`"
_INDRNN_EQUATION = ":math:`h_t = {act}(W_{{ih}} x_t + b_{{ih}} + u \\odot h_{{t-1}} + b_{{hh}})`"
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
        "GRU (Cho et al. 2014), the reset gate after the product.",
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
    )
for _function, _module, _gates in (
    (lstm_cell, "LSTMCell", "4"),
    (gru_cell, "GRUCell", "3"),
    (rnn_tanh_cell, "RNNCell", ""),
    (rnn_relu_cell, "RNNCell", ""),
):
    _two = _function is lstm_cell
    _function.__doc__ = _CELL_DOC.format(
        name=_function.__name__,
        module=_module,
        gates=_gates,
        pair=", ``(h, c)``" if _two else "",
        each=" each" if _two else "",
        hx="(h, h)" if _two else "h",
    )
