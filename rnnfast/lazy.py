"""Layers that take their input_size from the first input; torch.nn has none that recur."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.rnn import PackedSequence

from ._cast import refuse_input
from ._layer import spec_of
from .modules import GRU, LSTM, RNN, IndRNN

__all__ = ["LazyGRU", "LazyIndRNN", "LazyLSTM", "LazyRNN"]


class _Lazy(LazyModuleMixin):
    def __init__(self, hidden_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(1, hidden_size, *args, **kwargs)  # type: ignore[misc]
        self.input_size = 0  # not known yet
        for name in self._of_input():
            w = getattr(self, name)
            lazy = UninitializedParameter(device=w.device, dtype=w.dtype)  # type: ignore[call-arg]
            setattr(self, name, lazy)

    def _of_input(self: Any) -> list[str]:
        return [name for name in self._flat_weights_names if name.startswith("weight_ih_l0")]

    def initialize_parameters(self: Any, input: Any, *args: Any, **kwargs: Any) -> None:
        """Make and draw the weights of the input; all others stay what they are.

        Args:
            input: the first that the layer is called with
        """
        x = input.data if isinstance(input, PackedSequence) else input
        if not isinstance(x, Tensor):
            refuse_input(x)
        if x.dim() == 0:
            name = type(self).__name__
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got 0D instead")
        bound = 1.0 / math.sqrt(self.hidden_size)
        for name in self._of_input():
            w = getattr(self, name)
            if isinstance(w, UninitializedParameter):  # not if load_state_dict brought it
                w.materialize((spec_of(self).gates * self.hidden_size, x.size(-1)))
                nn.init.uniform_(w, -bound, bound)
        self.input_size = self.weight_ih_l0.size(1)


class LazyLSTM(_Lazy, LSTM):
    """A :class:`rnnfast.LSTM` whose ``input_size`` is that of its first input.

    All arguments of the layer but ``input_size``, in the same order. Until the first call (or
    ``load_state_dict``), ``weight_ih_l0`` and ``weight_ih_l0_reverse`` are
    :class:`~torch.nn.parameter.UninitializedParameter`; run one batch before an optimizer,
    ``DistributedDataParallel`` or ``fully_shard`` takes the parameters. Then the layer is a plain
    :class:`rnnfast.LSTM`.

    Example::

        >>> layer = rnnfast.LazyLSTM(20, num_layers=2)
        >>> output, state = layer(torch.randn(5, 3, 10))
        >>> layer
        LSTM(10, 20, num_layers=2)
    """

    cls_to_become = LSTM


class LazyGRU(_Lazy, GRU):
    """A :class:`rnnfast.GRU` whose ``input_size`` is that of its first input.

    See :class:`LazyLSTM`.
    """

    cls_to_become = GRU


class LazyRNN(_Lazy, RNN):
    """A :class:`rnnfast.RNN` whose ``input_size`` is that of its first input.

    See :class:`LazyLSTM`.
    """

    cls_to_become = RNN


class LazyIndRNN(_Lazy, IndRNN):
    """A :class:`rnnfast.IndRNN` whose ``input_size`` is that of its first input.

    See :class:`LazyLSTM`.
    """

    cls_to_become = IndRNN
