"""Which files are read, skipped, and held out; and that reading gives back every byte."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.training import InputError, RunError, corpus
from fastlm.training.corpus import TextFile, find_corpus, read_documents


def names(files: tuple[TextFile, ...]) -> set[str]:
    return {file.name for file in files}


def text_of(file: TextFile) -> str:
    return "".join(read_documents(file))


# The default text


def test_default_is_the_library_source_without_tests_and_packages() -> None:
    found = find_corpus(None, held_out=0.03)
    everything = names(found.train) | names(found.held_out)
    assert found.is_stdlib
    assert found.root == Path(sysconfig.get_paths()["stdlib"])
    assert {"argparse.py", "json/decoder.py"} <= everything
    assert all(name.endswith(".py") for name in everything)
    folders = {part for name in everything for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "dist-packages", "idle_test", "encodings"}
    assert not names(found.train) & names(found.held_out)
    assert 0.005 < found.held_out_bytes / found.train_bytes < 0.1


# What a user's folder may hold


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    (root / "deep" / "deeper").mkdir(parents=True)
    for number in range(8):
        (root / f"note{number}.txt").write_text(f"note number {number}\n" * 5)
    (root / "deep" / "deeper" / "page.md").write_text("# Größe\n")
    (root / "no_ending").write_text("plain\n")
    (root / "empty.txt").write_bytes(b"")
    (root / "picture.png").write_bytes(b"\x89PNG\0\1\2")
    (root / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (root / "cut.txt").write_bytes("ß".encode()[:1])
    (root / "twin.txt").write_text("plain\n")
    (root / ".hidden.txt").write_text("secret")
    os.mkfifo(root / "pipe")
    (root / "dangling.txt").symlink_to(root / "nowhere")
    (root / "circle.txt").symlink_to(root / "circle.txt")
    (root / "deep" / "up").symlink_to(root)
    return root


def test_unusable_files_are_skipped_counted_and_named(mixed: Path) -> None:
    found = find_corpus(mixed, held_out=0.2)
    assert found.skipped.names == {
        "binary": ["picture.png"],
        "cannot be read: No such file or directory": ["dangling.txt"],
        "copy of another file": ["twin.txt"],
        "empty": ["empty.txt"],
        "hidden file or folder": [".hidden.txt"],
        "link that leads in a circle": ["circle.txt"],
        "link to a folder already read": ["deep/up"],
        "not UTF-8": ["cut.txt", "latin.txt"],
        "pipe, socket or device": ["pipe"],
    }
    assert "skipped 2 files: not UTF-8 (cut.txt, latin.txt)" in found.skipped.sentences()
    assert len(names(found.train)) + len(names(found.held_out)) == 10


def test_a_file_that_cannot_be_opened_is_skipped(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def refuse(self: Path, *arguments: object, **options: object) -> object:
        if self.name == "note3.txt":
            raise PermissionError(13, "Permission denied")
        return real(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", refuse)
    found = find_corpus(mixed, held_out=0.2)
    assert found.skipped.names["cannot be read: Permission denied"] == ["note3.txt"]


def test_the_run_folder_inside_the_text_is_not_read(mixed: Path) -> None:
    own = mixed / "runs" / "first"
    own.mkdir(parents=True)
    (own / "log.txt").write_text("my own log")
    assert "runs/first/log.txt" in names(find_corpus(mixed, held_out=0.01).train)
    found = find_corpus(mixed, held_out=0.01, exclude=own)
    assert not {name for name in names(found.train) | names(found.held_out) if name.startswith("runs")}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "found none that can be used: the folder is empty"),
        ({"a.bin": b"\0", "b.txt": b""}, "skipped 1 file: binary (a.bin); skipped 1 file: empty (b.txt)"),
    ],
)
def test_nothing_usable_is_a_clear_error(tmp_path: Path, content: dict[str, bytes], expected: str) -> None:
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as caught:
        find_corpus(tmp_path, held_out=0.1)
    assert str(caught.value).endswith(expected)
    assert str(caught.value).startswith("--data: expected text files (UTF-8)")


def test_a_missing_path_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--data: expected a folder or file of text, got .*/none: No such file"
    ):
        find_corpus(tmp_path / "none", held_out=0.1)


# The split


def test_a_new_file_moves_no_other_file(mixed: Path) -> None:
    before = find_corpus(mixed, held_out=0.3)
    (mixed / "one_more.txt").write_text("more text\n")
    after = find_corpus(mixed, held_out=0.3)
    assert names(after.train) - {"one_more.txt"} == names(before.train)
    assert names(after.held_out) - {"one_more.txt"} == names(before.held_out)
    assert before.digest() != after.digest()


@pytest.mark.parametrize("share", [1e-9, 0.5, 0.999999])
def test_both_sides_have_text_whatever_the_share(mixed: Path, share: float) -> None:
    found = find_corpus(mixed, held_out=share)
    assert found.train
    assert found.held_out


def test_a_lone_file_is_cut_at_a_line_near_its_end(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {i} – text\n" for i in range(1000)))
    found = find_corpus(book, held_out=0.1)
    head, tail = text_of(found.train[0]), text_of(found.held_out[0])
    assert head + tail == book.read_text()
    assert head.endswith("\n")
    assert 0.09 < len(tail) / len(head + tail) < 0.12


def test_a_lone_file_without_lines_is_cut_between_characters(tmp_path: Path) -> None:
    for length in range(2, 12):
        book = tmp_path / f"book{length}.txt"
        book.write_text("ß" * length, encoding="utf-8")
        found = find_corpus(book, held_out=0.2)
        assert text_of(found.train[0]) + text_of(found.held_out[0]) == "ß" * length


def test_a_lone_file_of_one_byte_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(
        InputError, match="expected enough text for a training and a held-out part, found 1 bytes"
    ):
        find_corpus(tmp_path, held_out=0.5)


def test_max_bytes_takes_whole_files_independent_of_the_others(mixed: Path) -> None:
    found = find_corpus(mixed, held_out=0.2, max_bytes=400)
    assert 0 < found.train_bytes + found.held_out_bytes <= 400
    everything = find_corpus(mixed, held_out=0.2)
    assert found.train_bytes < everything.train_bytes
    sizes = {file.name: file.size for file in (*everything.train, *everything.held_out)}
    assert all(sizes[file.name] == file.size for file in found.train)


# Reading


@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), limit=st.integers(4, 20))
def test_long_files_are_read_in_pieces_without_losing_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, limit: int
) -> None:
    monkeypatch.setattr(corpus, "DOCUMENT_BYTES", limit)
    path = tmp_path / "text"
    path.write_bytes(text.encode())
    pieces = list(read_documents(TextFile("text", path, len(text.encode()), "")))
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= limit for piece in pieces)


def test_a_file_that_shrank_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("short")
    with pytest.raises(RunError, match="became shorter while it was read"):
        list(read_documents(TextFile("text", path, 100, "")))
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(RunError, match="changed while it was read"):
        list(read_documents(TextFile("text", path, 100, "")))
