"""A frozen layer's step without operators: addresses go straight to the engine. An operator's way
from Python and back takes longer than the step of a small layer."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import engine
from ._library import library_path
from .cells import CellSpec

_empty, _empty_like, _strided = torch.empty, torch.empty_like, torch.strided

# shapes of x, h and c, and a tensor as y, h and c will be
_Forms = tuple[torch.Size, torch.Size, torch.Size, Tensor, Tensor, Tensor]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("input_size", "hidden_size", "output_size")),
        *((name, ctypes.c_void_p) for name in ("w_hh", "b_ih", "b_hh", "w_hr", "packed")),
        ("packed_bytes", ctypes.c_int64),
    )


_library = ctypes.CDLL(str(library_path()))
_make = _library.rnnfast_make_step_plan
_make.argtypes = (
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.POINTER(_Layer),
)
_make.restype = ctypes.c_void_p
_free = _library.rnnfast_free_step_plan
_free.argtypes, _free.restype = (ctypes.c_void_p,), None
_run = _library.rnnfast_step
_run.argtypes = (ctypes.c_void_p, ctypes.c_int64, *(ctypes.c_void_p,) * 7)
_run.restype = ctypes.c_int


def _is_plain(tensor: Any, dtype: torch.dtype, shape: torch.Size) -> bool:
    """Whether its address, with this type and shape, says all there is to know of a tensor."""
    return (
        type(tensor) is Tensor
        and tensor.dtype is dtype
        and tensor.shape == shape
        and tensor.is_cpu
        and tensor.layout is _strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class StepPlan:
    """The addresses and sizes of a layer's packed weights (``weights`` of all layers, one
    direction). It keeps their memory; whether they still are the layer's, the caller knows."""

    def __init__(
        self,
        spec: CellSpec,
        weights: Sequence[Tensor],
        packed: Sequence[Tensor],
    ) -> None:
        self._plan = None
        # other threads may drop what the layer holds while a step of this one runs
        self._memory = *(w.detach() for w in weights), *packed
        count = len(packed)
        each = len(weights) // count
        layers = (_Layer * count)()
        fits = True
        for i, layer in enumerate(layers):
            w = weights[i * each : (i + 1) * each]
            layer.input_size, layer.hidden_size = w[0].size(1), w[0].size(0) // spec.gates
            layer.output_size = w[-1].size(0) if each % 2 else layer.hidden_size
            layer.w_hh = w[1].data_ptr()
            b_ih, b_hh = w[2:4] if each >= 4 else (None, None)
            layer.b_ih, layer.b_hh = _address(b_ih), _address(b_hh)
            layer.w_hr = w[-1].data_ptr() if each % 2 else None
            H = layer.hidden_size
            read = [(b_ih, spec.gates * H), (b_hh, (spec.gates + spec.parameters) * H)]
            if spec.diagonal:
                read.append((w[1], H))
            fits = fits and all(
                t is None
                or (
                    t.is_cpu
                    and t.is_contiguous()
                    and t.dtype == w[0].dtype
                    and t.numel() == numbers
                )
                for t, numbers in read
            )
            first = layers[0]
            fits = fits and layer.hidden_size == first.hidden_size
            fits = fits and layer.output_size == first.output_size
            fits = fits and (i == 0 or layer.input_size == first.output_size)
            layer.packed, layer.packed_bytes = packed[i].data_ptr(), packed[i].nbytes
        self.dtype = weights[0].dtype
        self.states = spec.states
        self._sizes = layers[0].input_size, layers[0].hidden_size, layers[0].output_size
        self._count = count
        self._forms: _Forms | None = None
        if not fits:
            return  # the operator copies, or says what is wrong
        isa = engine.ISAS.index(engine.active_isa())
        self._plan = _make(isa, spec.id, _DTYPES.index(self.dtype), count, layers)

    def __del__(self) -> None:
        if getattr(self, "_plan", None):
            _free(self._plan)

    def _forms_for(self, shape: torch.Size) -> _Forms | None:
        """For inputs of another shape, if it is one of this layer's."""
        inputs, hidden, out = self._sizes
        if len(shape) != 2 or shape[0] < 1 or shape[1] != inputs:
            return None
        batch = shape[0]
        h, c = torch.Size((self._count, batch, out)), torch.Size((self._count, batch, hidden))
        # of results: a copy of a tensor's form is made sooner than one from numbers
        with torch.inference_mode(False):
            like = [_empty(form, dtype=self.dtype, device="cpu") for form in ((batch, out), h, c)]
        self._forms = forms = shape, h, c, like[0], like[1], like[2]
        return forms

    def run(self, x: Any, state: Any, reset: Any) -> tuple[Tensor, Any] | None:
        """(y, state), or None if this is not a call for it. For when nothing_is_watching()."""
        dtype = self.dtype
        if not (
            type(x) is Tensor
            and x.dtype is dtype
            and x.is_cpu
            and x.layout is _strided
            and x.is_contiguous()
            and not x.is_neg()
            and self._plan
        ):
            return None
        # Read once: a thread with another batch may put its own there at any moment.
        shape, forms = x.shape, self._forms
        if forms is None or shape != forms[0]:
            forms = self._forms_for(shape)
            if forms is None:
                return None
        _, h_shape, c_shape, like_y, like_h, like_c = forms
        h = c = None
        h_at = c_at = reset_at = c_out_at = None
        if state is not None:
            if self.states == 1:
                h = state
            elif type(state) is tuple and len(state) == 2:
                h, c = state
                if not _is_plain(c, dtype, c_shape):
                    return None
                c_at = c.data_ptr()
            else:
                return None
            if not _is_plain(h, dtype, h_shape):
                return None
            h_at = h.data_ptr()
        if reset is not None:
            if not _is_plain(reset, torch.bool, shape[:1]):
                return None
            reset_at = reset.data_ptr()
        y, h_out = _empty_like(like_y), _empty_like(like_h)
        state_out: Any = h_out
        if self.states == 2:
            c_out = _empty_like(like_c)
            c_out_at = c_out.data_ptr()
            state_out = h_out, c_out
        x_at = x.data_ptr()
        if not x_at or (h is not None and not h_at) or (c is not None and not c_at):
            return None
        if _run(
            self._plan,
            shape[0],
            x_at,
            h_at,
            c_at,
            reset_at,
            y.data_ptr(),
            h_out.data_ptr(),
            c_out_at,
        ):
            return None
        return y, state_out
