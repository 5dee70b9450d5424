"""Files and folders that are either whole or absent, whatever moment the process dies.

Everything is written under a temporary name in the same folder, flushed to the disk, then renamed; the rename
is the only step another process (or the next start) can see.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_MARK = ".partial"  # in every temporary name, so that left-overs of a killed process are recognised


def fsync_path(path: Path) -> None:
    """Flushes one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` by `content` in one step."""
    temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}-{os.getpid()}")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as indented JSON in one step."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the block ends well, else vanishes."""
    temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)  # a signal may come as soon as it is there
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            fsync_path(entry)
        fsync_path(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(path.parent)


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name was left half-written by a process that died."""
    return re.search(re.escape(TEMPORARY_MARK) + r"-\d+$", name) is not None


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed process left half-written directly under `folder`."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if is_leftover(entry.name):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
