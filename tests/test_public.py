"""explain, use_engine, last_run, freeze and ``python -m rnnfast``."""

from __future__ import annotations

import copy
import inspect
import re
import subprocess
import sys
import time
from typing import Any

import pytest
import tolerance
import torch
from test_modules import leaves_of
from torch import nn

import rnnfast
from rnnfast import _route, functional


def test_public_names() -> None:
    for name in (
        *("LSTM", "GRU", "RNN", "IndRNN", "LSTMCell", "GRUCell", "RNNCell", "functional"),
        *("accelerate", "restore", "explain", "use_engine", "last_run", "engines"),
        *("patched", "truncated", "Recurrent", "load_cell", "check_cell", "LoadedLayer"),
    ):
        assert hasattr(rnnfast, name), name
        assert name in rnnfast.__all__
    assert isinstance(rnnfast.__version__, str)


LIGHT = """
import sys, torch
before = set(sys.modules)
import rnnfast
layer = rnnfast.LSTM(4, 8, 2, dropout=0.5)
layer(torch.randn(5, 3, 4), lengths=torch.tensor([2, 5, 1]))[0].sum().backward()
layer.step(torch.randn(3, 4))
heavy = {"torch._dynamo", "torch._inductor", "torch.onnx", "sympy", "numpy"} - before
print(sorted(heavy & set(sys.modules)))
"""


def test_importing_and_training_load_no_compiler() -> None:
    """torch._dynamo takes as long to import as torch."""
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_what_is_constant_to_the_compiler() -> None:
    """_route.py marks it as torch.compiler.assume_constant_result does."""

    def marked() -> bool:
        return True

    torch.compiler.assume_constant_result(marked)
    assert marked.__dict__ == vars(_route.is_exporting) and marked.__dict__


def test_engines_and_last_run() -> None:
    assert {"cpu", "reference"} <= set(rnnfast.engines())
    layer, x = rnnfast.GRU(5, 9), torch.randn(3, 2, 5)
    with rnnfast.use_engine("reference"):
        want = layer(x)[0]
        assert rnnfast.last_run()["engine"] == "reference"
    got = layer(x)[0]
    proof = rnnfast.last_run()
    assert proof["engine"] == "cpu"
    assert set(proof) >= {"engine", "isa", "threads", "split", "kernel_ih", "kernel_hh"}
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_use_engine_takes_effect_at_once() -> None:
    scope = rnnfast.use_engine("reference")
    layer, x = rnnfast.GRU(5, 9), torch.randn(3, 2, 5)
    layer(x)
    assert rnnfast.last_run()["engine"] == "reference"
    with scope:
        pass
    layer(x)
    assert rnnfast.last_run()["engine"] == "cpu"


@pytest.mark.parametrize("isa", [None, "portable"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "shape", [(1, 1, 32, 64), (40, 33, 64, 128), (3, 2, 16, 320), (7, 5, 5, 17)]
)
def test_explain_tells_what_then_runs(
    shape: tuple[int, int, int, int], threads: int, isa: str | None
) -> None:
    """The explanation of a layer and an input is what last_run reports after the call."""
    seq_len, batch, inputs, hidden = shape
    torch.set_num_threads(threads)
    layer, x = rnnfast.LSTM(inputs, hidden), torch.randn(seq_len, batch, inputs)
    with rnnfast.use_engine("auto" if isa is None else "cpu", isa=isa):
        explanation = rnnfast.explain(layer, x)
        text = str(explanation)
        # A thread whose team came late works alone for a while: on a busy machine ask again.
        end = time.monotonic() + 20
        while True:
            layer(x)
            ran = rnnfast.last_run()
            if ran["threads"] == explanation.rows[0].threads or time.monotonic() > end:
                break
            time.sleep(0.05)
    assert len(explanation.rows) >= 1
    for word in (ran["engine"], ran["isa"], ran["split"], ran["kernel_hh"]):
        assert str(word) in text
    row = explanation.rows[0]
    assert (row.engine, row.isa, row.threads, row.split) == (
        ran["engine"],
        ran["isa"],
        ran["threads"],
        ran["split"],
    )
    assert row.reason


def test_explain_a_shape_and_a_model() -> None:
    by_shape = rnnfast.explain("lstm", seq_len=7, batch=3, input_size=5, hidden_size=9)
    assert "cpu" in str(by_shape) and by_shape.rows
    model = rnnfast.accelerate(nn.ModuleDict({"a": nn.LSTM(5, 9, 2), "b": nn.GRU(9, 9)}))
    text = str(rnnfast.explain(model))
    assert "a" in text and "b" in text
    with pytest.raises((RuntimeError, ValueError), match="rnnfast"):
        rnnfast.explain("perceptron", seq_len=7, batch=3, input_size=5, hidden_size=9)


FROZEN = [
    lambda: rnnfast.LSTM(5, 17, 2, bidirectional=True),
    lambda: rnnfast.LSTM(5, 17, proj_size=4, dtype=torch.float64),
    lambda: rnnfast.GRU(5, 33),
    lambda: rnnfast.RNN(5, 33, nonlinearity="relu"),
    lambda: rnnfast.IndRNN(5, 33),
]


@pytest.mark.parametrize("make", FROZEN)
def test_frozen_layer_gives_the_same(make) -> None:  # type: ignore[no-untyped-def]
    layer = make()
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    dtype = next(layer.parameters()).dtype
    layer.freeze()
    assert list(layer.state_dict()) == list(state)
    for shape in ((1, 1, 5), (4, 3, 5), (9, 13, 5)):
        x = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            frozen = layer(x)
            assert rnnfast.last_run()["kernel_ih"] == "packed"
            layer.unfreeze()
            with rnnfast.use_engine("cpu", kernel="packed"):
                plain = layer(x)
            layer.freeze()
        for a, b in zip(leaves_of(frozen), leaves_of(plain), strict=True):
            assert tolerance.same_bits(a, b)


def test_frozen_layer_refuses_what_would_be_wrong() -> None:
    layer, x = rnnfast.LSTM(5, 9), torch.randn(4, 3, 5)
    layer.freeze()
    with pytest.raises(RuntimeError, match="rnnfast.*(?i:frozen|unfreeze)"):
        layer(x)
    with torch.no_grad():
        before = layer(x)[0]
        layer.weight_hh_l0.add_(1)
        with pytest.raises(RuntimeError, match="rnnfast.*(?i:frozen|freeze)"):
            layer(x)
        layer.freeze()
        assert not torch.equal(layer(x)[0], before)
        layer.weight_hh_l0 = nn.Parameter(torch.zeros(36, 9))
        with pytest.raises(RuntimeError, match="rnnfast.*(?i:frozen|freeze)"):
            layer(x)
    layer.unfreeze()
    layer(x)[0].sum().backward()
    assert layer.weight_ih_l0.grad is not None


def test_frozen_layer_notices_new_memory_at_the_old_address() -> None:
    """Freed memory is handed out again: an address alone proves nothing."""
    layer, x = rnnfast.LSTM(5, 33), torch.randn(4, 3, 5)
    layer.freeze()
    weight = layer.weight_hh_l0
    address, shape = weight.data_ptr(), weight.shape
    weight.data = torch.zeros(1)
    kept = []
    for _ in range(50):
        kept.append(torch.randn(shape))
        if kept[-1].data_ptr() == address:
            break
    weight.data = kept[-1]
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="weight_hh_l0 was changed since freeze"),
    ):
        layer(x)


def test_freeze_documents_what_it_cannot_notice() -> None:
    assert ".data.mul_" in (rnnfast.LSTM.freeze.__doc__ or "")


def test_a_parametrized_layer_cannot_be_frozen() -> None:
    """At once and with the reason, not at the first call with another."""
    layer = rnnfast.GRU(5, 9)
    layer.freeze()
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    with pytest.raises(RuntimeError, match=r"rnnfast: freeze\(\) .*weight_hh_l0 .*parametrization"):
        layer.freeze()
    copy.deepcopy(layer).unfreeze()
    layer.double().unfreeze()
    nn.utils.parametrize.remove_parametrizations(layer, "weight_hh_l0")
    layer.freeze()
    with torch.no_grad():
        layer(torch.randn(4, 3, 5, dtype=torch.float64))


def test_frozen_layer_under_another_isa() -> None:
    """Packed weights belong to one instruction set: another refuses or repacks, never misreads."""
    layer, x = rnnfast.LSTM(5, 33), torch.randn(4, 3, 5)
    with torch.no_grad():
        want = layer(x)[0]
        layer.freeze()
        with rnnfast.use_engine("cpu", isa="portable"):
            try:
                got = layer(x)[0]
            except RuntimeError as error:
                assert "rnnfast" in str(error)
            else:
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_frozen_layer_can_be_copied() -> None:
    """A copy computes with its own parameters, frozen or not."""
    layer, x = rnnfast.GRU(5, 9), torch.randn(4, 3, 5)
    layer.freeze()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        torch.testing.assert_close(twin(x)[0], layer(x)[0], rtol=1e-5, atol=1e-6)
        for p in twin.parameters():
            p.zero_()
        try:
            zero = twin(x)[0]
        except RuntimeError as error:
            assert "rnnfast" in str(error)
        else:
            assert not zero.any()


def test_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rnnfast"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (torch.__version__, rnnfast.__version__, "cpu"):
        assert word in done.stdout


def described() -> list[tuple[str, Any]]:
    """Every public callable: functions, classes, and the methods that rnnfast gives its layers."""
    found = [(name, getattr(rnnfast, name)) for name in rnnfast.__all__]
    found += [(f"functional.{n}", getattr(rnnfast.functional, n)) for n in functional.__all__]
    for kind in (rnnfast.LSTM, rnnfast.GRU, rnnfast.RNN, rnnfast.IndRNN):
        for method in ("forward", "step", "freeze", "unfreeze", "flatten_parameters"):
            found.append((f"{kind.__name__}.{method}", getattr(kind, method)))
    return [(name, value) for name, value in found if callable(value)]


@pytest.mark.parametrize(("name", "value"), described(), ids=lambda v: v if type(v) is str else "")
def test_docstrings(name: str, value: Any) -> None:
    """A sentence, every argument by its name, the shape of tensors, what comes back, an example."""
    doc = inspect.cleandoc(value.__doc__ or "")
    assert re.match(r"[A-Z:].*[.:]$", doc.split("\n\n")[0], re.DOTALL), "begin with a sentence"
    if re.search(r"\b[Ss]ee\s:(class|func):`|^All arguments of", doc, re.MULTILINE):
        return  # told there
    signature = inspect.signature(value)
    parameters = [
        p.name
        for p in signature.parameters.values()
        if p.name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    for parameter in parameters:
        assert re.search(rf"\b{parameter}\b", doc), f"{parameter} is not told"
    if len(parameters) > 0 and name != "Explanation":
        assert re.search(r"^Args:", doc, re.MULTILINE)
    computes = name.startswith("functional.") or (
        isinstance(value, type) and issubclass(value, (nn.RNNBase, nn.RNNCellBase))
    )
    if computes or name.endswith((".step", ".forward")):
        assert re.search(r"^Shape:", doc, re.MULTILINE)
    gives = signature.return_annotation not in ("None", None, inspect.Signature.empty)
    if gives and not isinstance(value, type) and not computes and not name.endswith(".forward"):
        assert re.search(r"^Returns:|^Names of", doc, re.MULTILINE), "what comes back is not told"
    if name != "Explanation" and not name.endswith(("unfreeze", "flatten_parameters")):
        assert re.search(r"^Example::", doc, re.MULTILINE)


@pytest.mark.parametrize(("name", "value"), described(), ids=lambda v: v if type(v) is str else "")
def test_everything_has_a_type(name: str, value: Any) -> None:
    function = value.__init__ if isinstance(value, type) else value
    signature = inspect.signature(function)
    for p in signature.parameters.values():
        assert p.name == "self" or p.annotation is not inspect.Parameter.empty, p.name
    assert signature.return_annotation is not inspect.Signature.empty
