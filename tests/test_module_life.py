"""What happens to a module between its calls: copies, files, moves, weights that others make."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
import works
from test_modules import leaves_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rnnfast

SECTION = "Module life"
KINDS: dict[str, dict[str, Any]] = {
    "LSTM": {"num_layers": 2, "bidirectional": True},
    "GRU": {"num_layers": 2},
    "RNN": {"nonlinearity": "relu"},
}
CHECKS: dict[str, works.Check] = {}
CPU = torch.device("cpu")


def life(feature: str, **options: Any) -> Callable[[works.Check], Any]:
    """A row, whose check accelerated layers have to pass, too."""

    def decorate(check: works.Check) -> Any:
        CHECKS[check.__name__] = check
        return works.row(SECTION, feature, **options)(check)

    return decorate


def layers(library: Any, device: Any) -> list[nn.Module]:
    torch.manual_seed(1)
    return [getattr(library, kind)(9, 9, device=device, **o) for kind, o in KINDS.items()]


def sequence(device: Any = CPU, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(4, 3, 9, device=device, dtype=dtype)


def run(layer: nn.Module, x: Tensor) -> list[Tensor]:
    return [out.detach() for out in leaves_of(layer(x))]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def train(layer: nn.Module, x: Tensor) -> None:
    """A step of SGD, so that a layer has been used in every way."""
    layer.zero_grad()
    layer(x)[0].square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1e-3).step()


def through_file(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@life("`copy.deepcopy`, `pickle`, `torch.save` of a layer that has been trained")
def test_copies(library: Any, device: torch.device) -> None:
    x = sequence(device)
    for layer in layers(library, device):
        train(layer, x)
        want = run(layer, x)
        for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file):
            twin = copied(layer)
            assert type(twin) is type(layer) and same(run(twin, x), want)
            train(twin, x)
            assert not same(run(twin, x), want) and same(run(layer, x), want)


@life("safetensors' `save_model` and `load_model`")
def test_safetensors(library: Any, device: torch.device) -> None:
    from safetensors.torch import load_file, load_model, save_model

    x = sequence(device)
    with tempfile.TemporaryDirectory() as folder:
        for layer in layers(library, device):
            train(layer, x)
            file = str(Path(folder) / "layer.safetensors")
            save_model(layer, file)
            assert sorted(load_file(file)) == sorted(layer.state_dict())
            twin = copy.deepcopy(layer)
            for p in twin.parameters():
                nn.init.zeros_(p)
            load_model(twin, file, device=str(device))
            assert same(run(twin, x), run(layer, x))


@life(
    "`nn.utils.skip_init`",
    torch_nn="raises: its signature hides `device`",
    error="Module must support a 'device' arg to skip initialization",
)
def test_skip_init(library: Any, device: torch.device) -> None:
    for kind, options in KINDS.items():
        layer = nn.utils.skip_init(getattr(library, kind), 9, 9, device=device, **options)
        layer.reset_parameters()
        assert layer(sequence(device))[0].isfinite().all()


@life('`device="meta"`, shapes without numbers, then `to_empty` and `reset_parameters`')
def test_meta_and_to_empty(library: Any, device: torch.device) -> None:
    x = sequence(device)
    for layer, real in zip(layers(library, "meta"), layers(library, device), strict=True):
        for ours, theirs in zip(run(layer, x.to("meta")), run(real, x), strict=True):
            assert ours.is_meta and ours.shape == theirs.shape
        layer.to_empty(device=device)
        torch.manual_seed(1)
        layer.reset_parameters()
        other = type(real)(9, 9, device=device, **KINDS[type(real).__name__])
        torch.manual_seed(1)
        other.reset_parameters()
        assert same(run(layer, x), run(other, x))
        train(layer, x)


PARAMETRIZATIONS: dict[str, Callable[..., Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


def parametrized(library: Any, device: Any, how: str) -> list[nn.Module]:
    made = layers(library, device)
    for layer in made:
        for name in ("weight_ih_l0", "weight_hh_l0"):
            PARAMETRIZATIONS[how](layer, name)
    return made


@life("parametrizations: `weight_norm`, `spectral_norm`, `orthogonal`; trained and removed")
def test_parametrizations(library: Any, device: torch.device) -> None:
    x = sequence(device)
    for how in PARAMETRIZATIONS:
        for layer in parametrized(library, device, how):
            before = run(layer, x)
            for _ in range(2):
                train(layer, x)
                assert all(p.grad is not None for p in layer.parameters())
            assert not same(run(layer, x), before)
            if how == "orthogonal":
                q = layer.weight_hh_l0
                torch.testing.assert_close(q.T @ q, torch.eye(9, device=device))
            layer.eval()
            want = run(layer, x)
            parametrize.remove_parametrizations(layer, "weight_ih_l0")
            parametrize.remove_parametrizations(layer, "weight_hh_l0")
            assert "weight_hh_l0" in dict(layer.named_parameters())
            for ours, theirs in zip(run(layer, x), want, strict=True):
                torch.testing.assert_close(ours, theirs)


@life(
    "`copy.deepcopy` of a parametrized layer, moved before",
    torch_nn="raises: it keeps the computed weight in a list",
    error="Only Tensors created explicitly by the user",
)
def test_copy_of_a_parametrized_layer(library: Any, device: torch.device) -> None:
    x = sequence(device, torch.float64)
    for how in PARAMETRIZATIONS:
        for layer in parametrized(library, device, how):
            layer.double().eval()
            twin = copy.deepcopy(layer)
            assert same(run(twin, x), run(layer, x))
            train(twin.train(), x)
            assert not same(run(twin.eval(), x), run(layer, x))


@life("pruning: `l1_unstructured`, `random_structured`, trained, then `remove`")
def test_pruning(library: Any, device: torch.device) -> None:
    x = sequence(device)
    for layer in layers(library, device):
        plain = copy.deepcopy(layer)
        prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)
        prune.random_structured(layer, "weight_ih_l0", amount=3, dim=1)
        with torch.no_grad():
            plain.weight_hh_l0.copy_(layer.weight_hh_l0)
            plain.weight_ih_l0.copy_(layer.weight_ih_l0)
        assert int((plain.weight_ih_l0 == 0).all(0).sum()) == 3
        assert same(run(layer, x), run(plain, x))
        train(layer, x)
        gone = layer.weight_hh_l0_mask == 0
        assert gone.any() and not layer.weight_hh_l0_orig.grad[gone].any()
        want = run(layer, x)
        for name in ("weight_hh_l0", "weight_ih_l0"):
            prune.remove(layer, name)
        assert same(run(layer, x), want) and not layer.weight_hh_l0[gone].any()
        assert all(p.is_leaf for p in layer.parameters())


@life("tied weights, inside a layer and between two: gradients are sums, copies stay tied")
def test_tied_weights(library: Any, device: torch.device) -> None:
    x = sequence(device)
    one, other = (layer for _ in range(2) for layer in layers(library, device)[1:2])
    one.weight_hh_l1 = one.weight_hh_l0
    other.weight_hh_l0 = one.weight_hh_l0
    model = nn.ModuleList([one, other])
    assert len(list(model.parameters())) == 16 - 2
    untied = copy.deepcopy(model)
    assert untied[0].weight_hh_l1 is untied[0].weight_hh_l0 is untied[1].weight_hh_l0
    owners = [(untied[0], "weight_hh_l0"), (untied[0], "weight_hh_l1"), (untied[1], "weight_hh_l0")]
    for layer, name in owners:
        setattr(layer, name, nn.Parameter(one.weight_hh_l0.detach().clone()))
    for both in (model, untied):
        both[1](both[0](x)[0])[0].square().sum().backward()
    parts = sum(getattr(layer, name).grad for layer, name in owners)
    torch.testing.assert_close(one.weight_hh_l0.grad, parts)
    want = run(one, x)
    nn.init.zeros_(other.weight_hh_l0)
    assert not same(run(one, x), want)


@life("`load_state_dict(assign=True)`, from the meta device too")
def test_assign(library: Any, device: torch.device) -> None:
    x = sequence(device)
    for source, target in zip(layers(library, device), layers(library, "meta"), strict=True):
        state = {name: w.clone() for name, w in source.state_dict().items()}
        target.load_state_dict(state, assign=True)
        assert all(p.data_ptr() == state[n].data_ptr() for n, p in target.named_parameters())
        assert same(run(target, x), run(source, x))
        train(target, x)


def swapped(work: Callable[[], Any]) -> Any:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return work()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@life("`.to(dtype)` under `swap_module_params_on_conversion`: the same Parameter objects")
def test_swapped_conversion(library: Any, device: torch.device) -> None:
    for layer in layers(library, device):
        before = list(map(id, layer.parameters()))
        swapped(layer.double)
        assert list(map(id, layer.parameters())) == before
        train(layer, sequence(device, torch.float64))


@life(
    "`load_state_dict` under `swap_module_params_on_conversion`",
    torch_nn="raises: it holds weak references to its weights",
    error="Cannot swap t1 because it has weakref associated with it",
)
def test_swapped_loading(library: Any, device: torch.device) -> None:
    x = sequence(device)
    for layer, source in zip(layers(library, device), layers(library, device), strict=True):
        train(source, x)
        before = list(map(id, layer.parameters()))
        swapped(lambda layer=layer, source=source: layer.load_state_dict(source.state_dict()))
        assert list(map(id, layer.parameters())) == before
        assert same(run(layer, x), run(source, x))
        train(layer, x)


@life("`.to(dtype)`, `.to(device)`, `.double()`, `.bfloat16()`, and an optimizer that goes on")
def test_moves(library: Any, device: torch.device) -> None:
    for layer in layers(library, device):
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            layer.to(dtype=dtype)
            x = sequence(device, dtype)
            before = run(layer, x)
            assert all(out.dtype == dtype for out in before)
            optimizer.zero_grad()
            layer(x)[0].square().sum().backward()
            optimizer.step()
            assert not same(run(layer, x), before)
        layer.to("cpu")
        assert layer(sequence())[0].device == CPU


def watch(layer: nn.Module) -> list[Any]:
    """Hooks of every kind, and what they saw."""
    seen: list[Any] = []
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    layer.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(sorted(kwargs)), with_kwargs=True
    )
    layer.register_full_backward_pre_hook(lambda _, grads: seen.append(len(grads)))
    layer.register_full_backward_hook(lambda _, into, grads: seen.append(into[0].shape))
    layer.register_state_dict_post_hook(lambda _, state, *rest: state.update(more=1))
    return seen


@life("hooks: before and after forward, with keywords, full backward, of the `state_dict`")
def test_hooks(library: Any, device: torch.device) -> None:
    for layer in layers(library, device):
        x = sequence(device).requires_grad_()
        doubled = run(layer, x * 2)
        seen = watch(layer)
        state = torch.zeros(layer.num_layers * (2 if layer.bidirectional else 1), 3, 9).to(device)
        outs = leaves_of(layer(x, hx=(state, state) if layer.mode == "LSTM" else state))
        assert same([out.detach() for out in outs], doubled)
        sum(out.sum() for out in outs).backward()
        assert seen == [["hx"], 2, x.shape]  # grads of output and state, a pair of the LSTM's
        assert "more" in layer.state_dict()
        assert same(run(copy.deepcopy(layer), x), doubled)


@life("`share_memory`: another process trains the weights (Hogwild)", cuda=False)
def test_share_memory(library: Any, device: torch.device) -> None:
    layer = layers(library, device)[0].share_memory()
    assert all(p.is_shared() for p in layer.parameters())
    before = run(layer, sequence())
    two_processes.run(train_in_rank_1, layer)
    assert not same(run(layer, sequence()), before)


def train_in_rank_1(rank: int, layer: nn.Module) -> None:
    if rank == 1:
        train(layer, sequence())


@life("`torch.func.functional_call`, with tied weights and with some of the weights")
def test_functional_call(library: Any, device: torch.device) -> None:
    x = sequence(device)
    for layer in layers(library, device):
        before = run(layer, x)
        weights = {n: torch.zeros_like(p, requires_grad=True) for n, p in layer.named_parameters()}
        out = torch.func.functional_call(layer, weights, (x,))
        assert not leaves_of(out)[0].any()
        leaves_of(out)[0].sum().backward()
        assert weights["bias_ih_l0"].grad is not None and layer.bias_ih_l0.grad is None
        some = {"bias_ih_l0": layer.bias_ih_l0.detach() + 1}
        assert not same(leaves_of(torch.func.functional_call(layer, some, x)), before)
        assert same(run(layer, x), before)
    tied = layers(library, device)[1]
    tied.weight_hh_l1 = tied.weight_hh_l0
    zeros = {"weight_hh_l0": torch.zeros_like(tied.weight_hh_l0)}
    got = torch.func.functional_call(tied, zeros, (x,), tie_weights=True)
    nn.init.zeros_(tied.weight_hh_l0)
    assert same(leaves_of(got), run(tied, x))


@life("names and order of `named_parameters`: checkpoints and optimizers of torch.nn fit")
def test_order_of_parameters(library: Any, device: torch.device) -> None:
    options: Any = {"num_layers": 2, "bidirectional": True, "proj_size": 4, "device": device}
    layer = library.LSTM(5, 9, **options)
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    ends = ("l0", "l0_reverse", "l1", "l1_reverse")
    want = [f"{part}_{end}" for end in ends for part in parts]
    assert [name for name, _ in layer.named_parameters()] == want == list(layer.state_dict())
    assert [p for some in layer.all_weights for p in some] == list(layer.parameters())
    other = nn.LSTM(5, 9, **options)
    layer(torch.randn(4, 3, 5, device=device))[0].sum().backward()
    steps = torch.optim.Adam(layer.parameters())
    steps.step()
    torch.optim.Adam(other.parameters()).load_state_dict(steps.state_dict())


@life("`AveragedModel` (SWA, EMA)")
def test_averaged_model(library: Any, device: torch.device) -> None:
    x = sequence(device)
    for layer in layers(library, device):
        average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        first = [p.detach().clone() for p in layer.parameters()]
        for _ in range(2):
            train(layer, x)
            average.update_parameters(layer)
        assert not same(run(average, x), run(layer, x))
        late = list(average.module.parameters())
        assert not any(torch.equal(a, b) for a, b in zip(first, late, strict=True))
        train(average.module, x)


@life(
    "dynamic quantization of a model's linear layers leaves the layer and its hooks alone",
    cuda=False,
)
def test_quantization_of_others(library: Any, device: torch.device) -> None:
    from torch.ao.quantization import quantize_dynamic

    seen: list[Any] = []
    model = nn.ModuleDict({"rnn": layers(library, device)[0], "head": nn.Linear(18, 3)})
    model["rnn"].register_forward_hook(lambda *_: seen.append(1))
    want = run(model["rnn"], sequence())
    with pytest.warns(DeprecationWarning):
        quantized = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(quantized["head"]) is not nn.Linear
    assert type(quantized["rnn"]) is type(model["rnn"])
    assert same(run(quantized["rnn"], sequence()), want) and len(seen) == 2


# --- more than a row -----------------------------------------------------------------------------


def accelerated(kind: str) -> Any:
    return lambda *args, **options: rnnfast.accelerate(getattr(nn, kind)(*args, **options))


# what asks for the class, not for a layer
OF_CLASSES = ("test_skip_init", "test_meta_and_to_empty")


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in OF_CLASSES])
def test_accelerated_layers(name: str) -> None:
    CHECKS[name](types.SimpleNamespace(**{kind: accelerated(kind) for kind in KINDS}), CPU)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_restored_layers_are_torchs_again(kind: str) -> None:
    """With the lists that torch.nn keeps, and of the weights of now."""
    layer, x = accelerated(kind)(9, 9, num_layers=2), sequence()
    layer.weight_hh_l0 = nn.Parameter(torch.zeros_like(layer.weight_hh_l0))
    want = run(layer, x)
    rnnfast.restore(layer)
    assert set(vars(layer)) == set(vars(getattr(nn, kind)(9, 9, num_layers=2)))
    assert layer._flat_weights == list(layer.parameters())
    for ours, theirs in zip(run(layer, x), want, strict=True):
        torch.testing.assert_close(ours, theirs)
    train(layer, x)
    copy.deepcopy(layer)


def test_private_names_of_torch() -> None:
    """What _layer.py overrides of torch.nn.RNNBase; without it there would be two lists again."""
    for name in ("_init_flat_weights", "_update_flat_weights", "_replicate_for_data_parallel"):
        assert name in vars(nn.RNNBase), name
    theirs = vars(nn.LSTM(5, 9))
    assert {"_flat_weights", "_flat_weight_refs", "_flat_weights_names"} <= set(theirs)
    layer = rnnfast.LSTM(5, 9)
    assert "_flat_weights" not in vars(layer) and layer._flat_weight_refs == []
    assert "_flat_weights" not in vars(rnnfast.accelerate(nn.LSTM(5, 9)))
    assert [p is w for p, w in zip(layer.parameters(), layer._flat_weights, strict=True)]
    with pytest.raises(AttributeError):  # torch.nn would compute with them, so it must not pass
        layer._flat_weights = [torch.zeros(1)] * 4


def test_weights_deleted_and_made_anew() -> None:
    """As old-style hooks do: a plain tensor in place of the parameter, anew before each call."""
    layer, x = rnnfast.GRU(9, 9), sequence()
    raw = layer.weight_hh_l0
    del layer.weight_hh_l0
    layer.weight_hh_l0_raw = raw
    layer.register_forward_pre_hook(lambda m, _: setattr(m, "weight_hh_l0", m.weight_hh_l0_raw * 2))
    layer(x)[0].sum().backward()
    assert raw.grad is not None and raw.grad.any()
    other = rnnfast.GRU(9, 9)
    other.load_state_dict({n.removesuffix("_raw"): w for n, w in layer.state_dict().items()})
    other.weight_hh_l0.data.mul_(2)
    assert same(run(layer, x), run(other, x))


def test_replicas_of_data_parallel() -> None:
    """torch.nn.DataParallel's copies have tensors where the layer has parameters."""
    for layer in layers(rnnfast, CPU):
        replica = layer._replicate_for_data_parallel()
        for name, p in layer.named_parameters():
            setattr(replica, name, p * 1)
        want = run(layer, sequence())
        out = replica(sequence())
        assert same([leaf.detach() for leaf in leaves_of(out)], want)
        leaves_of(out)[0].sum().backward()
        assert layer.weight_hh_l0.grad is not None


def test_a_frozen_layer_notices_a_swapped_load() -> None:
    layer = rnnfast.LSTM(9, 9).freeze()
    swapped(lambda: layer.load_state_dict(rnnfast.LSTM(9, 9).state_dict()))
    with torch.no_grad(), pytest.raises(RuntimeError, match="was (changed|replaced) since freeze"):
        layer(sequence())


def test_a_pruned_layer_is_copied_as_any_other() -> None:
    """prune leaves a computed tensor in the module, of whatever class; without grad it copies."""
    for module in (rnnfast.GRU(9, 9), nn.Linear(9, 9)):
        name = "weight" if isinstance(module, nn.Linear) else "weight_hh_l0"
        prune.l1_unstructured(module, name, amount=0.5)
        with pytest.raises(RuntimeError, match="explicitly by the user"):
            copy.deepcopy(module)
        with torch.no_grad():
            module(sequence())
        copy.deepcopy(module)
