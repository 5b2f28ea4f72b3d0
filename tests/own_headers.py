"""What tests of rnnfast.load_cell share: headers, their references, and a quick compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rnnfast
from rnnfast import _own_library

IN, H, T, B = 4, 21, 6, 3
ROOT = Path(__file__).resolve().parents[1]
HEADERS = ROOT / "csrc" / "cells"

HEAD = """
#pragma once
#include "cell.h"
namespace rnnfast::RNNFAST_TARGET {
namespace {
"""
TAIL = """
}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
"""
MGU = re.findall(
    r"```cpp\n(// mgu\.h.*?)```", (ROOT / "docs" / "own_cell.md").read_text("utf-8"), re.DOTALL
)[0]

# Two states, parameters of each unit, and functions of a file beside it.
LEAKY = (
    '#pragma once\n#include "decay.h"\n'
    + HEAD
    + """
struct Leaky {
  static constexpr int kGates = 2;  // g o
  static constexpr int kStates = 2;
  static constexpr int kSaved = 3;
  static constexpr int kParameters = 2;  // the decay's pre-activation, and a peephole
  static constexpr Recurrence kRecurrence = Recurrence::kDense;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = false;

  template <class V>
  RNNFAST_HD static void forward(const V (&p)[2], const V (&gx)[2], const V (&gh)[2], V (&state)[2],
                                 V (&saved)[3]) {
    saved[0] = decay(p[0]);
    saved[1] = tanh(gx[0] + gh[0]);
    state[1] = saved[0] * state[1] + saved[1];
    saved[2] = sigmoid(gx[1] + gh[1] + p[1] * state[1]);
    state[0] = saved[2] * tanh(state[1]);
  }

  template <class V>
  RNNFAST_HD static void backward(const V (&p)[2], V (&dp)[2], const V (&saved)[3],
                                  const V (&prev)[2], const V (&next)[2], V (&dstate)[2],
                                  V (&dgx)[2], V (&dgh)[2]) {
    const V one = splat<V>(1.0);
    const V a = saved[0], g = saved[1], o = saved[2], squashed = tanh(next[1]);
    dgx[1] = dstate[0] * squashed * o * (one - o);
    const V dc = dstate[1] + dstate[0] * o * (one - squashed * squashed) + dgx[1] * p[1];
    dp[1] = dgx[1] * next[1];
    dp[0] = dc * prev[1] * a * (one - a);
    dgx[0] = dc * (one - g * g);
    dgh[0] = dgx[0];
    dgh[1] = dgx[1];
    dstate[0] = V{};
    dstate[1] = dc * a;
  }
};
"""
    + TAIL
)
DECAY = HEAD + "template <class V>\nRNNFAST_HD V decay(V x) { return sigmoid(x); }\n" + TAIL

# More states than any of the library's cells: traces that forget at four rates.
TRACES = (
    HEAD
    + """
struct Traces {
  static constexpr int kGates = 2;   // u o
  static constexpr int kStates = 5;  // h, and the traces
  static constexpr int kSaved = 2;
  static constexpr Recurrence kRecurrence = Recurrence::kDense;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = false;

  RNNFAST_HD static constexpr double kept(int trace) { return 1.0 - 0.5 / (1 << trace); }

  template <class V>
  RNNFAST_HD static void forward(const V (&gx)[2], const V (&gh)[2], V (&state)[5], V (&saved)[2]) {
    saved[0] = tanh(gx[0] + gh[0]);
    saved[1] = sigmoid(gx[1] + gh[1]);
    V sum{};
    for (int k = 0; k < 4; ++k) {
      state[k + 1] = splat<V>(kept(k)) * state[k + 1] + saved[0];
      sum += splat<V>(1.0 - kept(k)) * state[k + 1];
    }
    state[0] = saved[1] * sum;
  }
  template <class V>
  RNNFAST_HD static void backward(const V (&saved)[2], const V (&)[5], const V (&next)[5],
                                  V (&dstate)[5], V (&dgx)[2], V (&dgh)[2]) {
    const V one = splat<V>(1.0), u = saved[0], o = saved[1];
    V sum{}, du{};
    for (int k = 0; k < 4; ++k) {
      sum += splat<V>(1.0 - kept(k)) * next[k + 1];
      const V dtrace = dstate[k + 1] + dstate[0] * o * splat<V>(1.0 - kept(k));
      du += dtrace;
      dstate[k + 1] = splat<V>(kept(k)) * dtrace;
    }
    dgx[0] = dgh[0] = du * (one - u * u);
    dgx[1] = dgh[1] = dstate[0] * sum * o * (one - o);
    dstate[0] = V{};
  }
};
"""
    + TAIL
)

# Several states, a parameter, no hidden side, and nothing kept for backward but the states.
DRIFT = (
    HEAD
    + """
struct Drift {
  static constexpr int kGates = 1;
  static constexpr int kStates = 3;  // h, and the sums below it
  static constexpr int kSaved = 0;
  static constexpr int kParameters = 1;
  static constexpr Recurrence kRecurrence = Recurrence::kNone;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = true;

  template <class V>
  RNNFAST_HD static void forward(const V (&p)[1], const V (&gx)[1], const V (&gh)[1], V (&state)[3],
                                 V (&)[1]) {
    state[2] = splat<V>(0.5) * state[2] + gx[0] + gh[0];
    state[1] = p[0] * state[1] + state[2];
    state[0] = splat<V>(0.25) * state[0] + state[1];
  }
  template <class V>
  RNNFAST_HD static void backward(const V (&p)[1], V (&dp)[1], const V (&)[1], const V (&prev)[3],
                                  const V (&)[3], V (&dstate)[3], V (&dgx)[1], V (&dgh)[1]) {
    const V dfirst = dstate[1] + dstate[0];
    dgx[0] = dgh[0] = dstate[2] + dfirst;
    dp[0] = dfirst * prev[1];
    dstate[0] = splat<V>(0.25) * dstate[0];
    dstate[1] = p[0] * dfirst;
    dstate[2] = splat<V>(0.5) * dgx[0];
  }
};
"""
    + TAIL
)

# Without a hidden side; and a diagonal one, in a namespace, of a struct of the library.
SIMPLE = (
    '#include "indrnn.h"\n'
    + HEAD
    + """
struct Sum {
  static constexpr int kGates = 1;
  static constexpr int kStates = 1;
  static constexpr int kSaved = 0;
  static constexpr Recurrence kRecurrence = Recurrence::kNone;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = true;

  template <class V>
  RNNFAST_HD static void forward(const V (&gx)[1], const V (&gh)[1], V (&state)[1], V (&)[1]) {
    state[0] = state[0] * splat<V>(0.5) + gx[0] + gh[0];
  }
  template <class V>
  RNNFAST_HD static void backward(const V (&)[1], const V (&)[1], const V (&)[1], V (&dstate)[1],
                                  V (&dgx)[1], V (&dgh)[1]) {
    dgx[0] = dgh[0] = dstate[0];
    dstate[0] = dstate[0] * splat<V>(0.5);
  }
};
namespace mine {
using Unit = IndRnnTanhCell;
}
"""
    + TAIL
)


def mgu_step(gx: Any, gh: Any, state: Any) -> Any:
    f = torch.sigmoid(gx[0] + gh[0])
    n = torch.tanh(gx[1] + f * gh[1])
    return (1 - f) * state[0] + f * n


def leaky_step(gx: Any, gh: Any, state: Any, p: Any) -> Any:
    c = torch.sigmoid(p[0]) * state[1] + torch.tanh(gx[0] + gh[0])
    return torch.sigmoid(gx[1] + gh[1] + p[1] * c) * torch.tanh(c), c


def traces_step(gx: Any, gh: Any, state: Any) -> Any:
    u, kept = torch.tanh(gx[0] + gh[0]), (0.5, 0.75, 0.875, 0.9375)
    traces = [a * trace + u for a, trace in zip(kept, state[1:], strict=True)]
    total = sum((1 - a) * trace for a, trace in zip(kept, traces, strict=True))
    return (torch.sigmoid(gx[1] + gh[1]) * total, *traces)


def drift_step(gx: Any, gh: Any, state: Any, p: Any) -> Any:
    second = 0.5 * state[2] + gx[0] + gh[0]
    first = p[0] * state[1] + second
    return 0.25 * state[0] + first, first, second


AS_BUILT = _own_library.FLAGS
# A third of the compiler's time: what most of these tests look at does not depend on it.
QUICK = """
import rnnfast._own_library as own

own.FLAGS = tuple(flag.replace("-O2", "-Og") for flag in own.FLAGS)
"""


@pytest.fixture(scope="module")
def quick_compiler() -> Iterator[None]:
    exec(QUICK, {})
    assert _own_library.FLAGS != AS_BUILT
    yield
    _own_library.FLAGS = AS_BUILT


@pytest.fixture(scope="module")
def folder(quick_compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a space in its name, and headers."""
    folder = tmp_path_factory.mktemp("of mine")
    for name, text in (
        ("mgu.h", MGU),
        ("leaky.h", LEAKY),
        ("decay.h", DECAY),
        ("traces.h", TRACES),
        ("drift.h", DRIFT),
        ("simple.h", SIMPLE),
    ):
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> dict[str, type[rnnfast.LoadedLayer]]:
    """A cell of each kind of recurrence, with references."""
    return {
        "Mgu": rnnfast.load_cell(folder / "mgu.h", reference=mgu_step),
        "Leaky": rnnfast.load_cell(folder / "leaky.h", reference=leaky_step),
        "Traces": rnnfast.load_cell(folder / "traces.h", reference=traces_step),
        "Drift": rnnfast.load_cell(folder / "drift.h", reference=drift_step),
        "Sum": rnnfast.load_cell(
            folder / "simple.h",
            reference=lambda gx, gh, state: (0.5 * state[0] + gx[0] + gh[0],),
        ),
        "Unit": rnnfast.load_cell(
            folder / "simple.h",
            struct="mine::Unit",
            reference=lambda gx, gh, state: torch.tanh(gx[0] + gh[0]),
        ),
    }


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
