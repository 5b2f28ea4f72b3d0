"""torch.nn's names bound to rnnfast's layers for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules import rnn

from .cell_modules import GRUCell, LSTMCell, RNNCell
from .modules import GRU, LSTM, RNN

__all__ = ["patched"]

# where code that is not ours looks torch.nn's layers up
_PLACES = (nn, nn.modules, rnn)
_NAMES = {kind.__name__: kind for kind in (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)}

_lock = threading.Lock()
_depth = 0
_before: list[tuple[object, str, object]] = []


def _enter() -> None:
    global _depth
    with _lock:
        _depth += 1
        if _depth > 1:
            return
        _before[:] = [(place, name, getattr(place, name)) for place in _PLACES for name in _NAMES]
        for place in _PLACES:
            for name, kind in _NAMES.items():
                setattr(place, name, kind)


def _leave() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0:
            for place, name, kind in _before:
                setattr(place, name, kind)
            _before.clear()


@contextmanager
def patched() -> Iterator[None]:
    """Let code that builds torch.nn's recurrent layers and cells build rnnfast's.

    Within the context ``torch.nn.LSTM``, ``GRU``, ``RNN``, ``LSTMCell``, ``GRUCell`` and
    ``RNNCell`` are rnnfast's classes, also in ``torch.nn.modules`` and ``torch.nn.modules.rnn``:
    layers built there, classes derived from them there, and models unpickled there are rnnfast's,
    and stay so afterwards. It is for code that derives from torch.nn's layers, which
    :func:`rnnfast.accelerate` leaves alone; for a model that is already there, use that.

    Out of reach: names bound before (``from torch.nn import LSTM`` at the top of a module that
    was imported already, classes derived from ``nn.LSTM`` then); import such a module within. Of
    torch.nn's own layers none can be pickled within, since their name is another class; outside of
    it, they can. ``isinstance(layer, nn.LSTM)`` is true for rnnfast's within and false outside of
    it. :func:`rnnfast.restore` leaves layers built here alone.

    The names belong to the process: other threads that build models meanwhile get rnnfast's layers,
    too. Contexts may nest, and overlap in threads; torch's names are back when the last one is
    left, by an exception or not.

    Returns:
        a context manager, which is a decorator, too

    Example::

        >>> with rnnfast.patched():
        ...     model = torch.nn.Transformer(8), torch.nn.LSTM(8, 8)
        >>> type(model[1])
        <class 'rnnfast.lstm.LSTM'>
    """
    _enter()
    try:
        yield
    finally:
        _leave()
