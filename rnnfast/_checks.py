"""The checks of csrc/bindings/checks.cpp in Python, with its texts: for the reference engine, which
never reaches the operators, and for their fake kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._modes import is_vmapped
from .cells import CellSpec

# what the engines compute in
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape_text(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def has_values(batch_sizes: Tensor) -> bool:
    """Whether Python may read the tensor: not while tracing, and not under vmap."""
    return not (
        torch.compiler.is_compiling()
        or type(batch_sizes) is not Tensor  # a fake tensor, for one
        or batch_sizes.is_meta
        or is_vmapped(batch_sizes)
    )


def check_dense(tensor: Tensor, name: str) -> None:
    """A tensor with a place in memory for each number: what kernels, views and copies take."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        found = "a nested one" if tensor.is_nested else str(tensor.layout)
        raise NotImplementedError(
            f"rnnfast: {name} must be a dense tensor (torch.strided), got {found}; convert it with "
            f"{'torch.nested.to_padded_tensor' if tensor.is_nested else '.to_dense()'}"
        )


def check_lengths_kind(lengths: Any, input: Any) -> None:
    """Lengths whose values a call can read, now or when its graph runs, of an input with steps."""
    if isinstance(input, Tensor):
        check_dense(input, "input")
    if not isinstance(lengths, Tensor) or not isinstance(input, Tensor):
        return
    check_dense(lengths, "lengths")
    if lengths.device.type == "meta" != input.device.type:
        raise RuntimeError(
            f"rnnfast: lengths of an input on {input.device} must have values, got a meta tensor"
        )


def check_bool(name: str, option: str, value: Any) -> None:
    if value is not True and value is not False:
        found = type(value).__name__
        raise TypeError(f"rnnfast: {option} of {name} must be a bool, got {found}")


def check_recompute(name: str, recompute: Any) -> None:
    check_bool(name, "recompute", recompute)


def check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    """batch_sizes of a PackedSequence of so many rows."""
    if not batch_sizes.is_cpu or batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1:
        raise RuntimeError(
            "rnnfast: batch_sizes must be a one-dimensional int64 CPU tensor of shape (T,), got "
            f"{_shape_text(batch_sizes)} of {_dtype_text(batch_sizes.dtype)}"
        )
    if batch_sizes.size(0) == 0:
        raise RuntimeError("rnnfast: x must hold at least one step (T >= 1), got T = 0")
    if not has_values(batch_sizes):
        return
    sizes = batch_sizes.tolist()
    for t, size in enumerate(sizes):
        # the upper bound is that of the kernels, which add up in 64 bits
        if size < 1 or size > 2**40 or (t > 0 and size > sizes[t - 1]):
            raise RuntimeError(
                f"rnnfast: batch_sizes must be positive and must not grow, got {size} at step {t}"
            )
    if sum(sizes) != rows:
        raise RuntimeError(
            f"rnnfast: x must have as many rows as batch_sizes add up to, got {rows} rows"
        )


def check_dtypes(name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    """Two of one dtype."""
    if tensor.dtype != other.dtype:
        raise RuntimeError(
            f"rnnfast: {name} must have the dtype of {other_name}, {_dtype_text(other.dtype)}, "
            f"got {_dtype_text(tensor.dtype)}"
        )


def _check_dtype(name: str, tensor: Tensor, x: Tensor) -> None:
    check_dtypes(name, tensor, x, "x")


def check_shape(name: str, tensor: Tensor, letters: str, sizes: tuple[Any, ...]) -> None:
    def text() -> str:
        return f"rnnfast: {name} must have shape {letters} = {sizes}, got {_shape_text(tensor)}"

    if tensor.dim() != len(sizes):
        raise RuntimeError(text())
    for found, expected in zip(tensor.shape, sizes, strict=True):
        if isinstance(found, int) and isinstance(expected, int):
            if found != expected:
                raise RuntimeError(text())
        else:  # a size that only the run will know
            torch._check(found == expected, text)


def _check_is_bool(name: str, flags: Tensor) -> None:
    if flags.dtype != torch.bool:
        raise RuntimeError(f"rnnfast: {name} must be bool, got {_dtype_text(flags.dtype)}")


def check_flags(name: str, flags: Tensor, x: Tensor) -> None:
    """A mask beside x."""
    if flags.device != x.device:
        raise RuntimeError(
            f"rnnfast: {name} must be on the same device as x ({x.device}), got {flags.device}"
        )
    _check_is_bool(name, flags)


def check_weights(
    spec: CellSpec,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
) -> None:
    """Shapes and dtypes of the weights of one direction."""
    _check_dtype("w_ih", w_ih, x)
    _check_dtype("w_hh", w_hh, x)
    gates = spec.gates
    if w_ih.dim() != 2 or w_ih.size(0) % gates != 0 or w_ih.size(0) == 0:
        raise RuntimeError(
            f"rnnfast: w_ih must have shape (G*H, I) with G = {gates} for {spec.name}, "
            f"got {_shape_text(w_ih)}"
        )
    rows = w_ih.size(0)
    hidden = out = rows // gates
    check_shape("w_ih", w_ih, "(G*H, I)", (rows, x.size(-1)))
    if w_hr is not None:
        if spec.states != 2 or not spec.dense or spec.keeps or spec.stages:
            raise RuntimeError(f"rnnfast: w_hr is for lstm only, got cell {spec.name}")
        _check_dtype("w_hr", w_hr, x)
        if w_hr.dim() != 2:
            raise RuntimeError(f"rnnfast: w_hr must have shape (P, H), got {_shape_text(w_hr)}")
        out = w_hr.size(0)
        check_shape("w_hr", w_hr, "(P, H)", (out, hidden))
        if out < 1:
            raise RuntimeError("rnnfast: w_hr must have P >= 1 rows, got 0")
    if spec.diagonal:
        check_shape("w_hh", w_hh, "(H,)", (hidden,))
    elif not spec.dense:
        check_shape("w_hh", w_hh, "(0,)", (0,))
    else:
        check_shape("w_hh", w_hh, "(G*H, H)" if w_hr is None else "(G*H, P)", (rows, out))
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None:
            _check_dtype(name, bias, x)
            if name == "b_hh" and not spec.has_hidden_side and bias.shape == (0,):
                continue
            if name == "b_hh" and spec.parameters:
                check_shape(name, bias, "((G+K)*H,)", (rows + spec.parameters * hidden,))
            else:
                check_shape(name, bias, "(G*H,)", (rows,))


def check_layer(
    spec: CellSpec,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
) -> None:
    """All that the operators check of their arguments, except for devices."""
    if x.dtype not in DTYPES:
        raise RuntimeError(
            f"rnnfast: x must be float32, float64, bfloat16 or float16, got {_dtype_text(x.dtype)}"
        )
    letters = "(T, B, I)" if batch_sizes is None else "(N, I)"
    if x.dim() != (3 if batch_sizes is None else 2):
        raise RuntimeError(f"rnnfast: x must have shape {letters}, got {_shape_text(x)}")
    batch: Any = None
    if batch_sizes is None:
        batch = x.size(1)
        if isinstance(x.size(0), int) and x.size(0) < 1:
            raise RuntimeError("rnnfast: x must hold at least one step (T >= 1), got T = 0")
    else:
        check_batch_sizes(batch_sizes, x.size(0))
        if has_values(batch_sizes):
            batch = int(batch_sizes[0])
    check_weights(spec, x, w_ih, w_hh, b_ih, b_hh, w_hr)
    hidden = w_ih.size(0) // spec.gates
    out = hidden if w_hr is None else w_hr.size(0)
    if h0 is not None:
        _check_dtype("h0", h0, x)
        letters = "(B, H)" if w_hr is None else "(B, P)"
        if batch is None:
            batch = h0.size(0) if h0.dim() > 0 else 0
        check_shape("h0", h0, letters, (batch, out))
    if c0 is not None:
        _check_dtype("c0", c0, x)
        if batch is None:
            batch = c0.size(1) if c0.dim() > 1 else 0
        check_shape("c0", c0, "(S-1, B, H)", (spec.states - 1, batch, hidden))
    if reset is not None:
        _check_is_bool("reset", reset)
        letters = "(T, B)" if batch_sizes is None else "(N,)"
        check_shape("reset", reset, letters, tuple(x.shape[:-1]))
