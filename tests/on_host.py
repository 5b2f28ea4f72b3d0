"""Tests through the CUDA engine without a GPU: ``pytest -p on_host tests/test_modules.py ...``.

The engine's sources, its host side and bindings, compiled against a device of loops
(tests/cpp/on_host), take the place of the CPU operators in every test; what needs a tensor on a GPU
can't be had so. Memory is filled before it is given out, so that a number that nobody wrote is
noticed.
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
# Tests of the CPU engine's own doings (freezing, splits, what ran) or of the operators' names.
NOT_FOR_IT = {
    "test_accelerated_layers_take_resets",
    "test_autocast_with_states_packed_and_functional",
    "test_explain_and_last_run_tell_the_same",
    "test_freeze_gives_the_bits_of_packing_each_time",
    "test_frozen_and_stepped",
    "test_frozen_errors",
    "test_heads_run_side_by_side",
    "test_modes_and_subclasses_see_the_operator",
    "test_modes_see_the_operators",
    "test_only_valid_steps_are_computed",
    "test_only_the_gradients_asked_for",
    "test_overridden_tensors_see_the_operators",
    "test_packed_reset_states_projection_frozen",
    "test_recomputed_heads",
    "test_quantized_lazy_and_restored_layers",
    "test_recompute_of_long_sequences",
    "test_side_by_side_really_happens",
    "test_step_and_frozen_layers",
    "test_what_ran_is_told",
    "test_without_modules_frozen_and_quantized",
}


@functools.cache
def operators() -> Any:
    """torch.ops.rnnfast_on_host, with the derivatives of torch.ops.rnnfast."""
    import rnnfast
    from rnnfast import _batch_norm, _group, _lengths, _masked, ops, scan

    torch.ops.load_library(str(Path(rnnfast.__file__).with_name("_on_host.so")))
    for name, fake, backward, setup in (
        ("forward", ops.forward_fake, ops.forward_backward, ops._forward_setup),
        ("backward", ops.backward_fake, ops._backward_backward, ops._backward_setup),
        ("forward_lengths", _lengths.forward_fake, _lengths._formula, ops._forward_setup),
        (
            "backward_lengths",
            _lengths.backward_fake,
            _lengths._double_backward,
            ops._backward_setup,
        ),
        ("forward_masked", _masked.forward_fake, _masked.formula, _masked.setup),
        (
            "backward_masked",
            _masked.backward_fake,
            ops._backward_backward,
            _masked.backward_setup,
        ),
        ("scan", scan.scan_fake, scan._scan_formula, scan._scan_setup),
        ("scan_backward", scan.scan_backward_fake, scan._backward_formula, scan._backward_setup),
        (
            "batch_norm_forward",
            _batch_norm.forward_fake,
            _batch_norm._formula,
            _batch_norm._forward_setup,
        ),
        (
            "batch_norm_backward",
            _batch_norm.backward_fake,
            _batch_norm._double_backward,
            _batch_norm._backward_setup,
        ),
    ):
        torch.library.register_fake(f"{LIBRARY}::{name}", fake)
        torch.library.register_autograd(f"{LIBRARY}::{name}", backward, setup_context=setup)
    torch.library.register_fake(f"{LIBRARY}::forward_group", _group.forward_group_fake)
    return getattr(torch.ops, LIBRARY)


def fill_fresh_memory(byte: int) -> None:
    """From now on (0: no longer) malloc gives out memory of another content than zeros."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_PERTURB, byte)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the operators of the device on the host where Python calls the CPU's."""
    from rnnfast import _batch_norm, _group, _lengths, _masked, _run, _step, ops, scan

    found = operators()
    monkeypatch.setattr(ops, "forward", found.forward.default)
    monkeypatch.setattr(ops, "backward", found.backward.default)
    monkeypatch.setattr(ops, "gate_gradients", found.gate_gradients.default)
    monkeypatch.setattr(scan, "scan", found.scan.default)
    monkeypatch.setattr(scan, "scan_backward", found.scan_backward.default)
    monkeypatch.setattr(_lengths, "forward", found.forward_lengths.default)
    monkeypatch.setattr(_lengths, "backward", found.backward_lengths.default)
    monkeypatch.setattr(_masked, "forward", found.forward_masked.default)
    monkeypatch.setattr(_masked, "backward", found.backward_masked.default)
    monkeypatch.setattr(_batch_norm, "forward", found.batch_norm_forward.default)
    monkeypatch.setattr(_batch_norm, "backward", found.batch_norm_backward.default)
    monkeypatch.setattr(_run, "_forward", found.forward.default)
    monkeypatch.setattr(_step, "_forward", found.forward.default)
    monkeypatch.setattr(_group, "_forward_group", found.forward_group.default)
    monkeypatch.setattr(_group, "_backward_group", found.backward_group.default)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = {id(item): getattr(item, "originalname", item.name) for item in items}
    left = [item for item in items if names[id(item)] in NOT_FOR_IT]
    items[:] = [item for item in items if names[id(item)] not in NOT_FOR_IT]
    config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True)
def _on_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_in(monkeypatch)
    fill_fresh_memory(0x01)
    yield
    fill_fresh_memory(0)
