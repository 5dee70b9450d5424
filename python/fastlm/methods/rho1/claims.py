"""Who scores which part: a lock per part that the system frees when its process dies, however it dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_NAME = ".lock"
_SETUP = 1 << 40  # a byte beyond any part's


class Claims:
    """Locks on single bytes of one file: byte n is part n. They belong to the process: one `Claims` per folder and process."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)

    def close(self) -> None:
        """Frees everything."""
        os.close(self._descriptor)

    def take(self, part: int) -> bool:
        """Whether the part is ours now; does not wait."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, part)
        except (BlockingIOError, PermissionError):  # either, by POSIX
            return False
        return True

    def give(self, part: int) -> None:
        """Lets others have the part."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, part)

    @contextmanager
    def setup(self) -> Iterator[None]:
        """While entered, no other process writes manifest and index; waits for its turn."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, _SETUP)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _SETUP)


class FolderLock:
    """Marks a temporary folder as in use; `is_free` tells whether its owner is gone."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def release(self) -> None:
        os.close(self._descriptor)


def is_free(folder: Path) -> bool:
    """Whether nobody holds the `FolderLock` of a folder."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR)
    except FileNotFoundError:
        return False  # its owner is about to make it
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
