"""Finds and loads the compiled library, which registers the operators."""

from __future__ import annotations

from pathlib import Path

import torch

_loaded = False


def library_path() -> Path:
    """Where the CPU library lies in this installation."""
    return Path(__file__).with_name("_C.so")


def load() -> None:
    """Load ``_C.so`` once.

    Raises:
        ImportError: if it has not been built, or was built for a torch that does not fit.
    """
    global _loaded
    if _loaded:
        return
    path = library_path()
    if not path.exists():
        raise ImportError(
            f"rnnfast: the compiled library {path.name} is missing; build it with "
            "`pip install --no-build-isolation -e .` in the checkout"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"rnnfast: {path.name} could not be loaded under torch {torch.__version__} ({error}); "
            "rnnfast needs torch >= 2.10, and a build on this machine"
        ) from error
    _loaded = True
