"""Token shards: documents one after the other in memory-mapped files, with an index of where each one starts.

A shard is one `.npy` file of uint16 (uint32 for large vocabularies); no document crosses from one shard to
the next. `<name>-documents.npy` holds, for every document, (shard, first token, number of tokens, UTF-8
bytes).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastlm.training.config import reason
from fastlm.training.errors import RunError

SHARD_TOKENS = 1 << 26
Array = npt.NDArray[np.int64]


class ShardWriter:
    """Appends documents to shards in a folder; call `close` to write the index."""

    def __init__(self, folder: Path, name: str, vocab_size: int, *, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.pending: list[npt.NDArray[np.unsignedinteger]] = []
        self.pending_tokens = 0
        self.shards = 0
        self.documents: list[tuple[int, int, int, int]] = []

    def add(self, tokens: list[int], num_bytes: int) -> None:
        """Appends one document of `num_bytes` bytes of text."""
        if self.pending and self.pending_tokens + len(tokens) > self.shard_tokens:
            self._flush()
        self.documents.append((self.shards, self.pending_tokens, len(tokens), num_bytes))
        self.pending.append(np.asarray(tokens, dtype=self.dtype))
        self.pending_tokens += len(tokens)

    def _flush(self) -> None:
        if self.pending:
            np.save(self.folder / f"{self.name}-{self.shards:05d}.npy", np.concatenate(self.pending))
            self.shards, self.pending, self.pending_tokens = self.shards + 1, [], 0

    def close(self) -> None:
        """Writes the last shard and the index."""
        self._flush()
        index = np.asarray(self.documents, dtype=np.int64).reshape(-1, 4)
        np.save(self.folder / f"{self.name}-documents.npy", index)


class TokenStore:
    """The documents of one side, read through memory maps."""

    def __init__(self, folder: Path, name: str) -> None:
        try:
            index = np.load(folder / f"{name}-documents.npy", allow_pickle=False)
            if index.ndim != 2 or index.shape[1] != 4 or index.dtype != np.int64:
                raise ValueError(f"expected an int64 index of 4 columns, got {index.dtype} {index.shape}")
            count = int(index[:, 0].max()) + 1 if len(index) else 0
            self.shards = [
                np.load(folder / f"{name}-{number:05d}.npy", mmap_mode="r", allow_pickle=False)
                for number in range(count)
            ]
            for number, shard in enumerate(self.shards):
                rows = index[index[:, 0] == number]
                end = int((rows[:, 1] + rows[:, 2]).max())
                if shard.ndim != 1 or end != shard.shape[0]:
                    raise ValueError(f"shard {number} holds {shard.shape} tokens, the index expects ({end},)")
        except (OSError, ValueError, EOFError) as error:
            raise RunError(
                f"token shards: {folder}/{name}-*.npy are lost or damaged ({reason(error)}); start a new run"
            ) from error
        self.index = index
        self.lengths: Array = index[:, 2]

    @property
    def num_documents(self) -> int:
        return len(self.index)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_bytes(self) -> int:
        return int(self.index[:, 3].sum())

    def tokens(self, document: int, start: int, stop: int) -> Array:
        """Tokens `start:stop` of one document, shape `(stop - start,)`, int64."""
        shard, first, length, _ = (int(value) for value in self.index[document])
        stop = min(stop, length)
        return np.asarray(self.shards[shard][first + start : first + stop], dtype=np.int64)
