"""Runs that take a tokenizer, or the weights of another run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastlm.training import (
    CrossEntropy,
    InputError,
    RunError,
    TrainConfig,
    load_record,
    make_config,
    resume,
    train,
)
from fastlm.training.loading import load_run
from fastlm.training.log import RunLog
from fastlm.training.progress import QuietReporter
from fastlm.training.tokenizer import END_OF_TEXT, find_tokenizer, load_given_tokenizer, spelling_of
from tests.training.runs import assert_same_bits, small_config, start, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text")


@pytest.fixture(scope="module")
def earlier(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("earlier") / "run"
    train(small_config(text, steps=6), out)
    return out


def continued(text: Path, earlier: Path, **changes: Any) -> TrainConfig:
    fixed = {"init": earlier, "lr": 1e-3, "preset": "demo", "vocab_size": None}
    return small_config(text, **{**fixed, **changes})


# Tokenizer


@pytest.mark.parametrize("place", ["", "model", "model/tokenizer.json", "data/tokenizer.json", "checkpoints"])
def test_a_tokenizer_is_taken_as_it_is(text: Path, earlier: Path, tmp_path: Path, place: str) -> None:
    path = earlier / place
    if place == "checkpoints":
        path = max(path.iterdir())
    other = write_text(tmp_path / "other")
    (other / "more.py").write_text("xyz = 'quite another text, with words of its own'\n" * 30)
    record = train(small_config(other, tokenizer=path, vocab_size=None, steps=1), tmp_path / "run")
    saved = (tmp_path / "run" / "model" / "tokenizer.json").read_text()
    assert saved == (earlier / "model" / "tokenizer.json").read_text()
    assert record.data is not None
    assert record.data["vocab_size"] == load_run(earlier).tokenizer.get_vocab_size()


def byte_level(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_tokenizers_without_bytes_or_mark_are_refused(tmp_path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    full = {END_OF_TEXT: 0, **{letter: 1 + i for i, letter in enumerate(letters)}}
    cases = {
        "mark": (
            {letter: i for i, letter in enumerate(letters)},
            r"expected the token <\|endoftext\|>, found none",
        ),
        "bytes": ({**full, "▁the": 257}, r"expected byte-level BPE in .*, found the token '▁the'"),
        "holes": ({**full, "ab": 300}, r"expected token ids 0 to 257 in .*, found ids up to 300"),
    }
    for name, (vocabulary, told) in cases.items():
        tokenizer = byte_level(vocabulary)
        if END_OF_TEXT in vocabulary:
            tokenizer.add_special_tokens([END_OF_TEXT])
        tokenizer.save(str(tmp_path / f"{name}.json"))
        with pytest.raises(InputError, match=told):
            load_given_tokenizer(tmp_path / f"{name}.json")
    with pytest.raises(InputError, match=r"expected a tokenizer.json, or a folder with one, got"):
        find_tokenizer(tmp_path)


def test_every_added_token_is_spelt_as_its_text(earlier: Path) -> None:
    tokenizer = load_run(earlier).tokenizer
    count = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<|im start|>"])
    table = spelling_of(tokenizer)
    assert len(table) == count + 1
    assert table[tokenizer.token_to_id("<|im start|>")] == b"<|im start|>"
    assert table[tokenizer.token_to_id(END_OF_TEXT)] == b""


# Weights


def test_a_run_begins_where_another_ended(text: Path, earlier: Path, tmp_path: Path) -> None:
    record = train(continued(text, earlier), tmp_path / "run")
    ended = load_record(earlier).result
    assert ended is not None
    log = RunLog(tmp_path / "run").read()
    assert (log[0]["kind"], log[0]["step"]) == ("evaluation", 0)
    last = [entry for entry in RunLog(earlier).read() if entry["kind"] == "evaluation"][-1]
    assert log[0]["loss"] == pytest.approx(last["loss"], rel=0.02)  # of a shorter evaluation
    loaded = load_run(tmp_path / "run")
    assert loaded.model.config == load_run(earlier).model.config
    assert record.config.init == earlier
    assert record.parameters == load_record(earlier).parameters


def test_no_step_leaves_the_weights_alone(text: Path, earlier: Path, tmp_path: Path) -> None:
    train(continued(text, earlier, lr=1e-12, steps=1, weight_decay=0.0), tmp_path / "run")
    first, second = load_run(earlier).model.state_dict(), load_run(tmp_path / "run").model.state_dict()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-9, rtol=0)


class _Deadly(QuietReporter):
    """Kills the process after a step."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def step(self, report: Any) -> None:
        if report.step == self.number:
            os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(config: TrainConfig, out: Path, number: int) -> None:
    train(config, out, reporter=_Deadly(number))


@pytest.mark.parametrize("number", [2, 7])
def test_a_killed_run_needs_the_other_one_no_more(
    text: Path, earlier: Path, tmp_path: Path, number: int
) -> None:
    """Step 2 is before the first checkpoint, step 7 is after it."""
    other = shutil.copytree(earlier, tmp_path / "earlier")
    config = continued(text, other)
    process = start(train, config, tmp_path / "whole")
    process.join(60)
    assert process.exitcode == 0
    process = start(train_and_die, config, tmp_path / "run", number)
    process.join(60)
    shutil.rmtree(other)
    process = start(resume, tmp_path / "run")
    process.join(60)
    assert process.exitcode == 0
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def test_a_lost_copy_is_a_clear_error(text: Path, earlier: Path, tmp_path: Path) -> None:
    process = start(train_and_die, continued(text, earlier), tmp_path / "run", 2)
    process.join(60)
    (tmp_path / "run" / "init" / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(RunError, match=r"init: the model in .*init cannot be loaded: .*; start a new run"):
        resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "text_of_error"),
    [
        ({"lr": None}, r"lr must be given with init, got none"),
        (
            {"preset": "tiny"},
            r"preset must not be given with init, got tiny: the model of init has its own size",
        ),
        ({"vocab_size": 300}, r"vocab_size must not be given with init: the model of init has its own"),
        ({"num_experts": 4}, r"num_experts must not be given with init"),
        (
            {"vocab_size": 300, "init": None, "tokenizer": "x"},
            r"vocab_size must not be given with tokenizer, got 300",
        ),
    ],
)
def test_what_init_decides_cannot_be_given(
    text: Path, earlier: Path, changes: dict[str, Any], text_of_error: str
) -> None:
    with pytest.raises(InputError, match=text_of_error):
        continued(text, earlier, **changes)


def test_init_and_tokenizer_must_agree(text: Path, earlier: Path, tmp_path: Path) -> None:
    train(small_config(text, steps=1, vocab_size=280), tmp_path / "other")
    with pytest.raises(
        InputError, match=r"--tokenizer: expected the one that the model of --init .* got another"
    ):
        train(continued(text, earlier, tokenizer=tmp_path / "other"), tmp_path / "run")
    with pytest.raises(InputError, match=r"--init: expected the folder of a run or a model, found none at"):
        train(continued(text, tmp_path / "none"), tmp_path / "run2")
    assert not (tmp_path / "run2").exists()


# Records of earlier versions


def test_a_record_without_the_new_settings_still_loads(text: Path, earlier: Path, tmp_path: Path) -> None:
    out = shutil.copytree(earlier, tmp_path / "run")
    record = json.loads((out / "run.json").read_text())
    for name in ("tokenizer", "init", "loss", "scores", "score", "keep"):
        del record["config"][name]
    del record["objective"]
    (out / "run.json").write_text(json.dumps(record))
    assert load_record(out).config == load_record(earlier).config
    assert resume(out).status == "finished"
    make_config(record["config"])


def test_the_plain_objective_may_be_given(text: Path, earlier: Path, tmp_path: Path) -> None:
    train(small_config(text, steps=6), tmp_path / "run", objective=CrossEntropy())
    assert_same_bits(tmp_path / "run", earlier)
