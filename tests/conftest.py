"""Shared by every test: seeds, restored threads and engine, the list of permitted skips."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parent))  # bench; last, so that an installed rnnfast is the one tested
EXPECTED_SKIPS = HERE / "expected_skips.txt"
# Where tests marked cuda run: "cuda", or, to try out the tests themselves without a GPU, "cpu".
# Then the CUDA engine on a device of loops (on_host.py) stands in for those that `device` serves.
CUDA_TESTS_ON = os.environ.get("RNNFAST_CUDA_TESTS_ON", "cuda")
WITHOUT_CUDA = "the CUDA engine can't run here"  # the user property of a test that is skipped so
MARKED_CUDA = "marked cuda"  # the user property of every such test, which reports carry


def pytest_configure(config: pytest.Config) -> None:
    # The same on any machine; tests of threads ask for more, and references gain nothing.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cells are compiled in each run, and leave nothing in the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RNNFAST_CACHE", str(tmp_path_factory.mktemp("cells")))
        yield


@pytest.fixture(autouse=True)
def _clean_slate() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    if "rnnfast" in sys.modules:
        sys.modules["rnnfast"].use_engine("auto")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where a test of the CUDA engine puts its tensors. float32 is not TF32 unless it says so."""
    import on_cuda

    with on_cuda.products(tf32=False):
        if CUDA_TESTS_ON == "cuda":
            yield torch.device("cuda")
            return
        import on_host

        on_host.stand_in(monkeypatch)
        on_host.fill_fresh_memory(0x01)
        yield torch.device("cpu")
        on_host.fill_fresh_memory(0)


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """As ``device``, for what only a real one has."""
    import on_cuda

    with on_cuda.products(tf32=False):
        yield torch.device("cuda")


def why_not_cuda(fixtures: Iterable[str] = ()) -> str:
    """Why tests marked cuda are skipped; a device without the engine is no reason, but a fault."""
    if CUDA_TESTS_ON == "cpu":
        return "a real device is needed" if "cuda" in fixtures else ""
    if torch.cuda.is_available():
        return ""
    from rnnfast import _cuda

    return _cuda.why_not()


# Not first: a test that is skipped for another reason, too, is not excused by this one.
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None:
        return
    why = why_not_cuda(getattr(item, "fixturenames", ()))
    if why:
        item.user_properties.append((WITHOUT_CUDA, why))
        pytest.skip(f"{WITHOUT_CUDA}: {why}")
    if CUDA_TESTS_ON == "cuda":
        import rnnfast
        from rnnfast import _cuda

        if "cuda" not in rnnfast.engines():
            pytest.fail(f"torch has a CUDA device, and the engine is missing: {_cuda.why_not()}")


def _lines() -> list[str]:
    lines = EXPECTED_SKIPS.read_text(encoding="utf-8").splitlines()
    return [text for line in lines if (text := line.split("#")[0].strip())]


def _listed() -> set[str]:
    """Ids of the tests that may be skipped, one a line; # starts a comment, ? is for machines."""
    return {line for line in _lines() if "=" not in line.split("::")[0]}


def cuda_tests_listed() -> int:
    """How many tests are marked cuda, by the line ``cuda = NUMBER``."""
    for line in _lines():
        name, _, number = line.partition("=")
        if name.strip() == "cuda":
            return int(number)
    return 0


def expected_skips() -> set[str]:
    return {name.lstrip("? ") for name in _listed()}


def skipped_everywhere() -> set[str]:
    """Without those that only some machines skip (?): they are not missed where they run."""
    return {name for name in _listed() if not name.startswith("?")}


def _relative(nodeid: str) -> str:
    return nodeid.split("tests/")[-1]


def _selected_all(session: pytest.Session, marker: str = "") -> bool:
    """True when nothing but ``-m marker`` narrowed the run, or it is the part of `make test` that
    holds every expected skip and every test of CUDA: then an unused entry is known to be so."""
    option = session.config.option
    paths = {Path(arg).resolve() for arg in session.config.args}
    return (
        not (option.keyword or getattr(option, "lf", False))
        and option.markexpr in ("", "not alone", marker)
        and paths <= {HERE, HERE.parent}
    )


class SkipLedger:
    """Fails the run when a test is skipped without leave, or an entry of the list is not used; and
    when tests marked cuda, which only few machines run, became fewer or more unsaid."""

    def __init__(self) -> None:
        self.skipped: set[str] = set()
        self.without_cuda: dict[str, str] = {}  # the reason
        self.cuda_tests: set[str] = set()  # collected

    def unexpected(self) -> set[str]:
        return self.skipped - expected_skips() - self.without_cuda.keys()

    def stale(self) -> set[str]:
        return skipped_everywhere() - self.skipped

    def cuda_miscounted(self, session: pytest.Session) -> str:
        """What is wrong with the number of tests marked cuda; empty if nothing."""
        listed = cuda_tests_listed()
        if len(self.cuda_tests) == listed or not _selected_all(session, "cuda"):
            return ""
        return (
            f"MARKED cuda: {len(self.cuda_tests)} tests, not the {listed} "
            "of tests/expected_skips.txt (cuda = ...)"
        )


LEDGER = SkipLedger()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = _relative(report.nodeid)
    properties = dict(report.user_properties)
    if MARKED_CUDA in properties:
        LEDGER.cuda_tests.add(name)
    if report.skipped and not hasattr(report, "wasxfail"):
        LEDGER.skipped.add(name)
        why = properties.get(WITHOUT_CUDA)
        if why is not None:
            LEDGER.without_cuda[name] = str(why)


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is not None:
        LEDGER.cuda_tests.add(_relative(item.nodeid))
        item.user_properties.append((MARKED_CUDA, True))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        LEDGER.skipped.add(_relative(report.nodeid))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.option.collectonly or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    wrong = (
        LEDGER.unexpected()
        or (_selected_all(session) and LEDGER.stale())
        or LEDGER.cuda_miscounted(session)
    )
    if wrong and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    for name in sorted(LEDGER.unexpected()):
        terminalreporter.write_line(
            f"SKIPPED WITHOUT LEAVE: {name} (not in tests/expected_skips.txt)", red=True
        )
    for why, count in Counter(LEDGER.without_cuda.values()).items():
        terminalreporter.write_line(
            f"{count} tests of the CUDA engine did not run: {why}", yellow=True
        )
    session = getattr(terminalreporter, "_session", None)
    if session is None or config.option.collectonly:
        return
    if _selected_all(session):
        for name in sorted(LEDGER.stale()):
            terminalreporter.write_line(
                f"NO LONGER SKIPPED: {name} (take it off tests/expected_skips.txt)", red=True
            )
    if miscounted := LEDGER.cuda_miscounted(session):
        terminalreporter.write_line(miscounted, red=True)
