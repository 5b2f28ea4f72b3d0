"""The command line: ``python -m bench compare | plot | table | list | model | extras``."""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from . import shapes

GPU_ENGINES = ("auto", "all", "step", "onchip")  # of --engine; the last two need a GPU


def cores() -> list[int]:
    """One CPU of every physical core that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    chosen: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            key = siblings.read_text()
        except OSError:
            key = str(cpu)
        chosen.setdefault(key, cpu)
    return list(chosen.values())


def pin(threads: int) -> None:
    """Leaves the process `threads` CPUs.

    Before any peer is imported, since some size their pools by it.
    """
    free = cores()
    if threads > len(free):
        raise ValueError(
            f"bench: --threads must be at most {len(free)} (cores here), got {threads}"
        )
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, free[:threads])
    os.environ["OMP_NUM_THREADS"] = os.environ["NPROC"] = str(threads)  # NPROC: XLA's pool
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def new_file(device: str, sets: list[str], commit: str) -> Path:
    """Where results go by default."""
    label = "-".join(sets) or "chosen"
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return Path("bench/out") / f"{device}-{label}-{today}-{commit.rstrip('+')}.json"


def typed(options: argparse.Namespace) -> str:
    """The command as typed, without the places of the interpreter and of the files."""
    words = sys.argv[1:]
    for name in ("out", "resume"):
        place = str(getattr(options, name))
        hidden = (f"--{name}", f"--{name}={place}", place)
        words = [word for word in words if word not in hidden]
    return f"python -m bench {shlex.join(words)}"


def compare_on_gpu(options: argparse.Namespace) -> int:
    if options.engine not in GPU_ENGINES or options.threads:
        word = "--threads" if options.threads else f"--engine {options.engine}"
        raise ValueError(f"bench: {word} needs --device cpu, got --device cuda")
    from . import gpu_compare, gpu_report, gpu_shapes
    from .compare import commit

    words = options.shapes or ["full"]
    wish = gpu_compare.Wish(
        shapes=tuple(words),
        budget=options.budget,
        rounds=options.rounds,
        peers=options.peers and tuple(n for word in options.peers for n in word.split(",")),
        engine=options.engine,
        ours=options.ours,
        commit=options.commit or commit(),
        resume=options.resume,
        command=typed(options),
    )
    sets = [word for word in words if word in gpu_shapes.SETS]
    out = options.out or new_file("cuda", sets, wish.commit)
    results, faults = gpu_compare.compare(wish, out)
    written = [out, out.with_suffix(".log"), *gpu_report.finish(out)]
    print(gpu_report.summary(results))
    print("\nwritten: " + ", ".join(map(str, written)))
    for fault in faults:
        print(f"WRONG: {fault}", file=sys.stderr)
    return 1 if faults else 0


def command_compare(options: argparse.Namespace) -> int:
    if options.device == "cuda":
        return compare_on_gpu(options)
    only = [name for name in ("budget", "commit", "resume") if getattr(options, name) is not None]
    only += [f"engine {options.engine}"] * (options.engine in GPU_ENGINES[2:])
    if only:
        raise ValueError(f"bench: --{only[0]} needs --device cuda, got --device cpu")
    options.shapes = options.shapes or ["readme"]
    chosen = shapes.select(options.shapes)
    threads = options.threads or len(cores())
    pin(threads)
    from . import compare, table  # after the pinning

    names = options.peers and [name for word in options.peers for name in word.split(",")]
    sets = [word for word in options.shapes if word in shapes.SETS]
    plan = compare.PLANS[sets[0] if len(sets) == 1 else "full"]
    comparison = compare.Comparison(
        threads, plan, names, options.engine, options.ours, options.rounds
    )
    out = options.out or new_file("cpu", sets, comparison.commit)
    results = compare.compare(comparison, chosen, out, typed(options))
    print(table.report(results))
    print(f"\nwritten: {out}")
    for fault in comparison.wrong:
        print(f"WRONG: {fault}", file=sys.stderr)
    return 1 if comparison.wrong else 0


def command_plot(options: argparse.Namespace) -> int:
    from . import gpu_plot, plot, table

    for path in options.files:
        draw = gpu_plot.draw if on_gpu(table.load(path)) else plot.draw
        for picture in draw(path, options.folder or path.parent):
            print(picture)
    return 0


def command_table(options: argparse.Namespace) -> int:
    from . import gpu_report, table

    for path in options.files:
        results = table.load(path)
        report = gpu_report.report if on_gpu(results) else table.report
        print(report(results, options.markdown), end="\n\n" if path != options.files[-1] else "\n")
    return 0


def on_gpu(results: dict[str, Any]) -> bool:
    return bool(results["header"]["device"] == "cuda")


def command_list(options: argparse.Namespace) -> int:
    from . import gpu_shapes

    cuda = options.device == "cuda"
    for shape in gpu_shapes.GRID if cuda else shapes.every():
        grid = gpu_shapes.SETS if cuda else shapes.SETS
        sets = " ".join(name for name, members in grid.items() if shape in members)
        rank = f"{gpu_shapes.RANKS[shape]:4} " if cuda else ""
        print(f"{rank}{shape.name:48} {shape.flops() / 1e9:8.3f} GFLOP  {sets}")
    return 0


def command_model(options: argparse.Namespace) -> int:
    from . import model

    low = [count for count in options.threads if count < 1]
    if low:
        raise ValueError(f"bench: --threads must be at least 1 each, got {low[0]}")
    machine = model.Machine()
    if options.measure:
        machine = model.measured_line(machine)
    if options.write:
        model.write(options.write, model.tables(options.threads, machine, markdown=True))
        print(f"written: {options.write}")
    else:
        print(model.tables(options.threads, machine, options.markdown))
    return 0


def command_extras(options: argparse.Namespace) -> int:
    from . import extras

    text = extras.show(extras.measure(options.rounds), options.markdown)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
        print(f"written: {options.out}")
    return 0


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = main.add_subparsers(required=True, metavar="command")

    run = commands.add_parser("compare", help="measure ours and the peers side by side")
    run.set_defaults(run=command_compare)
    run.add_argument(
        "--shapes",
        nargs="+",
        metavar="NAME",
        help="sets (smoke, readme, full; on a GPU smoke, spread, onchip, goals, sweeps, cpu, "
        "full), names, or patterns such as 'gru-*-H512'; default: readme, on a GPU full",
    )
    run.add_argument(
        "--device",
        default="cpu",
        choices=["cpu", "cuda"],
        help="cuda: against cuDNN, points by value; a dry run where there is no GPU",
    )
    run.add_argument("--budget", type=float, metavar="SECONDS", help="GPU: of measuring; then stop")
    run.add_argument("--resume", type=Path, metavar="FILE", help="GPU: keep the rows of this file")
    run.add_argument("--commit", help="GPU: of a copy of the checkout without its history")
    run.add_argument("--threads", type=int, help="of everybody; default: the cores here")
    run.add_argument("--out", type=Path, help="JSON; default: a new file under bench/out/")
    run.add_argument("--rounds", type=int, help="timed rounds a shape; default: by time")
    run.add_argument("--peers", nargs="+", metavar="NAME", help="default: all")
    run.add_argument(
        "--engine",
        default="auto",
        choices=[
            *("auto", "all", "packed", "direct", "reference"),
            *("serial", "batch", "units", "directions", "layers"),
            *("amx", "avx512_bf16", "avx512", "avx2", "neon", "portable"),
            *GPU_ENGINES[2:],
        ],
        help="force an engine of ours; all: each kernel and split beside the choice of the library "
        "(on a GPU: each kernel, or step or onchip)",
    )
    run.add_argument(
        "--ours",
        default="rnnfast",
        choices=["rnnfast", "torch.nn"],
        help="torch.nn stands in for us: shows the noise of the machine, ratios must be 1",
    )

    plot = commands.add_parser("plot", help="draw result files as PNG")
    plot.set_defaults(run=command_plot)
    plot.add_argument("files", nargs="+", type=Path)
    plot.add_argument("--folder", type=Path, help="default: beside the file")

    table = commands.add_parser("table", help="print result files again")
    table.set_defaults(run=command_table)
    table.add_argument("files", nargs="+", type=Path)
    table.add_argument("--markdown", action="store_true")

    model = commands.add_parser("model", help="what many cores would do, by counting; not measured")
    model.set_defaults(run=command_model)
    model.add_argument("--threads", nargs="+", type=int, default=[8, 32, 128], metavar="N")
    model.add_argument("--markdown", action="store_true")
    model.add_argument("--write", type=Path, help="put the tables between the marks of a document")
    model.add_argument(
        "--measure", action="store_true", help="take a barrier's cost from two cores"
    )

    extra = commands.add_parser(
        "extras", help="scaling, uneven lengths, memory, and what a call costs beside its kernel"
    )
    extra.set_defaults(run=command_extras)
    extra.add_argument("--rounds", type=int, default=9)
    extra.add_argument("--markdown", action="store_true")
    extra.add_argument("--out", type=Path, help="a file that gets the table, too")

    listing = commands.add_parser("list", help="name every shape and its sets")
    listing.set_defaults(run=command_list)
    listing.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return main


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
