"""Opacus' own tests of recurrent layers, from its wheel, with rnnfast's layers bound in place of
torch.nn's: they compare its layers, outputs, states and gradients, with ours. And our own example
of private training."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
SUITES = ("opacus.tests.dp_layers.dp_rnn_test", "opacus.tests.grad_samples.dp_rnn_test")


def test_opacus_tests_pass_with_our_layers(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    options = ("-q", "-p", "bind_ours", "-p", "no:cacheprovider", "--rootdir", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--pyargs", *SUITES],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    ran = re.search(r"rnnfast's layers ran (\d+) times", done.stdout)
    assert ran and int(ran.group(1)) >= 100, done.stdout[-500:]


def test_the_example_of_private_training_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("dp_sgd")
    assert example.main(["--steps", "100"]) < 0.5  # a coin gives 0.69
