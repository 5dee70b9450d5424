"""Text out of a trained run: from every kind of folder, reproducible, streamed in whole characters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.training import InputError, train
from fastlm.training.generation import generate_text
from fastlm.training.loading import load_run
from tests.training.runs import small_config, write_text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generation")
    before = torch.get_num_threads()
    train(small_config(write_text(root / "text"), steps=6, checkpoint_steps=3), root / "run")
    torch.set_num_threads(before)
    return root / "run"


def test_every_folder_of_a_run_can_be_loaded(run: Path, tmp_path: Path) -> None:
    assert load_run(run).folder == run / "model"
    assert load_run(run / "model").folder == run / "model"
    checkpoint = run / "checkpoints" / "step-00000003"
    assert load_run(checkpoint).folder == checkpoint
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    shutil.rmtree(unfinished / "model")
    loaded = load_run(unfinished)
    assert loaded.folder == unfinished / "checkpoints" / "step-00000006"
    same = zip(loaded.model.parameters(), load_run(run).model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_the_same_seed_gives_the_same_text(run: Path) -> None:
    loaded = load_run(run)
    texts = {generate_text(loaded, "def ", max_new_tokens=12, seed=seed).text for seed in (1, 1, 2, 3)}
    assert len(texts) == 3
    greedy = {generate_text(loaded, "def ", max_new_tokens=12, temperature=0).text for _ in range(2)}
    assert len(greedy) == 1


@pytest.mark.parametrize("prompt", ["", "def ", "Größe → 🙂", "\n\n"])
def test_streamed_pieces_are_the_text(run: Path, prompt: str) -> None:
    pieces: list[str] = []
    result = generate_text(load_run(run), prompt, max_new_tokens=40, seed=5, on_text=pieces.append)
    assert "".join(pieces) == result.text
    assert result.prompt == prompt
    assert result.num_tokens == 40 or result.ended


def test_generation_ends_with_the_document(run: Path) -> None:
    loaded = load_run(run)
    tokens = iter([loaded.tokenizer.encode("ab").ids[0], loaded.end_token, 300])
    loaded.model.generate = lambda *a, **k: (torch.tensor([t]) for t in tokens)  # type: ignore[method-assign]
    result = generate_text(loaded, "x", max_new_tokens=9)
    assert result.ended
    assert result.num_tokens == 2
    assert "<|endoftext|>" not in result.text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens: expected at least 1, got 0"),
        ({"temperature": -1.0}, "--temperature: expected a number of at least 0, got -1.0"),
        ({"temperature": float("nan")}, "--temperature: expected a number of at least 0, got nan"),
        ({"top_k": 0}, "--top-k: expected at least 1, got 0"),
        ({"top_p": 1.5}, r"--top-p: expected a number in \(0, 1\], got 1.5"),
        ({"seed": -1}, "--seed: expected a number in"),
        ({"prompt": "\udcff"}, "--prompt: expected UTF-8 text, got '.udcff' at 0"),
    ],
)
def test_a_wrong_option_is_a_clear_error(run: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        generate_text(load_run(run), options.pop("prompt", "x"), **options)


def test_what_is_no_model_is_a_clear_error(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"RUN: expected the folder of a run or a model, found none at"):
        load_run(tmp_path / "none")
    with pytest.raises(InputError, match=r"found neither; a run that has just begun has no checkpoint yet"):
        load_run(tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(run / "model", bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"expected tokenizer.json beside the model in"):
        load_run(bare)
    (bare / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer: expected a tokenizers file"):
        load_run(bare)
    (bare / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(InputError, match=r"RUN: the model in .* cannot be loaded: .*model.safetensors"):
        load_run(bare)
    (bare / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r'RUN: the model in .* cannot be loaded: .*must be "fastlm_samba"'):
        load_run(bare)
