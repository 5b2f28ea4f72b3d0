"""One step of a cell, weights passed in: the functions of functional.py without a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _run
from ._checks import check_dense
from ._signatures import States
from .cells import cell_spec

_LSTM = cell_spec("lstm")
_GRU = cell_spec("gru")
_RNN_TANH = cell_spec("rnn_tanh")
_RNN_RELU = cell_spec("rnn_relu")

_CELL_DOC = r"""One step of {module}.

    Args:
        input: features of this step
        hx: state before it{pair}; ``None`` means zeros
        w_ih, w_hh: weights, gates in torch.nn's order
        b_ih, b_hh: biases, or ``None``

    Shape:
        - input: :math:`(B, I)`
        - hx: :math:`(B, H)`{each}
        - w_ih: :math:`({gates}H, I)`; w_hh: :math:`({gates}H, H)`; b_ih, b_hh: :math:`({gates}H)`
        - Output: as hx

    Raises:
        RuntimeError: a size, dtype or device that does not fit
        TypeError: what is no tensor

    Example::

        >>> c = rnnfast.{module}(10, 20)
        >>> x, h = torch.randn(3, 10), torch.zeros(3, 20)
        >>> out = rnnfast.functional.{name}(
        ...     x, {hx}, c.weight_ih, c.weight_hh, c.bias_ih, c.bias_hh
        ... )
    """

_ONE_STATE = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
_TWO_STATES = ("input", "hx[0]", "hx[1]", "w_ih", "w_hh", "b_ih", "b_hh")
_MAY_BE_NONE = ("hx", "b_ih", "b_hh")


def _check_tensors(names: tuple[str, ...], *tensors: Any) -> None:
    for tensor, name in zip(tensors, names, strict=True):
        if not isinstance(tensor, Tensor):
            if tensor is None and name in _MAY_BE_NONE:
                continue
            raise TypeError(f"rnnfast: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            check_dense(tensor, name)
        if name.startswith("w") and tensor.dim() != 2:
            letters = "(G*H, I)" if name == "w_ih" else "(G*H, H)"
            raise RuntimeError(
                f"rnnfast: {name} must have shape {letters}, got {tuple(tensor.shape)}"
            )


def lstm_cell(
    input: Tensor,
    hx: States | Sequence[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> States:
    if not isinstance(hx, (tuple, list)) and hx is not None:
        raise TypeError(f"rnnfast: hx must be a tuple (h, c), got {type(hx).__name__}")
    if hx is not None and len(hx) != 2:
        raise RuntimeError("lstm_cell expects two hidden states")
    if hx is None:
        _check_tensors(_ONE_STATE, input, hx, w_ih, w_hh, b_ih, b_hh)
        h, c = _run.cell(_LSTM, input, None, None, w_ih, w_hh, b_ih, b_hh)
    else:
        _check_tensors(_TWO_STATES, input, *hx, w_ih, w_hh, b_ih, b_hh)
        h, c = _run.cell(_LSTM, input, hx[0], hx[1], w_ih, w_hh, b_ih, b_hh)
    return h, c.squeeze(0)


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    _check_tensors(_ONE_STATE, input, hx, w_ih, w_hh, b_ih, b_hh)
    return _run.cell(_GRU, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    _check_tensors(_ONE_STATE, input, hx, w_ih, w_hh, b_ih, b_hh)
    return _run.cell(_RNN_TANH, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    _check_tensors(_ONE_STATE, input, hx, w_ih, w_hh, b_ih, b_hh)
    return _run.cell(_RNN_RELU, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


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
