"""The `fastlm` command: one module per subcommand, each importing what it needs when it runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from fastlm_cli import bench, demo, doctor, dynamics, generate, score, train
from fastlm_cli.errors import explain

app = typer.Typer(
    name="fastlm",
    help="Efficient language models on one CPU box or one GPU: train, generate, check and measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Any command takes --traceback, which shows where an error came from.",
)
app.command("train", epilog=train.EPILOG)(train.train)
app.command("score", epilog=score.EPILOG)(score.score)
app.command("generate")(generate.generate)
app.command("doctor")(doctor.doctor)
app.command("bench", context_settings=bench.PASS_THROUGH, add_help_option=False)(bench.bench)
app.command("demo")(demo.demo)
app.command("dynamics")(dynamics.dynamics)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"fastlm {version('fastlm')}")
        except PackageNotFoundError:
            print("fastlm (run from its sources, not installed)")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and end."),
    ] = False,
) -> None:
    pass


def run() -> None:
    """Entry point: an error ends the process with one sentence on standard error and a code that says whose
    it was.

    0 done · 1 the work failed · 2 the input cannot be used · 130 / 143 stopped by Ctrl-C / SIGTERM, state
    saved.
    """
    arguments = sys.argv[1:]
    with_traceback = "--traceback" in arguments
    try:
        app(args=[argument for argument in arguments if argument != "--traceback"], prog_name="fastlm")
    except KeyboardInterrupt:
        print("fastlm: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away (`| head`): nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if with_traceback:
            raise
        text, code = explain(error)
        print(f"fastlm: error: {text}", file=sys.stderr)
        sys.exit(code)
