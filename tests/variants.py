"""What every variant of a layer must do, as checks that a test file calls with its own layer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast

f64 = torch.float64


def flat(end: Any) -> tuple[Tensor, ...]:
    """The final states, of cells of one state and of more."""
    return tuple(end) if isinstance(end, (tuple, list)) else (end,)


def results(y: Tensor, end: Any, inputs: Any) -> list[Tensor]:
    """Outputs, and the gradients of a sum in which all of them count."""
    outs = [y, *flat(end)]
    loss = sum(
        (o * torch.linspace(-1, 1.5, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outs
    )
    # a state may have no part in anything: h of a cell that carries c alone
    return [*outs, *torch.autograd.grad(loss, inputs, materialize_grads=True)]


def check_against_reference(call: Any, rtol: float = 1e-10, atol: float = 1e-11) -> None:
    """The same results from the engines and from reference.py."""
    got = call()
    with rnnfast.use_engine("reference"):
        expected = call()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def check_every_sequence(layer: Any, features: int, steps: int = 70) -> None:
    """Packed, lengths, reset, mask and hx of a float64 layer, stacked or not, against the
    reference."""
    torch.manual_seed(1)
    x = torch.randn(steps, 3, features, dtype=f64, requires_grad=True)
    lengths = torch.tensor([steps, 3, 41 % steps + 1])
    reset = torch.rand(steps, 3) < 0.1
    mask = torch.rand(steps, 3) < 0.8
    inputs = [x, *layer.parameters()]
    with torch.no_grad():
        _, end = layer(x)
    states = [torch.randn_like(s).requires_grad_() for s in flat(end)]
    hx: Any = tuple(states) if len(states) > 1 else states[0]

    def of_packed() -> list[Tensor]:
        y, end = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return results(pad_packed_sequence(y)[0], end, inputs)

    check_against_reference(of_packed)
    check_against_reference(lambda: results(*layer(x, hx), [*inputs, *states]))
    check_against_reference(lambda: results(*layer(x, lengths=lengths), inputs))
    check_against_reference(lambda: results(*layer(x, hx, reset=reset), [*inputs, *states]))
    check_against_reference(lambda: results(*layer(x, mask=mask), inputs))


def check_threads(layer: Any, x: Tensor) -> None:
    """The same bits whatever the number of threads."""
    inputs = [x, *layer.parameters()]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(*layer(x), inputs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def check_derivatives(layer: Any, x: Tensor) -> None:
    """gradcheck, gradgradcheck and forward mode of a small float64 layer, all outputs counted."""
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, weights, strict=True))
        y, end = torch.func.functional_call(layer, parameters, (x,))
        return (y, *flat(end))

    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, atol=1e-4)
    with torch.no_grad():
        tangent = torch.randn_like(x)
        _, got = torch.func.jvp(lambda v: layer(v)[0], (x,), (tangent,))
        about = (layer(x + 1e-6 * tangent)[0] - layer(x - 1e-6 * tangent)[0]) / 2e-6
    torch.testing.assert_close(got, about, rtol=1e-6, atol=1e-8)


def check_per_sample_gradients(layer: Any, x: Tensor) -> None:
    """vmap of grad, against one sample after the other."""
    parameters = {k: v.detach() for k, v in layer.named_parameters()}

    def loss(parameters: Any, sample: Tensor) -> Tensor:
        y, _ = torch.func.functional_call(layer, parameters, (sample.unsqueeze(1),))
        return (y * y).sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x.detach())
    for i in range(x.size(1)):
        one = torch.func.grad(loss)(parameters, x.detach()[:, i])
        for name, value in one.items():
            torch.testing.assert_close(got[name][i], value, rtol=1e-9, atol=1e-11)


def check_compiled(layer: Any, x: Tensor) -> None:
    """One graph, forward and backward."""
    inputs = [x, *layer.parameters()]
    eager = results(*layer(x), inputs)
    torch._dynamo.reset()  # each kind of layer is one more version of the same code
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(*graph(x), inputs), eager, strict=True):
        torch.testing.assert_close(a, b)


def check_recompute(layer: Any, x: Tensor) -> None:
    """The same bits with less kept."""
    inputs = [x, *layer.parameters()]
    plain = results(*layer(x), inputs)
    layer.recompute = True
    for a, b in zip(results(*layer(x), inputs), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def check_sixteen_bits(layer: Any, x: Tensor) -> None:
    """A float32 layer and its half in 16 bits: alike, forward and backward."""
    inputs = [x, *layer.parameters()]
    exact = results(*layer(x), inputs)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(layer).to(dtype)
        x16 = x.detach().to(dtype).requires_grad_()
        got = results(*half(x16), [x16, *half.parameters()])
        for a, b in zip(got, exact, strict=True):
            assert a.dtype == dtype
            most = float(b.detach().abs().max())
            torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.05 * most)


def check_frozen_and_stepped(layer: Any, x: Tensor) -> None:
    """freeze, step, copies and pickles compute the same."""
    x = x.detach()
    with torch.inference_mode():
        y, end = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(other(x)[0], y, rtol=0, atol=0)
        for frozen in (False, True):
            if frozen:
                layer.freeze()
                torch.testing.assert_close(layer(x)[0], y)
            state, steps = None, []
            for x_t in x:
                out, state = layer.step(x_t, state)
                steps.append(out)
            torch.testing.assert_close(torch.stack(steps), y)
            for a, b in zip(flat(state), flat(end), strict=True):
                torch.testing.assert_close(a, b)
    layer.unfreeze()
