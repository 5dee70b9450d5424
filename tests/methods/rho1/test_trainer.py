"""The Trainer's loss and gradients against models' own losses on labels masked by the same selection."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fastlm.methods import rho1
from tests.methods.rho1.documents import FakeStore, documents
from tests.methods.rho1.hf_models import (
    assert_same_gradients,
    gradients,
    make_model,
    masked_labels,
    one_thread,
    scored,
    transformers,
)

PAD = 0


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def arguments(folder: Path, **changes: Any) -> Any:
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "per_device_train_batch_size": 3,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "seed": 5,
    }
    return transformers.TrainingArguments(**values | changes)


class Keeping:
    """Keeps the gradients of every optimizer step, as the optimizer got them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def callback(self) -> Any:
        keeper = self

        class Callback(transformers.TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                keeper.steps.append(gradients(model))

        return Callback()


def run(model, rows, folder, *, store=None, plain=False, collator=None, **changes):
    """Trains; returns the gradients of every step and the logged lines."""
    settings = {
        n: changes.pop(n) for n in ("keep_ratio", "score", "scope", "normalizer", "tie_break") if n in changes
    }
    keeping = Keeping()
    trainer = (transformers.Trainer if plain else rho1.Trainer)(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=rows,
        data_collator=collator or rho1.Collator(None if plain else store, pad_token_id=PAD),
        callbacks=[keeping.callback()],
        **settings,
    )
    trainer.train()
    return keeping.steps, [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "granite", "samba"])
def test_loss_and_gradients_are_the_models_own_on_masked_labels(family, tmp_path):
    rows = documents(3)
    model, store = make_model(family), scored(rows, seed=1)
    batch = rho1.Collator(store, pad_token_id=PAD)([{"input_ids": row} for row in rows])
    trainer = rho1.Trainer(model, arguments(tmp_path), keep_ratio=0.5)
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    labels = masked_labels(model, batch, 0.5)
    assert 0 < int((labels != -100).sum()) < sum(len(row) - 1 for row in rows)
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    expected.backward()
    assert_close(loss, expected)
    assert_same_gradients(found, gradients(model))


@pytest.mark.parametrize("family", ["llama", "samba"])
def test_keeping_everything_is_the_plain_trainer(family, tmp_path):
    rows = [{"input_ids": row} for row in documents(9)]
    store = scored(documents(9))
    settings = {"max_steps": 3, "gradient_accumulation_steps": 1}
    ours, log = run(make_model(family), rows, tmp_path, store=store, keep_ratio=1.0, **settings)
    plain, expected = run(make_model(family), rows, tmp_path, plain=True, **settings)
    assert len(ours) == len(plain) == 3
    for found, gradient in zip(ours, plain, strict=True):
        assert_same_gradients(found, gradient)
    for line, other in zip(log, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["full_loss"] == pytest.approx(line["loss"], rel=1e-4)
        assert line["selected_fraction"] == 1.0


@pytest.mark.parametrize("normalizer", ["selected", "valid", 10.0])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_accumulation_is_one_mean_over_the_whole_step(scope, normalizer, tmp_path):
    """Two micro-batches with very different numbers of labels."""
    rows = [*documents(2, low=4, high=5), *documents(2, seed=7, low=12, high=16)]
    store = scored(rows, seed=1)
    (found,), _ = run(
        make_model("llama"),
        InOrder(rows),
        tmp_path,
        store=store,
        keep_ratio=0.5,
        scope=scope,
        normalizer=normalizer,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    model = make_model("llama")
    collator = rho1.Collator(store, pad_token_id=PAD)
    groups = [rows[:2], rows[2:]] if scope == "batch" else [[row] for row in rows]
    total, count, valid = torch.zeros(()), 0, sum(len(row) - 1 for row in rows)
    for group in groups:
        batch = collator([{"input_ids": row} for row in group])
        labels = masked_labels(model, batch, 0.5)
        chosen = int((labels != -100).sum())
        total = (
            total
            + chosen
            * model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        )
        count += chosen
    (total / {"selected": count, "valid": valid}.get(normalizer, normalizer)).backward()
    assert_same_gradients(found, gradients(model))


def test_the_mean_of_means_would_be_noticed(tmp_path):
    """The rows of the test above are so uneven that the wrong normalizer gives other gradients."""
    rows = [*documents(2, low=4, high=5), *documents(2, seed=7, low=12, high=16)]
    results = []
    for steps, size in ((2, 2), (1, 2)):
        (found, *rest), _ = run(
            make_model("llama"),
            InOrder(rows),
            tmp_path,
            store=scored(rows, seed=1),
            keep_ratio=0.5,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=3 - steps,
            learning_rate=0.0,
        )
        results.append([found, *rest])
    name = "model.norm.weight"
    mean_of_means = (results[1][0][name] + results[1][1][name]) / 2
    assert (mean_of_means - results[0][0][name]).abs().max() > 0.01 * results[0][0][name].abs().max()


def test_a_model_of_experts_keeps_its_auxiliary_loss(tmp_path):
    rows = documents(4, low=8, high=9)
    for family in ("mixtral", "samba moe"):
        ours, log = run(
            make_model(family),
            InOrder(rows),
            tmp_path,
            store=scored(rows),
            keep_ratio=1.0,
            per_device_train_batch_size=4,
        )
        plain, expected = run(
            make_model(family), InOrder(rows), tmp_path, plain=True, per_device_train_batch_size=4
        )
        assert_same_gradients(ours[0], plain[0])
        assert log[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-4)
        assert log[0]["loss"] > log[0]["full_loss"] + 0.1  # the auxiliary loss is in it


def test_the_auxiliary_loss_is_a_mean_over_micro_batches(tmp_path):
    rows = documents(4, low=6, high=12)
    size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    (found,), _ = run(
        make_model("mixtral"), InOrder(rows), tmp_path, store=scored(rows), keep_ratio=1.0, **size
    )
    model, total = make_model("mixtral"), torch.zeros(())
    for part in (rows[:2], rows[2:]):
        batch = rho1.Collator(None, pad_token_id=PAD)(rows_of(part))
        output = model(**batch, num_items_in_batch=sum(len(row) - 1 for row in rows))
        total = total + output.loss - model.router_aux_loss_coef * output.aux_loss / 2
    total.backward()
    assert_same_gradients(found, gradients(model))


def test_outside_of_the_trainer_the_model_is_as_it_was(tmp_path):
    model = make_model("llama")
    rho1.Trainer(model, arguments(tmp_path))
    ids = torch.tensor(documents(1))
    assert model(input_ids=ids, labels=ids).logits is not None


# The batch


def test_scoring_a_model_with_itself_gives_zero_everywhere(tmp_path):
    """An offset of one between scores and predictions is caught here."""
    rows, model = documents(5), make_model("llama")
    store = scored(rows, model=model)
    trainer = rho1.Trainer(model, arguments(tmp_path), keep_ratio=0.5)
    batch = rho1.Collator(store, pad_token_id=PAD)([{"input_ids": row} for row in rows])
    trainer.compute_loss(model, batch)
    logged, _ = trainer._selection_log.flush(lambda sums: sums)
    assert abs(logged["score_selected"]) < 1e-5
    assert abs(logged["score_unselected"]) < 1e-5
    assert logged["selected_fraction"] == pytest.approx(0.5, abs=0.02)
    batch["ref_nll"] = batch["ref_nll"].roll(1, 1)
    trainer.compute_loss(model, batch)
    assert trainer._selection_log.flush(lambda sums: sums)[0]["score_selected"] > 0.1


def test_padding_and_prompts_are_never_chosen(tmp_path):
    rows = [{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in documents(4)]
    store = scored([row["input_ids"] for row in rows])
    _, log = run(
        make_model("llama"), rows, tmp_path, store=store, keep_ratio=1.0, per_device_train_batch_size=4
    )
    model = make_model("llama")
    batch = rho1.Collator(store, pad_token_id=PAD)(rows)
    expected = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss
    assert log[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    # Left padding, made by hand: the last padded position would predict the first token.
    row = torch.tensor([rows[0]["input_ids"]])
    padded = torch.nn.functional.pad(row, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(row), (3, 0))
    trainer = rho1.Trainer(model, arguments(tmp_path), keep_ratio=1.0, score="loss")
    batch = {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}
    trainer.compute_loss(model, batch)
    assert trainer._selection_log._sums is not None
    assert int(trainer._selection_log._sums[2]) == row.shape[1] - 1
    assert trainer._denominator([batch]) == row.shape[1] - 1


def test_scores_that_are_not_finite_are_left_out_of_every_count(tmp_path):
    rows = documents(3, low=10, high=11)
    store = scored(rows, seed=1)
    for values in store.scores.values():
        values[2:6] = float("nan")
    _, log = run(make_model("llama"), InOrder(rows), tmp_path, store=store, keep_ratio=1.0)
    assert log[0]["nonfinite_scores"] == 12
    model = make_model("llama")
    batch = rho1.Collator(store, pad_token_id=PAD)([{"input_ids": row} for row in rows])
    labels = batch["labels"].clone()
    labels[:, 3:7] = -100
    assert log[0]["loss"] == pytest.approx(
        float(model(input_ids=batch["input_ids"], labels=labels).loss.detach()), rel=1e-4
    )


# The log


def test_what_is_logged(tmp_path):
    rows = documents(6, low=10, high=11)
    for score, known in (("excess", True), ("loss", True), ("ref_loss", False)):
        _, log = run(
            make_model("llama"),
            rows_of(rows),
            tmp_path,
            store=scored(rows, seed=1),
            keep_ratio=0.4,
            score=score,
            max_steps=2,
        )
        for line in log:
            assert line["selected_fraction"] == pytest.approx(11 / 27)
            assert line["score_unselected"] < line["selection_threshold"] <= line["score_selected"]
            assert ("full_loss" in line) == known
            if score == "loss":
                assert line["full_loss"] < line["loss"]
                assert line["score_selected"] == pytest.approx(line["loss"], rel=1e-3)


@pytest.mark.parametrize(("same", "keep_ratio"), [(True, 0.5), (True, 1.0), (False, 0.5)])
def test_many_ties_are_told(same, keep_ratio, tmp_path):
    rows = documents(3)
    store = scored(rows, seed=1)
    if same:
        store = FakeStore({key: values * 0 + 2 for key, values in store.scores.items()})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(
            make_model("llama"), rows_of(rows), tmp_path, store=store, score="ref_loss", keep_ratio=keep_ratio
        )
    told = any("more than 10 % of the eligible tokens" in str(warning.message) for warning in caught)
    assert told == (same and keep_ratio < 1)


# Evaluation, checkpoints


def test_evaluation_is_plain_cross_entropy_with_or_without_logits(tmp_path):
    rows = rows_of(documents(5))
    store = scored(documents(5), seed=1)
    plain = transformers.Trainer(
        make_model("llama"),
        arguments(tmp_path),
        eval_dataset=rows,
        data_collator=rho1.Collator(None, pad_token_id=PAD),
    ).evaluate()
    seen = []
    for metrics in (None, lambda output: seen.append(output.predictions.shape) or {}):
        trainer = rho1.Trainer(
            make_model("llama"),
            arguments(tmp_path),
            eval_dataset=rows,
            data_collator=rho1.Collator(store, pad_token_id=PAD),
            compute_metrics=metrics,
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert seen[0][0] == 5
    assert seen[0][2] == 61


@pytest.mark.parametrize("tie_break", ["index", "random"])
def test_a_resumed_training_ends_with_the_same_weights(tie_break, tmp_path):
    rows = documents(8)
    store = FakeStore(
        {key: values.round() for key, values in scored(rows, seed=1).scores.items()}
    )  # with ties
    settings = {"score": "ref_loss", "keep_ratio": 0.5, "tie_break": tie_break}
    collator = rho1.Collator(store, pad_token_id=PAD)
    args = arguments(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    whole = rho1.Trainer(
        make_model("llama"), args, train_dataset=rows_of(rows), data_collator=collator, **settings
    )
    whole.train()
    again = rho1.Trainer(
        make_model("llama"), args, train_dataset=rows_of(rows), data_collator=collator, **settings
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), whole.model.parameters(), strict=True))


def test_bf16_and_a_model_made_by_the_trainer(tmp_path):
    rows = documents(3)
    trainer = rho1.Trainer(
        model_init=lambda: make_model("llama"),
        args=arguments(tmp_path, bf16=True, max_steps=2),
        train_dataset=rows_of(rows),
        data_collator=rho1.Collator(scored(rows), pad_token_id=PAD),
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


# Errors


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"keep_ratio": 1.5}, r"keep_ratio must be in \[0, 1\], got 1.5"),
        ({"keep_ratio": float("nan")}, r"keep_ratio must be in \[0, 1\], got nan"),
        ({"score": "entropy"}, "score must be among 'excess', 'ref_loss', 'loss', got 'entropy'"),
        ({"scope": "row"}, "scope must be among"),
        ({"tie_break": "first"}, "tie_break must be among"),
        ({"normalizer": "mean"}, "normalizer must be among 'selected', 'valid', got 'mean'"),
        ({"normalizer": 0.0}, r"normalizer must be a positive number, got 0\.0"),
        ({"compute_loss_func": lambda *_: None}, "compute_loss_func must not be given"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, got 0.1"),
    ],
)
def test_settings_that_cannot_be_followed(settings, text, tmp_path):
    args = arguments(tmp_path, **{n: settings.pop(n) for n in ("label_smoothing_factor",) if n in settings})
    with pytest.raises(ValueError, match=text):
        rho1.Trainer(make_model("llama"), args, **settings)


def test_batches_that_lack_something(tmp_path):
    model = make_model("llama")
    trainer = rho1.Trainer(model, arguments(tmp_path))
    batch = rho1.Collator(None, pad_token_id=PAD)([{"input_ids": row} for row in documents(2)])
    with pytest.raises(ValueError, match="score 'excess' needs ref_nll in every batch, found input_ids"):
        trainer.compute_loss(model, batch)
    with pytest.raises(ValueError, match=r"ref_nll must have the shape of input_ids, \(2, .*, got \(2, 3\)"):
        trainer.compute_loss(model, batch | {"ref_nll": torch.zeros(2, 3)})
    del batch["labels"]
    with pytest.raises(ValueError, match="expected labels in every batch, found none"):
        trainer.compute_loss(model, batch)


def rows_of(token_lists):
    return [{"input_ids": row} for row in token_lists]


class InOrder(torch.utils.data.IterableDataset):
    """Rows that nobody shuffles."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(rows_of(self.rows))
