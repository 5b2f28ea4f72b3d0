"""The one generator of cases, and the ways to run them."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import oracle
import torch
from pairwise import pairwise
from tolerance import Peer, Tensors, last_bits
from torch import Tensor

import rnnfast

SEQ_LENS = (1, 2, 3, 7, 40)
BATCHES = (0, 1, 2, 5, 6, 7, 13, 33)
HIDDEN = (1, 3, 8, 15, 16, 17, 31, 33, 64, 100, 130)
INPUTS = (1, 5, 16, 40)
DTYPES = (torch.float32, torch.float64)
_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}
LAYOUTS = ("contiguous", "batch_first", "strided", "offset", "expanded")
# What x may be. A packed batch has one layout and two seats, so that enough cases are packed.
FORMS = (*LAYOUTS, "packed", "packed, uneven")
LOSSES = ("all", "y", "state")

SIZES: dict[str, Sequence[Any]] = {
    "hidden": HIDDEN,
    "batch": BATCHES,
    "cell": oracle.CELLS,
    "seq_len": SEQ_LENS,
    "input_size": INPUTS,
}
OPTIONS: dict[str, Sequence[Any]] = {
    "form": FORMS,
    "loss": LOSSES,
    "dtype": DTYPES,
    "bias": (True, False),
    "state": (True, False),
    "reverse": (False, True),
    "threads": (1, 2),
}
PROJECTED: dict[str, Sequence[Any]] = {
    "hidden": (3, 8, 17, 33, 64),
    "proj": (1, 2, 16, 31),
    "batch": (1, 2, 7, 13),
    "seq_len": (1, 3, 7),
    "input_size": (5, 16),
    "packed": (False, True),
}


@dataclass(frozen=True)
class Case:
    """One direction of one layer. ``proj`` 0 means none; ``lengths`` makes the input packed."""

    cell: str
    seq_len: int
    batch: int
    input_size: int
    hidden: int
    dtype: torch.dtype = torch.float32
    proj: int = 0
    bias: bool = True
    state: bool = True
    reverse: bool = False
    packed: bool = False
    layout: str = "contiguous"
    loss: str = "all"
    threads: int = 1

    def __str__(self) -> str:
        marks = [
            self.cell,
            f"T{self.seq_len}-B{self.batch}-I{self.input_size}-H{self.hidden}",
            _SHORT[self.dtype],
        ]
        marks += [f"P{self.proj}"] if self.proj else []
        marks += [] if self.bias else ["nobias"]
        marks += [] if self.state else ["nostate"]
        marks += ["reverse"] if self.reverse else []
        marks += ["packed"] if self.packed else []
        marks += [self.layout] if self.layout != "contiguous" else []
        marks += [f"loss_{self.loss}"] if self.loss != "all" else []
        return "-".join([*marks, f"{self.threads}thr"])

    @property
    def lengths(self) -> list[int] | None:
        """Uneven, sorted, the longest first; None for a padded batch."""
        if not self.packed:
            return None
        rng = random.Random(zlib.crc32(str(self).encode()))
        rest = [rng.randint(1, self.seq_len) for _ in range(self.batch - 1)]
        return sorted([self.seq_len, *rest], reverse=True)


def engine_cases() -> list[Case]:
    """Every pair of options and sizes, twice, for all cells; projections and large sizes on top."""
    cases = []
    for seed in range(2):
        for row in pairwise(SIZES | OPTIONS, seed):
            form = row.pop("form")
            # A packed batch has at least one sequence.
            packed = form.startswith("packed") and row["batch"] > 0
            layout = form if form in LAYOUTS else "contiguous"
            cases.append(Case(**row, packed=packed, layout=layout))
        for row in pairwise(PROJECTED | {k: v for k, v in OPTIONS.items() if k != "form"}, seed):
            row["proj"] = min(row["proj"], row["hidden"] - 1)
            cases.append(Case("lstm", **row))
    # Weights larger than a private cache, where the engine may split by units.
    for cell, hidden in (("lstm", 320), ("gru", 384), ("rnn_tanh", 640), ("rnn_relu", 520)):
        for batch, dtype in ((1, torch.float32), (2, torch.float64), (20, torch.float32)):
            cases.append(Case(cell, 4, batch, 16, hidden, dtype, threads=2))
    cases.append(Case("indrnn_relu", 5, 9, 33, 640, threads=2))
    cases.append(Case("lstm", 6, 9, 16, 320, proj=200, packed=True, threads=2))
    cases.append(Case("gru", 6, 9, 16, 384, packed=True, reverse=True, threads=2))
    return list(dict.fromkeys(cases))


def small_cases() -> list[Case]:
    """A few cases of every cell, for tests that multiply them by something else."""
    cases = []
    for cell in oracle.CELLS:
        cases += [
            Case(cell, 3, 5, 5, 17, torch.float32),
            Case(cell, 7, 1, 16, 33, torch.float32, reverse=True, threads=2),
            Case(cell, 7, 13, 40, 64, torch.float32, bias=False, packed=True, threads=2),
            Case(cell, 2, 6, 16, 31, torch.float64, state=False, threads=2),
            Case(cell, 4, 7, 1, 100, torch.float64, packed=True, reverse=True),
        ]
    cases += [
        Case("lstm", 3, 6, 5, 33, torch.float32, proj=7, threads=2),
        Case("lstm", 5, 7, 5, 17, torch.float64, proj=16, packed=True),
    ]
    return cases


# --------------------------------------------------------------------------- tensors


@dataclass
class Problem:
    """A case with its tensors: inputs by name (None where absent) and cotangents of the outputs."""

    case: Case
    inputs: dict[str, Tensor | None]
    cotangents: Tensors

    @property
    def names(self) -> list[str]:
        return [name for name, value in self.inputs.items() if value is not None]


def with_layout(x: Tensor, layout: str) -> Tensor:
    """The same values as x (T, B, I), laid out otherwise."""
    if layout == "batch_first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "offset":
        wide = x.new_full((x.shape[0] + 1, x.shape[1] + 2, x.shape[2] + 3), float("nan"))
        wide[1:, 1:-1, 2:-1] = x
        return wide[1:, 1:-1, 2:-1]
    if layout == "expanded":
        return x[:1].expand_as(x) if x.shape[0] else x
    return x.contiguous()


def _draw(case: Case, seed: int) -> Problem:
    gen = torch.Generator().manual_seed(seed)
    hidden, gates = case.hidden, oracle.GATES[case.cell]
    out = case.proj or hidden
    bound = hidden**-0.5

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64).to(case.dtype)

    def weight(*shape: int) -> Tensor:
        w = torch.rand(shape, generator=gen, dtype=torch.float64) * 2 - 1
        return (w * bound).to(case.dtype)

    diagonal = case.cell.startswith("indrnn")
    x = normal(case.seq_len, case.batch, case.input_size)
    lstm = case.cell == "lstm"
    inputs: dict[str, Tensor | None] = {
        "x": with_layout(x, case.layout),
        "h0": normal(case.batch, out) if case.state else None,
        "c0": normal(case.batch, hidden) if case.state and lstm else None,
        "w_ih": weight(gates * hidden, case.input_size),
        "w_hh": weight(hidden) if diagonal else weight(gates * hidden, out),
        "b_ih": weight(gates * hidden) if case.bias else None,
        "b_hh": weight(gates * hidden) if case.bias else None,
        "w_hr": weight(case.proj, hidden) if case.proj else None,
    }
    cotangents = {
        "y": normal(case.seq_len, case.batch, out),
        "h_n": normal(case.batch, out),
    }
    if lstm:
        cotangents["c_n"] = normal(case.batch, hidden)
    if case.loss == "y":
        cotangents = {"y": cotangents["y"]}
    elif case.loss == "state":
        del cotangents["y"]
    return Problem(case, inputs, cotangents)


def build(case: Case) -> Problem:
    """The tensors of a case, always the same.

    relu has a kink: where a float64 pre-activation lies within rounding of zero, float32 may take
    the other side and its gradient has no bound. Such draws say nothing and are left out.
    """
    first = zlib.crc32(str(case).encode())
    for attempt in range(200):
        problem = _draw(case, first + attempt)
        if not case.cell.endswith("relu"):
            return problem
        margins: list[float] = []
        _oracle_outputs(problem, {k: _as64(v) for k, v in problem.inputs.items()}, margins)
        if min(margins, default=1.0) > (3e-6 if case.dtype == torch.float32 else 1e-12):
            return problem
    raise AssertionError(f"no draw of {case} keeps away from relu's kink")


def _as64(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().double()


# --------------------------------------------------------------------------- ways to run a case
# Each gives {"y", "h_n", "c_n", "dx", "dh0", ...}; packed cases have y and dx as (N, features).


def _gradients(problem: Problem, leaves: Tensors, outputs: Tensors) -> Tensors:
    pairs = [(outputs[k], g.to(outputs[k].dtype)) for k, g in problem.cotangents.items()]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True
    )
    return {
        f"d{name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def _oracle_outputs(
    problem: Problem, inputs: Mapping[str, Tensor | None], margins: list[float] | None = None
) -> Tensors:
    case = problem.case
    weights = [inputs[k] for k in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")]
    x = inputs["x"]
    assert x is not None
    y, h_n, c_n = oracle.direction(
        case.cell,
        x,
        inputs["h0"],
        inputs["c0"],
        weights,
        reverse=case.reverse,
        lengths=case.lengths,
        margins=margins,
    )
    outputs = {"y": y, "h_n": h_n}
    if c_n is not None:
        outputs["c_n"] = c_n
    return outputs


def _flatten_packed(problem: Problem, result: Tensors) -> Tensors:
    lengths = problem.case.lengths
    if lengths is None:
        return result
    return {k: oracle.pack_rows(v, lengths) if k in ("y", "dx") else v for k, v in result.items()}


def run_oracle(problem: Problem, dtype: torch.dtype = torch.float64) -> Tensors:
    """The oracle's outputs and gradients."""
    leaves = {
        k: v.detach().to(dtype).contiguous().requires_grad_()
        for k, v in problem.inputs.items()
        if v is not None
    }
    inputs = {k: leaves.get(k) for k in problem.inputs}
    outputs = _oracle_outputs(problem, inputs)
    grads = _gradients(problem, leaves, outputs)
    return _flatten_packed(problem, {k: v.detach() for k, v in outputs.items()} | grads)


def run_torch(problem: Problem, dtype: torch.dtype | None = None) -> Tensors | None:
    """torch.nn's own kernels on the same numbers; None for a cell that torch lacks.

    torch has no layer that only runs backwards in time: it runs both ways, half is dropped.
    """
    case = problem.case
    if case.cell not in oracle.TORCH_CELLS:
        return None
    dtype = dtype or case.dtype
    leaves = {
        k: v.detach().to(dtype).contiguous().requires_grad_()
        for k, v in problem.inputs.items()
        if v is not None
    }
    w = [leaves[k] for k in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr") if k in leaves]
    ways = 2 if case.reverse else 1
    flat = [t.detach() for t in w] * (ways - 1) + w
    x = leaves["x"]
    out = case.proj or case.hidden
    h0 = leaves.get("h0", x.new_zeros(case.batch, out)).unsqueeze(0)
    c0 = leaves.get("c0", x.new_zeros(case.batch, case.hidden)).unsqueeze(0)
    h0, c0 = (torch.cat([torch.zeros_like(s)] * (ways - 1) + [s]) for s in (h0, c0))
    hx: Any = (h0, c0) if case.cell == "lstm" else h0
    function = getattr(torch._VF, case.cell)  # type: ignore[attr-defined]
    lengths = case.lengths
    if lengths is None:
        result = function(x, hx, flat, case.bias, 1, 0.0, True, ways == 2, False)
    else:
        rows = oracle.pack_rows(x, lengths)
        sizes = torch.tensor(oracle.batch_sizes_of(lengths))
        result = function(rows, sizes, hx, flat, case.bias, 1, 0.0, True, ways == 2)
    outputs = {"y": result[0][..., -out:], "h_n": result[1][-1]}
    if case.cell == "lstm":
        outputs["c_n"] = result[2][-1]
    packed = _pack_cotangents(problem)
    grads = _gradients(packed, leaves, outputs)
    if lengths is not None:
        grads["dx"] = oracle.pack_rows(grads["dx"], lengths)
    return {k: v.detach() for k, v in outputs.items()} | grads


def _pack_cotangents(problem: Problem) -> Problem:
    lengths = problem.case.lengths
    cotangents = dict(problem.cotangents)
    if lengths is not None and "y" in cotangents:
        cotangents["y"] = oracle.pack_rows(cotangents["y"], lengths)
    return Problem(problem.case, problem.inputs, cotangents)


def op_inputs(problem: Problem, *, grad: bool = True) -> tuple[Tensors, list[Any]]:
    """Leaves by name, and the first ten arguments of rnnfast::forward (no resets)."""
    lengths = problem.case.lengths
    leaves = {}
    for name, value in problem.inputs.items():
        if value is None:
            continue
        value = value.detach()
        if name == "x" and lengths is not None:
            value = oracle.pack_rows(value, lengths)
        leaves[name] = value.requires_grad_(grad)
    sizes = None if lengths is None else torch.tensor(oracle.batch_sizes_of(lengths))
    return leaves, [*op_operands(leaves), sizes, None]


def op_operands(leaves: Mapping[str, Tensor]) -> list[Tensor | None]:
    """The tensors in the op's order; its c0 is (S-1, B, H), ours (B, H)."""
    names = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
    return [leaves[k][None] if k == "c0" and k in leaves else leaves.get(k) for k in names]


def run_rnnfast(problem: Problem) -> Tensors:
    """rnnfast::forward and, through autograd, rnnfast::backward."""
    case = problem.case
    leaves, args = op_inputs(problem)
    y, h_n, c_n, _ = torch.ops.rnnfast.forward(
        *args, None, oracle.CELL_IDS[case.cell], case.reverse, True
    )
    outputs = {"y": y, "h_n": h_n}
    if case.cell == "lstm":
        outputs["c_n"] = c_n[0]
    grads = _gradients(_pack_cotangents(problem), leaves, outputs)
    return {k: v.detach() for k, v in outputs.items()} | grads


def is_taken(split: str, run: Any) -> bool:
    """Whether a run of the engine divides its work so, with that split forced: a busy machine may
    give one thread only, for a while."""
    with rnnfast.use_engine("cpu", split=split):
        for _ in range(60):
            run()
            if rnnfast.last_run()["split"] == split:
                return True
            time.sleep(0.05)
    return False


def run_peer(problem: Problem) -> Tensors:
    """torch.nn in the case's dtype, or for a cell that it lacks the oracle."""
    return run_torch(problem) or run_oracle(problem, problem.case.dtype)


def run_peer_again(problem: Problem, seed: int) -> Tensors:
    gen = torch.Generator().manual_seed(seed)
    inputs = {k: None if v is None else last_bits(v, gen) for k, v in problem.inputs.items()}
    cotangents = {k: last_bits(v, gen) for k, v in problem.cotangents.items()}
    return run_peer(Problem(problem.case, inputs, cotangents))


_references: dict[Case, tuple[Problem, Tensors, Peer | None]] = {}


def solved(case: Case) -> tuple[Problem, Tensors, Peer | None]:
    """The case's tensors, its float64 reference and its peer's results, computed once a session."""
    if case not in _references:
        problem = build(case)
        peer = None
        if case.dtype == torch.float32:
            peer = Peer(run_peer(problem), partial(run_peer_again, problem))
        _references[case] = problem, run_oracle(problem), peer
    return _references[case]


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]
