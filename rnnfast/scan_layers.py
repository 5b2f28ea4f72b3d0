"""The layers that are linear in their states: MinGRU, MinLSTM and QRNN. Their gates see the input
alone, so that nothing but an elementwise recurrence is left of the loop over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from . import _reset, _run
from ._layer import SPECS, Layer
from ._signatures import Device, OneStateCalls
from ._window import window
from .scan_functional import CANDIDATES, POOLINGS, check_candidate, check_pooling, complete

__all__ = ["QRNN", "MinGRU", "MinLSTM"]


class ScanLayer(Layer):
    """One weight and one bias a pass: there is no hidden side."""

    def _make(
        self, mode: str, taken: int, bias: bool, device: Device, dtype: torch.dtype | None
    ) -> None:
        """The real weights in place of those that torch.nn's checks made; a pass takes ``taken``
        times the features of its input."""
        names = [name for name in self._flat_weights_names if "_ih_" in name]
        shapes = {name: getattr(self, name).shape for name in names}
        for name in self._flat_weights_names:
            delattr(self, name)
        self.mode = mode
        gates = SPECS[mode].gates
        for name in names:
            rows, *columns = shapes[name]
            shape = (gates * rows, *(taken * n for n in columns))
            setattr(self, name, Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._flat_weights_names = names
        each = 2 if bias else 1
        self._all_weights = [names[i : i + each] for i in range(0, len(names), each)]
        self._init_flat_weights()
        self.reset_parameters()

    def _refuse_weight_dropout(self) -> None:
        if self.__dict__.get("weight_dropout"):
            raise RuntimeError(
                "rnnfast: weight_dropout is for layers with a w_hh, which "
                f"{type(self).__name__} has not; it must be 0, got {self.weight_dropout!r}"
            )

    def _complete(self, weights: Sequence[Any]) -> Sequence[Any]:
        self._refuse_weight_dropout()
        return complete(weights, self.bias)

    def reset_parameters(self) -> None:
        """Draw the initial weights anew, as :class:`torch.nn.Linear` does."""
        for names in self._all_weights:
            if names[0] not in self._parameters:
                continue
            bound = 1 / math.sqrt(getattr(self, names[0]).size(1))
            for name in names:
                nn.init.uniform_(getattr(self, name), -bound, bound)


class MinGRU(ScanLayer, OneStateCalls):
    r"""MinGRU: a GRU whose gates see the input alone.

    .. math::
        \begin{aligned}
        z_t &= \sigma(W_z x_t + b_z) \\
        \tilde h_t &= g(W_h x_t + b_h) \\
        h_t &= (1 - z_t) \odot h_{t-1} + z_t \odot \tilde h_t
        \end{aligned}

    Feng et al. 2024, arXiv:2410.01201, with :math:`g(x) = x + 0.5` for :math:`x \ge 0` and
    :math:`\sigma(x)` below, which the paper's log-space form needs to take a logarithm of
    :math:`\tilde h`; ``nonlinearity='identity'`` is its plain form. No logarithm is taken here:
    :math:`1 - z_t` and :math:`z_t` are in [0, 1], and the sum is exact without. As in torch.nn, the
    state begins at zero.

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        num_layers: number of layers :math:`L`, each fed by the one before
        bias: whether there are biases
        batch_first: input and output are :math:`(B, T, *)`; states stay as they are
        dropout: probability of an element being zeroed between layers in training
        bidirectional: two directions (:math:`D = 2`), outputs concatenated
        device, dtype: of the parameters
        nonlinearity: of the candidate :math:`\tilde h`: ``'g'`` or ``'identity'``
        recompute: keep only the states every 64 steps for backward

    Inputs: input, h_0, reset, lengths
        As :class:`rnnfast.GRU` takes them.

    Shape:
        - input: :math:`(T, B, I)`, :math:`(B, T, I)` if ``batch_first``, :math:`(T, I)`, or a
          :class:`~torch.nn.utils.rnn.PackedSequence`, of which only valid steps are computed
        - h_0, h_n: :math:`(D \cdot L, B, H)` or :math:`(D \cdot L, H)`
        - reset: bool, input's shape without the features, or packed like it
        - lengths: integers, :math:`(B)`
        - output: :math:`(T, B, D \cdot H)` in the form of input

    Outputs: output, h_n

    Attributes:
        weight_ih_l[k]: :math:`(2H, I)`, :math:`(2H, D \cdot H)` for k > 0: :math:`W_z, W_h`
        bias_ih_l[k]: :math:`(2H)`: :math:`b_z, b_h`

        With the suffix ``_reverse`` for the second direction. They start as those of
        :class:`torch.nn.Linear`.

    Raises:
        ValueError, RuntimeError, TypeError: as :class:`rnnfast.GRU`; an unknown ``nonlinearity``

    Example::

        >>> layer = rnnfast.MinGRU(10, 20, 2)
        >>> output, hn = layer(torch.randn(5, 3, 10))
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
        nonlinearity: str = "g",
        recompute: bool = False,
    ) -> None:
        check_candidate(nonlinearity)
        # torch.nn checks the arguments and names the weights
        super().__init__(
            "RNN_TANH", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, "meta", dtype,
        )  # fmt: skip
        self.nonlinearity = nonlinearity
        self._make("MIN_GRU" + CANDIDATES[nonlinearity].upper(), 1, bias, device, dtype)
        self._set_options(recompute, 0.0, 0.0, False, False)


class MinLSTM(ScanLayer, OneStateCalls):
    r"""MinLSTM: an LSTM of one state whose gates see the input alone and add up to one.

    .. math::
        \begin{aligned}
        f_t &= \sigma(W_f x_t + b_f) \\
        i_t &= \sigma(W_i x_t + b_i) \\
        \tilde h_t &= g(W_h x_t + b_h) \\
        h_t &= \frac{f_t}{f_t + i_t} \odot h_{t-1} + \frac{i_t}{f_t + i_t} \odot \tilde h_t
        \end{aligned}

    Feng et al. 2024, arXiv:2410.01201, with :math:`g` as in :class:`rnnfast.MinGRU`. The ratio of
    the gates is right where both vanish, too, and no logarithm is taken.

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        num_layers: number of layers :math:`L`, each fed by the one before
        bias: whether there are biases
        batch_first: input and output are :math:`(B, T, *)`; states stay as they are
        dropout: probability of an element being zeroed between layers in training
        bidirectional: two directions (:math:`D = 2`), outputs concatenated
        device, dtype: of the parameters
        nonlinearity: of the candidate :math:`\tilde h`: ``'g'`` or ``'identity'``
        recompute: keep only the states every 64 steps for backward

    Inputs: input, h_0, reset, lengths
        As :class:`rnnfast.GRU` takes them.

    Shape:
        As :class:`rnnfast.MinGRU`.

    Outputs: output, h_n

    Attributes:
        weight_ih_l[k]: :math:`(3H, I)`, :math:`(3H, D \cdot H)` for k > 0:
            :math:`W_f, W_i, W_h`
        bias_ih_l[k]: :math:`(3H)`

        With the suffix ``_reverse`` for the second direction. They start as those of
        :class:`torch.nn.Linear`.

    Raises:
        ValueError, RuntimeError, TypeError: as :class:`rnnfast.GRU`; an unknown ``nonlinearity``

    Example::

        >>> layer = rnnfast.MinLSTM(10, 20, 2, bidirectional=True)
        >>> output, hn = layer(torch.randn(5, 3, 10))
        >>> output.shape
        torch.Size([5, 3, 40])
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
        nonlinearity: str = "g",
        recompute: bool = False,
    ) -> None:
        check_candidate(nonlinearity)
        super().__init__(
            "RNN_TANH", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, "meta", dtype,
        )  # fmt: skip
        self.nonlinearity = nonlinearity
        self._make("MIN_LSTM" + CANDIDATES[nonlinearity].upper(), 1, bias, device, dtype)
        self._set_options(recompute, 0.0, 0.0, False, False)


class QRNN(ScanLayer):
    r"""Quasi-recurrent network: a convolution over time, then a gated pooling.

    .. math::
        \begin{aligned}
        z_t &= \tanh(W_z * x + b_z) \\
        f_t, o_t, i_t &= \sigma(W_{f,o,i} * x + b_{f,o,i}) \\
        c_t &= f_t \odot c_{t-1} + (1 - f_t) \odot z_t \qquad\text{or, with ifo-pooling, }
               f_t \odot c_{t-1} + i_t \odot z_t \\
        h_t &= o_t \odot c_t \qquad\text{or, with f-pooling, } c_t
        \end{aligned}

    Bradbury et al. 2017, arXiv:1611.01576, where :math:`*` takes the ``kernel_size`` steps that end
    with :math:`t`. Both directions of a bidirectional layer see these, of a new sequence only those
    since its ``reset``.

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        num_layers: number of layers :math:`L`, each fed by the one before
        bias: whether there are biases
        batch_first: input and output are :math:`(B, T, *)`; states stay as they are
        dropout: probability of an element being zeroed between layers in training
        bidirectional: two directions (:math:`D = 2`), outputs concatenated
        device, dtype: of the parameters
        kernel_size: width of the convolution :math:`k`
        pooling: ``'f'``, ``'fo'`` or ``'ifo'``, with :math:`G` = 2, 3 or 4 gates
        recompute: keep only the states every 64 steps for backward

    Inputs: input, hx, reset, lengths
        As :class:`rnnfast.LSTM` takes them, ``hx = (h_0, c_0)``; with ``pooling='f'`` as
        :class:`rnnfast.GRU`, ``hx = h_0``. :math:`h_0` has no part in the others.

    Shape:
        As :class:`rnnfast.LSTM` and :class:`rnnfast.GRU`.

    Outputs: output, (h_n, c_n); with ``pooling='f'`` output, h_n

    Attributes:
        weight_ih_l[k]: :math:`(G H, k I)`, :math:`(G H, k D H)` for k > 0; gates z f o i, columns
            of the step itself, then of the one before it, and so on
        bias_ih_l[k]: :math:`(G H)`

        With the suffix ``_reverse`` for the second direction. They start as those of
        :class:`torch.nn.Linear`.

    Raises:
        ValueError, RuntimeError, TypeError: as :class:`rnnfast.LSTM`; an unknown ``pooling``, a
            ``kernel_size`` below 1; with a ``kernel_size`` above 1 ``step``, which would need the
            inputs before it, ``mask``, ``input_dropout``, ``residual`` and ``return_last``

    Example::

        >>> layer = rnnfast.QRNN(10, 20, 2)
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
        kernel_size: int = 2,
        pooling: str = "fo",
        recompute: bool = False,
    ) -> None:
        check_pooling(pooling)
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1:
            raise ValueError(f"rnnfast: kernel_size must be an int >= 1, got {kernel_size!r}")
        super().__init__(
            "RNN_TANH", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, "meta", dtype,
        )  # fmt: skip
        self.kernel_size, self.pooling = kernel_size, pooling
        self._make(POOLINGS[pooling].upper(), kernel_size, bias, device, dtype)
        self._set_options(recompute, 0.0, 0.0, False, False)

    def forward(
        self, input: Any, hx: Any = None, reset: Any = None, lengths: Any = None, mask: Any = None
    ) -> tuple[Any, Any]:
        """Run the layer, see :func:`rnnfast.LSTM.forward`."""
        if self.kernel_size == 1 or not isinstance(input, (Tensor, PackedSequence)):
            return super().forward(input, hx, reset, lengths, mask)
        for option in ("input_dropout", "residual", "return_last"):
            if self.__dict__.get(option):
                self._refuse(option)
        if mask is not None:
            self._refuse("mask")
        features = (input if isinstance(input, Tensor) else input.data).size(-1)
        if features != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. Expected "
                f"{self.input_size}, got {features}"
            )
        weights, packed = self._current()
        directions = 2 if self.bidirectional else 1
        each = len(weights) // self.num_layers
        states = [None] * self.num_layers if hx is None else self._states(hx, directions)
        drop = self.dropout if self.training else 0.0
        y, ends = input, []
        for i in range(self.num_layers):
            first = i * directions
            of_layer = weights[i * each : (i + 1) * each]
            y, end = _run.layer(
                "QRNN", SPECS[self.mode], self._windows(y, reset), states[i], reset, of_layer,
                of_layer[0].size(1), self.hidden_size, 0, 1, self.bias, self.batch_first, 0.0,
                self.bidirectional,
                None if packed is None else packed[first : first + directions], lengths,
                self.recompute,
            )  # fmt: skip
            ends.append(end)
            if drop and i + 1 < self.num_layers:
                data = torch.dropout(y if isinstance(y, Tensor) else y.data, drop, True)
                y = data if isinstance(y, Tensor) else y._replace(data=data)
        if self.pooling == "f":
            return y, torch.cat(ends)
        return y, tuple(torch.cat(parts) for parts in zip(*ends, strict=True))

    def step(self, input: Any, state: Any = None, reset: Any = None) -> tuple[Any, Any]:
        """Run one step of a layer with ``kernel_size=1``, see :func:`rnnfast.LSTM.step`."""
        if self.kernel_size > 1:
            raise RuntimeError(
                "rnnfast: step needs kernel_size=1, got "
                f"{self.kernel_size}: a convolution needs the inputs before the step"
            )
        return super().step(input, state, reset)

    def _refuse(self, option: str) -> NoReturn:
        raise RuntimeError(
            f"rnnfast: {option} of QRNN needs kernel_size=1, got {self.kernel_size}: a convolution "
            "goes over steps before the layer does"
        )

    def _states(self, hx: Any, directions: int) -> list[Any]:
        """The part of each layer."""
        parts = hx if isinstance(hx, (tuple, list)) else (hx,)
        count = self.num_layers * directions
        for part in parts:
            if isinstance(part, Tensor) and (part.dim() == 0 or part.size(0) != count):
                raise RuntimeError(
                    f"rnnfast: hx must hold L*D = {count} states, got {tuple(part.shape)}"
                )
        if self.num_layers == 1 or not all(isinstance(part, Tensor) for part in parts):
            return [hx] * self.num_layers  # or an error of the first layer
        split = [part.split(directions) for part in parts]
        if len(parts) == 1 and not isinstance(hx, (tuple, list)):
            return list(split[0])
        return list(zip(*split, strict=True))

    def _windows(self, x: Any, reset: Any) -> Any:
        """x in its form, each step with those before it."""
        if isinstance(x, PackedSequence):
            cut = None if reset is None else _reset.of_packed(reset, x, x.data)
            return x._replace(data=window(x.data, self.kernel_size, x.batch_sizes, cut))
        if x.dim() not in (2, 3):
            return x  # and an error of the layer
        by_batch = self.batch_first and x.dim() == 3
        if by_batch:
            x = x.transpose(0, 1)
        if reset is not None:
            batched = x.dim() == 3
            reset = _reset.of_padded(
                reset, x if batched else x.unsqueeze(1), batched, self.batch_first
            )
            reset = reset if batched else reset.squeeze(1)
        x = window(x, self.kernel_size, None, reset)
        return x.transpose(0, 1) if by_batch else x
