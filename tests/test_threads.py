"""Threads in every number: fewer than asked for, more than there are, many at once, after a fork.

Each time limit is only a guard against hanging. Arrangements that could make a barrier hang or
crawl: test_hangs.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

import cases
import oracle
import pytest
import tolerance
import torch
from cases import Case

import rnnfast

pytestmark = pytest.mark.alone
HANG = 120  # seconds

CASES = [
    Case("lstm", 7, 33, 16, 64),
    Case("gru", 7, 1, 16, 384),
    Case("lstm", 9, 3, 16, 320),
    Case("rnn_relu", 5, 13, 16, 33, packed=True),
    Case("indrnn_tanh", 7, 7, 16, 130),
]


def in_threads(work: Any, count: int) -> list[Any]:
    """Runs work(k) in Python threads that start together; their results, or the first error."""
    results: list[Any] = [None] * count
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def run(k: int) -> None:
        try:
            start.wait(HANG)
            results[k] = work(k)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_number_of_threads_changes_at_any_time(case: Case) -> None:
    problem, ref, peer = cases.solved(case)

    def work(_: int) -> None:
        for threads in (1, 2, 3, 8, 1, 5, 2):
            torch.set_num_threads(threads)
            tolerance.check(cases.run_rnnfast(problem), peer, ref, case.dtype)
            assert 1 <= rnnfast.last_run()["threads"] <= threads

    in_threads(work, 1)


@pytest.mark.parametrize("count", [2, 5])
def test_several_python_threads_at_once(count: int) -> None:
    """Different shapes and cells at the same time, forward and backward: each as if alone."""
    solved = [cases.solved(case) for case in CASES]

    def work(k: int) -> list[tuple[int, cases.Tensors]]:
        return [
            (j, cases.run_rnnfast(solved[j][0]))
            for _ in range(4)
            for j in ((k + s) % len(solved) for s in range(len(solved)))
        ]

    for results in in_threads(work, count):
        for j, ours in results:
            tolerance.check(ours, solved[j][2], solved[j][1], CASES[j].dtype)


def test_one_layer_shared_by_threads() -> None:
    layer = rnnfast.LSTM(16, 64, num_layers=2)
    x = torch.randn(7, 5, 16)
    with torch.no_grad():
        want = layer(x)[0]
    torch.set_num_threads(2)

    def work(_: int) -> list[torch.Tensor]:
        with torch.no_grad():
            return [layer(x)[0] for _ in range(10)]

    for outputs in in_threads(work, 4):
        for y in outputs:
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)


def test_last_run_belongs_to_the_thread() -> None:
    small, large = cases.solved(Case("lstm", 3, 2, 5, 9))[0], cases.solved(CASES[4])[0]

    def work(k: int) -> str:
        for _ in range(20):
            cases.run_rnnfast((small, large)[k])
        return str(rnnfast.last_run()["kernel_hh"])

    first, second = in_threads(work, 2)
    assert first in ("packed", "direct") and second == "diagonal"


def test_layer_called_while_another_runs_backward() -> None:
    """A hook that calls a layer in the middle of a backward pass, which itself calls another."""
    outer, inner = rnnfast.GRU(16, 33), rnnfast.LSTM(33, 33)
    x = torch.randn(5, 6, 16, requires_grad=True)
    y, _ = outer(x)
    seen = []

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            z = gradient.detach().clone().requires_grad_()
            out, _ = inner(z)
            (dz,) = torch.autograd.grad(out.sum(), z)
        seen.append(dz)
        return gradient + dz

    y.register_hook(hook)
    y.sum().backward()
    assert len(seen) == 1 and torch.isfinite(x.grad).all()
    z = torch.ones(5, 6, 33, requires_grad=True)
    (dz,) = torch.autograd.grad(inner(z)[0].sum(), z)
    assert tolerance.same_bits(dz, seen[0])


SCRIPT = """
import json, os, sys
import torch
import rnnfast

torch.manual_seed(0)
wanted = int(sys.argv[1])
report = []
for H, B in ((64, 33), (320, 2), (384, 20)):
    layer = rnnfast.LSTM(16, H)
    x = torch.randn(6, B, 16)
    results = []
    for threads in (1, wanted, 2 * wanted):
        torch.set_num_threads(threads)
        layer.zero_grad()
        y, _ = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), [p.grad.clone() for p in layer.parameters()]))
        report.append(rnnfast.last_run())
    for y, g in results:
        torch.testing.assert_close(y, results[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(g, results[0][1], rtol=1e-3, atol=1e-3)
print(json.dumps(report))
"""


def in_subprocess(script: str, *args: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_THREAD_LIMIT": "1"},
        {"OMP_THREAD_LIMIT": "2"},
        {"OMP_THREAD_LIMIT": "3", "OMP_NUM_THREADS": "8"},
        {"OMP_DYNAMIC": "true"},
        {"OMP_DYNAMIC": "true", "OMP_NUM_THREADS": "8"},
        {"OMP_NUM_THREADS": "1"},
        {"OMP_MAX_ACTIVE_LEVELS": "0"},
        {"OMP_WAIT_POLICY": "passive", "OMP_PROC_BIND": "true"},
    ],
    ids=lambda e: ",".join(f"{k}={v}" for k, v in e.items()),
)
def test_the_pool_gives_fewer_threads_than_asked(environment: dict[str, str]) -> None:
    """Then fewer do the work, and nobody waits for one that never comes."""
    report = json.loads(in_subprocess(SCRIPT, "4", **environment).splitlines()[-1])
    assert len(report) == 9
    if environment.get("OMP_THREAD_LIMIT") == "1":
        assert all(run["threads"] == 1 for run in report if run["split"] == "serial")


FORK = """
import os, sys, time
import torch
import rnnfast

torch.set_num_threads(2)
torch.manual_seed(0)
arguments = []
for H, B in ((64, 33), (384, 2)):
    x, h, c = torch.randn(6, B, 16), torch.zeros(B, H), torch.zeros(1, B, H)
    w = [torch.randn(4 * H, 16) / 8, torch.randn(4 * H, H) / H**0.5]
    arguments.append((x, h, c, *w, torch.zeros(4 * H), torch.zeros(4 * H), *[None] * 3))

def both(args):
    y, h_n, c_n, saved = torch.ops.rnnfast.forward(*args, None, 0, False, True)
    grads = torch.ops.rnnfast.backward(y, h_n, c_n, *args, y, saved, 0, False, 127)
    return [y, h_n, c_n, *grads]

def close(a, b):
    # numpy, since torch's own pool is dead in the child
    import numpy as np
    return all(np.allclose(p.numpy(), q.numpy(), rtol=1e-3, atol=1e-3) for p, q in zip(a, b))

want = [both(args) for args in arguments]

def good():
    return all(close(both(args), expected) for args, expected in zip(arguments, want))

children = []
for k in range(3):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if good() else 2
            if k == 2:  # a child of the child
                inner = os.fork()
                if inner == 0:
                    os._exit(0 if good() else 3)
                code = code or os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])
        finally:
            os._exit(code)
    children.append(pid)
# the parent goes on working beside its children
for _ in range(5):
    assert good()
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
assert codes == [0, 0, 0], codes
print("done")
"""


def test_after_fork() -> None:
    """A forked child has none of its parent's threads: it must finish, and be right."""
    assert in_subprocess(FORK).split()[-1] == "done"


LOADER = """
import torch
import rnnfast

class Features(torch.utils.data.Dataset):
    def __init__(self):
        self.layer = rnnfast.GRU(16, 64)
    def __len__(self):
        return 6
    def __getitem__(self, k):
        with torch.no_grad():
            return self.layer(torch.full((5, 3, 16), float(k)))[0]

if __name__ == "__main__":
    data = Features()
    want = [data[k] for k in range(6)]
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    for got, expected in zip(loader, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    print("done")
"""


def test_in_the_workers_of_a_data_loader() -> None:
    assert in_subprocess(LOADER).split()[-1] == "done"


def test_more_threads_than_processors() -> None:
    """Sixteen on a small machine: slow is allowed, hanging and wrong numbers are not."""
    solved = [cases.solved(case) for case in CASES]

    def work(_: int) -> None:
        torch.set_num_threads(16)
        for case, (problem, ref, peer) in zip(CASES, solved, strict=True):
            for _ in range(3):
                tolerance.check(cases.run_rnnfast(problem), peer, ref, case.dtype)

    in_threads(work, 1)


@pytest.mark.parametrize("cell", oracle.CELLS)
def test_two_threads_are_used_where_there_is_work(cell: str) -> None:
    problem = cases.build(Case(cell, 20, 32, 128, 128))
    _, args = cases.op_inputs(problem, grad=False)

    def run(threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        torch.ops.rnnfast.forward(*args, None, oracle.CELL_IDS[cell], False, True)
        return dict(rnnfast.last_run())

    def work(_: int) -> None:
        # A thread whose team came late works alone for a while: on a busy machine ask again.
        end = time.monotonic() + 20
        while run(2)["threads"] != 2:
            assert time.monotonic() < end, "two threads must run at once, got one for 20 s"
            time.sleep(0.05)
        alone = run(1)
        assert (alone["threads"], alone["split"]) == (1, "serial")

    in_threads(work, 1)
