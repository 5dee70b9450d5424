"""`fastlm bench`: hands everything to the benchmark package, which has its own flags."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import typer

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench(context: typer.Context) -> None:
    """Measure the operators beside plain PyTorch on this machine; --quick, --op NAME, --json FILE."""
    code = _package().main(list(context.args))
    if code:
        raise typer.Exit(int(code))


def _package() -> ModuleType:
    """The installed benchmarks, or the `bench` folder of a checkout that is installed in place."""
    try:
        return importlib.import_module("fastlm_bench")
    except ModuleNotFoundError as error:
        if error.name != "fastlm_bench":
            raise
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "bench" / "__init__.py").is_file():
        raise ImportError(
            f"bench: expected the package fastlm_bench or a folder {checkout / 'bench'}, found neither"
        )
    sys.path.insert(0, str(checkout))
    return importlib.import_module("bench")
