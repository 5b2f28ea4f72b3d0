"""DistributedDataParallel, fully_shard and distributed checkpoints on two processes (gloo).

Each process has half of the batch. The mean of the two gradients is what one process gets that
takes the halves one after the other, to the bit: halving is exact, and a sum of two has one order.
Against one pass over the whole batch the order of the sum over the batch differs, so that has a
tolerance.
"""

from __future__ import annotations

import copy
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import two_processes
import works
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast

# one process without a group reads and writes checkpoints here, as it should
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SECTION = "Training at scale"
LENGTHS = torch.tensor([3, 7, 1, 5])
LIBRARIES = {"rnnfast": rnnfast, "torch.nn": nn}
KINDS: dict[str, dict[str, Any]] = {
    "LSTM": {"bidirectional": True},
    "LSTM proj": {"proj_size": 4, "bias": False},
    "GRU": {},
    "RNN": {"nonlinearity": "relu"},
}


class Net(nn.Module):
    """A layer between two others; packed input where lengths are given."""

    def __init__(self, library: Any, kind: str = "LSTM") -> None:
        super().__init__()
        options = KINDS.get(kind, {})
        out = options.get("proj_size", 9) * (2 if options.get("bidirectional") else 1)
        self.first = nn.Linear(5, 6)
        self.rnn = getattr(library, kind.split()[0])(6, 9, num_layers=2, **options)
        self.last = nn.Linear(out, 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.first(x)
        if lengths is None:
            return self.last(self.rnn(x)[0])
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return self.last(self.rnn(packed)[0].data)


class LastState(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.rnn(x)
        return sum(h.add_(1) for h in (state if isinstance(state, tuple) else (state,)))


def name_of(library: Any) -> str:
    return "torch.nn" if library is nn else "rnnfast"


@functools.cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (two_processes.COUNT,))


def make(library: str, kind: str) -> Net:
    torch.manual_seed(1)
    if library == "accelerated":
        return rnnfast.accelerate(Net(nn, kind))
    return Net(LIBRARIES[library], kind)


def batch(packed: bool = False) -> tuple[Tensor, ...]:
    torch.manual_seed(2)
    x = torch.randn(7, 4, 5)
    return (x, LENGTHS) if packed else (x,)


def half(inputs: tuple[Tensor, ...], rank: int) -> tuple[Tensor, ...]:
    mine = slice(2 * rank, 2 * rank + 2)
    return (inputs[0][:, mine], *(lengths[mine] for lengths in inputs[1:]))


def loss_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return model(*inputs).square().sum()


def gradients(model: nn.Module) -> list[Tensor]:
    found = []
    for p in model.parameters():
        assert p.grad is not None
        found.append(p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone())
    return found


def check_gradients(model: nn.Module, alone: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    got = gradients(model)
    for rank in range(two_processes.COUNT):
        (loss_of(alone, half(inputs, rank)) / 2).backward()
    for ours, theirs in zip(got, gradients(alone), strict=True):
        assert torch.equal(ours, theirs), float((ours - theirs).abs().max())
    alone.zero_grad()
    (loss_of(alone, inputs) / 2).backward()
    for ours, theirs in zip(got, gradients(alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def shard(model: Any) -> Any:
    """Weights of the layer are gathered for its forward, freed, and gathered for backward again."""
    fully_shard(model.rnn, mesh=mesh(), reshard_after_forward=True)
    return fully_shard(model, mesh=mesh())


# --- in both processes ---------------------------------------------------------------------------


def ddp(rank: int, library: str, kind: str, packed: bool, options: dict[str, Any]) -> None:
    model, inputs = make(library, kind), batch(packed)
    wrapped = DistributedDataParallel(copy.deepcopy(model), **options)
    for _ in range(2):  # DDP orders its buckets anew after the first step
        wrapped.zero_grad()
        loss_of(wrapped, half(inputs, rank)).backward()
    check_gradients(wrapped, model, inputs)


def ddp_compiled(rank: int, library: str) -> None:
    model, inputs = make(library, "LSTM"), batch()
    wrapped = torch.compile(DistributedDataParallel(copy.deepcopy(model)), backend="aot_eager")
    loss_of(wrapped, half(inputs, rank)).backward()
    check_gradients(wrapped, model, inputs)


def ddp_accumulates(rank: int, library: str) -> None:
    """no_sync() holds the exchange back until the last part of the batch."""
    model, inputs = make(library, "GRU"), batch()
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    mine = half(inputs, rank)[0]
    with wrapped.no_sync():
        loss_of(wrapped, (mine[:, :1],)).backward()
    loss_of(wrapped, (mine[:, 1:],)).backward()
    (loss_of(model, inputs) / 2).backward()
    for ours, theirs in zip(gradients(wrapped), gradients(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def ddp_with_an_idle_layer(rank: int, library: str) -> None:
    model = nn.ModuleList([make(library, "GRU"), make(library, "LSTM")])
    model.forward = lambda *inputs: model[0](*inputs)  # type: ignore[method-assign]
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    loss_of(wrapped, half(batch(), rank)).backward()
    assert all(p.grad is None for p in model[1].parameters())
    model[1].zero_grad()
    check_gradients(model[0], make(library, "GRU"), batch())


def fsdp(rank: int, library: str, kind: str, packed: bool) -> None:
    model, inputs = make(library, kind), batch(packed)
    sharded = shard(copy.deepcopy(model))
    weight = sharded.rnn.weight_hh_l0
    assert weight.to_local().numel() < weight.numel()
    loss_of(sharded, half(inputs, rank)).backward()
    check_gradients(sharded, model, inputs)


def fsdp_state_in_place(rank: int, library: str, kind: str) -> None:
    """fully_shard gathers weights for backward by a hook on the outputs of the layer, and loses it
    where one that is a view is changed in place: backward would read freed memory."""
    torch.manual_seed(1)
    model = LastState(getattr(LIBRARIES[library], kind)(5, 9))
    sharded = shard(copy.deepcopy(model))
    loss_of(sharded, half(batch(), rank)).backward()
    check_gradients(sharded, model, batch())


def fsdp_checkpointed(rank: int, library: str) -> None:
    model, inputs = make(library, "LSTM"), batch()
    sharded = copy.deepcopy(model)
    sharded.rnn = checkpoint_wrapper(sharded.rnn)
    loss_of(shard(sharded), half(inputs, rank)).backward()
    check_gradients(sharded, model, inputs)


def fsdp_bfloat16(rank: int, library: str) -> None:
    """Weights of 16 bits in the calls, float32 between them."""
    model, inputs = make(library, "LSTM"), batch()
    sharded = copy.deepcopy(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(sharded.rnn, mesh=mesh(), mp_policy=policy)
    fully_shard(sharded, mesh=mesh(), mp_policy=policy)
    out = sharded(*half(inputs, rank))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    (loss_of(model, inputs) / 2).backward()
    for ours, theirs in zip(gradients(sharded), gradients(model), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


def three_steps(rank: int, library: str, kind: str, sharded: bool) -> None:
    """Clipped steps of Adam, and the weights that they end at."""
    model, inputs = make(library, kind), batch()
    many: Any = copy.deepcopy(model)
    many = shard(many) if sharded else DistributedDataParallel(many)
    for one, mine in ((many, half(inputs, rank)), (model, inputs)):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2, foreach=True)
        for _ in range(3):
            optimizer.zero_grad()
            (loss_of(one, mine) / mine[0].shape[1]).backward()
            nn.utils.clip_grad_norm_(one.parameters(), 0.5, foreach=True)
            optimizer.step()
    for ours, theirs in zip(many.parameters(), model.parameters(), strict=True):
        ours = ours.full_tensor() if sharded else ours
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-3, atol=1e-4)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def train_a_step(model: nn.Module, inputs: tuple[Tensor, ...]) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss_of(model, inputs).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def saved(rank: int, library: str, kind: str, folder: str) -> Tensor:
    model = shard(make(library, kind))
    optimizer = train_a_step(model, half(batch(), rank))
    dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    with torch.no_grad():
        return model(*batch())


def loaded(rank: int, library: str, kind: str, folder: str) -> Tensor:
    model = shard(make(library, kind))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=True),
    )
    moment = optimizer.state[model.rnn.weight_hh_l0]["exp_avg"].full_tensor()
    assert moment.abs().sum() > 0
    with torch.no_grad():
        return model(*batch())


# --- rows ----------------------------------------------------------------------------------------


@works.row(SECTION, "`DistributedDataParallel`: gradients of one process, to the bit", cuda=False)
def test_ddp(library: Any, device: torch.device) -> None:
    for kind in ("LSTM", "GRU"):
        two_processes.run(ddp, name_of(library), kind, False, {})


@works.row(SECTION, "`DistributedDataParallel` with packed input", cuda=False)
def test_ddp_packed(library: Any, device: torch.device) -> None:
    two_processes.run(ddp, name_of(library), "LSTM", True, {})


@works.row(SECTION, "`DistributedDataParallel` with `no_sync()`: accumulated gradients", cuda=False)
def test_ddp_no_sync(library: Any, device: torch.device) -> None:
    two_processes.run(ddp_accumulates, name_of(library))


@works.row(SECTION, "`DistributedDataParallel` under `torch.compile`", cuda=False)
def test_ddp_compiled(library: Any, device: torch.device) -> None:
    two_processes.run(ddp_compiled, name_of(library))


@works.row(SECTION, "`fully_shard` (FSDP2): gradients of one process, to the bit", cuda=False)
def test_fully_shard(library: Any, device: torch.device) -> None:
    for kind in ("LSTM", "GRU"):
        two_processes.run(fsdp, name_of(library), kind, False)


@works.row(SECTION, "`fully_shard` with packed input", cuda=False)
def test_fully_shard_packed(library: Any, device: torch.device) -> None:
    two_processes.run(fsdp, name_of(library), "LSTM", True)


@works.row(SECTION, "`fully_shard` where the final state is changed in place", cuda=False)
def test_fully_shard_state_in_place(library: Any, device: torch.device) -> None:
    for kind in ("LSTM", "GRU"):
        two_processes.run(fsdp_state_in_place, name_of(library), kind)


@works.row(SECTION, "`fully_shard` with activation checkpointing", cuda=False)
def test_fully_shard_checkpointed(library: Any, device: torch.device) -> None:
    two_processes.run(fsdp_checkpointed, name_of(library))


@works.row(SECTION, "`fully_shard` with weights of 16 bits in the calls", cuda=False)
def test_fully_shard_in_16_bits(library: Any, device: torch.device) -> None:
    two_processes.run(fsdp_bfloat16, name_of(library))


def through_a_checkpoint(library: str, kind: str, folder: Path) -> None:
    """Two processes -> one -> two, with the optimizer's state."""
    want, _ = two_processes.run(saved, library, kind, str(folder / "of_two"))
    model = make(library, kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=str(folder / "of_two"))
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    with torch.no_grad():
        assert torch.equal(model(*batch()), want)
    train_a_step(model, batch())
    with torch.no_grad():
        want = model(*batch())
    dcp.save(state_of(model, optimizer), checkpoint_id=str(folder / "of_one"))
    for got in two_processes.run(loaded, library, kind, str(folder / "of_one")):
        assert torch.equal(got, want)


@works.row(SECTION, "distributed checkpoint, saved by 2 and loaded by 1, and back", cuda=False)
def test_distributed_checkpoint(library: Any, device: torch.device) -> None:
    with tempfile.TemporaryDirectory() as folder:
        through_a_checkpoint(name_of(library), "LSTM", Path(folder))


# --- more than a row -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "kind"),
    [*((library, kind) for library in ("rnnfast", "accelerated") for kind in KINDS)]
    + [("rnnfast", "IndRNN")],
)
def test_every_kind(library: str, kind: str) -> None:
    for packed in (False, True):
        two_processes.run(ddp, library, kind, packed, {})
        two_processes.run(fsdp, library, kind, packed)


@pytest.mark.parametrize(
    "options",
    [{"static_graph": True}, {"gradient_as_bucket_view": True}, {"bucket_cap_mb": 1e-3}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_ddp(options: dict[str, Any]) -> None:
    two_processes.run(ddp, "rnnfast", "LSTM", False, options)


def test_a_layer_without_part_in_the_loss() -> None:
    two_processes.run(ddp_with_an_idle_layer, "rnnfast")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("library", ["rnnfast", "accelerated", "torch.nn"])
def test_steps_of_an_optimizer(library: str, sharded: bool) -> None:
    two_processes.run(three_steps, library, "LSTM", sharded)


def test_checkpoint_of_other_layers(tmp_path: Path) -> None:
    through_a_checkpoint("accelerated", "GRU", tmp_path)


# --- examples/lm_distributed.py ------------------------------------------------------------------

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/lm_distributed.py"
SMALL = (
    "--device cpu --steps 12 --warmup 3 --hidden 48 --embedding 16 --batch 8 --seq-len 16"
    " --no-progress"
)


def train_example(processes: int, *options: str) -> tuple[str, float]:
    """What it says that it does, and its loss on held-out text."""
    # its own session: torchrun's workers must not survive it
    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        + ["--nproc-per-node", str(processes), str(EXAMPLE), *SMALL.split(), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as program:
        try:
            said, _ = program.communicate(timeout=120)
        except BaseException:
            os.killpg(program.pid, signal.SIGKILL)
            raise
    assert program.returncode == 0, said
    found = re.search(r"step 12: .*held out (\S+) nats", said)
    assert found, said
    return said, float(found[1])


@pytest.mark.alone
def test_the_example(tmp_path: Path) -> None:
    """Two processes learn what one learns, and go on from a checkpoint of the other kind."""
    folder = ("--checkpoint", str(tmp_path), "--save-every", "6")
    said, want = train_example(2, *folder)
    assert "2 processes on cpu, DistributedDataParallel, rnnfast, from step 0 to 12" in said
    assert want < 4.4  # ln of the number of characters, where it began, is 4.57
    for processes, options in ((1, ()), (2, ("--fsdp",))):
        shutil.rmtree(tmp_path / "00000012")  # as if it had crashed before
        said, got = train_example(processes, *folder, *options)
        assert "from step 6 to 12" in said
        assert got == pytest.approx(want, rel=1e-4)


# --- the two processes themselves ----------------------------------------------------------------


def fails_in_one(rank: int) -> int:
    if rank == 1:
        raise ValueError("on purpose")
    return rank


def hangs_in_one(rank: int) -> None:
    if rank == 0:
        dist.barrier()
    time.sleep(1000)


def test_errors_and_hangs_end_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="(?s)process 1:.*on purpose"):
        two_processes.run(fails_in_one)
    monkeypatch.setattr(two_processes, "LIMIT", 1.0)
    with pytest.raises(TimeoutError, match="hangs_in_one: process 0 is silent"):
        two_processes.run(hangs_in_one)
    assert two_processes._running is None
