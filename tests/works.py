"""The table "what works where", docs/works.md: each row is a test, and the test is the row.

A row's check gets a namespace of layers and a device, and fails where the feature does. It must
pass with rnnfast; what the row says of torch.nn runs, too: the check passes, or raises what the row
says, or torch.nn has a check of its own. ``python tests/works.py`` writes the page, and
test_works.py fails where the page and the rows differ.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
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
    "test_lazy",
    "test_recompute",
    "test_truncated",
    "test_accelerate_models",
    "test_patched",
    "test_typing",
    "test_compile",
    "test_export",
    "test_lengths",
    "test_mask",
    "test_return_last",
    "test_zoneout",
    "test_batch_norm",
    "test_onnx_export",
    "test_load_cell",
)
Check = Callable[[Any, torch.device], None]
KINDS = ("LSTM", "GRU", "RNN")


def kinds(library: Any) -> list[str]:
    """Of layers, those that a namespace has: all, or the one that a row looks at alone."""
    return [kind for kind in KINDS if hasattr(library, kind)]


def every_kind(error: str) -> dict[str, str]:
    """An error that torch.nn raises with each kind of layer."""
    return dict.fromkeys(KINDS, error)


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


def _of_torch(
    check: Check, torch_nn: str, error: str | Mapping[str, str], theirs: Check | None, cpu: bool
) -> list[Any]:
    """The runs that say of torch.nn what the row says."""
    if theirs is not None:
        return [pytest.param(theirs, nn, "cpu", "", id="torch.nn")]
    if isinstance(error, Mapping):
        assert error.keys() <= set(KINDS)
        alone = {kind: SimpleNamespace(**{kind: getattr(nn, kind)}) for kind in KINDS}
        return [
            pytest.param(check, one, "cpu", error.get(kind, ""), id=f"torch.nn.{kind}")
            for kind, one in alone.items()
        ]
    if error:
        return [pytest.param(check, nn, "cpu", error, id="torch.nn")]
    assert torch_nn == ("yes" if cpu else "yes, on CUDA"), f"nobody asserts: torch.nn {torch_nn}"
    if cpu:
        return [pytest.param(check, nn, "cpu", "", id="torch.nn")]
    return [pytest.param(check, nn, "cuda", "", id="torch.nn-cuda", marks=pytest.mark.cuda)]


def row(
    section: str,
    feature: str,
    *,
    torch_nn: str = "yes",
    error: str | Mapping[str, str] = "",
    theirs: Check | None = None,
    cuda: bool = True,
    cpu: bool = True,
) -> Callable[[Check], Any]:
    """Makes a check a test and a row.

    Args:
        section, feature: where and what, in Markdown
        torch_nn: "yes", or in a few words what torch.nn does instead
        error: pattern of the error that torch.nn raises then, or one for each kind of layer that
            raises (the check takes :func:`kinds` of its namespace, and passes with the others)
        theirs: what torch.nn must pass in place of the check, where its way is no error
        cuda, cpu: whether the check means anything on such a device
    """

    def decorate(check: Check) -> Any:
        runs = [pytest.param(check, rnnfast, "cpu", "", id="rnnfast")] if cpu else []
        runs += _of_torch(check, torch_nn, error, theirs, cpu)
        if cuda:
            marks = pytest.mark.cuda
            runs.append(pytest.param(check, rnnfast, "cuda", "", id="cuda", marks=marks))

        @pytest.mark.parametrize(("run", "library", "where", "raises"), runs)
        def test(run: Check, library: Any, where: str, raises: str) -> None:
            if not raises:
                run(library, torch.device(where))
                return
            with pytest.raises(Exception) as raised:
                run(library, torch.device(where))
            said = f"{type(raised.value).__name__}: {raised.value}"
            assert not isinstance(raised.value, AssertionError), f"a check that failed: {said}"
            assert re.search(raises, said, re.DOTALL), said

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
        "the CPU; each row's words about it are a test, too.",
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
