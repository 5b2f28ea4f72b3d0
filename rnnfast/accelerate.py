"""Swap torch.nn's recurrent layers for rnnfast's, in place, and back."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from . import _cuda
from ._checks import DTYPES
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


def _why_not(module: nn.Module) -> str | None:
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and type(module) not in _FAST:
        if isinstance(module, _OURS):
            return "it is one of rnnfast's already"
        return f"its class {type(module).__name__} is derived from torch.nn's and may differ"
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
    buffer (a flat optimizer's, say) stay what they are. Subclasses of torch.nn's layers, and
    layers whose weights no engine can run on (of another device or dtype) are left alone.

    To see what was swapped and what was not, and why, let the logger ``"rnnfast"`` speak before
    the call, ``logging.basicConfig(level="INFO")``; ``print(rnnfast.explain(model))`` lists
    rnnfast's layers and what each of them will run.

    Args:
        model: a model, or a single layer or cell

    Returns:
        the same ``model``

    Raises:
        TypeError: if ``model`` is no :class:`torch.nn.Module`

    Example::

        >>> model = rnnfast.accelerate(model)
        >>> rnnfast.restore(model)              # back to torch.nn
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"rnnfast: accelerate needs a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            continue
        path = name or "the model itself"
        why = _why_not(module)
        if why is not None:
            _log.info("left %s (%s) alone: %s", path, type(module).__name__, why)
            continue
        plain: type[nn.Module] = type(module)
        _own_storage(module.parameters(recurse=False))
        module.__class__ = _FAST[plain]  # type: ignore[assignment]
        module.__dict__[_MARK] = True
        _log.info("swapped %s: torch.nn.%s -> rnnfast.%s", path, plain.__name__, plain.__name__)
    return model


def restore(model: _Model) -> _Model:
    """Undo :func:`accelerate`: what it swapped is torch.nn's again, in place.

    Args:
        model: a model that was given to :func:`accelerate`, or a copy of one

    Returns:
        the same ``model``; layers that were built as rnnfast's stay

    Example::

        >>> rnnfast.restore(rnnfast.accelerate(model))
    """
    for name, module in model.named_modules():
        if module.__dict__.pop(_MARK, False) and type(module) in _PLAIN:
            module.__dict__.pop("_frozen", None)
            module.__class__ = _PLAIN[type(module)]
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()  # as cuDNN wants them; on the CPU it does nothing
            _log.info("restored %s: torch.nn.%s", name or "the model itself", type(module).__name__)
    return model
