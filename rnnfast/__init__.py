"""Fast recurrent layers for PyTorch: LSTM, GRU, RNN and IndRNN, drop-ins for torch.nn's.

>>> import rnnfast
>>> model = rnnfast.accelerate(model)          # every torch.nn layer in it, in place
>>> layer = rnnfast.LSTM(512, 512, num_layers=2)
>>> print(rnnfast.explain(layer))
"""

from . import functional
from ._onnx import onnx_translations
from ._patched import patched
from ._truncated import truncated
from .accelerate import accelerate, restore
from .batch_norm import BatchNormLSTM
from .cell_modules import GRUCell, LSTMCell, RNNCell
from .cells import ACTIVATIONS
from .check_cell import check_cell
from .engine import engines, last_run, use_engine
from .explain import Explanation, explain
from .lazy import LazyGRU, LazyIndRNN, LazyLSTM, LazyRNN
from .load_cell import LoadedLayer, load_cell
from .modules import GRU, LSTM, QRNN, RNN, SRU, IndRNN, MinGRU, MinLSTM
from .quantize import QuantizedGRU, QuantizedIndRNN, QuantizedLSTM, QuantizedRNN, quantize
from .recurrent import Recurrent

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "GRU",
    "LSTM",
    "QRNN",
    "RNN",
    "SRU",
    "BatchNormLSTM",
    "Explanation",
    "GRUCell",
    "IndRNN",
    "LSTMCell",
    "LazyGRU",
    "LazyIndRNN",
    "LazyLSTM",
    "LazyRNN",
    "LoadedLayer",
    "MinGRU",
    "MinLSTM",
    "QuantizedGRU",
    "QuantizedIndRNN",
    "QuantizedLSTM",
    "QuantizedRNN",
    "RNNCell",
    "Recurrent",
    "__version__",
    "accelerate",
    "check_cell",
    "engines",
    "explain",
    "functional",
    "last_run",
    "load_cell",
    "onnx_translations",
    "patched",
    "quantize",
    "restore",
    "truncated",
    "use_engine",
]
