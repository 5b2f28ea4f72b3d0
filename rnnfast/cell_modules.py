"""torch.nn's recurrent cells (one step) on the fast engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from . import _run
from ._cast import refuse_input
from ._signatures import Device, States
from .cells import cell_spec

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]

_LSTM = cell_spec("lstm")
_GRU = cell_spec("gru")
_RNN = {"tanh": cell_spec("rnn_tanh"), "relu": cell_spec("rnn_relu")}


def _raise_rank(who: str, what: str, tensor: Tensor) -> NoReturn:
    raise ValueError(f"{who}: Expected {what} to be 1D or 2D, got {tensor.dim()}D instead")


def _weights(cell: nn.RNNCellBase) -> tuple[Any, Any, Any, Any]:
    try:
        p = cell._parameters  # several times faster than four attributes of a module
        return p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"]
    except KeyError:  # parametrized, or replaced by a plain tensor
        return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


class LSTMCell(nn.RNNCellBase):
    r"""One step of an LSTM, a drop-in for :class:`torch.nn.LSTMCell`.

    .. math::
        \begin{array}{ll}
        i = \sigma(W_{ii} x + b_{ii} + W_{hi} h + b_{hi}) \\
        f = \sigma(W_{if} x + b_{if} + W_{hf} h + b_{hf}) \\
        g = \tanh(W_{ig} x + b_{ig} + W_{hg} h + b_{hg}) \\
        o = \sigma(W_{io} x + b_{io} + W_{ho} h + b_{ho}) \\
        c' = f \odot c + i \odot g \\
        h' = o \odot \tanh(c')
        \end{array}

    Hochreiter & Schmidhuber 1997, the forget gate of Gers et al. 2000.

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        bias: whether there are biases
        device, dtype: of the parameters

    Inputs: input, (h_0, c_0)
        The state is zero where it is not given.

    Shape:
        - input: :math:`(B, I)` or :math:`(I)`
        - h_0, c_0, h_1, c_1: :math:`(B, H)` or :math:`(H)`

    Outputs: (h_1, c_1)

    Attributes:
        weight_ih: :math:`(4H, I)`, gates i, f, g, o
        weight_hh: :math:`(4H, H)`
        bias_ih, bias_hh: :math:`(4H)`

    Raises:
        ValueError, RuntimeError: as torch.nn.LSTMCell, with its texts

    Example::

        >>> cell = rnnfast.LSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10))
        >>> h, c = cell(torch.randn(3, 10), (h, c))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, device, dtype)

    if TYPE_CHECKING:  # torch.nn's calls give Any

        def __call__(self, input: Tensor, hx: States | None = None) -> States: ...

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        """Run one step; see the class."""
        if not isinstance(input, Tensor):
            refuse_input(input)
        dims = input.dim()
        if dims not in (1, 2):
            _raise_rank("LSTMCell", "input", input)
        h = c = None
        if hx is not None:
            for k, state in enumerate(hx):
                if state.dim() not in (1, 2):
                    _raise_rank("LSTMCell", f"hx[{k}]", state)
            if dims == 2 and not isinstance(hx, (tuple, list)):
                raise TypeError(f"rnnfast: hx must be a tuple (h, c), got {type(hx).__name__}")
            if len(hx) > 2 or (len(hx) < 2 and dims == 2):
                raise RuntimeError("lstm_cell expects two hidden states")
            h, c = hx[0], hx[1]
        if dims == 2:
            h, c = _run.cell(_LSTM, input, h, c, *_weights(self))
            return h, c.squeeze(0)
        if h is not None and c is not None:
            h, c = h.unsqueeze(0), c.unsqueeze(0)
        h, c = _run.cell(_LSTM, input.unsqueeze(0), h, c, *_weights(self))
        return h.squeeze(0), c.squeeze(0).squeeze(0)


class _OneStateCell(nn.RNNCellBase):
    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...

    def _step(self, who: str, spec: Any, input: Tensor, hx: Tensor | None) -> Tensor:
        if not isinstance(input, Tensor):
            refuse_input(input)
        dims = input.dim()
        if dims not in (1, 2):
            _raise_rank(who, "input", input)
        if hx is not None and hx.dim() not in (1, 2):
            _raise_rank(who, "hidden", hx)
        if dims == 2:
            return _run.cell(spec, input, hx, None, *_weights(self))[0]
        if hx is not None:
            hx = hx.unsqueeze(0)
        return _run.cell(spec, input.unsqueeze(0), hx, None, *_weights(self))[0].squeeze(0)


class GRUCell(_OneStateCell):
    r"""One step of a GRU, a drop-in for :class:`torch.nn.GRUCell`.

    .. math::
        \begin{array}{ll}
        r = \sigma(W_{ir} x + b_{ir} + W_{hr} h + b_{hr}) \\
        z = \sigma(W_{iz} x + b_{iz} + W_{hz} h + b_{hz}) \\
        n = \tanh(W_{in} x + b_{in} + r \odot (W_{hn} h + b_{hn})) \\
        h' = (1 - z) \odot n + z \odot h
        \end{array}

    Cho et al. 2014 (arXiv:1406.1078), the reset gate after the product.

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        bias: whether there are biases
        device, dtype: of the parameters

    Inputs: input, h
        The state is zero where it is not given.

    Shape:
        - input: :math:`(B, I)` or :math:`(I)`
        - h, h': :math:`(B, H)` or :math:`(H)`

    Outputs: h'

    Attributes:
        weight_ih: :math:`(3H, I)`, gates r, z, n
        weight_hh: :math:`(3H, H)`
        bias_ih, bias_hh: :math:`(3H)`

    Raises:
        ValueError, RuntimeError: as torch.nn.GRUCell, with its texts

    Example::

        >>> cell = rnnfast.GRUCell(10, 20)
        >>> h = cell(torch.randn(3, 10))
        >>> h = cell(torch.randn(3, 10), h)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 3, device, dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Run one step; see the class."""
        return self._step("GRUCell", _GRU, input, hx)


class RNNCell(_OneStateCell):
    r"""One step of an Elman RNN, a drop-in for :class:`torch.nn.RNNCell`.

    .. math::
        h' = \tanh(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    or relu in place of tanh. Elman 1990.

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        bias: whether there are biases
        nonlinearity: ``'tanh'`` or ``'relu'``
        device, dtype: of the parameters

    Inputs: input, h
        The state is zero where it is not given.

    Shape:
        - input: :math:`(B, I)` or :math:`(I)`
        - h, h': :math:`(B, H)` or :math:`(H)`

    Outputs: h'

    Attributes:
        weight_ih: :math:`(H, I)`
        weight_hh: :math:`(H, H)`
        bias_ih, bias_hh: :math:`(H)`

    Raises:
        ValueError, RuntimeError: as torch.nn.RNNCell, with its texts

    Example::

        >>> cell = rnnfast.RNNCell(10, 20, nonlinearity="relu")
        >>> h = cell(torch.randn(3, 10))
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Run one step; see the class."""
        spec = _RNN.get(self.nonlinearity)
        if spec is None:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return self._step("RNNCell", spec, input, hx)
