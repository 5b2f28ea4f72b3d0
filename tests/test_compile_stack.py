"""Stacks of layers and two directions in a graph of torch.compile: one operator, nothing beside it
for which a compiler would write a kernel, and the numbers and gradients of the eager layer and of
torch.nn."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_compile import Graphs, compiled, operators
from test_modules import leaves_of
from torch import Tensor, nn
from torch._inductor import metrics
from torch.func import vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import rnnfast

f64 = torch.float64
ops = torch.ops.rnnfast
INPUT, HIDDEN, STEPS, BATCH = 5, 6, 7, 4
# what no compiler writes a kernel for
FREE = ("getitem", "transpose", "t", "view", "detach", "alias", "unsqueeze", "squeeze", "sym_size")
# of a packed batch, whose size only the run knows
FREE += ("ge", "_assert_scalar")
# what resets are for padding: of which no kernel can be spared yet
MASK = ("arange", "lt", "bitwise_and")


def make(kind: str, layers: int, directions: int, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"dtype": f64} | options
    both = directions == 2
    return getattr(rnnfast, kind)(INPUT, HIDDEN, layers, bidirectional=both, **options)


def given(layer: Any, form: str) -> tuple[Tensor, dict[str, Any]]:
    """x and the other arguments of a form of call."""
    torch.manual_seed(1)
    dtype = layer.weight_ih_l0.dtype
    shape = (BATCH, STEPS) if layer.batch_first else (STEPS, BATCH)
    x, more = torch.randn(*shape, INPUT, dtype=dtype), {}
    if "hx" in form:
        rows = layer.num_layers * (1 + layer.bidirectional)
        h = torch.randn(rows, BATCH, layer.proj_size or HIDDEN, dtype=dtype, requires_grad=True)
        c = torch.randn(rows, BATCH, HIDDEN, dtype=dtype, requires_grad=True)
        more["hx"] = (h, c) if layer.mode == "LSTM" else h
    if "reset" in form:
        more["reset"] = torch.rand(shape) < 0.3
    if "lengths" in form:
        full = torch.full((BATCH,), STEPS)
        more["lengths"] = full if "full" in form else torch.tensor([3, STEPS, 1, 5])
    if "packed" in form:
        packed = pack_padded_sequence(x, torch.tensor([7, 5, 5, 2]), layer.batch_first)
        x, sizes = packed.data, packed.batch_sizes
        more["sizes"] = sizes
        if "reset" in form:
            more["reset"] = torch.rand(len(x)) < 0.3
    return x, more


def call(layer: Any, x: Tensor, sizes: Tensor | None = None, **more: Any) -> list[Tensor]:
    return leaves_of(layer(x if sizes is None else PackedSequence(x, sizes), **more))


def gradients(run: Callable[..., Any], layer: Any, x: Tensor, more: dict[str, Any]) -> list[Tensor]:
    """Outputs and the gradients of all that has one."""
    x = x.clone().requires_grad_()
    torch.manual_seed(2)  # dropout
    outs = run(x, **more)
    weighted = [o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o) for o in outs]
    loss = torch.stack([w.sum().double() for w in weighted]).sum()
    states = leaves_of(more.get("hx", ()))
    return [*outs, *torch.autograd.grad(loss, [x, *states, *layer.parameters()])]


def assert_close(got: Any, want: Any, tol: float = 1e-10) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def check(layer: Any, form: str, tol: float = 1e-10) -> Graphs:
    """The compiled layer gives what the eager one gives, gradients too."""
    x, more = given(layer, form)

    def run(x: Tensor, **more: Any) -> list[Tensor]:
        return call(layer, x, **more)

    function, graphs = compiled(run)
    assert_close(gradients(function, layer, x, more), gradients(run, layer, x, more), tol)
    return graphs


def assert_one_operator(graphs: Graphs, end: str = "", free: tuple[str, ...] = FREE) -> None:
    """No cat, no stack, no sum."""
    assert graphs.counts() == (1, 1)
    for graph, name in ((graphs.forward[0], "forward"), (graphs.backward[0], "backward")):
        calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        names = [target.__name__.split(".")[0] for target in calls]
        names = [n for n in names if n not in free and not n.startswith(("forward_", "backward_"))]
        assert not names
        (found,) = operators(graph)
        assert found == f"{name}_stack{end if name == 'forward' else end.replace('_dropout', '')}"


@pytest.mark.parametrize(
    ("kind", "layers", "directions", "form", "options"),
    [
        ("LSTM", 2, 2, "plain", {}),
        ("LSTM", 3, 1, "hx", {"proj_size": 3}),
        ("LSTM", 1, 2, "hx, reset", {"proj_size": 3, "bias": False}),
        ("LSTM", 2, 2, "hx, reset, lengths", {"batch_first": True}),
        ("LSTM", 2, 1, "lengths full", {}),
        ("LSTM", 3, 2, "packed", {"proj_size": 2}),
        ("GRU", 3, 2, "plain", {"batch_first": True}),
        ("GRU", 2, 1, "hx, reset", {"bias": False}),
        ("GRU", 1, 2, "lengths, reset", {}),
        ("GRU", 2, 2, "packed, reset", {}),
        ("GRU", 2, 2, "hx, packed", {}),
        ("LSTM", 2, 1, "hx, packed", {"proj_size": 2}),
        ("RNN", 2, 2, "hx, lengths", {"nonlinearity": "relu"}),
        ("RNN", 3, 1, "packed", {}),
        ("IndRNN", 3, 1, "hx, reset", {}),
        ("IndRNN", 2, 2, "packed, reset", {"bias": False}),
    ],
)
def test_the_numbers_of_the_eager_layer(
    kind: str, layers: int, directions: int, form: str, options: Any
) -> None:
    graphs = check(make(kind, layers, directions, **options), form)
    masked = "reset" in form and "lengths" in form
    free = (*FREE, *MASK) if masked else FREE
    assert_one_operator(graphs, "_lengths" if "lengths" in form else "", free)


@pytest.mark.parametrize(
    ("kind", "layers", "directions", "form"),
    [
        ("LSTM", 3, 1, "hx"),
        ("GRU", 2, 2, "plain"),
        ("RNN", 2, 2, "reset, packed"),
        ("LSTM", 2, 2, "hx, lengths"),
        ("IndRNN", 2, 1, "lengths full"),
    ],
)
@pytest.mark.parametrize("dropout", [0.4, 1.0])
def test_dropout(kind: str, layers: int, directions: int, form: str, dropout: float) -> None:
    """The masks of the eager layer for the same seed."""
    graphs = check(make(kind, layers, directions, dropout=dropout), form)
    assert_one_operator(graphs, "_lengths_dropout" if "lengths" in form else "_dropout")


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(("layers", "directions"), [(1, 2), (3, 1), (2, 2)])
def test_the_numbers_of_torch_nn(kind: str, layers: int, directions: int) -> None:
    layer = make(kind, layers, directions)
    theirs = getattr(nn, kind)(INPUT, HIDDEN, layers, bidirectional=directions == 2, dtype=f64)
    theirs.load_state_dict(layer.state_dict())
    x, more = given(layer, "hx")
    function, _ = compiled(lambda x, **more: call(layer, x, **more))
    want = gradients(lambda x, hx: call(theirs, x, hx=hx), theirs, x, more)
    assert_close(gradients(function, layer, x, more), want)


def _frozen(layer: Any, what: str) -> None:
    for name, weight in layer.named_parameters():
        kept = {
            "first layer": "_l0" in name,
            "all but the first": "_l0" not in name,
            "one direction": name.endswith("_reverse"),
            "one direction of the first": name.endswith("_l0"),
            "all but one bias": name != "bias_hh_l1",
            "all": True,
            "nothing": False,
        }[what]
        weight.requires_grad_(not kept)


# each output and each pair of them, each input; every case compiles anew
OUTPUTS_AND_INPUTS = (
    ((0,), ""), ((1,), "x"), ((2,), "c"), ((0, 2), "x, h, c"), ((1, 2), ""), ((1, 2), "c"),
    ((2,), "x, h, c"),
)  # fmt: skip


@pytest.mark.parametrize(
    "what",
    [
        *("first layer", "all but the first", "one direction", "one direction of the first"),
        *("all but one bias", "all", "nothing"),
    ],
)
@pytest.mark.parametrize(("layers", "directions"), [(3, 1), (2, 2)])
def test_only_the_gradients_asked_for(what: str, layers: int, directions: int) -> None:
    """Any part of the weights, states and input, and any part of the outputs."""
    layer = make("LSTM", layers, directions)
    _frozen(layer, what)
    x, more = given(layer, "hx")
    h, c = (t.detach() for t in more["hx"])
    function, _ = compiled(lambda x, hx: call(layer, x, hx=hx))
    for outputs, inputs in OUTPUTS_AND_INPUTS:
        leaves = {"x": x.clone(), "h": h.clone(), "c": c.clone()}
        wanted = [leaf.requires_grad_() for name, leaf in leaves.items() if name in inputs]
        wanted += [weight for weight in layer.parameters() if weight.requires_grad]
        if not wanted:
            continue
        results = []
        for run in (function, lambda x, hx: call(layer, x, hx=hx)):
            outs = run(leaves["x"], (leaves["h"], leaves["c"]))
            loss = torch.stack([outs[k].square().sum() for k in outputs]).sum()
            results.append(torch.autograd.grad(loss, wanted))
        assert_close(*results)


@pytest.mark.parametrize("outputs", [(0,), (1,), (2,)], ids=["y", "h_n", "c_n"])
def test_a_model_that_uses_one_output(outputs: tuple[int, ...]) -> None:
    """The others are no output of the graph, so that they have no gradient."""
    layer = make("LSTM", 2, 2, dropout=0.3)
    x, more = given(layer, "hx")

    def run(x: Tensor, hx: Any) -> list[Tensor]:
        outs = call(layer, x, hx=hx)
        return [outs[k].square() for k in outputs]

    function, _ = compiled(run)
    assert_close(gradients(function, layer, x, more), gradients(run, layer, x, more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("layers", "directions"), [(3, 1), (2, 2)])
def test_other_dtypes_and_autocast(dtype: torch.dtype, layers: int, directions: int) -> None:
    layer = make("GRU", layers, directions, dtype=dtype)
    assert_one_operator(check(layer, "hx, reset", 0.0))  # bit for bit
    if dtype == torch.float32:
        return
    layer = make("LSTM", layers, directions, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        graphs = check(layer, "hx", 0.0)
    assert operators(graphs.forward[0]) == ["forward_stack"]


def test_a_weight_in_several_places() -> None:
    layer = rnnfast.GRU(HIDDEN, HIDDEN, 3, dtype=f64)
    for k, name in itertools.product((1, 2), ("weight_ih", "weight_hh", "bias_ih", "bias_hh")):
        setattr(layer, f"{name}_l{k}", getattr(layer, f"{name}_l0"))
    x = torch.randn(STEPS, BATCH, HIDDEN, dtype=f64)
    function, _ = compiled(lambda x: call(layer, x))
    want = gradients(lambda x: call(layer, x), layer, x, {})
    assert_close(gradients(function, layer, x, {}), want)


@pytest.mark.parametrize("form", ["plain", "lengths", "packed"])
def test_few_graphs(form: str) -> None:
    """By default the first change of T and of B compile again, and no later one."""
    layer = make("GRU", 2, 2, dtype=torch.float32)
    function, graphs = compiled(lambda x, **more: call(layer, x, **more))
    counts = []
    for steps, batch in ((4, 3), (6, 3), (9, 3), (9, 6), (7, 8), (50, 2)):
        x, more = torch.randn(steps, batch, INPUT), {}
        lengths = torch.randint(1, steps + 1, (batch,)).sort(descending=True)[0]
        if form == "lengths":
            more["lengths"] = lengths
        elif form == "packed":
            packed = pack_padded_sequence(x, lengths)
            x, more["sizes"] = packed.data, packed.batch_sizes
        got, want = function(x, **more), call(layer, x, **more)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        sum(t.sum() for t in got).backward()
        counts.append(len(graphs.forward))
    assert counts[:2] == [1, 2] and counts[-1] == counts[3] <= 3
    assert len(graphs.backward) == len(graphs.forward)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("form", ["plain", "lengths"])
def test_inductor_writes_no_kernel(form: str, train: bool) -> None:
    """Kernels are what compiling a stack would take seconds for."""
    torch._dynamo.reset()
    layer = make("LSTM", 2, 2, dropout=0.5, dtype=torch.float32, batch_first=True).train(train)
    x, more = given(layer, form)
    metrics.reset()
    function = torch.compile(layer, fullgraph=True)
    with torch.set_grad_enabled(train):
        torch.manual_seed(3)
        got = leaves_of(function(x, **more))
        torch.manual_seed(3)
        want = leaves_of(layer(x, **more))
    assert_close(got, want, 1e-5)
    if train:
        dout = [torch.randn_like(t) for t in got]
        weights = list(layer.parameters())
        pair = [torch.autograd.grad(outs, weights, dout) for outs in (got, want)]
        assert_close(*pair, 1e-4)
    assert metrics.generated_kernel_count == 0


@pytest.mark.parametrize("form", ["plain", "hx, reset, lengths", "packed"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_derivatives_of_gradients(form: str, dropout: float) -> None:
    """Where nothing was compiled ahead (backend="eager"): second derivatives, and gradients in
    batches by all ways there are."""
    layer = make("LSTM", 2, 2, dropout=dropout)
    x, more = given(layer, form)
    torch._dynamo.reset()

    def eager(x: Tensor) -> list[Tensor]:
        return call(layer, x, **more)

    def all_of(run: Any) -> list[Tensor]:
        torch.manual_seed(3)
        z = x.clone().requires_grad_()
        wanted = [z, *layer.parameters()]
        loss = sum(t.square().sum() for t in run(z))
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        y = run(z)[0]
        basis = torch.eye(y.numel(), dtype=f64).view(-1, *y.shape)[5:8]
        keep: Any = {"retain_graph": True}

        def of(v: Tensor) -> Any:
            return torch.autograd.grad(y, wanted, v, **keep)

        if run is eager:
            one_by_one = [torch.stack(grads) for grads in zip(*map(of, basis), strict=True)]
            return [*first, *second, *one_by_one, *one_by_one]
        batched = torch.autograd.grad(y, wanted, basis, is_grads_batched=True, **keep)
        return [*first, *second, *batched, *vmap(of)(basis)]

    assert_close(all_of(torch.compile(eager, backend="eager", fullgraph=True)), all_of(eager))


def test_gradients_in_batches_of_a_compiled_backward() -> None:
    for dropout, form in ((0.4, "plain"), (0.0, "lengths")):
        layer = make("GRU", 2, 2, dropout=dropout)
        x, more = given(layer, form)
        function, _ = compiled(lambda x, layer=layer, more=more: call(layer, x, **more))
        results = []
        for run in (function, lambda x, layer=layer, more=more: call(layer, x, **more)):
            torch.manual_seed(3)
            y = run(x)[0]
            basis = torch.eye(y.numel(), dtype=f64).view(-1, *y.shape)[5:8]
            weights = list(layer.parameters())
            results.append(torch.autograd.grad(y, weights, basis, is_grads_batched=True))
        assert_close(*results)


def test_checkpoint() -> None:
    """Masks are drawn twice and are the same."""
    layer = make("LSTM", 2, 2, dropout=0.4)
    x, _ = given(layer, "plain")

    def run(x: Tensor) -> list[Tensor]:
        return checkpoint(lambda z: call(layer, z), x, use_reentrant=False)

    function, _ = compiled(run)
    assert_close(gradients(function, layer, x, {}), gradients(run, layer, x, {}))


def test_frozen_and_quantized() -> None:
    """A frozen layer computes with its plain weights, a quantized one direction by direction."""
    plain = rnnfast.LSTM(16, 16, 2, bidirectional=True)
    x = torch.randn(STEPS, BATCH, 16)
    layers = [plain.eval().freeze(), rnnfast.quantize(rnnfast.LSTM(16, 16, 2, bidirectional=True))]
    for layer, names in zip(layers, (["forward_stack"], ["forward"] * 4), strict=True):
        with torch.no_grad():
            function, graphs = compiled(layer)
            assert_close(leaves_of(function(x)), leaves_of(layer(x)), 1e-6)
        assert [n for n in operators(graphs.forward[0]) if n != "pack_int8"] == names


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_one_operator_a_direction(strict: bool) -> None:
    layer = make("GRU", 2, 2)
    x, _ = given(layer, "plain")
    program = torch.export.export(layer, (x,), strict=strict)
    assert operators(program.graph_module) == ["forward"] * 4
    assert_close(leaves_of(program.module()(x)), leaves_of(layer(x)))


def arguments(
    layers: int, directions: int, form: str, dropout: float = 0.0
) -> tuple[str, list[Any]]:
    """An LSTM's: the end of the operator's name, and what it takes."""
    layer = make("LSTM", layers, directions, proj_size=3)
    x, more = given(layer, form)
    h, c = more.get("hx", (None, None))
    reset, lengths, sizes = (more.get(name) for name in ("reset", "lengths", "sizes"))
    numbers = [0, layers, directions, dropout, True]
    end = ("" if lengths is None else "_lengths") + ("_dropout" if dropout else "")
    x.requires_grad_()
    return end, [x, h, c, list(layer.parameters()), sizes, lengths, reset, *numbers]


@pytest.mark.parametrize(
    ("layers", "directions", "form", "dropout"),
    [
        (2, 2, "plain", 0.0),
        (3, 1, "hx, reset", 0.0),
        (2, 1, "packed, hx", 0.0),
        (1, 2, "packed", 0.0),
        (2, 2, "hx, lengths, reset", 0.0),
        (3, 1, "hx, reset", 0.5),
        (2, 2, "lengths", 0.5),
    ],
)
def test_opcheck(layers: int, directions: int, form: str, dropout: float) -> None:
    end, args = arguments(layers, directions, form, dropout)
    forward = getattr(ops, f"forward_stack{end}").default
    # a draw has no second time
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    tests = utils if dropout else (*utils, "test_aot_dispatch_dynamic")
    torch.library.opcheck(forward, args, test_utils=tests)
    plain = [a.detach() if isinstance(a, Tensor) else a for a in args]
    plain[3] = [w.detach() for w in args[3]]
    y, h_n, _, *kept = forward(*plain)
    backward = getattr(ops, f"backward_stack{end.removesuffix('_dropout')}").default
    some = [k % 3 == 0 for k in range(len(args[3]))]
    given = [plain[1] is not None] * 2
    for needs in ([True, *given, *[True] * len(some)], [False, False, False, *some]):
        args = [y, h_n, None, *plain[:7], y, kept, *plain[7:11], needs]
        torch.library.opcheck(backward, args)


def test_second_derivative_of_the_operators() -> None:
    end, args = arguments(2, 2, "hx, lengths", 0.3)
    torch.manual_seed(3)
    y, h_n, c_n, *kept = getattr(ops, f"forward_stack{end}")(*args)
    dout = [torch.randn_like(t).requires_grad_() for t in (y, h_n, c_n)]
    leaves = [*args[:3], *args[3]]
    back = [*dout, *args[:7], y, kept, *args[7:11], [True] * len(leaves)]
    got = ops.backward_stack_lengths(*back)
    layer = make("LSTM", 2, 2, proj_size=3, dropout=0.3)
    layer.load_state_dict(dict(zip(layer.state_dict(), args[3], strict=True)))
    torch.manual_seed(3)
    outs = call(layer, args[0], hx=tuple(args[1:3]), lengths=args[5])
    theirs = [*args[:3], *layer.parameters()]
    want = torch.autograd.grad(outs, theirs, dout, create_graph=True)
    assert_close(got, want)
    sums = [sum(g.square().sum() for g in grads) for grads in (got, want)]
    assert_close(
        torch.autograd.grad(sums[0], [*dout, *leaves]),
        torch.autograd.grad(sums[1], [*dout, *theirs]),
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_arguments(device: str) -> None:
    """The same sentences with and without values."""
    _, args = arguments(2, 2, "hx, reset")
    cases: list[tuple[int, Any, str]] = [
        (1, args[1][:3], r"h0 must have shape \(L\*D, B, P\) with L\*D = 4, got \(3, 4, 3\)"),
        (2, args[2][0], r"c0 must have shape \(L\*D, B, H\) with L\*D = 4, got \(4, 6\)"),
        (2, args[2][:, :3], r"c0 must have shape \(S-1, B, H\) = \(1, 4, 6\), got \(1, 3, 6\)"),
        (3, args[3][:-1], "weights must hold 2 to 5 tensors for each of L\\*D = 4 passes, got 19"),
        (3, [*args[3][1:], args[3][0]], "w_ih must have shape"),
        (8, 0, r"num_layers must be at least 1, directions 1 or 2, got \(0, 2\)"),
        (6, args[6].float(), "reset must be bool, got float32"),
    ]
    for place, wrong, text in cases:
        given = [*args[:place], wrong, *args[place + 1 :]]
        given = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), given)
        with pytest.raises(RuntimeError, match=text):
            ops.forward_stack(*given)
    with_lengths = [*args[:5], torch.ones(3, dtype=torch.long), *args[6:]]
    with pytest.raises(RuntimeError, match=r"lengths must have shape \(B,\) = \(4,\), got \(3,\)"):
        ops.forward_stack_lengths(*with_lengths)


def test_mixed_devices() -> None:
    _, args = arguments(2, 2, "hx")
    weights = [*args[3][:-1], args[3][-1].to("meta")]
    with pytest.raises(RuntimeError, match="must be on the same device as x"):
        ops.forward_stack(*args[:3], weights, *args[4:])
    with pytest.raises(RuntimeError, match="w_hr must be on the same device as x"):
        ops.forward_stack(*args[:3], weights, *args[4:])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rows", [2, 3, 5])
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_states_of_another_batch_than_the_packed_one(
    kind: str, layers: int, rows: int, enforce_sorted: bool
) -> None:
    """The batch of packed rows is no shape: a graph learns it when it runs."""
    layer = getattr(rnnfast, kind)(INPUT, HIDDEN, layers)
    lengths = torch.tensor([7, 5, 2] if enforce_sorted else [2, 7, 5])
    packed = pack_padded_sequence(torch.randn(7, 3, INPUT), lengths, enforce_sorted=enforce_sorted)
    h = torch.randn(layers, rows, HIDDEN)
    hx = (h, h.clone()) if kind == "LSTM" else h
    function = torch.compile(lambda packed, hx: layer(packed, hx)[0].data, backend="aot_eager")
    if rows == 3:
        torch.testing.assert_close(function(packed, hx), layer(packed, hx)[0].data)
    else:
        with pytest.raises(RuntimeError, match=r"Expected hidden|h0 must have shape|hx.* must"):
            function(packed, hx)
