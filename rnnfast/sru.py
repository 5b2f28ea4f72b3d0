"""The simple recurrent unit, as a layer and as a function."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from . import _run
from ._checks import check_bool, check_dense
from ._layer import SPECS
from ._signatures import Device, LSTMCalls, States
from ._signatures import Input as Form
from .scan_layers import ScanLayer

__all__ = ["SRU", "sru"]

_SPEC = SPECS["SRU"]


def _skip(
    w_ih: Tensor, hidden: int, direction: int, directions: int, scale: float
) -> Tensor | None:
    """What makes of x the highway's part of h; None where w_ih has rows of its own for it."""
    rows, columns = w_ih.shape
    if rows == 4 * hidden:
        return None
    if rows == 3 * hidden and columns in (hidden, directions * hidden):
        first = direction * hidden if columns > hidden else 0
        eye = torch.eye(columns, dtype=w_ih.dtype, device=w_ih.device)
        return eye[first : first + hidden] * scale
    raise RuntimeError(
        f"rnnfast: w_ih of SRU must have shape (4*H, I) = ({4 * hidden}, {columns}), or (3*H, I) "
        f"where I is H or D*H, got {tuple(w_ih.shape)}"
    )


def complete(weights: Sequence[Any], count: int, directions: int, scale: float) -> list[Any]:
    """w_ih, w_hh, b_ih, b_hh of each of ``count`` passes, which have w_ih, w_c and maybe b_ih."""
    full: list[Any] = []
    each = len(weights) // count
    for k in range(count):
        w_ih, w_c, *b = weights[k * each : (k + 1) * each]
        hidden = w_c.size(0) // 2
        skip = _skip(w_ih, hidden, k % directions, directions, scale)
        none = w_ih.new_zeros(4 * hidden)
        b_ih = torch.cat([none[:hidden], b[0], none[:hidden]]) if b else none
        w = w_ih if skip is None else torch.cat([w_ih, skip])
        full += [w, w_ih.new_empty(0), b_ih, torch.cat([none, w_c])]
    return full


def _scale(rescale: bool, highway_bias: float) -> float:
    return math.sqrt(1 + 2 * math.exp(highway_bias)) if rescale else 1.0


class SRU(ScanLayer, LSTMCalls):
    r"""Simple recurrent unit: gates that see the state through a vector, and a highway around it.

    .. math::
        \begin{aligned}
        f_t &= \sigma(W_f x_t + v_f \odot c_{t-1} + b_f) \\
        r_t &= \sigma(W_r x_t + v_r \odot c_{t-1} + b_r) \\
        c_t &= f_t \odot c_{t-1} + (1 - f_t) \odot W x_t \\
        h_t &= r_t \odot c_t + (1 - r_t) \odot \alpha x_t
        \end{aligned}

    Lei et al. 2018, arXiv:1709.02755. Where :math:`x_t` has another size than :math:`h_t`, a fourth
    matrix makes it fit; with two directions, each takes its half of the layer below. :math:`h_0`
    has no part in anything.

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        num_layers: number of layers :math:`L`, each fed by the one before
        bias: whether there are biases
        batch_first: input and output are :math:`(B, T, *)`; states stay as they are
        dropout: probability of an element being zeroed between layers in training
        bidirectional: two directions (:math:`D = 2`), outputs concatenated
        device, dtype: of the parameters
        recompute: keep only the states every 64 steps for backward
        highway_bias: what :math:`b_r` starts from; negative numbers favour the highway
        rescale: :math:`\alpha = \sqrt{1 + 2 e^{b}}` with :math:`b` = ``highway_bias``, which keeps
            the variance from layer to layer at first (section 3.2 of the paper); else 1

    Inputs: input, (h_0, c_0), reset, lengths, mask
        As :class:`rnnfast.LSTM` takes them.

    Shape:
        As :class:`rnnfast.LSTM`.

    Outputs: output, (h_n, c_n)

    Attributes:
        weight_ih_l[k]: :math:`(3H, I)`: :math:`W, W_f, W_r`, where :math:`I` is :math:`H` or
            :math:`D \cdot H`; else :math:`(4H, I)`, the last :math:`H` rows in place of
            :math:`\alpha`. Drawn from :math:`\mathcal{U}(-\sqrt{3/I}, \sqrt{3/I})`, as in the paper
        weight_c_l[k]: :math:`(2H)`: :math:`v_f, v_r`, from
            :math:`\mathcal{U}(-1/\sqrt{H}, 1/\sqrt{H})`
        bias_ih_l[k]: :math:`(2H)`: :math:`b_f, b_r`, zero but for ``highway_bias``

        With the suffix ``_reverse`` for the second direction.

    Raises:
        ValueError, RuntimeError, TypeError: as :class:`rnnfast.LSTM`

    Example::

        >>> layer = rnnfast.SRU(10, 20, 2)
        >>> output, (hn, cn) = layer(torch.randn(5, 3, 10))
        >>> output.shape
        torch.Size([5, 3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        highway_bias: float = 0.0,
        rescale: bool = False,
    ) -> None:
        check_bool("SRU", "rescale", rescale)
        if isinstance(highway_bias, bool) or not isinstance(highway_bias, (int, float)):
            found = type(highway_bias).__name__
            raise TypeError(f"rnnfast: highway_bias of SRU must be a number, got {found}")
        # e to it, twice, must be a float32
        if not -80 <= highway_bias <= 80:
            raise ValueError(
                f"rnnfast: highway_bias of SRU must be in [-80, 80], got {highway_bias}"
            )
        # torch.nn checks the arguments and names the weights of a layer of no memory
        super().__init__(
            "RNN_TANH", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, "meta", dtype,
        )  # fmt: skip
        self.mode, self.highway_bias, self.rescale = "SRU", highway_bias, rescale
        own: list[list[str]] = []
        for names in self._all_weights:
            columns, name = getattr(self, names[0]).size(1), names[0]
            for old in names:
                delattr(self, old)
            fits = columns in (hidden_size, (1 + bidirectional) * hidden_size)
            rows = {
                name: ((3 if fits else 4) * hidden_size, columns),
                name.replace("ih", "c"): (2 * hidden_size,),
            }
            if bias:
                rows[name.replace("weight", "bias")] = (2 * hidden_size,)
            for new, shape in rows.items():
                setattr(self, new, Parameter(torch.empty(shape, device=device, dtype=dtype)))
            own.append(list(rows))
        self._all_weights = own
        self._flat_weights_names = [name for names in own for name in names]
        self._init_flat_weights()
        self.reset_parameters()
        self._set_options(recompute, 0.0, 0.0, False, False)

    def reset_parameters(self) -> None:
        """Draw the initial weights anew."""
        if self.mode != "SRU":
            return  # torch.nn's constructor, whose weights are not these
        for name, w in self.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(w[: self.hidden_size])
                nn.init.constant_(w[self.hidden_size :], self.highway_bias)
            else:
                is_vector = name.startswith("weight_c")
                bound = 1 / math.sqrt(self.hidden_size) if is_vector else math.sqrt(3 / w.size(1))
                nn.init.uniform_(w, -bound, bound)

    def _complete(self, weights: Sequence[Any]) -> Sequence[Any]:
        self._refuse_weight_dropout()
        directions = 2 if self.bidirectional else 1
        scale = _scale(self.rescale, self.highway_bias)
        return complete(weights, len(self._all_weights), directions, scale)

    def extra_repr(self) -> str:
        """What differs from a default."""
        text = super().extra_repr()
        if self.highway_bias:
            text += f", highway_bias={self.highway_bias}"
        return f"{text}, rescale=True" if self.rescale else text


def sru(
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
    reset: Tensor | PackedSequence | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
    scale: float = 1.0,
) -> tuple[Form, States]:
    r"""Simple recurrent unit, without a module.

    Lei et al. 2018, arXiv:1709.02755, as :class:`rnnfast.SRU`.

    Args:
        input: the sequence, a tensor or a :class:`torch.nn.utils.rnn.PackedSequence`
        hx: initial state, ``(h_0, c_0)``; ``None`` means zeros
        weights: flat list, for each layer and direction ``w_ih, w_c, b_ih``
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
        scale: :math:`\alpha` of the highway, where ``w_ih`` has no rows for it

    Shape:
        - input: :math:`(T, B, I)`, :math:`(B, T, I)` if ``batch_first``, :math:`(T, I)`, or packed
        - hx: :math:`(D \cdot L, B, H)`, or :math:`(D \cdot L, H)` for unbatched input, each
        - w_ih: :math:`(3H, I)` where :math:`I` is :math:`H` or :math:`D \cdot H`, or
          :math:`(4H, I)`; w_c, b_ih: :math:`(2H)`
        - Output: ``(output, (h_n, c_n))`` of the same forms, :math:`D \cdot H` features

    Raises:
        RuntimeError: a size, device or number of weights that does not fit
        ValueError: an input of the wrong rank or dtype, ``dropout`` outside of [0, 1]
        TypeError: weights, hx or options of another type

    Example::

        >>> x, layer = torch.randn(5, 3, 10), rnnfast.SRU(10, 20)
        >>> output, (h_n, c_n) = rnnfast.functional.sru(x, None, layer.all_weights[0])
    """
    from .functional import _check_options  # which imports this module

    _check_options(num_layers, bias, dropout)
    if isinstance(hx, (tuple, list)) and len(hx) != 2:
        raise RuntimeError("rnnfast: sru expects two hidden states")
    if not isinstance(weights, Iterable):
        raise TypeError(f"rnnfast: weights must be a list of tensors, got {type(weights).__name__}")
    weights, directions = list(weights), 2 if bidirectional else 1
    count, each = num_layers * directions, 3 if bias else 2
    if len(weights) != count * each:
        raise RuntimeError(
            f"rnnfast: weights must hold {each} tensors for each of {count} layers and directions "
            f"= {count * each}, got {len(weights)}"
        )
    for k, w in enumerate(weights):
        if not isinstance(w, Tensor):
            raise TypeError(f"rnnfast: weights[{k}] must be a tensor, got {type(w).__name__}")
        check_dense(w, f"weights[{k}]")
        expected = 2 if k % each == 0 else 1
        if w.dim() != expected or (expected == 1 and w.size(0) % 2):
            letters = "(3*H, I) or (4*H, I)" if expected == 2 else "(2*H,)"
            raise RuntimeError(
                f"rnnfast: weights[{k}] must have shape {letters}, got {tuple(w.shape)}"
            )
    w_ih, hidden = weights[0], weights[1].size(0) // 2
    return _run.layer(
        "SRU", _SPEC, input, hx, reset, complete(weights, count, directions, scale), w_ih.size(1),
        hidden, 0, num_layers, True, batch_first, dropout if training else 0.0, bidirectional,
        None, lengths, recompute,
    )  # fmt: skip
