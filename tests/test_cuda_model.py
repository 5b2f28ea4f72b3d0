"""The table of on-chip tiles and the model of a GPU (csrc/core/onchip.h, cuda_model.h).

Arithmetic checks, not measurements: that the table fits a multiprocessor, that parts add up and lie
above their floors, and that figures worked out by hand come out. No GPU has confirmed any of them.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rnnfast import _core  # built with RNNFAST_DEV=1, as `make test` does
from rnnfast.cells import CELLS

TILES: list[dict[str, Any]] = _core.onchip_tiles()
EXCHANGES = ("none", "cluster", "grid")
HOPPER = _core.CudaDevice()  # 9.0, 132 multiprocessors, 227 KiB of shared memory a block
IDS = {cell.name: cell.id for cell in CELLS}
CELL_OF = {4: "lstm", 3: "gru", 1: "rnn_tanh"}
CLOCK = 1755  # clocks a microsecond, as the model has it
INDICES = range(len(TILES))


def _name(index: int) -> str:
    t = TILES[index]
    way = "backward" if t["backward"] else "forward"
    return f"{t['exchange']}{t['blocks']}-{CELL_OF[t['gates']]}{t['hidden']}-{t['operand']}-{way}"


def _layer(cell: str = "lstm", H: int = 64, B: int = 8, T: int = 256, **more: Any) -> Any:
    return _core.CudaLayer(IDS[cell], T, B, more.pop("I", H), H, **more)


def _kind(tile: dict[str, Any]) -> tuple[str, int, str, bool]:
    return tile["exchange"], tile["gates"], tile["operand"], tile["backward"]


def _blocks(estimate: dict[str, Any]) -> int:
    return int(TILES[estimate["tile"]]["blocks"])


def _largest(*kind: Any) -> int:
    """Units of the largest tile of an exchange, gates, operand and direction; step: no limit."""
    return max((t["hidden"] for t in TILES if _kind(t) == kind), default=4096)


def _of(estimates: list[dict[str, Any]], engine: str) -> dict[str, Any]:
    (found,) = (e for e in estimates if e["engine"] == engine)
    return found


def _ranked(cell: str = "lstm", special: bool = False, **sizes: Any) -> list[dict[str, Any]]:
    return list(_core.rank_engines(_layer(cell, **sizes), HOPPER, special))


@pytest.mark.parametrize("index", INDICES, ids=_name)
def test_tile_fits_a_multiprocessor(index: int) -> None:
    """A second calculation, from what a tensor core product and a multiprocessor are."""
    t = TILES[index]
    item, slice_ = {"half": (2, 16), "tf32": (4, 8)}[t["operand"]]
    H, blocks, parts, units = t["hidden"], t["blocks"], t["parts"], t["units"]
    if t["backward"]:  # (H / parts units of all gates) x (own units)
        depth, own, rows = H // parts, H * parts // blocks, t["gates"] * units
    else:  # (own units of all gates) x (all units)
        assert parts == 1
        depth, own, rows = H, H // blocks, t["gates"] * units
    assert (own * blocks, depth * parts) == (H * parts, H), "no whole parts"
    assert (t["own_units"], t["depth_units"]) == (own, depth)
    warps = own // units * t["splits"]
    assert warps * units == own * t["splits"] and warps <= 32
    assert t["warps"] == warps and t["threads"] == 32 * warps
    assert t["slices"] * slice_ * t["splits"] == depth
    assert 0 <= t["kept"] <= t["slices"]

    # A quarter of a multiprocessor has 16,384 registers, and a fragment takes 4 of each lane.
    tiles = -(-rows // 16)
    assert t["row_tiles"] == tiles
    of_weights = 4 * t["kept"] * tiles
    assert t["weight_registers"] == of_weights
    available = min(255, 16384 // (32 * -(-warps // 4)) // 8 * 8)
    assert t["registers"] == available and of_weights + 72 <= available
    sums = 4 * own * 8 * (1 if t["backward"] else t["gates"])
    shared = warps * (t["slices"] - t["kept"]) * tiles * 512
    assert t["shared_weights"] == shared
    shared += 2 * (t["gates"] if t["backward"] else 1) * depth * 8 * item
    shared += (t["splits"] - 1) * sums + (2 * sums if parts > 1 else 0)
    assert t["shared_bytes"] == shared <= 227 * 1024

    # All of w_hh lies in the group's registers and shared memory, once, but for padded rows.
    stored = blocks * (t["shared_weights"] + 4 * of_weights * t["threads"])
    assert stored * rows == t["gates"] * H * H * item * 16 * tiles


def test_table_covers_what_it_should() -> None:
    """Kernels exist for one block alone; every cell, operand and direction has each exchange."""
    assert {t["exchange"] for t in TILES if t["built"]} == {"none"}
    assert not [t for t in TILES if t["exchange"] == "none" and not t["built"]]
    kinds = {_kind(t) for t in TILES}
    assert len(kinds) == 3 * 3 * 2 * 2
    assert {t["blocks"] for t in TILES if t["exchange"] == "cluster"} == {8, 16}
    assert {t["blocks"] for t in TILES if t["exchange"] == "grid"} == {16, 32, 64, 128}
    for kind in kinds:
        assert _largest(*kind) >= {"none": 128, "cluster": 384, "grid": 1024}[kind[0]], kind


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("operand", ["half", "tf32"])
@pytest.mark.parametrize("cell", CELL_OF.values())
def test_every_size_has_a_tile_or_a_reason(cell: str, operand: str, backward: bool) -> None:
    """And the tile is the smallest one."""
    gates = {name: number for number, name in CELL_OF.items()}[cell]
    mine = [i for i in INDICES if _kind(TILES[i]) == ("none", gates, operand, backward)]
    largest = _largest("none", gates, operand, backward)
    for H in range(1, largest + 20):
        layer = _layer(cell, H, operand=operand, backward=backward)
        found, why = _core.find_tile(layer, "none", HOPPER)
        if largest < H:
            assert found == -1 and why == (
                f"the on-chip engine holds w_hh of up to H = {largest} units in one block"
                f"{' in backward' if backward else ''}, got H = {H}"
            )
            continue
        assert why == ""
        serving = [i for i in mine if not _core.why_not_tile(i, layer, HOPPER)]
        assert found == min(serving, key=lambda i: TILES[i]["hidden"]) and TILES[found]["built"]
        assert TILES[found]["hidden"] == min(
            TILES[i]["hidden"] for i in mine if TILES[i]["hidden"] >= H
        )


def test_reasons() -> None:
    def why(exchange: str = "none", device: Any = HOPPER, **more: Any) -> str:
        found, text = _core.find_tile(_layer(**more), exchange, device)
        assert found == -1
        return str(text)

    ask = "the on-chip engine "
    assert why(cell="indrnn_tanh") == (
        ask + "needs a dense recurrence, got indrnn_tanh, whose steps have no product"
    )
    assert why(P=32) == ask + "has no projection, got one from H = 64 to P = 32"
    assert why(operand="float32").startswith(
        "the on-chip engine has no float32 products without TF32"
    )
    assert why(operand="float64") == "float64 products are not in the tiles"
    for exchange in ("cluster", "grid"):
        assert why(exchange) == f"{ask}has no kernel for the {exchange} exchange yet"
    assert why("cluster", H=800).startswith(
        ask + "holds w_hh of up to H = 768 units in a cluster of 16"
    )
    assert why("grid", H=3000).endswith("up to H = 2048 units in 128 blocks, got H = 3000")
    assert why(device=_core.CudaDevice(75)) == (
        ask + "needs compute capability 8.0 or higher, got 7.5"
    )
    small = _core.CudaDevice(86, 46, 101376)
    tile = max(
        (t for t in TILES if _kind(t) == ("none", 4, "half", False)), key=lambda t: t["hidden"]
    )
    assert why(device=small, H=tile["hidden"]) == (
        f"{ask}needs {tile['shared_bytes']} bytes of shared memory a block for up to "
        f"H = {tile['hidden']} units, the device has 101376"
    )
    assert _core.find_tile(_layer(H=64), "none", small)[0] >= 0

    # A tile of another cell, or of numbers of another size.
    lstm = _core.find_tile(_layer(), "none", HOPPER)[0]
    assert _core.why_not_tile(lstm, _layer("gru"), HOPPER) == (
        "the on-chip tile is for cells of G = 4 gates, got gru with 3"
    )
    assert _core.why_not_tile(lstm, _layer(operand="tf32"), HOPPER) == (
        "the on-chip tile is for numbers of 2 bytes, got 4"
    )


SIZES = [(H, B) for H in (16, 64, 100, 192, 256, 512, 768, 1024, 2048, 3000) for B in (1, 16, 300)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("operand", ["half", "tf32", "float32", "float64"])
@pytest.mark.parametrize("cell", IDS)
def test_parts_add_up_above_their_floors(cell: str, operand: str, backward: bool) -> None:
    for H, B in SIZES:
        ranked = _ranked(cell, H=H, B=B, operand=operand, backward=backward, saving=not backward)
        assert {e["engine"] for e in ranked} == {"step", *EXCHANGES}
        for e in ranked:
            assert all(part >= 0 for part in e["parts"].values())
            if not e["total"]:
                assert e["why_not"] and e["tile"] == -1 and e["engine"] != "step"
                continue
            assert e["step"] == pytest.approx(sum(e["parts"].values()))
            assert e["total"] == pytest.approx(256 * e["step"] + e["start"] + e["around"])
            assert e["start"] > 0 and e["around"] > 0
            floor = max(e["floors"].values())
            assert e["floors"][e["binding"]] == floor
            assert 0 < floor <= e["step"] * (1 + 1e-9)
            for name, at_least in e["floors"].items():  # each part holds its own, too
                part = {"operations": "product", "exchanges": "exchange"}.get(name, name)
                if part in ("gates", "gathered", "exchange"):
                    assert e["parts"][part] >= at_least * (1 - 1e-9)


def test_ranking() -> None:
    """Who can serve comes first, by time; then who could, then who fits nothing."""
    for H, B in SIZES:
        ranked = _ranked(H=H, B=B)
        keys = [(bool(e["why_not"]), e["total"] == 0, e["total"]) for e in ranked]
        assert keys == sorted(keys)
        assert _core.best_engine(_layer(H=H, B=B), HOPPER) == ranked[0]
        assert ranked[0]["engine"] == "none" if H <= 100 else not ranked[0]["why_not"]
    assert _ranked("indrnn_tanh")[0]["engine"] == "step"
    old = _core.rank_engines(_layer(), _core.CudaDevice(75))
    assert all(e["why_not"] for e in old)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("engine", ["step", *EXCHANGES])
@pytest.mark.parametrize("cell", CELL_OF.values())
def test_more_takes_longer(cell: str, engine: str, backward: bool) -> None:
    def times(**sizes: Any) -> tuple[float, float]:
        e = _of(_ranked(cell, backward=backward, **sizes), engine)
        return e["step"], e["total"]

    gates = {name: number for number, name in CELL_OF.items()}[cell]
    largest = min(512, _largest(engine, gates, "half", backward))
    along_b = [times(H=64, B=B) for B in (1, 7, 8, 9, 64, 120, 121, 500, 1057, 4000)]
    along_h = [times(H=H, B=16) for H in range(16, largest + 1, 16)]
    for times_ in (along_b, along_h):
        for column in zip(*times_, strict=True):
            assert all(b >= a * (1 - 1e-9) for a, b in pairwise(column))
    short, long_ = times(H=64, T=10), times(H=64, T=1000)
    assert short[0] == pytest.approx(long_[0]) and short[1] < long_[1] <= 100 * short[1]


def test_waves() -> None:
    """Groups of one block: 132 tiles of 8 rows at once. 15 clusters of 8, 4 groups of 32."""

    def step(B: int, engine: str = "none", H: int = 64) -> dict[str, Any]:
        return _of(_ranked(H=H, B=B), engine)

    assert step(8)["step"] == pytest.approx(step(16)["step"])
    full, more = step(8 * 132), step(8 * 132 + 1)
    assert (full["at_once"], full["rounds"], more["rounds"]) == (132, 1, 2)
    assert more["step"] == pytest.approx(2 * full["step"])
    assert step(120, "cluster", 256)["at_once"] == 15
    assert [step(B, "cluster", 256)["rounds"] for B in (120, 121, 241)] == [1, 2, 3]
    index = next(
        i
        for i, t in enumerate(TILES)
        if (_kind(t), t["hidden"], t["blocks"]) == (("grid", 4, "half", False), 1024, 32)
    )
    rounds = [_core.estimate_tile(index, _layer(H=1024, B=B), HOPPER) for B in (1, 32, 33)]
    assert [(e["at_once"], e["rounds"]) for e in rounds] == [(4, 1), (4, 1), (4, 2)]


def test_by_hand_grid() -> None:
    """LSTM, 768 units, 16 rows, 16 bits: 2 groups of 32 blocks, 24 units (96 rows of w_hh) each."""
    e = _of(_ranked(H=768, B=16), "grid")
    assert (e["at_once"], e["rounds"]) == (4, 1) and TILES[e["tile"]]["blocks"] == 32
    # 6 tiles of rows x 48 slices on 4 tensor cores, 4 clocks each at 63 % of the peak.
    assert e["floors"]["operations"] == pytest.approx(6 * 48 / 4 * 4 / 0.63 / CLOCK, rel=1e-6)
    # h of 8 rows, 12 KB, by each of 64 blocks: 0.11 us at 64 bytes a clock, 0.15 at 5.4 TB/s.
    assert e["floors"]["gathered"] == pytest.approx(64 * 768 * 16 / 5.4e6, rel=1e-6)
    # Published: a hop of 0.65 us, a barrier of the whole grid 1.07 to 1.09 (H100).
    assert 0.65 < e["floors"]["exchanges"] < 1.09
    # The goal that research set for this point before there was a model: 1.3 to 1.7 us.
    assert 1.2 < e["step"] < 1.8


def test_by_hand_anchors() -> None:
    """Within 5 % of sums on paper, or inside what others published."""
    # Nothing leaves the block, and 0.57 to 0.66 us are cuDNN's at H <= 64.
    for H in (16, 32, 48, 64):
        for B in (1, 32):
            assert _of(_ranked(H=H, B=B), "none")["step"] < 1
    # Two launches of 1.3 us; w_hh, 8.4 MB, at 5.4 TB/s: 1.55 us.
    step = _of(_ranked(H=1024, B=16), "step")
    assert step["floors"]["exchanges"] == pytest.approx(2.6)
    assert step["floors"]["weights"] == pytest.approx(1.55, rel=0.05)
    assert 4 < step["step"] < 6  # cuDNN's standard algorithm: 6.5 to 15
    # 1024 units, 32 rows: 128 blocks gather 16 KB each, 2.1 MB; were all of h read by 132
    # multiprocessors, 8.65 MB.
    grid = _of(_ranked(H=1024, B=32), "grid")
    assert grid["floors"]["gathered"] == pytest.approx(128 * 16384 / 5.4e6, rel=1e-6)
    assert grid["floors"]["gathered"] == pytest.approx(1.6 / 4, rel=0.05)
    # Gate maths of 128 units x 8 rows on one multiprocessor: 5 x 33 + 11 + 4 x 8 instructions.
    none = _of(_ranked(H=128, B=8), "none")
    assert none["floors"]["gates"] == pytest.approx(1024 * 208 / 128 / CLOCK, rel=1e-6)
    assert none["binding"] == "gates"
    special = _of(_ranked(special=True, H=128, B=8), "none")
    assert special["floors"]["gates"] == pytest.approx(1024 * 10 / 16 / CLOCK, rel=1e-6)


# --------------------------------------------------------------------------- the document

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
TABLE = DOCUMENT.read_text(encoding="utf-8").split("### Predictions against the goals")[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.split("\n\n**")[0].splitlines()
    if line.startswith("|")
][2:]
ENGINE = re.compile(r"(none|cluster|grid) \((\d+)(?:; back (\d+))?\)")


@pytest.mark.parametrize("row", ROWS[:-1], ids=lambda row: f"{row[0]}, {row[2]}")
def test_the_document_has_the_predictions_of_today(row: list[str]) -> None:
    """A row's H, B | goal | engine | step | floor | needs | + products | forward + backward."""
    H, B = map(int, row[0].split(","))
    named = ENGINE.match(row[2])
    assert named, row[2]
    T = 1024
    ways = (_ranked(H=H, B=B, T=T, I=H, saving=True), _ranked(H=H, B=B, T=T, I=H, backward=True))
    forward = _of(ways[0], named[1])
    assert _blocks(forward) == int(named[2])
    backward = min(
        (e for e in ways[1] if e["engine"] != "step" and e["total"]), key=lambda e: e["step"]
    )
    if named[3]:
        backward = _of(ways[1], named[1])
        assert _blocks(backward) == int(named[3])
    floor = max(forward["floors"].values())
    step = forward["step"]
    both = step + backward["step"]
    products = (forward["around"] + backward["around"]) / T
    goal = row[1].split()[0]
    assert row[3:] == [
        f"{step:.2f}",
        f"{forward['binding']} {floor:.2f}",
        "-" if goal == "-" else f"{100 * floor / float(goal):.0f} %",
        f"{step + forward['around'] / T:.2f}",
        f"{row[7].split(', ')[0]}, {both:.2f}, {both + products:.2f}",
    ]


def test_the_document_has_the_step_engine_of_today() -> None:
    assert "step engine" in ROWS[-1][0] and len(ROWS) == 9
    found = re.findall(r"([\d.]+) \((\d+), (\d+)\)", ROWS[-1][3])
    assert len(found) == 2
    for step, H, B in found:
        e = _of(_ranked(H=int(H), B=int(B), I=int(H), saving=True), "step")
        assert step == f"{e['step']:.1f}"
        assert ROWS[-1][4] == f"{e['binding']} {max(e['floors'].values()):.2f}"
