"""Which engine runs: forcing one, listing them, and asking what ran."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
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
# read by _route.use_reference at every call; changed by use_engine only
forced = "auto"
# counts changes of ISA: a frozen layer's packed weights belong to one
isa_changes = 0
_isa_wish = -1
_kernel_wish = -1
_split_wish = -1
_launch_wish = -1
_cuda_kernel_wish = -1

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


def _set_cuda_kernel(kernel: int) -> int:
    global _cuda_kernel_wish
    _cuda_kernel_wish = kernel
    return _cuda.set_kernel(kernel)


class EngineScope:
    """What :func:`use_engine` returns: the choice is in force; leaving ``with`` undoes it."""

    def __init__(self, forced: str, wishes: list[tuple[Callable[[int], int], int]]) -> None:
        self._forced = forced
        self._wishes = wishes

    def __enter__(self) -> EngineScope:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global forced
        forced = self._forced
        for set_wish, before in self._wishes:
            set_wish(before)


def _is_among(name: object, names: Iterable[str | None]) -> bool:
    return isinstance(name, str) and name in names  # not an array, which compares by element


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
        kernel: of the CPU engine, ``"packed"`` or ``"direct"``; of the CUDA engine, ``"step"`` (a
            product and a kernel a step) or ``"onchip"`` (w_hh stays on the chip for all steps; an
            error where the layer, its dtype or the device is not for it, in backward too if
            gradients are wanted); ``"auto"`` for the library's choice of that engine; ``None``
            leaves it as it is. One call wishes for the kernel of one engine
        split: how threads divide a layer, ``"serial"``, ``"batch"`` or ``"units"``, with as many
            threads as that can use, and no two passes at once; ``"directions"`` or ``"layers"``:
            a layer's two directions, or its several layers of one direction, side by side, and
            all else as it would be;
            ``None`` leaves it as it is
        launch: of the CUDA engine, how the kernel of a step follows its product: ``"plain"``,
            ``"pdl"`` (programmatic dependent launch, from compute capability 9.0 on; below it is
            plain all the same, as on chip) or ``"auto"``; ``None`` leaves it as it is

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
    if not _is_among(name, _NAMES):
        raise RuntimeError(f"rnnfast: use_engine needs one of {', '.join(_NAMES)}, got {name!r}")
    kernels = ("auto", *KERNELS, *_cuda.KERNELS)
    if kernel is not None and not _is_among(kernel, kernels):
        raise RuntimeError(f"rnnfast: kernel must be one of {', '.join(kernels)}, got {kernel!r}")
    on_cuda = _is_among(kernel, _cuda.KERNELS) or (kernel == "auto" and name == "cuda")
    cpu_options = not (isa is None and (kernel is None or on_cuda) and split is None)
    cuda_options = launch is not None or on_cuda
    if name == "reference" and (cpu_options or cuda_options):
        raise RuntimeError(
            "rnnfast: the reference engine has no isa, kernel, split or launch to choose"
        )
    if name == "cuda" and cpu_options:
        raise RuntimeError(
            "rnnfast: isa, split and the kernels packed and direct are the CPU engine's, not cuda's"
        )
    if name == "cpu" and cuda_options:
        raise RuntimeError(
            "rnnfast: launch and the kernels step and onchip are the CUDA engine's, not cpu's"
        )
    if launch is not None and not _is_among(launch, ("auto", *_cuda.LAUNCHES)):
        raise RuntimeError(
            f"rnnfast: launch must be auto, {' or '.join(_cuda.LAUNCHES)}, got {launch!r}"
        )
    missing = _cuda.why_not() if name == "cuda" or cuda_options else ""
    if missing:
        raise RuntimeError(f"rnnfast: the CUDA engine can't run here: {missing}")
    if isa is not None and not _is_among(isa, ISAS):
        raise RuntimeError(f"rnnfast: isa must be one of {', '.join(ISAS)}, got {isa!r}")
    if split is not None and not _is_among(split, SPLITS):
        raise RuntimeError(f"rnnfast: split must be one of {', '.join(SPLITS)}, got {split!r}")
    if isa is not None and isa not in available_isas():
        raise RuntimeError(
            f"rnnfast: isa {isa!r} can't run here, this machine and build have "
            f"{', '.join(available_isas())}"
        )
    # Each wish with its names, what sets it, and what "auto" sets.
    options: list[tuple[str | None, tuple[str, ...], Callable[[int], int], int]] = [
        (isa, ISAS, _set_isa, _initial_isa),
        (None if on_cuda else kernel, KERNELS, _set_kernel, -1),
        (split, SPLITS, _set_split, -1),
    ]
    if _cuda.loaded():
        options += [
            (launch, _cuda.LAUNCHES, _set_launch, -1),
            (kernel if on_cuda else None, _cuda.KERNELS, _set_cuda_kernel, -1),
        ]
    wishes = []
    for wish, choices, set_wish, none in options:
        if wish == "auto" or (wish is None and name == "auto"):
            wishes.append((set_wish, set_wish(none)))
        elif wish is not None:
            wishes.append((set_wish, set_wish(choices.index(wish))))
    before, forced = forced, name
    return EngineScope(before, wishes)


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


def wished_cuda_kernel() -> int:
    """The index of the CUDA engine's kernel that use_engine chose, or -1."""
    return _cuda_kernel_wish


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
        ``device`` (as "sm_90"), ``kernel`` ("step" or "onchip"), ``launch`` ("plain" or "pdl")
        and ``streams``; of the CPU engine
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
        *("device", "kernel", "launch", "streams"),
    )
    ran: dict[str, str | int | None] = dict.fromkeys(keys)
    if getattr(_local, "reference_at", None) == counts:
        ran["engine"] = "reference"
    elif counts[1] and _cuda.last_run(1) > int(_native.last_run(6)):
        ran.update(
            engine="cuda",
            device=f"sm_{_cuda.last_run(4)}",
            kernel=_cuda.KERNELS[_cuda.last_run(6)],
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
