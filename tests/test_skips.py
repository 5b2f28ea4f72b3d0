"""The list of permitted skips is held to: by the hooks in conftest.py, which are tested here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

# The suite may skip no more than this. Lower it whenever an entry goes; never raise it.
AT_MOST = 2
AT_MOST_BY_MACHINE = 7  # more on a machine that lacks something: the entries with a ?

SUITE = """
import pytest

def test_runs():
    pass

@pytest.mark.skip(reason="because")
def test_skipped():
    pass

@pytest.mark.parametrize("k", [1, 2])
def test_some(k):
    if k == 2:
        pytest.skip("because")
"""
SKIPPED = ["test_a.py::test_skipped", "test_a.py::test_some[2]"]

# All that conftest.py asks of torch: importing the real one takes most of such a run.
TORCH = """
import types

cuda = types.SimpleNamespace(is_available=lambda: False)

def set_num_threads(count):
    pass

def get_num_threads():
    return 1

def manual_seed(seed):
    pass
"""


def entries() -> list[str]:
    lines = (HERE / "expected_skips.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("#", "cuda ="))]


def test_the_list_only_shrinks_and_gives_reasons() -> None:
    by_machine = [line for line in entries() if line.startswith("?")]
    assert len(by_machine) <= AT_MOST_BY_MACHINE
    assert len(entries()) - len(by_machine) <= AT_MOST
    for line in entries():
        name, _, reason = line.lstrip("? ").partition("#")
        assert (HERE / name.split("::")[0]).is_file(), f"{name} is not a test here"
        assert len(reason.split()) >= 3, f"{name} has no reason"


def run_suite(
    folder: Path, *, allowed: list[str], options: tuple[str, ...] = (), suite: str = SUITE
) -> tuple[int, str]:
    """A small suite in a tests/ folder of its own, under our conftest."""
    tests = folder / "tests"
    tests.mkdir(parents=True)
    shutil.copy(HERE / "conftest.py", tests)
    (folder / "torch.py").write_text(TORCH)
    (tests / "test_a.py").write_text(suite)
    (tests / "expected_skips.txt").write_text("".join(f"{name}  # a reason\n" for name in allowed))
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "xdist.plugin"]
        + ["tests", *options],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "RNNFAST_CUDA_"))}
        | {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("allowed", "code", "words"),
    [
        (SKIPPED, 0, "2 passed, 2 skipped"),
        (["? " + SKIPPED[0], SKIPPED[1]], 0, "2 passed, 2 skipped"),
        ([*SKIPPED, "? test_a.py::test_runs"], 0, "2 passed, 2 skipped"),
        (SKIPPED[:1], 1, "SKIPPED WITHOUT LEAVE: test_a.py::test_some[2]"),
        ([], 1, "SKIPPED WITHOUT LEAVE: test_a.py::test_skipped"),
        ([*SKIPPED, "test_a.py::test_runs"], 1, "NO LONGER SKIPPED: test_a.py::test_runs"),
    ],
)
def test_the_hooks_fail_a_run_with_other_skips(
    tmp_path: Path, allowed: list[str], code: int, words: str
) -> None:
    returned, output = run_suite(tmp_path, allowed=allowed)
    assert returned == code, output
    assert words in output


def test_a_narrowed_run_does_not_miss_the_rest(tmp_path: Path) -> None:
    returned, output = run_suite(tmp_path, allowed=SKIPPED, options=("-k", "runs"))
    assert returned == 0, output


# Tests marked cuda: three of a kind, and one that is skipped whatever the machine has.
MACHINE = """
import sys
import types

import pytest
import torch

torch.cuda.is_available = lambda: {device}
fake = types.ModuleType("rnnfast")
fake._cuda = types.SimpleNamespace(why_not=lambda: {why!r})
fake.engines = lambda: ["cpu"] + ["cuda"] * {engine}
fake.use_engine = lambda name: None
sys.modules["rnnfast"] = fake

@pytest.mark.cuda
@pytest.mark.parametrize("k", [1, 2, 3])
def test_on_cuda(k):
    assert torch.cuda.is_available()

def test_elsewhere():
    pass
"""
OTHER_REASON = """
@pytest.mark.cuda
@pytest.mark.skip(reason="because")
def test_left_out():
    pass
"""
INSIDE = """
@pytest.mark.cuda
def test_left_out():
    pytest.skip("because")
"""
NO_DEVICE = MACHINE.format(device=False, why="no device", engine=0)
ALL_THERE = MACHINE.format(device=True, why="", engine=1)
NO_ENGINE = MACHINE.format(device=True, why="it was not built", engine=0)
LEFT_OUT = "test_a.py::test_left_out"


BESIDE = ("-n", "2", "-m", "not alone")  # as `make test` runs most of the suite


@pytest.mark.parametrize(
    ("suite", "allowed", "options", "code", "words"),
    [
        (NO_DEVICE, ["cuda = 3"], BESIDE, 0, "3 tests of the CUDA engine did not run: no device"),
        (NO_DEVICE, ["cuda = 4"], BESIDE, 1, "MARKED cuda: 3 tests, not the 4 of"),
        (SUITE, [*SKIPPED, "test_a.py::test_runs"], BESIDE, 1, "NO LONGER SKIPPED"),
        (NO_DEVICE, ["cuda = 3"], (), 0, "3 tests of the CUDA engine did not run: no device"),
        (NO_DEVICE, ["cuda = 4"], ("-m", "cuda"), 1, "MARKED cuda: 3 tests, not the 4 of"),
        (NO_DEVICE, ["cuda = 4"], ("-k", "on_cuda"), 0, "3 skipped"),
        (NO_DEVICE + OTHER_REASON, ["cuda = 4"], (), 1, f"SKIPPED WITHOUT LEAVE: {LEFT_OUT}"),
        (ALL_THERE, ["cuda = 4"], (), 1, "MARKED cuda: 3 tests, not the 4 of"),
        (ALL_THERE + INSIDE, ["cuda = 4"], (), 1, f"SKIPPED WITHOUT LEAVE: {LEFT_OUT}"),
        (ALL_THERE + INSIDE, ["cuda = 4", f"? {LEFT_OUT}"], (), 0, "4 passed, 1 skipped"),
        (NO_ENGINE, ["cuda = 3"], ("-m", "cuda"), 1, "the engine is missing: it was not built"),
    ],
)
def test_tests_of_the_cuda_engine_are_counted(
    tmp_path: Path,
    suite: str,
    allowed: list[str],
    options: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    """Without a device they are skipped, and their number is held to; with one, none is, and one
    without the engine is a fault."""
    returned, output = run_suite(tmp_path, allowed=allowed, options=options, suite=suite)
    assert returned == code, output
    assert words in output
