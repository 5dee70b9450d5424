"""The folder of a run: made once, owned by one process at a time, opened again by `--resume`.

run.json        the record              log.jsonl       one line per step and evaluation
data/           tokenizer and tokens    checkpoints/    the newest (two)
model/          the finished model with its tokenizer
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

from fastlm.training.atomic import is_leftover, remove_leftovers
from fastlm.training.config import TrainConfig, flag_of, make_config, reason
from fastlm.training.errors import InputError
from fastlm.training.record import RECORD_NAME, RunRecord, describe_environment, load_record, now

LOCK_NAME = ".lock"


class RunLock:
    """Held for the life of the process; the system frees it however the process ends."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = self.path.read_text(encoding="ascii", errors="replace").strip()
            os.close(self._descriptor)
            raise InputError(
                f"--out: another process is training in {folder}: process {owner or 'unknown'}"
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, str(os.getpid()).encode())

    def release(self) -> None:
        """Lets another process in."""
        os.close(self._descriptor)


def create_run(out: Path, config: TrainConfig, *, dtype: str, threads: int) -> tuple[RunRecord, RunLock]:
    """Makes the folder of a new run.

    Raises:
        InputError: `out` holds a run or other files, or cannot be made.
    """
    if out.is_dir() and (out / RECORD_NAME).exists():
        record = load_record(out)
        total = record.schedule["total_steps"] if record.schedule else "?"
        raise InputError(
            f"--out: {out} already holds a run ({record.status}, step {record.step} of {total}); "
            "add --resume to go on with it, or choose another folder"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        strangers = sorted(entry.name for entry in out.iterdir() if not _is_beginning(entry.name))
    except OSError as error:
        raise InputError(f"--out: cannot make folder {out}: {reason(error)}") from error
    if strangers:
        raise InputError(f"--out: expected a new or empty folder, found {', '.join(strangers[:3])} in {out}")
    try:
        lock = RunLock(out)
        remove_leftovers(out)
        record = RunRecord(
            created=now(),
            config=config,
            dtype=dtype,  # type: ignore[arg-type]
            threads=threads,
            environment=describe_environment(),
        )
        record.save(out)
    except OSError as error:
        raise InputError(f"--out: cannot write to {out}: {reason(error)}") from error
    return record, lock


def _is_beginning(name: str) -> bool:
    """What a run that was killed before its first record leaves behind."""
    return name == LOCK_NAME or (name.startswith(RECORD_NAME) and is_leftover(name))


def reopen_run(out: Path, given: dict[str, Any]) -> tuple[RunRecord, RunLock]:
    """Opens a run to continue it.

    Args:
        out: its folder.
        given: settings named on the command line; they must equal the run's, since a resumed run is the same
            run.

    Raises:
        InputError: no run there, another process owns it, or a setting differs.
    """
    record = load_record(out)
    saved = record.config.model_dump()
    wanted = make_config({**saved, **given}).model_dump() if given else saved
    for name in given:
        if wanted[name] != saved[name]:
            raise InputError(
                f"{flag_of(name)}: a resumed run keeps its settings: expected {saved[name]}, got "
                f"{wanted[name]}; "
                "leave the flag out, or start a new run in another folder"
            )
    try:
        lock = RunLock(out)
    except OSError as error:
        raise InputError(f"--out: cannot write to {out}: {reason(error)}") from error
    remove_leftovers(out)
    return record, lock
