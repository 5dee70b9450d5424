"""Scores are the losses that the model has: the right tokens, the right pieces, whatever is computed together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlm.methods import rho1
from fastlm.methods.rho1.part_scorer import packed_batches, row_batches
from fastlm.models.samba import SambaConfig, SambaForCausalLM
from fastlm.training import InputError, RunError
from fastlm.training.progress import QuietReporter, WorkReport
from tests.methods.rho1.scored import (
    SETTINGS,
    VOCABULARY,
    contents,
    direct_losses,
    score_small,
    small_documents,
    small_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("context", [None, 16, 7, 1])
def test_every_value_is_the_loss_of_the_following_token(tmp_path: Path, context: int | None) -> None:
    model, documents = small_model(), small_documents()
    store = rho1.score(model, documents, tmp_path / "s", context=context, entropy=True, **SETTINGS)
    assert store.context == context
    shifted = 0.0
    for tokens in documents:
        losses, entropies = direct_losses(model, tokens, context)
        key = rho1.document_key(tokens)
        found = store.nll(key, 0, 10**9)
        assert found.shape == losses.shape
        np.testing.assert_allclose(found, losses, atol=3e-5)
        np.testing.assert_allclose(store.entropy(key, 0, 10**9), entropies, atol=3e-5)
        if len(losses) > 1:
            shifted = max(shifted, float(np.abs(found[1:] - losses[:-1]).max()))
    assert shifted > 1.0, "these losses could not tell an off-by-one"


def test_batches_do_not_change_the_values_and_neither_does_training_mode(tmp_path: Path) -> None:
    model = small_model().train()
    one = rho1.score(model, small_documents(), tmp_path / "a", context=16, **SETTINGS)
    assert model.training
    assert all(module.training for module in model.modules())
    other = rho1.score(
        model, small_documents(), tmp_path / "b", **{**SETTINGS, "batch_tokens": 16}, context=16
    )
    for key in one.keys():  # noqa: SIM118  (no mapping)
        np.testing.assert_allclose(one.nll(key, 0, 99), other.nll(key, 0, 99), atol=1e-5)


def test_experts_are_not_sampled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SambaForCausalLM(SambaConfig.from_preset("tiny_moe", vocab_size=VOCABULARY)).train()
    store = rho1.score(model, small_documents(), tmp_path / "s", context=16, **SETTINGS)
    tokens = small_documents()[8]
    losses, _ = direct_losses(model.eval(), tokens, 16)
    np.testing.assert_allclose(store.nll(rho1.document_key(tokens), 0, 99), losses, atol=3e-5)


def test_packed_batches_are_whole_pieces() -> None:
    pieces = [(0, 0, 5), (0, 5, 9), (1, 0, 20), (2, 0, 3), (3, 0, 7)]
    assert list(packed_batches(pieces, 10)) == [pieces[:2], pieces[2:3], pieces[3:]]
    assert list(packed_batches([], 10)) == []


def test_rows_are_of_nearly_equal_length() -> None:
    lengths = np.array([5, 32, 31, 16, 32, 5, 30, 29, 5])
    batches = [batch.tolist() for batch in row_batches(lengths, 96)]
    assert batches == [[1, 4, 2], [6, 7], [3], [0, 5, 8]]


@pytest.mark.parametrize(
    "corpus",
    [
        [[1, 2, 3], [4, 5]],
        ({"input_ids": tokens, "text": "x"} for tokens in ([1, 2, 3], [4, 5])),
        (torch.tensor([1, 2, 3]), np.array([4, 5], np.uint16)),
    ],
    ids=["lists", "rows", "tensors"],
)
def test_any_iterable_of_documents_is_a_corpus(tmp_path: Path, corpus: Any) -> None:
    store = rho1.score(small_model(), corpus, tmp_path / "s", **SETTINGS)
    assert rho1.document_key([1, 2, 3]) in store
    assert store.manifest.predictions == 3


# Going on


class Seen(QuietReporter):
    """Remembers what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[WorkReport] = []
        self.warnings: list[str] = []

    def work(self, report: WorkReport) -> None:
        self.reports.append(report)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_only_what_is_missing_or_damaged_is_scored_again(tmp_path: Path) -> None:
    out = tmp_path / "s"
    score_small(out)
    whole = contents(out)
    names = sorted(name for name in whole if name.startswith("scores-"))
    assert len(names) > 4
    (out / names[0]).unlink()
    (out / names[1]).write_bytes(whole[names[1]][:-1])
    (out / names[3]).write_bytes(whole[names[2]])
    (out / "documents.safetensors").unlink()
    kept = {
        name: (out / name).stat().st_mtime_ns for name in names if name not in (names[0], names[1], names[3])
    }
    seen = Seen()
    score_small(out, reporter=seen)
    assert contents(out) == whole
    assert all((out / name).stat().st_mtime_ns == at for name, at in kept.items())
    assert [text.split(":")[0] for text in seen.warnings[-2:]] == [names[1], names[3]]
    assert "documents.safetensors was lost or damaged: written again" in seen.warnings[0]
    last = seen.reports[-1]
    assert (last.done, last.unit) == (last.total, "tokens")
    assert last.total == rho1.open_scores(out).manifest.predictions
    score_small(out, reporter=Seen())  # nothing to do


def test_changed_numbers_are_scored_again_if_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "s"
    score_small(out)
    whole = contents(out)
    path = out / "scores-00001.safetensors"
    path.write_bytes(whole[path.name][:-1] + b"x")
    score_small(out)
    assert contents(out) != whole, "headers alone do not tell"
    score_small(out, check=True)
    assert contents(out) == whole


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "context": ({"context": 8}, r"were begun with context 16, got 8; use the same, or another folder"),
    "entropy": ({"entropy": True}, r"entropy False, got True"),
    "dtype": ({"dtype": "bf16"}, r"dtype fp32, got bf16"),
    "threads": ({"threads": 2}, r"threads 1, got 2"),
    "part_tokens": ({"part_tokens": 99}, r"part_tokens 90, got 99"),
    "batch_tokens": ({"batch_tokens": 99}, r"batch_tokens 60, got 99"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_going_on_with_other_settings_is_refused(tmp_path: Path, name: str) -> None:
    score_small(tmp_path / "s")
    (tmp_path / "s" / "scores-00001.safetensors").unlink()
    changes, text = CHANGES[name]
    with pytest.raises(InputError, match=text):
        score_small(tmp_path / "s", **changes)


def test_going_on_with_another_model_or_corpus_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "s"
    score_small(out)
    settings = {**SETTINGS, "context": 16}
    with pytest.raises(InputError, match=r"begun with a model with fingerprint \w{64}, got \w{64}"):
        rho1.score(small_model(seed=1), small_documents(), out, **settings)
    changed = small_model()
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-6
    with pytest.raises(InputError, match=r"begun with a model with fingerprint"):
        rho1.score(changed, small_documents(), out, **settings)
    with pytest.raises(
        InputError, match=r"a corpus with digest .* \(23 documents of .* tokens there, 23 of .* here\)"
    ):
        rho1.score(small_model(), small_documents(seed=2), out, **settings)
    resolved = {**settings, "threads": None, "dtype": "auto"}
    rho1.score(small_model(), small_documents(), out, **resolved)  # what is not given is as it was


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"context": 0}, r"context: expected an integer of at least 1, got 0"),
        ({"workers": 0}, r"workers: expected an integer of at least 1, got 0"),
        ({"part_tokens": 1.5}, r"part_tokens: expected an integer of at least 1, got 1.5"),
        ({"dtype": "fp16"}, r"dtype: expected auto, fp32 or bf16, got 'fp16'"),
        ({"tokenizer": "/none.json"}, r"tokenizer: expected a tokenizers file at /none.json"),
        ({"tokenizer": 3}, r"tokenizer: expected a tokenizers.Tokenizer, .* got int"),
    ],
)
def test_a_wrong_argument_is_told(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        score_small(tmp_path / "s", **changes)


@pytest.mark.parametrize(
    ("corpus", "text"),
    [
        ([], r"expected a document of at least two tokens, got 0 documents of 0 tokens"),
        ([[1], [2]], r"expected a document of at least two tokens, got 2 documents of 2 tokens"),
        ([[1, 2], [3, VOCABULARY]], rf"expected token ids below {VOCABULARY}, .* got {VOCABULARY}"),
        ([[1, 2], [0.5, 1]], r"corpus: document 1: .*expected a flat sequence of integers"),
        ([{"ids": [1, 2]}], r"corpus: document 0: 'input_ids'"),
        ("text", r"corpus: expected a sequence of token-id sequences or a PreparedData, got str"),
        (7, r"corpus: expected a sequence of token-id sequences or a PreparedData, got int"),
    ],
)
def test_a_wrong_corpus_is_told(tmp_path: Path, corpus: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        rho1.score(small_model(), corpus, tmp_path / "s", **SETTINGS)
    assert [path.name for path in (tmp_path / "s").iterdir()] == [".lock"]


def test_a_wrong_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model: expected a SambaForCausalLM or .* got Linear"):
        rho1.score(torch.nn.Linear(2, 2), [[1, 2]], tmp_path / "s")
    with pytest.raises(InputError, match=r"expected weights in float32 or bfloat16, got torch.float64"):
        rho1.score(small_model().double(), [[1, 2]], tmp_path / "s")
    half = small_model().bfloat16()
    with pytest.raises(InputError, match=r"dtype: expected bf16 for a model with bfloat16 weights"):
        rho1.score(half, [[1, 2]], tmp_path / "s", dtype="fp32")
    assert rho1.score(half, [[1, 2]], tmp_path / "s").manifest.dtype == "bf16"


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(
        InputError, match=r"expected a new or empty folder, or one with scores, found mine.txt"
    ):
        score_small(tmp_path)
    with pytest.raises(InputError, match=r"cannot make folder .*mine.txt: (File exists|Not a directory)"):
        score_small(tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_full_disk_keeps_finished_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlm.methods.rho1 import worker

    score_small(tmp_path / "whole")
    written = []

    def full(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        original(path, *rest)

    original = worker.write_tensors
    monkeypatch.setattr(worker, "write_tensors", full)
    with pytest.raises(
        RunError, match=r"No space left on device; finished parts are untouched. Make room; then"
    ):
        score_small(tmp_path / "s")
    monkeypatch.undo()
    left = [path.name for path in (tmp_path / "s").iterdir()]
    assert [name for name in left if name.startswith("scores-")] == [path.name for path in written]
    assert not [name for name in left if "partial" in name]
    score_small(tmp_path / "s")
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
