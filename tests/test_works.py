"""The page "what works where" says what the tests say, and none of its words stands untested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import works
from torch import nn

import rnnfast


def test_the_page_is_that_of_the_rows() -> None:
    assert works.PAGE.read_text(encoding="utf-8") == works.page(), "run python tests/works.py"


def test_every_row_is_told_once() -> None:
    works.page()
    told = [(row.section, row.feature) for row in works.ROWS]
    assert len(told) == len(set(told))
    assert all(row.torch_nn for row in works.ROWS)


def passes(library: Any, device: torch.device) -> None:
    assert works.kinds(library)


def raises(library: Any, device: torch.device) -> None:
    if library is not rnnfast:
        raise TypeError("not today")


def fails(library: Any, device: torch.device) -> None:
    assert library is rnnfast


def runs(check: works.Check, **options: Any) -> dict[str, Callable[[], None]]:
    """The tests of a row, by the last part of their names."""
    test = works.row("A section", "a feature", cuda=False, **options)(check)
    (mark,) = test.pytestmark
    return {case.id: lambda values=case.values: test(*values) for case in mark.args[1]}


@pytest.fixture
def no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(works, "ROWS", [])


@pytest.mark.usefixtures("no_rows")
def test_words_about_torch_need_a_test() -> None:
    for words in ("-", "has none", "yes, on CUDA"):
        with pytest.raises(AssertionError, match="nobody asserts"):
            works.row("A section", "a feature", torch_nn=words)(passes)
    assert works.ROWS == []


@pytest.mark.usefixtures("no_rows")
def test_a_row_fails_where_torch_changes() -> None:
    """Where torch.nn starts to pass, stops, or raises something else."""
    for run in runs(passes).values():
        run()
    both = {"torch_nn": "raises", "error": "TypeError: not today"}
    for run in runs(raises, **both).values():
        run()
    with pytest.raises(TypeError):
        runs(raises)["torch.nn"]()
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        runs(passes, **both)["torch.nn"]()
    with pytest.raises(AssertionError):
        runs(raises, torch_nn="raises", error="TypeError: tomorrow")["torch.nn"]()
    with pytest.raises(AssertionError, match="a check that failed"):
        runs(fails, torch_nn="raises", error="AssertionError")["torch.nn"]()
    own = runs(raises, torch_nn="another way", theirs=fails)
    own["rnnfast"]()
    with pytest.raises(AssertionError):
        own["torch.nn"]()


@pytest.mark.usefixtures("no_rows")
def test_words_about_some_kinds_of_layers() -> None:
    def lstm_raises(library: Any, device: torch.device) -> None:
        if getattr(library, "LSTM", None) is nn.LSTM:
            raise TypeError("not today")

    for run in runs(lstm_raises, torch_nn="not LSTM", error={"LSTM": "not today"}).values():
        run()
    found = runs(lstm_raises, torch_nn="not at all", error=works.every_kind("not today"))
    found["torch.nn.LSTM"]()
    for kind in ("GRU", "RNN"):
        with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
            found[f"torch.nn.{kind}"]()
