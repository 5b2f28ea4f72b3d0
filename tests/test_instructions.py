"""No kernel takes more instructions than was accepted, and this check can fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import instructions
import pytest

ACCEPTED = instructions.load()

# Of vectors and one multiply-add each, the best loop there could be takes a little more than one.
LEAST, MOST = 1.0, 6.0


def countable() -> None:
    if reason := instructions.why_not():
        pytest.skip(reason)


def test_counts_are_within_their_bounds() -> None:
    """All kernels in one test, so that one entry in expected_skips.txt covers the machine."""
    countable()
    counts = [instructions.count(kernel) for kernel in instructions.KERNELS]
    for now in counts:
        print(instructions.describe(now, ACCEPTED[now.kernel]))
    faults = [instructions.complaint(now, ACCEPTED[now.kernel]) for now in counts]
    assert not any(faults), "\n".join(fault for fault in faults if fault)


def test_double_work_is_noticed() -> None:
    countable()
    twice = instructions.count("lstm_step", calls=2)
    once = ACCEPTED["lstm_step"]
    assert twice.instructions > 1.9 * instructions.count("lstm_step").instructions
    fault = instructions.complaint(twice, once)
    assert fault is not None and "more" in fault and instructions.ACCEPT in fault


@pytest.mark.parametrize("kernel", instructions.KERNELS)
@pytest.mark.parametrize(
    ("excess", "other_compiler", "passes"),
    [
        (0.0, False, True),
        (-0.5, False, True),  # fewer is welcome
        (instructions.SAME_COMPILER - 0.005, False, True),
        (instructions.SAME_COMPILER + 0.005, False, False),
        (instructions.SAME_COMPILER + 0.005, True, True),
        (instructions.OTHER_COMPILER + 0.005, True, False),
    ],
)
def test_the_bounds(kernel: str, excess: float, other_compiler: bool, passes: bool) -> None:
    accepted = ACCEPTED[kernel]
    compiler = "another 1.0" if other_compiler else accepted.compiler
    now = replace(
        accepted, instructions=round(accepted.instructions * (1 + excess)), compiler=compiler
    )
    fault = instructions.complaint(now, accepted)
    assert (fault is None) == passes
    if fault:
        assert f"{excess:.1%} more" in fault and kernel in fault


def test_a_figure_of_another_shape_is_no_figure() -> None:
    accepted = ACCEPTED["lstm_step"]
    fault = instructions.complaint(replace(accepted, shape="T2 B1 I256 H256"), accepted)
    assert fault is not None and "T2 B1 I256 H256" in fault


def test_the_file_is_complete_and_written_as_read(tmp_path: Path) -> None:
    assert set(ACCEPTED) == set(instructions.KERNELS)
    for figure in ACCEPTED.values():
        assert LEAST < figure.per_fma < MOST
    copy = tmp_path / "figures.json"
    instructions.save(list(ACCEPTED.values()), copy)
    assert copy.read_text(encoding="utf-8") == instructions.FIGURES.read_text(encoding="utf-8")


def test_nothing_counted_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A valgrind that runs but counts nothing must not pass as a good figure."""
    fake = tmp_path / "valgrind"
    fake.write_text("#!/bin/sh\necho 'Collected : 0' >&2\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(instructions, "program", lambda: Path("/bin/true"))
    with pytest.raises(RuntimeError, match=r"lstm_step must run under valgrind and be counted"):
        instructions.count("lstm_step")
