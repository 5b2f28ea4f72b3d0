"""A cell of one's own, from a header: compiled when it is loaded, and a layer as the others are."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from . import _cuda, _own_library, engine
from ._library import cuda_library_path, cuda_load_error, library_path
from ._parameters import merge
from ._signatures import AnyStateCalls, Device
from ._signatures import Input as Form
from .cells import OWN_CELL, CellSpec, own_cells, own_on_cuda
from .functional import _layer as _call
from .reference import own_steps
from .scan_functional import _layer as _call_without_hidden_side
from .scan_functional import complete

__all__ = ["LoadedLayer", "load_cell"]

Step = Callable[..., Any]

_core = ctypes.CDLL(str(library_path()))
_core.rnnfast_engine_stamp.restype = ctypes.c_char_p
_register = _core.rnnfast_register_cell
_register.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64))
_register.restype = ctypes.c_char_p

_lock = threading.RLock()
# the instruction sets that a cell has kernels for, and the classes of its layers by their modules
_compiled: dict[int, set[str]] = {}
_classes: dict[tuple[int, str], type[LoadedLayer]] = {}


class LoadedLayer(AnyStateCalls):
    r"""A layer of a cell that :func:`rnnfast.load_cell` compiled; it returns subclasses of this.

    It is called as :class:`rnnfast.GRU` (:class:`rnnfast.LSTM` for a cell of two states, and for
    one of more as :class:`rnnfast.SLSTM`, with a tensor for each state), on the CPU, and on CUDA
    if it was compiled for it, and has the arguments below. ``proj_size``, ``num_heads``,
    ``activation``, ``gate_activation``, ``layer_norm``, ``reset_after``, ``recurrent_dropout`` and
    ``zoneout`` are none of them, and ``zoneout`` as an attribute raises. What is computed is in
    the header.

    Args:
        input_size: number of features of the input :math:`I`
        hidden_size: number of features of the hidden state :math:`H`
        num_layers: number of layers :math:`L`, each fed by the one before
        bias: whether there are biases
        batch_first: input and output are :math:`(B, T, *)`; states stay as they are
        dropout: probability of an element being zeroed between layers in training
        bidirectional: two directions (:math:`D = 2`), outputs concatenated
        device, dtype: of the parameters
        recompute: keep only the states every 64 steps for backward
        weight_dropout: probability of an entry of `W_hh` being zeroed in training, one mask a call
        input_dropout: probability of a feature of each layer's input being zeroed in training, one
            mask a sequence
        return_last: the output is that of the last step only
        residual: each layer adds its input to its output where they have one size

    Shape:
        As :class:`rnnfast.GRU`; for two states as :class:`rnnfast.LSTM`, and for more each of them
        as :math:`c_n`.

    Attributes:
        spec: the numbers of the cell; a class has it, too
        header: the file that it was made from; a class has it, too
        weight_ih_l[k]: :math:`(G H, I)`, :math:`(G H, D \cdot H)` for k > 0; gates in the order of
            the header
        weight_hh_l[k]: :math:`(G H, H)`; of a diagonal recurrence :math:`(H)`; none without one
        bias_ih_l[k]: :math:`(G H)`
        bias_hh_l[k]: :math:`(G H)`; none without a recurrence
        weight_p_l[k]: :math:`(K H)`, the parameters of each unit, if the cell has :math:`K`

        With the suffix ``_reverse`` for the second direction. All are drawn from
        :math:`\mathcal{U}(-1/\sqrt{H}, 1/\sqrt{H})`.

    Raises:
        ValueError, RuntimeError, TypeError: as :class:`rnnfast.GRU`

    Example::

        >>> Mgu = rnnfast.load_cell("mgu.h")            # doctest: +SKIP
        >>> layer = Mgu(10, 20, num_layers=2)           # doctest: +SKIP
        >>> output, h_n = layer(torch.randn(5, 3, 10))  # doctest: +SKIP
    """

    spec: ClassVar[CellSpec]
    header: ClassVar[Path]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        weight_dropout: float = 0.0,
        input_dropout: float = 0.0,
        return_last: bool = False,
        residual: bool = False,
    ) -> None:
        spec = getattr(self, "spec", None)
        if spec is None:
            raise TypeError(
                "rnnfast: LoadedLayer has no cell; rnnfast.load_cell makes classes of it"
            )
        # torch.nn checks the arguments and names the weights
        super().__init__(
            "RNN_TANH", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, "meta", dtype,
        )  # fmt: skip
        self.mode = type(self).__name__
        passes = []
        for names in self._all_weights:
            shapes = {each: self._shape_of(each, getattr(self, each).shape) for each in names}
            for each in names:
                delattr(self, each)
            if spec.parameters:
                shapes[names[0].replace("weight_ih", "weight_p")] = (spec.parameters * hidden_size,)
            real = {each: shape for each, shape in shapes.items() if shape is not None}
            for each, shape in real.items():
                setattr(self, each, Parameter(torch.empty(shape, device=device, dtype=dtype)))
            passes.append(list(real))
        self._all_weights = passes
        self._flat_weights_names = [each for names in passes for each in names]
        self._init_flat_weights()
        self.reset_parameters()
        self._set_options(recompute, weight_dropout, input_dropout, residual, return_last)

    def _shape_of(self, name: str, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Of a weight that has this shape in a layer of one gate; None for none."""
        spec, hidden = self.spec, self.hidden_size
        if "_ih_" in name:
            return (spec.gates * hidden, *shape[1:])
        if name.startswith("weight_hh"):
            return (
                (spec.gates * hidden, hidden)
                if spec.dense
                else (hidden,)
                if spec.diagonal
                else None
            )
        return (spec.gates * hidden,) if spec.has_hidden_side else None

    def _complete(self, weights: Sequence[Any]) -> Sequence[Any]:
        spec = self.spec
        if spec.has_hidden_side:
            if not spec.parameters:
                return weights
            return merge(spec, weights, len(self._all_weights), self.bias)
        if self.__dict__.get("weight_dropout"):
            raise RuntimeError(
                "rnnfast: weight_dropout is for layers with a w_hh, which "
                f"{type(self).__name__} has not; it must be 0, got {self.weight_dropout!r}"
            )
        return complete(weights, self.bias, spec.parameters > 0)

    @classmethod
    def functional(
        cls,
        input: Form,
        hx: Any,
        weights: Sequence[Tensor],
        *,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        training: bool = False,
        bidirectional: bool = False,
        reset: Tensor | PackedSequence | None = None,
        lengths: Tensor | None = None,
        recompute: bool = False,
    ) -> tuple[Form, Any]:
        r"""Run a layer of the cell without a module, see :func:`rnnfast.functional.gru`.

        Args:
            input: the sequence, a tensor or a :class:`torch.nn.utils.rnn.PackedSequence`
            hx: initial state, a tuple for a cell of two states or more; ``None`` means zeros
            weights: flat list, for each layer and direction those that a layer has, in its order
            num_layers: number of layers :math:`L`
            bias: whether ``weights`` has biases
            batch_first: input and output are :math:`(B, T, *)`
            dropout: probability of an element being zeroed between layers
            training: whether dropout is applied
            bidirectional: two directions, :math:`D = 2`
            reset: true at the first step of each new sequence
            lengths: valid steps of each row of padded input
            recompute: keep only the states every 64 steps for backward

        Returns:
            ``(output, state)``
        """
        spec, name = cls.spec, cls.__name__
        if spec.has_hidden_side:
            return _call(
                name, spec, input, hx, reset, weights, num_layers, bias, batch_first, dropout,
                training, bidirectional, lengths, recompute, None, 0.0, 0.0, False,
            )  # fmt: skip
        return _call_without_hidden_side(
            name, spec, input, hx, weights, num_layers, bias, batch_first, dropout, training,
            bidirectional, reset, lengths, recompute,
        )  # fmt: skip


def _open(source: _own_library.Source, isa: str) -> ctypes.CDLL:
    """The library of a cell, compiled where it has to be."""
    built = _core.rnnfast_engine_stamp().decode()
    if built != _own_library.engine_stamp():
        raise RuntimeError(
            f"rnnfast: {library_path()} was not built of the headers in "
            f"{_own_library.engine_sources()}, with which load_cell would compile {source.name}; "
            "build or install rnnfast again"
        )
    path = _own_library.library(source, isa)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # of another system, or cut off: made anew
        path = _own_library.library(source, isa, anew=True)
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise RuntimeError(f"rnnfast: load_cell can't load what it compiled: {error}") from None


def _refuse(source: _own_library.Source, wrong: bytes) -> None:
    raise RuntimeError(
        f"rnnfast: {source.name} of {source.header} can't be loaded: {wrong.decode()}"
    )


def _register_library(source: _own_library.Source, isa: str, code: int) -> list[int]:
    """The cell's numbers, once the core knows it."""
    library = _open(source, isa)
    library.rnnfast_own_cell.restype = ctypes.c_void_p
    numbers = (ctypes.c_int64 * 7)()
    wrong = _register(library.rnnfast_own_cell(), code, numbers)
    if wrong:
        _refuse(source, wrong)
    return list(numbers)


def _register_for_cuda(source: _own_library.Source, code: int, engine: ctypes.CDLL) -> None:
    """Makes the cell known to the CUDA engine, a library."""
    library = _open(source, _own_library.CUDA)
    library.rnnfast_own_cuda_cell.restype = ctypes.c_void_p
    register = engine.rnnfast_register_cuda_cell
    register.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    register.restype = ctypes.c_char_p
    wrong = register(library.rnnfast_own_cuda_cell(), code)
    if wrong:
        _refuse(source, wrong)
    own_on_cuda.add(code)


def _for_cuda(wish: bool | None) -> bool:
    """Whether kernels for CUDA are compiled."""
    if wish is None:  # counted without starting CUDA, which a process that forks must not
        return _cuda.loaded() and torch.cuda.device_count() > 0 and _own_library.has_nvcc()
    if wish and not _cuda.loaded():
        raise RuntimeError(
            f"rnnfast: load_cell(cuda=True) needs the CUDA engine, but {cuda_load_error()}"
        )
    return wish


def load_cell(
    path: str | os.PathLike[str],
    *,
    struct: str | None = None,
    reference: Step | None = None,
    cuda: bool | None = None,
) -> type[LoadedLayer]:
    """Compile a header with a cell of your own, and return the class of its layers.

    The header is a struct with the contract of csrc/cells/cell.h: the maths of one unit, forward
    and backward. The engine brings the products, types, directions, packed sequences, resets and
    threads. docs/own_cell.md has a whole example. It takes some seconds once; what was compiled
    is kept in ``$RNNFAST_CACHE``, or rnnfast in the user's folder of caches, until the header, the
    compiler or rnnfast change.

    A graph or exported program names the cell by a hash of its header, so that a process that
    runs it must have loaded the same header. Layers are pickled, as others are, if the class is
    found in the module that called load_cell, under the name of the struct.

    Args:
        path: the header, which may include others beside it
        struct: the name of the struct, with its namespace if it is not in the engine's; it may be
            left out where only one struct of the header has ``kGates``
        reference: one step in torch operators, ``step(gx, gh, state)``: tuples of the gates'
            pre-activations and of the states, each :math:`(B, H)`; it returns the new states
            (and takes ``p``, the parameters :math:`(H)`, behind them if the cell has some). Higher
            derivatives, forward mode and the reference engine run through it, and
            :func:`rnnfast.check_cell` compares with it. That of the last call holds
        cuda: whether the cell is compiled for CUDA, too, which takes nvcc and about a minute once;
            ``None``: where rnnfast has its CUDA engine, and the machine a device and nvcc

    Returns:
        a subclass of :class:`rnnfast.LoadedLayer`, the same one for the same header

    Raises:
        RuntimeError: no file, no compiler, a struct that is not there, is no cell or does not
            compile (with the compiler's message), a cache that can't be written; ``cuda=True``
            without nvcc or the CUDA engine
        TypeError: a reference that can't be called, a ``cuda`` that is no bool

    Example::

        >>> Mgu = rnnfast.load_cell("mgu.h")            # doctest: +SKIP
        >>> layer = Mgu(10, 20, num_layers=2)           # doctest: +SKIP
        >>> output, h_n = layer(torch.randn(5, 3, 10))  # doctest: +SKIP
    """
    if reference is not None and not callable(reference):
        raise TypeError(
            "rnnfast: reference of load_cell must be a function of gx, gh and state, got "
            f"{type(reference).__name__}"
        )
    if cuda is not None and not isinstance(cuda, bool):
        raise TypeError(
            f"rnnfast: cuda of load_cell must be a bool or None, got {type(cuda).__name__}"
        )
    for_cuda = _for_cuda(cuda)
    module = sys._getframe(1).f_globals.get("__name__", "__main__")
    source = _own_library.source_of(path, struct)
    code = int.from_bytes(source.digest[:6], "little") << 8 | OWN_CELL
    isa = engine.ran_isa(engine.active_isa(), False)
    with _lock:
        if isa not in _compiled.get(code, ()):
            gates, states, saved, parameters, dense, diagonal, split = _register_library(
                source, isa, code
            )
            _compiled.setdefault(code, set()).add(isa)
            own_cells[code] = CellSpec(
                source.name, code, gates, states, saved, bool(diagonal), bool(split), bool(dense),
                parameters,
            )  # fmt: skip
        spec = own_cells[code]
        if for_cuda and code not in own_on_cuda:
            _register_for_cuda(source, code, ctypes.CDLL(str(cuda_library_path())))
        if reference is not None:
            own_steps[code] = reference
        found = _classes.get((code, module))
        if found is None:
            found = type(source.name, (LoadedLayer,), _members(spec, source.header, module))
            _classes[code, module] = found
        return found


def _members(spec: CellSpec, header: Path, module: str) -> dict[str, Any]:
    """Of the class of a cell's layers."""
    return {
        "__module__": module,
        "__doc__": f"A layer of the cell {spec.name} of {header.name}: "
        ":class:`rnnfast.LoadedLayer` has its arguments.",
        "spec": spec,
        "header": header,
        "_chosen_cell": spec,  # what is called
    }
