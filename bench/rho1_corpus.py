"""The text of `bench.rho1`: clean and noisy documents of the running Python's own library, every token labelled.

Clean text is the library's source (the files that `fastlm train` reads) and the docstrings of its compiled modules. A file has one
role, decided by a hash of its name: held out, source of held-out noise, reference, source of noise, clean part of documents where
clean and noise alternate, clean training text. No text of one role occurs in another; held-out documents that share lines with other
roles are dropped. Blocks are tokenized one by one, so a token never straddles two of them and its label is exact.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from bench.rho1_documents import Document, make_documents, of_kind
from bench.rho1_noise import CLEAN, KINDS, MIXED
from fastlm.training.atomic import new_folder, write_json
from fastlm.training.corpus import TextFile, path_fraction
from fastlm.training.errors import RunError
from fastlm.training.tokenizer import load_tokenizer, mark_of, spelling_of, train_tokenizer

# Shares of the training tokens by kind of document; about half of the mixed tokens are noise.
SHARES = {
    "clean": 0.40,
    MIXED: 0.20,
    "base64": 0.06,
    "hex": 0.06,
    "minified": 0.08,
    "words shuffled": 0.06,
    "lines shuffled": 0.04,
    "C headers": 0.06,
    "other scripts": 0.04,
}
DOCUMENT_KINDS = (*KINDS, MIXED)
SIDES = ("train", "reference", "held-out", "noise held-out", "page")


@dataclass(frozen=True)
class CorpusSizes:
    """How much text, in tokens; what is there may be less."""

    train_tokens: int = 1_200_000
    reference_tokens: int = 100_000
    held_out_tokens: int = 66_000
    noise_held_out_tokens: int = 33_000
    page_tokens: int = 8_000
    vocab_size: int = 2048
    max_bytes: int | None = None  # of the library's source; None: all


class Documents:
    """Token sequences with a label per token; read by the samplers of `fastlm.training.batches` like its token store.

    `which` chooses what `tokens` gives: `tokens` themselves, their `labels` (numbers of `KINDS`) or `kinds`, those of their document
    (numbers of `DOCUMENT_KINDS`).
    """

    def __init__(self, arrays: dict[str, Any], which: str = "tokens") -> None:
        self.arrays = arrays
        kinds = which == "kinds"
        self._values = np.repeat(arrays["document_kinds"], arrays["lengths"]) if kinds else arrays[which]
        self.lengths, self.document_kinds = arrays["lengths"], arrays["document_kinds"]
        self._starts = np.cumsum(self.lengths) - self.lengths

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def tokens(self, document: int, start: int, stop: int) -> Any:
        """Values `start:stop` of one document, int64."""
        first = int(self._starts[document])
        stop = min(stop, int(self.lengths[document]))
        return self._values[first + start : first + stop].astype(np.int64)

    def giving(self, which: str) -> Documents:
        """The same documents, giving something else."""
        return Documents(self.arrays, which)


@dataclass(frozen=True)
class LabelledCorpus:
    """All sides, the tokenizer's spellings and what is known about where it came from."""

    sides: dict[str, Documents]
    spelling: list[bytes]  # none for the mark between documents
    manifest: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        return len(self.spelling)


def build_corpus(folder: Path, sizes: CorpusSizes, report: Callable[[str], None]) -> LabelledCorpus:
    """The corpus in `folder`, made there if it is not there yet.

    Raises:
        RunError: the folder holds a corpus of other sizes, or is damaged.
        InputError: there is no source of the library.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as temporary:
            _write(temporary, sizes, report)
    return open_corpus(folder, sizes)


def open_corpus(folder: Path, sizes: CorpusSizes) -> LabelledCorpus:
    """Opens what `build_corpus` made.

    Raises:
        RunError: it is not there, damaged, or of other sizes.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["sizes"] != asdict(sizes):
            raise RunError(
                f"corpus: expected {asdict(sizes)}, found {manifest['sizes']} in {folder}; give another --work"
            )
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        with np.load(folder / "arrays.npz", allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise RunError(
            f"corpus: {folder} is missing or damaged ({error}); delete it and start again"
        ) from error
    sides = {side: _side(arrays, side) for side in SIDES}
    if _digest(sides) != manifest["digest"]:
        raise RunError(
            f"corpus: the digest of {folder / 'arrays.npz'} is wrong; delete the folder and start again"
        )
    return LabelledCorpus(sides, spelling_of(tokenizer), manifest)


def _side(arrays: dict[str, Any], side: str) -> Documents:
    return Documents(
        {name: arrays[f"{side}/{name}"] for name in ("tokens", "labels", "lengths", "document_kinds")}
    )


def _digest(sides: dict[str, Documents]) -> str:
    total = hashlib.sha256()
    for side in SIDES:
        for name in ("tokens", "labels", "lengths", "document_kinds"):
            total.update(np.ascontiguousarray(sides[side].arrays[name]).tobytes())
    return total.hexdigest()


def _write(folder: Path, sizes: CorpusSizes, report: Callable[[str], None]) -> None:
    report("looking for text")
    pools, used = make_documents(sizes.max_bytes)
    report("training the tokenizer")
    # The first tokenizer only tells how long documents are; that of the experiment is trained on the chosen ones.
    rough = {kind: share * sizes.train_tokens * 4 for kind, share in SHARES.items()}
    first = [
        document
        for kind in SHARES
        for document in taken(of_kind(pools["train"], kind), rough[kind], _characters)
    ]
    tokenizer = _tokenizer(folder, first, sizes.vocab_size)
    counts = _counter(tokenizer)
    chosen = {
        "train": [
            document
            for kind, share in SHARES.items()
            for document in taken(of_kind(pools["train"], kind), share * sizes.train_tokens, counts)
        ],
        "reference": taken(pools["reference"], sizes.reference_tokens, counts),
        "held-out": taken(pools["held-out"], sizes.held_out_tokens, counts),
        "noise held-out": [
            document
            for kind in KINDS[1:]
            for document in taken(
                of_kind(pools["noise held-out"], kind), sizes.noise_held_out_tokens / len(KINDS[1:]), counts
            )
        ],
        "page": [
            document
            for kind in DOCUMENT_KINDS
            for document in taken(
                of_kind(pools["page"], kind), sizes.page_tokens / len(DOCUMENT_KINDS), counts
            )
        ],
    }
    tokenizer = _tokenizer(folder, chosen["train"], sizes.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    arrays = {
        f"{side}/{name}": values
        for side in SIDES
        for name, values in encoded(chosen[side], tokenizer).items()
    }
    np.savez(folder / "arrays.npz", **arrays)
    sides = {side: _side(arrays, side) for side in SIDES}
    manifest = {
        "sizes": asdict(sizes),
        "digest": _digest(sides),
        "python": platform.python_version(),
        "vocab_size": tokenizer.get_vocab_size(),
        "used": used,
        "page": [document.name for document in chosen["page"]],
        "sides": {side: _described(sides[side], chosen[side]) for side in SIDES},
    }
    write_json(folder / "manifest.json", manifest)
    report(
        f"{sides['train'].num_tokens:,} training tokens, {manifest['sides']['train']['noise_share']:.1%} of them noise; "
        f"held out {sides['held-out'].num_tokens:,} clean, {sides['noise held-out'].num_tokens:,} noise; "
        f"reference {sides['reference'].num_tokens:,}"
    )


def _described(side: Documents, documents: list[Document]) -> dict[str, Any]:
    labels = Counter(side.arrays["labels"].tolist())
    return {
        "documents": side.num_documents,
        "files": len({document.name.split("#")[0] for document in documents}),
        "tokens": side.num_tokens,
        "noise_share": round(1 - labels[CLEAN] / max(1, side.num_tokens), 4),
        "tokens_by_kind": {kind: labels[i] for i, kind in enumerate(KINDS)},
        "documents_by_kind": dict(Counter(document.kind for document in documents)),
    }


def _tokenizer(folder: Path, documents: list[Document], vocab_size: int) -> Any:
    text = "\n".join(text for document in documents for _, text in document.blocks).encode()
    path = folder / "mix.txt"
    path.write_bytes(text)
    try:
        return train_tokenizer(
            [TextFile("mix", path, len(text), hashlib.sha256(text).hexdigest())], vocab_size
        )
    finally:
        path.unlink()


def encoded(documents: list[Document], tokenizer: Any) -> dict[str, Any]:
    """Arrays of the documents `<mark> blocks <mark>`; a mark has the label of the block beside it."""
    mark = mark_of(tokenizer)
    blocks = [text for document in documents for _, text in document.blocks]
    ids = iter(tokenizer.encode_batch_fast(blocks, add_special_tokens=False))
    tokens: list[int] = []
    labels: list[int] = []
    lengths = []
    for document in documents:
        before = len(tokens)
        tokens.append(mark)
        labels.append(document.blocks[0][0])
        for kind, _ in document.blocks:
            found = next(ids).ids
            tokens += found
            labels += [kind] * len(found)
        tokens.append(mark)
        labels.append(document.blocks[-1][0])
        lengths.append(len(tokens) - before)
    return {
        "tokens": np.array(tokens, np.int32),
        "labels": np.array(labels, np.int8),
        "lengths": np.array(lengths, np.int64),
        "document_kinds": np.array([DOCUMENT_KINDS.index(document.kind) for document in documents], np.int8),
    }


def taken(documents: list[Document], target: float, size: Callable[[Document], int]) -> list[Document]:
    """Documents in an order of their own (a hash of the name) until there are `target` units; all if there are fewer."""
    chosen, total = [], 0
    for document in sorted(documents, key=lambda document: path_fraction("order/" + document.name)):
        if total >= target:
            break
        chosen.append(document)
        total += size(document)
    return chosen


def _characters(document: Document) -> int:
    return sum(len(text) for _, text in document.blocks)


def _counter(tokenizer: Any) -> Callable[[Document], int]:
    def count(document: Document) -> int:
        texts = [text for _, text in document.blocks]
        return 2 + sum(
            len(found.ids) for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        )

    return count
