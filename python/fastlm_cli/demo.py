"""`fastlm demo`: trains on real text, compares, generates, reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="New folder for the run and its report.html.")] = Path(
        "runs/demo"
    ),
    seconds: Annotated[float | None, typer.Option(help="Length of the training.", show_default="100")] = None,
    minutes: Annotated[float | None, typer.Option(help="The same in minutes.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder or file of text.", show_default="Python's own library source")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tenth of everything, about 20 seconds in all.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete an earlier demo in the same folder first.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all numbers as JSON instead of the panel.")
    ] = False,
) -> None:
    """Train a small Samba in minutes, beside gzip, xz and plain PyTorch, and write report.html."""
    if seconds is not None and minutes is not None:
        raise typer.BadParameter("expected one of --seconds and --minutes, got both", param_hint="--seconds")
    length = seconds if seconds is not None else (None if minutes is None else 60 * minutes)

    from fastlm.demo.run import run_demo, show
    from fastlm.training.memory import keep_freed_memory

    keep_freed_memory()
    result = run_demo(out, seconds=length, data=data, quick=quick, replace=replace)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        show(result, out)
