"""Covering arrays: many options in few rows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """A small list of rows in which every pair of values of every two factors occurs (greedy)."""
    rng = random.Random(seed)
    names = list(factors)
    todo = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(factors[names[a]]))
        for y in range(len(factors[names[b]]))
    }
    rows = []
    while todo:
        (a, x), (b, y) = min(todo)
        row = {a: x, b: y}
        rest = [k for k in range(len(names)) if k not in row]
        rng.shuffle(rest)
        for k in rest:
            choices = list(range(len(factors[names[k]])))
            rng.shuffle(choices)

            gains = [
                sum(tuple(sorted([(k, value), other])) in todo for other in row.items())
                for value in choices
            ]
            row[k] = choices[gains.index(max(gains))]
        todo -= set(itertools.combinations(sorted(row.items()), 2))
        rows.append({names[k]: factors[names[k]][v] for k, v in sorted(row.items())})
    return rows
