"""Derivatives of every kind, each a row of docs/works.md."""

from __future__ import annotations

import copy
from typing import Any

import torch
import works
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

f64 = torch.float64
SECTION = "Derivatives"
NO_RULE = works.every_kind("Batching rule not implemented|BatchedTensor|vmap")


def layers(library: Any, device: torch.device) -> list[Any]:
    torch.manual_seed(0)
    return [getattr(library, kind)(3, 4, device=device, dtype=f64) for kind in works.kinds(library)]


def numbers(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device, dtype=f64)


def parameters(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in layer.named_parameters()}


def near(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def numeric(f: Any, x: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """A directional derivative by differences."""
    difference: Tensor = (f(x + eps * v) - f(x - eps * v)) / (2 * eps)
    return difference


# --------------------------------------------------------------------------- rows


@works.row(SECTION, "first and second derivatives (gradcheck, gradgradcheck)")
def test_double_backward(library: Any, device: torch.device) -> None:
    for layer in layers(library, device):
        x = numbers(3, 2, 3, device=device).requires_grad_()

        def f(x: Tensor, *_: Tensor, layer: Any = layer) -> Tensor:
            return layer(x)[0]

        # small slices of the parameters would not be enough: all of them
        inputs = (x, *layer.parameters())
        assert gradcheck(f, inputs, fast_mode=True)
        assert gradgradcheck(f, inputs, fast_mode=True)


@works.row(SECTION, "a gradient penalty: the gradient's norm in the loss")
def test_gradient_penalty(library: Any, device: torch.device) -> None:
    for layer in layers(library, device):
        x = numbers(4, 2, 3, device=device).requires_grad_()

        def loss(x: Tensor, layer: Any = layer) -> Tensor:
            score = layer(x)[0][-1].sum()
            (g,) = torch.autograd.grad(score, x, create_graph=True)
            return (g.norm(2, -1) - 1).square().mean()

        penalty = loss(x)
        weights = list(layer.parameters())
        # the last bias adds to no gate's slope alone where a cell is linear in it: may be unused
        found = torch.autograd.grad(penalty, [x, *weights], allow_unused=True)
        v = numbers(4, 2, 3, device=device)
        want = numeric(lambda x: loss(x.detach().requires_grad_()).detach(), x.detach(), v)
        torch.testing.assert_close((found[0] * v).sum(), want, rtol=1e-5, atol=1e-8)


@works.row(SECTION, "backward in eval mode")
def test_eval_backward(library: Any, device: torch.device) -> None:
    for layer in layers(library, device):
        x = numbers(3, 2, 3, device=device).requires_grad_()
        layer.eval()(x)[0].sum().backward()
        assert x.grad is not None and x.grad.abs().max() > 0


@works.row(SECTION, "`torch.func.grad`, `vjp`")
def test_func_grad(library: Any, device: torch.device) -> None:
    for layer in layers(library, device):
        x = numbers(3, 2, 3, device=device)

        def loss(p: Any, layer: Any = layer, x: Tensor = x) -> Tensor:
            return functional_call(layer, p, (x,))[0].square().sum()

        found = grad(loss)(parameters(layer))
        layer(x)[0].square().sum().backward()
        near(found, {name: p.grad for name, p in layer.named_parameters()})
        y, back = vjp(lambda x, layer=layer: layer(x)[0], x)
        z = x.clone().requires_grad_()
        near(back(y)[0], torch.autograd.grad(layer(z)[0], z, y)[0])


@works.row(
    SECTION,
    "`vmap` over inputs",
    torch_nn="no batching rule",
    error=NO_RULE,
)
def test_vmap_inputs(library: Any, device: torch.device) -> None:
    for layer in layers(library, device):
        x = numbers(5, 3, 2, 3, device=device)
        near(
            vmap(lambda one, layer=layer: layer(one)[0])(x),
            torch.stack([layer(one)[0] for one in x]),
        )


@works.row(
    SECTION,
    "`vmap` over weights (ensembles: `stack_module_state`)",
    torch_nn="no batching rule",
    error=NO_RULE,
)
def test_vmap_weights(library: Any, device: torch.device) -> None:
    for kind in range(len(works.kinds(library))):
        models = [layers(library, device)[kind] for _ in range(3)]
        for model in models:
            model.reset_parameters()
        stacked, _ = stack_module_state(models)
        x = numbers(3, 2, 3, device=device)

        def one(p: Any, x: Tensor, model: Any = models[0]) -> Tensor:
            return functional_call(model, p, (x,))[0]

        near(vmap(one, in_dims=(0, None))(stacked, x), torch.stack([m(x)[0] for m in models]))
        xs = numbers(3, 3, 2, 3, device=device)  # an input each, too
        near(vmap(one)(stacked, xs), torch.stack([m(x)[0] for m, x in zip(models, xs)]))


@works.row(
    SECTION,
    "per-sample gradients: `vmap(grad)` (float32)",
    torch_nn="LSTM yes, GRU and RNN fail",
    error=dict.fromkeys(("GRU", "RNN"), "RuntimeError: .*shape"),
)
def test_per_sample(library: Any, device: torch.device) -> None:
    for layer in layers(library, device):
        layer.float()
        xs = numbers(5, 3, 3, device=device).float()

        def loss(p: Any, one: Tensor, layer: Any = layer) -> Tensor:
            return functional_call(layer, p, (one,))[0].square().sum()

        found = vmap(grad(loss), in_dims=(None, 0))(parameters(layer), xs)
        for k, one in enumerate(xs):
            layer.zero_grad()
            layer(one)[0].square().sum().backward()
            close({name: g[k] for name, g in found.items()},
                 {name: p.grad for name, p in layer.named_parameters()})  # fmt: skip


@works.row(
    SECTION,
    "`jacrev`, batched cotangents (`is_grads_batched`)",
)
def test_jacrev(library: Any, device: torch.device) -> None:
    for layer in layers(library, device):
        x = numbers(2, 1, 3, device=device)
        want = torch.autograd.functional.jacobian(lambda one, layer=layer: layer(one)[0], x)
        near(jacrev(lambda one, layer=layer: layer(one)[0])(x), want)
        z = x.clone().requires_grad_()
        y = layer(z)[0]
        each = torch.eye(y.numel(), dtype=f64, device=device).view(-1, *y.shape)
        rows = torch.autograd.grad(y, z, each, is_grads_batched=True)[0]
        near(rows.view(*y.shape, *x.shape), want)


def tangent_wanted(layer: Any, x: Tensor, v: Tensor) -> Tensor:
    """By differences, in float64."""
    wide = copy.deepcopy(layer).double()
    return numeric(lambda x: wide(x)[0].detach(), x.double(), v.double()).float()


@works.row(
    SECTION,
    "forward mode: `jvp`, `jacfwd` (float32)",
    torch_nn="not for LSTM",
    error={"LSTM": "NotImplementedError"},
)
def test_jvp(library: Any, device: torch.device) -> None:
    for layer in layers(library, device):
        layer.float()
        x, v = (numbers(3, 2, 3, device=device).float() for _ in range(2))
        _, tangent = jvp(lambda x, layer=layer: layer(x)[0], (x,), (v,))
        torch.testing.assert_close(tangent, tangent_wanted(layer, x, v), rtol=1e-4, atol=1e-5)
        columns = jacfwd(lambda x, layer=layer: layer(x)[0])(x)
        torch.testing.assert_close((columns * v).flatten(3).sum(-1), tangent)


@works.row(
    SECTION,
    "forward mode: dual tensors (float32)",
    torch_nn="not for LSTM",
    error={"LSTM": "NotImplementedError"},
)
def test_dual_tensors(library: Any, device: torch.device) -> None:
    for layer in layers(library, device):
        layer.float()
        x, v = (numbers(3, 2, 3, device=device).float() for _ in range(2))
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))[0]).tangent
        assert tangent is not None
        torch.testing.assert_close(tangent, tangent_wanted(layer, x, v), rtol=1e-4, atol=1e-5)


@works.row(SECTION, "`hessian`, gradient of a gradient")
def test_hessian(library: Any, device: torch.device) -> None:
    for layer in layers(library, device):
        x = numbers(2, 1, 3, device=device)

        def loss(x: Tensor, layer: Any = layer) -> Tensor:
            return layer(x)[0].pow(3).sum()

        want = torch.autograd.functional.hessian(loss, x)
        near(hessian(loss)(x), want)
        near(jacrev(grad(loss))(x), want)
        v = numbers(2, 1, 3, device=device)
        along = grad(lambda x, loss=loss, v=v: (grad(loss)(x) * v).sum())
        near(along(x), (want * v).flatten(3).sum(-1))


@works.row(
    SECTION,
    "vmaps inside vmaps: `vmap(vmap(grad))` (float32)",
    torch_nn="LSTM yes, GRU and RNN fail",
    error=dict.fromkeys(("GRU", "RNN"), "RuntimeError: .*shape"),
)
def test_nested_vmap(library: Any, device: torch.device) -> None:
    for layer in layers(library, device):
        layer.float()
        xs = numbers(2, 3, 4, 3, device=device).float()

        def loss(p: Any, one: Tensor, layer: Any = layer) -> Tensor:
            return functional_call(layer, p, (one,))[0].square().sum()

        per = vmap(vmap(grad(loss), in_dims=(None, 0)), in_dims=(None, 0))
        found = per(parameters(layer), xs)
        single = grad(loss)
        want = single(parameters(layer), xs[1, 2])
        close({name: g[1, 2] for name, g in found.items()}, want)
