"""Finds and loads the compiled libraries, which register the operators."""

from __future__ import annotations

from pathlib import Path

import torch

_loaded = False
_cuda_error: str | None = None


def library_path() -> Path:
    """Where the CPU library lies in this installation."""
    return Path(__file__).with_name("_C.so")


def cuda_library_path() -> Path:
    """Where the library of the CUDA engine lies, if there is one."""
    return Path(__file__).with_name("_C_cuda.so")


def cuda_load_error() -> str:
    """Why the CUDA kernels are not loaded, in a few words; empty if they are."""
    return _cuda_error or ""


def _load_cuda() -> str:
    path = cuda_library_path()
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    if not path.exists():
        return "this build of rnnfast has no CUDA engine (RNNFAST_CUDA=0, or no nvcc was found)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} could not be loaded under torch {torch.__version__}: {error}"
    return ""


def load() -> None:
    """Load ``_C.so`` once, and ``_C_cuda.so`` where torch has CUDA.

    Raises:
        ImportError: if it has not been built, or was built for a torch that does not fit.
    """
    global _loaded, _cuda_error
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
    _cuda_error = _load_cuda()
    _loaded = True
