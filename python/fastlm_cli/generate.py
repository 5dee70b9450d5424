"""`fastlm generate`: text from a trained run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def generate(
    run: Annotated[Path, typer.Argument(help="Folder of a run, of one of its checkpoints, or of a model.")],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to continue; - reads standard input.")
    ] = "",
    stream: Annotated[bool, typer.Option("--stream", help="Show the text while it is made.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among so many likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest that make up this probability.")
    ] = 0.95,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print text, tokens and speed as JSON.")] = False,
) -> None:
    """Continue a prompt with a trained model."""
    if as_json and stream:
        raise typer.BadParameter("expected one of --stream and --json, got both", param_hint="--stream")
    text = sys.stdin.read() if prompt == "-" else prompt

    from fastlm.training.generation import generate_text
    from fastlm.training.loading import load_run

    loaded = load_run(run)
    if stream:
        print(text, end="", flush=True)
    result = generate_text(
        loaded,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        on_text=(lambda piece: print(piece, end="", flush=True)) if stream else None,
    )
    if as_json:
        print(json.dumps(result.to_dict()))
    elif stream:
        print()
    else:
        print(text + result.text)
    print(f"{result.num_tokens} tokens, {result.tokens_per_second:,.0f} tokens/s", file=sys.stderr)
