"""What training loops do around a layer: checkpointing, accumulation, autocast, optimizers.

On several processes: test_distributed.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import works
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rnnfast

SECTION = "Training at scale"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {"bidirectional": True}),
    "LSTM proj": ("LSTM", {"proj_size": 4}),
    "GRU": ("GRU", {"batch_first": True}),
    "RNN": ("RNN", {"nonlinearity": "tanh", "bias": False}),
}
OPTIMIZERS: dict[str, Any] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "Adam": (torch.optim.Adam, {}),
    "AdamW": (torch.optim.AdamW, {"amsgrad": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
}


def make(library: Any, kind: str, device: Any = "cpu", dropout: float = 0.0) -> nn.Module:
    name, options = KINDS[kind]
    torch.manual_seed(1)
    return getattr(library, name)(5, 9, 2, dropout=dropout, device=device, **options)


def sequence(device: Any = "cpu") -> Tensor:
    torch.manual_seed(2)
    return torch.randn(7, 4, 5, device=device)


def loss_of(layer: nn.Module, x: Tensor) -> Tensor:
    y, state = layer(x)
    return y.square().mean() + sum(h.mean() for h in (state if type(state) is tuple else (state,)))


def gradients(module: nn.Module) -> list[Tensor]:
    found = [p.grad for p in module.parameters()]
    assert all(g is not None for g in found)
    return [g.clone() for g in found]  # type: ignore[union-attr]


def checkpointed(library: Any, device: torch.device, kind: str, **options: Any) -> None:
    """The same bits as without, dropout's masks among them."""
    layer, x = make(library, kind, device, dropout=0.5), sequence(device).requires_grad_()
    torch.manual_seed(3)
    loss_of(layer, x).backward()
    want = [x.grad, *gradients(layer)]
    layer.zero_grad()
    x.grad = None
    torch.manual_seed(3)
    loss = checkpoint(loss_of, layer, x, **options)
    torch.manual_seed(4)  # recomputing must bring back the state of forward's draw
    loss.backward()
    for ours, theirs in zip([x.grad, *gradients(layer)], want, strict=True):
        assert torch.equal(ours, theirs)


@works.row(SECTION, "activation checkpointing (reentrant or not) with dropout: the same bits")
def test_checkpoint(library: Any, device: torch.device) -> None:
    checkpointed(library, device, "LSTM", use_reentrant=False)
    checkpointed(library, device, "LSTM", use_reentrant=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_of_every_kind(kind: str, use_reentrant: bool) -> None:
    checkpointed(rnnfast, torch.device("cpu"), kind, use_reentrant=use_reentrant)


def test_checkpoint_notices_what_differs() -> None:
    """torch compares what was kept and what was recomputed: shapes of our tensors, too."""
    layer, x = make(rnnfast, "LSTM"), sequence()
    lengths = iter((7, 5))
    loss = checkpoint(lambda x: loss_of(layer, x[: next(lengths)]), x, use_reentrant=False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different metadata"):
        loss.backward()


@works.row(SECTION, "gradient accumulation: parts of a batch give the gradients of the whole")
def test_accumulation(library: Any, device: torch.device) -> None:
    layer, x = make(library, "LSTM", device), sequence(device)
    loss_of(layer, x).backward()
    want = gradients(layer)
    layer.zero_grad(set_to_none=False)
    before = [p.grad for p in layer.parameters()]
    for part in x.split(1, dim=1):
        (loss_of(layer, part) / 4).backward()
    for p, ours, theirs in zip(layer.parameters(), before, want, strict=True):
        assert p.grad is ours  # added in place, as optimizers with views of gradients need
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@works.row(SECTION, "autocast with `GradScaler`, a step with infinite gradients skipped")
def test_autocast_and_scaler(library: Any, device: torch.device) -> None:
    layer, x = make(library, "LSTM", device), sequence(device)
    if library is nn and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # oneDNN refuses torch.nn's LSTM in bfloat16 on this processor
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="primitive"):
            layer(x)
        return
    exact = copy.deepcopy(layer)
    loss_of(exact, x).backward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    for bad in (False, True):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            y, _ = layer(x)
            assert y.dtype == dtype
            loss = loss_of(layer, x)
        scaler.scale(loss * float("inf") if bad else loss).backward()
        scaler.unscale_(optimizer)
        if not bad:
            for ours, theirs in zip(gradients(layer), gradients(exact), strict=True):
                assert ours.dtype == torch.float32
                assert (ours - theirs).norm() < 0.05 * theirs.norm()
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        before = [p.detach().clone() for p in layer.parameters()]
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True)]
        assert all(same) if bad else not any(same)
    assert scaler.get_scale() == 2.0**9


def stepped(layer: nn.Module, x: Tensor, optimizer: str, **way: Any) -> list[Tensor]:
    """The weights after three clipped steps."""
    layer = copy.deepcopy(layer)
    kind, options = OPTIMIZERS[optimizer]
    steps = kind(layer.parameters(), lr=1e-2, **options, **way)
    for _ in range(3):
        steps.zero_grad()
        loss_of(layer, x).backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 0.1, foreach=way.get("foreach"))
        steps.step()
    return [p.detach() for p in layer.parameters()]


@works.row(SECTION, "`Adam`, `AdamW`, `SGD`, `Adagrad` with `fused=True` and `foreach=True`")
def test_fused_and_foreach_optimizers(library: Any, device: torch.device) -> None:
    layer, x = make(library, "LSTM", device), sequence(device)
    for optimizer in OPTIMIZERS:
        want = stepped(layer, x, optimizer, foreach=False)
        for way in ({"fused": True}, {"foreach": True}):
            if optimizer == "Adagrad" and "fused" in way and device.type != "cpu":
                continue  # torch has no such kernel
            for ours, theirs in zip(stepped(layer, x, optimizer, **way), want, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@works.row(SECTION, "`clip_grad_norm_(foreach=True)`, `clip_grad_value_`, `get_total_norm`")
def test_clipping(library: Any, device: torch.device) -> None:
    layer, x = make(library, "LSTM", device), sequence(device)
    loss_of(layer, x).backward()
    want = torch.cat([g.flatten() for g in gradients(layer)]).norm()
    found = gradients(layer)
    torch.testing.assert_close(nn.utils.get_total_norm(found, foreach=True), want)
    norm = nn.utils.clip_grad_norm_(layer.parameters(), float(want) / 2, foreach=True)
    torch.testing.assert_close(norm, want)
    for ours, theirs in zip(gradients(layer), found, strict=True):
        torch.testing.assert_close(ours, theirs / 2, rtol=1e-4, atol=1e-7)
    nn.utils.clip_grad_value_(layer.parameters(), 1e-4, foreach=True)
    assert max(float(g.abs().max()) for g in gradients(layer)) <= 1.001e-4


@works.row(SECTION, "an optimizer's step inside backward (`register_post_accumulate_grad_hook`)")
def test_step_in_backward(library: Any, device: torch.device) -> None:
    layer, x = make(library, "LSTM", device), sequence(device)
    twin = copy.deepcopy(layer)
    loss_of(twin, x).backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in layer.parameters()}

    def step(p: Tensor) -> None:
        optimizers.pop(p).step()  # once each
        p.grad = None

    for p in layer.parameters():
        p.register_post_accumulate_grad_hook(step)
    loss_of(layer, x).backward()
    assert not optimizers
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@works.row(SECTION, "a second backward with `retain_graph`, and saved tensors kept on the CPU")
def test_saved_tensors(library: Any, device: torch.device) -> None:
    layer, x = make(library, "LSTM", device), sequence(device)
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(layer, x)
    loss.backward(retain_graph=True)
    want = gradients(layer)
    layer.zero_grad()
    loss.backward()
    for ours, theirs in zip(gradients(layer), want, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_are_those_of_torch(kind: str, optimizer: str) -> None:
    theirs, x = make(nn, kind), sequence()
    ours = make(rnnfast, kind)
    ours.load_state_dict(theirs.state_dict())
    swapped = rnnfast.accelerate(copy.deepcopy(theirs))
    want = stepped(theirs, x, optimizer)
    for layer in (ours, swapped):
        for way in ({}, {"fused": True}, {"foreach": True}):
            for a, b in zip(stepped(layer, x, optimizer, **way), want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_lbfgs_evaluates_as_often_as_it_likes() -> None:
    losses = []
    for library in (rnnfast, nn):
        layer, x = make(library, "GRU"), sequence()
        optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.1, max_iter=4)

        def closure(layer: nn.Module = layer, x: Tensor = x, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            loss = loss_of(layer, x)
            loss.backward()
            return loss

        optimizer.step(closure)
        losses.append(loss_of(layer, x).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_frozen_parameters_get_no_gradient() -> None:
    """Fine-tuning: only what asks for a gradient has one, and an optimizer takes the rest."""
    layer, x = make(rnnfast, "LSTM"), sequence()
    for name, p in layer.named_parameters():
        p.requires_grad_("l1" in name)
    loss_of(layer, x).backward()
    for name, p in layer.named_parameters():
        assert (p.grad is not None) == ("l1" in name)
    before = layer.weight_hh_l0.detach().clone()
    torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], fused=True).step()
    assert torch.equal(layer.weight_hh_l0, before)
