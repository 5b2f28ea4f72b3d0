"""rnnfast.load_cell: a header becomes a layer; and rnnfast.check_cell.

The example of docs/own_cell.md runs in test_recurrent.py; compiling and its errors:
test_own_library.py."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import on_host
import pytest
import torch
from own_headers import AS_BUILT, HEADERS, IN, MGU, QUICK, B, H, T, mgu_step, run
from torch import Tensor
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from works import row

import rnnfast
from rnnfast import _own_library, cells

load_cell: Any = importlib.import_module("rnnfast.load_cell")  # the name is the function's, too

pytest_plugins = ["own_headers"]
f64 = torch.float64
KINDS = ("Mgu", "Leaky", "Traces", "Drift", "Sum", "Unit")
each = pytest.mark.parametrize("kind", KINDS)
LENGTHS = torch.tensor([2, 6, 4])


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def leaves(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [t for part in out if part is not None for t in leaves(part)]


def both(layer: Any, *args: Any, **options: Any) -> None:
    """Outputs, states and gradients of the engine are those of the reference."""
    results = []
    for name in ("cpu", "reference"):
        with rnnfast.use_engine(name):
            out = [t for t in leaves(layer(*args, **options)) if t.is_floating_point()]
            assert rnnfast.last_run()["engine"] == name
            torch.manual_seed(5)
            total = sum(((torch.randn_like(t) * t).sum() for t in out), torch.zeros((), dtype=f64))
            inputs = [t for t in leaves(args) if t.requires_grad]
            grads = torch.autograd.grad(total, [*layer.parameters(), *inputs])
        results.append([*out, *grads])
    close(*results)


def states(layer: Any, directions: int) -> Any:
    shape = (layer.num_layers * directions, B, H)
    made = [torch.randn(shape, dtype=f64, requires_grad=True) for _ in range(layer.spec.states)]
    return made[0] if layer.spec.states == 1 else tuple(made)


# --------------------------------------------------------------------------- what is computed


@each
@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
def test_in_every_form(loaded: Any, kind: str, two: bool) -> None:
    torch.manual_seed(1)
    layer = loaded[kind](IN, H, 2, bidirectional=two, dtype=f64)
    x = torch.randn(T, B, IN, dtype=f64, requires_grad=True)
    hx = states(layer, 1 + two)
    reset = torch.rand(T, B) < 0.3
    both(layer, x)
    both(layer, x, hx)
    both(layer, x, hx, reset)
    both(layer, x, hx, lengths=LENGTHS)
    both(layer, x, mask=torch.rand(T, B) < 0.7)
    both(layer, x[:, 0])
    both(layer, pack_padded_sequence(x, LENGTHS, enforce_sorted=False), hx)
    layer.recompute = True
    both(layer, x, hx, reset)
    layer.recompute, layer.return_last = False, True
    both(layer, x, hx)
    layer.return_last, layer.residual = False, True
    both(layer, x, hx)


@each
def test_gradients_by_differences(loaded: Any, kind: str) -> None:
    torch.manual_seed(2)
    layer = loaded[kind](3, 5, dtype=f64)
    x = torch.randn(4, 2, 3, dtype=f64, requires_grad=True)
    names, weights = zip(*layer.named_parameters())

    def call(x: Tensor, *weights: Tensor) -> Any:
        out = torch.func.functional_call(layer, dict(zip(names, weights)), (x,))
        return tuple(leaves(out))

    assert gradcheck(call, (x, *weights))
    assert gradgradcheck(call, (x, *weights))


def test_recompute_of_states_alone(loaded: Any) -> None:
    """A cell that has no planes but its states is recomputed, too."""
    kept = []
    for recompute in (False, True):
        sizes: list[int] = []
        layer = loaded["Drift"](3, 8, recompute=recompute)

        def note(t: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            layer(torch.randn(512, 2, 3))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_it_is_the_librarys_own_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's header, compiled anew, gives the bits of the layer that was built with it."""
    monkeypatch.setattr(_own_library, "FLAGS", AS_BUILT)
    own = rnnfast.load_cell(HEADERS / "gru.h", struct="GruCell")
    for dtype in (torch.float32, f64):
        torch.manual_seed(3)
        theirs = rnnfast.GRU(7, 40, 2, bidirectional=True, dtype=dtype)
        mine = own(7, 40, 2, bidirectional=True, dtype=dtype)
        mine.load_state_dict(theirs.state_dict())
        x = torch.randn(9, 5, 7, dtype=dtype, requires_grad=True)
        results = []
        for layer in (mine, theirs):
            y, h_n = layer(x)
            grads = torch.autograd.grad(y.sum() + h_n.sum(), [x, *layer.parameters()])
            results.append([y, h_n, *grads])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each
def test_types(loaded: Any, kind: str) -> None:
    torch.manual_seed(4)
    layer = loaded[kind](IN, H, dtype=f64)
    x = torch.randn(T, B, IN, dtype=f64)
    want = layer(x)[0]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)):
        other = copy.deepcopy(layer).to(dtype)
        got = other(x.to(dtype))[0]
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
        got.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in other.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(x.float())[0].dtype == torch.bfloat16


@each
@pytest.mark.parametrize("split", ["batch", "units"])
def test_threads(loaded: Any, kind: str, split: str) -> None:
    torch.manual_seed(5)
    layer = loaded[kind](IN, 70, 2, dtype=f64)
    x = torch.randn(12, 6, IN, dtype=f64)
    want = layer(x)[0]
    torch.set_num_threads(2)
    with rnnfast.use_engine("cpu", split=split):
        close(layer(x)[0], want)
    results: list[Tensor] = []
    workers = [threading.Thread(target=lambda: results.append(layer(x)[0])) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    close(results, [want] * 4)


@each
def test_streams_and_frozen_weights(loaded: Any, kind: str) -> None:
    layer = loaded[kind](IN, H, 2, dtype=f64).eval()
    x = torch.randn(T, B, IN, dtype=f64)
    want, last = layer(x)
    for frozen in (False, True):
        if frozen:
            layer.freeze()
        state = None
        with torch.inference_mode():
            for t in range(T):
                y, state = layer.step(x[t], state)
                close(y, want[t])
            close(layer(x)[0], want)
        close(leaves([state]), leaves([last]))


@each
def test_without_a_module(loaded: Any, kind: str) -> None:
    kind_of = loaded[kind]
    layer, x = kind_of(IN, H, 2, dtype=f64), torch.randn(T, B, IN, dtype=f64)
    weights = [p.detach() for p in layer.parameters()]
    close(leaves(kind_of.functional(x, None, weights, num_layers=2)), leaves(layer(x)))
    with pytest.raises(RuntimeError, match="weights must hold"):
        kind_of.functional(x, None, weights)


@each
def test_transforms(loaded: Any, kind: str) -> None:
    layer, x = loaded[kind](IN, H, dtype=f64), torch.randn(T, B, IN, dtype=f64)
    close(vmap(lambda v: layer(v.unsqueeze(1))[0].squeeze(1), 1, 1)(x), layer(x)[0])
    loss = lambda v: layer(v)[0].pow(2).sum()  # noqa: E731
    leaf = x.clone().requires_grad_()
    want = torch.autograd.grad(loss(leaf), leaf)[0]
    close(grad(loss)(x), want)
    tangent = torch.randn_like(x)
    close(jvp(loss, (x,), (tangent,))[1], (want * tangent).sum())


# --------------------------------------------------------------------------- as a module


def test_parameters(loaded: Any) -> None:
    def shapes(layer: Any) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in layer.named_parameters()}

    assert shapes(loaded["Leaky"](5, 7)) == {
        "weight_ih_l0": (14, 5), "weight_hh_l0": (14, 7), "bias_ih_l0": (14,), "bias_hh_l0": (14,),
        "weight_p_l0": (14,),
    }  # fmt: skip
    assert shapes(loaded["Unit"](5, 7, bias=False)) == {
        "weight_ih_l0": (7, 5), "weight_hh_l0": (7,)
    }  # fmt: skip
    assert shapes(loaded["Sum"](5, 7)) == {"weight_ih_l0": (7, 5), "bias_ih_l0": (7,)}
    both(loaded["Leaky"](5, 7, 2, bias=False, dtype=f64), torch.randn(2, 3, 5, dtype=f64))
    with pytest.raises(RuntimeError, match="weight_dropout is for layers with a w_hh"):
        loaded["Sum"](5, 7, weight_dropout=0.5)(torch.randn(2, 3, 5))
    with pytest.raises(TypeError, match="load_cell makes classes of it"):
        rnnfast.LoadedLayer(5, 7)
    torch.manual_seed(0)
    dropped = loaded["Mgu"](5, 7, weight_dropout=0.5, input_dropout=0.2)
    x = torch.randn(2, 3, 5)
    assert not torch.equal(dropped(x)[0], dropped(x)[0])
    assert torch.equal(dropped.eval()(x)[0], dropped(x)[0])


def test_copies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rnnfast.load_cell(folder / "mgu.h")
    assert found is rnnfast.load_cell(folder / "mgu.h") and found.__module__ == __name__
    assert found.spec.name == "Mgu" and found.header == (folder / "mgu.h").resolve()
    layer, x = found(IN, H), torch.randn(T, B, IN)
    monkeypatch.setitem(globals(), "Mgu", found)  # as `Mgu = load_cell(...)` of a module does
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert type(other) is found
        assert torch.equal(other(x)[0], layer(x)[0])


def test_the_same_header_elsewhere(folder: Path, tmp_path: Path) -> None:
    """It is the text that makes the cell."""
    shutil.copy(folder / "mgu.h", tmp_path / "other.h")
    one, two = rnnfast.load_cell(folder / "mgu.h"), rnnfast.load_cell(tmp_path / "other.h")
    assert one.spec.id == two.spec.id and cells.cell_spec(one.spec.id) is one.spec
    assert one.spec.id & 0xFF == 0xFF and one.spec.id > 0


def test_what_the_others_say(loaded: Any, caplog: pytest.LogCaptureFixture) -> None:
    layer, x = loaded["Mgu"](IN, H), torch.randn(T, B, IN)
    row = rnnfast.explain(layer, x).rows[0]
    assert row.shape.startswith("Mgu T=6 B=3") and row.engine == "cpu"
    assert isinstance(rnnfast.accelerate(torch.nn.ModuleList([layer]))[0], loaded["Mgu"])
    with caplog.at_level("INFO"):
        assert isinstance(rnnfast.quantize(torch.nn.ModuleList([layer.eval()]))[0], loaded["Mgu"])
    assert "there is no int8 form of Mgu" in caplog.text
    y, _ = next(iter(rnnfast.truncated(layer, x, steps=2)))
    assert y.shape == (2, B, H)


def test_other_engines_do_not_have_it(loaded: Any) -> None:
    weights = [w.detach() for w in loaded["Mgu"](IN, H).parameters()]
    forward = on_host.operators().forward
    with pytest.raises(
        RuntimeError, match="load_cell that this engine does not have: call load_cell"
    ):
        forward(
            torch.randn(T, B, IN), None, None, *weights, None, None, None, None,
            loaded["Mgu"].spec.id, False, False,
        )  # fmt: skip


def test_no_reference(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.h").write_text(MGU.replace("Mgu", "Alone"))
    found = rnnfast.load_cell(tmp_path / "alone.h")
    layer, x = found(IN, H, dtype=f64), torch.randn(T, B, IN, dtype=f64, requires_grad=True)
    sentence = "cell Alone has no reference: higher derivatives.*load_cell.path, reference=step"
    (dx,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=sentence):
        dx.sum().backward()
    with pytest.raises(RuntimeError, match=sentence), rnnfast.use_engine("reference"):
        layer(x)
    with pytest.raises(RuntimeError, match=sentence):
        jvp(lambda v: layer(v)[0], (x,), (x,))
    assert max(rnnfast.check_cell(found).values()) < 1e-5  # by differences
    rnnfast.load_cell(tmp_path / "alone.h", reference=lambda gx, gh, state: (state[0], gx[0]))
    with pytest.raises(RuntimeError, match="reference of Alone must return its 1 states, got 2"):
        rnnfast.check_cell(found)
    rnnfast.load_cell(tmp_path / "alone.h", reference=lambda gx, gh, state: gx[0].sum())
    with pytest.raises(RuntimeError, match=r"state 0 .* must have shape \(B, H\) = \(1, 43\)"):
        rnnfast.check_cell(found)
    with pytest.raises(TypeError, match="reference of load_cell must be a function"):
        rnnfast.load_cell(tmp_path / "alone.h", reference=3)  # type: ignore[arg-type]


class Behind(torch.nn.Module):
    """The cell of mgu.h in Python."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.x = torch.nn.Linear(inputs, 2 * H, dtype=f64)
        self.h = torch.nn.Linear(H, 2 * H, dtype=f64)

    def initial_state(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.size(0), H)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = mgu_step(self.x(x).chunk(2, -1), self.h(h).chunk(2, -1), (h,))
        return h, h


@row(
    "Cells of your own",
    "`load_cell`: a cell tried out with `Recurrent`, then compiled from a header; the numbers of "
    "both are the same, in stacks, two directions, with masks, resets, packed",
    torch_nn="has none",
    error="AttributeError: .*has no attribute 'load_cell'",
    cuda=False,
)
def test_from_python_to_a_header(library: Any, device: torch.device) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mgu.h")
        path.write_text(MGU)
        layer = library.load_cell(path)(IN, H, 2, bidirectional=True, dtype=f64)
    tried = library.Recurrent(
        lambda k, direction: Behind(IN if k == 0 else 2 * H), num_layers=2, bidirectional=True
    )
    weights = [w for cell in tried.cells for w in (*cell.x.parameters(), *cell.h.parameters())]
    with torch.no_grad():
        for k in range(0, len(weights), 4):
            for i, j in enumerate((0, 2, 1, 3)):  # w_ih, w_hh, b_ih, b_hh
                layer.get_parameter(layer._flat_weights_names[k + i]).copy_(weights[k + j])
    x, h0 = torch.randn(T, B, IN, dtype=f64), torch.randn(4, B, H, dtype=f64)
    options: list[dict[str, Any]] = [
        {},
        {"reset": torch.rand(T, B) < 0.3},
        {"lengths": LENGTHS},
        {"mask": torch.rand(T, B) < 0.7},
    ]
    for given in options:
        close(layer(x, h0, **given), tried(x, h0, **given))
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    close(layer(packed, h0)[0].data, tried(packed, h0)[0].data)


# --------------------------------------------------------------------------- check_cell


def test_states_are_named(loaded: Any) -> None:
    x = torch.randn(T, B, IN)
    with pytest.raises(TypeError, match=r"hx must be a tuple \(h_0, s1_0, s2_0\) of three tensors"):
        loaded["Drift"](IN, H)(x, (torch.zeros(1, B, H),) * 2)
    with pytest.raises(
        TypeError, match=r"\(h_0, s1_0, s2_0, s3_0, s4_0\) of 5 tensors, got Tensor"
    ):
        loaded["Traces"](IN, H)(x, torch.zeros(1, B, H))
    with pytest.raises(RuntimeError, match=r"state must be a tuple \(h, s1, s2, s3, s4\)"):
        loaded["Traces"](IN, H).step(x[0], torch.zeros(1, B, H))


@each
def test_good_cells_pass(loaded: Any, kind: str) -> None:
    errors = rnnfast.check_cell(loaded[kind])
    assert max(errors.values()) < 1e-4
    assert {"state[0]", "dgx[0]", "dstate[0]", "dw_ih of a layer of float32"} <= errors.keys()
    assert ("dp[0]" in errors) == (kind in ("Leaky", "Drift"))
    assert ("dgh[0]" in errors) == (kind not in ("Sum", "Drift"))


def test_bad_cells_are_told_where(tmp_path: Path) -> None:
    wrong = MGU.replace("dgh[1] = dgx[1] * f", "dgh[1] = dgx[1]").replace("Mgu", "Wrong")
    wrong = wrong.replace("dstate[0] = dh * (one - f)", "dstate[0] = dh * f")
    (tmp_path / "wrong.h").write_text(wrong)
    found = rnnfast.load_cell(tmp_path / "wrong.h")
    for known in (False, True):
        if known:
            rnnfast.load_cell(tmp_path / "wrong.h", reference=mgu_step)
        with pytest.raises(RuntimeError, match="rnnfast: Wrong is not what") as raised:
            rnnfast.check_cell(found)
        lines = str(raised.value).splitlines()
        assert [line.split(":")[0].strip() for line in lines[1:]] == ["dgh[1]", "dstate[0]"]
    rnnfast.load_cell(
        tmp_path / "wrong.h", reference=lambda gx, gh, state: mgu_step(gx, gh, state) * 2
    )
    with pytest.raises(RuntimeError, match=r"state\[0\]: forward gives"):
        rnnfast.check_cell(found)
    for other in (rnnfast.GRU, rnnfast.LoadedLayer, 3):
        with pytest.raises(TypeError, match="check_cell needs what load_cell returned"):
            rnnfast.check_cell(other)  # type: ignore[arg-type]


def test_a_missing_split_is_told(tmp_path: Path) -> None:
    text = MGU.replace("kSplitGates = true", "kSplitGates = false").replace("Mgu", "Unsplit")
    (tmp_path / "unsplit.h").write_text(text)
    with pytest.raises(RuntimeError, match="kSplitGates is false, so that dgx stands for dgh"):
        rnnfast.check_cell(rnnfast.load_cell(tmp_path / "unsplit.h", reference=mgu_step))


# --------------------------------------------------------------------------- graphs


def test_compiled(loaded: Any) -> None:
    for options in ({}, {"num_layers": 2, "bidirectional": True}):
        layer = loaded["Mgu"](IN, H, dtype=f64, **options)
        x = torch.randn(T, B, IN, dtype=f64, requires_grad=True)
        results = []
        for call in (layer, torch.compile(layer, fullgraph=True)):
            y, h_n = call(x)
            results.append([y, h_n, *torch.autograd.grad(y.pow(2).sum(), [x, *layer.parameters()])])
        close(*results)


RUN_EXPORTED = (
    QUICK
    + """
import sys
import torch
import rnnfast

program, header, load = sys.argv[1:]
if load == "yes":
    rnnfast.load_cell(header)
print(torch.export.load(program).module()(torch.ones(6, 3, 4))[0].sum().item())
"""
)


def test_exported(loaded: Any, folder: Path, tmp_path: Path) -> None:
    """A program carries the cell's name, not its code."""
    layer = loaded["Mgu"](IN, H).eval()
    program = torch.export.export(layer, (torch.ones(T, B, IN),))
    torch.export.save(program, tmp_path / "program.pt2")
    arguments = ("-c", RUN_EXPORTED, str(tmp_path / "program.pt2"), str(folder / "mgu.h"))
    done = run(*arguments, "yes")
    assert done.returncode == 0, done.stderr
    want = layer(torch.ones(T, B, IN))[0].sum().item()
    assert float(done.stdout) == pytest.approx(want, rel=1e-4)
    done = run(*arguments, "no")
    assert done.returncode != 0
    assert "is one of rnnfast.load_cell that" in done.stderr
