"""Truncated backpropagation through time: a stream in chunks, with the state carried over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ._checks import check_dense
from .quantize import Quantized

__all__ = ["truncated"]


def _detached(state: Any) -> Any:
    return state.detach() if isinstance(state, Tensor) else tuple(s.detach() for s in state)


def _pieces(layer: Any, input: Any, steps: Any, reset: Any) -> Iterator[tuple[Tensor, Any]]:
    """Chunks of input with their masks, each cut when it is asked for."""
    if not isinstance(input, Tensor):
        yield from ((chunk, None) for chunk in input)
        return
    if input.dim() not in (2, 3):
        yield input, reset  # the layer says what it takes
        return
    time = 1 if layer.batch_first and input.dim() == 3 else 0
    if reset is not None and (not isinstance(reset, Tensor) or reset.shape != input.shape[:-1]):
        found = tuple(reset.shape) if isinstance(reset, Tensor) else type(reset).__name__
        raise RuntimeError(
            "rnnfast: reset of truncated must have input's shape without the features = "
            f"{tuple(input.shape[:-1])}, got {found}"
        )
    total = input.size(time)
    for begin in range(0, max(total, 1), steps):  # of no steps at all the layer tells, too
        length = min(steps, total - begin)
        mask = None if reset is None else reset.narrow(time, begin, length)
        yield input.narrow(time, begin, length), mask


def _check(layer: Any, input: Any, steps: Any, reset: Any) -> None:
    if not isinstance(layer, (nn.RNNBase, Quantized)):
        raise TypeError(
            "rnnfast: truncated needs a recurrent layer of rnnfast or torch.nn, got "
            f"{type(layer).__name__}"
        )
    if layer.bidirectional:
        raise RuntimeError(
            "rnnfast: truncated needs a layer of one direction, got bidirectional=True: the second "
            "direction begins at the end of the sequence, and a stream has none"
        )
    if isinstance(input, PackedSequence):
        raise RuntimeError(
            "rnnfast: truncated takes a tensor or an iterable of chunks, got a PackedSequence; pad "
            "it with torch.nn.utils.rnn.pad_packed_sequence"
        )
    if not isinstance(input, (Tensor, Iterable)):
        raise TypeError(
            "rnnfast: truncated takes a tensor or an iterable of chunks, got "
            f"{type(input).__name__}"
        )
    if not isinstance(input, Tensor):
        if steps is not None or reset is not None:
            which = "steps" if steps is not None else "reset"
            raise RuntimeError(
                f"rnnfast: {which} of truncated goes with one tensor, got an input of type "
                f"{type(input).__name__}, whose chunks are cut already"
            )
        return
    check_dense(input, "input of truncated")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise RuntimeError(f"rnnfast: steps of truncated must be an int >= 1, got {steps!r}")


def _run(layer: Any, input: Any, state: Any, steps: Any, reset: Any) -> Iterator[tuple[Any, Any]]:
    for chunk, mask in _pieces(layer, input, steps, reset):
        output, state = layer(chunk, state) if mask is None else layer(chunk, state, mask)
        state = _detached(state)
        yield output, state
        del output  # or its graph would live through the next chunk


def truncated(
    layer: nn.RNNBase | Quantized,
    input: Tensor | Iterable[Tensor],
    state: Any = None,
    *,
    steps: int | None = None,
    reset: Tensor | None = None,
) -> Iterator[tuple[Tensor, Any]]:
    r"""Run a layer over a stream, chunk by chunk: truncated backpropagation through time.

    The state goes from chunk to chunk, gradients do not: each chunk's output has a graph of its
    own, and no more than that is kept. Nothing runs before it is asked for, so that weights
    may change between chunks; while they do not, the outputs are those of one call with the whole
    sequence. (Bit for bit in float32 and float64 on the CPU, where every chunk has 80 rows, steps
    times B, or the whole sequence fewer: below, a call multiplies in another order, but of a frozen
    or quantized layer. In 16 bits the state is rounded at every chunk's end.)

    Args:
        layer: a recurrent layer of rnnfast or torch.nn, of one direction; frozen and quantized ones
            without gradients, for streams in inference
        input: the whole sequence as the layer takes it, or an iterable of chunks of any lengths
        state: initial state, zeros if ``None``. The first chunk's gradients reach it
        steps: length of a chunk, the last may be shorter; for a tensor
        reset: as the layer takes it; for a tensor

    Shape:
        - input, state, reset: as the layer's; output: the layer's for a chunk

    Returns:
        an iterator of ``(output, state)``; the state is detached, that of the LSTM a tuple

    Raises:
        TypeError: ``layer`` is none, or ``input`` neither a tensor nor an iterable
        RuntimeError: two directions, packed input, or steps that do not fit

    Example::

        >>> chunks = rnnfast.truncated(layer, x, steps=50)          # x (T, B, I)
        >>> for (output, state), target in zip(chunks, targets.split(50)):
        ...     loss = criterion(head(output), target)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
    """
    _check(layer, input, steps, reset)
    return _run(layer, input, state, steps, reset)
