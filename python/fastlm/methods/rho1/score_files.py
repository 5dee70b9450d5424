"""The files of a folder of scores: their names, the manifest, how documents are laid out over parts, and one part's bytes.

    manifest.json               what was scored by which model how; written once, before the first part
    documents.safetensors       the index: every document's key, length and first value
    tokenizer.json              if the token ids are a tokenizer's
    scores-00000.safetensors    one float32 number per prediction (`nll`, perhaps `entropy`), part after part

Documents are sorted by key, so the layout depends on what the corpus holds and not on the order it came in. A document of n tokens
has n - 1 values, one after the other; the values of all documents form one line, which is cut into parts. The cuts depend on the
corpus, the context and `part_tokens` alone. They lie between documents, or inside a long one at a multiple of the context, where the
model starts anew in any case; so a part can be computed, lost and computed again on its own.

Files are in the safetensors format. They are written here and not by that library, since its header lists metadata in a random
order, and a part must have the same bytes whoever computed it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer

from fastlm.training.atomic import write_bytes
from fastlm.training.config import reason
from fastlm.training.errors import InputError

FORMAT: Literal["fastlm-scores-1"] = "fastlm-scores-1"
MANIFEST, DOCUMENTS, TOKENIZER = "manifest.json", "documents.safetensors", "tokenizer.json"
KEY_BYTES = 16
_DTYPES: dict[str, Any] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8"), "U8": np.dtype("u1")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
Values = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint8]  # (N, KEY_BYTES)


class PartEntry(BaseModel):
    """One file of scores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int  # with at least one value in it
    tokens: int  # values, that is predicted tokens


class Manifest(BaseModel):
    """Everything that decides the bits of the scores, and what a person wants to know about them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["fastlm-scores-1"] = FORMAT
    fastlm: str  # version
    torch: str  # version
    model: str  # sha256 of configuration and weights
    model_class: str
    parameters: int
    tokenizer: str | None  # `tokenizer_digest`; None for plain token ids
    corpus: str  # sha256 of all documents' keys and lengths
    documents: int  # distinct ones
    tokens: int  # of the distinct documents
    predictions: int  # values: each token but the first of its document
    context: int | None  # tokens of a piece; None: whole documents
    dtype: Literal["fp32", "bf16"]
    entropy: bool
    batch_tokens: int
    part_tokens: int
    threads: int  # of each worker
    cpu_level: str
    parts: tuple[PartEntry, ...]
    command: str | None = Field(None, description="that scores what is missing; no part of the digest")

    def digest(self) -> str:
        """Identifies the scores: equal manifests describe the same numbers."""
        values = self.model_dump(mode="json", exclude={"command"})
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def repair(self) -> str:
        """What to do about a missing or damaged part."""
        if self.command is None:
            return "call rho1.score again with the same model, corpus and folder"
        return f"run: {self.command}"


def part_name(number: int) -> str:
    """`scores-00007.safetensors`."""
    return f"scores-{number:05d}.safetensors"


def tokenizer_digest(tokenizer: Tokenizer | Path | str) -> str:
    """sha256 of a tokenizer's JSON text without its white space; of a `Tokenizer` or a `tokenizer.json` file.

    Raises:
        InputError: the file cannot be read as a tokenizer.
    """
    if not isinstance(tokenizer, Tokenizer):
        try:
            tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the library raises a plain Exception for every kind of failure
            raise InputError(
                f"tokenizer: expected a tokenizers file at {tokenizer}: {reason(error)}"
            ) from error
    return hashlib.sha256(tokenizer.to_str(pretty=False).encode()).hexdigest()


def load_manifest(folder: Path) -> Manifest:
    """Reads and checks `manifest.json`.

    Raises:
        InputError: there is none, or it is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"scores: expected a folder that `fastlm score` wrote (with {MANIFEST}), found none at {folder}"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"scores: {path} cannot be read: {reason(error)}") from error
    found = value.get("format") if isinstance(value, dict) else type(value).__name__
    if found != FORMAT:
        raise InputError(f"scores: expected format {FORMAT} in {path}, found {found!r}")
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(str(part) for part in item["loc"])
        raise InputError(f"scores: {where} in {path}: {item['msg']}, got {item['input']!r}") from None


# Layout


@dataclass(frozen=True)
class Layout:
    """The documents of a corpus in the order of their keys, and the parts that their values are cut into."""

    keys: Keys  # (N, 16), ascending, distinct
    lengths: Counts  # (N,) tokens
    starts: Counts  # (N + 1,) first value of each document; the last is the number of values
    bounds: Counts  # (P + 1,) first value of each part

    @staticmethod
    def plan(keys: Keys, lengths: Counts, *, context: int | None, part_tokens: int) -> Layout:
        """Cuts the values of sorted documents into parts of at most `part_tokens`; a longer piece is a part of its own."""
        values = np.maximum(lengths - 1, 0)
        starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(values)))
        pieces = starts if context is None else piece_starts(starts, context)
        bounds = [0]
        while bounds[-1] < starts[-1]:
            here = bounds[-1]
            at = int(np.searchsorted(pieces, here + part_tokens, side="right")) - 1
            if pieces[at] <= here:  # one piece is more than a part
                at = int(np.searchsorted(pieces, here, side="right"))
            bounds.append(int(pieces[at]))
        return Layout(keys, lengths, starts, np.asarray(bounds, np.int64))

    @property
    def num_parts(self) -> int:
        return len(self.bounds) - 1

    def documents_of(self, part: int) -> tuple[int, int]:
        """First document, and one past the last, that may have values in a part."""
        first = int(np.searchsorted(self.starts, self.bounds[part], side="right")) - 1
        return first, int(np.searchsorted(self.starts, self.bounds[part + 1], side="left"))

    def pieces_of(self, part: int, context: int | None) -> list[tuple[int, int, int]]:
        """`(document, first position, one past the last)` of each run of the model, in the order of the values."""
        begin, end = int(self.bounds[part]), int(self.bounds[part + 1])
        pieces = []
        for document in range(*self.documents_of(part)):
            origin, stop = int(self.starts[document]), min(int(self.starts[document + 1]), end)
            position = max(begin, origin)
            while position < stop:
                to = stop if context is None else min(stop, position + context)
                pieces.append((document, position - origin, to - origin))
                position = to
        return pieces

    def entries(self) -> tuple[PartEntry, ...]:
        """What the manifest says of the parts."""
        filled = self.starts[1:] > self.starts[:-1]
        entries = []
        for part in range(self.num_parts):
            first, stop = self.documents_of(part)
            tokens = int(self.bounds[part + 1] - self.bounds[part])
            entries.append(PartEntry(documents=int(filled[first:stop].sum()), tokens=tokens))
        return tuple(entries)


def corpus_digest(keys: Keys, lengths: Counts) -> str:
    """Of sorted documents: changes with any one's content; the order of the corpus and repetitions do not matter."""
    total = hashlib.sha256(keys.tobytes())
    total.update(lengths.astype("<i8").tobytes())
    return total.hexdigest()


def piece_starts(starts: Counts, context: int) -> Counts:
    """First value of every piece of every document, and the end."""
    values = np.diff(starts)
    counts = -(-values // context)
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.concatenate((np.repeat(starts[:-1], counts) + within * context, starts[-1:]))


# Files


def write_tensors(path: Path, tensors: dict[str, npt.NDArray[Any]], metadata: dict[str, str]) -> None:
    """Replaces `path` by a safetensors file in one step; equal contents give equal bytes."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, tensor in tensors.items():
        shape, stop = list(tensor.shape), offset + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype.newbyteorder("<")],
            "shape": shape,
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    blocks = [np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values()]
    write_bytes(path, b"".join((len(text).to_bytes(8, "little"), text, *blocks)))


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file whose size is what the header says."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...], int]]  # dtype, shape, offset in the file

    @staticmethod
    def open(path: Path) -> TensorFile:
        """Reads the header.

        Raises:
            ValueError: the file is no safetensors file or has another size; says what was expected and found.
            OSError: it cannot be read.
        """
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            count = int.from_bytes(handle.read(8), "little")
            if size < 8 or count > size - 8:
                raise ValueError(f"expected a safetensors file, found {size} bytes without a whole header")
            text = handle.read(count)
        try:
            header = json.loads(text)
            metadata = {str(name): str(value) for name, value in header.pop("__metadata__", {}).items()}
            tensors, end = {}, 0
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                shape = tuple(int(extent) for extent in entry["shape"])
                length = _DTYPES[entry["dtype"]].itemsize * int(np.prod(shape, dtype=np.int64))
                if stop - start != length or start < 0:
                    raise ValueError(f"{name} has {stop - start} bytes for shape {shape}")
                tensors[name] = (str(entry["dtype"]), shape, 8 + count + int(start))
                end = max(end, int(stop))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected a safetensors header: {reason(error)}") from error
        if size != 8 + count + end:
            raise ValueError(f"expected {8 + count + end} bytes, found {size}")
        return TensorFile(path, metadata, tensors)

    def map(self, name: str) -> npt.NDArray[Any]:
        """The tensor as a read-only memory map."""
        dtype, shape, offset = self.tensors[name]
        if 0 in shape:  # nothing can be mapped
            return np.empty(shape, _DTYPES[dtype])
        mapped: npt.NDArray[Any] = np.memmap(self.path, _DTYPES[dtype], "r", offset, shape)
        return mapped


def part_metadata(manifest: Manifest, number: int, tensors: dict[str, Values]) -> dict[str, str]:
    """What a part says of itself."""
    content = hashlib.sha256()
    for tensor in tensors.values():
        content.update(np.ascontiguousarray(tensor).data)
    return {
        "format": FORMAT,
        "part": str(number),
        "scores": manifest.digest(),
        "model": manifest.model,
        "corpus": manifest.corpus,
        "sha256": content.hexdigest(),
    }


def open_part(folder: Path, manifest: Manifest, number: int, digest: str) -> TensorFile:
    """The header of a part that belongs where it lies.

    Args:
        digest: `manifest.digest()`, which takes a while to compute for many parts.

    Raises:
        ValueError: it is truncated, of another part or of other scores.
        OSError: it is missing or cannot be read.
    """
    file = TensorFile.open(folder / part_name(number))
    for name, expected, what in (
        ("format", FORMAT, "format"),
        ("part", str(number), "part"),
        ("model", manifest.model, "scores of model"),
        ("corpus", manifest.corpus, "scores of corpus"),
        ("scores", digest, "scores"),
    ):
        if file.metadata.get(name) != expected:
            raise ValueError(f"expected {what} {expected}, found {file.metadata.get(name, 'none')}")
    shape = (manifest.parts[number].tokens,)
    wanted = dict.fromkeys(("nll", "entropy")[: 1 + manifest.entropy], ("F32", shape))
    found = {name: entry[:2] for name, entry in file.tensors.items()}
    if found != wanted:
        raise ValueError(f"expected tensors {wanted}, found {found}")
    return file


def check_content(file: TensorFile) -> None:
    """Reads a part through.

    Raises:
        ValueError: its numbers are not those that were written.
    """
    content = hashlib.sha256()
    for name in file.tensors:
        content.update(np.ascontiguousarray(file.map(name)).data)
    if content.hexdigest() != file.metadata.get("sha256"):
        raise ValueError(
            f"its content changed: expected sha256 {file.metadata.get('sha256')}, found {content.hexdigest()}"
        )
