"""torch's private names that rnnfast uses: each must be there and mean what it did. Where one goes
or changes its meaning, this fails by name, before anything goes wrong in silence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).resolve().parents[1] / "rnnfast"
C: Any = torch._C
PRIVATE = re.compile(
    r"torch\._C\.[\w.]*\w|forward_ad\._\w+|torch\._dynamo\.[\w.]*\w|\b_compiled_call_impl|"
    r"\b_flat_weight_refs|\b_functorch\.(?:get_\w+|TransformType)"
)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def inside_vmap(look: Callable[[Tensor], Any]) -> Any:
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(look(x))
        return x

    vmap(f)(torch.ones(2, 3))
    return seen[0]


def below_autograd() -> None:
    x = torch.ones(2, requires_grad=True)
    with C._AutoDispatchBelowAutograd():
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def transforms_active() -> None:
    assert not C._are_functorch_transforms_active()
    assert inside_vmap(lambda x: C._are_functorch_transforms_active())


def dispatch_stack() -> None:
    assert C._len_torch_dispatch_stack() == 0
    with Mode():
        assert C._len_torch_dispatch_stack() == 1


def function_stack() -> None:
    assert C._len_torch_function_stack() == 0
    with torch.overrides.BaseTorchFunctionMode():
        assert C._len_torch_function_stack() == 1


def tracing_state() -> None:
    assert C._get_tracing_state() is None
    seen: list[Any] = []

    def f(x: Tensor) -> Tensor:
        seen.append(C._get_tracing_state())
        return x * 2

    torch.jit.trace(f, torch.ones(2), check_trace=False)
    assert seen[0] is not None


def any_autocast() -> None:
    assert not C._is_any_autocast_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert C._is_any_autocast_enabled()


def profiler() -> None:
    assert not C._autograd._profiler_enabled()
    with torch.autograd.profiler.profile():
        assert C._autograd._profiler_enabled()


def batched_tensor() -> None:
    assert not C._functorch.is_batchedtensor(torch.ones(2))
    assert inside_vmap(C._functorch.is_batchedtensor)


def legacy_batched_tensor() -> None:
    """What is_grads_batched hands to a backward pass, in one form or the other."""
    seen: list[bool] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, d: Tensor) -> Tensor:
            seen.append(
                C._functorch.is_legacy_batchedtensor(d) or C._are_functorch_transforms_active()
            )
            return d

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Look.apply(x), x, torch.eye(2), is_grads_batched=True)
    torch.autograd.grad(Look.apply(x), x, torch.ones(2))
    assert seen == [True, False]


def storage_uses() -> None:
    storage = torch.ones(4).untyped_storage()
    before = C._storage_Use_Count(storage._cdata)
    view = torch.empty(0).set_(storage)
    assert C._storage_Use_Count(storage._cdata) == before + 1
    del view


def dual_level() -> None:
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0
    assert forward_ad._current_level == -1


def optimized_module() -> None:
    compiled = torch.compile(nn.Linear(1, 1), backend="eager")
    assert type(compiled) is torch._dynamo.eval_frame.OptimizedModule


def compiled_call() -> None:
    layer = nn.Linear(1, 1)
    assert layer._compiled_call_impl is None
    layer.compile(backend="eager")
    assert layer._compiled_call_impl is not None


def flat_weight_refs() -> None:
    assert len(nn.LSTM(1, 1)._flat_weight_refs) == 4


def interpreters() -> None:
    assert C._functorch.get_interpreter_stack() is None
    kinds: list[Any] = []

    def f(x: Tensor) -> Tensor:
        kinds.extend(one.key() for one in C._functorch.get_interpreter_stack())
        return x.sum()

    vmap(grad(f))(torch.ones(2, 3))
    assert kinds == [C._functorch.TransformType.Vmap, C._functorch.TransformType.Grad]


CHECKS: dict[str, Callable[[], None]] = {
    "torch._C._AutoDispatchBelowAutograd": below_autograd,
    "torch._C._are_functorch_transforms_active": transforms_active,
    "torch._C._len_torch_dispatch_stack": dispatch_stack,
    "torch._C._len_torch_function_stack": function_stack,
    "torch._C._get_tracing_state": tracing_state,
    "torch._C._is_any_autocast_enabled": any_autocast,
    "torch._C._autograd._profiler_enabled": profiler,
    "torch._C._functorch.is_batchedtensor": batched_tensor,
    "torch._C._functorch.is_legacy_batchedtensor": legacy_batched_tensor,
    "torch._C._functorch": interpreters,
    "_functorch.get_interpreter_stack": interpreters,
    "_functorch.TransformType": interpreters,
    "torch._C._storage_Use_Count": storage_uses,
    "forward_ad._current_level": dual_level,
    "torch._dynamo.eval_frame": optimized_module,
    "_compiled_call_impl": compiled_call,
    "_flat_weight_refs": flat_weight_refs,
}


@pytest.mark.parametrize("check", list(dict.fromkeys(CHECKS.values())), ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_means_what_it_did(check: Callable[[], None]) -> None:
    check()


def test_every_private_name_has_a_check() -> None:
    used = {
        name for file in PACKAGE.glob("*.py") for name in PRIVATE.findall(file.read_text("utf-8"))
    }
    assert used == set(CHECKS)
