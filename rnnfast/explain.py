"""Say in words which engine a layer gets, and why."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import _cuda, engine
from ._batch_norm import threads_of
from ._checks import DTYPES, check_dense
from ._layer import Layer, spec_of
from .batch_norm import BatchNormLSTM
from .cell_modules import GRUCell, LSTMCell, RNNCell
from .cells import CellSpec, cell_spec, own_on_cuda
from .quantize import Quantized

__all__ = ["Explanation", "Row", "explain"]

_COLUMNS = ("layer", "shape", "engine", "isa", "threads", "split", "kernel", "reason")


@dataclass(frozen=True)
class Row:
    """One direction of one layer.

    Args:
        layer: its name
        shape: sizes, cell and dtype in words
        engine: ``"cpu"``, ``"cuda"``, ``"reference"``, ``"torch.nn"``, or ``"none"`` if nothing
            can run it
        isa: instruction set of the kernels, on a GPU as ``"sm_90"``, or ``"-"``
        threads: number of threads, or 0 where rnnfast does not choose it
        split: how threads divide the work: ``"serial"``, ``"batch"``, ``"units"``, or
            ``"directions"`` or ``"layers"`` where those of a layer run side by side (on a GPU: on
            streams)
        kernel: where the products take their weights: ``"packed"`` or ``"direct"``; input side
            and hidden side if they differ. On a GPU ``"step"``, a product and a kernel a step, or
            ``"onchip"``, where w_hh stays on the chip
        reason: why; where there was a choice, with the microseconds that the cost model gives a
            forward pass under each split
    """

    layer: str
    shape: str
    engine: str
    isa: str
    threads: int
    split: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found: ``rows``, and a table as its text."""

    rows: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.rows:
            return "no recurrent layers"
        table = [_COLUMNS, *(tuple(str(getattr(r, c)) for c in _COLUMNS) for r in self.rows)]
        widths = [max(len(line[k]) for line in table) for k in range(len(_COLUMNS))]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        )


def _reason(
    isa: str,
    ran: str,
    dtype: str,
    threads: int,
    split: str,
    kernel: str,
    kept: str,
    times: dict[str, float],
    beside: str,
    stages: bool,
    heads: int,
) -> str:
    text = f"{isa} is " + ("forced" if engine.isa_is_forced() else "the widest of this machine")
    if ran != isa:
        text += f" and runs {ran}'s kernels for {dtype}"
        text += " weights that are not packed" if dtype == "bfloat16" else ""
    parts = [text]
    parts.append(
        {
            "serial": "too little work, or one thread, to divide",
            "batch": f"{threads} threads take rows of the batch and need no synchronisation",
            "units": f"{threads} threads take hidden units and meet once a step",
            "directions": "directions and heads run side by side, each on its share of the threads"
            if heads > 1
            else "both directions run side by side, each on half of the threads",
            "layers": "layers run side by side, each a few steps behind the one that it reads",
        }[split]
    )
    if engine.split_is_forced():
        parts[-1] = "the split is forced by use_engine"
    elif len(times) > 1:
        listed = ", ".join(f"{name} {time:.0f} us" for name, time in times.items())
        one = "head" if heads > 1 else "direction"
        alone = {"directions": f" of one {one} alone", "layers": " of one layer alone"}.get(
            split, f" of one {one}" if heads > 1 else ""
        )
        parts[-1] += f" (model{alone}: {listed})"
    if stages:
        parts.append("the stages of a step want whole rows, so that units are never divided")
    if beside:
        parts.append(f"model: {beside}")
    if kept:
        parts.append(f"weights packed by {kept}")
    elif engine.kernel_is_forced():
        parts.append("the kernel is forced by use_engine")
    elif "packed" in kernel:
        parts.append("seq_len*batch repays packing the weights")
    elif "direct" in kernel:
        parts.append("too few rows to repay packing the weights")
    return "; ".join(parts)


@dataclass(frozen=True)
class Beside:
    """Which of the passes that may run side by side a pass is: the ``index``-th of ``count``, the
    first of which has ``input_size``."""

    count: int
    chained: bool
    index: int
    input_size: int


def _cuda_row(
    name: str,
    shape: str,
    spec: CellSpec,
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    train: bool,
    kept: str,
    beside: Beside | None,
) -> Row:
    """The row of a layer on a CUDA device."""
    why = _cuda.why_not_on(device)
    if not why and spec.is_own and spec.id not in own_on_cuda:
        why = f"{spec.name} was not compiled for CUDA; load_cell(..., cuda=True) does it"
    if kept:
        why = f"{kept} is for the CPU engine"
    if why:
        return Row(name, shape, "none", "-", 0, "-", "-", f"no engine can run on {device}: {why}")
    properties = torch.cuda.get_device_properties(device)
    major, minor = properties.major, properties.minor
    tf32 = dtype == torch.float32 and _cuda.is_tf32_allowed()
    passes = _cuda.Passes(
        spec.id,
        (*sizes[:2], sizes[2] if beside is None else beside.input_size, *sizes[3:]),
        dtype.itemsize,
        10 * major + minor,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        *((1, False) if beside is None else (beside.count, beside.chained)),
        tf32=tf32,
    )
    wish = engine.wished_cuda_kernel()
    if wish == _cuda.KERNELS.index("onchip"):
        why = passes.why_not_onchip()
        if not why and train:
            why = replace(passes, backward=True).why_not_onchip()
        if why:
            return Row(name, shape, "none", "-", 0, "-", "-", f"{why} (use_engine forces it)")
    launch, streams, steps, kernel = passes.choose(engine.wished_launch(), wish)
    split = "-" if streams == 1 else "layers" if passes.chained else "directions"
    if not spec.dense:
        parts = ["all steps with the same rows in one launch: the recurrence has no product"]
    elif kernel == "onchip":
        parts = ["w_hh stays on the chip for all steps, forced by use_engine"]
    else:
        parts = ["a cuBLAS product and one kernel a step"]
        if spec.stages:
            parts = ["the products and kernels of a step's stages"]
        parts[0] += ", forced by use_engine" if wish >= 0 else ""
    parts.append(
        "launches are "
        + ("programmatic dependent" if launch == "pdl" else "plain")
        + (", forced by use_engine" if engine.launch_is_forced() else "")
    )
    if dtype == torch.float32:
        parts.append(f"products in {'TF32' if tf32 else 'float32'}, as nn.LSTM's")
    whole = steps >= sizes[0]
    parts.append(f"the input projection takes {'all' if whole else steps} steps at once")
    if streams > 1:
        parts.append(f"{streams} streams of torch's pool")
    return Row(name, shape, "cuda", f"sm_{major}{minor}", 0, split, kernel, "; ".join(parts))


def _row(
    name: str,
    spec: CellSpec,
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    train: bool,
    kept: str = "",
    beside: Beside | None = None,
) -> Row:
    """``dtype`` is that of the weights; ``kept`` names what packed them before the call, if so;
    ``beside``: the passes of its layer that one call runs."""
    seq_len, batch, input_size, hidden, out = sizes
    text = str(dtype).removeprefix("torch.")
    shape = f"{spec.name} T={seq_len} B={batch} I={input_size} H={spec.heads * hidden}"
    shape += f" heads={spec.heads}" if spec.heads > 1 else ""
    shape += f" P={out}" if out != hidden else ""
    shape += f" {text}{' train' if train else ''}"
    nothing = ("-", 0, "-", "-")
    if engine.forced == "reference":
        return Row(name, shape, "reference", *nothing, "forced by use_engine")
    if dtype not in (*DTYPES, torch.int8):
        return Row(name, shape, "none", *nothing, f"no engine for {dtype}: use float32, say")
    if device.type == "cuda":
        return _cuda_row(name, shape, spec, sizes, dtype, device, train, kept, beside)
    if device.type not in ("cpu", "meta"):
        return Row(name, shape, "none", *nothing, f"there is no engine for {device.type}")
    itemsize = (torch.float32 if dtype == torch.int8 else dtype).itemsize
    offered, packed = torch.get_num_threads(), bool(kept)
    isa, threads, ih, hh, split = engine.choose(spec.id, sizes, itemsize, offered, packed)
    beside_text = ""
    if beside is not None:
        first = (seq_len, batch, beside.input_size, hidden, out)
        teams, each, alone, at_once = engine.choose_group(
            spec.id, first, itemsize, offered, packed, beside.count, beside.chained
        )
        together = min(teams, beside.count - beside.index // teams * teams)
        if together > 1:  # else one after the other, or the one that is left
            split = "layers" if beside.chained else "directions"
            threads = together * each
        if alone > 0 and at_once > 0:
            what = "both directions" if spec.heads == 1 else f"all {beside.count} heads"
            what = f"all {beside.count} layers" if beside.chained else what
            beside_text = f"{what} {alone:.0f} us one by one, {at_once:.0f} us side by side"
    if kept:
        ih, hh = "packed", "packed" if spec.dense else "diagonal"
    kernel = ih if hh in (ih, "diagonal") else f"{ih}/{hh}"
    dot = dtype == torch.int8 or (dtype == torch.bfloat16 and kernel == "packed")
    ran = engine.ran_isa(isa, dot)
    times = engine.estimates(spec.id, sizes, itemsize, offered, packed)
    reason = _reason(
        isa, ran, text, threads, split, kernel, kept, times, beside_text, spec.stages, spec.heads
    )
    return Row(name, shape, "cpu", ran, threads, split, kernel, reason)


def _batch_norm_row(
    name: str, sizes: tuple[int, int, int, int, int], weight: Tensor, train: bool
) -> Row:
    """The row of a direction of BatchNormLSTM, whose kernels are its own."""
    steps, batch, inputs, hidden, _ = sizes
    dtype = torch.float32 if weight.dtype in DTYPES and weight.dtype.itemsize == 2 else weight.dtype
    row = _row(name, cell_spec("lstm"), sizes, dtype, weight.device, train)
    text = str(weight.dtype).removeprefix("torch.")
    shape = f"batch_norm_lstm T={steps} B={batch} I={inputs} H={hidden} {text}"
    row = replace(row, shape=shape + " train" * train)
    if row.engine == "cuda" and row.kernel != "step":
        why = "the on-chip engine has no batch normalisation (use_engine forces it)"
        return Row(name, row.shape, "none", "-", 0, "-", "-", why)
    if row.engine != "cpu":
        return row
    threads = threads_of(batch, inputs, hidden, torch.get_num_threads())
    isa = engine.ran_isa(engine.active_isa(), False)
    parts = [
        f"{isa} is {'forced' if engine.isa_is_forced() else 'the widest of this machine'}",
        f"{threads} threads take hidden units of all rows, and meet once a step"
        if threads > 1
        else "too little work, or one thread, to divide",
        "the kernels of recurrent batch normalisation pack the weights at each call",
    ]
    return replace(
        row,
        isa=isa,
        threads=threads,
        split="units" if threads > 1 else "serial",
        kernel="packed",
        reason="; ".join(parts),
    )


def _check_sizes(layer: nn.Module, x: Any, seq_len: Any, batch: Any) -> None:
    """Of what a layer alone is asked about: it is not run, and says nothing itself."""
    for size, found in (("seq_len", seq_len), ("batch", batch)):
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            raise RuntimeError(f"rnnfast: {size} of explain must be an int >= 0, got {found!r}")
    if x is None or isinstance(x, PackedSequence):
        return
    if not isinstance(x, Tensor):
        raise TypeError(
            "rnnfast: x of explain must be a tensor or a PackedSequence, got " + type(x).__name__
        )
    check_dense(x, "x of explain")
    dims = (1, 2) if isinstance(layer, nn.RNNCellBase) else (2, 3)
    if x.dim() not in dims:
        raise ValueError(
            f"rnnfast: x of explain must have {dims[0]} or {dims[1]} dimensions for "
            f"{type(layer).__name__}, got {x.dim()}"
        )


def _layer_rows(name: str, module: nn.Module, x: Any, seq_len: int, batch: int) -> list[Row]:
    quantized = isinstance(module, Quantized)
    tensors = module.buffers if quantized else module.parameters
    weight = next(tensors(recurse=False), torch.empty(0))
    train = torch.is_grad_enabled() and weight.requires_grad
    if not isinstance(module, (Layer, Quantized, BatchNormLSTM, LSTMCell, GRUCell, RNNCell)):
        why = "a layer of torch.nn: rnnfast.accelerate(model) swaps it, or logs why not"
        return [Row(name, type(module).__name__, "torch.nn", "-", 0, "-", "-", why)]
    m: Any = module
    cells = {"LSTMCell": "lstm", "GRUCell": "gru"}
    if isinstance(module, (Layer, Quantized, BatchNormLSTM)):
        if isinstance(x, PackedSequence):
            seq_len, batch = x.batch_sizes.numel(), int(x.batch_sizes[0])
        elif x is not None and x.dim() == 3:
            seq_len, batch = (x.size(1), x.size(0)) if m.batch_first else x.shape[:2]
        elif x is not None:
            seq_len, batch = x.size(0), 1
        directions = 2 if m.bidirectional else 1
        if isinstance(module, BatchNormLSTM):
            h = module.hidden_size
            return [
                _batch_norm_row(
                    f"{name}.{suffix[1:]}".lstrip("."),
                    (seq_len, batch, m.input_size if k == 0 else directions * h, h, h),
                    weight,
                    train,
                )
                for k in range(module.num_layers)
                for suffix in module._suffixes(k)
            ]
        spec = spec_of(module)
        hidden = m.hidden_size // spec.heads  # of a pass
        out = m.proj_size or hidden

        def kept(index: int) -> str:
            if quantized:
                return "quantize()"
            frozen = m._frozen
            if frozen is None:
                return ""
            passes = range(index * spec.heads, (index + 1) * spec.heads)
            return f"freeze(), {sum(map(frozen.bytes, passes)) / 2**20:.1f} MiB"

        def beside(layer: int, direction: int, inputs: int) -> Beside | None:
            if train and spec.planes > 0 and getattr(m, "recompute", False):
                return None  # one pass after the other, a chunk at a time
            if m.zoneout or (m.training and m.recurrent_dropout):
                return None  # one pass after the other
            if m.bidirectional or spec.heads > 1:
                return Beside(directions * spec.heads, False, direction * spec.heads, inputs)
            between = m.residual or (m.training and (m.dropout > 0 or m.input_dropout > 0))
            if m.num_layers == 1 or between:
                return None
            return Beside(m.num_layers, True, layer, m.input_size)

        rows = []
        for k in range(m.num_layers):
            inputs = m.input_size if k == 0 else out * directions * spec.heads
            sizes = (seq_len, batch, inputs, hidden, out)
            rows += [
                _row(
                    f"{name}.l{k}{'_reverse' if d else ''}".lstrip("."),
                    spec,
                    sizes,
                    weight.dtype,
                    weight.device,
                    train,
                    kept(k * directions + d),
                    beside(k, d, inputs),
                )
                for d in range(directions)
            ]
        return rows
    spec = cell_spec(cells.get(type(module).__name__) or f"rnn_{m.nonlinearity}")
    if x is not None:
        batch = x.size(0) if x.dim() == 2 else 1
    h = int(m.hidden_size)
    sizes = (1, batch, int(m.input_size), h, h)
    return [_row(name or "cell", spec, sizes, weight.dtype, weight.device, train)]


def _inputs(model: nn.Module, layers: dict[str, nn.Module], x: Any) -> dict[str, Any]:
    """What each recurrent layer receives when the model is called with x."""
    seen: dict[str, Any] = {}
    hooks = []
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()  # no running statistics, no random numbers
        for name, module in layers.items():

            def look(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                seen.setdefault(name, args[0] if args else None)

            hooks.append(module.register_forward_pre_hook(look))
        with torch.no_grad():
            model(*x) if isinstance(x, tuple) and not isinstance(x, PackedSequence) else model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return seen


def explain(
    what: nn.Module | str,
    x: Any = None,
    *,
    seq_len: int = 100,
    batch: int = 1,
    input_size: int | None = None,
    hidden_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    train: bool = False,
    device: torch.device | str = "cpu",
) -> Explanation:
    """Tell which engine, ISA, threads, split and kernel a layer, model or shape gets, and why.

    Each layer is explained for the device of its weights, the name of a cell for ``device``.

    Args:
        what: a layer, a model with recurrent layers in it, or the name of a cell ("lstm", "gru",
            "rnn_tanh", "rnn_relu", "indrnn_tanh", "indrnn_relu")
        x: input to look at; a model is run on it once, in eval mode and without gradients (a
            tuple holds several arguments). Without it ``seq_len`` and ``batch`` are taken
        seq_len, batch: number of steps and of sequences
        input_size, hidden_size, dtype, train: for the name of a cell; ``torch.int8`` stands for a
            layer that :func:`rnnfast.quantize` made
        device: for the name of a cell

    Returns:
        :class:`Explanation`: ``rows``, one for each layer and direction; printing it gives a table

    Raises:
        RuntimeError: for an unknown cell, a cell's name without its sizes, or sizes below 0
        TypeError: if ``what`` is neither a module nor a name, or a layer's ``x`` no input

    Example::

        >>> print(rnnfast.explain(rnnfast.LSTM(512, 512), seq_len=50, batch=8))
        >>> rnnfast.explain("gru", seq_len=1, batch=1, input_size=64, hidden_size=64).rows[0].engine
        'cpu'
    """
    if isinstance(what, str):
        if input_size is None or hidden_size is None:
            raise RuntimeError(
                f'rnnfast: explain("{what}") needs input_size and hidden_size, '
                f"got {input_size} and {hidden_size}"
            )
        spec = cell_spec(what)
        sizes = (seq_len, batch, input_size, hidden_size, hidden_size)
        kept = "quantize()" if dtype == torch.int8 else ""
        where = torch.device(device)
        return Explanation([_row(spec.name, spec, sizes, dtype, where, train, kept)])
    if not isinstance(what, nn.Module):
        raise TypeError(
            "rnnfast: explain needs a torch.nn.Module or the name of a cell, got "
            f"{type(what).__name__}"
        )
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in what.named_modules()
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase, Quantized, BatchNormLSTM))
    }
    inputs: dict[str, Any] = {}
    if x is not None:
        # a layer tells its shapes by itself; only a model must be run to know them
        inputs = {"": x} if "" in layers else _inputs(what, layers, x)
    _check_sizes(what, inputs.get(""), seq_len, batch)
    rows: list[Row] = []
    for name, module in layers.items():
        rows += _layer_rows(name, module, inputs.get(name), seq_len, batch)
    return Explanation(rows)
