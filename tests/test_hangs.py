"""Arrangements of threads in which a barrier could hang or crawl, each in a process of its own.

A hang ends with that process and fails one test. What is meant as speed is a ratio, with room for a
busy machine. Fewer threads than asked for, several Python threads and forks: test_threads.py.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_threads import in_subprocess

pytestmark = pytest.mark.alone
PROGRAM = Path(__file__).parents[1] / "build/dev/team_tests"
LIMIT = 60  # seconds: every check of the program takes less than one
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
CHECKS = (
    "four_on_two",
    "eight_on_two",
    "two_on_one",
    "late_member",
    "late_pool",
    "pause",
    "priorities",
    "followers",
    "many_masters",
    "nested",
    "forked",
    "long_run",
    "quota",
)


@pytest.mark.parametrize("check", CHECKS)
def test_teams_of_the_core(check: str) -> None:
    """tests/cpp/team_tests.cpp: teams past the caps that the package puts before them."""
    assert PROGRAM.is_file(), "build with RNNFAST_DEV=1 first"
    done = subprocess.run(
        [str(PROGRAM), check], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_check_of_the_program_is_run() -> None:
    listed = subprocess.run([str(PROGRAM)], capture_output=True, text=True, check=True).stdout
    assert tuple(listed.split()) == CHECKS


def test_stopped_and_continued() -> None:
    """SIGSTOP in the middle of a team's work, as by a debugger or a job scheduler."""
    with subprocess.Popen([str(PROGRAM), "long_run"], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None and program.stdout.readline() == "running\n"
        for _ in range(3):
            time.sleep(0.05)
            program.send_signal(signal.SIGSTOP)
            time.sleep(0.1)
            program.send_signal(signal.SIGCONT)
        try:
            assert program.wait(LIMIT) == 0
        finally:
            program.kill()


# What the scripts below share: two layers, one for each split, and how they look on one thread.
BEGIN = """
import os, sys, threading, time
import torch
import rnnfast

torch.manual_seed(0)
torch.set_num_threads(1)
layers, inputs, want = [], [], []
for H, B in ((64, 33), (320, 3)):
    layers.append(rnnfast.LSTM(16, H).requires_grad_(False))
    inputs.append(torch.randn(12, B, 16))
    want.append(layers[-1](inputs[-1])[0])

def run():
    return [layer(x)[0] for layer, x in zip(layers, inputs)]

def good(outputs=None):
    return all((y - w).abs().max() < 1e-5 for y, w in zip(outputs or run(), want))
"""

NESTED = """
import ctypes
# the OpenMP runtime that torch has loaded, called as compiled code calls it
names = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
assert len(names) == 1, names
omp = ctypes.CDLL(names.pop())
torch.set_num_threads(2)
assert good()
inside, fine = [], []

def region(_):
    inside.append(omp.omp_in_parallel())
    for _ in range(3):
        fine.append(good())

function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(region)
for members in (1, 2, 4):
    omp.GOMP_parallel(function, None, members, 0)
assert sum(map(bool, inside)) >= 6 and all(fine) and len(fine) == 21, (inside, fine)
assert good()
print("done")
"""


@ON_LINUX
def test_inside_a_parallel_region() -> None:
    """Each member of an OpenMP region calls layers: the pool is taken, so each works alone."""
    assert in_subprocess(BEGIN + NESTED).split()[-1] == "done"


OTHER_POOLS = '''
from concurrent.futures import ThreadPoolExecutor
torch.set_num_threads(2)
with ThreadPoolExecutor(4) as pool:
    assert all(pool.map(lambda _: good(), range(24)))

# torch's own inter-op threads
w = [p.detach() for p in layers[1].parameters()]
h = torch.zeros(3, 320)

arguments = "x, h, c, w_ih, w_hh, b_ih, b_hh"
script = torch.jit.CompilationUnit(f"""
def one({arguments}):
    return torch.ops.rnnfast.forward({arguments}, None, None, None, None, 0, False, False)[0]

def some({arguments}):
    a = torch.jit.fork(one, {arguments})
    b = torch.jit.fork(one, {arguments})
    c_ = one({arguments})
    return torch.jit.wait(a), torch.jit.wait(b), c_
""")
some = script.some
for _ in range(5):
    for y in some(inputs[1], h, h[None], *w):
        assert (y - want[1]).abs().max() < 1e-5
print("done", flush=True)
os._exit(0)  # torch aborts now and then when it takes its inter-op threads down
'''


def test_from_threads_of_other_pools() -> None:
    assert in_subprocess(BEGIN + OTHER_POOLS).split()[-1] == "done"


CHANGING = """
stop = False

def change():
    k = 0
    while not stop:
        torch.set_num_threads(1 + k % 5)
        k += 1
        time.sleep(1e-3)

threads = [threading.Thread(target=change) for _ in range(2)]
for thread in threads: thread.start()
fine = [good() for _ in range(60)]
stop = True
for thread in threads: thread.join()
assert all(fine)
print("done")
"""


def test_number_of_threads_changes_during_calls() -> None:
    """By other Python threads, so that what a call was told and what the pool has may differ."""
    assert in_subprocess(BEGIN + CHANGING).split()[-1] == "done"


POOL_OF_PROCESSES = """
import multiprocessing

def work(k):
    # the operator alone: torch's own pool is dead in a forked child
    h = torch.zeros(33, 64)
    args = [inputs[0], h, h[None], *w, None, None, None, None, 0, False, False]
    return float((torch.ops.rnnfast.forward(*args)[0] - want[0]).abs().max()) < 1e-5

if __name__ == "__main__":
    w = [p.detach() for p in layers[0].parameters()]
    torch.set_num_threads(2)
    assert good()
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert all(pool.map(work, range(12)))
    assert good()
    print("done")
"""


def test_in_a_forked_pool_of_processes() -> None:
    assert in_subprocess(BEGIN + POOL_OF_PROCESSES).split()[-1] == "done"


PINNED = """
torch.set_num_threads(4)
x, layer = torch.randn(20, 32, 128), rnnfast.LSTM(128, 256).requires_grad_(False)
allowed = os.sched_getaffinity(0)
for processors in (len(allowed), 1, min(2, len(allowed)), 1, len(allowed)):
    os.sched_setaffinity(0, set(sorted(allowed)[:processors]))
    for _ in range(3):
        layer(x)
        assert rnnfast.last_run()["threads"] <= processors, rnnfast.last_run()
        assert good()
print("done")
"""


@ON_LINUX
def test_pinned_after_the_import() -> None:
    """No more workers than processors, whenever the process is bound to fewer of them."""
    assert in_subprocess(BEGIN + PINNED).split()[-1] == "done"


CROWDED = """
os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:int(sys.argv[1])]))
x, layer = torch.randn(40, 16, 128), rnnfast.LSTM(128, 256).requires_grad_(False)

def best(threads):
    torch.set_num_threads(threads)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        layer(x)
        times.append(time.perf_counter() - start)
    return min(times)

best(1)
print(min(best(int(sys.argv[2])) / best(1) for _ in range(3)))
"""


@ON_LINUX
@pytest.mark.parametrize(("processors", "threads"), [(1, 2), (2, 4), (2, 16)])
def test_more_threads_than_processors_cost_little(processors: int, threads: int) -> None:
    ratio = float(in_subprocess(BEGIN + CROWDED, str(processors), str(threads)).split()[-1])
    assert ratio <= 3, f"{threads} threads on {processors} processors take {ratio:.2f} times one's"


BUSY = """
import subprocess
x, layer = torch.randn(1, 1, 512), rnnfast.LSTM(512, 512).requires_grad_(False)

def calls(threads, seconds):
    torch.set_num_threads(threads)
    count, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        layer(x)
        count += 1
    return count

hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
try:
    calls(1, 0.2), calls(2, 0.2)
    alone = together = 0
    for _ in range(5):
        alone += calls(1, 0.3)
        together += calls(2, 0.3)
finally:
    for hog in hogs:
        hog.kill()
print(alone / together)
"""


def test_short_calls_beside_busy_processes() -> None:
    """A team whose members wait for a processor must not make a call of 0.3 ms one of 8 ms."""
    ratio = float(in_subprocess(BEGIN + BUSY).split()[-1])
    assert ratio <= 4, f"one thread makes {ratio:.1f} times as many short calls as two"
