"""rnnfast.accelerate on models as they come: nested, tied, parametrized, pruned, wrapped."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import works
from torch import Tensor, nn
from torch.nn.utils import prune

import rnnfast


def outcome(model: nn.Module, x: Tensor, seed: int = 5) -> list[Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    y = model(x)
    y = y[0] if isinstance(y, tuple) else y
    y.square().sum().backward()
    # copies: the old weight_norm keeps the gradients of its own weights
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


class Deep(nn.Module):
    """Recurrent layers in lists and dicts, one in two places, one weight in two layers."""

    def __init__(self, device: Any = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"rnn": nn.GRU(8, 8, device=device), "norm": nn.LayerNorm(8)})
            for _ in range(2)
        )
        self.seq = nn.Sequential(
            nn.Linear(8, 8),
            nn.Sequential(
                nn.LSTM(8, 8),
            ),
        )
        self.again = self.blocks[0]["rnn"]
        self.blocks[1]["rnn"].weight_hh_l0 = self.again.weight_hh_l0
        self.to(device)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["norm"](block["rnn"](x)[0])
        return self.again(self.seq(x)[0])[0]


@works.row(
    "accelerate and patched",
    "`accelerate` of nested modules, a layer in two places, a weight in two layers, in the middle "
    "of training",
    torch_nn="has none",
    error="AttributeError.*accelerate",
)
def test_nested_and_tied(library: Any, device: torch.device) -> None:
    models = [Deep(device), Deep(device)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in models]
    for step in range(4):
        if step == 2:
            library.accelerate(models[1])
            assert models[1].again is models[1].blocks[0]["rnn"]
            first, second = (block["rnn"] for block in models[1].blocks)
            assert type(first) is library.GRU and first.weight_hh_l0 is second.weight_hh_l0
            assert type(models[1].seq[1][0]) is library.LSTM
        x = torch.randn(5, 3, 8, device=device)
        for a, b in zip(*(outcome(model, x) for model in models), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        for optimizer in optimizers:
            optimizer.step()


def old_weight_norm(layer: nn.Module) -> None:
    nn.utils.weight_norm(layer, "weight_hh_l0")


def old_spectral_norm(layer: nn.Module) -> None:
    nn.utils.spectral_norm(layer, "weight_ih_l0")


def pruned(layer: nn.Module) -> None:
    torch.manual_seed(0)
    prune.random_unstructured(layer, "weight_hh_l0", amount=0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", [old_weight_norm, old_spectral_norm, pruned])
@pytest.mark.parametrize("first", [True, False], ids=["changed first", "accelerated first"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_layers_whose_weights_a_hook_computes(kind: Any, first: bool, change: Any) -> None:
    """They keep their class and are swapped; the weights are those of each call."""
    plain = kind(5, 9)
    ours = copy.deepcopy(plain)
    if not first:
        rnnfast.accelerate(ours)
    for layer in (plain, ours):
        torch.manual_seed(1)
        change(layer)
    rnnfast.accelerate(ours)
    assert type(ours) is getattr(rnnfast, kind.__name__)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (plain, ours)]
    for _ in range(3):
        x = torch.randn(4, 3, 5)
        for a, b in zip(outcome(plain, x), outcome(ours, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
    rnnfast.restore(ours)
    for a, b in zip(outcome(plain, x), outcome(ours, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@works.row(
    "accelerate and patched",
    "parametrized layers (`weight_norm`, `orthogonal`): accelerate first, parametrize then; the "
    "other way round they are left alone, and the log says so",
    torch_nn="has none",
    error="AttributeError.*accelerate",
)
def test_parametrized(library: Any, device: torch.device) -> None:
    plain = nn.GRU(5, 9, device=device)
    late, early = copy.deepcopy(plain), library.accelerate(copy.deepcopy(plain))
    for layer in (plain, late, early):
        nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    kind = type(late)
    library.accelerate(late)
    assert type(late) is kind and isinstance(late, nn.GRU) and isinstance(early, library.GRU)
    x = torch.randn(4, 3, 5, device=device)
    for layer in (late, early):
        for a, b in zip(outcome(plain, x), outcome(layer, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # restore waits until the class is rnnfast's again
    library.restore(early)
    assert isinstance(early, library.GRU)
    nn.utils.parametrize.remove_parametrizations(early, "weight_hh_l0")
    assert type(library.restore(early)) is nn.GRU


def test_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"normed": nn.GRU(5, 9), "hooked": nn.LSTM(5, 9), "int": nn.RNN(5, 9)})
    nn.utils.parametrizations.orthogonal(model["normed"], "weight_hh_l0")
    model["hooked"].forward = lambda x: nn.LSTM.forward(model["hooked"], x)  # as a wrapper does it
    model["int"].to(torch.complex64)
    types = [type(m) for m in model.values()]
    with caplog.at_level(logging.INFO, logger="rnnfast"):
        rnnfast.accelerate(model)
    said = {r.getMessage().split()[1]: r.getMessage() for r in caplog.records}
    assert "parametrized (weight_hh_l0): accelerate first" in said["normed"]
    assert "a forward of its own was set on it" in said["hooked"]
    assert "complex64" in said["int"]
    assert [type(m) for m in model.values()] == types


@works.row(
    "accelerate and patched",
    "`accelerate` of a model without recurrent layers changes nothing at all",
    torch_nn="has none",
    error="AttributeError.*accelerate",
)
def test_an_idle_pass(library: Any, device: torch.device) -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.ModuleDict({"a": nn.Linear(3, 3)})).to(device)
    model.register_forward_hook(lambda *_: None)
    wrapped = [model, torch.compile(model)]

    def picture() -> list[Any]:
        return [
            (name, type(m), {k: id(v) for k, v in vars(m).items()}, list(vars(m)))
            for name, m in model.named_modules()
        ] + [(n, id(p), p.data_ptr(), p._version) for n, p in model.named_parameters()]

    before = picture()
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = records.append  # type: ignore[method-assign]
    log = logging.getLogger("rnnfast")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        for one in wrapped:
            assert library.accelerate(one) is one and library.restore(one) is one
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert picture() == before and not records


def test_meta_then_real() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.LSTM(5, 9, 2))
    assert type(rnnfast.accelerate(model)[0]) is rnnfast.LSTM
    plain = nn.Sequential(nn.LSTM(5, 9, 2))
    model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 5)
    for a, b in zip(outcome(plain, x), outcome(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert type(rnnfast.restore(model)[0]) is nn.LSTM
    assert torch.equal(model(x)[0], plain(x)[0])


def test_restore_takes_weights_that_were_replaced_meanwhile() -> None:
    """torch.nn keeps a list of its weights, which must not be the old one."""
    layer = rnnfast.accelerate(nn.GRU(5, 9))
    layer.weight_hh_l0 = nn.Parameter(torch.zeros(27, 9))
    x = torch.randn(4, 3, 5)
    want = layer(x)[0]
    torch.testing.assert_close(rnnfast.restore(layer)(x)[0], want, rtol=1e-5, atol=1e-6)


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[Any]:
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store"
    )
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def wrapped_by(how: str, model: nn.Module, mesh: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    if how == "DistributedDataParallel":
        return nn.parallel.DistributedDataParallel(model)
    if how == "FullyShardedDataParallel":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    if how == "fully_shard":
        return fully_shard(model, mesh=mesh)
    if how == "torch.compile":
        return torch.compile(model)
    model.compile()
    return model


HOW = [
    *("DistributedDataParallel", "FullyShardedDataParallel", "fully_shard"),
    *("torch.compile", "compile()"),
]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("inside", [False, True], ids=["whole", "a part"])
@pytest.mark.parametrize("bare", [False, True], ids=["model", "layer"])
@pytest.mark.parametrize("how", HOW)
def test_wrapped_models_are_refused(how: str, bare: bool, inside: bool, one_process: Any) -> None:
    """This also fails when a wrapper is no longer known by its name, or compile() by its mark."""
    model: Any = nn.LSTM(5, 9) if bare else nn.Sequential(nn.Linear(5, 5), nn.LSTM(5, 9))
    model = wrapped_by(how, model, one_process)
    if inside:
        model = nn.ModuleDict({"free": nn.GRU(5, 9), "part": model})
    types = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError) as raised:
        rnnfast.accelerate(model)
    where = "its module part" if inside else "the model"
    text = f"rnnfast: accelerate must come before {how}, and {where} went through that already"
    assert str(raised.value).startswith(text)
    assert [type(m) for m in model.modules()] == types, "all or nothing"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", HOW)
def test_accelerated_first_and_wrapped_then(how: str, one_process: Any) -> None:
    torch._dynamo.reset()
    model = rnnfast.accelerate(nn.Sequential(nn.Linear(5, 5), nn.GRU(5, 9)))
    plain = rnnfast.restore(copy.deepcopy(model))
    x = torch.randn(4, 3, 5)
    want = outcome(plain, x)[0]
    wrapped = wrapped_by(how, model, one_process)
    y = wrapped(x)[0]
    torch.testing.assert_close(y.detach(), want, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    assert rnnfast.accelerate(wrapped) is wrapped  # nothing is left to swap


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_models_are_refused() -> None:
    for model in (nn.Sequential(nn.LSTM(5, 9)), nn.GRUCell(5, 9)):
        with pytest.raises(RuntimeError, match="rnnfast: .* got a torch.jit.ScriptModule"):
            rnnfast.accelerate(torch.jit.script(model))
    scripted = torch.jit.script(nn.Sequential(nn.Linear(5, 9)))
    assert rnnfast.accelerate(scripted) is scripted
