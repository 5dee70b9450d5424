"""`fastlm score`: one reference loss per token of a corpus, or what is in a folder of them."""

from __future__ import annotations

import json
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fastlm.methods.rho1 import ScoreStore

EPILOG = (
    "Ctrl-C keeps what is finished; the same command goes on, also several at once. "
    "Example: fastlm score runs/reference --data ./my_text --context 512 --out scores/my_text"
)


class Dtype(str, Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


def score(
    run: Annotated[
        Path | None,
        typer.Argument(help="Reference model: folder of a run, a model, or a transformers model."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the scores: new, empty, or to go on with.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder (read recursively) or file of text.", show_default="Python's own library source"
        ),
    ] = None,
    context: Annotated[
        int, typer.Option(help="Tokens of a piece, the --seq-len of the training; 0: whole documents.")
    ] = 512,
    entropy: Annotated[
        bool, typer.Option("--entropy", help="Also store the entropy of each prediction.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each.", show_default="torch's choice / workers")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Arithmetic; auto: bf16 where the CPU has it.")] = Dtype.auto,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of one pass.", show_default="4096")] = None,
    part_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a file, which a killed process loses.", show_default="1048576"),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="As in the training; it matters if --data is one file.")
    ] = 0.03,
    max_bytes: Annotated[
        int | None, typer.Option(help="Most bytes of text, whole files.", show_default="all")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read finished files through; score damaged ones again.")
    ] = False,
    show: Annotated[
        Path | None, typer.Option(help="Verify this folder of scores, and tell what is in it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is in it as JSON at the end.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Write the loss of every token of a text under a reference model, for `fastlm train --loss slm`."""
    if show is not None:
        if run is not None or out is not None:
            raise typer.BadParameter(
                "expected one of --show and a model with --out, got both", param_hint="--show"
            )
        _print(_verified(show), as_json)
        return
    if run is None:
        raise typer.BadParameter("expected the folder of a reference model, got none", param_hint="RUN")
    if out is None:
        raise typer.BadParameter("expected a folder for the scores, got none", param_hint="--out")
    if context < 0:
        raise typer.BadParameter(f"expected a number of tokens or 0, got {context}", param_hint="--context")

    from fastlm.methods import rho1
    from fastlm.training.memory import keep_freed_memory
    from fastlm.training.progress import make_reporter

    keep_freed_memory()
    sizes = {"batch_tokens": batch_tokens, "part_tokens": part_tokens}
    command = _command(
        run, out=out, data=data, context=context, entropy=entropy, workers=workers, threads=threads,
        dtype=dtype.value, held_out=held_out, max_bytes=max_bytes, **sizes,
    )  # fmt: skip
    reporter = make_reporter(quiet=quiet)
    try:
        store = rho1.score_text(
            run,
            data,
            out,
            held_out=held_out,
            max_bytes=max_bytes,
            context=context or None,
            entropy=entropy,
            workers=workers,
            threads=threads,
            dtype=dtype.value,
            reporter=reporter,
            check=check,
            command=command,
            **{name: value for name, value in sizes.items() if value is not None},
        )
    except rho1.ScoringStoppedError as stopped:
        reporter.close()
        print(f"\nStopped; finished parts are kept. To go on: {command}", file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from None
    except KeyboardInterrupt:
        reporter.close()
        print(f"\nStopped; finished parts are kept. To go on: {command}", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        reporter.close()
    _print(store, as_json)


_DEFAULTS = {"dtype": "auto", "workers": 1, "held_out": 0.03, "context": 512}


def _command(run: Path, **settings: Any) -> str:
    """The line that goes on with this, from any folder."""
    words = ["fastlm", "score", str(run.absolute())]
    for name, value in settings.items():
        if value is None or value is False or _DEFAULTS.get(name) == value:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value.absolute() if isinstance(value, Path) else value))
    return shlex.join(words)


def _verified(folder: Path) -> ScoreStore:
    from fastlm.methods import rho1

    store = rho1.open_scores(folder)
    store.verify()
    return store


def _print(store: ScoreStore, as_json: bool) -> None:
    from fastlm.methods.rho1.summary import describe, summarize

    summary = summarize(store)
    print(json.dumps(summary) if as_json else describe(summary))
