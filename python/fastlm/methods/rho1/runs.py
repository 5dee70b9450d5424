"""`fastlm train --loss slm` from Python: the loop is that of `fastlm.training`, the loss is `objective.SelectiveLoss`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastlm import training
from fastlm.methods.rho1.objective import SelectiveLoss, check_context
from fastlm.methods.rho1.score_files import TOKENIZER, tokenizer_digest
from fastlm.methods.rho1.store import open_scores
from fastlm.training.config import TrainConfig, make_config
from fastlm.training.errors import InputError
from fastlm.training.progress import Reporter
from fastlm.training.record import RunRecord, load_record
from fastlm.training.tokenizer import find_tokenizer


def train(config: TrainConfig, out: Path, *, reporter: Reporter | None = None) -> RunRecord:
    """Trains a model on selected tokens into the new folder `out`.

    Args:
        config: with `loss` slm; `scores`, `score` and `keep` decide what is selected. Without `tokenizer` and `init` the tokenizer is
            that of the scores.
        out, reporter: as for `fastlm.training.train`.

    Returns:
        The record, as `fastlm.training.train`.

    Raises:
        InputError: the scores are missing, damaged or unfinished, of another tokenizer or context, lack entropies that the score
            needs, or lack a training document; and as `fastlm.training.train`.
        RunError: as `fastlm.training.train`.
    """
    objective = selective_loss(config)
    if objective.store is not None:
        check_context(objective.store, config)
        if objective.store.manifest.tokenizer is None:
            raise InputError(
                f"--scores: expected scores of a tokenizer's text, got {config.scores}, which holds plain token ids"
            )
        given = config.tokenizer or config.init
        if given is None:
            config = make_config({**config.model_dump(), "tokenizer": objective.store.folder / TOKENIZER})
        elif tokenizer_digest(find_tokenizer(given)) != objective.store.manifest.tokenizer:
            flag = "--tokenizer" if config.tokenizer else "--init"
            raise InputError(
                f"{flag}: expected the tokenizer of the scores in {config.scores}, got another one at {given}: "
                "a token's loss has a meaning in its own vocabulary only"
            )
    return training.train(config, out, objective=objective, reporter=reporter)


def resume(out: Path, *, given: dict[str, Any] | None = None, reporter: Reporter | None = None) -> RunRecord:
    """Goes on with a run that `train` began; a finished one is returned as it is.

    Args:
        out, given, reporter: as for `fastlm.training.resume`.

    Raises:
        InputError: the scores are not those that the run was begun with; and as `fastlm.training.resume`.
        RunError: as `fastlm.training.resume`.
    """
    record = load_record(out)
    if record.status == "finished":
        return training.resume(out, given=given, reporter=reporter)
    return training.resume(out, given=given, objective=selective_loss(record.config), reporter=reporter)


def selective_loss(config: TrainConfig) -> SelectiveLoss:
    """The objective that a configuration asks for.

    Raises:
        InputError: it asks for another loss, or its scores cannot be used.
    """
    if config.loss != "slm":
        raise InputError(
            f"--loss: expected slm, got {config.loss}; fastlm.training.train trains on every token"
        )
    store = None if config.scores is None else open_scores(config.scores)
    return SelectiveLoss(keep=config.keep_ratio, score=config.token_score, store=store)
