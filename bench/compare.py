"""Compares two records: the same case, part, dtype, threads and contender in both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .figures import Spread, duration, key_of, spread


@dataclass(frozen=True)
class Change:
    """One contender in two records.

    Attributes:
        key: op, case, dtype, part.
        name: contender.
        ours: a form of fastlm.
        before, after: seconds.
    """

    key: tuple[str, str, str, str]
    name: str
    ours: bool
    before: Spread
    after: Spread

    @property
    def ratio(self) -> float:
        """Above 1: slower than before."""
        return self.after.median / self.before.median

    @property
    def clear(self) -> bool:
        """The ranges from 20 to 80 per cent do not touch."""
        return self.after.p20 > self.before.p80 or self.after.p80 < self.before.p20


def changes(before: Mapping[str, Any], after: Mapping[str, Any], clock: str = "wall") -> list[Change]:
    """Everything that was timed in both, in the order of `after`."""
    old = {(key_of(result), result["threads"]): result for result in before["results"]}
    found = []
    for result in after["results"]:
        twin = old.get((key_of(result), result["threads"]))
        rows = {} if twin is None else {row["name"]: row for row in twin["contenders"]}
        for row in result["contenders"]:
            new, past = spread(row, clock), spread(rows[row["name"]], clock) if row["name"] in rows else None
            if new is not None and past is not None:
                found.append(Change(key_of(result), row["name"], row["ours"], past, new))
    return found


def show_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], console: Console, clock: str = "wall"
) -> list[Change]:
    """Prints one table and returns its rows."""
    for name in ("cpu", "cpus"):
        there, here = before["machine"][name], after["machine"][name]
        if there != here:
            console.print(f"[yellow]different machines: {name} {there} and {here}[/yellow]")
    table = Table(title="after / before: below 1 is faster", title_justify="left")
    for name in ("case", "part", "contender"):
        table.add_column(name)
    for name in ("before", "after", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("")
    found = changes(before, after, clock)
    for change in found:
        op, case, dtype, part = change.key
        verdict = (
            "within the spread" if not change.clear else "faster" if change.ratio < 1 else "[red]slower[/red]"
        )
        times = (duration(change.before.median), duration(change.after.median))
        table.add_row(
            f"{op} {case} {dtype}", part, escape(change.name), *times, f"{change.ratio:.3f}", verdict
        )
    console.print(table)
    return found
