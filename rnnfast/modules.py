"""torch.nn's recurrent layers on the fast engines: same signature, attributes and errors."""

from __future__ import annotations

from ._layer import Layer
from .gru import GRU
from .lstm import LSTM
from .rnn import RNN, IndRNN

__all__ = ["GRU", "LSTM", "RNN", "IndRNN"]

LAYERS: tuple[type[Layer], ...] = (LSTM, GRU, RNN, IndRNN)
