"""The layout of scores over parts, and what opening them finds."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fastlm.methods import rho1
from fastlm.methods.rho1.score_files import Layout, TensorFile, part_name, write_tensors
from fastlm.methods.rho1.store import key_bytes
from fastlm.training import InputError
from tests.methods.rho1.scored import SETTINGS, contents, score_small, small_documents, small_model

# Keys


def test_a_key_depends_on_the_tokens_and_on_nothing_else() -> None:
    tokens = [5, 0, 70_000, 2**31 - 1]
    key = rho1.document_key(tokens)
    content = b"".join(token.to_bytes(4, "little") for token in tokens)
    assert key == hashlib.blake2b(content, digest_size=16).hexdigest()
    for same in (tuple(tokens), np.array(tokens, np.uint32), torch.tensor(tokens), np.array(tokens)[::1]):
        assert rho1.document_key(same) == key
    assert rho1.document_key([*tokens, 0]) != key
    assert rho1.document_key([]) == rho1.document_key(np.empty(0, np.int64))


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([-1, 2], r"expected token ids in \[0, 2\^31\), got -1 to 2"),
        ([2**31], r"expected token ids in \[0, 2\^31\)"),
        ([0.5], r"expected a flat sequence of integers, got float64 of shape \(1,\)"),
        ([[1, 2]], r"expected a flat sequence of integers, got int64 of shape \(1, 2\)"),
    ],
)
def test_what_is_no_document_has_no_key(tokens: list[float], text: str) -> None:
    with pytest.raises(InputError, match=text):
        rho1.document_key(tokens)


# Layout


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    context=st.one_of(st.none(), st.integers(1, 20)),
    part_tokens=st.integers(1, 50),
)
def test_parts_hold_every_value_once_and_cut_where_the_model_starts_anew(
    lengths: list[int], context: int | None, part_tokens: int
) -> None:
    keys = np.zeros((len(lengths), 16), np.uint8)
    layout = Layout.plan(keys, np.asarray(lengths, np.int64), context=context, part_tokens=part_tokens)
    seen = []
    for part in range(layout.num_parts):
        pieces = layout.pieces_of(part, context)
        here = [
            int(layout.starts[document]) + position
            for document, start, stop in pieces
            for position in range(start, stop)
        ]
        assert here == list(range(layout.bounds[part], layout.bounds[part + 1]))
        assert len(here) <= part_tokens or len(pieces) == 1
        for document, start, stop in pieces:
            last = lengths[document] - 1
            assert start == 0 if context is None else start % context == 0
            assert stop == (last if context is None else min(last, start + context))
        seen += here
    assert seen == list(range(sum(max(0, length - 1) for length in lengths)))
    assert sum(entry.tokens for entry in layout.entries()) == len(seen)


def test_the_layout_does_not_depend_on_the_order_of_the_corpus(tmp_path: Path) -> None:
    documents = small_documents()
    rho1.score(small_model(), documents, tmp_path / "a", context=16, **SETTINGS)
    rho1.score(small_model(), documents[::-1] + documents[:4], tmp_path / "b", context=16, **SETTINGS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# Files


def test_files_are_safetensors_with_equal_bytes_for_equal_contents(tmp_path: Path) -> None:
    tensors = {"nll": np.arange(5, dtype=np.float32), "n": np.arange(3)}
    write_tensors(tmp_path / "a", tensors, {"x": "1", "y": "2"})
    write_tensors(tmp_path / "b", tensors, {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for name, tensor in load_file(tmp_path / "a").items():
        assert np.array_equal(tensor, tensors[name])
        assert np.array_equal(TensorFile.open(tmp_path / "a").map(name), tensors[name])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scores") / "s"
    score_small(out, entropy=True, command="fastlm score run --out s")
    return out


@pytest.fixture
def scores(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "s"))


def test_documents_are_found_by_content(scores: Path) -> None:
    store = rho1.open_scores(scores)
    documents = small_documents()
    assert len(store) == len({rho1.document_key(d) for d in documents}) == len(documents) - 1
    assert sorted(store.keys()) == list(store.keys())
    everything = np.concatenate([store.part("nll", n) for n in range(len(store.manifest.parts))])
    first = store.locate(
        np.stack([np.frombuffer(key_bytes(d), np.uint8) for d in [*documents, np.array([1, 2, 3])]])
    )
    assert first[-1] == -1
    for tokens, start in zip(documents, first[:-1], strict=True):
        key, count = rho1.document_key(tokens), max(0, len(tokens) - 1)
        assert key in store
        assert store.lengths(key) == len(tokens)
        whole = store.nll(key, 0, len(tokens))
        assert np.array_equal(whole, everything[start : start + count])
        assert np.array_equal(store.nll(key, 3, 9), whole[3:9])
        assert np.array_equal(store.nll(key, 3, 10**9), whole[3:])
        assert store.entropy(key, 0, 10**9).shape == whole.shape
    for unknown in (rho1.document_key([1, 2, 3]), "00", "no key"):
        assert unknown not in store
        with pytest.raises(KeyError, match="is not among the"):
            store.nll(unknown, 0, 1)


def test_a_store_travels_to_another_process_without_its_numbers(scores: Path) -> None:
    store = rho1.open_scores(scores)
    key = rho1.document_key(small_documents()[8])
    store.nll(key, 0, 99)
    content = pickle.dumps(store)
    assert len(content) < 1000
    assert np.array_equal(pickle.loads(content).nll(key, 0, 99), store.nll(key, 0, 99))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def exchange(folder: Path) -> None:
    (folder / part_name(1)).rename(folder / "x")
    (folder / part_name(2)).rename(folder / part_name(1))
    (folder / "x").rename(folder / part_name(2))


REPAIR = r"run: fastlm score run --out s"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (
        lambda s: cut(s / part_name(1)),
        rf"scores-00001.safetensors: expected \d+ bytes, found \d+; .*again, {REPAIR}",
    ),
    "empty": (
        lambda s: os.truncate(s / part_name(1), 0),
        rf"scores-00001.*expected a safetensors file, found 0 bytes.*{REPAIR}",
    ),
    "exchanged": (
        exchange,
        rf"scores-00001.*: expected part 1, found 2; .*expected part 2, found 1.*{REPAIR}",
    ),
    "missing": (
        lambda s: (s / part_name(3)).unlink(),
        rf"is unfinished: 1 of \d+ parts are missing; to score what is missing, {REPAIR}",
    ),
    "no index": (lambda s: (s / "documents.safetensors").unlink(), rf"lost or damaged .*{REPAIR}"),
    "another index": (lambda s: flip(s / "documents.safetensors"), r"lost or damaged .*expected corpus"),
    "no manifest": (lambda s: (s / "manifest.json").unlink(), r"expected a folder that `fastlm score` wrote"),
    "half a manifest": (lambda s: cut(s / "manifest.json"), r"manifest.json cannot be read"),
    "another format": (
        lambda s: (s / "manifest.json").write_text('{"format": "x-2"}'),
        r"expected format fastlm-scores-1 in .*, found 'x-2'",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_with_what_repairs_it(scores: Path, name: str) -> None:
    damage, text = DAMAGES[name]
    damage(scores)
    with pytest.raises(InputError, match=text):
        rho1.open_scores(scores)


def test_a_part_of_other_scores_is_refused(scores: Path, tmp_path: Path) -> None:
    rho1.score(small_model(seed=1), small_documents(), tmp_path / "t", context=16, entropy=True, **SETTINGS)
    shutil.copy(tmp_path / "t" / part_name(0), scores / part_name(0))
    with pytest.raises(
        InputError, match=r"scores-00000.safetensors: expected scores of model \w+, found \w+"
    ):
        rho1.open_scores(scores)


def test_changed_numbers_are_found_by_reading_them(scores: Path) -> None:
    flip(scores / part_name(2))
    store = rho1.open_scores(scores)  # sizes and headers are right
    with pytest.raises(InputError, match=rf"scores-00002.safetensors: its content changed.*{REPAIR}"):
        store.verify()


def test_another_tokenizer_or_corpus_is_refused(scores: Path) -> None:
    store = rho1.open_scores(scores)
    rho1.open_scores(scores, corpus_digest=store.manifest.corpus)
    with pytest.raises(InputError, match=r"of another tokenizer: expected abc, found plain token ids"):
        rho1.open_scores(scores, tokenizer_digest="abc")
    with pytest.raises(InputError, match=rf"of another corpus: expected abc, found {store.manifest.corpus}"):
        rho1.open_scores(scores, corpus_digest="abc")


def test_the_digest_tells_settings_apart_and_not_the_command(scores: Path) -> None:
    manifest = rho1.open_scores(scores).manifest
    assert manifest.model_copy(update={"command": None}).digest() == manifest.digest()
    assert manifest.model_copy(update={"threads": 2}).digest() != manifest.digest()
    saved = json.loads((scores / "manifest.json").read_text())
    assert saved["parts"][0].keys() == {"documents", "tokens"}


def test_entropies_must_have_been_asked_for(tmp_path: Path) -> None:
    score_small(tmp_path / "s")
    store = rho1.open_scores(tmp_path / "s")
    with pytest.raises(InputError, match=r"holds no entropies; score the corpus with --entropy"):
        store.entropy(rho1.document_key(small_documents()[8]), 0, 4)
