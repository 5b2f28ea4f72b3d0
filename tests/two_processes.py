"""Two processes in one gloo group, started once and asked many times.

``run(check, *args)`` calls a function of a module in both, as ``check(rank, *args)``, and gives
what each returned. They meet at a file of their own, so that runs beside each other can't collide,
and are killed where an answer takes longer than LIMIT: the next test starts new ones.
"""

from __future__ import annotations

import atexit
import datetime
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 90.0  # seconds a check may take, the start of the processes included
COUNT = 2


def _work(rank: int, file: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=LIMIT)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=COUNT, timeout=timeout
    )
    while True:
        try:
            check, args = connection.recv()
        except EOFError:
            # gloo's threads may still hold tensors, and abort where Python ends under them
            os._exit(0)
        try:
            torch.manual_seed(0)
            connection.send((check(rank, *args), ""))
        except BaseException:
            connection.send((None, traceback.format_exc()))


class _Processes:
    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp()
        context = multiprocessing.get_context("spawn")
        self.connections, self.processes = [], []
        for rank in range(COUNT):
            ours, theirs = context.Pipe()
            file = str(Path(self.folder) / "meeting")
            process = context.Process(target=_work, args=(rank, file, theirs), daemon=True)
            process.start()
            theirs.close()  # or the end of one process would not be seen here
            self.connections.append(ours)
            self.processes.append(process)

    def ask(self, check: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        end = time.monotonic() + LIMIT
        answers = []
        for connection in self.connections:
            connection.send((check, args))
        for rank, connection in enumerate(self.connections):
            if not connection.poll(max(0.0, end - time.monotonic())):
                raise TimeoutError(f"{check.__name__}: process {rank} is silent after {LIMIT} s")
            answers.append(connection.recv())
        failed = [f"process {rank}:\n{text}" for rank, (_, text) in enumerate(answers) if text]
        assert not failed, "\n".join(failed)
        return [answer for answer, _ in answers]

    def end(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


_running: _Processes | None = None


def end() -> None:
    global _running
    if _running is not None:
        _running.end()
        _running = None


atexit.register(end)


def run(check: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``check(rank, *args)`` returned in each of the processes; an error in one is raised."""
    global _running
    if _running is None:
        _running = _Processes()
    try:
        return _running.ask(check, args)
    except BaseException:
        end()  # one may wait for the other, or answer late
        raise
