"""The recurrent layers: torch.nn's, with its signatures, attributes and errors, and others."""

from __future__ import annotations

from ._layer import Layer
from .gru import GRU
from .lstm import LSTM
from .rnn import RNN, IndRNN
from .scan_layers import QRNN, MinGRU, MinLSTM
from .slstm import SLSTM
from .sru import SRU

__all__ = ["GRU", "LSTM", "QRNN", "RNN", "SLSTM", "SRU", "IndRNN", "MinGRU", "MinLSTM"]

LAYERS: tuple[type[Layer], ...] = (LSTM, GRU, RNN, IndRNN, MinGRU, MinLSTM, QRNN, SRU, SLSTM)
