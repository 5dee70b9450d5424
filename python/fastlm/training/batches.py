"""Packed rows of a fixed number of tokens, in an order that the seed and the position alone decide.

Documents are cut into pieces of at most `seq_len` tokens, and the pieces of all documents are put one after the
other in an order that is new in every epoch: a long document is spread over the whole epoch instead of filling
many steps in a row. Row `n` is the `T` positions from `n*T` on of that endless stream; states restart at every
piece (`cu_seqlens`). A position is trained on the token that follows it in its document, also where that token
belongs to another piece or row; the last token of a document predicts nothing. So in every epoch each token but
the first of its document is predicted exactly once. Resuming needs one number: the row.
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
    shift_labels: (
        torch.Tensor
    )  # (1, T) int64: the token that follows in the document, -100 at a document's end
    cu_seqlens: torch.Tensor  # (S+1,) int32
    pieces: tuple[Piece, ...]  # what the row is made of

    @property
    def targets(self) -> torch.Tensor:
        """The predicted tokens, `(num_targets,)` int64."""
        return self.shift_labels[self.shift_labels != IGNORE_INDEX]

    @property
    def num_targets(self) -> int:
        """Predicted tokens."""
        return int((self.shift_labels != IGNORE_INDEX).sum())


def shuffled(count: int, seed: int, epoch: int) -> Array:
    """A permutation of `count` items, sorted by a hash of (seed, epoch, item); equal on every machine."""
    with np.errstate(over="ignore"):  # the hash is splitmix64: wrapping around is what it is made of
        key = _splitmix64(np.uint64(seed) + _splitmix64(np.uint64(epoch)))
        keys = _splitmix64(np.arange(count, dtype=np.uint64) ^ key)
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
        row_tokens: tokens of a row (`T`).
        seq_len: longest piece of a document.
        seed: of the order.
    """

    def __init__(self, store: TokenStore, *, row_tokens: int, seq_len: int, seed: int) -> None:
        self.store, self.row_tokens, self.seed = store, row_tokens, seed
        self.epoch_tokens = store.num_tokens
        counts = -(-store.lengths // seq_len)
        self._document: Array = np.repeat(np.arange(store.num_documents), counts)
        within = np.arange(len(self._document)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._first: Array = within * seq_len
        self._length: Array = np.minimum(store.lengths[self._document] - self._first, seq_len)
        self._epoch = -1
        self._order: Array = np.empty(0, np.int64)
        self._starts: Array = np.empty(0, np.int64)

    def row(self, number: int) -> PackedRow:
        """The row at position `number`; the same for every call and every process."""
        pieces: list[Piece] = []
        position, end = number * self.row_tokens, (number + 1) * self.row_tokens
        while position < end:
            epoch, offset = divmod(position, self.epoch_tokens)
            self._open(epoch)
            slot = int(np.searchsorted(self._starts, offset, side="right")) - 1
            while position < end and slot < len(self._order):
                piece = self._order[slot]
                first, stop = int(self._first[piece]), int(self._first[piece] + self._length[piece])
                start = first + offset - int(self._starts[slot])
                stop = min(stop, start + end - position)
                pieces.append((int(self._document[piece]), start, stop))
                position, offset, slot = position + stop - start, offset + stop - start, slot + 1
        return pack(self.store, pieces)

    def _open(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._order = shuffled(len(self._document), self.seed, epoch)
            lengths = self._length[self._order]
            self._starts = np.cumsum(lengths) - lengths
            self._epoch = epoch


def pack(store: TokenStore, pieces: list[Piece]) -> PackedRow:
    """Builds one row from pieces."""
    inputs, targets, ends = [], [], [0]
    for document, start, stop in pieces:
        tokens = store.tokens(document, start, stop + 1)  # one fewer at the document's end
        following = np.full(stop - start, IGNORE_INDEX, np.int64)
        following[: len(tokens) - 1] = tokens[1:]
        inputs.append(tokens[: stop - start])
        targets.append(following)
        ends.append(ends[-1] + stop - start)
    return PackedRow(
        torch.from_numpy(np.concatenate(inputs)).unsqueeze(0),
        torch.from_numpy(np.concatenate(targets)).unsqueeze(0),
        torch.tensor(ends, dtype=torch.int32),
        tuple(pieces),
    )


def evaluation_rows(
    store: TokenStore, *, row_tokens: int, seq_len: int, max_tokens: int
) -> list[list[Piece]]:
    """Pieces of documents, up to `max_tokens` tokens, grouped into rows of at most `row_tokens`.

    Documents are read whole, in a fixed mixture, so that a small part is not all from one folder.

    Returns:
        One list of pieces per row, for `pack`. The last document may be cut short.
    """
    rows: list[list[Piece]] = [[]]
    room, left = row_tokens, max_tokens
    for document in shuffled(store.num_documents, 0, 0).tolist():
        start, length = 0, int(store.lengths[document])
        while start < length and left > 0:
            if room == 0:
                rows.append([])
                room = row_tokens
            stop = min(length, (start // seq_len + 1) * seq_len, start + room, start + left)
            rows[-1].append((document, start, stop))
            room, left, start = room - (stop - start), left - (stop - start), stop
    return [row for row in rows if row]
