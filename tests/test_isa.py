"""Every instruction set that this machine has, forced in turn, proved to have run, and right."""

from __future__ import annotations

import os
import subprocess
import sys

import cases
import pytest
import tolerance
import torch
from cases import Case

import rnnfast

ISAS = {"portable": 0, "avx2": 1, "avx512": 2, "neon": 3, "avx512_bf16": 4, "amx": 5}
AVAILABLE = [name for name, number in ISAS.items() if torch.ops.rnnfast.isa_available(number)]
# for float32 and float64 the others run avx512's kernels
FORCED = [name for name in AVAILABLE if name not in ("avx512_bf16", "amx")]
MISSING = [name for name in ISAS if name not in AVAILABLE]
CASES = [
    *cases.small_cases(),
    *[c for c in cases.engine_cases() if c.batch and c.hidden < 300][::12],
    Case("lstm", 4, 9, 16, 320, threads=2),
]


def test_what_is_available_is_what_the_processor_has() -> None:
    assert "portable" in AVAILABLE
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX2", "AVX512"):
        assert "avx2" in AVAILABLE and "neon" in MISSING
    if capability == "AVX512":
        assert "avx512" in AVAILABLE


@pytest.mark.parametrize("kernel", ["packed", "direct"])
@pytest.mark.parametrize("isa", FORCED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forced_isa(case: Case, isa: str, kernel: str) -> None:
    problem, ref, peer = cases.solved(case)
    torch.set_num_threads(case.threads)
    runs = torch.ops.rnnfast.last_run(5)
    with rnnfast.use_engine("cpu", isa=isa, kernel=kernel):
        ours = cases.run_rnnfast(problem)
        proof = rnnfast.last_run()
    assert proof["engine"] == "cpu" and proof["isa"] == isa
    assert proof["kernel_ih"] == kernel
    assert proof["kernel_hh"] == ("diagonal" if case.cell.startswith("indrnn") else kernel)
    assert torch.ops.rnnfast.last_run(5) == runs + 2, "one forward and one backward"
    tolerance.check(ours, peer, ref, case.dtype)


def test_last_run_counts_runs() -> None:
    problem, _, _ = cases.solved(CASES[0])
    _, args = cases.op_inputs(problem, grad=False)
    before = torch.ops.rnnfast.last_run(5)
    for _ in range(3):
        torch.ops.rnnfast.forward(*args, None, 0, False, False)
    assert torch.ops.rnnfast.last_run(5) == before + 3


def test_the_choice_is_restored() -> None:
    problem, _, _ = cases.solved(CASES[0])

    def isa_of_a_run() -> str:
        cases.run_rnnfast(problem)
        isa = rnnfast.engine.active_isa()
        assert rnnfast.last_run()["isa"] == rnnfast.engine.ran_isa(isa, False)
        return isa

    usual = isa_of_a_run()
    with rnnfast.use_engine("cpu", isa="portable"):
        assert isa_of_a_run() == "portable"
        for isa in AVAILABLE:
            with rnnfast.use_engine("cpu", isa=isa):
                assert isa_of_a_run() == isa
        assert isa_of_a_run() == "portable"
    assert isa_of_a_run() == usual
    with pytest.raises(ZeroDivisionError), rnnfast.use_engine("cpu", isa="portable"):
        raise ZeroDivisionError
    assert isa_of_a_run() == usual


@pytest.mark.parametrize("isa", MISSING)
def test_unavailable_isa_raises(isa: str) -> None:
    with pytest.raises(RuntimeError, match=isa):
        rnnfast.use_engine("cpu", isa=isa)
    with pytest.raises(RuntimeError, match="rnnfast"):
        torch.ops.rnnfast.set_isa(ISAS[isa])
    problem, ref, peer = cases.solved(CASES[0])
    tolerance.check(cases.run_rnnfast(problem), peer, ref, CASES[0].dtype)


@pytest.mark.parametrize(
    ("name", "options"),
    [("turbo", {}), ("cpu", {"isa": "sse9"}), ("cpu", {"kernel": "magic"}), ("", {}), ("cuda", {})],
)
def test_unknown_engine_raises(name: str, options: dict[str, str]) -> None:
    with pytest.raises((RuntimeError, ValueError), match="rnnfast"):
        rnnfast.use_engine(name, **options)


SCRIPT = """
import torch, rnnfast
y, _ = rnnfast.LSTM(5, 9)(torch.ones(3, 2, 5))
assert torch.isfinite(y).all()
print(rnnfast.engine.active_isa(), rnnfast.last_run()["isa"])
"""


def in_subprocess(isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RNNFAST_CPU": isa}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("isa", AVAILABLE)
def test_environment_variable(isa: str) -> None:
    done = in_subprocess(isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa, isa if isa in FORCED else "avx512"]


@pytest.mark.parametrize("isa", [*MISSING, "nonsense"])
def test_environment_variable_that_cannot_be(isa: str) -> None:
    """It fails at import, with a sentence that names the variable and what it held."""
    done = in_subprocess(isa)
    assert done.returncode == 1, "a crash or a success"
    assert "RNNFAST_CPU" in done.stderr and isa in done.stderr
    assert "import" in done.stderr and "LSTM" not in done.stderr.split("RNNFAST_CPU")[-1]
