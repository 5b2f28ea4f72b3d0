"""Which engine runs: forcing one, listing them, and asking what ran."""

from __future__ import annotations

import os
import threading
from types import TracebackType

import torch

from . import _cuda
from . import ops as _ops  # noqa: F401  (loads the operators)

__all__ = ["EngineScope", "engines", "last_run", "use_engine"]

ISAS = ("portable", "avx2", "avx512", "neon", "avx512_bf16", "amx")
KERNELS = ("packed", "direct")
SPLITS = ("serial", "batch", "units", "directions", "layers")
PASS_SPLITS = SPLITS[:3]  # of one direction of one layer
_KERNEL_RAN = (*KERNELS, "diagonal")
_NAMES = ("auto", "cpu", "cuda", "reference")

_native = torch.ops.rnnfast
# read by _run.use_reference at every call; changed by use_engine only
forced = "auto"
# counts changes of ISA: a frozen layer's packed weights belong to one
isa_changes = 0
_isa_wish = -1
_kernel_wish = -1
_split_wish = -1
_launch_wish = -1

_local = threading.local()


def available_isas() -> list[str]:
    """Names of the instruction sets that were built and that this CPU has, slowest first."""
    return [name for i, name in enumerate(ISAS) if _native.isa_available(i)]


def engines() -> list[str]:
    """Names of the engines that can run here, as :func:`use_engine` takes them.

    A build always has a CPU engine, whose portable kernels need no instruction set, and the
    reference is Python. ``"cuda"`` is there where the build has it, torch has CUDA, and a device is
    visible; ``python -m rnnfast`` says what is missing.

    Example::

        >>> rnnfast.engines()
        ['cpu', 'reference']
    """
    return ["cpu", *([] if _cuda.why_not() else ["cuda"]), "reference"]


def _set_isa(isa: int) -> int:
    global isa_changes, _isa_wish
    _isa_wish = isa
    before = int(_native.set_isa(isa))
    if before != isa:
        isa_changes += 1
    return before


def _set_kernel(kernel: int) -> int:
    global _kernel_wish
    _kernel_wish = kernel
    return int(_native.set_kernel(kernel))


def _set_split(split: int) -> int:
    global _split_wish
    _split_wish = split
    return int(_native.set_split(split))


def _set_launch(launch: int) -> int:
    global _launch_wish
    _launch_wish = launch
    return _cuda.set_launch(launch)


class EngineScope:
    """What :func:`use_engine` returns: the choice is in force; leaving ``with`` undoes it."""

    def __init__(self, before: tuple[str, int | None, int | None, int | None, int | None]) -> None:
        self._before = before

    def __enter__(self) -> EngineScope:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global forced
        forced, isa, kernel, split, launch = self._before
        if isa is not None:
            _set_isa(isa)
        if kernel is not None:
            _set_kernel(kernel)
        if split is not None:
            _set_split(split)
        if launch is not None:
            _set_launch(launch)


def use_engine(
    name: str,
    *,
    isa: str | None = None,
    kernel: str | None = None,
    split: str | None = None,
    launch: str | None = None,
) -> EngineScope:
    """Force an engine, for the whole process, from now on or within ``with``.

    Args:
        name: ``"auto"`` (the default: the engine of the tensors' device, reference.py under
            functorch transforms and forward-mode AD; every choice automatic again), ``"cpu"`` or
            ``"cuda"`` (that one or an error), or ``"reference"`` (plain torch operators: any dtype
            and device, slow)
        isa: instruction set of the CPU engine: ``"portable"``, ``"avx2"``, ``"avx512"``,
            ``"avx512_bf16"`` (with AVX512_VNNI), ``"amx"`` or ``"neon"``; ``None`` leaves it as
            it is. The last two of AVX-512 differ from it for bfloat16 and int8 only
        kernel: ``"packed"`` or ``"direct"``; ``None`` leaves it as it is
        split: how threads divide a layer, ``"serial"``, ``"batch"`` or ``"units"``, with as many
            threads as that can use, and no two passes at once; ``"directions"`` or ``"layers"``:
            a layer's two directions, or its several layers of one direction, side by side, and
            all else as it would be;
            ``None`` leaves it as it is
        launch: of the CUDA engine, how the kernel of a step follows its product: ``"plain"``,
            ``"pdl"`` (programmatic dependent launch, from compute capability 9.0 on; below it is
            plain all the same) or ``"auto"``; ``None`` leaves it as it is

    Returns:
        An :class:`EngineScope`. Nothing has to be done with it; as a context manager it puts
        back what was in force before.

    Raises:
        RuntimeError: if there is no such engine, or it can't run here

    Example::

        >>> with rnnfast.use_engine("cpu", isa="portable"):
        ...     y, _ = layer(x)
        >>> rnnfast.use_engine("reference")     # until further notice
        >>> rnnfast.use_engine("auto")
    """
    global forced
    if name not in _NAMES:
        raise RuntimeError(f"rnnfast: use_engine needs one of {', '.join(_NAMES)}, got {name!r}")
    cpu_options = not (isa is None and kernel is None and split is None)
    if name == "reference" and (cpu_options or launch is not None):
        raise RuntimeError(
            "rnnfast: the reference engine has no isa, kernel, split or launch to choose"
        )
    if name == "cuda" and cpu_options:
        raise RuntimeError("rnnfast: isa, kernel and split are the CPU engine's, not cuda's")
    if name == "cpu" and launch is not None:
        raise RuntimeError("rnnfast: launch is the CUDA engine's, not cpu's")
    if launch not in (None, "auto", *_cuda.LAUNCHES):
        raise RuntimeError(
            f"rnnfast: launch must be auto, {' or '.join(_cuda.LAUNCHES)}, got {launch!r}"
        )
    missing = _cuda.why_not() if name == "cuda" or launch is not None else ""
    if missing:
        raise RuntimeError(f"rnnfast: the CUDA engine can't run here: {missing}")
    if isa is not None and isa not in ISAS:
        raise RuntimeError(f"rnnfast: isa must be one of {', '.join(ISAS)}, got {isa!r}")
    if kernel is not None and kernel not in KERNELS:
        raise RuntimeError(f"rnnfast: kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    if split is not None and split not in SPLITS:
        raise RuntimeError(f"rnnfast: split must be one of {', '.join(SPLITS)}, got {split!r}")
    if isa is not None and isa not in available_isas():
        raise RuntimeError(
            f"rnnfast: isa {isa!r} can't run here, this machine and build have "
            f"{', '.join(available_isas())}"
        )
    isa_before = kernel_before = split_before = launch_before = None
    if isa is not None:
        isa_before = _set_isa(ISAS.index(isa))
    elif name == "auto":
        isa_before = _set_isa(_initial_isa)
    if kernel is not None:
        kernel_before = _set_kernel(KERNELS.index(kernel))
    elif name == "auto":
        kernel_before = _set_kernel(-1)
    if split is not None:
        split_before = _set_split(SPLITS.index(split))
    elif name == "auto":
        split_before = _set_split(-1)
    if launch is not None:
        launch_before = _set_launch(-1 if launch == "auto" else _cuda.LAUNCHES.index(launch))
    elif name == "auto" and _cuda.loaded():
        launch_before = _set_launch(-1)
    before, forced = forced, name
    return EngineScope((before, isa_before, kernel_before, split_before, launch_before))


def _isa_from_environment() -> int:
    name = os.environ.get("RNNFAST_CPU", "")
    if not name:
        return -1
    if name not in available_isas():
        raise RuntimeError(
            f"rnnfast: RNNFAST_CPU={name} can't be used, this machine and build have "
            f"{', '.join(available_isas())}"
        )
    return ISAS.index(name)


_initial_isa = _isa_from_environment()
if _initial_isa >= 0:
    _set_isa(_initial_isa)


def active_isa() -> str:
    """Name of the instruction set that the next call of the CPU engine uses."""
    return ISAS[int(_native.choose(0, 0, 1, 1, 1, 1, 1, 4, 1))]


def isa_is_forced() -> bool:
    """Whether use_engine or RNNFAST_CPU chose the instruction set."""
    return _isa_wish >= 0


def kernel_is_forced() -> bool:
    """Whether use_engine chose the kernel."""
    return _kernel_wish >= 0


def split_is_forced() -> bool:
    """Whether use_engine chose the split."""
    return _split_wish >= 0


def wished_launch() -> int:
    """The index of the launch that use_engine chose, or -1."""
    return _launch_wish


def launch_is_forced() -> bool:
    """Whether use_engine chose how the CUDA engine launches."""
    return _launch_wish >= 0


def choose_group(
    cell: int,
    sizes: tuple[int, int, int, int, int],
    itemsize: int,
    threads: int,
    packed: bool,
    count: int,
    chained: bool,
) -> tuple[int, int, float, float]:
    """How many of ``count`` forward passes of sizes (T, B, I, H, P) run at the same time, on how
    many threads each, and the model's microseconds one by one and side by side (0: can't be): the
    directions of a layer, or (``chained``) layers."""
    teams, each, alone, at_once = (
        float(
            _native.choose_group(
                field, count, chained, False, cell, *sizes, itemsize, threads, packed
            )
        )
        for field in range(4)
    )
    return int(teams), int(each), alone, at_once


def estimates(
    cell: int,
    sizes: tuple[int, int, int, int, int],
    itemsize: int,
    threads: int,
    packed: bool = False,
) -> dict[str, float]:
    """Microseconds that the cost model gives each split of a forward pass of sizes (T, B, I, H, P),
    with as many threads as it can use; without those that can't be used at all. ``packed``: the
    weights are, before the call."""
    found = {
        name: float(_native.estimate(i, cell, *sizes, itemsize, threads, packed))
        for i, name in enumerate(PASS_SPLITS)
    }
    return {name: time for name, time in found.items() if time > 0}


def ran_isa(isa: str, dot: bool) -> str:
    """The instruction set whose kernels run when ``isa`` is in force: AVX512_BF16 and AMX have
    products of their own for packed bfloat16 and int8 weights (``dot``), the rest is AVX-512's."""
    return "avx512" if isa in ("avx512_bf16", "amx") and not dot else isa


def choose(
    cell: int,
    sizes: tuple[int, int, int, int, int],
    itemsize: int,
    threads: int,
    packed: bool = False,
) -> tuple[str, int, str, str, str]:
    """What the CPU engine would do for sizes (T, B, I, H, P): isa, threads, kernel_ih, kernel_hh,
    split."""
    isa, threads, ih, hh, split = (
        int(_native.choose(field, cell, *sizes, itemsize, threads, packed)) for field in range(5)
    )
    return ISAS[isa], threads, _KERNEL_RAN[ih], _KERNEL_RAN[hh], SPLITS[split]


def note_reference() -> None:
    """Remember that reference.py ran last on this thread."""
    _local.reference_at = _counts()


def _counts() -> tuple[int, int]:
    """Runs of this thread on the CPU and on CUDA devices."""
    return int(_native.last_run(5)), _cuda.last_run(0) if _cuda.loaded() else 0


def last_run() -> dict[str, str | int | None]:
    """What ran in the last forward or backward pass of this thread.

    Returns:
        ``engine`` ("cpu", "cuda", "reference", or None before the first run); of the CUDA engine
        ``device`` (as "sm_90"), ``launch`` ("plain" or "pdl") and ``streams``; of the CPU engine
        ``isa`` (that of the kernels: ``"avx512"`` where ``"amx"`` or ``"avx512_bf16"`` have none
        of their own), ``threads`` (number of threads; 1 where the pool had no others, or had kept
        this thread waiting just before), ``split`` ("serial", "batch", "units", "directions" or
        "layers"), ``kernel_ih`` and ``kernel_hh`` ("packed", "direct", or "diagonal" for no
        product); None where it does not apply

    Example::

        >>> y, _ = layer(x)
        >>> rnnfast.last_run()["engine"]
        'cpu'
    """
    counts = _counts()
    keys = (
        *("engine", "isa", "threads", "split", "kernel_ih", "kernel_hh"),
        *("device", "launch", "streams"),
    )
    ran: dict[str, str | int | None] = dict.fromkeys(keys)
    if getattr(_local, "reference_at", None) == counts:
        ran["engine"] = "reference"
    elif counts[1] and _cuda.last_run(1) > int(_native.last_run(6)):
        ran.update(
            engine="cuda",
            device=f"sm_{_cuda.last_run(4)}",
            launch=_cuda.LAUNCHES[_cuda.last_run(2)],
            streams=_cuda.last_run(3),
        )
    elif counts[0]:
        isa, threads, ih, hh, split = (int(_native.last_run(field)) for field in range(5))
        ran.update(
            engine="cpu",
            isa=ISAS[isa],
            threads=threads,
            split=SPLITS[split],
            kernel_ih=_KERNEL_RAN[ih],
            kernel_hh=_KERNEL_RAN[hh],
        )
    return ran
