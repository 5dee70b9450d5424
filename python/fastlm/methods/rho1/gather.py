"""Gathers a corpus of any kind into one file of token ids that the workers of a scoring run map into their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.methods.rho1.score_files import KEY_BYTES, Counts, Keys
from fastlm.methods.rho1.store import as_token_ids, key_bytes
from fastlm.training.data import PreparedData
from fastlm.training.errors import InputError

TOKENS, INDEX = "tokens.bin", "tokens.npz"


@dataclass(frozen=True)
class GatheredTokens:
    """The distinct documents of a corpus, sorted by key."""

    keys: Keys  # (N, 16)
    lengths: Counts  # (N,)
    offsets: Counts  # (N,) first token of each document in the file
    tokens: Any  # (T,) int32, memory-mapped
    largest: int  # token id

    @staticmethod
    def open(folder: Path) -> GatheredTokens:
        """Opens what `gather` wrote."""
        with np.load(folder / INDEX, allow_pickle=False) as index:
            tokens = np.memmap(folder / TOKENS, "<i4", "r")
            return GatheredTokens(
                index["keys"], index["lengths"], index["offsets"], tokens, int(index["largest"])
            )


def gather(corpus: Any, folder: Path, between: Callable[[], None]) -> GatheredTokens:
    """Reads a corpus once and writes its tokens into `folder`.

    Args:
        corpus: a `PreparedData` (both sides are taken), or any iterable of documents: flat sequences of token ids, or rows with
            `input_ids`.
        folder: exists, is empty.
        between: called before every document; may raise to stop.

    Raises:
        InputError: a document is no sequence of token ids, or there is nothing to predict in any of them.
    """
    keys, lengths, offsets = bytearray(), [], []
    written, largest = 0, -1
    with (folder / TOKENS).open("wb", buffering=1 << 20) as handle:
        for number, document in enumerate(_documents(corpus)):
            between()
            try:
                tokens = as_token_ids(document["input_ids"] if isinstance(document, Mapping) else document)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"corpus: document {number}: {error}") from error
            keys += key_bytes(tokens)
            lengths.append(len(tokens))
            offsets.append(written)
            handle.write(tokens.astype("<i4").tobytes())
            written += len(tokens)
            if len(tokens):
                largest = max(largest, int(tokens.max()))
    if not any(length > 1 for length in lengths):
        raise InputError(
            f"corpus: expected a document of at least two tokens, got {len(lengths)} documents of {written} tokens"
        )
    every = np.frombuffer(bytes(keys), np.uint8).reshape(-1, KEY_BYTES)
    _, first = np.unique(every.view(f"V{KEY_BYTES}").ravel(), return_index=True)
    order = first[
        np.lexsort(every[first].T[::-1])
    ]  # whatever order numpy gives raw bytes, this is the bytes' own
    np.savez(
        folder / INDEX,
        keys=every[order],
        lengths=np.asarray(lengths, np.int64)[order],
        offsets=np.asarray(offsets, np.int64)[order],
        largest=largest,
    )
    return GatheredTokens.open(folder)


def _documents(corpus: Any) -> Iterator[Any]:
    if isinstance(corpus, PreparedData):
        for side in (corpus.train, corpus.held_out):
            for document in range(side.num_documents):
                yield side.tokens(document, 0, int(side.lengths[document]))
        return
    if isinstance(corpus, str | bytes | Mapping) or not isinstance(corpus, Iterable):
        if not hasattr(corpus, "__getitem__") or isinstance(corpus, str | bytes | Mapping):
            raise InputError(
                f"corpus: expected a sequence of token-id sequences or a PreparedData, got {type(corpus).__name__}"
            )
        for index in range(len(corpus)):  # a data set of torch
            yield corpus[index]
        return
    yield from corpus
