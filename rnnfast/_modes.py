"""Who looks on while a call runs: transforms, tangents, tracers. What torch's private names mean
stands here once; tests/test_private_torch.py says what they must mean.

Each is asked at every call, so what is C in torch is C here: names bound to it, not wrapped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: Whether transforms of torch.func are in force.
transforms_active = torch._C._are_functorch_transforms_active
#: Whether a tensor is batched by the vmap in force: it has no values that Python may read.
is_vmapped = torch._C._functorch.is_batchedtensor
# one of a batch of gradients (is_grads_batched), in the form that older torch gives it
_is_one_of_a_batch = torch._C._functorch.is_legacy_batchedtensor
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_is_grad_enabled = torch.is_grad_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_function_modes = torch._C._len_torch_function_stack
_is_profiled = torch._C._autograd._profiler_enabled


def is_transformed() -> bool:
    """Whether transforms of torch.func are in force, or tensors may carry tangents: whether more
    than autograd looks on."""
    return transforms_active() or forward_ad._current_level >= 0


def has_tangent(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward-mode AD has something to carry through them. (While a graph is traced
    nothing has: see :func:`refuse_tangents`.)"""
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def is_beyond_kernels(gradients: Iterable[Tensor | None]) -> bool:
    """Whether gradients that come in are a batch, under transforms or with tangents: no kernel
    takes them, only reference.py."""
    given = [g for g in gradients if g is not None]
    if transforms_active() or has_tangent(given):
        return True
    return not _is_compiling() and any(map(_is_one_of_a_batch, given))  # a graph has no batches


def is_traced() -> bool:
    """Whether somebody records operators, or looks at each (a dispatch mode)."""
    return bool(_is_compiling() or _dispatch_modes() or _tracing())


def is_eager(args: tuple[Any, ...]) -> bool:
    """Whether nobody records or overrides operators on these arguments, so that autograd's part of
    the dispatcher may be passed by."""
    return not (is_traced() or torch.overrides.has_torch_function(args))


def nothing_is_watching() -> bool:
    """Whether nobody differentiates, traces, casts, counts or overrides operators."""
    return not (
        _is_grad_enabled()
        or _is_any_autocast_enabled()
        or transforms_active()
        or forward_ad._current_level >= 0
        or _tracing() is not None
        or _dispatch_modes()
        or _function_modes()
        or _is_profiled()
    )


torch.library.define("rnnfast::refuse_tangents", "(Tensor x) -> Tensor")


@torch.library.impl("rnnfast::refuse_tangents", "default")
def _(x: Tensor) -> Tensor:
    raise RuntimeError(
        "rnnfast: a compiled layer was called within forward_ad.dual_level(), and can't carry "
        "tangents; call the layer itself, outside of torch.compile"
    )


torch.library.register_fake("rnnfast::refuse_tangents", torch.empty_like)
torch.library.register_autograd("rnnfast::refuse_tangents", lambda ctx, grad: grad)


def refuse_tangents(x: Tensor) -> Tensor:
    """x, for a graph that is traced within a dual level: running the graph raises.

    A graph's tensors have no tangents while it is traced. When it runs, some of torch's compilers
    lose them without a word; and torch.compile takes an error at tracing as a wish to go on without
    a graph. It compiles anew where the level is another, so other calls are left alone.
    """
    if forward_ad._current_level < 0 or not _is_compiling():
        return x
    refused: Tensor = torch.ops.rnnfast.refuse_tangents(x)
    return refused
