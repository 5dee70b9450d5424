"""Configurations and objectives over the text and the scores of the fixture `place`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastlm.methods import rho1
from fastlm.methods.rho1.objective import SelectiveLoss
from fastlm.training import TrainConfig
from fastlm.training.batches import PackedSampler
from fastlm.training.data import PreparedData, open_data
from tests.training.runs import small_config

SCORES = ("excess", "ref_loss", "ref_entropy", "intersection", "loss", "random")


def config_of(place: Path, **changes: Any) -> TrainConfig:
    changes = {"vocab_size": None, "loss": "slm", "scores": place / "scores", "keep": 0.6, **changes}
    return small_config(place / "text", **changes)


def prepared(place: Path, objective: SelectiveLoss, **changes: Any) -> tuple[PreparedData, PackedSampler]:
    data = open_data(place / "reference" / "data")
    config = config_of(place, score=objective.score, **changes)
    objective.prepare(config, data, "fp32", None, lambda text: None)
    return data, PackedSampler(data.train, row_tokens=config.micro_batch, seq_len=16, seed=0)


def objective_of(place: Path, score: str, keep: float = 0.6) -> SelectiveLoss:
    return SelectiveLoss(keep=keep, score=score, store=rho1.open_scores(place / "scores"))
