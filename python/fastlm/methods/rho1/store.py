"""Reads a folder of scores: one reference loss per predicted token, found by a document's content.

A document is a sequence of token ids. Its key is a hash of them, so that packing, order, splits and copies do not matter and a data
set needs no extra column. Of a document of n tokens the store holds n - 1 values: value i is the loss of token i + 1 given the tokens
before it, which is aligned with labels, that is with input position i. The format is described in `score_files`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.methods.rho1.score_files import (
    DOCUMENTS,
    KEY_BYTES,
    TOKENIZER,
    Counts,
    Keys,
    Layout,
    Manifest,
    TensorFile,
    Values,
    check_content,
    corpus_digest,
    load_manifest,
    open_part,
    part_name,
    tokenizer_digest,
)
from fastlm.training.config import reason
from fastlm.training.errors import InputError

SHOWN_PROBLEMS = 3


def document_key(tokens: Any) -> str:
    """The name of a document: blake2b over its token ids as little-endian int32, 16 bytes, as 32 hexadecimal digits.

    Args:
        tokens: `(n,)` integers, a list, an array or a tensor.

    Raises:
        InputError: an id that does not fit into 31 bits, or not a flat sequence of integers.
    """
    return key_bytes(as_token_ids(tokens)).hex()


def as_token_ids(tokens: Any) -> Counts:
    """Token ids as a flat array."""
    values = np.asarray(tokens.cpu() if hasattr(tokens, "cpu") else tokens)
    if values.size == 0:
        return np.empty(0, np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise InputError(
            f"document: expected a flat sequence of integers, got {values.dtype} of shape {values.shape}"
        )
    if int(values.min()) < 0 or int(values.max()) >= 1 << 31:
        raise InputError(
            f"document: expected token ids in [0, 2^31), got {int(values.min())} to {int(values.max())}"
        )
    return values.astype(np.int64, copy=False)


def key_bytes(tokens: Counts) -> bytes:
    """`document_key` before it becomes text."""
    return hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=KEY_BYTES).digest()


class ScoreStore:
    """Opened scores; made by `open_scores`. Values are memory-mapped: opening reads headers, not numbers.

    Attributes:
        folder: where they are.
        manifest: what was scored, by which model, how.
        digest: identifies the scores.
    """

    def __init__(self, folder: Path, manifest: Manifest, layout: Layout, files: list[TensorFile]) -> None:
        self.folder, self.manifest, self.layout = folder, manifest, layout
        self.digest = manifest.digest()
        self._files = files
        self._maps: dict[tuple[str, int], Values] = {}
        self._high, self._low = _words(layout.keys)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_scores, (self.folder,)  # a process of a data loader maps the files itself

    @property
    def context(self) -> int | None:
        """Tokens of a piece: the model's state restarts at multiples of it; None: whole documents."""
        return self.manifest.context

    def __len__(self) -> int:
        """Distinct documents."""
        return self.manifest.documents

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def keys(self) -> Iterator[str]:
        """Keys of all documents, ascending."""
        return (row.tobytes().hex() for row in self.layout.keys)

    def lengths(self, key: str) -> int:
        """Tokens of a document.

        Raises:
            KeyError: it was not scored.
        """
        return int(self.layout.lengths[self._index(key)])

    def nll(self, key: str, start: int, stop: int) -> Values:
        """Losses of the predictions made at positions `start` to `stop` of a document.

        Args:
            key: `document_key` of its tokens.
            start, stop: positions; beyond the last prediction (position n - 2) there is nothing.

        Returns:
            values: `(min(stop, n - 1) - start,)` float32, in nats; value i is the loss of token `start + i + 1`.

        Raises:
            KeyError: the document was not scored.
        """
        return self._slice("nll", key, start, stop)

    def entropy(self, key: str, start: int, stop: int) -> Values:
        """Entropies of the model's predictions, in nats; arguments and result as for `nll`.

        Raises:
            KeyError: the document was not scored.
            InputError: the scores were made without entropies.
        """
        return self._slice("entropy", key, start, stop)

    def locate(self, keys: Keys) -> Counts:
        """First value of each document, for `values`.

        Args:
            keys: `(M, 16)` uint8, as `key_bytes` makes them.

        Returns:
            first: `(M,)` int64, -1 for documents that were not scored.
        """
        high, low = _words(keys)
        at = np.searchsorted(self._high, high)
        # Two documents with the same first half of a key are next to each other; there are hardly ever two.
        while True:
            inside = np.minimum(at, len(self._high) - 1)
            behind = (at < len(self._high)) & (self._high[inside] == high) & (self._low[inside] < low)
            if not behind.any():
                break
            at = at + behind
        found = (at < len(self._high)) & (self._high[inside] == high) & (self._low[inside] == low)
        return np.where(found, self.layout.starts[inside], -1)

    def values(self, name: str, first: int, count: int) -> Values:
        """`count` numbers from `first` on, of the line that the values of all documents form.

        Args:
            name: `nll` or `entropy`.
            first: from `locate`, plus a position.
            count: at least 0.

        Raises:
            InputError: the scores were made without entropies.
        """
        if name == "entropy" and not self.manifest.entropy:
            raise InputError(
                f"scores: {self.folder} holds no entropies; score the corpus with --entropy into another folder"
            )
        bounds = self.layout.bounds
        out = np.empty(count, np.float32)
        part = int(np.searchsorted(bounds, first, side="right")) - 1
        done = 0
        while done < count:
            offset = first + done - int(bounds[part])
            block = self._map(name, part)[offset : offset + count - done]
            out[done : done + len(block)] = block
            done, part = done + len(block), part + 1
        return out

    def part(self, name: str, number: int) -> Values:
        """All values of one part, memory-mapped."""
        return self._map(name, number)

    def verify(self) -> None:
        """Reads every part through and compares its content with what was written.

        Raises:
            InputError: some part changed; says which and how it is made again.
        """
        problems = []
        for number, file in enumerate(self._files):
            try:
                check_content(file)
            except (OSError, ValueError) as error:
                problems.append(f"{part_name(number)}: {reason(error)}")
        _raise_damaged(self.folder, self.manifest, problems)

    def _map(self, name: str, part: int) -> Values:
        if (name, part) not in self._maps:
            self._maps[name, part] = self._files[part].map(name)
        return self._maps[name, part]

    def _slice(self, name: str, key: str, start: int, stop: int) -> Values:
        index = self._index(key)
        stop = min(stop, int(self.layout.lengths[index]) - 1)
        return self.values(name, int(self.layout.starts[index]) + start, max(0, stop - start))

    def _index(self, key: str) -> int:
        index = self._find(key)
        if index is None:
            raise KeyError(f"document {key} is not among the {len(self)} scored ones in {self.folder}")
        return index

    def _find(self, key: str) -> int | None:
        try:
            wanted = bytes.fromhex(key)
        except (ValueError, TypeError):
            return None
        if len(wanted) != KEY_BYTES:
            return None
        high, low = int.from_bytes(wanted[:8], "big"), int.from_bytes(wanted[8:], "big")
        index = int(np.searchsorted(self._high, np.uint64(high)))
        while index < len(self._high) and int(self._high[index]) == high:
            if int(self._low[index]) == low:
                return index
            index += 1
        return None


def open_scores(
    directory: str | Path, tokenizer_digest: str | None = None, corpus_digest: str | None = None
) -> ScoreStore:
    """Opens finished scores and checks that every file is there, whole and in its place.

    Args:
        directory: what `rho1.score` or `fastlm score` wrote.
        tokenizer_digest: of the tokenizer that the caller's documents come from; None: not compared.
        corpus_digest: of the caller's corpus; None: not compared.

    Raises:
        InputError: there are no scores, they are unfinished, a file is missing, truncated, damaged or exchanged, or tokenizer or
            corpus are others; the text says which, and what makes the missing part again.
    """
    folder = Path(directory)
    manifest = load_manifest(folder)
    layout = load_layout(folder, manifest)
    digest = manifest.digest()
    problems, missing, files = [], 0, []
    for number in range(layout.num_parts):
        try:
            files.append(open_part(folder, manifest, number, digest))
        except FileNotFoundError:
            missing += 1
        except (OSError, ValueError) as error:
            problems.append(f"{part_name(number)}: {reason(error)}")
    _raise_damaged(folder, manifest, problems)
    if missing:
        raise InputError(
            f"scores: {folder} is unfinished: {missing} of {layout.num_parts} parts are missing; "
            f"to score what is missing, {manifest.repair}"
        )
    check_tokenizer(folder, manifest)
    for name, expected, found in (
        ("tokenizer", tokenizer_digest, manifest.tokenizer),
        ("corpus", corpus_digest, manifest.corpus),
    ):
        if expected is not None and expected != found:
            raise InputError(
                f"scores: {folder} is of another {name}: expected {expected}, found {found or 'plain token ids'}"
            )
    return ScoreStore(folder, manifest, layout, files)


def load_layout(folder: Path, manifest: Manifest) -> Layout:
    """Reads the index of documents.

    Raises:
        InputError: it is missing, damaged or of another corpus.
    """
    path = folder / DOCUMENTS
    try:
        file = TensorFile.open(path)
        keys, lengths = np.asarray(file.map("keys")), np.asarray(file.map("lengths"))
        if keys.shape != (manifest.documents, KEY_BYTES) or lengths.shape != (manifest.documents,):
            raise ValueError(f"expected {manifest.documents} documents, found {keys.shape} {lengths.shape}")
        if corpus_digest(keys, lengths) != manifest.corpus:
            raise ValueError(f"expected corpus {manifest.corpus}, found {corpus_digest(keys, lengths)}")
        layout = Layout.plan(keys, lengths, context=manifest.context, part_tokens=manifest.part_tokens)
        if tuple(int(n) for n in np.diff(layout.bounds)) != tuple(part.tokens for part in manifest.parts):
            raise ValueError("its parts are not those of the manifest")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"scores: {path} is lost or damaged ({reason(error)}); to write it again, {manifest.repair}"
        ) from error
    return layout


def check_tokenizer(folder: Path, manifest: Manifest) -> None:
    """The copy of the tokenizer is the one that the manifest names."""
    if manifest.tokenizer is None:
        return
    found = tokenizer_digest(folder / TOKENIZER)
    if found != manifest.tokenizer:
        raise InputError(
            f"scores: {folder / TOKENIZER} is another tokenizer than the scores': expected {manifest.tokenizer}, "
            f"found {found}; put the reference model's tokenizer.json back"
        )


def _raise_damaged(folder: Path, manifest: Manifest, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise InputError(
            f"scores: {folder} is damaged: {'; '.join(problems[:SHOWN_PROBLEMS])}{more}; "
            f"to score only what is damaged again, {manifest.repair}"
        )


def _words(keys: Keys) -> tuple[Any, Any]:
    """Both halves of each key as numbers whose order is that of the bytes."""
    words = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)
    return np.ascontiguousarray(words[:, 0]), np.ascontiguousarray(words[:, 1])
