"""Tests through the CUDA engine without a GPU: ``pytest -p on_host tests/test_modules.py ...``.

The engine's sources, host side and bindings, compiled against a device of loops (tests/cpp/on_host),
take the place of the CPU operators in every test; what needs a tensor on a GPU can't be had so.
Memory is filled before it is given out, so that a number that nobody wrote is noticed.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
M_PERTURB = -6  # of glibc's mallopt
LIBRARY = "rnnfast_on_host"


@functools.cache
def operators() -> Any:
    """torch.ops.rnnfast_on_host, with the derivatives of torch.ops.rnnfast."""
    import rnnfast
    from rnnfast import ops

    torch.ops.load_library(str(Path(rnnfast.__file__).with_name("_on_host.so")))
    for name, backward, setup in (
        ("forward", ops.forward_backward, ops._forward_setup),
        ("backward", ops._backward_backward, ops._backward_setup),
    ):
        torch.library.register_autograd(f"{LIBRARY}::{name}", backward, setup_context=setup)
    return getattr(torch.ops, LIBRARY)


def fill_fresh_memory(byte: int) -> None:
    """From now on (0: no longer) malloc gives out memory of another content than zeros."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_PERTURB, byte)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the operators of the device on the host where Python calls the CPU's."""
    from rnnfast import _group, _run, _step, ops

    found = operators()
    monkeypatch.setattr(ops, "forward", found.forward.default)
    monkeypatch.setattr(ops, "backward", found.backward.default)
    monkeypatch.setattr(_run, "_forward", found.forward.default)
    monkeypatch.setattr(_step, "_forward", found.forward.default)
    monkeypatch.setattr(_group, "_forward_group", found.forward_group.default)
    monkeypatch.setattr(_group, "_backward_group", found.backward_group.default)


@pytest.fixture(autouse=True)
def _on_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_in(monkeypatch)
    fill_fresh_memory(0x01)
    yield
    fill_fresh_memory(0)
