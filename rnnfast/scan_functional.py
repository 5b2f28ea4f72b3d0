"""MinGRU, MinLSTM and QRNN without modules; :mod:`rnnfast.functional` has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _run
from ._checks import check_dense
from ._signatures import Input as Form
from ._signatures import States
from .cells import CellSpec, cell_spec

__all__ = ["min_gru", "min_lstm", "qrnn"]

#: What ``nonlinearity`` may be, and what it makes of a cell's name.
CANDIDATES = {"g": "", "identity": "_linear"}
POOLINGS = {"f": "qrnn_f", "fo": "qrnn_fo", "ifo": "qrnn_ifo"}


def check_candidate(nonlinearity: Any) -> None:
    if not isinstance(nonlinearity, str) or nonlinearity not in CANDIDATES:
        raise ValueError(f"rnnfast: nonlinearity must be 'g' or 'identity', got {nonlinearity!r}")


def check_pooling(pooling: Any) -> None:
    if not isinstance(pooling, str) or pooling not in POOLINGS:
        raise ValueError(f"rnnfast: pooling must be 'f', 'fo' or 'ifo', got {pooling!r}")


def complete(weights: Sequence[Any], bias: bool, parameters: bool = False) -> list[Any]:
    """w_ih, w_hh, b_ih, b_hh of each pass, which has w_ih, maybe b_ih, and maybe parameters of its
    units: the rest is empty."""
    full: list[Any] = []
    each = (2 if bias else 1) + parameters
    for k in range(0, len(weights), each):
        w_ih, *rest = weights[k : k + each]
        nothing = w_ih.new_empty(0)
        full += [w_ih, nothing]
        if parameters:  # behind a bias of zeros
            zeros = w_ih.new_zeros(w_ih.size(0))
            full += [rest[0] if bias else zeros, torch.cat([zeros, rest[-1]])]
        elif bias:
            full += [rest[0], nothing]
    return full


def _layer(
    name: str,
    spec: CellSpec,
    input: Any,
    hx: Any,
    weights: Any,
    num_layers: Any,
    bias: Any,
    batch_first: bool,
    dropout: Any,
    training: bool,
    bidirectional: bool,
    reset: Any,
    lengths: Any,
    recompute: bool,
) -> tuple[Any, Any]:
    from .functional import _check_options  # which imports this module

    _check_options(num_layers, bias, dropout)
    if not isinstance(weights, Iterable):
        raise TypeError(f"rnnfast: weights must be a list of tensors, got {type(weights).__name__}")
    weights = list(weights)
    count, parameters = num_layers * (2 if bidirectional else 1), spec.parameters > 0
    each = (2 if bias else 1) + parameters
    if len(weights) != count * each:
        raise RuntimeError(
            f"rnnfast: weights must hold {each} tensors for each of {count} layers and directions "
            f"= {count * each}, got {len(weights)}"
        )
    for k, w in enumerate(weights):
        if not isinstance(w, Tensor):
            raise TypeError(f"rnnfast: weights[{k}] must be a tensor, got {type(w).__name__}")
        if w.layout is not torch.strided:
            check_dense(w, f"weights[{k}]")
    w_ih = weights[0]
    if w_ih.dim() != 2:
        raise RuntimeError(f"rnnfast: w_ih must have shape (G*H, I), got {tuple(w_ih.shape)}")
    return _run.layer(
        name, spec, input, hx, reset, complete(weights, bias, parameters), w_ih.size(1),
        w_ih.size(0) // spec.gates, 0, num_layers, bias or parameters, batch_first,
        dropout if training else 0.0, bidirectional, None, lengths, recompute,
    )  # fmt: skip


def min_gru(
    input: Form,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "g",
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    reset: Tensor | PackedSequence | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Form, Tensor]:
    check_candidate(nonlinearity)
    return _layer(
        "MinGRU", cell_spec("min_gru" + CANDIDATES[nonlinearity]), input, hx, weights, num_layers,
        bias, batch_first, dropout, training, bidirectional, reset, lengths, recompute,
    )  # fmt: skip


def min_lstm(
    input: Form,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "g",
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    reset: Tensor | PackedSequence | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Form, Tensor]:
    check_candidate(nonlinearity)
    return _layer(
        "MinLSTM", cell_spec("min_lstm" + CANDIDATES[nonlinearity]), input, hx, weights, num_layers,
        bias, batch_first, dropout, training, bidirectional, reset, lengths, recompute,
    )  # fmt: skip


def qrnn(
    input: Form,
    hx: Tensor | States | None,
    weights: Sequence[Tensor],
    *,
    pooling: str = "fo",
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    reset: Tensor | PackedSequence | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Form, Tensor | States]:
    check_pooling(pooling)
    if pooling != "f" and isinstance(hx, (tuple, list)) and len(hx) != 2:
        raise RuntimeError("rnnfast: qrnn with pooling fo or ifo expects two hidden states")
    return _layer(
        "QRNN", cell_spec(POOLINGS[pooling]), input, hx, weights, num_layers, bias, batch_first,
        dropout, training, bidirectional, reset, lengths, recompute,
    )  # fmt: skip


_DOC = r"""{what}

    {equation}

    Args:
        input: the sequence, a tensor or a :class:`torch.nn.utils.rnn.PackedSequence`
        hx: initial state{pair}; ``None`` means zeros
        weights: flat list, for each layer and direction ``w_ih, b_ih``
        {option}
        num_layers: number of layers :math:`L`
        bias: whether ``weights`` has ``b_ih``
        batch_first: input and output are :math:`(B, T, *)`
        dropout: probability of an element being zeroed between layers
        training: whether dropout is applied
        bidirectional: two directions, :math:`D = 2`
        reset: true at the first step of each new sequence, as :class:`rnnfast.LSTM` takes it
        lengths: valid steps of each row of padded input, as :class:`rnnfast.LSTM` takes them
        recompute: keep only the states every 64 steps for backward, and compute what lies between
            anew there

    Shape:
        - input: :math:`(T, B, I)`, :math:`(B, T, I)` if ``batch_first``, :math:`(T, I)`, or packed
        - hx: :math:`(D \cdot L, B, H)`, or :math:`(D \cdot L, H)` for unbatched input
        - w_ih: :math:`({gates}H, I)`; b_ih: :math:`({gates}H)`
        - reset: bool, input's shape without the features
        - lengths: integers, :math:`(B)`
        - Output: ``(output, {out})`` of the same forms, :math:`D \cdot H` features

    Raises:
        RuntimeError: a size, device or number of weights that does not fit
        ValueError: an input of the wrong rank or dtype, ``dropout`` outside of [0, 1], an unknown
            {name_of_option}
        TypeError: weights, hx or options of another type

    Example::

        >>> x, layer = torch.randn(5, 3, 10), rnnfast.{module}
        >>> output, {out} = rnnfast.functional.{name}(x, None, layer.all_weights[0])
    """

_CANDIDATE = "nonlinearity: of the candidate, ``'g'`` or ``'identity'``"
_PAPER = "(Feng et al. 2024, arXiv:2410.01201), as :class:`rnnfast."
for _function, _text in (
    (min_gru, ("MinGRU", "MinGRU(10, 20)", "2", "nonlinearity", _CANDIDATE, _PAPER + "MinGRU`.")),
    (
        min_lstm,
        ("MinLSTM", "MinLSTM(10, 20)", "3", "nonlinearity", _CANDIDATE, _PAPER + "MinLSTM`."),
    ),
    (
        qrnn,
        (
            "The pooling of a QRNN",
            "QRNN(10, 20, kernel_size=1)",
            "G",
            "pooling",
            "pooling: ``'f'``, ``'fo'`` or ``'ifo'``, with :math:`G` = 2, 3, 4",
            "(Bradbury et al. 2017, arXiv:1611.01576), as :class:`rnnfast.QRNN` with\n"
            "    ``kernel_size=1``; a convolution gives :math:`I` columns of several steps.",
        ),
    ),
):
    _what, _module, _gates, _name, _option, _equation = _text
    _function.__doc__ = _DOC.format(
        what=f"{_what}, without a module.",
        equation=_equation[0].upper() + _equation[1:],
        pair=", ``(h_0, c_0)`` with two states" if _function is qrnn else " ``h_0``",
        option=_option,
        name_of_option=_name,
        gates=_gates,
        out="(h_n, c_n)" if _function is qrnn else "h_n",
        module=_module,
        name=_function.__name__,
    )
