"""What does not fit together is refused before anything is trained, with the reason."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fastlm import training
from fastlm.methods import rho1
from fastlm.methods.rho1.objective import NEEDS_SCORES, SelectiveLoss
from fastlm.training import InputError
from fastlm.training.data import open_data
from fastlm.training.loading import load_run
from tests.methods.rho1.selective import (
    config_of,
    objective_of,
)
from tests.training.runs import small_config

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "context": ({"seq_len": 32}, r"--seq-len: expected 16, the context of the scores in .*, got 32"),
    "no scores": (
        {"scores": Path("/none")},
        r"expected a folder that `fastlm score` wrote .*, found none at /none",
    ),
    "vocabulary": ({"vocab_size": 300}, r"vocab_size must not be given with tokenizer"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused(place: Path, tmp_path: Path, name: str) -> None:
    changes, text = REFUSALS[name]
    with pytest.raises(InputError, match=text):
        rho1.train(config_of(place, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    training.train(small_config(place / "text", steps=1, vocab_size=280), tmp_path / "other")
    with pytest.raises(
        InputError, match=r"--tokenizer: expected the tokenizer of the scores in .*, got another one"
    ):
        rho1.train(config_of(place, tokenizer=tmp_path / "other"), tmp_path / "run")
    with pytest.raises(
        InputError, match=r"--init: expected the tokenizer of the scores in .*, got another one"
    ):
        rho1.train(config_of(place, init=tmp_path / "other", lr=1e-3, preset="demo"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_text_that_was_not_scored_is_refused(place: Path, tmp_path: Path) -> None:
    text = shutil.copytree(place / "text", tmp_path / "text")
    for number in (3, 4):  # one of them at least is on the training side
        (text / f"module_{number}.py").write_text(f"print('new {number}')\n")
    with pytest.raises(
        InputError, match=r"has no losses for [1-9] of the \d training documents \(the first is number"
    ):
        rho1.train(config_of(place, data=text), tmp_path / "run")


def test_any_split_of_the_same_files_is_covered(place: Path, tmp_path: Path) -> None:
    for held_out in (0.01, 0.5, 0.9):
        config = config_of(place, held_out=held_out, steps=1)
        assert rho1.train(config, tmp_path / str(held_out)).status == "finished"


def test_entropies_are_needed_for_scores_by_them(place: Path, tmp_path: Path) -> None:
    settings = {"context": 16, "threads": 1, "dtype": "fp32"}
    rho1.score_text(place / "reference", place / "text", tmp_path / "scores", **settings)
    for score in ("ref_entropy", "intersection"):
        with pytest.raises(InputError, match=rf"--score: {score} needs entropies, and .* was scored without"):
            rho1.train(config_of(place, scores=tmp_path / "scores", score=score), tmp_path / "run")


def test_plain_token_ids_cannot_guide_a_text(place: Path, tmp_path: Path) -> None:
    model = load_run(place / "reference").model
    rho1.score(model, [[1, 2, 3]], tmp_path / "scores", context=16)
    with pytest.raises(InputError, match=r"expected scores of a tokenizer's text, got .* plain token ids"):
        rho1.train(config_of(place, scores=tmp_path / "scores"), tmp_path / "run")


def test_another_arithmetic_is_told(place: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    objective = objective_of(place, "excess")
    data = open_data(place / "reference" / "data")
    objective.prepare(config_of(place), data, "bf16", None, seen.append)
    assert "computed in fp32 and the run computes in bf16" in seen[0]


@pytest.mark.parametrize("score", NEEDS_SCORES)
def test_scores_are_needed(score: str) -> None:
    with pytest.raises(InputError, match=rf"expected a folder of scores for --score {score}, got none"):
        SelectiveLoss(keep=0.5, score=score, store=None)
