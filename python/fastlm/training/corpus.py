"""Finds the text of a run: which files are read, which are kept away for evaluation, which are skipped and
why.

The default text is the source of Python's own library, read where it is installed. Held-out files are chosen
by a hash of their relative path, so adding a file never moves another one from one side to the other.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastlm.training.config import reason
from fastlm.training.errors import InputError, RunError

READ_BYTES = 1 << 20
DOCUMENT_BYTES = 8 << 20  # longer files become several documents, cut at a line end: memory stays bounded
# `encodings` holds generated tables that differ in a few lines: held-out ones would be copies of training
# ones.
STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
)


@dataclass(frozen=True)
class TextFile:
    """One usable file, or the byte range of it that belongs to one side of the split."""

    name: str  # relative path with forward slashes
    path: Path
    size: int  # bytes of the range
    digest: str  # sha256 of the whole file
    start: int = 0


@dataclass
class Skipped:
    """Files that were passed over: reason → relative names in sorted order."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, why: str, name: str) -> None:
        self.names.setdefault(why, []).append(name)

    @property
    def count(self) -> int:
        return sum(len(names) for names in self.names.values())

    def sentences(self) -> list[str]:
        """One line per reason with the count and the first three names."""
        lines = []
        for why, names in sorted(self.names.items()):
            shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            lines.append(f"skipped {len(names)} {'file' if len(names) == 1 else 'files'}: {why} ({shown})")
        return lines


@dataclass(frozen=True)
class Corpus:
    """The two sides of a run's text."""

    root: Path
    is_stdlib: bool
    train: tuple[TextFile, ...]
    held_out: tuple[TextFile, ...]
    skipped: Skipped

    @property
    def train_bytes(self) -> int:
        return sum(file.size for file in self.train)

    @property
    def held_out_bytes(self) -> int:
        return sum(file.size for file in self.held_out)

    def digest(self) -> str:
        """Identifies the text: changes with any name, content or side."""
        total = hashlib.sha256()
        for side, files in (("train", self.train), ("held_out", self.held_out)):
            for file in files:
                total.update(f"{side}\0{file.digest}\0{file.start}\0{file.size}\0".encode())
                total.update(os.fsencode(file.name) + b"\n")
        return total.hexdigest()


def find_corpus(
    data: Path | None, *, held_out: float, max_bytes: int | None = None, exclude: Path | None = None
) -> Corpus:
    """Lists the usable text under `data` and splits it.

    Args:
        data: folder (read recursively, any kind of text file) or one file; None: Python's library source.
        held_out: share of files for evaluation, in (0, 1).
        max_bytes: whole files are taken in the order of a hash until the next one would be too much; at least
            one.
        exclude: folder that is not read even inside `data` (the run's own).

    Raises:
        InputError: `data` does not exist, cannot be read, or holds no usable text.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if data is None else data
    skipped = Skipped()
    try:
        mode = root.stat().st_mode
    except OSError as error:
        raise InputError(f"--data: expected a folder or file of text, got {root}: {reason(error)}") from error
    if stat.S_ISDIR(mode):
        try:
            with os.scandir(root):
                pass
        except OSError as error:
            raise InputError(f"--data: cannot read folder {root}: {reason(error)}") from error
        found = _walk(root, stdlib=data is None, exclude=exclude, skipped=skipped)
        base = root
    else:
        found, base = iter([root]), root.parent

    files = []
    seen: dict[str, str] = {}
    for path in sorted(found, key=lambda path: os.fsencode(path.relative_to(base).as_posix())):
        name = path.relative_to(base).as_posix()
        file = _scan(path, name, skipped)
        if file is None:
            continue
        if file.digest in seen:  # a copy on the other side of the split would flatter the held-out result
            skipped.add("copy of another file", name)
            continue
        seen[file.digest] = name
        files.append(file)
    if not files:
        detail = "; ".join(skipped.sentences()) or "the folder is empty"
        raise InputError(
            f"--data: expected text files (UTF-8) in {root}, found none that can be used: {detail}"
        )
    if max_bytes is not None:
        files = _limit(files, max_bytes)
    train, held = _split(files, held_out)
    return Corpus(root, data is None, tuple(train), tuple(held), skipped)


def read_documents(file: TextFile) -> Iterator[str]:
    """Yields the text of `file` in pieces of at most `DOCUMENT_BYTES`, cut at line ends where there are any.

    Raises:
        RunError: the file cannot be read any more or changed since it was listed.
    """
    try:
        with file.path.open("rb") as handle:
            handle.seek(file.start)
            left, rest = file.size, b""
            while left:
                block = handle.read(min(left, DOCUMENT_BYTES - len(rest)))
                if not block:
                    raise RunError(
                        f"--data: {file.path} became shorter while it was read; start the run again"
                    )
                left -= len(block)
                block = rest + block
                cut = len(block) if left == 0 else _cut(block)
                yield block[:cut].decode("utf-8")
                rest = block[cut:]
            if rest:
                yield rest.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"--data: {file.path} changed while it was read: {reason(error)}") from error


def _cut(block: bytes) -> int:
    """Where to end a piece: after the last line end, else before a started UTF-8 character."""
    newline = block.rfind(b"\n")
    if newline >= 0:
        return newline + 1
    end = len(block)
    while end > len(block) - 4 and end > 0 and (block[end - 1] & 0xC0) == 0x80:
        end -= 1
    if end > 0 and block[end - 1] >= 0xC0:
        end -= 1
    return end or len(block)


def _walk(root: Path, *, stdlib: bool, exclude: Path | None, skipped: Skipped) -> Iterator[Path]:
    """All regular files under `root`, each folder once however many links lead to it."""
    excluded = None if exclude is None else exclude.resolve()
    visited: set[tuple[int, int]] = set()
    stack = [root]
    while stack:
        folder = stack.pop()
        name = folder.relative_to(root).as_posix()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in visited:
                skipped.add("link to a folder already read", name)
                continue
            visited.add((status.st_dev, status.st_ino))
            if excluded is not None and folder.resolve() == excluded:
                continue
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            skipped.add(f"cannot be read: {reason(error)}", name)
            continue
        folders = []
        for entry in entries:
            path = folder / entry.name
            if stdlib and (entry.name in STDLIB_LEFT_OUT or entry.name.startswith("config-")):
                continue
            if not stdlib and entry.name.startswith("."):
                skipped.add("hidden file or folder", path.relative_to(root).as_posix())
                continue
            try:
                mode = path.stat().st_mode
            except OSError as error:
                why = (
                    "link that leads in a circle"
                    if error.errno == errno.ELOOP
                    else "cannot be read: " + reason(error)
                )
                skipped.add(why, path.relative_to(root).as_posix())
                continue
            if stat.S_ISDIR(mode):
                folders.append(path)
            elif not stat.S_ISREG(mode):  # opening a pipe would wait for ever
                skipped.add("pipe, socket or device", path.relative_to(root).as_posix())
            elif not stdlib or path.suffix == ".py":
                yield path
        # The stack is read from its end: real folders last, so that a link to one of them is what is left
        # out.
        stack.extend(sorted(folders, key=lambda path: (not path.is_symlink(), os.fsencode(path.name))))


def _scan(path: Path, name: str, skipped: Skipped) -> TextFile | None:
    """Reads one file through: usable text, or a reason to skip it."""
    digest, size = hashlib.sha256(), 0
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    try:
        with path.open("rb") as handle:
            while block := handle.read(READ_BYTES):
                if b"\0" in block:
                    skipped.add("binary", name)
                    return None
                decoder.decode(block)
                digest.update(block)
                size += len(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        skipped.add("not UTF-8", name)
        return None
    except OSError as error:
        skipped.add(f"cannot be read: {reason(error)}", name)
        return None
    if size == 0:
        skipped.add("empty", name)
        return None
    return TextFile(name, path, size, digest.hexdigest())


def path_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the relative path alone."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big") / 2**64


def _limit(files: list[TextFile], max_bytes: int) -> list[TextFile]:
    """A part of the files that does not depend on the others' order."""
    kept: set[str] = set()
    total = 0
    for file in sorted(files, key=lambda file: path_fraction("limit/" + file.name)):
        if kept and total + file.size > max_bytes:
            break
        kept.add(file.name)
        total += file.size
    return [file for file in files if file.name in kept]


def _split(files: list[TextFile], share: float) -> tuple[list[TextFile], list[TextFile]]:
    """Held-out files by hash; at least one on each side; a lone file is cut near its end, at a line."""
    if len(files) == 1:
        return _split_one(files[0], share)
    held = [file for file in files if path_fraction(file.name) < share]
    if not held:
        held = [min(files, key=lambda file: path_fraction(file.name))]
    elif len(held) == len(files):
        held.remove(max(held, key=lambda file: path_fraction(file.name)))
    names = {file.name for file in held}
    return [file for file in files if file.name not in names], held


def _split_one(file: TextFile, share: float) -> tuple[list[TextFile], list[TextFile]]:
    """The last part of the only file is held out."""
    held_bytes = max(1, int(file.size * share))
    position = file.size - held_bytes
    with file.path.open("rb") as handle:
        window = max(0, position - READ_BYTES)
        handle.seek(window)
        before = handle.read(position - window)
        tail = handle.read(1)
    newline = before.rfind(b"\n")
    if newline >= 0 and window + newline + 1 > file.size // 2:
        position = window + newline + 1
    else:
        around = before + tail
        while 0 < position < file.size and (around[position - window] & 0xC0) == 0x80:
            position -= 1  # never inside a character
    if not 0 < position < file.size:
        raise InputError(
            f"--data: expected enough text for a training and a held-out part, found {file.size} bytes in "
            f"{file.path}"
        )
    head = TextFile(file.name, file.path, position, file.digest)
    return [head], [TextFile(file.name, file.path, file.size - position, file.digest, start=position)]
