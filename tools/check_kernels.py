"""Reads ptxas's report from the log of a build: ``python tools/check_kernels.py LOG``.

Every kernel that the engine has must be there, for every cell, dtype and tile, without spills and
stack, and with registers for at least four blocks a multiprocessor (two with float64, of a scan,
whose threads have the loads of eight steps under way, and of batch normalisation, which has few
blocks; one of an on-chip kernel, which fills a multiprocessor, and of batch normalisation with
float64).
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CELLS = {
    "lstm": "LstmCellOf<StandardActivations>",
    "gru": "GruCellOf<StandardActivations>",
    "rnn_tanh": "RnnCell<Tanh, dense>",
    "rnn_relu": "RnnCell<Relu, dense>",
    "indrnn_tanh": "RnnCell<Tanh, diagonal>",
    "indrnn_relu": "RnnCell<Relu, diagonal>",
    "min_gru": "MinGruCell<Positive>",
    "min_gru_linear": "MinGruCell<Identity>",
    "min_lstm": "MinLstmCell<Positive>",
    "min_lstm_linear": "MinLstmCell<Identity>",
    "qrnn_f": "QrnnFCell",
    "qrnn_fo": "QrnnCell<false>",
    "qrnn_ifo": "QrnnCell<true>",
    "lstm_any": "LstmCellOf<ChosenActivations>",
    "gru_any": "GruCellOf<ChosenActivations>",
    "rnn_any": "RnnAnyCellOf<dense>",
    "indrnn_any": "RnnAnyCellOf<diagonal>",
    "peephole_lstm": "PeepholeLstmCell",
    "sru": "SruCell",
    "coupled_lstm": "CoupledLstmCell",
    "gru_before": "GruBeforeCell",
    "lstm_norm": "LstmNormCell",
    "gru_norm": "GruNormCell",
    "rnn_norm": "RnnNormCell",
    "indrnn_norm": "IndRnnNormCell",
    "lstm_zoneout": "Zoneout<LstmCellOf<ChosenActivations> >",
    "gru_zoneout": "Zoneout<GruCellOf<ChosenActivations> >",
    "rnn_zoneout": "Zoneout<RnnAnyCellOf<dense> >",
    "slstm": "SlstmCellOf<SigmoidForget>",
    "slstm_exp": "SlstmCellOf<ExponentialForget>",
}
# Cells of two halves, and their kernels.
STAGED = ("gru_before", "lstm_norm")
HALVES = ("begin_forward", "finish_forward", "finish_backward", "begin_backward")
DTYPES = ("float", "double", "Float16", "BFloat16")
# What csrc/core/onchip_tiles.h lists, and the cells and dtypes that a tile serves.
TILES = Path(__file__).resolve().parents[1] / "csrc" / "core" / "onchip_tiles.h"
TILE = re.compile(r"use\((\d), (\w+), +(\w+), +(\d+), +(\d+), +(\d+)\)")
OF_GATES = {
    "4": (CELLS["lstm"],),
    "3": (CELLS["gru"],),
    "1": ("RnnCell<Tanh, dense>", "RnnCell<Relu, dense>"),
}
OF_OPERAND = {"kHalf": ("Float16", "BFloat16"), "kTf32": ("float",)}
# Of the 65,536 that a multiprocessor has, for blocks of 256 threads.
MOST_REGISTERS, MOST_WITH_DOUBLE, MOST_OF_TWO = 64, 128, 128
SCANS = ("follow_chunks", "join_chunks", "take_chunks")
BATCH_NORMS = ("batch_norm_forward", "batch_norm_backward")

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def most_of_tile(hidden: int, units: int) -> int:
    """Registers that a thread of the tile's block can have. A quarter of the multiprocessor has
    16,384 for its warps; a warp takes them by 256, and an instruction names no more than 255."""
    warps = -(-hidden // units)
    return min(255, 16384 // (32 * -(-warps // 4)) // 8 * 8)


def onchip() -> dict[str, int]:
    """Kernels of the table, and the registers that each can have."""
    kernels = {}
    for gates, operand, backward, hidden, units, kept in TILE.findall(TILES.read_text()):
        name, sizes = ("onchip_forward", f"{hidden}, {units}, {kept}")
        if backward == "true":
            name, sizes = "onchip_backward", f"{hidden}, {kept}"
        kernels |= {
            f"{name}<{cell}, {dtype}, {sizes}>": most_of_tile(int(hidden), int(units))
            for cell in OF_GATES[gates]
            for dtype in OF_OPERAND[operand]
        }
    return kernels


def expected() -> set[str]:
    steps = {
        f"{kernel}<{cell}, {dtype}>"
        for name, cell in CELLS.items()
        for kernel in (HALVES if name in STAGED else ("forward_steps", "backward_steps"))
        for dtype in DTYPES
    }
    rows = {
        f"{kernel}<{dtype}>"
        for kernel in ("gather_projected", "drop_rows", "sum_slices", "sum_parts")
        for dtype in DTYPES
    }
    scans = {
        f"{kernel}<{way}Scan<{dtype}, DeviceMemory> >"
        for kernel in SCANS
        for way in ("Forward", "Backward")
        for dtype in DTYPES
    }
    wide = {"double": "double"}
    copies = {f"copy_rows<{wide.get(dtype, 'float')}, {dtype}>" for dtype in DTYPES}
    sums = {"add_dropped<float>", "add_dropped<double>", "copy_offsets"}
    norms = {f"norm_rows<{dtype}>" for dtype in DTYPES}
    norms |= {
        f"norm_backward_rows<{dtype}, {value}>"
        for dtype in DTYPES
        for value in (dtype, wide.get(dtype, "float"))
    }
    norms |= {f"{kernel}<{dtype}>" for kernel in BATCH_NORMS for dtype in ("float", "double")}
    return norms | steps | rows | scans | copies | sums | onchip().keys()


def plain(demangled: str) -> str:
    """The name and its arguments, without namespaces and casts."""
    text = re.sub(r"(rnnfast|cuda|\(anonymous namespace\)|_GLOBAL__N__\w+)::", "", demangled)
    text = re.sub(r"\(Recurrence\)0", "dense", re.sub(r"\(Recurrence\)1", "diagonal", text))
    text = re.sub(r"\((?:int|bool)\)(\w+)", r"\1", text)
    text = re.sub(r"FixedActivation<(\w+)Function>", r"\1", text)
    found = re.search(r"(\w+<.*>)\(", text) or re.search(r"(\w+)\(", text)
    return found.group(1) if found else text


def main(log: Path) -> int:
    found = [match.groupdict() for match in ENTRY.finditer(log.read_text())]
    names = subprocess.run(
        ["c++filt"], input="\n".join(f["name"] for f in found), capture_output=True, text=True
    ).stdout.splitlines()
    tiles = onchip()
    faults, seen, archs = [], {}, {f["arch"] for f in found}
    for entry, name in zip(found, map(plain, names), strict=True):
        seen.setdefault(entry["arch"], set()).add(name)
        what = f"{name} on {entry['arch']}"
        if any(int(entry[key]) for key in ("stack", "stores", "loads")):
            faults.append(
                f"{what}: {entry['stack']} bytes of stack, spills of {entry['stores']} and "
                f"{entry['loads']} bytes"
            )
        allowed = MOST_WITH_DOUBLE if "double" in name else MOST_REGISTERS
        if name.startswith((*SCANS, *BATCH_NORMS)):
            allowed = MOST_OF_TWO
        if name.startswith(BATCH_NORMS) and "double" in name:
            allowed = 255
        if name.startswith("onchip_"):
            allowed = tiles.get(name, 255)  # one that is not on the list is a fault anyway
        if int(entry["registers"]) > allowed:
            faults.append(f"{what}: {entry['registers']} registers, {allowed} allowed")
    if not archs:
        faults.append(f"{log} holds no report of ptxas: build anew, with -Xptxas=-v")
    for arch, kernels in seen.items():
        faults += [f"{name} is missing for {arch}" for name in sorted(expected() - kernels)]
        faults += [f"{name} is not on the list" for name in sorted(kernels - expected())]
    most = max((int(entry["registers"]) for entry in found), default=0)
    where = ", ".join(sorted(archs))
    good = f"{len(found)} kernels for {where}: no spills, at most {most} registers"
    print("\n".join(faults) or good)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
