"""How rnnfast.load_cell compiles and keeps what it made, and its sentences for bad input."""

from __future__ import annotations

import ctypes
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from own_headers import AS_BUILT, DECAY, IN, LEAKY, MGU, QUICK, ROOT, B, H, T, run

import rnnfast
from rnnfast import _own_library, cells, engine

load_cell: Any = importlib.import_module("rnnfast.load_cell")  # the name is the function's, too

pytest_plugins = ["own_headers"]
pytestmark = pytest.mark.usefixtures("quick_compiler")


# --------------------------------------------------------------------------- compiling and keeping


LOAD = (
    QUICK
    + """
import sys
import rnnfast

print(rnnfast.load_cell(sys.argv[1]).spec.id)
"""
)


def test_kept_and_shared(folder: Path, tmp_path: Path) -> None:
    """Two processes that begin at once both get it, and a third does not compile."""
    header = shutil.copy(folder / "simple.h", tmp_path)
    cache = tmp_path / "kept" / "here"
    environment = os.environ | {"RNNFAST_CACHE": str(cache)}
    command = [sys.executable, "-c", LOAD, str(header)]
    two = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in two]
    assert [process.returncode for process in two] == [0, 0]
    (library,) = cache.iterdir()  # and nothing unfinished
    assert library.name.startswith("Sum-") and library.suffix == ".so"
    written = library.stat().st_mtime_ns
    done = run("-c", LOAD, str(header), RNNFAST_CACHE=str(cache))
    assert done.stdout == said[0] == said[1], done.stderr
    assert library.stat().st_mtime_ns == written

    library.write_bytes(b"of another system")  # made anew
    done = run("-c", LOAD, str(header), RNNFAST_CACHE=str(cache))
    assert done.stdout == said[0], done.stderr
    assert library.stat().st_size > 1000


def test_what_a_library_is_made_of(folder: Path, tmp_path: Path) -> None:
    """A change of the header, or of one beside it, makes another cell."""
    for name in ("leaky.h", "decay.h"):
        shutil.copy(folder / name, tmp_path / name)

    def digest() -> bytes:
        return _own_library.source_of(tmp_path / "leaky.h", None).digest

    first = digest()
    assert first == _own_library.source_of(folder / "leaky.h", None).digest
    (tmp_path / "decay.h").write_text(DECAY + "// another\n")
    second = digest()
    (tmp_path / "leaky.h").write_text(LEAKY + "// another\n")
    assert len({first, second, digest()}) == 3


def test_another_instruction_set(loaded: Any, folder: Path) -> None:
    """Kernels are compiled for the one in force; another one is a call more, or a sentence."""
    others = [isa for isa in engine.available_isas() if isa in _own_library.ISAS]
    now = engine.ran_isa(engine.active_isa(), False)
    layer, x = loaded["Sum"](IN, H), torch.randn(T, B, IN)
    want = layer(x)[0]
    for isa in others:
        with rnnfast.use_engine("cpu", isa=isa):
            if isa != now:
                with pytest.raises(RuntimeError, match=f"cell Sum was not compiled for {isa}"):
                    layer(x)
            assert rnnfast.load_cell(folder / "simple.h").spec == loaded["Sum"].spec
            torch.testing.assert_close(layer(x)[0], want)
    assert now in others


def test_flags_are_those_of_the_build() -> None:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for isa, (_, vector_bytes, flags) in _own_library.ISAS.items():
        if flags:
            found = re.findall(rf"rnnfast_isa\({isa} (\d+) (.*)\)", text)
            assert found == [(str(vector_bytes), " ".join(flags))]
        else:
            assert vector_bytes == 16
    assert "rnnfast_isa(${isa} 16)" in text
    for flag in AS_BUILT[1:6]:
        assert flag in text, flag


def test_fork(loaded: Any) -> None:
    layer, x = loaded["Mgu"](IN, H), torch.randn(T, B, IN)
    want = layer(x)[0].detach()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(layer(x)[0], want) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_terminal_sees_that_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(_own_library, "_PATIENCE", 0.05)
    for stream, seen in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        status, output = _own_library._run(["sh", "-c", "sleep 0.3; echo done"], "compiling a.h")
        assert (status, output) == (0, "done\n")
        assert ("rnnfast: compiling a.h ... 0 s" in stream.getvalue()) == seen
        assert stream.getvalue().endswith("\r\x1b[K") == seen


# --------------------------------------------------------------------------- what bad input gets


def fails(path: Path, text: str | None, sentence: str, **options: Any) -> str:
    if text is not None:
        path.write_text(text)
    with pytest.raises(RuntimeError, match=sentence) as raised:
        rnnfast.load_cell(path, **options)
    return str(raised.value)


def test_not_a_header(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="load_cell needs the path of a header, got int"):
        rnnfast.load_cell(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="struct of load_cell must be a str or None, got int"):
        rnnfast.load_cell("a.h", struct=3)  # type: ignore[arg-type]
    fails(tmp_path / "none.h", None, r"load_cell can't read .*none\.h: there is no such file")
    fails(tmp_path, None, "load_cell can't read .*Is a directory")
    file = tmp_path / "a.h"
    fails(file, "int f();\n", r"which struct of .*a\.h is the cell: it has no struct with kGates")
    two = MGU + MGU.replace("Mgu", "Other").replace("#pragma once", "")
    fails(file, two, r"it has Mgu, Other; name it, load_cell\(path, struct=...\)")
    fails(file, MGU, "struct of load_cell must be the name of a C.. type", struct="Mgu; int x")
    said = fails(file, MGU, r"a\.h has no struct Mgv; it has Mgu", struct="Mgv")
    assert str(_own_library.cache_folder()) in said


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("kSplitGates = true", "kSplit = true", "a cell has `static constexpr bool kSplitGates`"),
        ("int kGates = 2", "int kGates = 5", "a cell has 1 to 4 gates"),
        ("kDense", "kDiagonal", "a diagonal recurrence has one gate"),
        ("int kStates = 1", "int kStates = 0", "state 0 is h"),
        ("void forward(const V (&gx)[2]", "void forward(const V (&gx)[3]", "static void forward"),
        ("void backward(", "void back(", "`template <class V> static void backward"),
    ],
    ids=["constant", "gates", "diagonal", "states", "forward", "backward"],
)
def test_not_the_contract(tmp_path: Path, before: str, after: str, sentence: str) -> None:
    assert before in MGU
    said = fails(tmp_path / "a.h", MGU.replace(before, after), "is not a cell yet:")
    lines = said.splitlines()
    assert sentence in lines[1]
    log = Path(lines[-1].removeprefix("The command and all that it said: "))
    assert "own_cell.cpp" in log.read_text()


def test_does_not_compile(tmp_path: Path) -> None:
    said = fails(tmp_path / "a.h", MGU.replace("tanh(", "tan_h("), "does not compile for")
    lines = said.splitlines()
    assert "a.h" in lines[1] and "error" in lines[1] and len(lines) < 30
    assert "tan_h" in said


def test_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler -O1")
    fails(tmp_path / "a.h", MGU + "// 1\n", "/no/such/compiler, which CXX names, is not there")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    fails(tmp_path / "a.h", None, r"none of g\+\+, clang\+\+, c\+\+ is there; install g\+\+ 11")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RNNFAST_CACHE", str(tmp_path / "file" / "folder"))
    fails(tmp_path / "a.h", MGU + "// 2\n", "can't be written .*set RNNFAST_CACHE to a folder")


def test_where_libraries_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNFAST_CACHE", "~/mine")
    assert _own_library.cache_folder() == Path.home() / "mine"
    monkeypatch.delenv("RNNFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert _own_library.cache_folder() == Path("/somewhere/rnnfast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _own_library.cache_folder() == Path.home() / ".cache" / "rnnfast"


def test_other_headers_than_the_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_own_library, "engine_stamp", lambda: "0123456789abcdef")
        sentence = "_C.so was not built of the headers in .* would compile Stale; build"
        fails(tmp_path / "a.h", MGU.replace("Mgu", "Stale"), sentence)

    class Other(ctypes.Structure):  # a library of one's own that says so, too
        _fields_ = (("engine", ctypes.c_char_p),)

    other = Other(b"0123456789abcdef")
    said = load_cell._register(ctypes.addressof(other), 0x12FF, (ctypes.c_int64 * 7)())
    assert said.startswith(b"it was compiled with the headers 0123456789abcdef, and this build")


def test_an_unknown_code() -> None:
    with pytest.raises(RuntimeError, match="is one of rnnfast.load_cell that this process has not"):
        cells.cell_spec(0x12FF)
    x, w = torch.randn(1, 1, 1), torch.randn(1, 1)
    with pytest.raises(RuntimeError, match="cell 4863 is one of rnnfast.load_cell that this"):
        torch.ops.rnnfast.forward(
            x, None, None, w, w, None, None, None, None, None, None, 0x12FF, False, False
        )
