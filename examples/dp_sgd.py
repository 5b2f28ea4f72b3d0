"""Differentially private SGD on a recurrent model: every sample's gradient, clipped, and noise.

    python examples/dp_sgd.py

Each sequence's gradient comes from ``vmap(grad(loss))``, for which rnnfast runs the recurrence of
all samples at once; torch.nn's GRU refuses it. The same step done sample by sample is timed beside
it. The task: whether a sequence's numbers add up to more than zero. This shows the mechanics (Abadi
et al. 2016, arXiv:1607.00133); it keeps no account of the privacy that is spent.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

import rnnfast

Parameters = dict[str, Tensor]


class Classifier(nn.Module):
    """A GRU and a line over its last state."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = rnnfast.GRU(1, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:  # (T, 1) or (T, B, 1)
        _, h_n = self.rnn(x)
        score: Tensor = self.head(h_n[-1])
        return score.squeeze(-1)


def private_gradient(each: Parameters, clip: float, noise: float) -> tuple[Parameters, Tensor]:
    """The mean of clipped gradients (B, ...) with noise, and what part of them was clipped."""
    squares = [g.flatten(1).square().sum(1) for g in each.values()]
    norms = torch.stack(squares).sum(0).sqrt()
    scale = (clip / norms.clamp(min=1e-12)).clamp(max=1)
    batch = len(scale)
    mean = {}
    for name, g in each.items():
        total = torch.tensordot(scale, g, 1)
        mean[name] = (total + noise * clip * torch.randn_like(total)) / batch
    return mean, (scale < 1).float().mean()


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of a gradient")
    parser.add_argument("--noise", type=float, default=0.5, help="its deviation, over the clip")
    parser.add_argument("--lr", type=float, default=0.5)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = Classifier(options.hidden)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: Parameters, x: Tensor, label: Tensor) -> Tensor:
        score = functional_call(model, p, (x,))
        return nn.functional.binary_cross_entropy_with_logits(score, label)

    of_each = vmap(grad_and_value(loss), in_dims=(None, 0, 0))
    try:
        from tqdm import trange

        steps = trange(options.steps, unit="step")
    except ImportError:
        steps = range(options.steps)
    mean_loss = 0.0
    for step in steps:
        x = torch.randn(options.batch, options.length, 1)
        labels = (x.sum((1, 2)) > 0).float()
        each, losses = of_each(parameters, x, labels)
        mean, clipped = private_gradient(each, options.clip, options.noise)
        parameters = {name: p - options.lr * mean[name] for name, p in parameters.items()}
        mean_loss = (
            losses.mean().item() if step == 0 else 0.9 * mean_loss + 0.1 * losses.mean().item()
        )
        if hasattr(steps, "set_postfix"):
            steps.set_postfix(loss=f"{mean_loss:.3f}", clipped=f"{clipped:.0%}")

    one = grad(loss)
    together = min(seconds(lambda: of_each(parameters, x, labels)) for _ in range(3))
    apart = seconds(lambda: [one(parameters, a, b) for a, b in zip(x, labels, strict=True)])
    print(f"loss {mean_loss:.3f}")
    print(f"gradients of {options.batch} samples: {1e3 * together:.1f} ms at once,", end=" ")
    print(f"{1e3 * apart:.1f} ms one by one")
    return mean_loss


if __name__ == "__main__":
    main()
