"""A run may die at any moment; what follows has the same bits as if nothing had happened."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest

from fastlm.training import InputError, RunError, load_record, resume, train
from fastlm.training.checkpoint import CheckpointFolder
from fastlm.training.log import RunLog
from tests.training.runs import STEPS, assert_same_bits, die_at_write, small_config, start, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text")


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(train, small_config(text), out)
    process.join(60)
    assert process.exitcode == 0
    return out


@pytest.fixture
def half_way(undisturbed: Path, tmp_path: Path) -> Path:
    """The same run as it was after step 8."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:08d}")
    record = load_record(out)
    record.status, record.result = "running", None
    record.save(out)
    assert CheckpointFolder(out).steps() == [12]
    return out


def finish(out: Path) -> None:
    process = start(resume, out)
    process.join(60)
    assert process.exitcode == 0
    assert load_record(out).status == "finished"


def steps_logged(out: Path) -> list[int]:
    return [entry["step"] for entry in RunLog(out).read() if entry["kind"] == "step"]


# Killed


def test_kill_9_at_random_moments_changes_nothing(text: Path, undisturbed: Path, tmp_path: Path) -> None:
    out, chance = tmp_path / "run", random.Random(1)
    process, kills = start(train, small_config(text), out), 0
    while kills < 6:
        time.sleep(chance.uniform(0.05, 0.5))
        if process.exitcode == 0:
            break
        process.kill()
        process.join()
        kills += 1
        begun = (out / "run.json").exists()
        process = start(resume, out) if begun else start(train, small_config(text), out)
    process.join(60)
    assert process.exitcode == 0
    assert kills >= 1
    assert_same_bits(out, undisturbed)
    assert steps_logged(out) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("number", [1, 3, 6, 14, 22, 27, 29, 47])
def test_death_before_any_write_leaves_a_run_that_resumes(
    text: Path, undisturbed: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "run"
    process = start(die_at_write, number, train, small_config(text), out)
    process.join(60)
    assert process.exitcode == 77, "the run has fewer writes than this: choose a smaller number"
    if (out / "run.json").exists():
        finish(out)
    else:
        process = start(train, small_config(text), out)
        process.join(60)
        assert process.exitcode == 0
    assert_same_bits(out, undisturbed)
    assert not [path for path in out.rglob("*") if ".partial" in path.name]


def test_a_time_limited_run_keeps_its_first_schedule(text: Path, tmp_path: Path) -> None:
    config = small_config(text, steps=None, minutes=2.5 / 60, checkpoint_steps=5)
    out, twin = tmp_path / "run", tmp_path / "twin"
    process = start(train, config, out)
    deadline = time.monotonic() + 60
    while not CheckpointFolder(out).steps() or load_record(out).schedule is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    schedule = load_record(out).schedule
    assert schedule is not None
    shutil.copytree(out, twin)
    finish(twin)
    process = start(resume, out)
    time.sleep(0.4)
    process.kill()
    process.join()
    finish(out)
    assert load_record(out).schedule == schedule
    assert load_record(out).step == schedule["total_steps"]
    assert_same_bits(out, twin)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends(
    text: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    process = start(train, small_config(text), out)
    deadline = time.monotonic() + 60
    while len(steps_logged(out)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid or 0, number)
    process.join(60)
    assert process.exitcode == 0, "the library returns; only the command line makes an exit code of it"
    record = load_record(out)
    assert record.status == "interrupted"
    assert record.environment["stopped_by"] == number.name
    assert CheckpointFolder(out).steps()[-1] == record.step < STEPS
    finish(out)
    assert "stopped_by" not in load_record(out).environment
    assert_same_bits(out, undisturbed)


# Full disk


def fill_disk_after_first_checkpoint(limit: int, config: object, out: Path) -> None:
    """Lets no file grow beyond `limit` bytes once a checkpoint is there; reports the error in a file."""
    save = CheckpointFolder.save

    def save_then_fill(self: CheckpointFolder, *arguments: object) -> Path:
        path = save(self, *arguments)  # type: ignore[arg-type]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return path

    CheckpointFolder.save = save_then_fill  # type: ignore[method-assign, assignment]
    try:
        train(config, out)  # type: ignore[arg-type]
    except RunError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (out.parent / "error.txt").write_text(str(error))


def test_a_full_disk_is_a_clear_error_and_loses_nothing(
    text: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(fill_disk_after_first_checkpoint, 100_000, small_config(text), out)
    process.join(60)
    message = (tmp_path / "error.txt").read_text()
    assert message.startswith("checkpoint: could not write step 8 to")
    assert "File too large" in message
    assert (
        f"the checkpoint of step 4 is whole. Make room, then: fastlm train samba --out {out} --resume"
        in message
    )
    assert CheckpointFolder(out).steps() == [4]
    finish(out)
    assert_same_bits(out, undisturbed)


def test_a_disk_too_full_for_the_log_is_a_clear_error(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(fill_disk_after_first_checkpoint, 10, small_config(text), out)
    process.join(60)
    message = (tmp_path / "error.txt").read_text()
    assert f"could not write to {out}: File too large; whole checkpoints are untouched" in message
    assert CheckpointFolder(out).steps() == [4]


# Damaged and foreign checkpoints


def newest(out: Path) -> Path:
    checkpoints = CheckpointFolder(out)
    return checkpoints.folder(checkpoints.steps()[-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "model.safetensors: its content changed": lambda folder: flip(folder / "model.safetensors"),
    "optimizer.safetensors: its content changed": lambda folder: flip(folder / "optimizer.safetensors"),
    "optimizer.safetensors: expected": lambda folder: os.truncate(folder / "optimizer.safetensors", 1000),
    "model.safetensors: No such file": lambda folder: (folder / "model.safetensors").unlink(),
    "state.json cannot be read": lambda folder: (folder / "state.json").write_text("{"),
    "state.json cannot be read: No such file": lambda folder: (folder / "state.json").unlink(),
}


@pytest.mark.parametrize("text_of_error", DAMAGES)
def test_a_damaged_checkpoint_is_a_clear_error(half_way: Path, text_of_error: str) -> None:
    DAMAGES[text_of_error](newest(half_way))
    with pytest.raises(InputError) as caught:
        resume(half_way)
    assert text_of_error in str(caught.value)
    assert "is damaged" in str(caught.value)
    assert load_record(half_way).status != "finished"


def test_the_error_names_the_earlier_checkpoint_to_go_on_from(half_way: Path, undisturbed: Path) -> None:
    folder = newest(half_way)
    shutil.copytree(folder, folder.with_name("step-00000013"))
    flip(folder.with_name("step-00000013") / "model.safetensors")
    with pytest.raises(InputError, match=r"delete that folder and --resume to go on from step 12"):
        resume(half_way)
    shutil.rmtree(folder.with_name("step-00000013"))
    finish(half_way)
    assert_same_bits(half_way, undisturbed)


def test_a_foreign_checkpoint_is_a_clear_error(half_way: Path, text: Path, tmp_path: Path) -> None:
    (newest(half_way) / "state.json").write_text('{"format": "somebody-else-7"}')
    with pytest.raises(
        InputError, match=r"expected format fastlm-checkpoint-1 in .*, found 'somebody-else-7'"
    ):
        resume(half_way)
    other = tmp_path / "other"
    train(small_config(text, steps=2, vocab_size=280), other)
    shutil.rmtree(newest(half_way))
    shutil.copytree(newest(other), half_way / "checkpoints" / "step-00000012")
    with pytest.raises(InputError, match=r"is of another model than .*run.json: size mismatch"):
        resume(half_way)


@pytest.mark.parametrize(
    ("name", "text_of_error"),
    [
        ("data/train-00000.npy", "token shards: .* are lost or damaged"),
        ("data/tokenizer.json", "expected a tokenizers file at .*; start a new run"),
        ("data/manifest.json", "manifest.json is missing or damaged"),
    ],
)
def test_lost_data_is_a_clear_error(half_way: Path, name: str, text_of_error: str) -> None:
    (half_way / name).unlink()
    with pytest.raises(RunError, match=text_of_error):
        resume(half_way)


# The folder of a run


def test_a_finished_run_is_returned_as_it_is(undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    assert resume(undisturbed).result == load_record(undisturbed).result
    changed = [path.name for path, at in before.items() if path.stat().st_mtime_ns != at]
    assert set(changed) <= {".lock"}


def test_a_folder_that_holds_something_is_not_overwritten(
    undisturbed: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"already holds a run \(finished, step 14 of 14\); add --resume"):
        train(small_config(text), undisturbed)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match=r"expected a new or empty folder, found mine.txt"):
        train(small_config(text), tmp_path)
    with pytest.raises(InputError, match=r"cannot make folder .*: (File exists|Not a directory)"):
        train(small_config(text), tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_resuming_needs_a_run_and_its_own_settings(half_way: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected the folder of a run .*, found none at"):
        resume(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"--lr: a resumed run keeps its settings: expected 0.002, got 0.1"):
        resume(half_way, given={"lr": 0.1})
    (half_way / "run.json").write_text('{"format": "fastlm-run-9"}')
    with pytest.raises(InputError, match=r"expected format fastlm-run-1 in .*, found 'fastlm-run-9'"):
        resume(half_way)
    (half_way / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run record: .* cannot be read"):
        resume(half_way)


def hold(out: Path) -> None:
    from fastlm.training.run_folder import RunLock

    lock = RunLock(out)
    (out.parent / "held").touch()
    time.sleep(60)
    lock.release()


def test_two_processes_do_not_train_in_one_folder(half_way: Path) -> None:
    process = start(hold, half_way)
    while not (half_way.parent / "held").exists():
        time.sleep(0.01)
    with pytest.raises(InputError, match=rf"another process is training in .*: process {process.pid}"):
        resume(half_way)
    process.kill()
    process.join()
    finish(half_way)  # the lock of a killed process is gone with it
