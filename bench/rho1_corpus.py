"""The text of `bench.rho1`: clean and noisy documents of the running Python's own library, every token labelled.

Clean text is the library's source (the files that `fastlm train` reads) and the docstrings of its compiled modules. A file has one
role, decided by a hash of its name: held out, source of held-out noise, reference, source of noise, clean part of documents where
clean and noise alternate, clean training text. No text of one role occurs in another; held-out documents that share lines with other
roles are dropped. Blocks are tokenized one by one, so a token never straddles two of them and its label is exact.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import sys
import sysconfig
import types
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np

from bench import rho1_noise as noise
from bench.rho1_noise import CLEAN, KINDS, MIXED
from fastlm.training.atomic import new_folder, write_json
from fastlm.training.corpus import TextFile, find_corpus, path_fraction, read_documents
from fastlm.training.data import BYTE_OF_LETTER
from fastlm.training.errors import RunError
from fastlm.training.tokenizer import END_OF_TEXT, load_tokenizer, mark_of, train_tokenizer

PART = 3000  # characters of a document at most
ROLES = (  # upper ends of the hash of a file's name
    ("held-out", 0.10),
    ("noise held-out", 0.16),
    ("reference", 0.28),
    ("noise", 0.55),
    ("mixed", 0.65),
    ("train", 1.0),
)
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
NEAR_COPY = 0.3  # share of a held-out document's longer lines found elsewhere from which it counts as a copy
LONG_LINE = 25  # characters; shorter lines are alike everywhere
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


@dataclass(frozen=True)
class Document:
    """A text as blocks of one kind each."""

    name: str
    kind: str  # of `KINDS`, or `MIXED`
    blocks: tuple[tuple[int, str], ...]


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


DOCUMENT_KINDS = (*KINDS, MIXED)


def role_of(name: str) -> str:
    """What the file of this name is used for."""
    at = path_fraction("rho1/" + name)
    return next(role for role, end in ROLES if at < end)


def compiled_docstrings() -> Iterator[tuple[str, str]]:
    """(module, its docstrings) of the library's compiled modules, whose texts stand in no source file; every text once."""
    folder = sysconfig.get_config_var("DESTSHARED")
    names = set(sys.builtin_module_names)
    if folder and Path(folder).is_dir():
        names |= {path.name.split(".")[0] for path in Path(folder).iterdir() if _is_extension(path)}
    # Tests, modules that open a screen or a terminal, and modules that are not the library's.
    names = {name for name in names & set(sys.stdlib_module_names) if not name.startswith(("_test", "xx"))}
    seen: set[str] = set()
    for name in sorted(names - {"_tkinter", "readline", "_curses", "_curses_panel"}):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except ImportError:
            continue
        texts = []
        for text in _docstrings(module):
            if text not in seen:
                seen.add(text)
                texts.append(text.strip() + "\n\n")
        if texts:
            yield f"docstrings of {name}", "".join(texts)


def _docstrings(module: types.ModuleType) -> Iterator[str]:
    members: list[Any] = [module]
    for name in sorted(vars(module)):
        member = vars(module)[name]
        if getattr(member, "__module__", None) != module.__name__:
            continue
        members.append(member)
        if isinstance(member, type):
            members += [vars(member)[inner] for inner in sorted(vars(member))]
    for member in members:
        text = getattr(member, "__doc__", None)
        # The docstring of a plain value is that of its type, and says nothing here.
        callables = (types.ModuleType, type, types.BuiltinFunctionType, types.MethodDescriptorType)
        if isinstance(member, callables) and isinstance(text, str) and len(text) > 40:
            yield text


def _is_extension(path: Path) -> bool:
    return path.name.endswith(tuple(EXTENSION_SUFFIXES)) and path.is_file()


def parts_of(text: str, size: int = PART) -> list[str]:
    """Pieces of at most `size` characters, cut after a line end where there is one."""
    parts = []
    while text:
        cut = len(text) if len(text) <= size else (text.rfind("\n", 0, size) + 1 or size)
        parts.append(text[:cut])
        text = text[cut:]
    return parts


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
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"corpus: {folder} is missing or damaged ({error}); delete it and start again"
        ) from error
    sides = {side: _side(arrays, side) for side in SIDES}
    if _digest(sides) != manifest["digest"]:
        raise RunError(
            f"corpus: the digest of {folder / 'arrays.npz'} is wrong; delete the folder and start again"
        )
    spelling = [b""] * tokenizer.get_vocab_size()
    for text, number in tokenizer.get_vocab().items():
        if text != END_OF_TEXT:
            spelling[number] = bytes(BYTE_OF_LETTER[letter] for letter in text)
    return LabelledCorpus(sides, spelling, manifest)


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
        for document in taken(_of_kind(pools["train"], kind), rough[kind], _characters)
    ]
    tokenizer = _tokenizer(folder, first, sizes.vocab_size)
    counts = _counter(tokenizer)
    chosen = {
        "train": [
            document
            for kind, share in SHARES.items()
            for document in taken(_of_kind(pools["train"], kind), share * sizes.train_tokens, counts)
        ],
        "reference": taken(pools["reference"], sizes.reference_tokens, counts),
        "held-out": taken(pools["held-out"], sizes.held_out_tokens, counts),
        "noise held-out": [
            document
            for kind in KINDS[1:]
            for document in taken(
                _of_kind(pools["noise held-out"], kind), sizes.noise_held_out_tokens / len(KINDS[1:]), counts
            )
        ],
        "page": [
            document
            for kind in DOCUMENT_KINDS
            for document in taken(
                _of_kind(pools["page"], kind), sizes.page_tokens / len(DOCUMENT_KINDS), counts
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


def _of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document.kind == kind]


def make_documents(max_bytes: int | None) -> tuple[dict[str, list[Document]], dict[str, Any]]:
    """All documents there could be, by side, and a record of what they are made of."""
    corpus = find_corpus(None, held_out=0.5, max_bytes=max_bytes)
    texts: dict[str, dict[str, str]] = {role: {} for role, _ in ROLES}
    for file in (*corpus.train, *corpus.held_out):
        texts[role_of(file.name)][file.name] = "".join(read_documents(file))
    for name, text in compiled_docstrings():
        texts[role_of(name)][name] = text
    clean = {role: _cut_up(found, CLEAN) for role, found in texts.items()}
    others = [text for role, found in texts.items() if role != "held-out" for text in found.values()]
    held_out, copies = without_near_copies(clean["held-out"], others)
    used: dict[str, Any] = {
        "files": {role: len(found) for role, found in texts.items()},
        "near_copies": copies,
    }
    foreign = _foreign_text(used)
    kept, for_mixing = _noise(texts["noise"], foreign["noise"], used)
    pools = {
        "train": clean["train"] + kept + _mixed(clean["mixed"], for_mixing),
        "reference": clean["reference"],
        "held-out": held_out,
        "noise held-out": [],
        "page": [],
    }
    noise_held_out, noise_page = _noise(texts["noise held-out"], foreign["noise held-out"], used)
    pools["noise held-out"] = noise_held_out
    # The page shows text that neither model has seen.
    pools["page"] = noise_held_out + held_out + _mixed(held_out, noise_page)
    return pools, used


def _cut_up(texts: dict[str, str], kind: int) -> list[Document]:
    return [
        Document(f"{name}#{i}", KINDS[kind], ((kind, part),))
        for name, text in texts.items()
        for i, part in enumerate(parts_of(text))
        if part.strip()
    ]


def without_near_copies(documents: list[Document], others: Iterable[str]) -> tuple[list[Document], int]:
    """Documents of whose longer lines at most `NEAR_COPY` stand in other texts, and how many were dropped."""
    known = {line for text in others for line in _long_lines(text)}
    kept = []
    for document in documents:
        lines = [line for _, text in document.blocks for line in _long_lines(text)]
        if sum(line in known for line in lines) <= NEAR_COPY * len(lines):
            kept.append(document)
    return kept, len(documents) - len(kept)


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE]


def _noise(
    texts: dict[str, str], foreign: dict[str, dict[str, str]], used: dict[str, Any]
) -> tuple[list[Document], list[Document]]:
    """Noise documents made of these files: those that stand alone, and a fifth for mixing."""
    made: dict[str, dict[str, str]] = {kind: {} for kind in KINDS[1:]}
    for place, (name, text) in enumerate(
        sorted(texts.items(), key=lambda item: path_fraction("kind/" + item[0]))
    ):
        # One kind a file: no two noise documents are made of the same text. Compressed text is the shortest.
        kind = ("minified", "base64", "words shuffled", "minified", "base64", "lines shuffled")[place % 6]
        if kind == "minified":
            found = noise.minified(text)
            if found is None:
                used["not minified"] = used.get("not minified", 0) + 1
                continue
            made[kind][name] = found
        elif kind == "base64":
            made[kind][name] = noise.base64_lines(text)
        elif kind == "words shuffled":
            made[kind][name] = noise.shuffled_words(text, name)
        else:
            made[kind][name] = noise.shuffled_lines(text, name)
    for kind, found in foreign.items():
        made[kind] |= found
    if not made["hex"]:  # no compiled modules
        used["hex"] = "compressed source"
        names = list(made["base64"])[::2]
        made["hex"] = {name: noise.hex_lines(made["base64"].pop(name).encode()) for name in names}
    alone, mixing = [], []
    for kind, found in made.items():
        for document in _cut_up(found, KINDS.index(kind)):
            (mixing if path_fraction("mixing/" + document.name) < 0.2 else alone).append(document)
    return alone, mixing


def _mixed(clean: list[Document], noises: list[Document]) -> list[Document]:
    """Documents in which blocks of `clean` and of all kinds of noise take turns."""
    by_kind = {kind: _of_kind(noises, kind) for kind in KINDS[1:]}
    by_kind = {kind: found for kind, found in by_kind.items() if found}

    def stream(name: str) -> Iterator[tuple[int, str]]:
        draw = noise.seeded("mixed", name)
        while by_kind:
            kind = draw.choice(sorted(by_kind))
            yield KINDS.index(kind), draw.choice(by_kind[kind]).blocks[0][1]

    return [
        Document(
            f"{document.name} mixed",
            MIXED,
            tuple(noise.alternating(document.blocks[0][1], stream(document.name), document.name)),
        )
        for document in clean
    ]


def _foreign_text(used: dict[str, Any]) -> dict[str, dict[str, dict[str, str]]]:
    """Role → kind → name → text, of what is not Python source."""
    made: dict[str, dict[str, dict[str, str]]] = {
        role: {kind: {} for kind in ("hex", "C headers", "other scripts")}
        for role in ("noise", "noise held-out")
    }

    def put(kind: str, name: str, text: str) -> None:
        role = "noise held-out" if path_fraction("rho1/" + name) < 0.15 else "noise"
        made[role][kind][name] = text

    for name, text in _compiled_bytes():
        put("hex", name, text)
    used["hex"] = "compiled modules" if made["noise"]["hex"] and made["noise held-out"]["hex"] else "none"
    if used["hex"] == "none":
        for role in made:
            made[role]["hex"].clear()
    headers, found = [], _headers()
    for name, path in found:
        text = path.read_bytes().decode("utf-8", "replace")
        put("C headers", name, text)
        headers.append(len(text))
        if sum(headers) > 2_000_000:
            break
    catalogues = list(_catalogues())
    for name, text in catalogues:
        put("other scripts", name, text)
    scripts: dict[str, list[str]] = {}
    for script, line in noise.script_lines():
        scripts.setdefault(script, []).append(line)
    for script, lines in sorted(scripts.items()):
        for i in range(0, len(lines), 100):
            put("other scripts", f"{script} {i}", "".join(lines[i : i + 100]))
    used |= {"C headers": len(headers), "catalogues": len(catalogues), "scripts": len(scripts)}
    return made


def _compiled_bytes() -> Iterator[tuple[str, str]]:
    """Stretches of each compiled module of the library as hexadecimal digits."""
    folder = sysconfig.get_config_var("DESTSHARED")
    if not folder or not Path(folder).is_dir():
        return
    for path in sorted(path for path in Path(folder).iterdir() if _is_extension(path)):
        content = path.read_bytes()
        stretches = [content[i : i + 2048] for i in range(0, len(content), max(2048, len(content) // 8))]
        stretches = [
            part for part in stretches if len(zlib.compress(part)) > len(part) // 2
        ]  # tables and padding
        yield path.name, "".join(map(noise.hex_lines, stretches))


def _headers() -> list[tuple[str, Path]]:
    """(relative name, path) of C and C++ headers of Python and torch, in an order of their own."""
    import torch

    folders = [Path(sysconfig.get_paths()["include"]), Path(torch.__file__).parent / "include"]
    found = {}
    for folder in folders:
        for path in folder.rglob("*.h") if folder.is_dir() else ():
            found.setdefault(path.relative_to(folder).as_posix(), path)
    return sorted(found.items(), key=lambda item: path_fraction("header/" + item[0]))


def _catalogues() -> Iterator[tuple[str, str]]:
    """Translations that came with Python, at most 200 kB."""
    total = 0
    for folder in sorted({Path(sys.base_prefix) / "share" / "locale", Path(sys.prefix) / "share" / "locale"}):
        for path in sorted(folder.rglob("*.mo")) if folder.is_dir() else ():
            strings = noise.catalogue_strings(path.read_bytes())
            if strings and not path.relative_to(folder).as_posix().startswith("en"):
                text = "\n".join(strings) + "\n"
                total += len(text)
                yield path.relative_to(folder).as_posix(), text
                if total > 200_000:
                    return
