"""The CUDA engine as users meet it: chosen, forced, explained, moved to, and refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from on_cuda import (
    KINDS,
    Setup,
    assert_near,
    build,
    inputs_of,
    leaves_of,
    module_on,
    results_of,
    same_bits,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import rnnfast
from rnnfast import _cuda, _library

pytestmark = pytest.mark.cuda

kinds = pytest.mark.parametrize("kind", KINDS)


def sm() -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def test_the_engine_is_there(cuda: torch.device) -> None:
    """Where there is a device, a library that is missing or can't be loaded is a fault."""
    assert _library.cuda_load_error() == ""
    assert _cuda.why_not() == ""
    assert rnnfast.engines() == ["cpu", "cuda", "reference"]


def test_the_command_line_tells_the_device(cuda: torch.device) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rnnfast"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"cuda      {torch.cuda.get_device_name()}" in done.stdout
    assert "engines   cpu, cuda, reference" in done.stdout


def small(kind: str, device: Any, **options: Any) -> tuple[Any, Tensor]:
    problem = build(Setup(kind, "float32", 5, 4, 7, 33, **options))
    layer = module_on(problem, True, device, torch.float32)
    return layer, inputs_of(problem, device, torch.float32)[0]


@pytest.mark.parametrize("precision", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_layers": 3}],
    ids=["one", "directions", "layers"],
)
@kinds
def test_launches_give_the_same_bits(
    kind: str, options: dict[str, Any], precision: str, cuda: torch.device
) -> None:
    problem = build(Setup(kind, precision, 19, 6, 9, 65, **options))
    layer = module_on(problem, True, cuda, problem.setup.dtype)
    x, _ = inputs_of(problem, cuda, problem.setup.dtype)
    found = []
    for launch in ("plain", "pdl", "auto"):
        with rnnfast.use_engine("cuda", launch=launch):
            found.append(results_of(layer, x))
            ran = rnnfast.last_run()["launch"]
        if launch != "auto":
            assert ran == ("plain" if torch.cuda.get_device_capability() < (9, 0) else launch)
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


def test_last_run_and_explain_tell_the_same(cuda: torch.device) -> None:
    for options, split, streams in (
        ({}, "-", 1),
        ({"bidirectional": True}, "directions", 2),
        ({"num_layers": 3}, "layers", 3),
    ):
        layer, x = small("LSTM", cuda, **options)
        for launch in ("plain", "pdl"):
            with rnnfast.use_engine("cuda", launch=launch):
                rows = rnnfast.explain(layer, x).rows
                layer(x)
                ran = rnnfast.last_run()
            assert ran["engine"] == "cuda" and ran["device"] == sm() and ran["streams"] == streams
            assert ran["isa"] is None and ran["threads"] is None and ran["kernel_ih"] is None
            for row in rows:
                assert (row.engine, row.isa, row.split, row.kernel) == ("cuda", sm(), split, "step")
                assert "a cuBLAS product and one kernel a step" in row.reason
                assert "forced by use_engine" in row.reason
                wanted = "programmatic dependent" if ran["launch"] == "pdl" else "plain"
                assert f"launches are {wanted}" in row.reason
    (row,) = rnnfast.explain("indrnn_tanh", input_size=5, hidden_size=9, device="cuda").rows
    assert row.engine == "cuda" and "the recurrence has no product" in row.reason
    text = str(rnnfast.explain(nn.Sequential(nn.Linear(3, 3), small("GRU", cuda)[0])))
    assert sm() in text and "cuda" in text


def test_last_run_where_devices_take_turns(cuda: torch.device) -> None:
    layer, x = small("GRU", cuda)
    other, z = small("GRU", "cpu")
    for _ in range(3):
        layer(x)
        assert rnnfast.last_run()["engine"] == "cuda"
        other(z)
        ran = rnnfast.last_run()
        assert ran["engine"] == "cpu" and ran["device"] is None and ran["launch"] is None
        with rnnfast.use_engine("reference"):
            layer(x)
        assert rnnfast.last_run()["engine"] == "reference"


@kinds
def test_the_reference_engine_on_the_device(kind: str, cuda: torch.device) -> None:
    problem = build(Setup(kind, "float64", 5, 4, 7, 33, bidirectional=True, num_layers=2))
    layer = module_on(problem, True, cuda, torch.float64)
    x, _ = inputs_of(problem, cuda, torch.float64)
    want = results_of(layer, x)
    with rnnfast.use_engine("reference"):
        assert_near(results_of(layer, x), want)
        assert rnnfast.explain(layer, x).rows[0].engine == "reference"


def test_a_forced_engine_never_falls_back(cuda: torch.device) -> None:
    layer, x = small("LSTM", cuda)
    other, z = small("LSTM", "cpu")
    cell = rnnfast.GRUCell(5, 9, device=cuda)
    with rnnfast.use_engine("cpu"):
        for run in (lambda: layer(x), lambda: layer.step(x[0]), lambda: cell(x[0, :, :5])):
            with pytest.raises(
                RuntimeError, match='engine "cpu" was forced, got a tensor on cuda:0'
            ):
                run()
    with rnnfast.use_engine("cuda"):
        layer(x)
        for run in (lambda: other(z), lambda: other.step(z[0])):
            with pytest.raises(RuntimeError, match='engine "cuda" was forced, got a tensor on cpu'):
                run()
        with pytest.raises(RuntimeError, match='"cuda" was forced and can\'t run under functorch'):
            torch.func.vmap(lambda one: layer(one)[0])(x[None])
    for wrong in ({"isa": "portable"}, {"kernel": "packed"}, {"split": "units"}, {"launch": "no"}):
        with pytest.raises(RuntimeError, match="rnnfast: "):
            rnnfast.use_engine("cuda", **wrong)
    with pytest.raises(RuntimeError, match="are the CUDA engine's, not cpu's"):
        rnnfast.use_engine("cpu", launch="plain")
    other(z), layer(x)


def test_tensors_of_different_devices(cuda: torch.device) -> None:
    layer, x = small("GRU", cuda)
    state = torch.zeros(1, 4, 33)
    with pytest.raises(RuntimeError, match="Input and parameter tensors are not at the same devi"):
        layer(x.cpu())
    with pytest.raises(RuntimeError, match="Input and parameter tensors are not at the same devi"):
        layer.cpu()(x)
    layer.to(cuda)
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not at the same device"):
        layer(x, state)
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not at the same device"):
        layer.step(x[0], state)
    mask = torch.zeros(5, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="reset must be a bool tensor on cuda:0 .* on cpu"):
        layer(x, None, mask)
    lstm, x = small("LSTM", cuda)
    h = torch.zeros(1, 4, 33, device=cuda)
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not at the same device"):
        lstm(x, (h, state))
    cell = rnnfast.GRUCell(7, 33, device=cuda)
    with pytest.raises(RuntimeError, match="are not at the same device"):
        cell(x[0], state[0])


def test_operators_check_devices(cuda: torch.device) -> None:
    layer, x = small("GRU", cuda)
    w_ih, w_hh = layer.weight_ih_l0.detach(), layer.weight_hh_l0.detach()
    h0, x = torch.zeros(4, 33, device=cuda), x.detach()
    sizes = torch.tensor([4, 4])
    good: dict[str, Any] = {"x": x, "h0": h0, "w_ih": w_ih, "w_hh": w_hh, "sizes": None}

    def run(reset: Any = None, packed: Any = None, **other: Any) -> Any:
        t = good | other
        return torch.ops.rnnfast.forward(
            t["x"], t["h0"], None, t["w_ih"], t["w_hh"], None, None, None, t["sizes"], reset,
            packed, 1, False, False,
        )  # fmt: skip

    run()
    for name in ("h0", "w_ih", "w_hh"):
        with pytest.raises(RuntimeError, match=rf"{name} must be on the same device as x \(cuda"):
            run(**{name: good[name].cpu()})
    with pytest.raises(RuntimeError, match=r"must be on the same device as x \(cpu"):
        run(x=x.cpu())
    with pytest.raises(RuntimeError, match="reset must be on the same device as x"):
        run(reset=torch.zeros(5, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="batch_sizes must be a one-dimensional int64 CPU tens"):
        run(x=x.reshape(-1, 7)[:8], sizes=sizes.to(cuda))
    with pytest.raises(RuntimeError, match="packed weights are for the CPU engine"):
        run(packed=torch.zeros(9, dtype=torch.uint8, device=cuda))
    with pytest.raises(RuntimeError, match="w_hh must have shape"):
        run(w_hh=w_hh[:, 1:])
    with pytest.raises(RuntimeError, match="w_ih must have the dtype of x, float32, got float64"):
        run(w_ih=w_ih.double())
    run(x=x.reshape(-1, 7)[:8], sizes=sizes)


def test_types_that_no_engine_computes(cuda: torch.device) -> None:
    layer = rnnfast.GRU(5, 9).to(cuda, torch.complex64)
    with pytest.raises(RuntimeError, match="rnnfast: the engines compute in float32"):
        layer(torch.zeros(3, 2, 5, device=cuda, dtype=torch.complex64))
    with pytest.raises(ValueError, match="does not match weight dtype"):
        rnnfast.GRU(5, 9, device=cuda)(torch.zeros(3, 2, 5, device=cuda, dtype=torch.float64))


def test_freeze_is_for_the_cpu(cuda: torch.device) -> None:
    layer, x = small("GRU", cuda)
    with pytest.raises(RuntimeError, match=r"freeze\(\) needs .* on the CPU, .* on cuda:0"):
        layer.freeze()
    frozen, z = small("GRU", "cpu")
    frozen.freeze()
    with torch.no_grad():
        want = layer(x)[0]
        frozen(z)
        assert frozen.to(cuda)._frozen is None
        assert same_bits([frozen(x)[0]], [want])
        assert copy.deepcopy(frozen)(x)[0].is_cuda


@kinds
def test_there_and_back(kind: str, cuda: torch.device) -> None:
    layer, z = small(kind, "cpu", num_layers=2)
    parameters, before = list(layer.parameters()), layer.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    want = leaves_of(layer(z))
    layer.to("cuda")
    assert all(p.is_cuda for p in layer.parameters())
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    assert_near(leaves_of(layer(z.to(cuda))), want, 1e-5)
    assert getattr(rnnfast, KINDS[kind][0])(5, 9, device="cuda").weight_ih_l0.is_cuda
    layer.cpu()
    assert same_bits([before[name] for name in before], list(layer.state_dict().values()))
    assert same_bits([t.detach() for t in leaves_of(layer(z))], [t.detach() for t in want])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(7, 16, 2, bidirectional=True)
        self.gru = nn.GRU(32, 9, batch_first=False)
        self.rnn = nn.RNN(9, 5)
        self.cell = nn.LSTMCell(5, 6)

    def forward(self, x: Any) -> Tensor:
        y, _ = self.lstm(x)
        y, _ = self.gru(y)
        y, _ = self.rnn(y)
        y = y.data if isinstance(y, PackedSequence) else y[-1]
        return self.cell(y)[0]


@pytest.mark.parametrize("first", ["move", "accelerate"])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_accelerate_and_restore(precision: str, first: str, cuda: torch.device) -> None:
    """cuDNN had flattened the weights; an optimizer made before goes on."""
    dtype = getattr(torch, precision)
    near = 1e-9 if dtype == torch.float64 else 1e-5
    model = Model().to(dtype)
    if first == "move":
        model = model.to(cuda)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1)
    x = torch.randn(5, 4, 7, dtype=dtype, device=cuda)
    plain = copy.deepcopy(model).to(cuda)
    want = plain(x)
    assert rnnfast.accelerate(model) is model
    model.to(cuda)
    kinds: list[type] = [type(model.lstm), type(model.cell)]
    assert kinds == [rnnfast.LSTM, rnnfast.LSTMCell]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    storages = {p.untyped_storage().data_ptr() for p in parameters}
    assert len(storages) == len(parameters)
    got = model(x)
    assert rnnfast.last_run()["engine"] == "cuda"
    assert_near([got], [want], near)
    sizes = torch.tensor([3, 2, 2])
    packed = PackedSequence(x.reshape(-1, 7)[:7], sizes)
    assert_near([model(packed)], [plain(packed)], near)
    grads = torch.autograd.grad(got.square().sum(), parameters)
    theirs = torch.autograd.grad(want.square().sum(), list(plain.parameters()))
    assert_near(grads, theirs, 10 * near)
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g
    optimizer.step()
    changed = model(x)
    assert not torch.equal(changed, got)
    assert rnnfast.restore(model) is model
    assert type(model.lstm) is nn.LSTM and type(model.cell) is nn.LSTMCell
    assert_near([model(x)], [changed], near)
    rows = rnnfast.explain(rnnfast.accelerate(model), x).rows
    assert {row.engine for row in rows} == {"cuda"} and len(rows) == 7
