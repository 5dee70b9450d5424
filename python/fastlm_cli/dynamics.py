"""`fastlm dynamics`: which tokens a training learnt, and which it did not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def dynamics(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="A run with checkpoints (train it with --keep-checkpoints 0), or several runs or models in order.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder for numbers, pictures and page.html.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder or file of text that was not trained on.", show_default="the run's held-out text"
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens to read.")] = 65_536,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of one piece of a document.")] = 512,
    threshold: Annotated[float, typer.Option(min=0.0, help="Change of a loss that counts, in nats.")] = 0.2,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Sort held-out tokens by how their loss moved during a training: learnt, unlearnt, known, never learnt."""
    from fastlm.methods.rho1 import dynamics as method
    from fastlm.methods.rho1 import dynamics_report

    dynamics_report.require_matplotlib()
    dynamics_report.check_target(out)
    history = method.losses_over_training(
        runs,
        data,
        max_tokens=max_tokens,
        seq_len=seq_len,
        report=None if quiet else lambda line: print(line, file=sys.stderr),
    )
    found = method.token_dynamics(history.losses, positions=history.steps, threshold=threshold)
    summary = dynamics_report.write_dynamics(out, history, found)
    if as_json:
        print(json.dumps(summary))
        return
    for name, of_class in summary["classes"].items():
        losses = [value for value in of_class["mean_loss"] if value is not None]
        course = f"   loss {losses[0]:.2f} to {losses[-1]:.2f}" if losses else ""
        print(f"{name}  {of_class['share']:6.1%}  {of_class['meaning']:<16}{course}")
    print(f"page  {out / 'page.html'}")
