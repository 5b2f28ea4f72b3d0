"""Layers with layer normalisation: their cells, and the parameters that they have besides."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ._checks import check_bool
from .cells import CellSpec


def kind_of(who: str, kind: str, usual: str, layer_norm: Any, **others: Any) -> str:
    """``kind``, or the normalised one of the usual layer; others: options that it is not defined
    with, and whether they were chosen."""
    check_bool(who, "layer_norm", layer_norm)
    if not layer_norm:
        return kind
    for name, chosen in others.items():
        if chosen:
            raise ValueError(f"rnnfast: layer_norm of {who} is not defined with {name}")
    return f"{usual}_norm"


def names_of(spec: CellSpec) -> dict[str, int]:
    """Beginnings of the parameters' names in the order in which b_hh has them, and how many
    numbers of a unit each is."""
    names = {"norm_ih": spec.gates}
    if spec.dense:
        names["norm_hh"] = spec.gates
    if spec.states == 2:
        names |= {"norm_c": 1, "norm_c_bias": 1}
    return names


def add(layer: Any, device: Any, dtype: torch.dtype | None) -> None:
    """Give a layer the parameters of its chosen cell."""
    layer.layer_norm = True
    for names in layer._all_weights:
        of_pass = names[0].removeprefix("weight_ih")
        for begin, count in names_of(layer._chosen_cell).items():
            empty = torch.empty(count * layer.hidden_size, device=device, dtype=dtype)
            setattr(layer, begin + of_pass, nn.Parameter(empty))
            names.append(begin + of_pass)
    layer._flat_weights_names = [name for names in layer._all_weights for name in names]
    layer._init_flat_weights()
    reset(layer)


def reset(layer: Any) -> None:
    """Gains of one, biases of zero, of a layer that has them."""
    if not layer.layer_norm:
        return
    for name, parameter in layer.named_parameters(recurse=False):
        if name.startswith("norm"):
            nn.init.constant_(parameter, 0.0 if name.startswith("norm_c_bias") else 1.0)
