"""What setup.py says when something is missing, and the check of ptxas's report. Nothing is built:
the tools are fakes."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("cmake", "ninja", "c++")

# setup.py as `python setup.py build_ext` runs it, by an interpreter that has neither cmake nor
# ninja beside it, and (on demand) without torch.
RUN = """
import runpy, sys
folder, without_torch, *arguments = sys.argv[1:]
sys.executable = folder + "/python"
if without_torch == "yes":
    sys.modules["torch"] = None
sys.argv = ["setup.py", *arguments]
runpy.run_path("setup.py", run_name="__main__")
"""


def build(
    folder: Path, *, missing: str = "", status: int = 0, **environment: str
) -> tuple[int, str]:
    """Runs the build with fake tools that note their arguments and end with `status`."""
    tools = folder / "bin"
    tools.mkdir()
    for name in TOOLS:
        if name != missing:
            tool = tools / name
            tool.write_text(f'#!/bin/sh\necho "{name} $@" >> "{folder}/calls"\nexit {status}\n')
            tool.chmod(0o755)
    own = ("CXX", "PYTHONPATH")
    clean = {k: v for k, v in os.environ.items() if k not in own and not k.startswith("RNNFAST_")}
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(tools), "yes" if missing == "torch" else "no"]
        + ["build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")],
        cwd=ROOT,
        env=clean | {"PATH": str(tools), "RNNFAST_BUILD_DIR": str(folder / "build")} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ran.returncode, ran.stdout + ran.stderr


def calls(folder: Path) -> str:
    path = folder / "calls"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("torch", "rnnfast: torch is not installed in this environment; install torch"),
        ("cmake", "rnnfast: cmake was not found; install it with `pip install cmake`"),
        ("ninja", "rnnfast: ninja was not found; install it with `pip install ninja`"),
        ("c++", "rnnfast: no C++ compiler was found (looked for c++, g++, clang++); install g++"),
    ],
)
def test_missing(tmp_path: Path, missing: str, sentence: str) -> None:
    """One sentence that says what to install, no traceback, and no tool has been started."""
    status, text = build(tmp_path, missing=missing)
    assert status != 0 and sentence in text, text
    assert "Traceback" not in text and not calls(tmp_path)


def test_missing_compiler_that_was_asked_for(tmp_path: Path) -> None:
    status, text = build(tmp_path, CXX="no-such-compiler -m64")
    assert status != 0 and "no C++ compiler was found (looked for no-such-compiler)" in text, text
    assert "Traceback" not in text and not calls(tmp_path)


def test_bad_cuda_value(tmp_path: Path) -> None:
    status, text = build(tmp_path, RNNFAST_CUDA="yes")
    assert status != 0 and "rnnfast: RNNFAST_CUDA must be auto, 0 or 1, got 'yes'" in text, text
    assert "Traceback" not in text and not calls(tmp_path)


def test_failed_build(tmp_path: Path) -> None:
    status, text = build(tmp_path, status=1)
    assert status != 0 and "rnnfast: the build failed in" in text, text
    assert "Traceback" not in text


def test_tools_are_called(tmp_path: Path) -> None:
    """The fakes are what runs, so the tests above fail for the reason that they name."""
    status, text = build(tmp_path, RNNFAST_CUDA="0")
    assert status == 0, text
    configure, make = calls(tmp_path).splitlines()
    assert configure.startswith("cmake -S") and "-DRNNFAST_CUDA=0" in configure
    assert make.startswith("cmake --build")


ENTRY = """ptxas info    : Compiling entry function '{name}' for '{arch}'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used {registers} registers, used 0 barriers
"""


# void rnnfast::cuda::onchip_backward<GruCellOf<StandardActivations>, BFloat16, 192, 5>(): 12 warps,
# 3 in each quarter.
TILE = (
    "_ZN7rnnfast4cuda15onchip_backward"
    "INS0_9GruCellOfINS0_19StandardActivationsEEENS_8BFloat16ELi192ELi5EEEvv"
)


def check_kernels(log: Path, *entries: dict[str, object]) -> tuple[int, str]:
    usual = {"name": "sums", "arch": "sm_90a", "stack": 0, "spill": 0, "registers": 40}
    log.write_text("".join(ENTRY.format(**(usual | entry)) for entry in entries))
    ran = subprocess.run(
        [sys.executable, ROOT / "tools" / "check_kernels.py", log], capture_output=True, text=True
    )
    return ran.returncode, ran.stdout


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"spill": 8}, "sums on sm_90a: 0 bytes of stack, spills of 8 and 8 bytes"),
        ({"stack": 16}, "sums on sm_90a: 16 bytes of stack"),
        ({"registers": 65}, "sums on sm_90a: 65 registers, 64 allowed"),
        ({"name": TILE, "registers": 169}, "192, 5> on sm_90a: 169 registers, 168 allowed"),
        ({}, "sums is not on the list"),
        ({"arch": "sm_80"}, "forward_steps<QrnnFCell, float> is missing for sm_80"),
    ],
)
def test_kernels_that_spill_or_are_missing(
    tmp_path: Path, entry: dict[str, object], words: str
) -> None:
    status, text = check_kernels(tmp_path / "log", entry)
    assert status == 1 and words in text, text


def test_a_tile_may_have_all_that_its_threads_can_have(tmp_path: Path) -> None:
    _, text = check_kernels(tmp_path / "log", {"name": TILE, "registers": 168})
    assert "allowed" not in text and "not on the list" not in text, text


def test_bounds_of_tiles_are_those_of_the_table() -> None:
    """Which the core has compiled in (RNNFAST_DEV=1)."""
    from rnnfast import _core

    tool = runpy.run_path(str(ROOT / "tools" / "check_kernels.py"))
    built = [tile for tile in _core.onchip_tiles() if tile["built"]]
    for tile in built:
        assert tool["most_of_tile"](tile["hidden"], tile["units"]) == tile["registers"]
    assert set(tool["onchip"]().values()) == {tile["registers"] for tile in built}


def test_a_build_without_a_report_of_ptxas(tmp_path: Path) -> None:
    status, text = check_kernels(tmp_path / "log")
    assert status == 1 and "holds no report of ptxas" in text, text
