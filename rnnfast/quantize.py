"""Layers with int8 weights for inference, and the swap that makes them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import _functorch, _regularize, _run, _step, engine, ops
from ._checks import DTYPES
from ._layer import spec_of, text_of_cell
from ._modes import is_transformed, transforms_active
from ._step_plan import StepPlan
from .modules import GRU, LAYERS, LSTM, RNN, IndRNN

__all__ = ["QuantizedGRU", "QuantizedIndRNN", "QuantizedLSTM", "QuantizedRNN", "quantize"]

_Model = TypeVar("_Model", bound=nn.Module)
# columns whose products of bytes an int32 holds: kLongestInt8 of csrc/cpu/dispatch.h
_LONGEST = 1 << 16
_log = logging.getLogger("rnnfast")


def quantize_rows(w: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """int8 numbers and a scale for each row, so that ``numbers * scale[:, None]`` is nearly w."""
    w = w.detach().to("cpu", torch.float32)
    largest = w.abs().amax(1)
    if not bool(torch.isfinite(largest).all()):
        raise RuntimeError(f"rnnfast: quantize needs finite weights, {name} is not")
    scale = largest / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # rows of zeros, or nearly
    return torch.round(w / scale.unsqueeze(1)).clamp(-127, 127).to(torch.int8), scale


class Quantized(nn.Module):
    """What the four quantized layers share; made by :func:`quantize`."""

    weight_dropout = input_dropout = recurrent_dropout = 0.0  # inference only
    zoneout = 0.0
    residual: bool = False
    return_last: bool = False

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        source: Any = layer
        self._spec = spec_of(layer)
        if self._spec.keeps:
            raise RuntimeError(
                "rnnfast: quantize has no kernels for zoneout, which mixes states in inference, "
                f"too, got zoneout={source.zoneout!r}; exclude the layer, or set zoneout to 0"
            )
        if self._spec.options:
            raise RuntimeError(
                "rnnfast: quantize has no kernels for the cell of "
                f"{type(layer).__name__}({text_of_cell(layer).removeprefix(', ')}); exclude it"
            )
        self.mode: str = source.mode
        self.input_size: int = source.input_size
        self.hidden_size: int = source.hidden_size
        self.num_layers: int = source.num_layers
        self.bias: bool = source.bias
        self.batch_first: bool = source.batch_first
        self.bidirectional: bool = source.bidirectional
        self.proj_size: int = source.proj_size
        self.dropout = 0.0  # inference only
        for option in ("residual", "return_last"):
            if getattr(source, option, False):  # torch.nn's layers have none
                setattr(self, option, True)
        self._names: tuple[str, ...] = tuple(source._flat_weights_names)
        self._packed: list[Tensor] | None = None
        self._plan: StepPlan | None = None
        self._planned_for: list[Tensor] | None = None
        self._views: list[Tensor] | None = None
        self._isa_changes = -1
        self._made_from: list[tuple[int, int, int]] = []
        for name in self._names:
            w = getattr(source, name)
            if self._is_matrix(name):
                numbers, scale = quantize_rows(w, name)
                self.register_buffer(name, numbers)
                self.register_buffer(f"{name}_scale", scale)
            else:
                kept = w.detach().to("cpu", torch.float32)
                self.register_buffer(name, kept.clone() if kept is w.detach() else kept)
        self.train(False)

    @property
    def recompute(self) -> bool:
        """False: nothing is kept for backward where there is none."""
        return False

    @recompute.setter
    def recompute(self, recompute: bool) -> None:
        if recompute is not False:
            raise RuntimeError(
                "rnnfast: recompute is about what training keeps for backward, and a quantized "
                f"layer gives no gradients; it must be False, got {recompute!r}"
            )

    def _is_matrix(self, name: str) -> bool:
        return name.startswith(("weight_ih", "weight_hr")) or (
            name.startswith("weight_hh") and not self._spec.diagonal
        )

    @property
    def _each(self) -> int:
        return len(self._names) // (self.num_layers * (2 if self.bidirectional else 1))

    def _pack(self) -> list[Tensor]:
        """Panels for the instruction set in force; kept until it or the weights change."""
        made_from = self._made_from
        if not torch.compiler.is_compiling():  # versions can't be traced
            buffers = [w for w in self._buffers.values() if w is not None]
            made_from = [
                (id(w), w.data_ptr(), -1 if w.is_inference() else w._version) for w in buffers
            ]
        if (
            self._packed is not None
            and self._isa_changes == engine.isa_changes
            and made_from == self._made_from
        ):
            return self._packed
        packed = []
        for i in range(0, len(self._names), self._each):
            ih, hh, *rest = self._names[i : i + self._each]
            hr = rest[-1] if len(rest) % 2 else None
            packed.append(
                ops.pack_int8(
                    getattr(self, ih),
                    getattr(self, f"{ih}_scale"),
                    getattr(self, hh),
                    None if self._spec.diagonal else getattr(self, f"{hh}_scale"),
                    None if hr is None else getattr(self, hr),
                    None if hr is None else getattr(self, f"{hr}_scale"),
                    self._spec.id,
                )
            )
        self._packed, self._isa_changes = packed, engine.isa_changes
        self._made_from, self._views = made_from, None
        return packed

    def _shapes(self) -> list[Tensor]:
        """In place of weights, of which the operator looks at the shapes: views without memory."""
        nothing = torch.empty((), dtype=torch.float32)
        return [
            nothing.expand(getattr(self, name).shape)
            if self._is_matrix(name)
            else getattr(self, name)
            for name in self._names
        ]

    def dequantized(self) -> list[Tensor]:
        """The float32 weights that the bytes stand for, in the order of torch.nn's."""
        weights = []
        for name in self._names:
            w = getattr(self, name)
            if self._is_matrix(name):
                w = w.float() * getattr(self, f"{name}_scale").unsqueeze(1)
            weights.append(w)
        return weights

    def _current(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """Weights and packed bytes of this call; the reference computes with weights."""
        if transforms_active() and _functorch.is_differentiated():
            ops.refuse_packed(self._pack()[0])
        if engine.forced == "reference" or is_transformed():
            return self.dequantized(), None
        if torch.compiler.is_compiling():  # a graph would take views kept here for inputs
            return self._shapes(), self._pack()
        packed = self._pack()
        if self._views is None:
            self._views = self._shapes()
        return self._views, packed

    def _step_plan(self) -> StepPlan:
        weights, packed = self._current()
        assert packed is not None
        if self._plan is None or self._planned_for is not packed:
            self._plan = StepPlan(self._spec, weights, packed)
            self._planned_for = packed
        return self._plan

    def forward(
        self, input: Any, hx: Any = None, reset: Any = None, lengths: Any = None, mask: Any = None
    ) -> tuple[Any, Any]:
        """As the layer that was quantized; input and states are float32.

        Raises:
            RuntimeError: if a gradient is asked for, too
        """
        return _run.of_module(
            self.mode.split("_")[0], self._spec, self, input, hx, reset, lengths, mask
        )

    def flatten_parameters(self) -> None:
        """Do nothing; code written for torch.nn calls it."""

    def step(self, input: Any, state: Any = None, reset: Any = None) -> tuple[Any, Any]:
        """One step, as :meth:`rnnfast.LSTM.step`."""
        return _step.step(self, self._spec, input, state, reset)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # .half(), .double() and friends: the numbers are what they are, on the CPU
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = self._views = self._plan = self._planned_for = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        # they belong to this process and its instruction set
        state["_packed"] = state["_views"] = state["_plan"] = state["_planned_for"] = None
        return state

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        if self.proj_size:
            parts.append(f"proj_size={self.proj_size}")
        if self.num_layers != 1:
            parts.append(f"num_layers={self.num_layers}")
        for name in ("batch_first", "bidirectional"):
            if getattr(self, name):
                parts.append(f"{name}=True")
        return ", ".join(parts) + _regularize.text(self) + ", weights=int8"


class QuantizedLSTM(Quantized):
    """A :class:`rnnfast.LSTM` with int8 weights, inference only; see :func:`rnnfast.quantize`."""


class QuantizedGRU(Quantized):
    """A :class:`rnnfast.GRU` with int8 weights, inference only; see :func:`rnnfast.quantize`."""


class QuantizedRNN(Quantized):
    """A :class:`rnnfast.RNN` with int8 weights, inference only; see :func:`rnnfast.quantize`."""


class QuantizedIndRNN(Quantized):
    """A :class:`rnnfast.IndRNN` with int8 input weights, inference only; see
    :func:`rnnfast.quantize`."""


_QUANTIZED: dict[type[nn.Module], type[Quantized]] = {
    LSTM: QuantizedLSTM,
    nn.LSTM: QuantizedLSTM,
    GRU: QuantizedGRU,
    nn.GRU: QuantizedGRU,
    RNN: QuantizedRNN,
    nn.RNN: QuantizedRNN,
    IndRNN: QuantizedIndRNN,
}


def _why_not(module: nn.Module) -> str | None:
    if type(module) not in _QUANTIZED:
        if isinstance(module, nn.RNNCellBase):
            return "cells keep their weights; a layer that is given one step and its state has int8"
        if type(module) in LAYERS or spec_of(module).is_own:
            return f"there is no int8 form of {type(module).__name__}"
        return f"its class {type(module).__name__} is derived from a layer and may differ"
    if spec_of(module).heads > 1:
        return f"there is no int8 form of num_heads={spec_of(module).heads}"
    for name in module._flat_weights_names:  # type: ignore[union-attr]
        w = getattr(module, name)
        if not w.is_cpu or w.dtype not in DTYPES:
            return f"{name} is {w.dtype} on {w.device}"
        if w.dim() == 2 and w.size(1) > _LONGEST:
            return f"{name} has more than {_LONGEST} columns, which 32 bits can't add up"
    return None


def quantize(model: _Model, *, exclude: Iterable[str] = ()) -> Any:
    """Give every recurrent layer of a model int8 weights, for inference.

    Each weight matrix becomes int8 numbers with a float32 scale for each of its rows (a gate of a
    unit), a quarter of the memory; input and hidden state become bytes with a scale each as they
    enter a product, biases, gates and states stay float32. Layers of rnnfast and of torch.nn are
    swapped for :class:`QuantizedLSTM` and its like, in place; a model that is a layer itself is
    replaced by the return value. Cells, subclasses and matrices of more than 65536 columns are left
    alone (the logger ``"rnnfast"`` tells). The weights can't be trained any more, and
    ``state_dict`` holds the bytes and scales. Input and states are float32 whatever the dtype of
    the layer was; hooks of a swapped layer are lost, and so are ``recompute=True``,
    ``weight_dropout``, ``input_dropout`` and ``recurrent_dropout``, which are about training.

    Args:
        model: a model, or a single layer
        exclude: names of layers, as in ``model.named_modules()``, that stay as they are (a layer
            with several names stays under all of them)

    Returns:
        the same ``model``, or the quantized layer if it is a single one

    Raises:
        TypeError: if ``model`` is no :class:`torch.nn.Module`, or ``exclude`` no list
        RuntimeError: if weights are not finite, a layer's cell has no int8 kernels (chosen
            activations, ``layer_norm``, ``zoneout``, ...), or ``exclude`` names no module; then no
            layer was swapped

    Example::

        >>> model = rnnfast.quantize(model.eval())
        >>> with torch.inference_mode():
        ...     y = model(x)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"rnnfast: quantize needs a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [exclude] if isinstance(exclude, str) else exclude
    if not isinstance(names, Iterable):
        raise TypeError(f"rnnfast: exclude must be a list of names, got {type(exclude).__name__}")
    names = list(names)
    unknown = [name for name in names if not isinstance(name, str) or name not in modules]
    if unknown:
        raise RuntimeError(f"rnnfast: exclude must name modules of the model, got {unknown[0]!r}")
    left = {modules[name] for name in names}  # a tied layer stays under all its names
    made: dict[nn.Module, nn.Module] = {}
    swapped: list[tuple[str, nn.Module]] = []  # at the end: all, or an error and none
    for name, module in modules.items():
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)) or module in left:
            continue
        why = None if module in made else _why_not(module)
        if why is not None:
            _log.info(
                "left %s (%s) alone: %s", name or "the model itself", type(module).__name__, why
            )
            continue
        if module not in made:
            made[module] = _QUANTIZED[type(module)](module)
        if not name:
            _log.info("quantized the model itself (%s)", type(module).__name__)
            return made[module]
        swapped.append((name, made[module]))
    for name, new in swapped:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, new)
        _log.info("quantized %s (%s)", name, type(modules[name]).__name__)
    return model
