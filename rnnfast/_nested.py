"""Nested structures of tensors: tuples, lists, dicts, named tuples and dataclasses of them."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

#: Raises, of what was expected and what was found.
Fail = Callable[[str, str], NoReturn]


def text(tree: Any) -> str:
    """What stands in an error in place of a structure."""
    if isinstance(tree, Tensor):
        return f"a tensor of shape {tuple(tree.shape)}"
    inside = parts(tree)
    if inside is None:
        return type(tree).__name__
    if isinstance(tree, dict):
        return f"a dict of {', '.join(repr(key) for key in tree) or 'nothing'}"
    if type(tree) in (tuple, list):
        return f"a {type(tree).__name__} of {len(tree)}"
    return f"{type(tree).__name__} of {', '.join(name[1:] for name in inside)}"


def parts(tree: Any) -> dict[str, Any] | None:
    """What a node holds, by what it adds to a path; None for a leaf."""
    if isinstance(tree, PackedSequence):
        return None
    if isinstance(tree, (tuple, list)):
        names = getattr(tree, "_fields", None)
        if names is not None:
            return {f".{name}": part for name, part in zip(names, tree)}
        return {f"[{i}]": part for i, part in enumerate(tree)}
    if isinstance(tree, dict):
        return {f"[{key!r}]": part for key, part in tree.items()}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {f".{f.name}": getattr(tree, f.name) for f in dataclasses.fields(tree)}
    return None


def leaves(tree: Any, path: str, fail: Fail) -> list[Tensor]:
    """The tensors in it, in order."""
    inside = parts(tree)
    if inside is None:
        if not isinstance(tree, Tensor):
            fail(f"{path} must be a tensor, or tuples, lists or dicts of them", text(tree))
        return [tree]
    return [leaf for key, part in inside.items() for leaf in leaves(part, path + key, fail)]


def paths(tree: Any, path: str) -> list[str]:
    """Where its leaves lie."""
    inside = parts(tree)
    if inside is None:
        return [path]
    return [at for key, part in inside.items() for at in paths(part, path + key)]


def leaves_as(tree: Any, like: Any, path: str, fail: Fail) -> list[Tensor]:
    """The tensors in it, in the order of another tree, of whose structure it must be. (Lists pass
    for tuples, and dicts may have another order.)"""
    want = parts(like)
    if want is None:
        if not isinstance(tree, Tensor):
            fail(f"{path} must be a tensor", text(tree))
        return [tree]
    have = parts(tree)
    if have is None or have.keys() != want.keys():
        fail(f"{path} must be {text(like)}", text(tree))
    return [leaf for key in want for leaf in leaves_as(have[key], want[key], path + key, fail)]


def rebuild(like: Any, flat: list[Tensor]) -> Any:
    """The structure of another tree around these leaves, as many as it has."""
    return _rebuild(like, iter(flat))


def _rebuild(like: Any, flat: Iterator[Tensor]) -> Any:
    inside = parts(like)
    if inside is None:
        return next(flat)
    values = [_rebuild(part, flat) for part in inside.values()]
    if isinstance(like, dict):
        pairs = zip(like, values)
        return OrderedDict(pairs) if isinstance(like, OrderedDict) else dict(pairs)
    kind: Any = type(like)
    if dataclasses.is_dataclass(like):
        return kind(**{key[1:]: value for key, value in zip(inside, values)})
    if hasattr(like, "_fields"):
        return kind(*values)
    return list(values) if isinstance(like, list) else tuple(values)
