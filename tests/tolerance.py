"""The tolerance rule: how far from the float64 reference a result may be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def biggest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


# How many float32 tensors were judged, and how often the peer had to be asked again.
VERDICTS: Counter[str] = Counter()


class Peer(dict[str, Tensor]):
    """What the peer computed, and how to make it compute again with noise in the last bits.

    Rounding is chance: torch.nn's error in a small tensor may be nearly nothing by luck. Where
    ours is over the bound, the peer is run again on inputs that differ by less than a rounding,
    and its largest error counts. What is less accurate in earnest stays over it.
    """

    DRAWS = 8  # at 4, two tensors of a hundred cells' exceed the bound on one processor by chance

    def __init__(self, first: Tensors, redraw: Callable[[int], Tensors]) -> None:
        super().__init__(first)
        self._redraw = redraw
        self._more: list[Tensors] = []

    def draws(self) -> Iterator[Tensors]:
        """One draw after the other, computed once."""
        for seed in range(self.DRAWS):
            if seed == len(self._more):
                self._more.append(self._redraw(seed))
            yield self._more[seed]


def last_bits(value: Tensor, gen: torch.Generator) -> Tensor:
    """The same numbers to within one rounding."""
    noise = torch.rand(value.shape, generator=gen, dtype=value.dtype) * 2 - 1
    return value.detach() * (1 + torch.finfo(value.dtype).eps * noise)


def bound(name: str, peer_errors: Sequence[float], ref: Tensor, dtype: torch.dtype) -> float:
    """How far from ``ref`` (float64) a result in ``dtype`` may be, as max |difference|.

    float64: 1e-10 relative. float32: twice the error of the peer in the same dtype, and four
    roundings of the largest value. The peer is torch.nn, or the oracle for a cell that it lacks.
    """
    scale = biggest(ref)
    if dtype == torch.float64:
        return 1e-10 * scale
    assert peer_errors, f"{name}: float32 needs a peer"
    peer_error = max(peer_errors)
    # A peer that is wrong would make the rule pass anything.
    assert peer_error <= 1e-4 * scale + 1e-30, f"{name}: the peer itself is off by {peer_error}"
    return 2 * peer_error + 4 * torch.finfo(dtype).eps * scale


def check_tensor(
    name: str, ours: Tensor, peer: Mapping[str, Tensor] | None, ref: Tensor, dtype: torch.dtype
) -> None:
    """The rule for one tensor; a Peer is asked again before ours is called wrong."""

    def error_of(result: Tensor, exact: Tensor) -> float:
        return biggest(result.double() - exact)

    assert ours.shape == ref.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(ref.shape)}"
    assert ours.dtype == dtype, f"{name}: {ours.dtype}, not {dtype}"
    error = error_of(ours, ref)
    # NaN compares false, and so fails.
    VERDICTS["tensors"] += dtype == torch.float32
    first = [] if peer is None or dtype == torch.float64 else [error_of(peer[name], ref)]
    if error <= (allowed := bound(name, first, ref, dtype)):
        return
    if isinstance(peer, Peer) and dtype != torch.float64:
        VERDICTS["asked again"] += 1
        errors = list(first)
        for result in peer.draws():
            errors.append(error_of(result[name], ref))
            if error <= (allowed := bound(name, errors, ref, dtype)):
                return
    assert error <= allowed, f"{name}: off by {error:.3g}, {allowed:.3g} allowed"


def check(ours: Tensors, peer: Tensors | None, ref: Tensors, dtype: torch.dtype) -> None:
    """The rule for every tensor; all that break it are named."""
    assert ours.keys() == ref.keys()
    broken = []
    for name in ref:
        try:
            check_tensor(name, ours[name], peer, ref[name], dtype)
        except AssertionError as error:
            broken.append(str(error))
    assert not broken, "; ".join(broken)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit: shape, dtype, sign of zero and NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(view), b.contiguous().view(view))
