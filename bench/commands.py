"""The commands `run`, `list`, `show`, `compare` and `plot`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMANDS = ("run", "list", "show", "compare", "plot")
_DTYPE_WORDS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
BAD_INPUT, FAILED = 2, 1


def run_command(argv: list[str] | None) -> int:
    """Parses the words and runs one command; errors become one line and an exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words.insert(0, "run")
    try:
        arguments = _parser().parse_args(words)
    except SystemExit as error:  # argparse has printed usage or help
        return error.code if isinstance(error.code, int) else BAD_INPUT
    handlers = {"run": _run, "list": _list, "show": _show, "compare": _compare, "plot": _plot}
    try:
        return handlers[arguments.command](arguments)
    except (ValueError, OSError) as error:
        print(f"bench: {str(error).removeprefix('bench: ')}", file=sys.stderr)
        return BAD_INPUT
    except ImportError as error:
        print(f"bench: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("bench: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, epilog="Without a command: run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")

    run = commands.add_parser("run", help="measure")
    _add_filters(run)
    run.add_argument(
        "--quick", action="store_true", help="small cases, few rounds: under a minute on two cores"
    )
    run.add_argument("--rounds", type=_positive, metavar="N", help="samples of each contender at most")
    run.add_argument("--threads", type=_positive, metavar="N", help="default: all CPUs this process may use")
    run.add_argument("--compile", action="store_true", help="include torch.compile peers (minutes)")
    run.add_argument(
        "--patience",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="skip peers whose call would take longer",
    )
    run.add_argument(
        "--no-ceilings", action="store_true", help="skip the machine's ceilings (and targets scaled by them)"
    )
    run.add_argument("--no-memory", action="store_true", help="skip the peak memory column")
    run.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="of the printed tables; the file has both"
    )
    run.add_argument("--json", type=Path, metavar="FILE", help="keep everything, every raw sample included")

    listing = commands.add_parser("list", help="show the cases")
    _add_filters(listing)
    listing.add_argument("--quick", action="store_true", help="only those of --quick")

    show = commands.add_parser("show", help="tables of a file")
    show.add_argument("file", type=Path)
    show.add_argument("--clock", choices=("wall", "cpu"), default="wall")

    compare = commands.add_parser("compare", help="two files side by side")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    compare.add_argument(
        "--fail-above",
        type=float,
        metavar="RATIO",
        help="exit with 1 if a fastlm row got clearly slower than this",
    )

    plot = commands.add_parser("plot", help="picture of a file (needs fastlm[bench])")
    plot.add_argument("file", type=Path)
    plot.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    plot.add_argument("-o", "--output", type=Path, help="default: FILE with .png")
    return parser


def _add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", action="append", default=[], metavar="NAME", help="operator family; may be repeated"
    )
    parser.add_argument(
        "--case", action="append", default=[], metavar="NAME", help="case, or a part of its name"
    )
    parser.add_argument(
        "--dtype", action="append", default=[], metavar="DTYPE", help="fp32, bf16, ... or torch's words"
    )
    parser.add_argument("--device", choices=("cpu",), default="cpu")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _selected(arguments: argparse.Namespace) -> list[Any]:
    from .cases import all_cases

    cases = all_cases()
    dtypes = [_DTYPE_WORDS.get(word, word) for word in arguments.dtype]
    for what, wanted, known in (
        ("--op", arguments.op, sorted({case.op for case in cases})),
        ("--dtype", dtypes, sorted({case.dtype for case in cases})),
    ):
        for word in wanted:
            if word not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}, got {word!r}")
    chosen = [
        case
        for case in cases
        if (not arguments.op or case.op in arguments.op)
        and (not dtypes or case.dtype in dtypes)
        and (not arguments.case or any(word in case.name for word in arguments.case))
        and (not arguments.quick or case.quick)
    ]
    if not chosen:
        names = sorted({case.name for case in cases if not arguments.op or case.op in arguments.op})
        raise ValueError(f"no case fits; there are {', '.join(names)}")
    return chosen


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from . import ceilings, machine, record, timing
    from .figures import rates_at
    from .report import make_console, show
    from .runner import Settings, run_case

    cases = _selected(arguments)
    plan = timing.QUICK if arguments.quick else timing.FULL
    if arguments.rounds:
        least = min(plan.least_rounds, arguments.rounds)
        plan = dataclasses.replace(plan, rounds=arguments.rounds, least_rounds=least)
    threads = arguments.threads or machine.usable_cpus()
    before = torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    cpus = machine.pin(threads)
    pinned = "" if cpus is None else f" on CPUs {', '.join(map(str, cpus))}"
    _say(f"{len(cases)} case(s), {threads} thread(s){pinned}")
    try:
        data: record.Record = {
            "schema": record.SCHEMA,
            "created": time.time(),
            "git": machine.git_commit(),
            "machine": machine.machine_facts(),
            "software": machine.software_facts(),
            "settings": {"threads": threads, "cpus": cpus, "quick": arguments.quick, "rounds": plan.rounds},
            "load": [machine.load_average(), None],
            "ceilings": None,
            "reference": record.reference(),
            "results": [],
        }
        if not arguments.no_ceilings:
            _say("measuring the machine's ceilings")
            data["ceilings"] = ceilings.measure(threads)
        settings = Settings(
            plan,
            threads,
            compile=arguments.compile,
            memory=not arguments.no_memory,
            patience=arguments.patience,
            rates=rates_at(data["ceilings"], threads),
        )
        for case in cases:
            data["results"].extend(run_case(case, settings, _say))
            if arguments.json:  # what is measured stays if a later case is stopped
                record.save(data, arguments.json)
        data["load"][1] = machine.load_average()
    finally:
        torch.set_num_threads(before[0])
        if before[1] is not None:
            os.sched_setaffinity(0, before[1])
    if arguments.json:
        record.save(data, arguments.json)
    show(data, make_console(), arguments.clock)
    return _verdict(data["results"])


def _verdict(results: Sequence[Any]) -> int:
    """1 if a form of fastlm was wrong or failed."""
    bad = [
        f"{result['op']} {result['case']} {result['dtype']}: {row['name']} {row['status']}: {row['reason']}"
        for result in results
        for row in result["contenders"]
        if row["ours"] and row["status"] in ("wrong", "failed")
    ]
    for line in bad:
        _say(line)
    return FAILED if bad else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _list(arguments: argparse.Namespace) -> int:
    from rich.table import Table

    from .report import make_console

    table = Table()
    for name in ("op", "case", "dtype", "parts", "shape", "quick", "contenders"):
        table.add_column(name)
    for case in _selected(arguments):
        shape = " ".join(f"{letter}={value}" for letter, value in case.shape.items())
        names = ", ".join(contender.name for contender in case.contenders)
        table.add_row(
            case.op, case.name, case.dtype, ", ".join(case.parts), shape, "yes" if case.quick else "", names
        )
    make_console().print(table)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from . import record
    from .report import make_console, show

    show(record.load(arguments.file), make_console(), arguments.clock)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from . import record
    from .compare import show_changes
    from .report import make_console

    found = show_changes(
        record.load(arguments.before), record.load(arguments.after), make_console(), arguments.clock
    )
    if not found:
        raise ValueError("the two files have no timed row in common")
    limit = arguments.fail_above
    slower = [
        change
        for change in found
        if limit is not None and change.ours and change.clear and change.ratio > limit
    ]
    return FAILED if slower else 0


def _plot(arguments: argparse.Namespace) -> int:
    from . import record
    from .plot import plot

    path = plot(
        record.load(arguments.file), arguments.output or arguments.file.with_suffix(".png"), arguments.clock
    )
    print(path)
    return 0
