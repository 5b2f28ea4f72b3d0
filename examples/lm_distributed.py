"""Train the character language model of char_lm.py on many processes, by torchrun.

Two processes of this machine::

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/lm_distributed.py

The same on N machines of 8 GPUs each, run on every one of them::

    torchrun --nnodes N --nproc-per-node 8 --rdzv-id lm --rdzv-backend c10d \\
        --rdzv-endpoint FIRST_HOST:29500 examples/lm_distributed.py --batch 4096

``--fsdp`` shards weights and optimizer (FSDP2's ``fully_shard``) in place of
DistributedDataParallel. ``--checkpoint FOLDER``, which all machines must see, saves every
``--save-every`` steps, and goes on from the newest one that is complete: after a crash (torchrun's
``--max-restarts`` starts the processes again), or by the same command on more or fewer processes.

The batch is that of all processes together: each takes its own rows of it, so the numbers do not
depend on how many there are. So a checkpoint holds everything, the state that streams carry from
step to step included.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from char_lm import CharModel, Corpus, cross_entropy, read_library
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import rnnfast


def shared_text(rank: int) -> str:
    """The text of the first process, whatever Python the others have."""
    texts = [read_library() if rank == 0 else None]
    dist.broadcast_object_list(texts)
    assert texts[0] is not None
    return texts[0]


def mean(value: Tensor) -> float:
    """Over all processes."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


class Trainer:
    """Model, optimizer, this process's rows of the text, and the state that they carry."""

    def __init__(self, args: argparse.Namespace, mesh: DeviceMesh, device: torch.device) -> None:
        self.args, self.mesh, rank = args, mesh, mesh.get_rank()
        self.corpus = Corpus(shared_text(rank), args.batch, args.seq_len, device)
        mine = slice(rank * args.batch // mesh.size(), (rank + 1) * args.batch // mesh.size())
        self.train, self.valid = self.corpus.train[mine], self.corpus.valid[mine]

        torch.manual_seed(args.seed)  # the same weights everywhere
        model = CharModel(len(self.corpus.chars), args.embedding, args.hidden, args.layers)
        model = model.to(device)
        if args.library == "rnnfast":
            rnnfast.accelerate(model)
        self.model: nn.Module
        if args.fsdp:
            fully_shard(model.rnn, mesh=mesh)
            self.model = fully_shard(model, mesh=mesh)
        else:
            ids = None if device.type == "cpu" else [device.index]
            self.model = DistributedDataParallel(model, device_ids=ids)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), args.lr, fused=True)
        shape = (args.layers, len(self.train), args.hidden)
        self.carried = (torch.zeros(shape, device=device), torch.zeros(shape, device=device))
        self.step = 0

    def rate(self) -> float:
        """Learning rate of this step: a warm-up, then half a cosine."""
        warm = min(1.0, (self.step + 1) / self.args.warmup)
        return self.args.lr * warm * (1 + math.cos(math.pi * self.step / self.args.steps)) / 2

    def advance(self) -> Tensor:
        """One step of training; the loss of this process's rows."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        inputs, targets = self.corpus.chunk(self.step, self.train)
        logits, (h, c) = self.model(inputs, self.carried)
        self.carried = (h.detach(), c.detach())
        loss = cross_entropy(logits, targets)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss

    @torch.no_grad()
    def validate(self) -> float:
        """Nats a character on the held-out ends of all streams."""
        state, losses = None, []
        for step in range((self.valid.shape[1] - 1) // self.corpus.seq_len):
            inputs, targets = self.corpus.chunk(step, self.valid)
            logits, state = self.model(inputs, state)
            losses.append(cross_entropy(logits, targets))
        return mean(torch.stack(losses).mean())

    # --- checkpoints: whole tensors for the reader, whatever each process holds of them ---------

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        whole = [DTensor.from_local(part, self.mesh, [Shard(1)]) for part in self.carried]
        return {"model": model, "optimizer": optimizer, "h": whole[0], "c": whole[1]}

    def save(self) -> None:
        dcp.save(self.state(), checkpoint_id=self.args.checkpoint / f"{self.step:08d}")

    def resume(self) -> None:
        """Go on from the newest complete checkpoint, if there is one."""
        # what a crash left half-written has no .metadata, which comes last
        done = sorted(file.parent for file in self.args.checkpoint.glob("*/.metadata"))
        found = [done[-1] if done and self.mesh.get_rank() == 0 else None]
        dist.broadcast_object_list(found)
        if found[0] is None:
            return
        state = self.state()
        dcp.load(state, checkpoint_id=found[0])
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.carried = (state["h"].to_local(), state["c"].to_local())
        self.step = int(found[0].name)


def steps(trainer: Trainer, show: bool) -> Iterator[int]:
    """The numbers of the steps to do, behind a bar on the first process."""
    todo = range(trainer.step, trainer.args.steps)
    if not show:
        yield from todo
        return
    from tqdm import tqdm

    with tqdm(total=trainer.args.steps, initial=trainer.step, unit="step") as bar:
        for step in todo:
            yield step
            if (step + 1) % trainer.args.log_every == 0:
                bar.set_postfix_str(f"loss {trainer.loss:.3f}", refresh=False)
            bar.update()


def work(args: argparse.Namespace, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    trainer = Trainer(args, mesh, device)
    first = mesh.get_rank() == 0
    if args.checkpoint:
        trainer.resume()
    begun, start = trainer.step, time.perf_counter()
    if begun >= args.steps:
        if first:
            print(f"{args.checkpoint} has all {begun} steps already; raise --steps to go on")
        return
    if first:
        way = "fully_shard" if args.fsdp else "DistributedDataParallel"
        print(
            f"{mesh.size()} processes on {device.type}, {way}, {args.library}, "
            f"from step {begun} to {args.steps}",
            flush=True,
        )
    trainer.loss = math.nan
    for step in steps(trainer, first and args.progress):
        loss = trainer.advance()
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            trainer.loss = mean(loss)
        if args.checkpoint and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            trainer.save()
    rate = (trainer.step - begun) * args.batch * args.seq_len / (time.perf_counter() - start)
    held_out = trainer.validate()
    if first:
        print(
            f"step {trainer.step}: loss {trainer.loss:.6f}, held out {held_out:.6f} nats a "
            f"character, {rate:,.0f} characters/s"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--library", choices=("rnnfast", "torch.nn"), default="rnnfast")
    parser.add_argument("--fsdp", action="store_true", help="fully_shard in place of DDP")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=30, help="steps of a rising learning rate")
    parser.add_argument("--batch", type=int, default=32, help="rows of all processes together")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--embedding", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=4e-3, help="peak of the learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="folder to save to and go on from")
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--log-every", type=int, default=10, help="steps between shown losses")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node N examples/lm_distributed.py")
    if args.batch % int(os.environ["WORLD_SIZE"]):
        parser.error(f"--batch {args.batch} can't be shared by {os.environ['WORLD_SIZE']} evenly")
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    work(args, device)
    dist.destroy_process_group()  # when nothing holds a tensor any more


if __name__ == "__main__":
    main()
