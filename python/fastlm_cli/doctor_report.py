"""How a doctor's report looks on a terminal, and the report of an installation that does not even import."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def failed_import_report(error: ImportError) -> dict[str, Any]:
    """What can be said without fastlm: the reason and the versions around it."""
    return {
        "ok": False,
        "problem": f"import fastlm failed: {' '.join(str(error).split())}",
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("fastlm", "torch")},
        },
        "executable": sys.executable,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def print_report(report: dict[str, Any]) -> None:
    """Facts, then one row per operator, then the verdict."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    facts = Table.grid(padding=(0, 2))
    versions = ", ".join(f"{name} {value or 'missing'}" for name, value in report["versions"].items())
    facts.add_row("versions", escape(versions))
    for name, text in report.get("facts", {}).items():
        facts.add_row(name, escape(text))
    console.print(facts)
    if operators := report.get("operators"):
        table = _table("operator", "CPU", "CUDA", "fake", "grad", *_NUMBERS, "")
        for row in operators:
            table.add_row(
                row["name"],
                *(_yes(row[key]) for key in ("cpu", "cuda", "fake", "autograd")),
                *_measured(row, ""),
                "[green]ok[/]" if row["ok"] else "[red]failed[/]",
            )
        console.print(table)
        if any(row["cuda_forward_error"] is not None for row in operators):
            table = _table("on the CUDA device", *_NUMBERS)
            for row in operators:
                table.add_row(row["name"], *_measured(row, "cuda_"))
            console.print(table)
        for row in operators:
            if not row["ok"]:
                console.print(f"{row['name']}: {row['problem']}", style="red", markup=False)
    if report["ok"]:
        console.print("[green]Everything that is built works.[/]")
    else:
        console.print(report["problem"], style="red", markup=False)


_NUMBERS = ("err fwd", "err bwd", "GB/s")


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", no_wrap=True)
    return table


def _measured(row: dict[str, Any], before: str) -> tuple[str, str, str]:
    return (
        _number(row[f"{before}forward_error"], ".1e"),
        _number(row[f"{before}backward_error"], ".1e"),
        _number(row[f"{before}gb_per_second"], ".2f"),
    )


def _yes(value: bool | None) -> str:
    return "–" if value is None else ("yes" if value else "no")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
