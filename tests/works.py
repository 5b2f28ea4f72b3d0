"""The table "what works where", docs/works.md: each row is a test, and the test is the row.

A row's check gets a namespace of layers and a device, and fails where the feature does. It must
pass with rnnfast; with torch.nn it must pass too, or raise what the row says. ``python
tests/works.py`` writes the page, and test_works.py fails where the page and the rows differ.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rnnfast

PAGE = Path(__file__).resolve().parents[1] / "docs" / "works.md"
# The files that hold rows, in the order of the page.
FILES: tuple[str, ...] = (
    "test_derivatives",
    "test_training",
    "test_distributed",
    "test_module_life",
    "test_recompute",
    "test_truncated",
    "test_accelerate_models",
    "test_patched",
    "test_typing",
    "test_compile",
    "test_export",
    "test_lengths",
    "test_onnx_export",
)
Check = Callable[[Any, torch.device], None]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    section: str
    feature: str
    torch_nn: str  # "yes", or what it does instead
    test: str  # file::function
    cuda: bool
    cpu: bool


ROWS: list[Row] = []


def row(
    section: str,
    feature: str,
    *,
    torch_nn: str = "yes",
    error: str = "",
    cuda: bool = True,
    cpu: bool = True,
) -> Callable[[Check], Any]:
    """Makes a check a test and a row.

    Args:
        section, feature: where and what, in Markdown
        torch_nn: "yes", or in a few words what torch.nn does instead
        error: pattern of the error that torch.nn raises then; "" if torch.nn passes, or if there is
            nothing to compare (then ``torch_nn`` says so and the check runs with rnnfast only)
        cuda, cpu: whether the check means anything on such a device
    """

    def decorate(check: Check) -> Any:
        libraries = [pytest.param(rnnfast, "cpu", id="rnnfast")] if cpu else []
        if cpu and (error or torch_nn == "yes"):
            libraries.append(pytest.param(nn, "cpu", id="torch.nn"))
        if cuda:
            libraries.append(pytest.param(rnnfast, "cuda", id="cuda", marks=pytest.mark.cuda))

        @pytest.mark.parametrize(("library", "where"), libraries)
        def test(library: Any, where: str) -> None:
            if library is rnnfast or not error:
                check(library, torch.device(where))
                return
            with pytest.raises(Exception) as raised:
                check(library, torch.device(where))
            said = f"{type(raised.value).__name__}: {raised.value}"
            own = isinstance(raised.value, AssertionError) and "AssertionError" not in error
            assert not own, f"the check failed, torch.nn did not raise: {said}"
            assert re.search(error, said, re.DOTALL), said

        test.__name__ = check.__name__
        test.__doc__ = check.__doc__ or feature
        file = Path(check.__code__.co_filename).name
        ROWS.append(Row(section, feature, torch_nn, f"{file}::{check.__name__}", cuda, cpu))
        return test

    return decorate


def page() -> str:
    """The whole page, from the rows of all files."""
    for name in FILES:
        importlib.import_module(name)
    lines = [
        "# What works where",
        "",
        "Written by `python tests/works.py` from the tests that stand behind each row; a test",
        "fails where this page and they differ. yes: the test passes. On CUDA devices the same",
        "tests run where there is one; none has run them yet. torch.nn is that of torch 2.13.0, on",
        "the CPU; what it does there is tested with every row that says so.",
    ]
    order = {name: k for k, name in enumerate(FILES)}
    rows = sorted(ROWS, key=lambda r: order.get(r.test.split(".py")[0], len(order)))
    section = ""
    for one in rows:
        if one.section != section:
            section = one.section
            lines += ["", f"## {section}", ""]
            lines += [
                "| | rnnfast, CPU | rnnfast, CUDA | torch.nn | test |",
                "|---|---|---|---|---|",
            ]
        cpu, cuda = "yes" if one.cpu else "-", "not measured" if one.cuda else "-"
        lines.append(f"| {one.feature} | {cpu} | {cuda} | {one.torch_nn} | `{one.test}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.modules["works"] = sys.modules["__main__"]  # the rows' files import it by this name
    PAGE.write_text(page(), encoding="utf-8")
