"""Cells that torch.nn has not, against the quickest way to write them in plain PyTorch: a loop over
time around one compiled step (Dynamo would unroll the loop). ``python -m bench.variants
[--rounds N] [--threads N] [--only NAME]``.

The step is rnnfast/reference.py's, which is the equations in torch operators; the products are
torch's, that of the input over all steps at once. Each figure is the median of interleaved rounds.
"At most" is what a program would gain that took no time but for the products, at the peak of the
machine (bench/limits.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import rnnfast
from rnnfast._layer import spec_of
from rnnfast.reference import cell_step

from . import stages
from .extras import compile_anew, median_ms, sizes
from .limits import Limits
from .table import render


# Of each variant: a layer of H units over H features, and the layer of torch.nn's kind beside it.
def lstm(H: int) -> Any:
    return rnnfast.LSTM(H, H)


VARIANTS: dict[str, tuple[Callable[[int], Any], Callable[[int], Any]]] = {
    "LSTM(coupled=True)": (
        lambda H: rnnfast.LSTM(H, H, coupled=True),
        lstm,
    ),
    "LSTM(peephole=True)": (
        lambda H: rnnfast.LSTM(H, H, peephole=True),
        lstm,
    ),
    "LSTM(layer_norm=True)": (
        lambda H: rnnfast.LSTM(H, H, layer_norm=True),
        lstm,
    ),
    "GRU(reset_after=False)": (
        lambda H: rnnfast.GRU(H, H, reset_after=False),
        lambda H: rnnfast.GRU(H, H),
    ),
    "SRU": (lambda H: rnnfast.SRU(H, H), lstm),
    "SLSTM": (lambda H: rnnfast.SLSTM(H, H), lstm),
    "SLSTM(num_heads=4)": (lambda H: rnnfast.SLSTM(H, H, num_heads=4), lstm),
    "BatchNormLSTM": (lambda H: rnnfast.BatchNormLSTM(H, H, max_steps=100), lstm),
}
SHAPES = ((100, 32, 256), (100, 32, 512), (50, 8, 64))
CHECKED = 20  # first steps that must agree to 1e-4: more than forward's first chunk has


def plain_heads(layer: Any) -> Callable[[Tensor], Tensor]:
    """The same with heads: a product of batches of matrices a step."""
    spec = spec_of(layer)
    form = (spec.gates, spec.heads, layer.hidden_size // spec.heads)

    @torch.compile
    def step(gx: Tensor, gh: Tensor, b_hh: Tensor, state: tuple[Tensor, ...]) -> Any:
        gh = gh.unflatten(-1, (form[0], form[2])).permute(1, 2, 0, 3).flatten(1)
        return cell_step(spec, gx, gh + b_hh, state)

    def run(x: Tensor) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = layer.parameters()
        blocks = w_hh.unflatten(0, form).permute(1, 3, 0, 2).flatten(2).contiguous()
        state: tuple[Tensor, ...] = (x.new_zeros(x.size(1), layer.hidden_size),) * spec.states
        y = []
        for gx in torch.nn.functional.linear(x, w_ih, b_ih).unbind(0):
            h = state[0].unflatten(-1, form[1:]).transpose(0, 1)
            state = step(gx, torch.bmm(h, blocks), b_hh, state)
            y.append(state[0])
        return torch.stack(y)

    return run


def plain(layer: Any) -> Callable[[Tensor], Tensor]:
    """The layer's numbers by torch's operators, a compiled step after the other."""
    spec = spec_of(layer)
    if spec.heads > 1:
        return plain_heads(layer)
    if spec.stages:
        return stages.plain(layer)
    step = torch.compile(partial(cell_step, spec))

    def run(x: Tensor) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = layer._current()[0][:4]
        hidden = layer.hidden_size
        if spec.name == "sru":  # the highway takes x itself
            w_ih, b_ih = w_ih[: 3 * hidden], b_ih[: 3 * hidden]
        b_hh, p = b_hh[: spec.gates * hidden], b_hh[spec.gates * hidden :]
        of_units = tuple(p.chunk(spec.parameters)) if spec.parameters else ()
        zeros = x.new_zeros(x.size(1), hidden)
        state: tuple[Tensor, ...] = (zeros,) * spec.states
        nothing = torch.zeros(())
        y, projected = [], torch.nn.functional.linear(x, w_ih, b_ih)
        if spec.name == "sru":
            projected = torch.cat([projected, x], -1)
        for gx in projected.unbind(0):
            gh = torch.addmm(b_hh, state[0], w_hh.t()) if spec.dense else nothing
            state = step(gx, gh, state, of_units)
            y.append(state[0])
        return torch.stack(y)

    return run


def plain_batch_norm(layer: Any) -> Callable[[Tensor], Tensor]:
    """Likewise; what W_ih gives is normalised over all steps at once. Its running statistics stay
    as they are."""
    hidden = layer.hidden_size
    first, second = slice(4 * hidden, 8 * hidden), slice(8 * hidden, 9 * hidden)

    def normal(v: Tensor, dim: int, mean: Tensor, var: Tensor, own: bool) -> Tensor:
        if own:
            mean, var = v.mean(dim, keepdim=True), v.var(dim, unbiased=False, keepdim=True)
        return (v - mean) * torch.rsqrt(var + layer.eps)

    def step(
        gx: Tensor, gh: Tensor, c: Tensor, gains: Any, mean: Tensor, var: Tensor, own: bool
    ) -> Any:
        gh = gains[0] * normal(gh, 0, mean[first], var[first], own)
        i, f, g, o = (gx + gh).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        z = gains[1] * normal(c, 0, mean[second], var[second], own) + gains[2]
        return o.sigmoid() * z.tanh(), c

    compiled = torch.compile(step)

    def run(x: Tensor) -> Tensor:
        own, means, variances = layer.training, layer.running_mean_l0, layer.running_var_l0
        gx = torch.nn.functional.linear(x, layer.weight_ih_l0)
        mean, var = (s[: x.size(0), None, : 4 * hidden] for s in (means, variances))
        gx = layer.gain_ih_l0 * normal(gx, 1, mean, var, own) + layer.bias_l0
        h = c = x.new_zeros(x.size(1), hidden)
        gains, y = (layer.gain_hh_l0, layer.gain_c_l0, layer.bias_c_l0), []
        for gx_t, mean, var in zip(gx.unbind(0), means, variances):
            h, c = compiled(gx_t, h @ layer.weight_hh_l0.t(), c, gains, mean, var, own)
            y.append(h)
        return torch.stack(y)

    return run


def training(run: Callable[[Tensor], Any], layer: Any, x: Tensor) -> Any:
    y = run(x)
    y = y[0] if isinstance(y, tuple) else y
    return torch.autograd.grad(y.sum(), [p for p in layer.parameters() if p.requires_grad])


def inference(run: Callable[[Tensor], Any], layer: Any, x: Tensor) -> Any:
    with torch.inference_mode():
        return run(x)


def products(layer: Any, rows: int, mode: Callable[..., Any]) -> float:
    """Operations of the products of a call: each entry of a matrix is met once a row, and in
    training twice (nobody wants the gradient of x) or, of W_hh, three times."""
    times = {"weight_ih": 2, "weight_hh": 3} if mode is training else {}
    return (
        2.0
        * rows
        * sum(
            p.numel() * times.get(name[:9], 1)
            for name, p in layer.named_parameters()
            if p.dim() == 2
        )
    )


def check(theirs: Tensor, ours: Tensor, *, normalised: bool) -> None:
    """Only the first steps if normalised: such a recurrence amplifies rounding a hundredfold in
    100."""
    torch.testing.assert_close(theirs[:CHECKED], ours[:CHECKED], rtol=1e-4, atol=1e-4)
    if not normalised:
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.variants", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds (default: 7)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--only", default="", metavar="NAME", help="variants whose name has it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = [name for name in VARIANTS if options.only in name]
    if not names:
        parser.error(f"--only must be part of one of {', '.join(VARIANTS)}")
    peak = Limits(options.threads).peak / 1e3  # operations a millisecond
    rows = []
    for name, (T, B, H) in tqdm([(name, shape) for name in names for shape in SHAPES]):
        make, make_usual = VARIANTS[name]
        compile_anew()
        layer, usual, x = make(H), make_usual(H), torch.randn(T, B, H)
        batch_norm = isinstance(layer, rnnfast.BatchNormLSTM)
        theirs = plain_batch_norm(layer) if batch_norm else plain(layer)
        found = []
        for mode in (inference, training):
            layer.train(mode is training)
            check(theirs(x), layer(x)[0], normalised=batch_norm or "norm" in name)
            calls: dict[str, Callable[[], Any]] = {
                "ours": partial(mode, layer, layer, x),
                "theirs": partial(mode, theirs, layer, x),
                "usual": partial(mode, usual, usual, x),
            }
            ms = median_ms(calls, options.rounds)
            least = products(layer, T * B, mode) / peak
            gained, most = (ms["theirs"] / each for each in (ms["ours"], least))
            found += [f"{gained:.1f}x", f"{most:.1f}x", f"{ms['ours'] / ms['usual']:.2f}"]
        rows.append([name, sizes(T, B, H), *found])
    each = ["at most", "of the usual"]
    heads = ["variant", "shape", "inference", *each, "training", *each]
    print(
        f"torch {torch.__version__}, {options.threads} threads, medians of {options.rounds} "
        f"rounds, peak {peak / 1e6:.0f} GFLOP/s"
    )
    print(render(heads, rows, markdown=False, text_columns=2))


if __name__ == "__main__":
    main()
