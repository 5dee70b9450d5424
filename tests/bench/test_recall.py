"""A small model finds again what lies far outside its attention window; and the texts that ask for it are what they say."""

from __future__ import annotations

import pytest
import torch

from bench import recall


@pytest.mark.parametrize("task", recall.TASKS.values(), ids=list(recall.TASKS))
def test_texts_hold_one_marker_its_key_and_the_question(task):
    ids = task.texts(200, 40, torch.Generator().manual_seed(0))
    body = 40 - task.key - 1
    assert ids.shape == (200, 40)
    assert (ids[:, body] == task.question).all()
    places = (ids[:, :body] == recall.MARKER).nonzero()
    assert places[:, 0].tolist() == list(range(200))  # one in every text
    assert places[:, 1].min() == 0
    assert places[:, 1].max() == body - task.key - 1
    keys = ids[:, :body].gather(1, places[:, 1:] + 1 + torch.arange(task.key))
    assert torch.equal(keys, ids[:, body + 1 :])
    assert ((keys >= task.low) & (keys < task.high)).all()


SHORT_PASSKEY = recall.Task("two digits", 2, recall.FIRST_DIGIT, recall.FIRST_LETTER, recall.QUESTION)


@pytest.mark.parametrize(
    ("task", "length", "steps"),
    [(recall.TASKS["induction"], 64, 500), (SHORT_PASSKEY, 128, 800)],
    ids=["induction", "passkey"],
)
def test_it_recalls_beyond_its_window(task, length, steps):
    model = recall.train(task, length=length, window=8, width=48, steps=steps, batch=16, lr=6e-3)
    assert recall.accuracy(model, task, length, 128) >= 0.95  # 8 or 16 windows
    assert recall.accuracy(model, task, 2 * length, 128, chunk=50) >= 0.7  # never trained at


def test_intervals():
    low, high = recall.interval(0.5, 100)
    assert low == pytest.approx(0.404, abs=1e-3)
    assert high == pytest.approx(0.596, abs=1e-3)
    assert recall.interval(1.0, 100)[1] == pytest.approx(1.0)
    assert recall.interval(1.0, 100)[0] == pytest.approx(0.963, abs=1e-3)
