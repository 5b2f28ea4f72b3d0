"""Recurrent batch normalisation on CUDA, against the formulas in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tolerance
import torch
from on_cuda import on_cpu, same_bits
from test_cuda_graphs import capture
from tolerance import Tensors
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast import _batch_norm

pytestmark = pytest.mark.cuda

f64 = torch.float64
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
# T, B, I, H, and steps with statistics of their own
SIZES = [(1, 2, 1, 1, 1), (5, 5, 3, 33, 9), (7, 33, 4, 8, 3), (4, 70, 9, 17, 4), (3, 6, 2, 65, 2)]


def make(sizes: tuple[int, ...], **options: Any) -> Any:
    """A layer of float64 on the CPU, of any numbers."""
    *_, inputs, hidden, steps = sizes
    layer = rnnfast.BatchNormLSTM(inputs, hidden, max_steps=steps, dtype=f64, **options)
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(torch.randn(p.shape, generator=gen, dtype=f64) * 0.5 + name.startswith("gain"))
        for name, b in layer.named_buffers():
            values = torch.rand(b.shape, generator=gen, dtype=f64)
            b.copy_(values + 0.5 if name.startswith("running_var") else values - 0.5)
    return layer.float().double()  # numbers that both types have


def run(
    layer: Any, sizes: tuple[int, ...], lengths: list[int] | None, noise: int | None = None
) -> Tensors:
    """Outputs, running statistics and all gradients of a copy, where it is and in its type."""
    layer = copy.deepcopy(layer)
    weight = next(layer.parameters())
    gen = torch.Generator().manual_seed(4)
    directions = 1 + layer.bidirectional
    shapes = [(*sizes[:3],), *[(directions * layer.num_layers, sizes[1], sizes[3])] * 2]
    given = [torch.randn(shape, generator=gen).to(weight.dtype) for shape in shapes]
    if noise is not None:
        given = [tolerance.last_bits(t, torch.Generator().manual_seed(noise)) for t in given]
    x, h0, c0 = (t.to(weight.device).requires_grad_() for t in given)
    if lengths is None:
        y, (h_n, c_n) = layer(x, (h0, c0))
    else:
        y, (h_n, c_n) = layer(
            pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False), (h0, c0)
        )
        y = y.data
    outputs = {"y": y, "h_n": h_n, "c_n": c_n}
    leaves = {"x": x, "h0": h0, "c0": c0} | dict(layer.named_parameters())
    cotangents = [torch.randn(t.shape, generator=gen).to(t) for t in outputs.values()]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents)
    found = {name: t.detach() for name, t in outputs.items()} | dict(layer.named_buffers())
    return found | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def well_conditioned(dtype: torch.dtype) -> dict[str, float]:
    """Of two rows, gradients through statistics cancel nearly to zero: in float64 that is exact
    enough, in float32 nothing but chance is left to compare."""
    return {} if dtype == f64 else {"eps": 0.5}


def check(layer: Any, sizes: tuple[int, ...], lengths: Any, device: Any, dtype: Any) -> None:
    """Ours against float64, and of float32 against the reference's error on the device."""
    with rnnfast.use_engine("reference"):
        exact = run(layer, sizes, lengths)
    ours = copy.deepcopy(layer).to(device, dtype)

    def again(seed: int | None) -> Tensors:
        with rnnfast.use_engine("reference"):
            return on_cpu(run(ours, sizes, lengths, seed))

    tolerance.check(
        on_cpu(run(ours, sizes, lengths)), tolerance.Peer(again(None), again), exact, dtype
    )


@DTYPES
@TRAINING
@pytest.mark.parametrize("uneven", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_as_the_paper_says(
    sizes: tuple[int, ...], uneven: bool, training: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Steps with one row left, steps beyond max_steps, units and rows that fill no tile."""
    steps, batch = sizes[:2]
    lengths = [max(1, steps - b) for b in range(batch)] if uneven else None
    layer = make(sizes, **well_conditioned(dtype)).train(training)
    check(layer, sizes, lengths, device, dtype)


@DTYPES
@TRAINING
def test_without_a_bias(training: bool, dtype: torch.dtype, device: torch.device) -> None:
    sizes = (4, 6, 3, 11, 4)
    layer = make(sizes, bias=False, **well_conditioned(dtype)).train(training)
    check(layer, sizes, None, device, dtype)


@TRAINING
@pytest.mark.parametrize("lengths", [None, [5, 2, 3, 5, 1]], ids=["padded", "packed"])
def test_layers_and_directions(training: bool, lengths: Any, device: torch.device) -> None:
    sizes = (5, 5, 3, 9, 4)
    layer = make(sizes, num_layers=2, bidirectional=True).train(training)
    check(layer, sizes, lengths, device, f64)


def test_only_what_is_asked_for(device: torch.device) -> None:
    """Without gradients nothing is kept, without that of x none is computed; the bits stay."""
    sizes = (4, 6, 3, 11, 4)
    layer, x = make(sizes).to(device), torch.randn(4, 6, 3, dtype=f64, device=device)
    y = layer(x)[0]
    with torch.no_grad():
        assert same_bits([y], [copy.deepcopy(layer)(x)[0]])
    weights = list(layer.parameters())
    alone = torch.autograd.grad(y.square().sum(), weights)
    x.requires_grad_()
    both = torch.autograd.grad(layer(x)[0].square().sum(), [*weights, x])
    assert same_bits(alone, both[:-1])
    names = ("weight_ih", "weight_hh", "gain_ih", "gain_hh", "bias", "gain_c", "bias_c")
    own = [getattr(layer, f"{name}_l0").detach() for name in names]
    h = x.new_zeros(6, 11).detach()
    out = _batch_norm.forward(
        x.detach(), h, h[None], *own, *layer.buffers(), None, False, 1e-5, False
    )
    assert [t.numel() for t in out[3:]] == [0, 0, 0]


@DTYPES
def test_gradients_are_repeatable(dtype: torch.dtype, device: torch.device) -> None:
    sizes = (6, 40, 5, 40, 3)
    layer = make(sizes).to(device, dtype)
    found = [run(layer, sizes, [6, *[3] * 38, 1]) for _ in range(3)]
    for other in found[1:]:
        assert same_bits(list(found[0].values()), list(other.values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_and_autocast(dtype: torch.dtype, device: torch.device) -> None:
    """Rounded at entry and once at the end; autocast is a layer of the type."""
    sizes = (4, 6, 5, 9, 3)
    layer = make(sizes).to(dtype).float().to(device)
    half, x = copy.deepcopy(layer).to(dtype), torch.randn(4, 6, 5, device=device).to(dtype)
    with torch.no_grad():
        want = copy.deepcopy(layer)(x.float())[0].to(dtype)
        assert same_bits([half(x)[0]], [want])
        with torch.autocast(device.type, dtype=dtype):
            assert same_bits([layer(x.float())[0]], [want])
    y = half(x.requires_grad_())[0]
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype and half.weight_hh_l0.grad.dtype == dtype


def test_the_function_is_the_layer(device: torch.device) -> None:
    layer = make((4, 6, 3, 11, 4)).to(device)
    other, x = copy.deepcopy(layer), torch.randn(4, 6, 3, dtype=f64, device=device)
    y, (h_n, _) = rnnfast.functional.batch_norm_lstm(
        x, None, list(other.parameters()), [other.running_mean_l0], [other.running_var_l0],
        training=True,
    )  # fmt: skip
    want, (want_h, _) = layer(x)
    assert same_bits([y, h_n, *other.buffers()], [want, want_h, *layer.buffers()])


def test_engine_and_errors(cuda: torch.device) -> None:
    layer, x = make((4, 6, 3, 11, 4)).to(cuda), torch.randn(4, 6, 3, dtype=f64, device=cuda)
    with rnnfast.use_engine("cuda"):
        layer(x)
        assert rnnfast.last_run()["engine"] == "cuda" and rnnfast.last_run()["kernel"] == "step"
    row = rnnfast.explain(layer, x).rows[0]
    assert (row.engine, row.kernel) == ("cuda", "step")
    with rnnfast.use_engine("cuda", kernel="onchip"):
        assert rnnfast.explain(layer, x).rows[0].engine == "none"
        with pytest.raises(RuntimeError, match="on-chip engine has no batch normalisation"):
            layer(x)
    with (
        rnnfast.use_engine("cpu"),
        pytest.raises(RuntimeError, match='engine "cpu" was forced, got a tensor on cuda'),
    ):
        layer(x)
    with pytest.raises(RuntimeError, match="not at the same device"):
        layer(x.cpu())


@TRAINING
def test_graphs(training: bool, cuda: torch.device) -> None:
    """A captured layer follows new inputs; its running statistics move at each replay."""
    layer = make((6, 8, 3, 20, 4)).to(cuda).train(training)
    x = torch.randn(6, 8, 3, dtype=f64, device=cuda)
    twin = copy.deepcopy(layer)

    def forward(to: Any, given: Tensor) -> list[Tensor]:
        y, (h_n, c_n) = to(given)
        grads = torch.autograd.grad(y.sum() + h_n.sum() + c_n.sum(), list(to.parameters()))
        return [y.detach(), h_n.detach(), c_n.detach(), *grads]

    graph, results = capture(lambda: forward(layer, x))
    layer.load_state_dict(twin.state_dict())
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert same_bits(results, forward(twin, x))
        assert same_bits(list(layer.buffers()), list(twin.buffers()))


def test_streams(cuda: torch.device) -> None:
    """On the caller's stream: what was put there before is seen."""
    layer = make((6, 8, 3, 20, 4)).to(cuda).eval()
    x = torch.randn(6, 8, 3, dtype=f64, device=cuda)
    want = layer(x)[0]
    late = torch.zeros_like(x)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        y = layer(late)[0]
    side.synchronize()
    assert same_bits([y], [want])
