"""The text of the experiment with selective training: the same every time, nothing on two sides, every token's label right."""

from __future__ import annotations

import ast
import base64
import itertools
import os
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pytest

from bench import rho1_noise
from bench.rho1_corpus import (
    DOCUMENT_KINDS,
    SHARES,
    SIDES,
    CorpusSizes,
    Documents,
    build_corpus,
    encoded,
    open_corpus,
    taken,
)
from bench.rho1_documents import (
    LONG_LINE,
    NEAR_COPY,
    PART,
    ROLES,
    Document,
    compiled_docstrings,
    make_documents,
    parts_of,
    role_of,
    without_near_copies,
)
from bench.rho1_noise import CLEAN, KINDS, MIXED
from fastlm.training.errors import RunError
from fastlm.training.tokenizer import load_tokenizer, mark_of

TEXT = CorpusSizes(60_000, 3_000, 2_000, 3_000, 2_000, vocab_size=320, max_bytes=1_000_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    build_corpus(folder, TEXT, lambda _: None)
    return folder


@pytest.fixture(scope="module")
def corpus(folder):
    return open_corpus(folder, TEXT)


@pytest.fixture(scope="module")
def pools():
    return make_documents(TEXT.max_bytes)


@pytest.mark.slow
def test_another_process_makes_the_same_corpus(folder, corpus, tmp_path):
    code = (
        "import sys; from pathlib import Path; from bench.rho1_corpus import *;"
        f"c = build_corpus(Path(sys.argv[1]), {TEXT!r}, lambda _: None); print(c.manifest['digest'])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "again")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == corpus.manifest["digest"]
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_damaged_corpus_is_refused(folder, corpus, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in folder.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    with np.load(folder / "arrays.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays["train/tokens"][5] += 1
    np.savez(damaged / "arrays.npz", **arrays)
    with pytest.raises(RunError, match="digest"):
        open_corpus(damaged, TEXT)
    for content in (b"", (folder / "arrays.npz").read_bytes()[:5000]):
        (damaged / "arrays.npz").write_bytes(content)
        with pytest.raises(RunError, match="damaged"):
            open_corpus(damaged, TEXT)
    with pytest.raises(RunError, match="missing"):
        open_corpus(tmp_path / "none", TEXT)


def test_sides_are_of_the_asked_size_and_half_noise(corpus):
    train = corpus.manifest["sides"]["train"]
    assert 0.4 < train["noise_share"] < 0.65
    # Documents are taken whole: a part may be too much of each kind.
    assert TEXT.train_tokens * 0.9 < train["tokens"] < TEXT.train_tokens + len(SHARES) * PART
    assert set(train["documents_by_kind"]) == set(DOCUMENT_KINDS)
    for side in ("reference", "held-out"):
        assert corpus.manifest["sides"][side]["noise_share"] == 0
    assert corpus.manifest["sides"]["noise held-out"]["noise_share"] == 1
    assert corpus.vocab_size == TEXT.vocab_size


def test_a_file_serves_one_side(pools):
    documents, _ = pools
    files = {
        side: {document.name.split("#")[0] for document in found}
        for side, found in documents.items()
        if side != "page"  # made of held-out text
    }
    assert all(files.values())
    for one, other in itertools.combinations(files, 2):
        assert not files[one] & files[other], (one, other)
    roles = {"held-out": {"held-out"}, "reference": {"reference"}}
    for side, expected in roles.items():
        assert {role_of(name) for name in files[side]} == expected
    # Within the training text no file stands twice either: mixed, noisy and clean documents are of different ones.
    kinds: dict[str, set[str]] = {}
    for document in documents["train"]:
        kinds.setdefault(document.name.split("#")[0], set()).add(document.kind)
    assert all(len(found) == 1 for found in kinds.values())


def test_held_out_text_is_nowhere_else(pools):
    """Longer lines of each held-out document, looked up in the text of all other sides: blocks, so also inside mixed ones."""
    documents, used = pools
    elsewhere = {
        line.strip()
        for side in ("train", "reference", "noise held-out")
        for document in documents[side]
        for _, text in document.blocks
        for line in text.splitlines()
    }
    for document in documents["held-out"]:
        lines = [line.strip() for _, text in document.blocks for line in text.splitlines()]
        lines = [line for line in lines if len(line) >= LONG_LINE]
        assert sum(line in elsewhere for line in lines) <= NEAR_COPY * len(lines), document.name
    assert used["near_copies"] >= 0


def test_near_copies_are_dropped():
    lines = [f"line number {i} of a text that is long enough" for i in range(10)]
    document = Document("a#0", "clean", ((CLEAN, "\n".join(lines)),))
    few, many = "\n".join(lines[:3]), "\n".join("    " + line for line in lines[:4])
    assert without_near_copies([document], [few]) == ([document], 0)
    assert without_near_copies([document], ["something else", many]) == ([], 1)
    short = Document("b#0", "clean", ((CLEAN, "x = 1\n" * 20),))
    assert without_near_copies([short], ["x = 1\n"]) == ([short], 0)


def test_every_token_has_the_label_of_its_block(folder):
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    mark = mark_of(tokenizer)
    blocks = ((CLEAN, "def f(x):\n"), (3, "é€𝄞 = 1;\n"), (CLEAN, "    return x\n"), (1, "QUJD\n"))
    arrays = encoded([Document("m", MIXED, blocks), Document("c", "clean", blocks[:1])], tokenizer)
    documents = Documents(arrays)
    values, labels = (each.tokens(0, 0, 10**6).tolist() for each in (documents, documents.giving("labels")))
    assert values[0] == values[-1] == mark
    assert (labels[0], labels[-1]) == (CLEAN, 1)
    found = [
        (label, tokenizer.decode([values[i] for i, _ in group]))
        for label, group in itertools.groupby(list(enumerate(labels))[1:-1], key=lambda pair: pair[1])
    ]
    assert found == list(blocks)
    assert documents.giving("kinds").tokens(0, 0, 3).tolist() == [DOCUMENT_KINDS.index(MIXED)] * 3
    assert documents.tokens(1, 0, 1).tolist() == [mark]
    assert documents.num_tokens == len(arrays["tokens"]) == len(arrays["labels"])


def test_documents_of_one_kind_have_its_label_throughout(corpus):
    for name in SIDES:
        side = corpus.sides[name]
        for i in range(side.num_documents):
            labels = set(side.giving("labels").tokens(i, 0, 10**6).tolist())
            kind = DOCUMENT_KINDS[side.document_kinds[i]]
            assert labels == {KINDS.index(kind)} if kind != MIXED else len(labels) > 1 and CLEAN in labels


def test_mixed_documents_hold_their_clean_text_whole(pools):
    documents, _ = pools
    mixed = [document for document in documents["train"] if document.kind == MIXED]
    seen = Counter(kind for document in mixed for kind, _ in document.blocks)
    assert len(seen) > 5
    for document in mixed[:20]:
        kinds = [kind == CLEAN for kind, _ in document.blocks]
        assert all(a != b for a, b in itertools.pairwise(kinds))  # turns
        assert all(text.endswith("\n") for _, text in document.blocks)


def test_blocks_take_turns_and_lose_nothing():
    clean = "".join(f"line {i}\n" for i in range(40))
    noise = iter([(2, "ab" * 400), (5, "short"), (1, "z" * 500)])
    blocks = rho1_noise.alternating(clean, noise, "seed")
    assert "".join(text for kind, text in blocks if kind == CLEAN).startswith(clean[:50])
    assert clean.startswith("".join(text for kind, text in blocks if kind == CLEAN))
    assert [kind for kind, _ in blocks if kind != CLEAN] == [2, 5, 1][
        : sum(kind != CLEAN for kind, _ in blocks)
    ]
    assert all(120 <= len(text) <= 321 for kind, text in blocks if kind in (1, 2))


def test_parts_put_together_are_the_text():
    text = "".join("x" * (i % 90) + "\n" for i in range(300)) + "y" * 9000
    parts = parts_of(text)
    assert "".join(parts) == text
    assert max(map(len, parts)) <= PART
    assert all(part.endswith("\n") for part in parts[:3])
    assert parts_of("") == []


def test_taken_does_not_depend_on_the_others():
    documents = [Document(f"d{i}", "clean", ()) for i in range(20)]
    chosen = taken(documents, 5, lambda _: 1)
    assert len(chosen) == 5
    assert taken(documents[::-1], 5, lambda _: 1) == chosen
    assert set(map(id, taken([d for d in documents if d is not chosen[0]], 4, lambda _: 1))) == set(
        map(id, chosen[1:])
    )
    assert len(taken(documents, 100, lambda _: 1)) == 20


def test_roles_are_a_partition():
    ends = [end for _, end in ROLES]
    assert ends == sorted(ends)
    assert ends[-1] == 1
    counts = Counter(role_of(f"file{i}.py") for i in range(4000))
    low = 0.0
    for role, end in ROLES:
        assert counts[role] / 4000 == pytest.approx(end - low, abs=0.02)
        low = end


def test_minified_source_is_short_and_says_the_same():
    source = (
        '"""Module."""\nimport os  # comment\n\n\ndef function(argument):\n    """Docstring."""\n'
        "    if argument is not None and len(argument) > 3:\n        # why\n        return [argument, 'text', os.sep]\n"
    )
    found = rho1_noise.minified(source)
    assert found == "import a;def b(c):if c is not None and len(c)>3:return[c,'text',a.d];\n"
    assert rho1_noise.minified("def broken(:\n") is None
    assert rho1_noise.minified("x = 'a'\n'not a docstring' + x\n").count("'") == 4
    line = rho1_noise.minified("value = 1\nother = value + 1\n")
    assert ast.unparse(ast.parse(line.strip())) == "a = 1\nb = a + 1"


def test_short_names_are_no_keywords():
    names = list(itertools.islice(rho1_noise.short_names(), 800))
    assert names[:3] == ["a", "b", "c"]
    assert len(set(names)) == 800
    assert not {"as", "if", "in", "is", "or"} & set(names)


def test_shuffled_text_has_the_same_parts_in_another_order():
    text = "".join(f"line {i} of many\n" for i in range(50))
    lines, words = rho1_noise.shuffled_lines(text, "a"), rho1_noise.shuffled_words(text, "a")
    assert sorted(lines.splitlines()) == sorted(text.splitlines())
    assert sorted(words.split()) == sorted(text.split())
    assert lines != text
    assert words.split() != text.split()
    assert lines == rho1_noise.shuffled_lines(text, "a") != rho1_noise.shuffled_lines(text, "b")


def test_blobs_are_what_they_say():
    assert zlib.decompress(base64.b64decode(rho1_noise.base64_lines("text é"))).decode() == "text é"
    lines = rho1_noise.hex_lines(bytes(range(70)))
    assert bytes.fromhex(lines.replace("\n", "")) == bytes(range(70))
    assert [len(line) for line in lines.splitlines()] == [64, 64, 12]


def test_strings_of_catalogues(tmp_path):
    import struct

    messages = [
        ("", "Content-Type: text/plain; charset=UTF-8\n"),
        ("tree", "Baum"),
        ("leaf\0leaves", "Blatt\0Blätter"),
    ]
    ids, strings = b"", b""
    head, tables = 28, [[], []]
    for text, translation in messages:
        tables[0].append((len(text.encode()), head + 16 * len(messages) + len(ids)))
        ids += text.encode() + b"\0"
        tables[1].append((len(translation.encode()), len(strings)))
        strings += translation.encode() + b"\0"
    start = head + 16 * len(messages) + len(ids)
    tables[1] = [(length, start + offset) for length, offset in tables[1]]
    content = struct.pack("<7I", 0x950412DE, 0, 3, head, head + 24, 0, 0)
    content += b"".join(struct.pack("<2I", *entry) for table in tables for entry in table) + ids + strings
    assert rho1_noise.catalogue_strings(content) == ["Baum", "Blatt", "Blätter"]
    assert rho1_noise.catalogue_strings(b"something else, long enough") == []
    assert rho1_noise.catalogue_strings(content[:60]) == []


def test_docstrings_of_compiled_modules_stand_in_no_source_file():
    found = dict(compiled_docstrings())
    assert "Return the sine of x" in found["docstrings of math"]
    assert len(found) > 20
    together = "".join(found.values())
    assert together.count("Return the sine of x (measured in radians).") == 1
    assert together.count("Create and return a new object.") <= 1  # inherited by nearly every type


def test_letters_of_other_scripts():
    lines = rho1_noise.script_lines()
    assert ("GREEK", "α 03b1 greek small letter alpha\n") in lines
    assert len(lines) > 3000
    assert not any(script in {"LATIN", "CJK"} for script, _ in lines)
