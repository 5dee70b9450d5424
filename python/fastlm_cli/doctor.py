"""`fastlm doctor`: what is built, what runs, why not."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, to paste into an issue.")
    ] = False,
) -> None:
    """Check the installation: versions, CPU level, CUDA, and a self-test of every operator.

    Ends with code 1 if something does not work.
    """
    from fastlm_cli.doctor_report import failed_import_report, print_report

    try:
        from fastlm.doctor import examine
    except ImportError as error:
        report = failed_import_report(error)
    else:
        report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    if not report["ok"]:
        raise typer.Exit(1)
