"""Token dynamics: classes by hand, losses of checkpoints against the evaluation, and the command."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm.methods.rho1 import dynamics as method
from fastlm.methods.rho1.dynamics import CLASSES, losses_over_training, token_dynamics
from fastlm.training import InputError, train
from fastlm.training.data import open_data
from fastlm.training.evaluation import evaluate, held_out_rows
from fastlm.training.loading import load_run
from fastlm_cli.main import run as entry
from tests.training.runs import small_config, write_text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dynamics")
    train(small_config(write_text(root / "text"), keep_checkpoints=0, lr=0.01), root / "run")
    return root / "run"


def names(found: method.TokenDynamics) -> list[str]:
    return [CLASSES[number] for number in found.classes]


# Classes


def test_classes_by_hand():
    losses = np.array([[5.0, 1.0, 0.5, 6.0], [3.0, 2.0, 0.6, 6.1], [1.0, 3.0, 0.5, 6.0]])
    found = token_dynamics(losses)
    assert names(found) == ["H→L", "L→H", "L→L", "H→H"]
    np.testing.assert_allclose(found.change, [-4, 2, 0, 0], atol=1e-12)
    np.testing.assert_allclose(found.mean_loss, losses.T)
    assert found.counts == dict.fromkeys(CLASSES, 1)
    assert found.shares["H→H"] == 0.25


def test_the_fit_is_that_of_numpy_and_follows_the_positions():
    chance = np.random.default_rng(0)
    losses, steps = chance.gamma(2, 2, (7, 50)), np.array([1, 2, 4, 8, 9, 20, 50])
    for positions, x in ((None, np.arange(7)), (steps, steps)):
        slope = np.polyfit(x, losses, 1)[0]
        np.testing.assert_allclose(token_dynamics(losses, positions=positions).change, slope * (x[-1] - x[0]))


def test_a_change_of_exactly_the_threshold_is_none():
    losses = np.array([[1.0, 1.0, 1.0, 1.0], [0.75, 0.74, 1.25, 1.26]])
    found = token_dynamics(losses, threshold=0.25)
    assert names(found) == ["L→L", "H→L", "H→H", "L→H"]
    assert names(token_dynamics(np.ones((2, 3)))) == ["L→L"] * 3  # at the mean is low
    assert np.isnan(token_dynamics(np.ones((2, 3))).mean_loss[3]).all()


def test_the_last_loss_is_compared_with_that_of_all_tokens():
    """Not with the token's own mean, which says nothing about a flat line."""
    losses = np.array([[8.0, 1.0, 9.0], [8.1, 1.1, 9.1], [7.9, 0.9, 9.0]])
    assert names(token_dynamics(losses)) == ["H→H", "L→L", "H→H"]


@pytest.mark.parametrize(
    ("losses", "options", "text"),
    [
        ([[1.0, 2.0]], {}, r"at least 2 checkpoints and 1 token, got \(1, 2\)"),
        ([1.0, 2.0], {}, r"got \(2,\)"),
        (np.empty((3, 0)), {}, r"got \(3, 0\)"),
        ([[1.0, np.nan], [1.0, np.inf]], {}, "losses must be finite, got 2 that are not"),
        ([[1.0], [2.0]], {"positions": [3, 3]}, "positions must be 2 ascending numbers"),
        ([[1.0], [2.0]], {"positions": [1, 2, 3]}, "positions must be 2 ascending numbers"),
        ([[1.0], [2.0]], {"threshold": -1.0}, r"threshold must be at least 0, got -1\.0"),
        ([[1.0], [2.0]], {"threshold": float("nan")}, "threshold must be at least 0, got nan"),
    ],
)
def test_what_cannot_be_sorted(losses, options, text):
    with pytest.raises(ValueError, match=text):
        token_dynamics(losses, **options)


# Losses of checkpoints


def test_losses_are_those_of_the_evaluation_checkpoint_by_checkpoint(trained):
    history = losses_over_training([trained], max_tokens=10**6, seq_len=16, batch_tokens=32)
    assert history.steps == (4, 8, 12, 14)
    data = open_data(trained / "data")
    rows = held_out_rows(data, row_tokens=32, seq_len=16, max_tokens=10**6)
    for number, step in enumerate(history.steps):
        done = evaluate(
            load_run(trained / "checkpoints" / f"step-{step:08d}").model, data, rows, dtype="fp32"
        )
        assert history.losses[number].mean(dtype=np.float64) == pytest.approx(done.loss, rel=1e-5)
        assert history.losses.shape[1] == done.tokens
    assert history.losses[3].mean() < history.losses[0].mean()


def test_every_loss_stands_beside_its_token(trained):
    history = losses_over_training([trained], max_tokens=10**6, seq_len=10**6, batch_tokens=10**6)
    model = load_run(trained / "checkpoints" / "step-00000014").model
    texts = set()
    for (first, stop), before in zip(history.documents, history.before, strict=True):
        ids = torch.tensor([[before, *history.tokens[first:stop]]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        np.testing.assert_allclose(history.losses[-1, first:stop], expected, rtol=2e-4, atol=1e-5)
        texts.add(b"".join(history.spelling[token] for token in history.tokens[first:stop]).decode())
    store = open_data(trained / "data").held_out
    assert sum(len(text.encode()) for text in texts) == store.num_bytes
    assert all(text.startswith("def function_") for text in texts)


def test_text_of_ones_own_and_several_models(trained, tmp_path):
    (tmp_path / "own.txt").write_text("def function_1_2(value):\n    return value + 7 €\n")
    models = [trained / "checkpoints" / "step-00000004", trained / "checkpoints" / "step-00000012", trained]
    history = losses_over_training(models, tmp_path / "own.txt")
    assert history.steps is None
    assert (
        b"".join(history.spelling[t] for t in history.tokens).decode() == (tmp_path / "own.txt").read_text()
    )
    again = losses_over_training([trained], tmp_path / "own.txt")
    np.testing.assert_array_equal(history.losses, again.losses[[0, 2, 3]])


def test_what_cannot_be_compared(trained, tmp_path):
    with pytest.raises(InputError, match="got none"):
        losses_over_training([])
    few = tmp_path / "few"
    shutil.copytree(trained, few)
    for step in (4, 8, 12):
        shutil.rmtree(few / "checkpoints" / f"step-{step:08d}")
    with pytest.raises(
        InputError, match=r"at least 2 checkpoints in .*few, found 1; .* --keep-checkpoints 0"
    ):
        losses_over_training([few])
    with pytest.raises(InputError, match=r"--data: expected text, since .*model is no run"):
        losses_over_training([trained / "model", trained / "model"])
    with pytest.raises(InputError, match="--data: expected a folder or file of text"):
        losses_over_training([trained], tmp_path / "absent")
    other = tmp_path / "text"
    other.mkdir()
    for number in range(6):
        (other / f"{number}.txt").write_text(f"completely other words, number {number}\n" * 9)
    train(small_config(other, steps=2), tmp_path / "other")
    with pytest.raises(InputError, match="expected models of one tokenizer"):
        losses_over_training([trained, tmp_path / "other"])


# The command


def command(*arguments: str | Path) -> tuple[int, str, str]:
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = ["fastlm", *map(str, arguments)], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            entry()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def test_the_command_writes_numbers_pictures_and_a_page(trained, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra fastlm[report]")
    out = tmp_path / "report"
    code, printed, _ = command("dynamics", trained, "--out", out, "--json")
    assert code == 0
    summary = json.loads((out / "dynamics.json").read_text(encoding="utf-8"))
    assert summary == json.loads(printed)
    assert summary["steps"] == [4, 8, 12, 14]
    assert sum(c["tokens"] for c in summary["classes"].values()) == summary["tokens"] > 100
    losses = np.load(out / "losses.npy")
    assert losses.shape == (4, summary["tokens"])
    np.testing.assert_allclose(losses.mean(1), summary["mean_loss"], rtol=1e-5)
    for of_class in summary["classes"].values():
        for example in of_class["examples"]:
            np.testing.assert_allclose(example["losses"], losses[:, example["index"]], atol=1e-4)
    for name in ("classes.png", "examples.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    page = (out / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert "H→L from " in page
    code, printed, _ = command("dynamics", trained, "--out", tmp_path / "again", "--quiet")
    assert code == 0
    assert "learnt" in printed
    assert (tmp_path / "again" / "page.html").read_bytes() == (out / "page.html").read_bytes()


def test_a_folder_with_something_in_it_stays_as_it_is(trained, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra fastlm[report]")
    (tmp_path / "precious").write_text("x")
    code, _, told = command("dynamics", trained, "--out", tmp_path)
    assert code == 2
    assert "--out: expected a new or empty folder, found precious in" in told
    code, _, told = command("dynamics", tmp_path / "absent", "--out", tmp_path / "o")
    assert code == 2
    assert "at least 2 checkpoints" in told
    assert not (tmp_path / "o").exists()


def test_without_matplotlib_the_extra_is_named(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, told = command("dynamics", trained, "--out", tmp_path / "o")
    assert code == 1
    assert "pip install 'fastlm[report]'" in told
