"""Types and texts: what mypy finds in a user's program, and what a repr tells."""

from __future__ import annotations

import doctest
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import works
from torch import Tensor, nn
from typing_extensions import Self

import rnnfast
from rnnfast import functional

engine, explain, quantize = (sys.modules[f"rnnfast.{n}"] for n in ("engine", "explain", "quantize"))

HERE = Path(__file__).resolve().parent
USER = HERE / "typed_user.py"


def mypy(*program: str) -> subprocess.CompletedProcess[str]:
    """Of a file, or of ``"-c", text``."""
    package = Path(rnnfast.__file__).resolve().parent
    cache = HERE.parent / ".mypy_cache" / "user"  # torch takes ten seconds the first time
    options = ["--strict", "--config-file=", "--follow-imports=silent", "--cache-dir", str(cache)]
    return subprocess.run(
        [sys.executable, "-m", "mypy", *options, *program],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"MYPYPATH": str(package.parent)},
        check=False,
    )


def calls_give_any(library: Any, device: torch.device) -> None:
    lines = ["from typing import Any", "import torch", "from typing_extensions import assert_type"]
    lines += [
        f"assert_type(torch.nn.{kind}(2, 3)(torch.ones(2, 2, 2)), Any)"
        for kind in works.kinds(library)
    ]
    done = mypy("-c", "\n".join(lines))
    assert done.returncode == 0, done.stdout + done.stderr


@works.row(
    "Typing and introspection",
    "`mypy --strict` knows what every public name takes and gives: packed in, packed out; the "
    "LSTM's state is a pair",
    torch_nn="calls give Any",
    theirs=calls_give_any,
    cuda=False,
)
def test_a_users_program(library: Any, device: torch.device) -> None:
    done = mypy(str(USER))
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
    done = mypy(str(program))
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


def repr_hides(library: Any, device: torch.device) -> None:
    assert repr(library.RNN(5, 9, nonlinearity="relu")) == "RNN(5, 9)"


@works.row(
    "Typing and introspection",
    "`repr` shows every option that is not the default: torch.nn's, `nonlinearity`, `recompute`, "
    "`frozen`",
    torch_nn="not `nonlinearity` of RNN",
    theirs=repr_hides,
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


def hidden_signature(library: Any, device: torch.device) -> None:
    for kind in works.kinds(library):
        assert list(inspect.signature(getattr(library, kind)).parameters) == ["args", "kwargs"]


@works.row(
    "Typing and introspection",
    "`inspect.signature` of a layer has every option by name",
    torch_nn="`(*args, **kwargs)`",
    theirs=hidden_signature,
    cuda=False,
)
def test_signatures(library: Any, device: torch.device) -> None:
    options = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout"]
    options += ["bidirectional", "device", "dtype", "recompute"]
    options += ["weight_dropout", "input_dropout", "return_last", "activation", "layer_norm"]
    options += ["recurrent_dropout", "zoneout"]
    own = {
        "LSTM": [
            *("proj_size", "forget_bias", "gate_activation", "cell_clip", "coupled", "peephole"),
            "num_heads",
        ],
        "GRU": ["gate_activation", "reset_after", "num_heads"],
        "RNN": ["nonlinearity"],
    }
    for kind in works.kinds(library):
        layer = getattr(library, kind)
        named = inspect.signature(layer).parameters
        assert {*options, *own[kind]} == {n for n, p in named.items() if p.kind != p.VAR_KEYWORD}
        assert layer(input_size=5, hidden_size=9).hidden_size == 9


# --------------------------------------------------------------------------- every public name


def public() -> dict[str, Any]:
    """All functions and classes that may be called by name, and the methods of the classes."""
    found: dict[str, Any] = {}
    for module in (rnnfast, functional, engine, explain, quantize):
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                found.setdefault(value.__name__, value)
    for name, kind in list(found.items()):
        if not isinstance(kind, type):
            continue
        for base in kind.__mro__:
            if not base.__module__.startswith("rnnfast"):
                continue
            for attribute, value in vars(base).items():
                # torch.nn's own methods are bound under their names, too
                ours = getattr(value, "__module__", "").startswith("rnnfast")
                if inspect.isfunction(value) and ours and not attribute.startswith("_"):
                    found.setdefault(f"{name}.{attribute}", value)
    return found


PUBLIC = public()
LAYERS = ("LSTM", "GRU", "RNN", "IndRNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
# what takes and gives tensors: sizes must be told
SHAPED = (*LAYERS, *CELLS, *functional.__all__, "truncated", "LSTM.forward", "LSTM.step")
# what says "as another", where that one is told in full
LIKE_OTHERS = re.compile(r"(?i)see :|see the class|^as the layer|as :meth:|:class:`rnnfast\.\w+`")


def documented(value: Any) -> str:
    return inspect.cleandoc(inspect.getdoc(value) or "")


def test_every_public_name_is_found() -> None:
    assert len(PUBLIC) > 60
    for name in ("LSTM", "GRU.step", "QuantizedRNN.forward", "rnn_relu_cell", "Explanation"):
        assert name in PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_annotations(name: str) -> None:
    """Every argument and every result has a type, also where it is looked at when code runs."""
    value = PUBLIC[name]
    function = vars(value).get("__init__") if isinstance(value, type) else value
    if not inspect.isfunction(function):
        return  # of a class that takes the constructor of another
    signature = inspect.signature(function)
    missing = [
        p.name
        for p in signature.parameters.values()
        if p.annotation is p.empty and p.name != "self"
    ]
    assert not missing and signature.return_annotation is not signature.empty, signature
    typing.get_type_hints(function, None, {"Self": Self})  # an error where a name is not there


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings(name: str) -> None:
    """Every name says what it does, every argument of it stands there, and sizes where there are
    any."""
    value, text = PUBLIC[name], documented(PUBLIC[name])
    assert text, name
    first = text.split("\n\n")[0]
    assert first[0].isupper() and first.rstrip().endswith((".", ":")), first
    if name in SHAPED:
        assert re.search(r"^Shape:", text, re.MULTILINE), name
    if name in (*LAYERS, *CELLS, *functional.__all__):
        for section in ("Args:", "Raises:", "Example::"):
            assert section in text, section
    if LIKE_OTHERS.search(first) or (isinstance(value, type) and name not in (*LAYERS, *CELLS)):
        return
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.name != "self":
            assert re.search(rf"^ +(\w+, )*{parameter.name}\b.*:", text, re.MULTILINE), parameter


def taken_for_granted() -> dict[str, Any]:
    """What stands in examples without being made there."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(10, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    layer = rnnfast.GRU(10, 20)
    return {
        "torch": torch,
        "rnnfast": rnnfast,
        "model": Model(),
        "layer": layer,
        "x": torch.randn(5, 3, 10),
        "stream": torch.randn(4, 3, 10),
        "targets": torch.randn(5, 3, 20),
        "head": nn.Identity(),
        "criterion": nn.MSELoss(),
        "optimizer": torch.optim.SGD(layer.parameters(), lr=0.1),
    }


EXAMPLES = {name: text for name, value in PUBLIC.items() if ">>>" in (text := documented(value))}
EXAMPLES["rnnfast"] = documented(rnnfast)


def test_who_has_examples() -> None:
    wanted = {*LAYERS, *CELLS, *functional.__all__, "LazyLSTM", "LSTM.forward", "LSTM.step"}
    wanted |= {"LSTM.freeze", "accelerate", "restore", "patched", "quantize", "explain"}
    wanted |= {"use_engine", "last_run", "truncated", "onnx_translations"}
    assert wanted <= EXAMPLES.keys(), wanted - EXAMPLES.keys()


class Checker(doctest.OutputChecker):
    """What an example does not promise it may print."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "onnx_translations":
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)  # some write files
    made = doctest.DocTestParser().get_doctest(
        EXAMPLES[name], taken_for_granted(), name, None, None
    )
    output: list[str] = []
    doctest.DocTestRunner(Checker(), False, doctest.NORMALIZE_WHITESPACE).run(
        made, out=output.append
    )
    assert not output, "".join(output)
