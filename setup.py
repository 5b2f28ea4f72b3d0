"""Builds the libraries of rnnfast: finds torch, cmake, ninja and a compiler; CMake does the rest.

Environment: RNNFAST_CUDA=auto|0|1 (auto: where nvcc 12 or later is found), RNNFAST_CUDA_ARCHS
(release: 8.0, 9.0a, 10.0 and PTX; or a list like 80,90a,100+PTX; default release, for development
90a), RNNFAST_CUDA_STRICT=1 (nvcc's warnings are errors, and ptxas reports on every kernel),
RNNFAST_DEV=1 (also what only the tests load), RNNFAST_ISAS (default all; a list like avx512 builds
those and portable only: a quick loop for development), RNNFAST_BUILD_DIR (default build/<kind>,
kept, so that a rebuild is incremental).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"


def stop(sentence: str) -> None:
    """End the build with one sentence that says what to do."""
    raise SystemExit(f"\nrnnfast: {sentence}\n")


def find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        stop(
            "torch is not installed in this environment; install torch >= 2.10 first and build "
            "with `pip install --no-build-isolation .`"
        )
    return Path(spec.origin).parent  # type: ignore[union-attr, arg-type]


def find_tool(name: str) -> str:
    """A build tool of this environment, or of the system."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        stop(f"{name} was not found; install it with `pip install {name}`")
    return str(found)


def engine_sources() -> list[Path]:
    """What rnnfast.load_cell compiles a user's cell with, in a checkout and in the package."""
    headers = [p for part in ("cells", "core", "cpu", "cuda") for p in (CSRC / part).glob("*.h")]
    kernels = [*(CSRC / "cuda").rglob("*.cuh")]
    return [*headers, *kernels, CSRC / "cpu" / "own_cell.cpp", CSRC / "cuda" / "own_cell.cu"]


def check_compiler() -> None:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        stop(
            f"no C++ compiler was found (looked for {', '.join(names)}); "
            "install g++ >= 11 or clang >= 14"
        )


class CMakeBuild(build_ext):
    """One configure and one build; the libraries land beside the Python files."""

    def run(self) -> None:
        torch, cmake, ninja = find_torch(), find_tool("cmake"), find_tool("ninja")
        check_compiler()
        out = ROOT / "rnnfast" if self.inplace else Path(self.build_lib).resolve() / "rnnfast"
        cuda = os.environ.get("RNNFAST_CUDA", "auto")
        if cuda not in ("auto", "0", "1"):
            stop(f"RNNFAST_CUDA must be auto, 0 or 1, got {cuda!r}")
        dev = os.environ.get("RNNFAST_DEV", "0") == "1"
        archs = os.environ.get("RNNFAST_CUDA_ARCHS") or ("90a" if dev else "release")
        build = Path(
            os.environ.get("RNNFAST_BUILD_DIR", ROOT / "build" / ("dev" if dev else "release"))
        )
        build.mkdir(parents=True, exist_ok=True)
        options = [
            *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
            f"-DRNNFAST_TORCH={torch}",
            f"-DRNNFAST_OUT={out}",
            f"-DRNNFAST_ISAS={os.environ.get('RNNFAST_ISAS') or 'all'}",
            f"-DRNNFAST_CUDA={cuda}",
            f"-DRNNFAST_CUDA_ARCHS={archs}",
            f"-DRNNFAST_DEV={'ON' if dev else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        if strict := os.environ.get("RNNFAST_CUDA_STRICT"):  # else as the folder was built before
            options.append(f"-DRNNFAST_CUDA_STRICT={strict}")
        if dev:
            pybind11 = importlib.util.find_spec("pybind11")
            if pybind11 is None or pybind11.origin is None:
                stop("RNNFAST_DEV=1 needs pybind11; install it with `pip install pybind11`")
            folder = Path(pybind11.origin).parent  # type: ignore[union-attr, arg-type]
            options.append(f"-Dpybind11_DIR={folder / 'share' / 'cmake' / 'pybind11'}")
        try:
            subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *options], check=True)
            subprocess.run([cmake, "--build", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            stop(
                f"the build failed in `{' '.join(map(str, error.cmd[:4]))} ...`; "
                "the compiler's message is above"
            )

        if not self.inplace:
            for path in engine_sources():
                to = out / "include" / path.relative_to(CSRC)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "rnnfast"
        made = [folder / "_C.so", folder / "_C_cuda.so"]
        made += [folder / "include" / path.relative_to(CSRC) for path in engine_sources()]
        return [str(path) for path in made if path.exists()]


class StableWheel(bdist_wheel):
    """The library holds no Python: one wheel serves every Python 3 of this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # Names the library so that setuptools knows the wheel is of one platform; CMake fills it.
    ext_modules=[Extension("rnnfast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": StableWheel},
)
