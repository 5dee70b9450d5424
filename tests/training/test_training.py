"""The loop learns, counts right, and its result is what the saved model gives."""

from __future__ import annotations

import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm.models.samba import SambaForCausalLM
from fastlm.training import InputError, RunError, RunRecord, load_record, objective, resume, train, trainer
from fastlm.training.batches import IGNORE_INDEX, PackedSampler, pack
from fastlm.training.checkpoint import CheckpointFolder
from fastlm.training.data import open_data
from fastlm.training.evaluation import evaluate, held_out_rows, held_out_text, row_loss
from fastlm.training.log import RunLog
from fastlm.training.progress import PlainReporter, StepReport
from tests.training.runs import small_config, write_text


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> object:
    """Small matrices: one thread is fastest, and a training run sets the number for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text")


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    torch.manual_seed(0)
    train(small_config(text, steps=60, lr=0.01, checkpoint_steps=None, final_eval_tokens=10**6), out)
    return out


def curve(out: Path) -> list[float]:
    return [entry["loss"] for entry in RunLog(out).read() if entry["kind"] == "step"]


# Learning and counting


def test_training_learns(trained: Path) -> None:
    losses = curve(trained)
    assert losses[0] == pytest.approx(math.log(300), abs=0.4), "an untrained model knows nothing"
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    evaluations = [e["bits_per_byte"] for e in RunLog(trained).read() if e["kind"] == "evaluation"]
    assert len(evaluations) == 4  # before, two on the way, after
    assert evaluations[-1] < 0.7 * evaluations[0]


def test_the_result_is_what_the_saved_model_gives(trained: Path) -> None:
    record, data = load_record(trained), open_data(trained / "data")
    model = SambaForCausalLM.from_pretrained(trained / "model")
    config = record.config
    rows = held_out_rows(data, row_tokens=config.micro_batch, seq_len=config.seq_len, max_tokens=10**6)
    again = evaluate(model, data, rows, dtype="fp32")
    assert record.result is not None
    assert again.bits_per_byte == pytest.approx(record.result["bits_per_byte"], rel=1e-5)
    assert again.bytes == record.result["held_out_bytes"] == data.summary.held_out_bytes
    assert not model.training


def test_bits_per_byte_is_about_the_very_bytes_of_the_files(trained: Path, text: Path) -> None:
    data = open_data(trained / "data")
    rows = held_out_rows(data, row_tokens=64, seq_len=16, max_tokens=10**6)
    read = sorted(held_out_text(data, rows))
    assert read == sorted((text / name).read_bytes() for name in data.summary.held_out_names)


@pytest.mark.parametrize("max_tokens", [2, 65, 150, 10**6])
@pytest.mark.parametrize("row_tokens", [2, 17, 64])
def test_bits_per_byte_counts_the_bytes_of_the_predicted_tokens(
    trained: Path, row_tokens: int, max_tokens: int
) -> None:
    """However the text is cut into rows, and where a short evaluation ends within a document."""
    data = open_data(trained / "data")
    model = SambaForCausalLM.from_pretrained(trained / "model")
    rows = held_out_rows(data, row_tokens=row_tokens, seq_len=16, max_tokens=max_tokens)
    done = evaluate(model, data, rows, dtype="fp32")
    assert done.bytes == len(b"".join(held_out_text(data, rows)))


def test_a_uniform_model_pays_for_every_token(trained: Path) -> None:
    """Sum over targets by hand: tokens · log2(V) bits over the bytes."""
    data = open_data(trained / "data")
    model = SambaForCausalLM.from_pretrained(trained / "model")
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    rows = held_out_rows(data, row_tokens=64, seq_len=16, max_tokens=10**6)
    done = evaluate(model, data, rows, dtype="fp32")
    tokens = data.held_out.num_tokens - data.held_out.num_documents
    assert done.tokens == tokens
    expected = tokens * math.log2(data.vocab_size) / data.summary.held_out_bytes
    assert done.bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_a_packed_row_is_the_sum_of_its_pieces(trained: Path) -> None:
    """States restart at each piece."""
    data = open_data(trained / "data")
    model = SambaForCausalLM.from_pretrained(trained / "model")
    row = PackedSampler(data.train, row_tokens=100, seq_len=16, seed=3).row(1)
    bounds = row.cu_seqlens.tolist()
    with torch.no_grad():
        total = row_loss(model, row, "fp32")
        logits = torch.cat([model(row.input_ids[:, a:b]).logits[0] for a, b in pairwise(bounds)])
    nats = torch.nn.functional.cross_entropy(
        logits, row.shift_labels[0], ignore_index=IGNORE_INDEX, reduction="sum"
    )
    torch.testing.assert_close(total, nats, rtol=1e-4, atol=1e-3)
    assert 0 < row.num_targets <= 100


def test_gradient_accumulation_is_one_large_batch(text: Path, tmp_path: Path) -> None:
    """Two short rows are a long one, but for states that restart."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(small_config(text, steps=3, batch_tokens=64, micro_batch_tokens=64, seq_len=16), whole)
    train(small_config(text, steps=3, batch_tokens=64, micro_batch_tokens=32, seq_len=16), parts)
    assert curve(parts) == pytest.approx(curve(whole), rel=0.02)
    first = [next(e for e in RunLog(out).read() if e["kind"] == "step") for out in (whole, parts)]
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=0.1), "a wrong scale would show"


def test_the_seed_decides_everything(text: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(hash(name) % 1000)  # what happened before must not matter
        train(small_config(text, steps=3, seed=seed), tmp_path / name)
    assert curve(tmp_path / "a") == curve(tmp_path / "b") != curve(tmp_path / "c")


def test_bf16_trains_on_fp32_weights(text: Path, tmp_path: Path) -> None:
    record = train(small_config(text, steps=3, dtype="bf16"), tmp_path / "half")
    train(small_config(text, steps=3), tmp_path / "full")
    assert record.dtype == "bf16"
    model = SambaForCausalLM.from_pretrained(tmp_path / "half" / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert curve(tmp_path / "half") != curve(tmp_path / "full")
    assert curve(tmp_path / "half") == pytest.approx(curve(tmp_path / "full"), rel=0.02)


def test_auto_is_bf16_only_where_the_cpu_has_it(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(text, dtype="auto")
    for level, expected in (
        ("default", "fp32"),
        ("avx2", "fp32"),
        ("avx512", "fp32"),
        ("avx512_bf16", "bf16"),
    ):
        monkeypatch.setattr(fastlm, "cpu_capability", lambda level=level: level)
        assert trainer.resolve_dtype(config) == expected
    assert trainer.resolve_dtype(small_config(text, dtype="fp32")) == "fp32"


def test_the_record_tells_how_to_do_it_again(trained: Path, text: Path) -> None:
    record = load_record(trained)
    assert isinstance(record, RunRecord)
    assert record.status == "finished"
    assert record.config == small_config(
        text, steps=60, lr=0.01, checkpoint_steps=None, final_eval_tokens=10**6
    )
    assert record.environment["build_info"] == fastlm.build_info()
    assert record.environment["versions"]["torch"] == torch.__version__
    assert {"git_commit", "machine", "cpu_capability", "python"} <= set(record.environment)
    assert record.data is not None
    assert record.data["digest"]
    assert record.step == 60
    assert record.tokens == 60 * 64


# Bad input


def test_an_unknown_preset_is_told_before_anything_is_made(text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--preset: .*demo.* got 'huge'"):
        train(small_config(text, preset="huge"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_ends_the_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    calls = 0

    def spoiled(model: SambaForCausalLM, row: object, dtype: str, *routing: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = row_loss(model, row, dtype, *routing)  # type: ignore[arg-type]
        if calls < 11:  # two passes a step: the sixth step is the first broken one
            return loss
        return loss * float("nan") if broken == "loss" else loss + (loss - loss.detach()) * float("inf")

    monkeypatch.setattr(objective, "row_loss", spoiled)
    with pytest.raises(
        RunError, match=r"training: step 5 gave loss .* the checkpoint of step 4 is from before"
    ):
        train(small_config(text), tmp_path / "run")
    monkeypatch.undo()
    assert resume(tmp_path / "run").status == "finished"


def test_text_shorter_than_a_step_is_repeated_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("only a line or two\n" * 2)
    seen: list[str] = []

    class Listener(PlainReporter):
        def warn(self, text: str) -> None:
            seen.append(text)

    record = train(small_config(tmp_path / "text", steps=2), tmp_path / "run", reporter=Listener())
    assert record.status == "finished"
    assert any("shorter than one step" in line for line in seen)


def test_the_reporter_hears_every_step(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports: list[StepReport] = []

    class Listener(PlainReporter):
        def step(self, report: StepReport) -> None:
            reports.append(report)
            super().step(report)

    train(small_config(text, steps=3), tmp_path / "run", reporter=Listener(seconds=0))
    assert [report.step for report in reports] == [1, 2, 3]
    assert reports[-1].total_steps == 3
    assert reports[-1].seconds_left == 0
    shown = capsys.readouterr().err
    for word in ("step 3/3", "tokens/s", "loss", "bits/byte", "held-out", "0:00 left"):
        assert word in shown


def test_resuming_under_another_cpu_level_warns(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    record = load_record(out)
    record.status = "interrupted"
    record.environment["cpu_capability"] = "another"
    record.save(out)
    seen: list[str] = []
    monkeypatch.setattr("fastlm.training.trainer.QuietReporter.warn", lambda self, text: seen.append(text))
    resume(out)
    assert any("the run began with CPU level another" in line for line in seen)


def test_a_row_without_targets_is_no_division_by_zero(tmp_path: Path) -> None:
    from tests.training.test_batches import make_store

    store = make_store(tmp_path, [2, 2])
    assert pack(store, [(0, 1, 2), (1, 1, 2)]).num_targets == 0


# Checkpoints


@pytest.mark.parametrize(("keep", "left"), [(0, [4, 8, 12, 14]), (1, [14]), (3, [8, 12, 14])])
def test_as_many_checkpoints_stay_as_asked_for(keep, left, text: Path, tmp_path: Path) -> None:
    train(small_config(text, keep_checkpoints=keep), tmp_path / "run")
    assert CheckpointFolder(tmp_path / "run").steps() == left
