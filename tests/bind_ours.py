"""A pytest plugin that puts rnnfast's layers in torch.nn's place, for other projects' own suites:
``pytest -p bind_ours --pyargs ...``. It says at the end how often they ran."""

from __future__ import annotations

from typing import Any

import torch

import rnnfast

calls = 0


def pytest_configure(config: Any) -> None:
    def counted(*args: Any) -> None:
        global calls
        calls += 1

    for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"):
        ours = getattr(rnnfast, name)
        setattr(torch.nn, name, ours)
        setattr(torch.nn.modules.rnn, name, ours)
    kinds = (rnnfast.LSTM, rnnfast.GRU, rnnfast.RNN)
    torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: counted() if isinstance(module, kinds) else None
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"rnnfast's layers ran {calls} times")
