"""Documents of `bench.rho1`: where clean text and noise are found, and which file serves what.

Everything comes from the running Python's own library, its headers, and those of torch, which every machine that runs this has.
"""

from __future__ import annotations

import importlib
import sys
import sysconfig
import types
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from bench import rho1_noise as noise
from bench.rho1_noise import CLEAN, KINDS, MIXED
from fastlm.training.corpus import find_corpus, path_fraction, read_documents

PART = 3000  # characters of a document at most
ROLES = (  # upper ends of the hash of a file's name
    ("held-out", 0.10),
    ("noise held-out", 0.16),
    ("reference", 0.28),
    ("noise", 0.55),
    ("mixed", 0.65),
    ("train", 1.0),
)
NEAR_COPY = 0.3  # share of a held-out document's longer lines found elsewhere from which it counts as a copy
LONG_LINE = 25  # characters; shorter lines are alike everywhere


@dataclass(frozen=True)
class Document:
    """A text as blocks of one kind each."""

    name: str
    kind: str  # of `KINDS`, or `MIXED`
    blocks: tuple[tuple[int, str], ...]


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
    by_kind = {kind: of_kind(noises, kind) for kind in KINDS[1:]}
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


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    """Those of one kind."""
    return [document for document in documents if document.kind == kind]
