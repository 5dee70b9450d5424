"""`fastlm train`: flags are the fields of `fastlm.training.TrainConfig`, each None unless given."""

from __future__ import annotations

import json
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fastlm.training import RunRecord

EPILOG = (
    "Ctrl-C saves and ends; the same --out with --resume goes on, bit for bit. "
    "Example: fastlm train samba --data ./my_text --minutes 2 --out runs/first"
)


class Architecture(str, Enum):
    samba = "samba"


class Dtype(str, Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Loss(str, Enum):
    ce = "ce"
    slm = "slm"


class Score(str, Enum):
    excess = "excess"
    ref_loss = "ref_loss"
    ref_entropy = "ref_entropy"
    intersection = "intersection"
    loss = "loss"
    random = "random"


class Estimator(str, Enum):
    v2 = "v2"
    v2_star = "v2_star"
    v1 = "v1"
    topk = "topk"


def train(
    architecture: Annotated[Architecture, typer.Argument(help="Model family.")] = Architecture.samba,
    out: Annotated[Path | None, typer.Option(help="Folder of the run: new, empty, or with --resume.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder (read recursively) or file of text.", show_default="Python's own library source"
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Length of the training in minutes.", show_default="2")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Length in steps instead of minutes.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    preset: Annotated[str | None, typer.Option(help="Size of the model.", show_default="demo")] = None,
    init: Annotated[
        Path | None, typer.Option(help="Begin with the weights and tokenizer of this run or model.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="A tokenizer.json, or a folder with one.",
            show_default="that of --init or --scores, else trained",
        ),
    ] = None,
    loss: Annotated[
        Loss | None, typer.Option(help="slm: train on chosen tokens only (Rho-1).", show_default="ce")
    ] = None,
    scores: Annotated[Path | None, typer.Option(help="Folder that `fastlm score` wrote.")] = None,
    score: Annotated[
        Score | None, typer.Option(help="What tokens are chosen by.", show_default="excess")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of the tokens that is trained on.", show_default="0.6")
    ] = None,
    num_experts: Annotated[
        int | None,
        typer.Option(help="Experts of every feed-forward layer.", show_default="the preset's, mostly none"),
    ] = None,
    num_experts_per_tok: Annotated[
        int | None, typer.Option(help="Experts a token visits.", show_default="2")
    ] = None,
    expert_size: Annotated[
        int | None,
        typer.Option(help="Inner width of an expert.", show_default="that of the preset's dense layer"),
    ] = None,
    router_estimator: Annotated[
        Estimator | None,
        typer.Option(
            help="Gradient of the router: GRIN's v2, v2_star, v1; topk: no sampling.", show_default="v2"
        ),
    ] = None,
    router_aux_loss_coef: Annotated[
        float | None, typer.Option(help="Weight of the load-balance loss.", show_default="0.01")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Most tokens of the vocabulary.", show_default="the preset's")
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Arithmetic over fp32 weights; auto: bf16 where the CPU has it.", show_default="auto"
        ),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Longest piece of one document, in tokens.", show_default="512")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of one step.", show_default="1024")] = None,
    micro_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one pass, to save memory.", show_default="--batch-tokens")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default="the preset's")] = None,
    min_lr_ratio: Annotated[
        float | None, typer.Option(help="Last learning rate as a share of the peak.", show_default="0.1")
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Steps of linear warm-up.", show_default="20")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Decoupled weight decay.", show_default="0.1")
    ] = None,
    beta1: Annotated[float | None, typer.Option(help="AdamW's first decay.", show_default="0.9")] = None,
    beta2: Annotated[float | None, typer.Option(help="AdamW's second decay.", show_default="0.95")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm.", show_default="1.0")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of initial weights and document order.", show_default="0")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Share of files kept for evaluation.", show_default="0.03")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="Most bytes of text, whole files.", show_default="all")
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="Evaluations during the run.", show_default="8")
    ] = None,
    eval_tokens: Annotated[
        int | None, typer.Option(help="Tokens of such an evaluation.", show_default="16384")
    ] = None,
    final_eval_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the last evaluation.", show_default="262144")
    ] = None,
    checkpoint_minutes: Annotated[
        float | None, typer.Option(help="Minutes between checkpoints.", show_default="5.0")
    ] = None,
    checkpoint_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints, besides.")] = None,
    keep_checkpoints: Annotated[
        int | None, typer.Option(help="Newest checkpoints to keep, 0 for all.", show_default="2")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's choice")] = None,
    config: Annotated[
        Path | None, typer.Option(help="File of settings (.json, .toml, or a run.json); flags win.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run record as JSON at the end.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train a language model on text, from files to a finished model."""
    flags: dict[str, Any] = {
        name: value.value if isinstance(value, Enum) else value
        for name, value in locals().items()
        if name not in ("out", "resume", "config", "as_json", "quiet") and value is not None
    }
    if out is None:
        raise typer.BadParameter("expected a folder for the run, got none", param_hint="--out")

    from fastlm import training
    from fastlm.training.memory import keep_freed_memory
    from fastlm.training.progress import make_reporter

    keep_freed_memory()
    settings = {**(training.read_config_file(config) if config else {}), **flags}
    if ("minutes" in flags and "steps" not in flags) or ("steps" in flags and "minutes" not in flags):
        settings.pop(
            "steps" if "minutes" in flags else "minutes", None
        )  # the flag wins over the file's other limit
    reporter = make_reporter(quiet=quiet)
    try:
        if resume:
            selective = training.load_record(out).config.loss == "slm"
            record = _runs(selective).resume(out, given=settings, reporter=reporter)
        else:
            made = training.make_config(settings)
            record = _runs(made.loss == "slm").train(made, out, reporter=reporter)
    except KeyboardInterrupt:
        print(f"\nStopped before the first step. To go on: {resume_command(out)}", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        reporter.close()
    if as_json:
        print(json.dumps(record.model_dump(mode="json")))
    elif record.status == "finished":
        print(describe(record, out))
    if record.status == "interrupted":
        total = record.schedule["total_steps"] if record.schedule else "?"
        print(
            f"\nSaved after step {record.step} of {total}. To go on: {resume_command(out)}", file=sys.stderr
        )
        raise typer.Exit(143 if record.environment.get("stopped_by") == "SIGTERM" else 130)


def _runs(selective: bool) -> Any:
    """What has the `train` and `resume` of a loss."""
    if selective:
        from fastlm.methods import rho1

        return rho1
    from fastlm import training

    return training


def resume_command(out: Path) -> str:
    """The line that continues the run."""
    return f"fastlm train samba --out {shlex.quote(str(out))} --resume"


def describe(record: RunRecord, out: Path) -> str:
    """The result in a few lines."""
    result = record.result or {}
    return "\n".join(
        (
            f"held-out text   {result['bits_per_byte']:.3f} bits per byte ({result['held_out_bytes']:,} "
            f"bytes)",
            f"trained         {record.tokens:,} tokens in {record.train_seconds:.0f} s "
            f"({result['tokens_per_second']:,.0f} tokens/s, {record.dtype})",
            f"model           {record.parameters:,} parameters in {out / 'model'}",
            f"try             fastlm generate {shlex.quote(str(out))} --prompt 'def read_config('",
        )
    )
