"""Cells of rnnfast.load_cell on CUDA: compiled for the device of loops, and by nvcc."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import on_host
import pytest
import torch
from own_headers import AS_BUILT, IN, ROOT, B, H, T
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import rnnfast
from rnnfast import _own_library, cells

load_cell: Any = importlib.import_module("rnnfast.load_cell")  # the name is the function's, too

pytest_plugins = ["own_headers"]
KINDS = {
    "Mgu": "mgu.h", "Leaky": "leaky.h", "Traces": "traces.h", "Drift": "drift.h",
    "Sum": "simple.h", "mine::Unit": "simple.h",
}  # fmt: skip
each = pytest.mark.parametrize("kind", KINDS)
f64 = torch.float64
# g++ in nvcc's place, with the runtime of loops in that of CUDA's
DEVICE_FLAGS = (*AS_BUILT, "-O0", "-x", "c++", "-I", str(ROOT / "tests" / "cpp" / "on_host"))


def source(folder: Path, kind: str) -> _own_library.Source:
    return _own_library.source_of(folder / KINDS[kind], kind)


@pytest.fixture(scope="module")
def on_device(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The cells as the CPU has them, which the device of loops was given, too."""
    on_host.operators()
    # a library of a cell finds the device in the engine's
    path = Path(rnnfast.__file__).with_name("_on_host.so")
    engine = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_own_library, "cuda_compiler", _own_library.compiler)
        patch.setattr(_own_library, "CUDA_FLAGS", DEVICE_FLAGS)
        patch.setattr(load_cell, "own_on_cuda", set())
        for kind in KINDS:
            found[kind] = rnnfast.load_cell(folder / KINDS[kind], struct=kind)
            given = source(folder, kind)
            load_cell._register_for_cuda(given, found[kind].spec.id, engine)
        assert load_cell.own_on_cuda == {kind.spec.id for kind in found.values()}
    yield found


def results(layer: Any, *args: Any, **options: Any) -> list[Tensor]:
    """Outputs, states and gradients."""
    y, state = layer(*args, **options)
    out = [y if isinstance(y, Tensor) else y.data, *([state] if layer.spec.states == 1 else state)]
    torch.manual_seed(5)
    cotangents = [torch.randn(t.shape, dtype=f64).to(t) for t in out]
    return [*out, *torch.autograd.grad(out, list(layer.parameters()), cotangents)]


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for mine, want in zip(found, wanted, strict=True):
        scale = float(want.detach().abs().max()) + 1
        torch.testing.assert_close(
            mine.cpu().double(), want.double(), rtol=0, atol=tolerance * scale
        )


def forms() -> list[tuple[str, Any, dict[str, Any]]]:
    """Arguments of a call."""
    torch.manual_seed(1)
    x = torch.randn(T, B, IN, dtype=f64)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3, 1] = True
    packed = pack_sequence([torch.randn(n, IN, dtype=f64) for n in (6, 3, 1)])
    return [("plain", x, {}), ("reset", x, {"reset": reset}), ("packed", packed, {})]


@each
@pytest.mark.parametrize("form", range(3))
def test_on_the_device_of_loops(
    on_device: dict[str, Any], kind: str, form: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step engine with the user's cell computes what the CPU engine does."""
    torch.manual_seed(0)
    layer = on_device[kind](IN, H, 2, bidirectional=True, dtype=f64)
    _, x, options = forms()[form]
    wanted = results(layer, x, **options)
    on_host.stand_in(monkeypatch)
    before = on_host.operators().cuda_last_run(0)
    close(results(layer, x, **options), wanted, 1e-11)
    assert on_host.operators().cuda_last_run(0) > before
    assert on_host.operators().cuda_last_run(6) == 0  # the step engine


@each
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)],
    ids=str,
)
def test_types(
    on_device: dict[str, Any],
    kind: str,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layer = on_device[kind](IN, H, dtype=dtype)
    exact = on_device[kind](IN, H, dtype=f64)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, IN).to(dtype)
    wanted = results(exact, x.double())
    on_host.stand_in(monkeypatch)
    close(results(layer, x), wanted, tolerance)


def test_errors_of_the_device_name_the_cell(
    on_device: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = on_device["Mgu"](IN, H)
    on_host.stand_in(monkeypatch)
    launches_left = 2  # field of set()
    on_host.operators().set(launches_left, 1)
    try:
        with pytest.raises(RuntimeError, match=r"failed in .* \(Mgu, float32, T=6 B=3 I=4 H=21\)"):
            layer(torch.randn(T, B, IN))
    finally:
        on_host.operators().set(launches_left, -1)


def test_the_onchip_kernel_refuses(on_device: dict[str, Any]) -> None:
    device = on_host.operators()
    weights = [w.detach().half() for w in on_device["Mgu"](IN, H).parameters()]
    before = device.cuda_set_kernel(1)
    try:
        with pytest.raises(RuntimeError, match="the on-chip engine has no cells of load_cell"):
            device.forward(
                torch.randn(T, B, IN).half(), None, None, *weights, None, None, None, None,
                on_device["Mgu"].spec.id, False, False,
            )  # fmt: skip
    finally:
        device.cuda_set_kernel(before)


def test_a_library_of_other_headers_is_refused(
    on_device: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        """One that was built of others."""

        @staticmethod
        def rnnfast_register_cuda_cell(cell: int, code: int) -> bytes:
            return (
                b"it was compiled with the headers 1, and this build of rnnfast has the headers 2"
            )

    monkeypatch.setattr(_own_library, "cuda_compiler", _own_library.compiler)
    monkeypatch.setattr(_own_library, "CUDA_FLAGS", DEVICE_FLAGS)
    given, engine = source(folder, "Mgu"), Engine()
    with pytest.raises(RuntimeError, match=r"Mgu of .* can't be loaded: it was compiled with"):
        load_cell._register_for_cuda(given, 1, engine)
    assert 1 not in cells.own_on_cuda


# --------------------------------------------------------------------------- asking for it


def test_whether_it_is_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ("yes", 1):
        with pytest.raises(TypeError, match="cuda of load_cell must be a bool or None, got"):
            rnnfast.load_cell(folder / "mgu.h", cuda=bad)
    monkeypatch.setattr(load_cell._cuda, "loaded", lambda: False)
    monkeypatch.setattr(load_cell, "cuda_load_error", lambda: "this torch has no CUDA")
    with pytest.raises(RuntimeError, match=r"cuda=True\) needs the CUDA engine, but this torch"):
        rnnfast.load_cell(folder / "mgu.h", cuda=True)
    assert not load_cell._for_cuda(None) and not load_cell._for_cuda(False)

    monkeypatch.setattr(load_cell._cuda, "loaded", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for there in (True, False):
        monkeypatch.setattr(_own_library, "has_nvcc", lambda there=there: there)
        assert load_cell._for_cuda(None) is there
    assert load_cell._for_cuda(True) and not load_cell._for_cuda(False)


def test_without_nvcc(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_own_library, "_nvcc", lambda: None)
    assert not _own_library.has_nvcc()
    with pytest.raises(RuntimeError, match=r"load_cell needs nvcc .* or give cuda=False"):
        _own_library.library(source(folder, "Mgu"), _own_library.CUDA)


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert _own_library.cuda_compiler() == [str(nvcc)]
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert _own_library.cuda_compiler() == [str(nvcc)]


@pytest.mark.parametrize("kind", ["Leaky", "Traces"])
def test_nvcc_compiles_it(
    folder: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with a device, but for the second architecture; without nvcc a sentence."""
    monkeypatch.setenv("RNNFAST_CACHE", str(tmp_path))
    if not _own_library.has_nvcc():
        with pytest.raises(RuntimeError, match="load_cell needs nvcc"):
            _own_library.library(source(folder, kind), _own_library.CUDA)
        return
    flags = [flag for flag in _own_library.CUDA_FLAGS if "compute_80" not in flag]
    assert len(flags) < len(_own_library.CUDA_FLAGS)
    monkeypatch.setattr(_own_library, "CUDA_FLAGS", tuple(flags))
    made = _own_library.library(source(folder, kind), _own_library.CUDA)
    assert made.name.startswith(f"{kind}-cuda-")
    library = ctypes.CDLL(str(made))
    library.rnnfast_own_cuda_cell.restype = ctypes.c_void_p
    first = ctypes.c_char_p.from_address(library.rnnfast_own_cuda_cell())
    assert first.value == _own_library.engine_stamp().encode()


@pytest.mark.cuda
@each
@pytest.mark.parametrize("dtype", [f64, torch.float16], ids=str)
def test_on_a_device(cuda: torch.device, folder: Path, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = rnnfast.load_cell(folder / KINDS[kind], struct=kind, cuda=True)
    layer = made(IN, H, 2, bidirectional=True, dtype=dtype)
    exact = made(IN, H, 2, bidirectional=True, dtype=f64)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, IN).to(dtype)
    wanted = results(exact, x.double())
    close(results(layer.to(cuda), x.to(cuda)), wanted, 1e-11 if dtype == f64 else 1e-2)
    (row,) = rnnfast.explain(layer, (T, B, IN))[:1]
    assert row.engine == "cuda"
