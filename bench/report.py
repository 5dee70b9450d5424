"""Tables for people, made from a record alone. Rows where fastlm is slower are shown like all others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .case import BOTH, DECODE, FORWARD, STEP
from .ceilings import DESCRIPTION
from .figures import (
    backward_of,
    duration,
    main_row,
    outcome,
    share_of_ceiling,
    si,
    size,
    span,
    spread,
)

SHORT = {FORWARD: "fwd", BOTH: "fwd+bwd", DECODE: "decode", STEP: "step"}
_WIDTH = 150  # columns where the output is no terminal


def make_console() -> Console:
    """A console that does not cut tables when the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def show(record: Mapping[str, Any], console: Console | None = None, clock: str = "wall") -> None:
    """Prints machine, ceilings, one table per case, and the targets.

    Args:
        record: as `record.py` describes.
        console: where to; default the standard output.
        clock: "wall", or "cpu" for the CPU time of all threads.
    """
    console = console or make_console()
    _show_machine(record, console, clock)
    if record["ceilings"]:
        console.print(_ceiling_table(record))
    backward = backward_of(record["results"], clock)
    for key, results in _by_case(record["results"]).items():
        console.print(_case_table(record, key, results, backward, clock))
        for line in _remarks(results):
            console.print(f"  {line}", highlight=False)
        console.print()
    targets = _target_table(record, clock)
    if targets.row_count:
        console.print(targets)


def _show_machine(record: Mapping[str, Any], console: Console, clock: str) -> None:
    machine, software, settings = record["machine"], record["software"], record["settings"]
    build = software["fastlm"]
    git = record["git"]
    commit = (
        "no checkout" if git is None else git["commit"][:12] + (" with changes" if git["changed"] else "")
    )
    cpus = settings["cpus"]
    pinned = "not pinned to CPUs" if cpus is None else "on CPUs " + ", ".join(map(str, cpus))
    load = " to ".join("?" if value is None else f"{value:.1f}" for value in record["load"])
    lines = [
        f"{machine['cpu']}, {machine['cpus']} CPUs ({' '.join(machine['flags'])})",
        f"fastlm {build['version']} ({commit}), CPU level {software['cpu_level']}, "
        f"{build['compiler']} {build['flags']}",
        f"torch {software['torch']} ({software['torch_cpu_capability']}), Python {software['python']}",
        f"{settings['threads']} thread(s) {pinned}; load average {load}; "
        + time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(record["created"])),
    ]
    for line in lines:
        console.print(escape(line), highlight=False)
    busy = record["load"][0]
    if busy is not None and busy > 0.5:
        console.print(
            f"[yellow]The machine was busy (load average {busy:.1f} before the run): the wall clock includes "
            "waiting for others, most of all with several threads. One thread on the CPU clock is steadier: "
            "--threads 1 --clock cpu.[/yellow]"
        )
    if clock == "cpu":
        console.print("Times are CPU time of all threads together.", highlight=False)


def _ceiling_table(record: Mapping[str, Any]) -> Table:
    ceilings, reference = record["ceilings"], record["reference"]
    counts = sorted(ceilings["rates"], key=int)
    table = Table(title=f"ceilings of this machine at level {ceilings['level']}", title_justify="left")
    table.add_column("what")
    for count in counts:
        table.add_column(f"{count} thread" + ("s" if count != "1" else ""), justify="right")
    table.add_column("targets' machine, 1 thread", justify="right")
    for name, text in DESCRIPTION.items():
        cells = [ceilings["rates"][count].get(name) for count in counts]
        there = reference["rates"]["1"].get(name)
        values = ["–" if value is None else si(value) + "/s" for value in [*cells, there]]
        table.add_row(text, *values)
    return table


def _by_case(results: list[Any]) -> dict[tuple[str, str, str], list[Any]]:
    grouped: dict[tuple[str, str, str], list[Any]] = {}
    for result in results:
        grouped.setdefault((result["op"], result["case"], result["dtype"]), []).append(result)
    return grouped


def _case_table(
    record: Mapping[str, Any],
    key: tuple[str, str, str],
    results: list[Any],
    backward: Mapping[tuple[str, str, str, str], Mapping[str, float]],
    clock: str,
) -> Table:
    shape = " ".join(f"{letter}={value}" for letter, value in results[0]["shape"].items())
    table = Table(title=f"{' '.join(key)}   {shape}", title_justify="left")
    memory = any("memory" in row for result in results for row in result["contenders"])
    unit = results[0]["work"]["unit"]
    for name in ("part", "contender"):
        table.add_column(name, no_wrap=True)
    columns = ["median", "20–80 %", f"{unit}/s", "of ceiling", "fastlm is"]
    for name in [*columns, "peak extra memory"] if memory else columns:
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        timed = [row for row in result["contenders"] if spread(row, clock) is not None]
        for index, row in enumerate(timed):
            part = SHORT.get(result["part"], result["part"]) if index == 0 else ""
            name = escape(row["name"]) + (" *" if row["orientation"] else "")
            table.add_row(part, name, *_row_cells(record, result, row, clock, memory))
        table.add_section()
    for (op, case, dtype, _), seconds in backward.items():
        if (op, case, dtype) == key and seconds:
            _add_backward(table, seconds, results, memory)
    return table


def _row_cells(record: Any, result: Any, row: Any, clock: str, memory: bool) -> list[str]:
    own, times = main_row(result), spread(row, clock)
    assert times is not None
    mine = None if own is None else spread(own, clock)
    share = share_of_ceiling(record, result, times.median)
    cells = [
        duration(times.median),
        span(times.p20, times.p80),
        si(result["work"]["amount"] / times.median).rstrip(),
        "–" if share is None else f"{100 * share:.0f} %",
        "" if row is own or mine is None else comparison(times.median / mine.median, bool(row["ours"])),
    ]
    if memory:
        found = row.get("memory") or {}
        peak = found.get("peak_extra_bytes")
        cells.append("" if peak is None else f"{size(peak)}, {size(found['result_bytes'])} of it results")
    return cells


def _add_backward(table: Table, seconds: Mapping[str, float], results: list[Any], memory: bool) -> None:
    own = main_row(results[0])
    mine = None if own is None else seconds.get(own["name"])
    for index, (name, value) in enumerate(seconds.items()):
        ratio = "" if mine is None or mine <= 0 or (own and name == own["name"]) else comparison(value / mine)
        cells = [duration(value), "", "", "", ratio, *([""] if memory else [])]
        table.add_row("bwd, derived" if index == 0 else "", escape(name), *cells)


def _remarks(results: list[Any]) -> list[str]:
    """A line for everything that a table does not show: contenders that were not timed, and why."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        for row in result["contenders"]:
            if row["status"] != "timed":
                key = (row["name"], row["status"], row["reason"])
                lines.setdefault(key, []).append(SHORT.get(result["part"], result["part"]))
    remarks = []
    for (name, status, reason), parts in lines.items():
        where = "" if len(parts) == len(results) else f" ({', '.join(parts)})"
        line = f"{escape(name)}{where}: {status}: {escape(reason)}"
        remarks.append(f"[red]{line}[/red]" if status in ("wrong", "failed") else line)
    if any(row["orientation"] for row in results[0]["contenders"]):
        remarks.append("* for orientation: computes something else")
    if results[0]["note"]:
        remarks.append(escape(results[0]["note"]))
    return remarks


def comparison(ratio: float, ours: bool = False) -> str:
    """A peer's time over fastlm's, in words; losses in red. For another form of fastlm just the ratio."""
    if ours:
        return f"(takes {ratio:.2f}x)"
    if ratio >= 1:
        return f"{ratio:.3g}x faster" if ratio < 100 else f"{ratio:.0f}x faster"
    return f"[red]{1 / ratio:.3g}x slower[/red]"


def _target_table(record: Mapping[str, Any], clock: str) -> Table:
    table = Table(title="targets", title_justify="left")
    for name in ("case", "part", "target", "on this machine", "measured", "met"):
        table.add_column(name)
    words = {True: "yes", False: "[red]no[/red]", None: "–"}
    for result in record["results"]:
        for target in result["targets"]:
            found = outcome(record, result, target, clock)
            case = f"{result['op']} {result['case']} {result['dtype']}"
            wanted = "the same" if found.wanted == found.text else found.wanted
            part = SHORT.get(result["part"], result["part"])
            table.add_row(case, part, found.text, wanted, found.found, words[found.met])
    return table
