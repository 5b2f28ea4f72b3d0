"""Shared by every test: seeds, restored threads and engine, the list of permitted skips."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parent))  # bench; last, so that an installed rnnfast is the one tested
EXPECTED_SKIPS = HERE / "expected_skips.txt"


def pytest_configure(config: pytest.Config) -> None:
    # The same on any machine; tests of threads ask for more, and references gain nothing.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean_slate() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    if "rnnfast" in sys.modules:
        sys.modules["rnnfast"].use_engine("auto")


def _listed() -> set[str]:
    """Ids of the tests that may be skipped, one a line; # starts a comment, ? is for machines."""
    lines = EXPECTED_SKIPS.read_text(encoding="utf-8").splitlines()
    return {line.split("#")[0].strip() for line in lines} - {""}


def expected_skips() -> set[str]:
    return {name.lstrip("? ") for name in _listed()}


def skipped_everywhere() -> set[str]:
    """Without those that only some machines skip (?): they are not missed where they run."""
    return {name for name in _listed() if not name.startswith("?")}


def _relative(nodeid: str) -> str:
    return nodeid.split("tests/")[-1]


def _selected_all(session: pytest.Session) -> bool:
    """True when nothing narrowed the run: then an unused entry of the list is known to be so."""
    option = session.config.option
    paths = {Path(arg).resolve() for arg in session.config.args}
    return not (option.keyword or option.markexpr or getattr(option, "lf", False)) and (
        paths <= {HERE, HERE.parent}
    )


class SkipLedger:
    """Fails the run when a test is skipped without leave, or an entry of the list is not used."""

    def __init__(self) -> None:
        self.skipped: set[str] = set()

    def unexpected(self) -> set[str]:
        return self.skipped - expected_skips()

    def stale(self) -> set[str]:
        return skipped_everywhere() - self.skipped


LEDGER = SkipLedger()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        LEDGER.skipped.add(_relative(report.nodeid))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        LEDGER.skipped.add(_relative(report.nodeid))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.option.collectonly or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    wrong = LEDGER.unexpected() or (_selected_all(session) and LEDGER.stale())
    if wrong and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    for name in sorted(LEDGER.unexpected()):
        terminalreporter.write_line(
            f"SKIPPED WITHOUT LEAVE: {name} (not in tests/expected_skips.txt)", red=True
        )
    session = getattr(terminalreporter, "_session", None)
    if session is not None and not config.option.collectonly and _selected_all(session):
        for name in sorted(LEDGER.stale()):
            terminalreporter.write_line(
                f"NO LONGER SKIPPED: {name} (take it off tests/expected_skips.txt)", red=True
            )
