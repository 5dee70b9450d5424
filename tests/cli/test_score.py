"""`fastlm score` and `fastlm train --loss slm` from the command line."""

from __future__ import annotations

import json
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch

from fastlm.methods import rho1
from fastlm.training import load_record
from fastlm_cli.score import _command
from tests.cli.test_cli import SMALL_FLAGS, launch, run
from tests.training.runs import write_text

SCORE = ["--context", "16", "--threads", "1", "--dtype", "fp32", "--part-tokens", "300"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text and a reference run; the folder's name has a space."""
    place = tmp_path_factory.mktemp("cli") / "a place"
    write_text(place / "text")
    done = run("train", "samba", "--data", place / "text", "--out", place / "run", *SMALL_FLAGS, "--quiet")
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def scores(place: Path) -> Path:
    done = run(
        "score", place / "run", "--data", place / "text", "--out", place / "scores", *SCORE, "--entropy"
    )
    assert done.returncode == 0, done.stderr
    assert "tokens in 4 of 4 parts" in done.stderr
    assert re.search(r"1,010 of 1,010 tokens · [\d,]+ tokens/s · 0:00 left", done.stderr)
    assert re.search(r"loss +mean \d\.\d{4} nats; quantiles 1% \d", done.stdout)
    return place / "scores"


def slm_flags(scores: Path, text: Path, out: Path) -> list[str | Path]:
    flags = [*SMALL_FLAGS]
    del flags[flags.index("--vocab-size") : flags.index("--vocab-size") + 2]
    return ["--data", text, "--out", out, *flags, "--loss", "slm", "--scores", scores]


def test_the_whole_way_from_a_reference_to_a_model(place: Path, scores: Path, tmp_path: Path) -> None:
    out = tmp_path / "slm"
    done = run(
        "train", "samba", *slm_flags(scores, place / "text", out), "--keep", "0.7", "--score", "ref_loss"
    )
    assert done.returncode == 0, done.stderr
    config = load_record(out).config
    assert (config.loss, config.score, config.keep, config.scores) == ("slm", "ref_loss", 0.7, scores)
    again = run("train", "samba", "--out", out, "--resume")
    assert again.returncode == 0
    said = run("generate", out, "--max-new-tokens", "4", "--seed", "1")
    assert said.returncode == 0


def test_a_stopped_selective_run_goes_on(place: Path, scores: Path, tmp_path: Path) -> None:
    out = tmp_path / "slm"
    flags = slm_flags(scores, place / "text", out)
    process = launch("train", "samba", *flags, "--steps", "100000")
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text()) < 1000:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f"To go on: fastlm train samba --out {out} --resume" in errors
    refused = run("train", "samba", "--out", out, "--resume", "--keep", "0.1", "--quiet")
    assert refused.returncode == 2
    assert "--keep: a resumed run keeps its settings: expected 0.6, got 0.1" in refused.stderr


def test_show_verifies_and_tells(place: Path, scores: Path) -> None:
    done = run("score", "--show", scores)
    assert done.returncode == 0
    assert f"scores      {scores} (4 files, whole)" in done.stdout
    assert "9 documents, 1,019 tokens, 1,010 of them predicted" in done.stdout
    found = json.loads(run("score", "--show", scores, "--json").stdout)
    store = rho1.open_scores(scores)
    values = torch.cat([torch.tensor(store.part("nll", part)) for part in range(4)])
    assert found["values"]["nll"]["mean"] == pytest.approx(float(values.double().mean()))
    assert found["values"]["nll"]["quantiles"]["0.5"] == pytest.approx(float(values.quantile(0.5)), abs=1e-6)
    assert found["values"]["entropy"].keys() == {"mean", "not_finite", "quantiles"}
    assert (found["documents"], found["context"], found["digest"]) == (9, 16, store.digest)


def test_a_damaged_file_is_told_with_the_command_that_repairs_it(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    flags = ["score", place / "run", "--data", place / "text", "--out", out, *SCORE, "--quiet"]
    assert run(*flags).returncode == 0
    path = out / "scores-00002.safetensors"
    whole = path.read_bytes()
    for content, extra in ((whole[:-4], []), (whole[:-1] + b"x", ["--check"])):
        path.write_bytes(content)
        done = run("score", "--show", out)
        assert done.returncode == 2
        told = re.search(r"run: (fastlm score .*)$", done.stderr.strip())
        assert told is not None
        repaired = run(*shlex.split(told[1])[1:], *extra, "--quiet")
        assert repaired.returncode == 0, repaired.stderr
        assert path.read_bytes() == whole


def test_the_command_to_go_on_repeats_what_was_given() -> None:
    command = _command(
        Path("/my run"),
        out=Path("s"),
        data=None,
        context=512,
        entropy=True,
        workers=3,
        threads=None,
        dtype="auto",
        held_out=0.03,
        max_bytes=5,
        batch_tokens=None,
        part_tokens=None,
    )
    out = shlex.quote(str(Path("s").absolute()))
    assert command == f"fastlm score '/my run' --out {out} --entropy --workers 3 --max-bytes 5"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_says_how_to_go_on(place: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    out = tmp_path / "s"
    flags = [*SCORE[:-2], "--part-tokens", "16", "--batch-tokens", "1"]
    arguments = ["score", place / "run", "--data", place / "text", "--out", out, *flags]
    process = launch(*arguments)
    deadline = time.monotonic() + 60
    while not any(out.glob("scores-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    told = re.search(r"Stopped; finished parts are kept. To go on: fastlm (score .*)$", errors.strip())
    assert told is not None
    assert "Traceback" not in errors
    assert not list(out.glob("*partial*"))
    shown = run("score", "--show", out)
    assert shown.returncode == 2
    assert "parts are missing; to score what is missing, run: fastlm score" in shown.stderr
    done = run(*shlex.split(told[1]), "--quiet")
    assert done.returncode == 0, done.stderr


def test_a_model_of_transformers_scores_too(place: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.24")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    flags = ["--data", place / "text", "--out", tmp_path / "s", *SCORE, "--quiet"]
    missing = run("score", tmp_path / "llama", *flags)
    assert missing.returncode == 2
    assert "tokenizer: expected a tokenizer.json, or a folder with one, got" in missing.stderr
    tokenizer = place / "run" / "model" / "tokenizer.json"
    (tmp_path / "llama" / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    done = run("score", tmp_path / "llama", *flags)
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM" in done.stdout
    trained = run("train", "samba", *slm_flags(tmp_path / "s", place / "text", tmp_path / "run"), "--quiet")
    assert trained.returncode == 0, trained.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["score"], "expected the folder of a reference model, got none"),
        (["score", "{place}/run"], "expected a folder for the scores, got none"),
        (["score", "{place}/run", "--show", "{tmp}"], "expected one of --show and a model with --out"),
        (["score", "--show", "{tmp}"], "expected a folder that `fastlm score` wrote"),
        (
            ["score", "{tmp}/none", "--out", "{tmp}/s"],
            "RUN: expected the folder of a run or a model, found none",
        ),
        (["score", "{tmp}", "--out", "{tmp}/s"], "RUN: expected a run"),
        (
            ["score", "{place}/run", "--out", "{tmp}/s", "--data", "{tmp}/no"],
            "--data: expected a folder or file",
        ),
        (
            ["score", "{place}/run", "--out", "{tmp}/s", "--context", "-1"],
            "expected a number of tokens or 0, got -1",
        ),
        (
            ["score", "{place}/run", "--out", "{place}/text"],
            "expected a new or empty folder, or one with scores",
        ),
        (["train", "samba", "--out", "{tmp}/r", "--keep", "0.5"], "keep needs loss slm, got loss ce"),
        (["train", "samba", "--out", "{tmp}/r", "--loss", "slm"], "scores must be given for score excess"),
        (
            ["train", "samba", "--out", "{tmp}/r", "--loss", "slm", "--keep", "1.5"],
            "--keep: Input should be less",
        ),
        (
            ["train", "samba", "--out", "{tmp}/r", "--init", "{place}/run"],
            "lr must be given with init, got none",
        ),
        (
            ["train", "samba", "--out", "{tmp}/r", "--init", "{tmp}/no", "--lr", "0.001"],
            "--init: expected the folder of a run or a model, found none",
        ),
        (
            ["train", "samba", "--out", "{tmp}/r", "--tokenizer", "{tmp}/no.json"],
            "tokenizer: expected a tokenizers file at",
        ),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_code_2(
    arguments: list[str], text: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERM", "dumb")
    done = run(*(word.format(tmp=tmp_path, place=place) for word in arguments))
    assert done.returncode == 2, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
