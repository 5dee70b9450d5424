"""Processes that score together, die and are followed by others leave the bytes of one that was never disturbed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.methods import rho1
from fastlm.methods.rho1 import crew, part_scorer
from fastlm.training import RunError
from fastlm.training.progress import QuietReporter
from tests.methods.rho1.scored import contents, score_small
from tests.training.runs import start

SLOW_WORKER = """
import os, pathlib, sys, time
from fastlm.methods.rho1.part_scorer import PartScorer
from fastlm.methods.rho1.worker import main
score, log = PartScorer.score, pathlib.Path(sys.argv[1]).with_suffix(".log")
def slow(self, part, between):
    with log.open("a") as handle:
        handle.write(f"{os.getpid()} {part}\\n")
    for _ in range(10):
        time.sleep(0.02)
        between(0)
    return score(self, part, between)
PartScorer.score = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "s"
    process = start(score_small, out)
    process.join(60)
    assert process.exitcode == 0
    return out


def assert_same(out: Path, undisturbed: Path) -> None:
    assert contents(out) == contents(undisturbed)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lines(log: Path) -> list[list[str]]:
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.slow
def test_three_workers_write_the_bytes_of_one(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "_PROGRAM", SLOW_WORKER)
    out = tmp_path / "s"
    score_small(out, workers=3)
    assert_same(out, undisturbed)
    done = lines(tmp_path / "s.log")
    assert len({worker for worker, _ in done}) == 3
    assert sorted(int(part) for _, part in done) == list(range(len(rho1.open_scores(out).manifest.parts)))


def linger_in_part(number: int, out: Path, mark: Path) -> None:
    """Scores, and stops for ever after the first batch of one part."""
    between_batches = part_scorer.PartScorer.score

    def score(self: Any, part: int, between: Any) -> Any:
        def lingering(predictions: int) -> None:
            between(predictions)
            if part == number:
                mark.touch()
                time.sleep(600)

        return between_batches(self, part, lingering)

    part_scorer.PartScorer.score = score  # type: ignore[method-assign]
    score_small(out)


@pytest.mark.parametrize("number", [0, 3])
def test_kill_9_loses_one_part_and_the_next_process_takes_it(
    undisturbed: Path, tmp_path: Path, number: int
) -> None:
    out, mark = tmp_path / "s", tmp_path / "mark"
    process = start(linger_in_part, number, out, mark)
    wait_for(mark.exists)
    process.kill()
    process.join()
    finished = sorted(path.name for path in out.glob("scores-*"))
    assert finished == [f"scores-{part:05d}.safetensors" for part in range(number)]
    before = {name: (out / name).stat().st_mtime_ns for name in finished}
    process = start(score_small, out)
    process.join(60)
    assert process.exitcode == 0
    assert_same(out, undisturbed)  # no left-over of the dead process either
    assert all((out / name).stat().st_mtime_ns == at for name, at in before.items())


def test_two_commands_on_one_folder_share_the_work(undisturbed: Path, tmp_path: Path) -> None:
    out, mark = tmp_path / "s", tmp_path / "mark"
    first = start(linger_in_part, 2, out, mark)
    wait_for(mark.exists)
    second = start(score_small, out)
    everything = {path.name for path in undisturbed.glob("scores-*")}
    wait_for(
        lambda: (
            {p.name for p in out.glob("scores-*.safetensors")} == everything - {"scores-00002.safetensors"}
        )
    )
    assert second.is_alive(), "it waits for the part that the other one has"
    first.kill()
    first.join()
    second.join(60)  # and takes it when that one dies
    assert second.exitcode == 0
    assert_same(out, undisturbed)


class Warnings(QuietReporter):
    """Remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


def kill_when(log: Path, how_many: int, number: signal.Signals) -> threading.Thread:
    """Sends a signal to the first workers that are inside a part."""

    def watch() -> None:
        killed: set[str] = set()
        deadline = time.monotonic() + 60
        while len(killed) < how_many and time.monotonic() < deadline:
            for worker, _ in lines(log):
                if worker not in killed and len(killed) < how_many:
                    killed.add(worker)
                    os.kill(int(worker), number)
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_others_take_the_part_of_a_dead_worker(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(crew, "_PROGRAM", SLOW_WORKER)
    out, seen = tmp_path / "s", Warnings()
    thread = kill_when(tmp_path / "s.log", 1, number)
    score_small(out, workers=2, reporter=seen)
    thread.join()
    assert_same(out, undisturbed)
    assert len(seen.texts) == 1
    assert f"by {number.name}; 1 of 2 workers go on with its part" in seen.texts[0]


@pytest.mark.slow
def test_no_worker_left_is_an_error_and_the_rest_can_be_scored(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "_PROGRAM", SLOW_WORKER)
    out = tmp_path / "s"
    thread = kill_when(tmp_path / "s.log", 2, signal.SIGKILL)
    with pytest.raises(
        RunError, match=r"all 2 workers ended .*; finished parts are kept, to score the rest, call"
    ):
        score_small(out, workers=2, reporter=Warnings())
    thread.join()
    monkeypatch.undo()
    score_small(out)
    assert_same(out, undisturbed)


def test_an_error_in_a_worker_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_PROGRAM", "print('error InputError: no good', flush=True)")
    with pytest.raises(rho1.scoring.InputError, match=r"^no good$"):
        score_small(tmp_path / "s", workers=2)
    monkeypatch.setattr(crew, "_PROGRAM", "print('error KeyError: x', flush=True)")
    with pytest.raises(RunError, match=r"a worker failed: KeyError: x"):
        score_small(tmp_path / "s", workers=2)


def score_and_tell(out: Path, workers: int, program: str | None) -> None:
    """Scores slowly; writes down how it was stopped."""
    torch.set_num_threads(1)
    if program is not None:
        crew._PROGRAM = program
    else:
        whole = part_scorer.PartScorer.score

        def slow(self: Any, part: int, between: Any) -> Any:
            (out.parent / "mark").touch()
            time.sleep(0.1)
            return whole(self, part, between)

        part_scorer.PartScorer.score = slow  # type: ignore[method-assign]
    try:
        score_small(out, workers=workers, command="fastlm score x")
    except rho1.ScoringStoppedError as stopped:
        (out.parent / "told").write_text(f"{stopped.exit_code} {stopped}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_ends_between_two_batches(
    undisturbed: Path, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    out = tmp_path / "s"
    process = start(score_and_tell, out, workers, SLOW_WORKER if workers > 1 else None)
    wait_for(lambda: (tmp_path / "mark").exists() or lines(tmp_path / "s.log"))
    os.kill(process.pid or 0, number)
    process.join(60)
    assert process.exitcode == 0
    told = (tmp_path / "told").read_text()
    assert told.startswith(f"{128 + number} scoring: stopped by {number.name}; finished parts are kept.")
    assert told.endswith("To go on, run: fastlm score x")
    assert not list(out.glob("*partial*"))
    for worker, _ in lines(tmp_path / "s.log"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(worker), 0)
    process = start(score_small, out)
    process.join(60)
    saved = rho1.open_scores(out)
    assert saved.digest == rho1.open_scores(undisturbed).digest
    assert {n: c for n, c in contents(out).items() if n != "manifest.json"} == {
        n: c for n, c in contents(undisturbed).items() if n != "manifest.json"
    }


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    process = start(score_and_tell, out, 2, SLOW_WORKER)
    wait_for(lambda: len({worker for worker, _ in lines(tmp_path / "s.log")}) == 2)
    process.kill()
    process.join()

    def gone() -> bool:
        for worker, _ in lines(tmp_path / "s.log"):
            try:
                status = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]
            except FileNotFoundError:
                continue
            if status != "Z":
                return False
        return True

    wait_for(gone)
    score_small(out)
    assert {n for n in contents(out) if "partial" in n} == set()
