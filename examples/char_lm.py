"""Train a character language model with torch.nn and with rnnfast, side by side.

The text is the source of Python's standard library on this machine. Three copies of one model start
from the same seed and take turns, a few steps each, so that noise of the machine hits all alike:

    torch.nn             the model as it is
    rnnfast              the same after ``rnnfast.accelerate(model)``
    torch.nn + 1 ulp     torch.nn again, every weight moved to the next float

The third tells how far two correct runs drift apart in float32: training multiplies any rounding
difference, so from some step on no two implementations agree to the last digit. rnnfast has to stay
as close to torch.nn as torch.nn stays to itself.

Run ``make demo``, or ``python examples/char_lm.py --help`` in an environment with rnnfast,
matplotlib and tqdm.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rnnfast

BLOCK = 5  # steps a run takes before it is the next one's turn
STRICT_STEPS = 40  # steps before rounding differences have had time to grow


# --- text ----------------------------------------------------------------------------------------


def read_library(max_chars: int = 4_000_000) -> str:
    """The standard library's modules as one ASCII string, the same on every run."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts, size = [], 0
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore").replace("\t", "    ")
        parts.append(text.encode("ascii", "ignore").decode())
        size += len(parts[-1])
        if size >= max_chars:
            break
    if size < 100_000:
        sys.exit(f"char_lm: found only {size} characters of Python source in {folder}")
    return "".join(parts)[:max_chars]


class Corpus:
    """Text as B parallel streams of characters; the end of each stream is held out."""

    def __init__(self, text: str, batch: int, seq_len: int, device: torch.device) -> None:
        self.chars = sorted(set(text))
        self.index = {char: i for i, char in enumerate(self.chars)}
        self.seq_len = seq_len
        ids = torch.tensor([self.index[char] for char in text], device=device)
        streams = ids[: len(ids) // batch * batch].view(batch, -1)
        held_out = 8 * seq_len + 1
        self.train, self.valid = streams[:, :-held_out], streams[:, -held_out:]

    def chunk(self, step: int, streams: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) of a step; consecutive steps continue each other."""
        streams = self.train if streams is None else streams
        start = step % ((streams.shape[1] - 1) // self.seq_len) * self.seq_len
        stop = start + self.seq_len
        return streams[:, start:stop], streams[:, start + 1 : stop + 1]


# --- model and training --------------------------------------------------------------------------


class CharModel(nn.Module):
    """Embedding -> LSTM -> linear. Nothing here knows of rnnfast."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.rnn = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(
        self, ids: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.rnn(self.embedding(ids), state)
        return self.head(y), state


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Run:
    """One copy of the model with its optimizer, carried state and record."""

    name: str
    model: CharModel
    lr: float
    steps: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    state: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), self.lr)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, self.lr, total_steps=self.steps
        )

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        synchronize(inputs.device)
        start = time.perf_counter()
        logits, state = self.model(inputs, self.state)
        self.state = (state[0].detach(), state[1].detach())
        loss = cross_entropy(logits, targets)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        synchronize(inputs.device)
        self.seconds.append(time.perf_counter() - start)

    @property
    def ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    @torch.no_grad()
    def validate(self, corpus: Corpus) -> float:
        """Cross entropy in nats per character on the held-out ends of the streams."""
        state, losses = None, []
        for step in range((corpus.valid.shape[1] - 1) // corpus.seq_len):
            inputs, targets = corpus.chunk(step, corpus.valid)
            logits, state = self.model(inputs, state)
            losses.append(cross_entropy(logits, targets).item())
        return statistics.fmean(losses)


def one_ulp_away(model: CharModel) -> CharModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.nextafter(parameter, parameter.new_tensor(math.inf)))
    return model


def accelerated(model: Any) -> Any:
    """A copy after ``rnnfast.accelerate``; never torch.nn's layers under rnnfast's name."""
    model = rnnfast.accelerate(copy.deepcopy(model))
    for row in rnnfast.explain(model).rows:
        if row.engine != "cpu" and not row.engine.startswith("cuda"):
            sys.exit(f"char_lm: rnnfast does not run {row.layer or 'the layer'}: {row.reason}")
    return model


def make_runs(args: argparse.Namespace, corpus: Corpus) -> list[Run]:
    torch.manual_seed(args.seed)
    model = CharModel(len(corpus.chars), args.embedding, args.hidden, args.layers).to(args.device)
    models = {
        "torch.nn": copy.deepcopy(model),
        "rnnfast": accelerated(model),
        "torch.nn + 1 ulp": one_ulp_away(copy.deepcopy(model)),
    }
    return [Run(name, model, args.lr, args.steps) for name, model in models.items()]


def train(runs: list[Run], corpus: Corpus, args: argparse.Namespace) -> None:
    """Alternate blocks of steps until ``--steps`` are done or ``--seconds`` are over."""
    from tqdm import tqdm

    start = time.perf_counter()
    interval = 0.2 if sys.stderr.isatty() else 20.0  # a log wants a few lines only
    with tqdm(total=args.steps, unit="step", dynamic_ncols=True, mininterval=interval) as bar:
        for number, first in enumerate(range(0, args.steps, BLOCK)):
            last = min(first + BLOCK, args.steps)
            before = time.perf_counter()
            turn = number % len(runs)
            order = runs[turn:] + runs[:turn]
            for run in order if number % 2 else reversed(order):
                for step in range(first, last):
                    run.step(*corpus.chunk(step))
            times = ", ".join(f"{run.name} {run.ms:.0f} ms" for run in runs[:2])
            bar.set_postfix_str(f"loss {runs[1].losses[-1]:.3f}, {times}", refresh=False)
            bar.update(last - first)
            now = time.perf_counter()
            if last < args.steps and now - start + (now - before) > args.seconds:
                bar.write(f"time is up after {last} of {args.steps} steps (--seconds)")
                return


def differences(run: Run, base: Run) -> list[float]:
    return [abs(ours - theirs) for ours, theirs in zip(run.losses, base.losses, strict=True)]


@torch.no_grad()
def sample(model: CharModel, corpus: Corpus, prompt: str, length: int, seed: int) -> str:
    """Continue a prompt, one character a call: the streaming use of a layer."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[corpus.index[char] for char in prompt]], device=device)
    state, text = None, prompt
    for _ in range(length):
        logits, state = model(ids, state)
        odds = torch.softmax(logits[0, -1].float().cpu() / 0.6, dim=-1)
        choice = int(torch.multinomial(odds, 1, generator=generator))
        text += corpus.chars[choice]
        ids = torch.tensor([[choice]], device=device)
    return text


# --- speed of typical layers ---------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    label: str
    kind: Callable[..., nn.RNNBase]
    seq_len: int
    batch: int
    hidden: int
    training: bool
    layers: int = 1
    bidirectional: bool = False

    def __str__(self) -> str:
        size = f"T {self.seq_len}, B {self.batch}, H {self.hidden}"
        return f"{self.label}  {size}  {'training' if self.training else 'inference'}"


SHAPES = [
    Shape("LSTM", nn.LSTM, 100, 32, 256, True),
    Shape("LSTM", nn.LSTM, 100, 32, 256, False),
    Shape("LSTM, 2 layers, both ways", nn.LSTM, 50, 16, 256, True, 2, True),
    Shape("LSTM", nn.LSTM, 500, 1, 512, False),
    Shape("LSTM, one step", nn.LSTM, 1, 1, 256, False),
    Shape("GRU", nn.GRU, 100, 32, 256, True),
    Shape("GRU", nn.GRU, 100, 8, 128, False),
    Shape("RNN", nn.RNN, 200, 16, 256, True),
    Shape("RNN", nn.RNN, 200, 16, 256, False),
]


def make_call(layer: nn.RNNBase, x: Tensor, training: bool) -> Callable[[], Tensor]:
    if training:

        def call() -> Tensor:
            layer.zero_grad(set_to_none=True)
            y = layer(x)[0]
            y.backward(torch.ones_like(y))
            return y.detach()

    else:

        @torch.inference_mode()
        def call() -> Tensor:
            return layer(x)[0]

    return call


def time_shape(shape: Shape, device: torch.device, seconds: float) -> tuple[float, float]:
    """Median ms a call of (torch.nn, rnnfast); outputs are compared before anything is timed."""
    theirs = shape.kind(
        shape.hidden,
        shape.hidden,
        shape.layers,
        bidirectional=shape.bidirectional,
        device=device,
    )
    ours = accelerated(theirs)
    x = torch.randn(shape.seq_len, shape.batch, shape.hidden, device=device)
    calls = [make_call(layer, x, shape.training) for layer in (theirs, ours)]
    torch.testing.assert_close(calls[1](), calls[0](), rtol=1e-4, atol=1e-5)
    times: list[list[float]] = [[], []]
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[0]) < 3:
        for call, record in zip(calls, times, strict=True):
            call()  # untimed: the other's turn has cooled the caches
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            record.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


# --- report --------------------------------------------------------------------------------------


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = "CPU"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads != 1 else ''}"


def draw(
    path: Path,
    runs: list[Run],
    speeds: dict[Shape, tuple[float, float]],
    args: argparse.Namespace,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    theirs, ours, control = runs
    grey, accent, light = "#8a94a3", "#d1495b", "#c9d1dc"
    plt.rcParams.update(
        {
            "font.size": 9.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#444b55",
            "axes.titleweight": "bold",
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
        }
    )
    figure = plt.figure(figsize=(12, 6.2), layout="constrained")
    figure.suptitle(
        f"Character language model, {args.layers}-layer LSTM of {args.hidden}, "
        f"{args.batch} × {args.seq_len} characters a step  |  {machine(args.device)}",
        fontsize=11,
    )
    grid = figure.add_gridspec(3, 2, width_ratios=(1.15, 1))

    loss = figure.add_subplot(grid[:2, 0])
    steps = range(1, len(ours.losses) + 1)
    loss.plot(steps, theirs.losses, color=light, linewidth=5, label="torch.nn")
    loss.plot(steps, ours.losses, color=accent, linewidth=1.2, label="rnnfast")
    loss.set(title="Loss", ylabel="cross entropy, nats per character")
    loss.grid(axis="y", color="#eceff3")
    loss.legend(frameon=False)
    loss.tick_params(labelbottom=False)

    gap = figure.add_subplot(grid[2, 0], sharex=loss)
    for run, color, label in ((control, grey, "torch.nn + 1 ulp"), (ours, accent, "rnnfast")):
        values = [max(value, 1e-8) for value in differences(run, theirs)]
        gap.semilogy(steps, values, color=color, linewidth=1, label=label)
    gap.set(title="Distance from torch.nn", xlabel="step", ylabel="|Δ loss|")
    gap.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2)
    gap.grid(axis="y", color="#eceff3")

    step = figure.add_subplot(grid[0, 1])
    bars = step.barh([1, 0], [theirs.ms, ours.ms], color=[grey, accent], height=0.62)
    labels = [f"{run.ms:.1f} ms, {tokens(run, args):,.0f} characters/s" for run in (theirs, ours)]
    step.bar_label(bars, labels, padding=4)
    step.set_yticks([1, 0], ["torch.nn", "rnnfast"])
    step.set(title="A training step", xlim=(0, max(theirs.ms, ours.ms) * 1.75))
    step.set_xticks([])
    step.spines["bottom"].set_visible(False)

    # bars start at torch.nn, so that a slower layer points to the left
    table = figure.add_subplot(grid[1:, 1])
    ratios = [before / after for before, after in speeds.values()]
    places = list(range(len(ratios)))[::-1]
    table.set_xscale("log")
    table.barh(places, [ratio - 1 for ratio in ratios], left=1, color=accent, height=0.62)
    for place, ratio in zip(places, ratios, strict=True):
        table.text(max(ratio, 1) * 1.04, place, f"{ratio:.2f}×", va="center")
    table.axvline(1, color="#444b55", linewidth=1)
    table.set_yticks(places, [str(shape).replace("  ", "\n", 1) for shape in speeds], fontsize=8)
    low, high = min(0.9, *ratios), max(1.5, *ratios)
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if low <= tick <= high]
    table.set(title="Layers: speed over torch.nn", xlim=(low * 0.96, high * 1.35))
    table.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    table.minorticks_off()
    for axes in (step, table):
        axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def tokens(run: Run, args: argparse.Namespace) -> float:
    return args.batch * args.seq_len / run.ms * 1e3


def report_training(runs: list[Run], corpus: Corpus, args: argparse.Namespace) -> bool:
    """Print what the training showed; False if rnnfast's losses left torch.nn's."""
    theirs, ours, control = runs
    print(f"\n{'':<18}{'ms/step':>9}{'char/s':>11}{'loss':>9}{'held out':>11}  (nats a character)")
    for run in runs:
        last = statistics.fmean(run.losses[-20:])
        print(
            f"{run.name:<18}{run.ms:>9.1f}{tokens(run, args):>11,.0f}{last:>9.4f}"
            f"{run.validate(corpus):>11.4f}"
        )
    print(f"a training step is {theirs.ms / ours.ms:.2f} times as fast with rnnfast")

    gap, drift = differences(ours, theirs), differences(control, theirs)
    early = max(gap[:STRICT_STEPS])
    bound = max(5 * max(drift), 1e-2)
    agree = early <= 1e-4 and max(gap) <= bound
    print(
        f"\nlosses {'agree' if agree else 'DISAGREE'} with torch.nn's, max |difference|:\n"
        f"  first {min(STRICT_STEPS, len(gap))} steps  {early:.1e}  (allowed 1.0e-04)\n"
        f"  all {len(gap)} steps  {max(gap):.1e}  (allowed {bound:.1e}; "
        f"torch.nn moved by one ulp: {max(drift):.1e})"
    )
    return agree


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each model")
    parser.add_argument("--seconds", type=float, default=100, help="stop training after this time")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--embedding", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=4e-3, help="peak of the learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch's number of threads")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the picture")
    args = parser.parse_args()
    gpu, engines = torch.cuda.is_available(), rnnfast.engines()
    if args.device == "cuda" and not gpu:
        parser.error("torch finds no GPU here; use --device cpu")
    if gpu and args.device != "cpu" and "cuda" not in engines:
        no_engine = f"this version of rnnfast has no engine for a GPU, only {', '.join(engines)}"
        if args.device == "cuda":
            parser.error(f"{no_engine}; use --device cpu")
        print(f"{no_engine}: all three copies run on the CPU")
    if args.device == "auto":
        args.device = "cuda" if gpu and "cuda" in engines else "cpu"
    args.device = torch.device(args.device)
    if args.steps < 2 * BLOCK:
        parser.error(f"--steps must be at least {2 * BLOCK}, got {args.steps}")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def main() -> int:
    args = parse()
    corpus = Corpus(read_library(), args.batch, args.seq_len, args.device)
    runs = make_runs(args, corpus)
    layer = runs[1].model.rnn
    x = torch.zeros(args.batch, args.seq_len, args.embedding, device=args.device)
    ran = rnnfast.explain(layer, x).rows[0]
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    print(
        f"rnnfast {rnnfast.__version__}, torch {torch.__version__}, {machine(args.device)}\n"
        f"text: Python {sys.version.split()[0]}'s standard library, "
        f"{corpus.train.numel():,} characters, {len(corpus.chars)} different\n"
        f"model: embedding {args.embedding}, {args.layers}-layer LSTM {args.hidden}, "
        f"{parameters:,} parameters; batch {args.batch}, {args.seq_len} characters a step\n"
        f"engine: {ran.engine} ({ran.isa}, {ran.threads} threads): {ran.reason}\n"
    )
    train(runs, corpus, args)
    agree = report_training(runs, corpus, args)

    print("\na sample of the model trained with rnnfast:\n")
    for line in sample(runs[1].model, corpus, "    def ", 320, args.seed).splitlines():
        print(f"    | {line}")

    print(f"\n{'layer (input size = H)':<62}{'torch.nn':>10}{'rnnfast':>10}{'speed':>8}")
    speeds = {}
    for shape in SHAPES:
        before, after = speeds[shape] = time_shape(shape, args.device, seconds=1.0)
        print(f"{shape!s:<62}{before:>7.2f} ms{after:>7.2f} ms{before / after:>7.2f}×")

    draw(args.output, runs, speeds, args)
    print(f"\npicture: {args.output}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
