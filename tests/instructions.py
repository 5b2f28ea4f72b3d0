"""Instructions of three kernels, counted by valgrind: a guard against slowdowns without noise.

``python tests/instructions.py`` counts and compares with tests/instructions.json;
``python tests/instructions.py --accept`` writes new figures there, which belong in the commit that
changed the kernels, with the reason.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
FIGURES = HERE / "instructions.json"
PROGRAM = "count_instructions"
FOLDERS = ("build/dev", "build/core")  # make test, cmake --preset core
KERNELS = ("lstm_forward", "gru_backward", "lstm_step")
ACCEPT = "python tests/instructions.py --accept"

# The same compiler makes the same code; what may still differ is the C library's memcpy.
SAME_COMPILER = 0.03
# Another one allocates registers and unrolls in its own way.
OTHER_COMPILER = 0.20


@dataclass(frozen=True)
class Count:
    kernel: str
    shape: str
    instructions: int
    floor: int  # fused multiply-adds of vectors that the products need
    compiler: str

    @property
    def per_fma(self) -> float:
        return self.instructions / self.floor


def why_not() -> str | None:
    """What this machine lacks to count at all."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the counts are of AVX2 on x86-64, this is {platform.machine()}"
    if not shutil.which("valgrind"):
        return "valgrind is not installed"
    return None


def program() -> Path:
    """The newest build of the program."""
    found = [p for p in (HERE.parent / f / PROGRAM for f in FOLDERS) if p.is_file()]
    if not found:
        raise FileNotFoundError(
            f"instructions: {PROGRAM} must be in {' or '.join(FOLDERS)}, got neither; build with "
            "RNNFAST_DEV=1, or with cmake --preset core && cmake --build --preset core"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def count(kernel: str, calls: int = 1) -> Count:
    """One kernel under callgrind, which counts only between entry and end of the call."""
    done = subprocess.run(
        [
            "valgrind",
            "--tool=callgrind",
            "--callgrind-out-file=/dev/null",
            "--toggle-collect=rnnfast_counted_calls",
            str(program()),
            kernel,
            str(calls),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    collected = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode != 0 or not collected or int(collected[1]) == 0:
        raise RuntimeError(
            f"instructions: {kernel} must run under valgrind and be counted, "
            f"got status {done.returncode} and: {done.stderr[-2000:]}"
        )
    name, shape, floor, compiler = done.stdout.splitlines()
    return Count(name, shape, int(collected[1]), int(floor), compiler)


def load(path: Path = FIGURES) -> dict[str, Count]:
    figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return {
        row["kernel"]: Count(**{k: row[k] for k in Count.__dataclass_fields__}) for row in figures
    }


def save(counts: list[Count], path: Path = FIGURES) -> None:
    rows = [{**asdict(c), "per_fma": round(c.per_fma, 3)} for c in counts]
    note = f"written by {ACCEPT}; instructions of one call, AVX2, float32, one thread"
    text = json.dumps({"note": note, "figures": rows}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def complaint(now: Count, accepted: Count) -> str | None:
    """One sentence if `now` is too many; None if it is not."""
    if (now.shape, now.floor) != (accepted.shape, accepted.floor):
        return (
            f"{now.kernel}: the figure is of {accepted.shape} ({accepted.floor} multiply-adds), "
            f"got {now.shape} ({now.floor}); accept the new one with `{ACCEPT}`"
        )
    same = now.compiler == accepted.compiler
    bound = SAME_COMPILER if same else OTHER_COMPILER
    excess = now.instructions / accepted.instructions - 1
    if excess <= bound:
        return None
    compilers = now.compiler if same else f"{now.compiler}, the figure by {accepted.compiler}"
    return (
        f"{now.kernel} {now.shape}: must take at most {accepted.instructions} instructions "
        f"+ {bound:.0%} ({compilers}), got {now.instructions}, {excess:.1%} more: "
        f"{now.per_fma:.2f} for each multiply-add, before {accepted.per_fma:.2f}. If that is "
        f"worth it, `{ACCEPT}` and say why in the commit"
    )


def describe(now: Count, accepted: Count | None) -> str:
    change = f", {now.instructions / accepted.instructions - 1:+.1%}" if accepted else ""
    return (
        f"{now.kernel:13} {now.shape:17} {now.instructions:10} instructions, "
        f"{now.per_fma:.2f} for each multiply-add of the floor{change}"
    )


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--accept"]):
        print(f"instructions: arguments must be none or --accept, got {arguments}", file=sys.stderr)
        return 2
    if reason := why_not():
        print(f"instructions: not counted, {reason}", file=sys.stderr)
        return 2
    accepted = load() if FIGURES.exists() else {}
    counts = [count(kernel) for kernel in KERNELS]
    for now in counts:
        print(describe(now, accepted.get(now.kernel)))
    if arguments:
        save(counts)
        return 0
    faults = [fault for now in counts if (fault := complaint(now, accepted[now.kernel]))]
    print(*faults, sep="\n", end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
