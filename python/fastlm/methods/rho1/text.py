"""`fastlm score` from Python: a model's folder and a folder of text in, scores out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from fastlm.methods.rho1.scoring import saved_manifest, score, temporary_folder
from fastlm.methods.rho1.store import ScoreStore
from fastlm.models.samba.config import MODEL_TYPE
from fastlm.training.config import make_config, reason
from fastlm.training.data import prepare_data
from fastlm.training.errors import InputError
from fastlm.training.loading import load_run
from fastlm.training.progress import QuietReporter, Reporter
from fastlm.training.tokenizer import load_given_tokenizer


def score_text(
    run: Path,
    data: Path | None,
    out: Path,
    *,
    held_out: float = 0.03,
    max_bytes: int | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> ScoreStore:
    """Scores text with a trained model; `fastlm train --loss slm --scores OUT` reads the result.

    Text becomes documents as it does for training: whole files (pieces of long ones) between two marks, in the reference model's
    tokens. Both sides of the split are scored, so any split of the same files finds its documents; the cut of a lone file depends on
    `held_out`, which must then be that of the training.

    Args:
        run: folder of a run, of one of its checkpoints, of a model, or of a causal language model of transformers with a
            tokenizer.json of byte-level BPE.
        data: folder or file of text; None: Python's own library source.
        out: see `rho1.score`.
        held_out, max_bytes: as in `fastlm.training.TrainConfig`.
        reporter: sees the progress.
        settings: keywords of `rho1.score`.

    Returns:
        store: the finished scores, opened.

    Raises:
        InputError: model, tokenizer or text cannot be used; and as `rho1.score`.
        RunError, ScoringStoppedError: as `rho1.score`.
    """
    reporter = reporter or QuietReporter()
    model, tokenizer_file = load_reference(run)
    config = make_config(
        {"data": data, "held_out": held_out, "max_bytes": max_bytes, "tokenizer": tokenizer_file}
    )
    saved_manifest(out)  # a folder with something else in it is left alone
    with temporary_folder(out, "text") as temporary:
        corpus = prepare_data(temporary / "data", config, 0, reporter.stage, reporter.warn, exclude=out)
        return score(model, corpus, out, reporter=reporter, **settings)


def load_reference(run: Path) -> tuple[nn.Module, Path]:
    """A model that can score, in evaluation mode, and its tokenizer's file.

    Raises:
        InputError: there is none at `run`, or it cannot be loaded.
        ImportError: it is one of transformers, which is not installed.
    """
    try:
        kind = json.loads((run / "config.json").read_text(encoding="utf-8")).get("model_type", MODEL_TYPE)
    except (OSError, ValueError, AttributeError):
        kind = MODEL_TYPE  # a run, or nothing: what is wrong is told by load_run
    if kind == MODEL_TYPE:
        loaded = load_run(run)
        return loaded.model, loaded.tokenizer_file
    load_given_tokenizer(run)
    return _load_transformers(run, kind), run / "tokenizer.json"


def _load_transformers(run: Path, kind: str) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"RUN: {run} is a {kind} model of transformers: pip install 'fastlm[hf]' ({error})"
        ) from error
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(run, local_files_only=True, dtype="auto")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"RUN: the {kind} model in {run} cannot be loaded: {reason(error)}") from error
    evaluated: nn.Module = model.eval()
    return evaluated
