"""Types and texts: what mypy finds in a user's program, and what a repr tells."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import works
from torch import nn

import rnnfast
from rnnfast import functional

HERE = Path(__file__).resolve().parent
USER = HERE / "typed_user.py"


def mypy(program: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    package = Path(rnnfast.__file__).resolve().parent
    options = ["--strict", "--config-file=", "--follow-imports=silent", "--cache-dir", str(cache)]
    return subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(program)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"MYPYPATH": str(package.parent)},
        check=False,
    )


@works.row(
    "Typing and introspection",
    "`mypy --strict` knows what every public name takes and gives: packed in, packed out; the "
    "LSTM's state is a pair",
    torch_nn="calls give Any",
    cuda=False,
)
def test_a_users_program(library: Any, device: torch.device) -> None:
    cache = HERE.parent / ".mypy_cache" / "user"  # torch takes ten seconds the first time
    done = mypy(USER, cache)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_program_uses_every_public_name() -> None:
    text = USER.read_text(encoding="utf-8")
    for name in rnnfast.__all__:
        assert re.search(rf"rnnfast\.{name}\b", text), name
    for name in functional.__all__:
        assert re.search(rf"functional\.{name}\b", text), name
    package = Path(rnnfast.__file__).parent
    assert (package / "py.typed").exists()


def test_mypy_would_say_so(tmp_path: Path) -> None:
    program = tmp_path / "wrong.py"
    program.write_text(
        "import torch\nimport rnnfast\nh: int = rnnfast.GRU(2, 3)(torch.ones(2, 2, 2))[1]\n",
        encoding="utf-8",
    )
    done = mypy(program, HERE.parent / ".mypy_cache" / "user")
    assert done.returncode == 1 and "wrong.py:3: error: Incompatible types" in done.stdout


SHOWN: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("LSTM", (5, 9), {}, "LSTM(5, 9)"),
    ("LSTM", (5, 9, 2), {"proj_size": 4}, "LSTM(5, 9, proj_size=4, num_layers=2)"),
    (
        "GRU",
        (5, 9),
        {"bias": False, "batch_first": True},
        "GRU(5, 9, bias=False, batch_first=True)",
    ),
    ("GRU", (5, 9), {"recompute": True}, "GRU(5, 9, recompute=True)"),
    ("RNN", (5, 9), {"nonlinearity": "tanh"}, "RNN(5, 9)"),
    ("RNN", (5, 9), {"nonlinearity": "relu"}, "RNN(5, 9, nonlinearity=relu)"),
    ("IndRNN", (5, 9), {"nonlinearity": "relu"}, "IndRNN(5, 9)"),
    (
        "IndRNN",
        (5, 9),
        {"nonlinearity": "tanh", "recompute": True, "bidirectional": True},
        "IndRNN(5, 9, bidirectional=True, nonlinearity=tanh, recompute=True)",
    ),
    ("RNNCell", (5, 9), {"nonlinearity": "relu"}, "RNNCell(5, 9, nonlinearity=relu)"),
    ("LSTMCell", (5, 9), {"bias": False}, "LSTMCell(5, 9, bias=False)"),
]


@pytest.mark.parametrize(("kind", "args", "options", "text"), SHOWN, ids=lambda v: str(v))
def test_repr(kind: str, args: tuple[Any, ...], options: dict[str, Any], text: str) -> None:
    assert repr(getattr(rnnfast, kind)(*args, **options)) == text


@works.row(
    "Typing and introspection",
    "`repr` shows every option that is not the default: torch.nn's, `nonlinearity`, `recompute`, "
    "`frozen`",
    torch_nn="not `nonlinearity` of RNN",
    error=r"AssertionError",
    cuda=False,
)
def test_repr_of_what_is_set(library: Any, device: torch.device) -> None:
    layer = library.RNN(5, 9, nonlinearity="relu")
    assert repr(layer) == "RNN(5, 9, nonlinearity=relu)"
    layer.freeze()
    assert repr(layer) == "RNN(5, 9, nonlinearity=relu, frozen=True)"
    layer.unfreeze()
    layer.recompute = True
    assert "frozen" not in repr(layer) and "recompute=True" in repr(nn.Sequential(layer))


@works.row(
    "Typing and introspection",
    "`inspect.signature` of a layer has every option by name",
    torch_nn="`(*args, **kwargs)`",
    error="KeyError|AssertionError",
    cuda=False,
)
def test_signatures(library: Any, device: torch.device) -> None:
    import inspect

    for kind in (library.LSTM, library.GRU, library.RNN):
        names = list(inspect.signature(kind).parameters)
        assert names[:4] == ["input_size", "hidden_size", "num_layers", "bias"] or (
            kind.__name__ == "RNN" and names[3] == "nonlinearity"
        )
