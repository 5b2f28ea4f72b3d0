"""The LSTM with recurrent batch normalisation, as a layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from . import _batch_norm, _cast, _hx, _lengths
from ._checks import check_batch_sizes, check_dense, check_lengths_kind
from ._rows import places
from ._signatures import Device, States
from ._signatures import Input as Form

__all__ = ["BatchNormLSTM"]

_STATISTICS = 9  # of each unit and step: 4 of W_ih x, 4 of W_hh h, 1 of c
_GAIN = 0.1  # section 4 of the paper: larger ones let tanh saturate, and gradients vanish


def _refuse(what: str, why: str) -> NoReturn:
    raise RuntimeError(f"rnnfast: BatchNormLSTM takes no {what}: {why}")


def _number(option: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"rnnfast: {option} of BatchNormLSTM must be a number, got {type(value).__name__}"
        )
    return float(value)


def _backwards(batch_sizes: Tensor) -> Tensor:
    """Where the rows of each sequence, packed, stand from its last step to its first."""
    count = int(batch_sizes.sum())
    step, column = places(batch_sizes, count)
    length = (batch_sizes.unsqueeze(1) > torch.arange(int(batch_sizes[0]))).sum(0)
    first = torch.cumsum(batch_sizes, 0) - batch_sizes
    return first[length[column] - 1 - step] + column


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
        RuntimeError: a shape that does not fit; ``reset`` and ``mask``; a tensor that is not on the
            CPU
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
        # torch.nn checks the arguments, of a layer of no memory
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
        self.eps, self.momentum = _number("eps", eps), _number("momentum", momentum)
        if not 0 <= self.momentum <= 1:
            raise ValueError(
                f"rnnfast: momentum of BatchNormLSTM must be in [0, 1], got {momentum}"
            )
        if not 0 < self.eps < math.inf:
            raise ValueError(f"rnnfast: eps of BatchNormLSTM must be positive, got {eps}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.max_steps = bidirectional, max_steps
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
                    buffer = torch.empty((max_steps, _STATISTICS * H), **factory)
                    self.register_buffer(name + suffix, buffer)
        self.reset_parameters()

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
            _refuse("reset", "steps of a batch that begins anew have no common statistics")
        if mask is not None:
            _refuse("mask", "give lengths, or a PackedSequence")
        return self._run(input, hx, lengths)

    def freeze(self) -> NoReturn:
        """Raises: weights of this layer can't be packed beforehand."""
        _refuse("freeze()", "its weights can't be packed before a call")

    def step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: a step alone does not know which statistics are its own."""
        _refuse("step()", "a step alone does not know which statistics are its own")

    def _run(self, input: Any, hx: Any, lengths: Any) -> Any:
        if not isinstance(input, (Tensor, PackedSequence)):
            _cast.refuse_input(input)
        rows = None
        if lengths is not None:
            check_lengths_kind(lengths, input)
            entered = _lengths.enter(input, None, lengths, self.batch_first)
            if entered.lengths is not None:
                _refuse("lengths in a graph", "give a PackedSequence, or leave the layer out")
            input, rows = entered.input, entered.rows
        batch_sizes = order = back = None
        batched = True
        if isinstance(input, PackedSequence):
            x, batch_sizes, order, back = input
            check_batch_sizes(batch_sizes, x.size(0))
            batch = int(batch_sizes[0])
        else:
            x = input
            if x.dim() not in (2, 3):
                raise ValueError(
                    f"BatchNormLSTM: Expected input to be 2D or 3D, got {x.dim()}D instead"
                )
            batched = x.dim() == 3
            x = x.unsqueeze(1) if not batched else x.transpose(0, 1) if self.batch_first else x
            batch = x.size(1)
            if x.size(0) == 0:
                raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        check_dense(x, "input")
        weight: Any = self.weight_ih_l0
        if x.size(-1) != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. Expected "
                f"{self.input_size}, got {x.size(-1)}"
            )
        if x.dtype != weight.dtype:
            x = _cast.match_input(x, weight, True)
        _cast.check_device(x, weight)
        if self.training and batch < 2:
            raise ValueError(
                "Expected more than 1 value per channel when training, got a batch of "
                f"{batch} (rnnfast: BatchNormLSTM; call eval() to use the running statistics)"
            )
        size = (self.num_layers * (1 + self.bidirectional), batch, self.hidden_size)
        h0: Any
        c0: Any
        if hx is None:
            h0 = c0 = x.new_zeros(size)
        else:
            states = _hx.take(hx, 2, batched, batch_sizes is not None)
            h0, c0 = _hx.fit(states, batched, (size, size), weight, order)
        y, h_n, c_n = self._layers(x, h0, c0, batch_sizes)

        if back is not None:
            h_n, c_n = h_n.index_select(1, back), c_n.index_select(1, back)
        if not batched:
            return y.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        if rows is not None:
            y = _lengths.pad(y, rows)
        elif batch_sizes is not None:
            return PackedSequence(y, batch_sizes, order, back), (h_n, c_n)
        return y.transpose(0, 1) if self.batch_first else y, (h_n, c_n)

    def _layers(
        self, x: Tensor, h0: Any, c0: Any, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        backwards: Tensor | None = None
        if self.bidirectional and batch_sizes is not None:
            backwards = _backwards(batch_sizes).to(x.device)

        def turned(rows: Tensor) -> Tensor:
            return rows.flip(0) if backwards is None else rows.index_select(0, backwards)

        h_n: list[Tensor] = []
        c_n: list[Tensor] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0 and self.training:
                x = torch.dropout(x, self.dropout, True)
            outs: list[Tensor] = []
            for reverse, suffix in enumerate(self._suffixes(layer)):
                k = len(h_n)
                y, h, c = self._direction(
                    turned(x) if reverse else x, h0[k], c0[k : k + 1], batch_sizes, suffix
                )
                outs.append(turned(y) if reverse else y)
                h_n.append(h)
                c_n.append(c)
            x = torch.cat(outs, -1) if len(outs) > 1 else outs[0]
        return x, torch.stack(h_n), torch.cat(c_n)

    def _direction(
        self, x: Tensor, h0: Tensor, c0: Tensor, batch_sizes: Tensor | None, suffix: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        names = ("weight_ih", "weight_hh", "gain_ih", "gain_hh", "bias", "gain_c", "bias_c")
        weights = [getattr(self, name + suffix, None) for name in names]
        mean, var = getattr(self, f"running_mean{suffix}"), getattr(self, f"running_var{suffix}")
        y, h_n, c_n, of_mean, of_var = _batch_norm.run(
            x, h0, c0, *weights, mean, var, batch_sizes, self.training, self.eps
        )
        if self.training:
            rows = x.size(1) if batch_sizes is None else batch_sizes
            self._follow(mean, var, of_mean, of_var, rows)
        return y, h_n, c_n

    @torch.no_grad()
    def _follow(
        self, mean: Tensor, var: Tensor, of_mean: Tensor, of_var: Tensor, rows: Tensor | int
    ) -> None:
        """Moves the running statistics towards those of each step, in their order."""
        m, own = self.momentum, self.max_steps - 1
        if isinstance(rows, Tensor):  # never growing: steps with a variance come first
            steps = int((rows > 1).sum())
            n = rows[:steps].unsqueeze(1).to(var)
            of_mean, of_var = of_mean[:steps], of_var[:steps] * (n / (n - 1))
        else:
            steps = of_mean.size(0)
            of_var = of_var * (rows / (rows - 1))
        first, late = min(steps, own), max(steps - own, 0)
        for running, found in ((mean, of_mean.to(mean)), (var, of_var.to(var))):
            running[:first].lerp_(found[:first], m)
            if late:
                # as if each had been averaged in after the other
                ago = torch.arange(late - 1, -1, -1, dtype=torch.float64).unsqueeze(1)
                weight = (m * (1 - m) ** ago).to(found)
                running[own].mul_((1 - m) ** late).add_((weight * found[own:]).sum(0))

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
