"""torch.export and AOTInductor: dynamic T and B, saved, and loaded where nothing was traced."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import works
from test_modules import leaves_of
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import cpp_extension

import rnnfast
from rnnfast._library import library_path

SECTION = "Compilers and export"
# what torch.nn's layers answer to a dynamic T
FIXED = "specialized|Constraints violated"
ALL: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": True}
SHAPES = ((4, 3), (9, 5), (1, 1), (2, 7), (100, 2))  # (T, B)
ROOT = Path(__file__).resolve().parents[1]


class WithLengths(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.layer(x, lengths=lengths)


class Model(nn.Module):
    """A layer of either library, and a head."""

    def __init__(self, library: Any, device: torch.device) -> None:
        super().__init__()
        self.layer = library.LSTM(5, 9, 2, bidirectional=True, device=device)
        self.head = nn.Linear(18, 3, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


def dynamic(batch_first: bool) -> dict[int, Any]:
    steps, batch = Dim("steps", min=1, max=4096), Dim("batch", min=1, max=1024)
    return {0: batch, 1: steps} if batch_first else {0: steps, 1: batch}


def exported(model: nn.Module) -> Any:
    """A model of one input (T, B, 5), for all T and B."""
    x = torch.randn(4, 3, 5, device=next(model.parameters()).device)
    return torch.export.export(model, (x,), dynamic_shapes={"x": dynamic(False)})


def in_a_process(program: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("lengths", [False, True], ids=["padded", "lengths"])
@pytest.mark.parametrize("options", [{}, ALL], ids=["one", "all"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "IndRNN"])
def test_all_sizes(kind: str, options: Any, lengths: bool, tmp_path: Path) -> None:
    strict = kind == "GRU"  # traced by Dynamo
    layer = getattr(rnnfast, kind)(5, 9, **options).eval()
    first = layer.batch_first
    dims = dynamic(first)
    x = torch.randn(4, 3, 5)
    model: nn.Module
    if lengths:
        model = WithLengths(layer)
        batch = dims[0] if first else dims[1]
        args: Any = (x, torch.ones(4 if first else 3, dtype=torch.int64))
        shapes: Any = {"x": dims, "lengths": {0: batch}}
    else:
        model, args, shapes = layer, (x,), {"input": dims}
    program = torch.export.export(model, args, dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for steps, batch in SHAPES:
        x = torch.randn((batch, steps, 5) if first else (steps, batch, 5))
        args = (x, torch.randint(1, steps + 1, (batch,))) if lengths else (x,)
        for a, b in zip(leaves_of(loaded(*args)), leaves_of(model(*args)), strict=True):
            torch.testing.assert_close(a, b)
    if lengths:
        with pytest.raises(RuntimeError, match="rnnfast: lengths must be at least 1"):
            loaded(x, args[1] - steps)


def test_states_resets_and_training() -> None:
    """An exported program takes hx and reset, and gives gradients."""
    layer = rnnfast.LSTM(5, 9, proj_size=4)
    dims, batch = dynamic(False), dynamic(False)[1]
    x, h, c = torch.randn(4, 3, 5), torch.randn(1, 3, 4), torch.randn(1, 3, 9)
    reset = torch.rand(4, 3) < 0.3
    program = torch.export.export(
        layer,
        (x, (h, c), reset),
        dynamic_shapes={"input": dims, "hx": ({1: batch}, {1: batch}), "reset": dims},
    )
    loaded = program.module()
    x, h, c = torch.randn(7, 6, 5), torch.randn(1, 6, 4), torch.randn(1, 6, 9)
    reset = torch.rand(7, 6) < 0.3
    got, want = loaded(x, (h, c), reset), layer(x, (h, c), reset)
    torch.testing.assert_close(got, want)
    got[0].square().sum().backward()
    want = torch.autograd.grad(want[0].square().sum(), list(layer.parameters()))
    for (name, p), w in zip(layer.named_parameters(), want, strict=True):
        grad = dict(loaded.named_parameters())[name].grad
        grad = p.grad if grad is None else grad  # the program may hold the layer's own weights
        torch.testing.assert_close(grad, w, rtol=1e-4, atol=1e-5)


LOAD = """
import sys
import torch
import rnnfast
program, inputs, outputs = sys.argv[1:]
model = torch.export.load(program).module()
with torch.no_grad():
    torch.save([model(x) for x in torch.load(inputs)], outputs)
"""


@works.row(
    SECTION,
    "`torch.export` with dynamic T and B, saved and loaded in another process",
    torch_nn="no: T is fixed",
    error=FIXED,
)
def test_saved_and_loaded(library: Any, device: torch.device) -> None:
    model = Model(library, device).eval()
    with tempfile.TemporaryDirectory() as folder:
        program, inputs, outputs = (f"{folder}/{name}" for name in ("model.pt2", "x", "y"))
        torch.export.save(exported(model), program)
        xs = [torch.randn(*shape, 5, device=device) for shape in SHAPES]
        torch.save(xs, inputs)
        in_a_process(LOAD, program, inputs, outputs)
        ys = torch.load(outputs)
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(y, model(x).detach(), rtol=1e-4, atol=1e-5)


@works.row(
    SECTION,
    "`torch.export` with `lengths`, dynamic T and B",
    torch_nn="no: pack_padded_sequence can't be traced",
    error="type must be tuple of ints",
)
def test_exported_lengths(library: Any, device: torch.device) -> None:
    class Packing(WithLengths):
        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0])[0]

    layer = library.GRU(5, 9, device=device).eval()
    model = Packing(layer) if library is nn else WithLengths(layer)
    dims = dynamic(False)
    n = torch.tensor([2, 4, 1])
    program = torch.export.export(
        model,
        (torch.randn(4, 3, 5, device=device), n),
        dynamic_shapes={"x": dims, "lengths": {0: dims[1]}},
    )
    x, n = torch.randn(9, 4, 5, device=device), torch.tensor([9, 2, 1, 3])
    torch.testing.assert_close(program.module()(x, n), model(x, n), rtol=1e-4, atol=1e-5)


class Padded(nn.Module):
    """Two kinds of layers, in both directions, over padded input."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = rnnfast.LSTM(5, 9, bidirectional=True)
        self.upper = rnnfast.GRU(18, 3, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.upper(self.lower(x, lengths=lengths)[0], lengths=lengths)[0]


@pytest.fixture(scope="module", params=["plain", "lengths"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a package of a model, arguments and what the model makes of them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("aoti")
    calls: list[tuple[Tensor, ...]] = [(torch.randn(*shape, 5),) for shape in SHAPES]
    with torch.no_grad():
        if request.param == "plain":
            model: nn.Module = Model(rnnfast, torch.device("cpu")).eval()
            program = exported(model)
        else:
            model, dims = Padded().eval(), dynamic(False)
            calls = [(x, torch.randint(1, len(x) + 1, (x.size(1),))) for (x,) in calls]
            shapes = {"x": dims, "lengths": {0: dims[1]}}
            program = torch.export.export(model, calls[0], dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
        return folder, calls, [model(*args) for args in calls]


# Without rnnfast's Python: a package calls the operators, and nothing else.
RUN = """
import sys
import torch
import torch._inductor.codecache  # torch 2.10 takes it for loaded
library, program, inputs, outputs = sys.argv[1:]
torch.ops.load_library(library)
model = torch._inductor.aoti_load_package(program)
torch.save([model(*args) for args in torch.load(inputs)], outputs)
assert "rnnfast" not in sys.modules
"""


def test_package_in_python(package: Any) -> None:
    folder, calls, want = package
    torch.save(calls, folder / "x")
    in_a_process(RUN, library_path(), folder / "model.pt2", folder / "x", folder / "y")
    torch.testing.assert_close(torch.load(folder / "y"), want, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def aoti_main(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("cpp") / "aoti_main"
    libraries = cpp_extension.library_paths()
    command = [
        os.environ.get("CXX", "c++"), "-std=c++20", "-O0",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in cpp_extension.include_paths()),
        str(ROOT / "tests" / "cpp" / "aoti_main.cpp"), "-o", str(program),
        *(f"-L{path}" for path in libraries), *(f"-Wl,-rpath,{path}" for path in libraries),
        "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl",
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=300)
    return program


def in_cpp(program: Path, folder: Path, x: Tensor, *lengths: Tensor) -> Any:
    for name, tensor in zip(("x", "lengths"), (x, *lengths)):
        (folder / name).write_bytes(tensor.numpy().tobytes())
    files = (folder / "x", *x.shape, folder / "y", *[folder / "lengths" for _ in lengths])
    return subprocess.run(
        list(map(str, (program, library_path(), folder / "model.pt2", *files))),
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def test_package_in_cpp(package: Any, aoti_main: Path) -> None:
    folder, calls, want = package
    for args, y in zip(calls, want, strict=True):
        done = in_cpp(aoti_main, folder, *args)
        assert done.returncode == 0, done.stderr
        got = torch.frombuffer(bytearray((folder / "y").read_bytes()), dtype=torch.float32)
        torch.testing.assert_close(got.view_as(y), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("package", ["lengths"], indirect=True)
def test_package_with_wrong_lengths(package: Any, aoti_main: Path) -> None:
    folder, calls, _ = package
    x, n = calls[0]
    sentence = f"lengths must be at least 1 and at most T = 4, got {int(n[0]) + 4} at row 0"
    done = in_cpp(aoti_main, folder, x, n + 4)
    assert done.returncode == 1 and f"rnnfast: {sentence}" in done.stderr
    torch.save([(x, n + 4)], folder / "x")
    arguments = (RUN, library_path(), folder / "model.pt2", folder / "x", folder / "y")
    with pytest.raises(AssertionError, match=sentence):
        in_a_process(*arguments)


@works.row(
    SECTION,
    "AOTInductor package, dynamic T and B (in C++ and with `lengths`, too: `test_package_in_cpp`)",
    torch_nn="no: T is fixed",
    error=FIXED,
)
def test_aot_inductor(library: Any, device: torch.device) -> None:
    model = Model(library, device).eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(
            exported(model), package_path=f"{folder}/model.pt2"
        )
        loaded = torch._inductor.aoti_load_package(path)
        for shape in SHAPES:
            x = torch.randn(*shape, 5, device=device)
            torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
