"""Prepares a run's text once: tokenizer, token shards of both sides, and a manifest, in the run's `data`
folder.

The folder appears in one step when everything in it is whole; a resumed run reads it and never the text
again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from fastlm.training.atomic import new_folder, remove_leftovers, write_json
from fastlm.training.config import TrainConfig, reason
from fastlm.training.corpus import Corpus, TextFile, find_corpus, read_documents
from fastlm.training.errors import InputError, RunError
from fastlm.training.shards import ShardWriter, TokenStore
from fastlm.training.tokenizer import (
    load_given_tokenizer,
    load_tokenizer,
    mark_of,
    spelling_of,
    train_tokenizer,
)

ENCODE_CHARACTERS = 2 << 20  # text handed to the tokenizer's threads at once
Report = Callable[[str], None]


@dataclass(frozen=True)
class DataSummary:
    """What was read; part of the run record."""

    source: str
    is_stdlib: bool
    digest: str
    train_files: int
    train_bytes: int
    train_tokens: int
    held_out_files: int
    held_out_bytes: int
    held_out_tokens: int
    held_out_names: tuple[str, ...]
    skipped: dict[str, int]
    vocab_size: int


@dataclass(frozen=True)
class PreparedData:
    """The opened data of a run."""

    summary: DataSummary
    tokenizer: Tokenizer
    train: TokenStore
    held_out: TokenStore

    @property
    def vocab_size(self) -> int:
        return self.summary.vocab_size

    def spelling(self) -> list[bytes]:
        """The bytes of each token; none for the mark between documents."""
        return spelling_of(self.tokenizer)


def prepare_data(
    folder: Path,
    config: TrainConfig,
    vocab_size: int,
    report: Report,
    warn: Report,
    *,
    exclude: Path | None = None,
) -> PreparedData:
    """Reads the text, trains the tokenizer (unless one is given) and writes the shards to `folder`, unless all that is there
    already.

    Args:
        folder: the run's data folder.
        config: `data`, `held_out`, `max_bytes` and `tokenizer` (else `init`) are used.
        vocab_size: most tokens of the vocabulary of a tokenizer that is trained.
        report: called with one line per stage.
        warn: called with one line per kind of skipped file.
        exclude: folder that is not read even inside the data; default: the one that `folder` is in.

    Raises:
        InputError: no usable text, or the given tokenizer cannot be used.
        RunError: the disk is full or a file changed.
    """
    if not folder.exists():
        remove_leftovers(folder.parent)
        given = config.tokenizer or config.init
        tokenizer = None if given is None else load_given_tokenizer(given)
        report("looking for text")
        corpus = find_corpus(
            config.data,
            held_out=config.held_out,
            max_bytes=config.max_bytes,
            exclude=exclude or folder.parent,
        )
        if not corpus.is_stdlib:  # nobody chose those files, so nobody needs to hear about them
            for line in corpus.skipped.sentences():
                warn(line)
        try:
            with new_folder(folder) as temporary:
                _write(temporary, corpus, tokenizer, vocab_size, report)
        except OSError as error:
            raise RunError(
                f"data: could not write {folder}: {reason(error)}; nothing of the run is lost, make room "
                f"and add --resume"
            ) from error
    return open_data(folder)


def open_data(folder: Path) -> PreparedData:
    """Opens a folder written by `prepare_data`.

    Raises:
        RunError: a file is missing or damaged.
    """
    manifest = folder / "manifest.json"
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
        summary = DataSummary(**{**values, "held_out_names": tuple(values["held_out_names"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"data: {manifest} is missing or damaged ({reason(error)}); start a new run"
        ) from error
    try:
        tokenizer = load_tokenizer(folder / "tokenizer.json")
    except InputError as error:
        raise RunError(f"{error}; start a new run") from error
    if tokenizer.get_vocab_size() != summary.vocab_size:
        raise RunError(
            f"data: expected {summary.vocab_size} tokens in {folder / 'tokenizer.json'}, "
            f"found {tokenizer.get_vocab_size()}; start a new run"
        )
    return PreparedData(summary, tokenizer, TokenStore(folder, "train"), TokenStore(folder, "held-out"))


def _write(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer | None, vocab_size: int, report: Report
) -> None:
    if tokenizer is None:
        report(f"training the tokenizer on {corpus.train_bytes / 1e6:.1f} MB of {len(corpus.train)} files")
        tokenizer = train_tokenizer(corpus.train, vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    report("turning text into tokens")
    train = _encode(folder, "train", corpus.train, tokenizer)
    held_out = _encode(folder, "held-out", corpus.held_out, tokenizer)
    summary = DataSummary(
        source=str(corpus.root),
        is_stdlib=corpus.is_stdlib,
        digest=corpus.digest(),
        train_files=len(corpus.train),
        train_bytes=corpus.train_bytes,
        train_tokens=train,
        held_out_files=len(corpus.held_out),
        held_out_bytes=corpus.held_out_bytes,
        held_out_tokens=held_out,
        held_out_names=tuple(file.name.encode("utf-8", "replace").decode() for file in corpus.held_out),
        skipped={why: len(names) for why, names in sorted(corpus.skipped.names.items())},
        vocab_size=tokenizer.get_vocab_size(),
    )
    write_json(folder / "manifest.json", asdict(summary))


def _encode(folder: Path, name: str, files: Iterable[TextFile], tokenizer: Tokenizer) -> int:
    """Writes the documents `<mark> text <mark>` of some files; returns the number of tokens."""
    mark = mark_of(tokenizer)
    writer = ShardWriter(folder, name, tokenizer.get_vocab_size())
    pending: list[str] = []
    total = 0

    def flush() -> None:
        nonlocal total
        for text, encoded in zip(
            pending, tokenizer.encode_batch_fast(pending, add_special_tokens=False), strict=True
        ):
            tokens = [mark, *encoded.ids, mark]
            writer.add(tokens, len(text.encode()))
            total += len(tokens)
        pending.clear()

    characters = 0
    for file in files:
        for text in read_documents(file):
            pending.append(text)
            characters += len(text)
            if characters >= ENCODE_CHARACTERS:
                flush()
                characters = 0
    flush()
    writer.close()
    return total
