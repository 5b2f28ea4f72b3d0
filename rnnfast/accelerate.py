"""Swap torch.nn's recurrent layers for rnnfast's, in place, and back."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from . import _cuda, _regularize
from ._checks import DTYPES
from ._layer import Layer
from .cell_modules import GRUCell, LSTMCell, RNNCell
from .modules import GRU, LSTM, RNN, IndRNN

__all__ = ["accelerate", "restore"]

_Model = TypeVar("_Model", bound=nn.Module)

_log = logging.getLogger("rnnfast")

_FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
}
_PLAIN = {fast: plain for plain, fast in _FAST.items()}
_OURS = (*_PLAIN, IndRNN)

# marks what accelerate swapped, so that restore leaves layers built as rnnfast's alone
_MARK = "_rnnfast_swapped"


# the widest gap that alignment leaves between two parameters of cuDNN's buffer
_PADDING = 512


def _is_cudnns(storage: torch.UntypedStorage, group: list[nn.Parameter]) -> bool:
    """Whether a storage is the buffer that cuDNN's flattening made of these parameters.

    Nobody else may hold it: the flat buffer of an optimizer looks the same, and parameters taken
    out of that would no longer be trained.
    """
    if len(group) < 2:
        return False
    # one use for each parameter, one for `storage`
    if torch._C._storage_Use_Count(storage._cdata) != len(group) + 1:
        return False
    end = 0
    for p in sorted(group, key=lambda p: p.storage_offset()):
        begin = int(p.storage_offset()) * p.element_size()
        if not p.is_contiguous() or not 0 <= begin - end < _PADDING:
            return False
        end = begin + p.numel() * p.element_size()
    return 0 <= storage.nbytes() - end < _PADDING


def _own_storage(parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters that cuDNN had flattened into one buffer memory of their own."""
    groups: dict[int, list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault(p.untyped_storage()._cdata, []).append(p)
    for group in groups.values():
        if _is_cudnns(group[0].untyped_storage(), group):
            with torch.no_grad():
                for p in group:
                    p.data = p.data.clone()


# What a model may be wrapped in already, by the module and the class: looked up among what was
# imported, since importing all of it would take longer than anything here.
_WRAPPERS = (
    ("torch.nn.parallel", "DistributedDataParallel", "DistributedDataParallel"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "FullyShardedDataParallel"),
    ("torch.distributed.fsdp", "FSDPModule", "fully_shard"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "torch.compile"),
)


def _wrapper(module: nn.Module) -> str | None:
    """What holds on to the classes or parameters of the modules in this one, if anything does."""
    for place, name, words in _WRAPPERS:
        kind = getattr(sys.modules.get(place), name, None)
        if kind is not None and isinstance(module, kind):
            return words
    return "compile()" if module._compiled_call_impl is not None else None


def _refuse_wrapped(model: nn.Module, swaps: Iterable[nn.Module]) -> None:
    inside = set(swaps)
    for name, module in model.named_modules():
        path = f"its module {name}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            if module.original_name in {kind.__name__ for kind in _FAST}:
                raise RuntimeError(
                    "rnnfast: accelerate needs modules of Python, got a torch.jit.ScriptModule "
                    f"({path}, a scripted {module.original_name}); accelerate the model that it "
                    "was made from, and compile that with torch.compile or torch.export"
                )
            continue
        words = _wrapper(module)
        # fully_shard derives a class of its own
        sharded = words == "fully_shard" and any(base in _FAST for base in type(module).__bases__)
        if words is not None and (sharded or not inside.isdisjoint(module.modules())):
            raise RuntimeError(
                f"rnnfast: accelerate must come before {words}, and {path} went through that "
                "already; call rnnfast.accelerate(model) first, then wrap the model"
            )


def _why_not(module: nn.Module) -> str | None:
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and type(module) not in _FAST:
        if isinstance(module, _OURS):
            return "it is one of rnnfast's already"
        if is_parametrized(module):
            names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
            return f"it is parametrized ({names}): accelerate first, and parametrize then"
        return f"its class {type(module).__name__} is derived from torch.nn's and may differ"
    if "forward" in module.__dict__:
        return "a forward of its own was set on it, which would run on"
    for name, p in module.named_parameters(recurse=False):
        if not (p.is_cpu or p.is_meta):
            why = _cuda.why_not_on(p.device) if p.is_cuda else f"there is none for {p.device.type}"
            if why:
                return f"{name} is on {p.device}, where no engine can run: {why}"
        if p.dtype not in DTYPES:
            return f"{name} is {p.dtype}, which no engine computes in"
    return None


def accelerate(model: _Model) -> _Model:
    """Make every torch.nn recurrent layer and cell of a model one of rnnfast's, in place.

    The modules stay the same objects with the same Parameter objects: optimizers, hooks, the
    training flag, tied weights and references to the modules stay valid, and so does the
    ``state_dict``. Only the class changes: ``isinstance(module, nn.LSTM)`` is False afterwards,
    ``isinstance(module, rnnfast.LSTM)`` and ``isinstance(module, nn.RNNBase)`` (for cells
    ``nn.RNNCellBase``) are True.

    Parameters that cuDNN had flattened into one buffer get memory of their own; views of any other
    buffer (a flat optimizer's, say) stay what they are. Left alone are subclasses of torch.nn's
    layers (:func:`rnnfast.patched` is for code that defines them), parametrized layers
    (parametrize after this call; pruning and the old ``weight_norm``, which keep the class, may
    come before), layers with a ``forward`` of their own, and layers whose weights no engine can
    run on (of another device or dtype).

    To see what was swapped and what was not, and why, let the logger ``"rnnfast"`` speak before
    the call, ``logging.basicConfig(level="INFO")``; ``print(rnnfast.explain(model))`` lists
    rnnfast's layers and what each of them will run.

    Args:
        model: a model, or a single layer or cell

    Returns:
        the same ``model``

    Raises:
        TypeError: if ``model`` is no :class:`torch.nn.Module`
        RuntimeError: if a layer to be swapped is in a scripted model, or in one that went through
            torch.compile, DistributedDataParallel or FSDP already; nothing is changed then

    Example::

        >>> model = rnnfast.accelerate(model)
        >>> rnnfast.restore(model)              # back to torch.nn
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"rnnfast: accelerate needs a torch.nn.Module, got {type(model).__name__}")
    found = {
        name or "the model itself": (module, _why_not(module))
        for name, module in model.named_modules()
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    }
    _refuse_wrapped(model, (module for module, why in found.values() if why is None))
    for path, (module, why) in found.items():
        if why is not None:
            _log.info("left %s (%s) alone: %s", path, type(module).__name__, why)
            continue
        plain: type[nn.Module] = type(module)
        _own_storage(module.parameters(recurse=False))
        module.__class__ = _FAST[plain]  # type: ignore[assignment]
        module.__dict__[_MARK] = True
        if isinstance(module, Layer):
            module._init_flat_weights()
        _log.info("swapped %s: torch.nn.%s -> rnnfast.%s", path, plain.__name__, plain.__name__)
    return model


def restore(model: _Model) -> _Model:
    """Undo :func:`accelerate`: what it swapped is torch.nn's again, in place.

    Args:
        model: a model that was given to :func:`accelerate`, or a copy of one

    Returns:
        the same ``model``; layers that were built as rnnfast's stay

    Raises:
        TypeError: if ``model`` is no :class:`torch.nn.Module`
        RuntimeError: if a layer was given an option since that torch.nn has not (``weight_dropout``
            or ``return_last``, say); nothing is changed then

    Example::

        >>> rnnfast.restore(rnnfast.accelerate(model))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"rnnfast: restore needs a torch.nn.Module, got {type(model).__name__}")
    swapped = [
        (name, module)
        for name, module in model.named_modules()
        if module.__dict__.get(_MARK, False) and type(module) in _PLAIN
    ]
    for name, module in swapped:
        options = _regularize.text(module) if isinstance(module, Layer) else ""
        if options:
            raise RuntimeError(
                f"rnnfast: restore gives back torch.nn's layers, which compute without options of "
                f"rnnfast, got {name or 'the model itself'} with {options.removeprefix(', ')}; "
                "set them to their defaults first"
            )
    for name, module in swapped:
        for ours in (_MARK, "_frozen", "recompute", "forget_bias", *_regularize.NAMES):
            module.__dict__.pop(ours, None)
        module.__class__ = _PLAIN[type(module)]
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # as cuDNN wants them
        _log.info("restored %s: torch.nn.%s", name or "the model itself", type(module).__name__)
    return model
