"""The LSTM with recurrent batch normalisation, as a layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from . import _batch_norm_stack as _stack
from ._batch_norm import STATISTICS
from ._signatures import Device, States
from ._signatures import Input as Form

__all__ = ["BatchNormLSTM"]

_GAIN = 0.1  # section 4 of the paper: larger ones let tanh saturate, and gradients vanish


class BatchNormLSTM(nn.Module):
    r"""LSTM with recurrent batch normalisation.

    .. math::
        \begin{aligned}
        (i_t, f_t, g_t, o_t) &= \mathrm{BN}(W_{hh} h_{t-1}; \gamma_{hh})
            + \mathrm{BN}(W_{ih} x_t; \gamma_{ih}) + b \\
        c_t &= \sigma(f_t) \odot c_{t-1} + \sigma(i_t) \odot \tanh(g_t) \\
        h_t &= \sigma(o_t) \odot \tanh(\mathrm{BN}(c_t; \gamma_c) + \beta_c) \\
        \mathrm{BN}(v; \gamma) &= \gamma \odot (v - \mathrm{E}[v]) / \sqrt{\mathrm{Var}[v] +
            \epsilon}
        \end{aligned}

    Cooijmans, Ballas, Laurent, Gülçehre & Courville 2017, arXiv:1603.09025. In training, mean and
    biased variance are those of the step's rows of the batch, and the running ones of that step
    follow them by ``momentum`` (the variance unbiased, as :class:`torch.nn.BatchNorm1d` does it).
    In eval mode the running ones are used. Each of the first ``max_steps`` steps has statistics of
    its own; later steps share the last, which in training follows each of them in turn.

    Steps are counted from where a direction begins to read a sequence, so that the second
    direction's first step is the last of each sequence. Rows that have ended take part in no
    statistic. A step that has one row left is normalised by the running statistics from before the
    call, in training too, and leaves them as they are.

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        num_layers: number of layers :math:`L`, each fed by the one before
        bias: whether there is :math:`b`; :math:`\beta_c` is always there
        batch_first: input and output are :math:`(B, T, *)`; states stay as they are
        dropout: probability of an element being zeroed between layers in training
        bidirectional: two directions (:math:`D = 2`), outputs concatenated
        device, dtype: of the parameters; float16 and bfloat16 are computed in float32
        max_steps: steps :math:`S` with statistics of their own
        eps: :math:`\epsilon`
        momentum: part of the batch's statistics in the running ones, in [0, 1]

    Inputs: input, (h_0, c_0), lengths
        - input: a tensor or a :class:`torch.nn.utils.rnn.PackedSequence`
        - h_0, c_0: initial states; zeros if not given
        - lengths: valid steps of each row of padded input, int, :math:`(B)`; outputs beyond are
          zero

        The other arguments of :class:`rnnfast.LSTM`'s call raise.

    Shape:
        - input: :math:`(T, B, I)`, :math:`(B, T, I)` if ``batch_first``, :math:`(T, I)` in eval
          mode, or packed
        - h_0, c_0: :math:`(D \cdot L, B, H)`, or :math:`(D \cdot L, H)` for unbatched input
        - Output: ``(output, (h_n, c_n))`` of the same forms, output with :math:`D \cdot H` features

    Attributes:
        weight_ih_l[k]: :math:`W_{ih}`: :math:`(4H, I)`, or :math:`(4H, D \cdot H)` above the first
        weight_hh_l[k]: :math:`W_{hh}`: :math:`(4H, H)`
        bias_l[k]: :math:`b`: :math:`(4H)`, zero at first
        gain_ih_l[k], gain_hh_l[k]: :math:`\gamma_{ih}, \gamma_{hh}`: :math:`(4H)`, 0.1 at first
        gain_c_l[k], bias_c_l[k]: :math:`\gamma_c` (0.1 at first), :math:`\beta_c`: :math:`(H)`
        running_mean_l[k], running_var_l[k]: buffers :math:`(S, 9H)`: of :math:`W_{ih} x`, of
            :math:`W_{hh} h` (:math:`4H` each, in the order i, f, g, o) and of :math:`c`

        With the suffix ``_reverse`` for the second direction.

    Raises:
        ValueError: a batch of one row in training; a size, probability, ``momentum``, ``eps`` or
            ``max_steps`` outside of its range
        RuntimeError: a shape or device that does not fit; ``reset`` and ``mask``
        TypeError: an argument of another type

    Example::

        >>> layer = rnnfast.BatchNormLSTM(10, 20, 2, max_steps=50)
        >>> output, (hn, cn) = layer(torch.randn(50, 3, 10))
        >>> output.shape
        torch.Size([50, 3, 20])
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
        max_steps: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        _stack.check_flag("bidirectional", bidirectional)
        # torch.nn checks the other arguments, of a layer of no memory
        nn.LSTM(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device="meta", dtype=dtype,
        )  # fmt: skip
        if isinstance(max_steps, bool) or not isinstance(max_steps, int):
            found = type(max_steps).__name__
            raise TypeError(f"rnnfast: max_steps of BatchNormLSTM must be an int, got {found}")
        if max_steps < 1:
            raise ValueError(
                f"rnnfast: max_steps of BatchNormLSTM must be at least 1, got {max_steps}"
            )
        self.eps, self.momentum = _stack.numbers(eps, momentum)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional = bidirectional
        H, directions = hidden_size, 2 if bidirectional else 1
        factory: Any = {"device": device, "dtype": dtype}
        for layer in range(num_layers):
            inputs = input_size if layer == 0 else directions * H
            for suffix in self._suffixes(layer):
                shapes: dict[str, tuple[int, ...]] = {
                    "weight_ih": (4 * H, inputs), "weight_hh": (4 * H, H), "gain_ih": (4 * H,),
                    "gain_hh": (4 * H,), "bias": (4 * H,), "gain_c": (H,), "bias_c": (H,),
                }  # fmt: skip
                if not bias:
                    del shapes["bias"]
                for name, shape in shapes.items():
                    setattr(self, name + suffix, Parameter(torch.empty(shape, **factory)))
                for name in ("running_mean", "running_var"):
                    buffer = torch.empty((max_steps, STATISTICS * H), **factory)
                    self.register_buffer(name + suffix, buffer)
        self.reset_parameters()

    @property
    def max_steps(self) -> int:
        """Steps with statistics of their own, as the buffers have them."""
        buffer: Any = self.running_mean_l0
        return int(buffer.size(0))

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}"] + [f"_l{layer}_reverse"] * self.bidirectional

    def reset_parameters(self) -> None:
        """Draw the initial weights anew, and forget the statistics."""
        bound = 1 / math.sqrt(self.hidden_size)
        for name, w in self.named_parameters():
            if name.startswith("weight"):
                nn.init.uniform_(w, -bound, bound)
            else:
                nn.init.constant_(w, _GAIN if name.startswith("gain") else 0.0)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Running means of 0 and variances of 1, for all steps."""
        for name, buffer in self.named_buffers():
            buffer.fill_(1.0 if name.startswith("running_var") else 0.0)

    if TYPE_CHECKING:  # torch.nn's says Any

        def __call__(
            self,
            input: Form,
            hx: States | None = None,
            reset: Tensor | None = None,
            lengths: Tensor | None = None,
            mask: Tensor | None = None,
        ) -> tuple[Form, States]: ...

    def forward(
        self,
        input: Form,
        hx: States | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Form, States]:
        """The sequence through all layers; see the class."""
        if reset is not None:
            _stack.refuse("reset", "steps of a batch that begins anew have no common statistics")
        if mask is not None:
            _stack.refuse("mask", "give lengths, or a PackedSequence")
        result: tuple[Form, States] = _stack.run(self._stack(), input, hx, lengths)
        return result

    def _stack(self) -> _stack.Stack:
        names = [name for layer in range(self.num_layers) for name in self._suffixes(layer)]
        return _stack.Stack(
            [[getattr(self, w + name, None) for w in _stack.WEIGHTS] for name in names],
            [getattr(self, f"running_mean{name}") for name in names],
            [getattr(self, f"running_var{name}") for name in names],
            self.num_layers, self.batch_first, self.dropout, self.bidirectional, self.training,
            self.eps, self.momentum,
        )  # fmt: skip

    def freeze(self) -> NoReturn:
        """Raises: weights of this layer can't be packed beforehand."""
        _stack.refuse("freeze()", "its weights can't be packed before a call")

    def step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: a step alone does not know which statistics are its own."""
        _stack.refuse("step()", "a step alone does not know which statistics are its own")

    def extra_repr(self) -> str:
        """What differs from a default, and max_steps."""
        text = f"{self.input_size}, {self.hidden_size}"
        for name, usual in (
            ("num_layers", 1), ("bias", True), ("batch_first", False), ("dropout", 0.0),
            ("bidirectional", False),
        ):  # fmt: skip
            if getattr(self, name) != usual:
                text += f", {name}={getattr(self, name)}"
        text += f", max_steps={self.max_steps}"
        for name, usual in (("eps", 1e-5), ("momentum", 0.1)):
            if getattr(self, name) != usual:
                text += f", {name}={getattr(self, name)}"
        return text
