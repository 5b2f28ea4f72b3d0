"""What calls of the layers take and give, for type checkers: torch.nn says Any. Nothing of it is
there when code runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ._layer import Layer

__all__ = ["AnyStateCalls", "Device", "Input", "LSTMCalls", "OneStateCalls", "States"]

States = tuple[Tensor, Tensor]
Device = torch.device | str | int | None
# what comes in comes out
Input = TypeVar("Input", Tensor, PackedSequence, "Tensor | PackedSequence")

if TYPE_CHECKING:

    class LSTMCalls(Layer):
        def forward(
            self,
            input: Input,
            hx: States | None = None,
            reset: Tensor | PackedSequence | None = None,
            lengths: Tensor | None = None,
            mask: Tensor | None = None,
        ) -> tuple[Input, States]: ...
        def __call__(
            self,
            input: Input,
            hx: States | None = None,
            reset: Tensor | PackedSequence | None = None,
            lengths: Tensor | None = None,
            mask: Tensor | None = None,
        ) -> tuple[Input, States]: ...
        def step(
            self, input: Tensor, state: States | None = None, reset: Tensor | bool | None = None
        ) -> tuple[Tensor, States]: ...

    class OneStateCalls(Layer):
        def forward(
            self,
            input: Input,
            hx: Tensor | None = None,
            reset: Tensor | PackedSequence | None = None,
            lengths: Tensor | None = None,
            mask: Tensor | None = None,
        ) -> tuple[Input, Tensor]: ...
        def __call__(
            self,
            input: Input,
            hx: Tensor | None = None,
            reset: Tensor | PackedSequence | None = None,
            lengths: Tensor | None = None,
            mask: Tensor | None = None,
        ) -> tuple[Input, Tensor]: ...
        def step(
            self, input: Tensor, state: Tensor | None = None, reset: Tensor | bool | None = None
        ) -> tuple[Tensor, Tensor]: ...

    class AnyStateCalls(Layer):
        def forward(
            self,
            input: Input,
            hx: Any = None,
            reset: Tensor | PackedSequence | None = None,
            lengths: Tensor | None = None,
            mask: Tensor | None = None,
        ) -> tuple[Input, Any]: ...
        def __call__(
            self,
            input: Input,
            hx: Any = None,
            reset: Tensor | PackedSequence | None = None,
            lengths: Tensor | None = None,
            mask: Tensor | None = None,
        ) -> tuple[Input, Any]: ...
        def step(
            self, input: Tensor, state: Any = None, reset: Tensor | bool | None = None
        ) -> tuple[Tensor, Any]: ...

else:
    LSTMCalls = OneStateCalls = AnyStateCalls = Layer
