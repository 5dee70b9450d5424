"""The example of docs/methods/rho1_transformers.md runs, and does what it says; with real scores, in loader processes too."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm.methods import rho1
from tests.methods.rho1.documents import documents
from tests.methods.rho1.hf_models import make_model, one_thread, own_nll, transformers

PAGE = Path(__file__).parents[3] / "docs" / "methods" / "rho1_transformers.md"


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.mark.slow
def test_the_example_runs_and_chooses_clean_tokens(tmp_path, monkeypatch):
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(source, str(PAGE), "exec"), names)
    log = [line for line in names["trainer"].state.log_history if "full_loss" in line]
    assert len(log) == 3
    assert log[-1]["full_loss"] < log[0]["full_loss"]
    assert log[-1]["score_selected"] > log[-1]["score_unselected"]
    store = rho1.open_scores("scores")
    means = [
        np.mean([store.nll(rho1.document_key(t), 4, 99).mean() for t in names[kind]])
        for kind in ("clean", "noise")
    ]
    assert means[0] < means[1] - 1  # the reference knows one kind of text


@pytest.mark.parametrize("family", ["llama", "samba"])
def test_real_scores_of_the_model_itself_are_its_losses(family, tmp_path):
    model, rows = make_model(family), documents(6)
    rho1.score(model.eval(), rows, tmp_path / "scores", dtype="fp32", threads=1)
    batch = rho1.Collator(tmp_path / "scores", pad_token_id=0)([{"input_ids": row} for row in rows])
    expected = own_nll(model, batch["input_ids"], batch["attention_mask"])
    known = batch["ref_nll"].isfinite()
    assert int(known.sum()) == sum(len(row) - 1 for row in rows)
    torch.testing.assert_close(batch["ref_nll"][known], expected[known], rtol=1e-4, atol=1e-4)


def test_loader_processes_read_the_same_scores(tmp_path):
    rows = documents(8)
    store = rho1.score(make_model("llama").eval(), rows, tmp_path / "scores", dtype="fp32", threads=1)
    batches = []
    for workers in (0, 1):
        loader = torch.utils.data.DataLoader(
            [{"input_ids": row} for row in rows],
            batch_size=4,
            num_workers=workers,
            collate_fn=rho1.Collator(store, pad_token_id=0),
            multiprocessing_context="spawn" if workers else None,
        )
        batches.append([batch["ref_nll"].nan_to_num(-1) for batch in loader])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_trainer_over_stored_scores(tmp_path):
    rows = documents(9)
    rho1.score(make_model("llama").eval(), rows, tmp_path / "scores", dtype="fp32", threads=1)
    args = transformers.TrainingArguments(
        str(tmp_path / "out"),
        use_cpu=True,
        report_to=[],
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        learning_rate=0.0,
    )
    trainer = rho1.Trainer(
        make_model("llama"),
        args,
        train_dataset=[{"input_ids": row} for row in rows],
        data_collator=rho1.Collator(tmp_path / "scores", pad_token_id=0),
    )
    trainer.train()
    for line in trainer.state.log_history[:2]:
        assert abs(line["score_selected"]) < 1e-4  # the same model
        assert abs(line["score_unselected"]) < 1e-4
