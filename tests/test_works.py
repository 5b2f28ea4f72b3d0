"""The page "what works where" says what the tests say."""

from __future__ import annotations

import works


def test_the_page_is_that_of_the_rows() -> None:
    assert works.PAGE.read_text(encoding="utf-8") == works.page(), "run python tests/works.py"


def test_every_row_is_told_once() -> None:
    works.page()
    told = [(row.section, row.feature) for row in works.ROWS]
    assert len(told) == len(set(told))
    assert all(row.torch_nn for row in works.ROWS)
