"""Selective training in the loop of fastlm.training: the right reference losses, exact accumulation, refusals."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm import training
from fastlm.methods import rho1
from fastlm.methods.rho1.objective import SelectiveLoss, count_selected
from fastlm.training import InputError, TrainConfig, load_record
from fastlm.training.evaluation import row_loss
from fastlm.training.loading import load_run
from fastlm.training.log import RunLog
from fastlm.training.progress import QuietReporter
from tests.methods.rho1.selective import (
    SCORES,
    config_of,
    objective_of,
    prepared,
)
from tests.training.runs import STEPS, assert_same_bits, final_weights, small_config, start

pytestmark = pytest.mark.usefixtures("one_thread")

# The right numbers


def test_the_reference_models_own_excess_is_zero_everywhere(place: Path) -> None:
    """Rows begin with pieces cut by the row's start, so only those are compared that begin where the reference's do."""
    objective = objective_of(place, "excess")
    _, sampler = prepared(place, objective)
    model = load_run(place / "reference").model
    compared = 0
    for number in range(40):
        row = sampler.row(number)
        reference = objective.reference(row, "nll")
        with torch.no_grad():
            hidden = model.model(row.input_ids, cu_seqlens=row.cu_seqlens)
            losses = model.loss(hidden, shift_labels=row.shift_labels, reduction="none")
        predicted = row.shift_labels[0] != -100
        assert torch.equal(predicted, reference.isfinite())
        at = 0
        for _, start_of, stop in row.pieces:
            if start_of % 16 == 0:
                here = slice(at, at + stop - start_of)
                excess = (losses[here] - reference[here])[predicted[here]]
                assert excess.numel() == 0 or float(excess.abs().max()) < 1e-5
                compared += excess.numel()
            at += stop - start_of
    assert compared > 1000


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.29, 0.5, 0.6, 1.0])
@pytest.mark.parametrize("eligible", [0, 1, 5, 100])
def test_the_count_is_that_of_the_operator(keep: float, eligible: int) -> None:
    from fastlm import ops

    scores, every = torch.randn(eligible), torch.ones(eligible, dtype=torch.bool)
    assert count_selected(keep, eligible) == int(ops.select_tokens(scores, every, keep_ratio=keep).sum())


@pytest.mark.parametrize("score", SCORES)
def test_a_steps_loss_is_the_mean_over_all_that_it_selects(place: Path, score: str) -> None:
    objective = objective_of(place, score)
    _, sampler = prepared(place, objective)
    model = load_run(place / "reference").model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    rows = [sampler.row(number) for number in (3, 4, 5)]
    step = objective.begin(rows, 7)
    sum(step.loss(model, index, "fp32", None) for index in range(3)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    numbers = step.numbers()

    model.zero_grad()
    losses = torch.cat([_losses(model, row) for row in rows])
    masks = _expected_masks(objective, rows, losses.detach(), score)
    chosen = torch.cat(masks)
    mean = losses[chosen].mean()
    mean.backward()
    assert numbers.loss == pytest.approx(float(mean.detach()), abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=2e-6, rtol=1e-4)
    valid = sum(row.num_targets for row in rows)
    assert numbers.log["selected_fraction"] == pytest.approx(int(chosen.sum()) / valid)
    if score in ("excess", "loss"):
        assert numbers.nats == pytest.approx(float(losses.detach().sum()), abs=1e-3)
        assert numbers.log["full_loss"] == pytest.approx(float(losses.detach().sum()) / valid, abs=1e-5)
    else:
        assert numbers.nats is None
        assert "full_loss" not in numbers.log


def _losses(model: Any, row: Any) -> torch.Tensor:
    hidden = model.model(row.input_ids, cu_seqlens=row.cu_seqlens)
    return model.loss(hidden, shift_labels=row.shift_labels, reduction="none")


def _expected_masks(
    objective: SelectiveLoss, rows: Any, losses: torch.Tensor, score: str
) -> list[torch.Tensor]:
    """By sorting; scores that depend on the model rank each row, the others all rows together."""
    valid = [row.shift_labels[0] != -100 for row in rows]
    nll = [objective.reference(row, "nll") for row in rows]
    entropy = [objective.reference(row, "entropy") for row in rows]

    def best(scores: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
        count = count_selected(0.6, int(eligible.sum()))
        order = torch.where(eligible, scores, -torch.inf).argsort(descending=True)
        mask = torch.zeros_like(eligible)
        mask[order[:count]] = True
        return mask

    if score in ("excess", "loss"):
        parts = losses.split([len(v) for v in valid])
        scores = [part - r if score == "excess" else part for part, r in zip(parts, nll, strict=True)]
        return [best(s, v) for s, v in zip(scores, valid, strict=True)]
    every = torch.cat(valid)
    if score == "random":
        return [best(torch.rand(len(every), generator=torch.Generator().manual_seed(7)), every)]
    low_loss, low_entropy = best(-torch.cat(nll), every), best(-torch.cat(entropy), every)
    masks = {"ref_loss": low_loss, "ref_entropy": low_entropy, "intersection": low_loss & low_entropy}
    return [masks[score]]


@pytest.mark.parametrize("score", ["ref_loss", "ref_entropy", "intersection", "random"])
def test_passes_of_a_step_select_what_one_pass_would(place: Path, score: str) -> None:
    """With scores known beforehand the number of passes changes rounding alone, where rows end with pieces."""
    objective = objective_of(place, score)
    data, _ = prepared(place, objective)
    model = load_run(place / "reference").model
    gradients = []
    pieces = [(document, 0, 16) for document in range(4)]
    from fastlm.training.batches import pack

    for rows in ([pack(data.train, pieces)], [pack(data.train, [piece]) for piece in pieces]):
        model.zero_grad()
        step = objective.begin(rows, 3)
        for index in range(len(rows)):
            step.loss(model, index, "fp32", None).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("score", ["excess", "ref_loss"])
def test_tokens_without_a_finite_reference_are_never_selected(
    place: Path, monkeypatch: pytest.MonkeyPatch, score: str
) -> None:
    objective = objective_of(place, score)
    _, sampler = prepared(place, objective)
    whole = objective.reference

    def spoiled(row: Any, name: str) -> torch.Tensor:
        values = whole(row, name)
        values[::3], values[::6] = float("nan"), float("-inf")
        return values

    monkeypatch.setattr(objective, "reference", spoiled)
    model, rows = load_run(place / "reference").model, [sampler.row(0), sampler.row(1)]
    step = objective.begin(rows, 0)
    losses = [step.loss(model, index, "fp32", None) for index in range(2)]
    sum(losses).backward()
    log = step.numbers().log
    predicted = [row.shift_labels[0] != -100 for row in rows]
    unknown = sum(int(valid[::3].sum()) for valid in predicted)
    eligible = [int(valid.sum()) - int(valid[::3].sum()) for valid in predicted]
    assert log["nonfinite_scores"] == unknown > 0
    counts = [count_selected(0.6, n) for n in eligible]
    selected = sum(counts) if score == "excess" else count_selected(0.6, sum(eligible))
    assert log["selected_fraction"] == pytest.approx(selected / sum(eligible))
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


# Extremes


@pytest.mark.parametrize("score", SCORES)
def test_keeping_all_is_plain_training(place: Path, tmp_path: Path, score: str) -> None:
    tokenizer = {"tokenizer": place / "reference", "vocab_size": None}
    training.train(small_config(place / "text", steps=6, **tokenizer), tmp_path / "plain")
    rho1.train(config_of(place, keep=1.0, score=score, steps=6), tmp_path / "slm")
    if score == "intersection":  # of two whole sets
        assert RunLog(tmp_path / "slm").read()[1]["selected_fraction"] == 1.0
    plain, slm = final_weights(tmp_path / "plain"), final_weights(tmp_path / "slm")
    assert [name for name in plain if not torch.equal(plain[name], slm[name])] == []
    loss = {
        entry["step"]: entry["loss"] for entry in RunLog(tmp_path / "plain").read() if entry["kind"] == "step"
    }
    for entry in RunLog(tmp_path / "slm").read():
        if entry["kind"] == "step":
            assert entry["loss"] == pytest.approx(loss[entry["step"]], abs=1e-6)
            assert entry["bits_per_byte"] is not None


@pytest.mark.parametrize("score", ["excess", "ref_loss"])
def test_keeping_nothing_trains_nothing(place: Path, tmp_path: Path, score: str) -> None:
    config = config_of(place, keep=0.0, score=score, steps=2, weight_decay=0.0)
    rho1.train(config, tmp_path / "slm")
    steps = [entry for entry in RunLog(tmp_path / "slm").read() if entry["kind"] == "step"]
    assert [(entry["loss"], entry["grad_norm"], entry["selected_fraction"]) for entry in steps] == [
        (0.0, 0.0, 0.0)
    ] * 2
    assert all(entry["selection_threshold"] is None for entry in steps)
    json.dumps(steps, allow_nan=False)


# Runs


@pytest.mark.parametrize("score", SCORES)
def test_the_log_tells_what_was_selected(place: Path, tmp_path: Path, score: str) -> None:
    record = rho1.train(config_of(place, score=score, steps=3), tmp_path / "run")
    assert record.status == "finished"
    assert (record.config.score, record.config.keep) == (score, 0.6)
    assert record.config.tokenizer == place / "scores" / "tokenizer.json"
    assert record.objective == {"name": "slm", "scores": rho1.open_scores(place / "scores").digest}
    for entry in RunLog(tmp_path / "run").read():
        if entry["kind"] != "step":
            continue
        share = entry["selected_fraction"]
        assert (0.3 < share < 0.6) if score == "intersection" else share == pytest.approx(0.6, abs=0.02)
        assert entry["score_selected"] > entry["score_unselected"]
        if score != "intersection":
            assert entry["score_selected"] >= entry["selection_threshold"]
        assert ("full_loss" in entry) == (score in ("excess", "loss"))


@pytest.mark.parametrize("score", ["excess", "intersection", "random"])
def test_a_killed_run_goes_on_bit_for_bit(place: Path, tmp_path: Path, score: str) -> None:
    config = config_of(place, score=score)
    process = start(rho1.train, config, tmp_path / "whole")
    process.join(60)
    assert process.exitcode == 0
    process = start(_train_and_die, config, tmp_path / "run")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    process = start(rho1.resume, tmp_path / "run")
    process.join(60)
    assert process.exitcode == 0
    assert load_record(tmp_path / "run").step == STEPS
    assert_same_bits(tmp_path / "run", tmp_path / "whole")
    logs = [
        [{k: v for k, v in entry.items() if k != "seconds"} for entry in RunLog(tmp_path / name).read()]
        for name in ("run", "whole")
    ]
    assert logs[0] == logs[1]


def _train_and_die(config: TrainConfig, out: Path) -> None:
    import os

    class Deadly(QuietReporter):
        def step(self, report: Any) -> None:
            if report.step == 7:
                os.kill(os.getpid(), signal.SIGKILL)

    rho1.train(config, out, reporter=Deadly())


def test_experts_train_on_selected_tokens_too(place: Path, tmp_path: Path) -> None:
    for score in ("excess", "ref_loss"):
        record = rho1.train(config_of(place, preset="tiny_moe", score=score, steps=2), tmp_path / score)
        assert record.status == "finished"


def test_a_run_keeps_its_scores(place: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    shutil.copytree(place / "scores", scores)
    process = start(_train_and_die, config_of(place, scores=scores), tmp_path / "run")
    process.join(60)
    shutil.rmtree(scores)
    with pytest.raises(
        InputError, match=r"scores: expected a folder that `fastlm score` wrote .* found none at"
    ):
        rho1.resume(tmp_path / "run")
    torch.set_num_threads(1)
    settings = {"context": 16, "threads": 1, "part_tokens": 300, "dtype": "fp32"}
    rho1.score_text(
        place / "reference", place / "text", scores, **settings
    )  # without entropy: another digest
    with pytest.raises(
        InputError, match=r"--scores: the run was begun with scores of digest \w{64}, .* now holds"
    ):
        rho1.resume(tmp_path / "run")
    shutil.rmtree(scores)
    shutil.copytree(place / "scores", scores)
    assert rho1.resume(tmp_path / "run").status == "finished"
    shutil.rmtree(scores)
    assert rho1.resume(tmp_path / "run").status == "finished"  # a finished run needs none


def test_training_alone_says_what_to_call(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"loss slm needs its objective: call fastlm.methods.rho1.train\(config, out\)"
    ):
        training.train(config_of(place), tmp_path / "run")
    process = start(_train_and_die, config_of(place), tmp_path / "run")
    process.join(60)
    with pytest.raises(InputError, match=r"call fastlm.methods.rho1.resume\(out\)"):
        training.resume(tmp_path / "run")
    assert rho1.resume(tmp_path / "run").status == "finished"  # the refusal left no lock
    with pytest.raises(InputError, match=r"--loss: expected slm, got ce"):
        rho1.train(small_config(place / "text"), tmp_path / "other")


def test_scores_that_do_not_tell_tokens_apart_are_told_once(place: Path, tmp_path: Path) -> None:
    seen = []

    class Listening(QuietReporter):
        def warn(self, text: str) -> None:
            seen.append(text)

    config = config_of(place, init=place / "reference", lr=1e-9, warmup_steps=0, preset="demo", steps=4)
    rho1.train(config, tmp_path / "run", reporter=Listening())
    assert len(seen) == 1
    assert "tokens have the very score of the threshold" in seen[0]
    assert "as when the model is the reference model itself" in seen[0]


def test_scores_are_not_needed_for_chance_and_loss(place: Path, tmp_path: Path) -> None:
    for score in ("random", "loss"):
        config = config_of(place, scores=None, score=score, vocab_size=300, steps=2)
        assert rho1.train(config, tmp_path / score).objective == {"name": "slm", "scores": None}


def test_the_plain_loss_is_the_one_of_an_evaluation(place: Path) -> None:
    """`loss` with all tokens is `row_loss` divided, which evaluations use: one path for both."""
    objective = objective_of(place, "loss", keep=1.0)
    _, sampler = prepared(place, objective)
    model, row = load_run(place / "reference").model, sampler.row(2)
    step = objective.begin([row], 0)
    assert float(step.loss(model, 0, "fp32", None).detach()) == pytest.approx(
        float(row_loss(model, row, "fp32").detach()) / row.num_targets
    )
