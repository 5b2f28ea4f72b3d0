"""The layers of one gate: the simple RNN and IndRNN."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from ._layer import no_proj_size
from ._signatures import Device, OneStateCalls

__all__ = ["RNN", "IndRNN"]


def _check_nonlinearity(nonlinearity: str) -> None:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")


class RNN(OneStateCalls):
    r"""Elman RNN, a drop-in for :class:`torch.nn.RNN`.

    .. math::
        h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    or relu in place of tanh. Elman 1990.

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        num_layers: number of layers :math:`L`, each fed by the one before
        nonlinearity: ``'tanh'`` or ``'relu'``
        bias: whether there are biases
        batch_first: input and output are :math:`(B, T, *)`; states stay as they are
        dropout: probability of an element being zeroed between layers in training
        bidirectional: two directions (:math:`D = 2`), outputs concatenated
        device, dtype: of the parameters
        recompute: taken, and changes nothing: this layer keeps nothing beyond input and output

    Inputs: input, h_0, reset, lengths
        The state is zero where it is not given, and where ``reset`` is true. Under autocast,
        weights, input and states are cast to its dtype, and the outputs have it (float64 weights,
        and those of a frozen layer, stay as they are, and the rest is cast to theirs).

    Shape:
        - input: :math:`(T, B, I)`, :math:`(B, T, I)` if ``batch_first``, :math:`(T, I)`, or a
          :class:`~torch.nn.utils.rnn.PackedSequence`, of which only valid steps are computed
        - h_0, h_n: :math:`(D \cdot L, B, H)` or :math:`(D \cdot L, H)`
        - reset: bool, input's shape without the features, or packed like it; true at the first
          step of a new sequence
        - lengths: integers, :math:`(B)`, valid steps of the rows of padded input
        - output: :math:`(T, B, D \cdot H)` in the form of input

    Outputs: output, h_n

    Attributes:
        weight_ih_l[k]: :math:`(H, I)`, :math:`(H, D \cdot H)` for k > 0
        weight_hh_l[k]: :math:`(H, H)`
        bias_ih_l[k], bias_hh_l[k]: :math:`(H)`

        With the suffix ``_reverse`` for the second direction.

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.RNN, with its texts

    .. note::
        Backward reads ``output``: like cuDNN's layers, it raises if that was changed in place.

    Example::

        >>> layer = rnnfast.RNN(10, 20, 2)
        >>> output, hn = layer(torch.randn(5, 3, 10), torch.randn(2, 3, 20))
        >>> output.shape
        torch.Size([5, 3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        no_proj_size(kwargs, "RNN")
        _check_nonlinearity(nonlinearity)
        self.nonlinearity = nonlinearity
        super().__init__(
            "RNN_" + nonlinearity.upper(), input_size, hidden_size, num_layers, bias,
            batch_first, dropout, bidirectional, 0, device, dtype,
        )  # fmt: skip
        self._set_recompute(recompute)


class IndRNN(OneStateCalls):
    r"""Independently recurrent network: every unit sees only its own past.

    .. math::
        h_t = \text{act}(W_{ih} x_t + b_{ih} + u \odot h_{t-1} + b_{hh})

    Li et al. 2018, arXiv:1803.04831. torch.nn has no such layer; this one takes the arguments of
    :class:`rnnfast.RNN`.

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        num_layers: number of layers :math:`L`, each fed by the one before
        nonlinearity: act, ``'relu'`` or ``'tanh'``
        bias: whether there are biases
        batch_first: input and output are :math:`(B, T, *)`; states stay as they are
        dropout: probability of an element being zeroed between layers in training
        bidirectional: two directions (:math:`D = 2`), outputs concatenated
        device, dtype: of the parameters
        recompute: taken, and changes nothing: this layer keeps nothing beyond input and output

    Inputs: input, h_0, reset, lengths
        The state is zero where it is not given, and where ``reset`` is true. Under autocast,
        weights, input and states are cast to its dtype, and the outputs have it (float64 weights,
        and those of a frozen layer, stay as they are, and the rest is cast to theirs).

    Shape:
        - input: :math:`(T, B, I)`, :math:`(B, T, I)` if ``batch_first``, :math:`(T, I)`, or a
          :class:`~torch.nn.utils.rnn.PackedSequence`, of which only valid steps are computed
        - h_0, h_n: :math:`(D \cdot L, B, H)` or :math:`(D \cdot L, H)`
        - reset: bool, input's shape without the features, or packed like it; true at the first
          step of a new sequence
        - lengths: integers, :math:`(B)`, valid steps of the rows of padded input
        - output: :math:`(T, B, D \cdot H)` in the form of input

    Outputs: output, h_n

    Attributes:
        weight_ih_l[k]: :math:`(H, I)`, :math:`(H, D \cdot H)` for k > 0
        weight_hh_l[k]: the recurrent weights :math:`u`, :math:`(H)`
        bias_ih_l[k], bias_hh_l[k]: :math:`(H)`

        With the suffix ``_reverse`` for the second direction. :math:`u` starts from
        :math:`\mathcal{U}(0, 1)`, where gradients neither explode nor die at once; the rest
        from :math:`\mathcal{U}(-1/\sqrt{H}, 1/\sqrt{H})`.

    Raises:
        ValueError, RuntimeError, TypeError: as :class:`rnnfast.RNN`

    Example::

        >>> layer = rnnfast.IndRNN(10, 20, 2)
        >>> output, hn = layer(torch.randn(5, 3, 10))
        >>> layer.weight_hh_l0.shape
        torch.Size([20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "relu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        _check_nonlinearity(nonlinearity)
        self.nonlinearity = nonlinearity
        # torch.nn checks the arguments and names the weights of a dense layer of no memory ...
        super().__init__(
            "RNN_" + nonlinearity.upper(), input_size, hidden_size, num_layers, bias,
            batch_first, dropout, bidirectional, 0, "meta", dtype,
        )  # fmt: skip
        # ... and here are the real ones
        self.mode = "INDRNN_" + nonlinearity.upper()
        for name in self._flat_weights_names:
            shape = getattr(self, name).shape
            if name.startswith("weight_hh"):
                shape = shape[:1]
            setattr(self, name, Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._init_flat_weights()
        self.reset_parameters()
        self._set_recompute(recompute)

    def reset_parameters(self) -> None:
        """Draw the initial weights anew."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for name, weight in self.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.uniform_(weight, 0.0, 1.0)
            else:
                nn.init.uniform_(weight, -bound, bound)
