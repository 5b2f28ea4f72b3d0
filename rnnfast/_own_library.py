"""Compiles a header with a cell into a library of its own, once: the compiler, the cache of what it
made, and its complaints in a few lines. load_cell.py asks for it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger("rnnfast")

#: Of each instruction set that has kernels: its number in csrc, bytes of a vector, and the flags of
#: CMakeLists.txt (held together by tests/test_own_library.py).
ISAS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "portable": ("kPortable", 16, ()),
    "avx2": ("kAvx2", 32, ("-mavx2", "-mfma", "-mf16c")),
    "avx512": (
        "kAvx512",
        64,
        (
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
            "-mprefer-vector-width=512",
        ),
    ),
    "neon": ("kNeon", 16, ()),
}
FLAGS = (
    *("-std=c++20", "-O2", "-DNDEBUG", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
    *("-fPIC", "-shared", "-fvisibility=hidden", "-fdiagnostics-color=never"),
)
_COMPILERS = ("g++", "clang++", "c++")
#: The name of CUDA where one of an instruction set may stand.
CUDA = "cuda"
CUDA_SOURCE = Path("cuda", "own_cell.cu")
#: Machine code for 8.x and 9.0, and what drivers of later devices compile.
CUDA_FLAGS = (
    *("-std=c++20", "-O3", "-DNDEBUG", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden"),
    *("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"),
    "--threads=2",
)
# what a compile may take before a terminal is told of it
_PATIENCE = 2.0
_SHOWN_LINES = 24


def engine_sources() -> Path:
    """The folder of the engine's headers: csrc of a checkout, or the package's copy of it."""
    installed = Path(__file__).with_name("include")
    return installed if installed.is_dir() else Path(__file__).resolve().parents[1] / "csrc"


@functools.cache
def engine_stamp() -> str:
    """A hash of the engine's headers, as cmake/engine_stamp.cmake computes it."""
    root = engine_sources()
    files = [f for part in ("cells", "core", "cpu", "cuda") for f in root.glob(f"{part}/*.h")]
    files += [*root.glob("cuda/**/*.cuh"), root / "cpu" / "own_cell.cpp", root / CUDA_SOURCE]
    if not all(file.is_file() for file in files[-2:]):
        raise RuntimeError(
            f"rnnfast: load_cell needs the engine's headers, which are not in {root}; install "
            "rnnfast again"
        )
    names = sorted(file.relative_to(root).as_posix() for file in files)
    text = "".join(
        f"{name} {hashlib.sha256((root / name).read_bytes()).hexdigest()}\n" for name in names
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """Where libraries are kept: ``$RNNFAST_CACHE``, else rnnfast in the user's folder of caches."""
    chosen = os.environ.get("RNNFAST_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "rnnfast"


def compiler() -> list[str]:
    """The C++ compiler as the first words of a command."""
    wish = shlex.split(os.environ.get("CXX", ""))
    if wish:
        if shutil.which(wish[0]):
            return wish
        raise RuntimeError(
            f"rnnfast: load_cell needs a C++ compiler, and {wish[0]}, which CXX names, is not there"
        )
    for name in _COMPILERS:
        if shutil.which(name):
            return [name]
    raise RuntimeError(
        f"rnnfast: load_cell needs a C++ compiler, and none of {', '.join(_COMPILERS)} is there; "
        "install g++ 11 or clang 14, or newer ones (apt install g++, dnf install gcc-c++, "
        "xcode-select --install), or set CXX"
    )


def _nvcc() -> str | None:
    """Of $CUDA_HOME, of PATH, or where CUDA installs it."""
    home = os.environ.get("CUDA_HOME")
    places = [os.path.join(home, "bin", "nvcc")] if home else []
    return next(
        filter(None, map(shutil.which, (*places, "nvcc", "/usr/local/cuda/bin/nvcc"))), None
    )


def has_nvcc() -> bool:
    """Whether cells can be compiled for CUDA."""
    return _nvcc() is not None


def cuda_compiler() -> list[str]:
    """nvcc as the first word of a command."""
    found = _nvcc()
    if found:
        return [found]
    raise RuntimeError(
        "rnnfast: load_cell needs nvcc for a cell's CUDA kernels, and it is neither in "
        "$CUDA_HOME/bin nor on PATH nor in /usr/local/cuda/bin; install the CUDA toolkit, or give "
        "cuda=False"
    )


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    done = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return done.stdout


@dataclass(frozen=True)
class Source:
    """A header, the struct in it that is the cell, and a hash of all that the user wrote."""

    header: Path
    struct: str
    digest: bytes

    @property
    def name(self) -> str:
        """The cell's."""
        return self.struct.rpartition("::")[2]


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)


def _structs(text: str) -> list[str]:
    """Names of the structs (no templates) that say how many gates they have."""
    text = _without_comments(text)
    found = []
    for match in re.finditer(r"\b(?:struct|class)\s+(\w+)[^;{}()]*\{", text):
        if re.search(r"template\s*<[^;{}]*>\s*$", text[: match.start()]):
            continue
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if re.search(r"\bkGates\b", text[match.end() : end]):
            found.append(match.group(1))
    return found


def _read(header: Path) -> str:
    try:
        return header.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        what = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise RuntimeError(f"rnnfast: load_cell can't read {header}: {what}") from None


def _included(header: Path, seen: set[Path]) -> Iterator[bytes]:
    """The text of a header, and of those beside it that it includes."""
    seen.add(header)
    text = _read(header)
    yield text.encode()
    for name in re.findall(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', text, re.MULTILINE):
        beside = (header.parent / name).resolve()
        if beside.is_file() and beside not in seen:
            yield from _included(beside, seen)


def source_of(path: str | os.PathLike[str], struct: str | None) -> Source:
    """What load_cell was given, looked at before a compiler is."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"rnnfast: load_cell needs the path of a header, got {type(path).__name__}")
    if struct is not None and not isinstance(struct, str):
        raise TypeError(
            f"rnnfast: struct of load_cell must be a str or None, got {type(struct).__name__}"
        )
    header = Path(path).expanduser().resolve()
    found = _structs(_read(header))
    if struct is None:
        if len(found) != 1:
            what = f"has {', '.join(found)}" if found else "has no struct with kGates in it"
            raise RuntimeError(
                f"rnnfast: load_cell must know which struct of {header} is the cell: it {what}; "
                "name it, load_cell(path, struct=...)"
            )
        struct = found[0]
    elif not re.fullmatch(r"[A-Za-z_]\w*(::[A-Za-z_]\w*)*", struct):
        raise RuntimeError(
            f"rnnfast: struct of load_cell must be the name of a C++ type, got {struct!r}"
        )
    content = hashlib.sha256(struct.encode())
    for part in _included(header, set()):
        content.update(hashlib.sha256(part).digest())
    return Source(header, struct, content.digest())


def _compiler_for(isa: str) -> list[str]:
    """With its flags."""
    if isa == CUDA:
        return [*cuda_compiler(), *CUDA_FLAGS]
    number, vector_bytes, flags = ISAS[isa]
    return [
        *compiler(), *FLAGS, *flags, f"-DRNNFAST_VECTOR_BYTES={vector_bytes}",
        f"-DRNNFAST_OWN_ISA={number}",
    ]  # fmt: skip


def command(source: Source, isa: str, out: Path) -> list[str]:
    """What compiles a cell."""
    root = engine_sources()
    made_of = CUDA_SOURCE if isa == CUDA else Path("cpu", "own_cell.cpp")
    return [
        *_compiler_for(isa), f"-DRNNFAST_TARGET={isa}", f"-DRNNFAST_OWN_CELL={source.struct}",
        f'-DRNNFAST_OWN_NAME="{source.name}"', f'-DRNNFAST_ENGINE_STAMP="{engine_stamp()}"',
        "-I", str(root / "cells"), "-include", str(source.header),
        str(root / made_of), "-o", str(out),
    ]  # fmt: skip


def _place(source: Source, isa: str) -> Path:
    """Where the library of a cell belongs: all that it is made from is in its name."""
    words = _compiler_for(isa)
    name = cuda_compiler() if isa == CUDA else compiler()
    parts = (
        source.digest.hex(), isa, engine_stamp(), platform.machine(), sys.platform,
        shlex.join(words), _version(tuple(name)),
    )  # fmt: skip
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / f"{source.name}-{isa}-{key}.so"


class _Progress:
    """One line of a terminal while a compiler takes long; nothing elsewhere."""

    def __init__(self, what: str) -> None:
        self._what, self._begin, self._shown = what, time.monotonic(), False

    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def show(self) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            self._shown = True
            sys.stderr.write(f"\rrnnfast: {self._what} ... {self.seconds():.0f} s")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _run(command: Sequence[str], what: str) -> tuple[int, str]:
    """The status and the output of a compiler; it does not outlive the call."""
    progress = _Progress(what)
    environment = {**os.environ, "LC_ALL": "C"}  # its messages are read
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", env=environment, start_new_session=True,
    )  # fmt: skip
    wait = _PATIENCE
    try:
        while True:
            try:
                output = process.communicate(timeout=wait)[0]
                break
            except subprocess.TimeoutExpired:
                progress.show()
                wait = 1.0
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        progress.clear()
    _log.info("%s took %.1f s", what, progress.seconds())
    return process.returncode, output


def _failure(source: Source, isa: str, output: str, log: Path) -> str:
    """What a compiler said, in a few lines: what the cell lacks first."""
    asserted = [
        next(text for text in groups if text).strip('" ')
        for groups in re.findall(
            r"error: static[_ ]assert(?:ion)? failed(?:"
            r": (.+)|(?: due to requirement '.*?')?:? (.+))$",
            output,
            re.MULTILINE,
        )
    ]
    tail = f"The command and all that it said: {log}"
    if asserted:
        said = "\n".join(f"  {text}" for text in dict.fromkeys(asserted))
        return f"{source.name} of {source.header} is not a cell yet:\n{said}\n{tail}"
    unknown = rf"error: .*\b{source.name}\b.*(does not name a type|in namespace|declared)"
    unknown += rf"|error: (unknown type name|no type named) '{source.name}'"
    found = _structs(source.header.read_text(encoding="utf-8", errors="replace"))
    if source.name not in found and re.search(unknown, output):
        has = f"; it has {', '.join(found)}" if found else ""
        return f"{source.header} has no struct {source.struct}{has}\n{tail}"
    lines = output.splitlines()
    first = next((k for k, line in enumerate(lines) if re.search(r"\berror\b", line)), 0)
    shown = lines[first : first + _SHOWN_LINES]
    left = len(lines) - first - len(shown)
    more = [f"({left} lines more)"] if left > 0 else []
    text = "\n".join(shown + more)
    return f"{source.header} does not compile for {isa}:\n{text}\n{tail}"


def library(source: Source, isa: str, anew: bool = False) -> Path:
    """The library of a cell for an instruction set; ``anew``: whatever lies in the cache.

    Raises:
        RuntimeError: no compiler, a header that does not compile, a cache that can't be written
    """
    place = _place(source, isa)
    if place.is_file() and not anew:
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # of the same folder, so that it is renamed and others see all of it or nothing
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=f"{source.name}-", suffix=".tmp")
    except OSError as error:
        raise RuntimeError(
            f"rnnfast: load_cell keeps what it compiled in {place.parent}, which can't be written "
            f"({error.strerror}); set RNNFAST_CACHE to a folder that can"
        ) from None
    os.close(handle)
    made = Path(name)
    try:
        words = command(source, isa, made)
        status, output = _run(words, f"compiling {source.header.name} for {isa}")
        if status:
            log = place.with_suffix(".log")
            log.write_text(f"{shlex.join(words)}\n\n{output}", encoding="utf-8")
            raise RuntimeError(f"rnnfast: {_failure(source, isa, output, log)}")
        made.replace(place)
    finally:
        made.unlink(missing_ok=True)
    return place
