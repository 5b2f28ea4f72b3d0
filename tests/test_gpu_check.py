"""tools/gpu_check.sh: as a dry run, and on a stand-in for a GPU machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "gpu_check.sh"
STAGES = [
    "environment",
    "build",
    "smoke",
    "onchip",
    "onchip_bench",
    "tests",
    "memcheck",
    "racecheck",
    "synccheck",
    "initcheck",
    "exchanges",
    "bench",
]
MOST_FILES = 8

# An exchanges program without the minute that nvcc takes.
EXCHANGES = """#!/bin/sh
echo '{"program": "exchanges", "device": null, "rows": ['
echo '    {"name": "grid barrier", "parameters": {}, "status": "STATUS"}'
echo ']}'
"""

# A Python that says it has a GPU and does as told, so that every stage can be walked through.
PYTHON = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in
  *get_device_name*) echo 'Stand-in "GPU"' ;;
  *"-m cuda_sanitize"*) echo "2 passed, 9 deselected in 0.10s" ;;
  *"-m cuda"*) echo "$PYTEST"; exit "${PYTEST_STATUS:-0}" ;;
  *"bench compare"*)
    while [ "$1" != --out ]; do shift; done
    echo '{"rows": []}' >"$2"
    echo 'a point' >"${2%.json}.log"
    for picture in 1 2 3 4 5 6; do echo >"${2%.json}-$picture.png"; done ;;
  "- gpu") cat >/dev/null; [ -z "$LOAD_FAULT" ] || echo "$LOAD_FAULT" ;;
  -*) cat >/dev/null ;;
esac
"""
SANITIZER = """#!/bin/sh
echo "sanitizer $@" >>"$CALLS"
while [ "$1" != "$PYTHON" ]; do shift; done
exec "$@"
"""


def program(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def check(
    folder: Path, *arguments: str, stages: list[str] = STAGES, **more: str
) -> tuple[int, str, dict[str, Any]]:
    """Runs the script from elsewhere; its status, what it printed, and stage -> its result."""
    out = folder / "out"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "GPU_CHECK"))}
    env |= {
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "GPU_CHECK_STAGES": " ".join(stages),
        "RNNFAST_WHEELS": str(folder / "none"),
        "CALLS": str(folder / "calls"),
        "LOAD_FAULT": "",
        "EXCHANGES": str(program(folder / "exchanges", EXCHANGES.replace("STATUS", "ok"))),
    }
    done = subprocess.run(
        [str(SCRIPT), str(out), *arguments],
        cwd=folder,
        env=env | more,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    summary = out / "summary.json"
    results = json.loads(summary.read_text()) if summary.exists() else {"stages": []}
    return done.returncode, done.stdout + done.stderr, results


def by_stage(results: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {row["stage"]: (row["status"], row["detail"]) for row in results["stages"]}


def stand_in(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a machine with a GPU."""
    tools = folder / "tools"
    tools.mkdir()
    python = program(tools / "python", PYTHON)
    program(tools / "compute-sanitizer", SANITIZER)
    path = f"{tools}:{os.environ['PATH']}"
    return {"PATH": path, "PYTHON": str(python), "PYTEST": "3 passed in 0.10s", **more}


def test_a_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    status, text, results = check(tmp_path, "200")
    stages = by_stage(results)
    assert status == 0, text + (tmp_path / "out" / "logs.txt").read_text()
    assert list(stages) == STAGES
    assert results["dry_run"] is True and results["gpu"] == ""
    assert stages["environment"][0] == "passed"
    assert {status for status, _ in stages.values()} <= {"passed", "dry", "skipped"}
    assert "no CUDA device" in stages["bench"][1]
    assert "a dry run" in text and text.splitlines()[-1].startswith("bench")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"summary.json", "logs.txt", "exchanges.json", "onchip.json", "cuda.json"} <= files
    assert len(files) <= MOST_FILES and not any(name.endswith(".log") for name in files)


def test_on_a_gpu_every_stage_is_asked_for_in_order(tmp_path: Path) -> None:
    status, text, results = check(tmp_path, "300", **stand_in(tmp_path))
    assert status == 0, text
    assert [row["status"] for row in results["stages"]] == ["passed"] * len(STAGES)
    assert results["dry_run"] is False and results["gpu"] == "Stand-in GPU"
    calls = (tmp_path / "calls").read_text()
    wanted = [
        "-m cuda_sanitize tests/test_cuda_sanitize.py -o",
        "-m cuda tests/test_cuda_onchip.py tests/test_cuda_onchip_engine.py -o",
        "--shapes onchip",
        "-m cuda tests/test_cuda.py ",
        "sanitizer --tool memcheck",
        "--tool racecheck",
        "--tool synccheck",
        "--tool initcheck",
        "--resume",
    ]
    places = [calls.index(word) for word in wanted]
    assert places == sorted(places)
    (others,) = (line for line in calls.splitlines() if "-m cuda tests/test_cuda.py " in line)
    assert "onchip" not in others and "sanitize" not in others, "they had stages of their own"
    benches = [line for line in calls.splitlines() if "bench compare" in line]
    assert len(benches) == 2 and all("--engine all" in line for line in benches)
    seconds = [int(line.split("--budget ")[1].split()[0]) for line in benches]
    # two fifths of the budget at most; and what is left, less what tables and pictures take
    assert 80 <= seconds[0] <= 120 and seconds[1] >= 140
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(files) <= MOST_FILES and "pictures.tar.gz" in files
    assert "a point" in (tmp_path / "out" / "logs.txt").read_text()


def test_failures_do_not_stop_the_later_stages(tmp_path: Path) -> None:
    fault = program(tmp_path / "broken", EXCHANGES.replace("STATUS", "wrong payload") + "exit 1\n")
    more = stand_in(tmp_path, PYTEST="1 failed, 2 passed in 0.10s", PYTEST_STATUS="1")
    stages = ["tests", "exchanges", "bench"]
    status, text, results = check(tmp_path, stages=stages, **more, EXCHANGES=str(fault))
    assert status == 1
    assert by_stage(results)["tests"] == ("failed", "1 failed, 2 passed in 0.10s")
    assert by_stage(results)["exchanges"] == ("failed", "0 of 1 rows measured")
    assert by_stage(results)["bench"][0] == "passed", text


def test_a_stage_without_results_is_no_success_on_a_gpu(tmp_path: Path) -> None:
    idle = program(tmp_path / "idle", EXCHANGES.replace("STATUS", "not measured: no CUDA device"))
    more = stand_in(tmp_path, PYTEST="3 skipped in 0.10s", LOAD_FAULT="no CUDA engine")
    more["PATH"] = str(tmp_path / "tools") + ":/usr/bin:/bin"  # whether it can build or not
    stages = ["build", "tests", "exchanges"]
    status, text, results = check(tmp_path, stages=stages, **more, EXCHANGES=str(idle))
    assert status == 1
    assert {status for status, _ in by_stage(results).values()} == {"failed"}, text


def test_a_stage_that_hangs_is_ended(tmp_path: Path) -> None:
    slow = program(tmp_path / "slow", "#!/bin/sh\nexec sleep 100\n")
    more = stand_in(tmp_path, EXCHANGES=str(slow))
    status, text, results = check(tmp_path, "18", stages=["exchanges", "bench"], **more)
    assert status == 1
    assert by_stage(results)["exchanges"][0] == "timed out"
    assert by_stage(results)["bench"][0] == "passed", text


def test_tests_without_stages_of_their_own(tmp_path: Path) -> None:
    """Whoever asks for the stage of all tests alone gets all of them, and nothing to go on from."""
    stages = ["tests", "bench"]
    status, text, _ = check(tmp_path, "300", stages=stages, **stand_in(tmp_path))
    assert status == 0, text
    calls = (tmp_path / "calls").read_text()
    assert "tests/test_cuda_onchip.py" in calls and "tests/test_cuda_sanitize.py" in calls
    assert "--resume" not in calls and "--shapes" not in calls


@pytest.mark.parametrize(
    ("arguments", "more", "words"),
    [
        (("x",), {}, "BUDGET_SECONDS must be a whole number of seconds over 0, got 'x'"),
        (("5", "6"), {}, "expected OUT_FOLDER [BUDGET_SECONDS], got 3 arguments"),
        ((), {"GPU_CHECK_STAGES": "tests lunch"}, "must be some of: environment build"),
    ],
)
def test_wrong_words_are_told(
    tmp_path: Path, arguments: tuple[str, ...], more: dict[str, str], words: str
) -> None:
    status, text, _ = check(tmp_path, *arguments, **more)
    assert status == 2
    assert words in text
