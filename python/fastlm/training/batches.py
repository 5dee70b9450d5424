"""Packed rows of a fixed number of tokens, in an order that the seed and the position alone decide.

The documents of every epoch are put one after the other in a new order. Row `n` is the `T` positions from
`n*(T-1)` on of that endless stream: it begins with the last token of the row before it, so that the token
after that one is predicted too. A document longer than `seq_len` is cut into pieces; state restarts at each
piece (`cu_seqlens`), and the last token of a piece still predicts the first of the next one. The last token
of a *document* predicts nothing. So in every epoch each token but the first of its document is predicted
exactly once. Resuming needs one number: the row.

Labels follow transformers: the model compares position `t` with `labels[t + 1]`, so a document's first token
has label -100.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastlm.training.shards import Array, TokenStore

IGNORE_INDEX = -100
Piece = tuple[int, int, int]  # (document, first token, one past the last token)


@dataclass(frozen=True)
class PackedRow:
    """One row of packed documents."""

    input_ids: torch.Tensor  # (1, T) int64
    labels: torch.Tensor  # (1, T) int64: input_ids, but -100 at the first token of every document
    cu_seqlens: torch.Tensor  # (S+1,) int32

    @property
    def num_targets(self) -> int:
        """Predicted tokens: labels that have a position before them."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


def document_order(num_documents: int, seed: int, epoch: int) -> Array:
    """A permutation of the documents, sorted by a hash of (seed, epoch, document); equal on every machine."""
    with np.errstate(over="ignore"):  # the hash is splitmix64: wrapping around is what it is made of
        key = _splitmix64(np.uint64(seed) + _splitmix64(np.uint64(epoch)))
        keys = _splitmix64(np.arange(num_documents, dtype=np.uint64) ^ key)
    return np.argsort(keys, kind="stable").astype(np.int64)


def _splitmix64(value: Any) -> Any:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class PackedSampler:
    """Training rows by number.

    Args:
        store: the documents.
        row_tokens: tokens of a row (`T`), at least 2.
        seq_len: longest piece of a document.
        seed: of the document order.
    """

    def __init__(self, store: TokenStore, *, row_tokens: int, seq_len: int, seed: int) -> None:
        self.store, self.row_tokens, self.seq_len, self.seed = store, row_tokens, seq_len, seed
        self.epoch_tokens = store.num_tokens
        self._epoch = -1
        self._order: Array = np.empty(0, np.int64)
        self._starts: Array = np.empty(0, np.int64)

    def row(self, number: int) -> PackedRow:
        """The row at position `number`; the same for every call and every process."""
        pieces: list[Piece] = []
        position, needed = number * (self.row_tokens - 1), self.row_tokens
        while needed:
            epoch, offset = divmod(position, self.epoch_tokens)
            self._open(epoch)
            slot = int(np.searchsorted(self._starts, offset, side="right")) - 1
            while needed and slot < len(self._order):
                document = int(self._order[slot])
                start = offset - int(self._starts[slot])
                length = int(self.store.lengths[document])
                while needed and start < length:
                    # Cuts stand at multiples of seq_len from the document's start, wherever the row begins.
                    stop = min(length, (start // self.seq_len + 1) * self.seq_len, start + needed)
                    pieces.append((document, start, stop))
                    needed, position, offset = (
                        needed - (stop - start),
                        position + stop - start,
                        offset + stop - start,
                    )
                    start = stop
                slot += 1
        return pack(self.store, pieces)

    def _open(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._order = document_order(self.store.num_documents, self.seed, epoch)
            self._starts = np.concatenate([[0], np.cumsum(self.store.lengths[self._order])[:-1]]).astype(
                np.int64
            )
            self._epoch = epoch


def pack(store: TokenStore, pieces: list[Piece]) -> PackedRow:
    """Builds one row from pieces."""
    inputs, labels, ends = [], [], [0]
    for document, start, stop in pieces:
        tokens = store.tokens(document, start, stop)
        targets = tokens.copy()
        if start == 0:
            targets[0] = IGNORE_INDEX
        inputs.append(tokens)
        labels.append(targets)
        ends.append(ends[-1] + stop - start)
    return PackedRow(
        torch.from_numpy(np.concatenate(inputs)).unsqueeze(0),
        torch.from_numpy(np.concatenate(labels)).unsqueeze(0),
        torch.tensor(ends, dtype=torch.int32),
    )


def evaluation_rows(
    store: TokenStore, *, row_tokens: int, seq_len: int, max_tokens: int
) -> list[list[Piece]]:
    """Pieces of documents, up to `max_tokens` tokens, grouped into rows of at most `row_tokens`.

    The order of documents is a fixed mixture, so that a small part is not all from one folder.
    Where a document goes on in the next row, that row starts with the last token again, so every token but
    the first of each document is predicted exactly once.

    Returns:
        One list of pieces per row, for `pack`. The last document may be cut short.
    """
    rows: list[list[Piece]] = [[]]
    room, left = row_tokens, max_tokens
    for document in document_order(store.num_documents, 0, 0).tolist():
        start, length = 0, int(store.lengths[document])
        while start < length and left > 0:
            if room == 0:
                rows.append([])
                room = row_tokens
                start = max(0, start - 1)
            stop = min(length, (start // seq_len + 1) * seq_len, start + room, start + left)
            rows[-1].append((document, start, stop))
            room, left, start = room - (stop - start), left - (stop - start), stop
    return [row for row in rows if row]
