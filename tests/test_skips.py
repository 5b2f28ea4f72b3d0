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


def entries() -> list[str]:
    lines = (HERE / "expected_skips.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_the_list_only_shrinks_and_gives_reasons() -> None:
    by_machine = [line for line in entries() if line.startswith("?")]
    assert len(by_machine) <= AT_MOST_BY_MACHINE
    assert len(entries()) - len(by_machine) <= AT_MOST
    for line in entries():
        name, _, reason = line.lstrip("? ").partition("#")
        assert (HERE / name.split("::")[0]).is_file(), f"{name} is not a test here"
        assert len(reason.split()) >= 3, f"{name} has no reason"


def run_suite(
    folder: Path, *, allowed: list[str], options: tuple[str, ...] = ()
) -> tuple[int, str]:
    """A small suite in a tests/ folder of its own, under our conftest."""
    tests = folder / "tests"
    tests.mkdir(parents=True)
    shutil.copy(HERE / "conftest.py", tests)
    (tests / "test_a.py").write_text(SUITE)
    (tests / "expected_skips.txt").write_text("".join(f"{name}  # a reason\n" for name in allowed))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", *options],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
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
