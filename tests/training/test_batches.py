"""Packed rows: every token predicted once per epoch, nothing across documents, order from the seed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlm.training import RunError
from fastlm.training.batches import IGNORE_INDEX, PackedRow, PackedSampler, evaluation_rows, pack
from fastlm.training.shards import ShardWriter, TokenStore

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=12)


def make_store(
    folder: Path, lengths: list[int], *, shard_tokens: int = 50, vocab_size: int = 60000
) -> TokenStore:
    """Documents of different tokens throughout, so that every token tells where it is from."""
    writer = ShardWriter(folder, "text", vocab_size, shard_tokens=shard_tokens)
    first = 0
    for length in lengths:
        writer.add(list(range(first, first + length)), length)
        first += length
    writer.close()
    return TokenStore(folder, "text")


def starts_of(lengths: list[int]) -> set[int]:
    return set(np.cumsum([0, *lengths])[:-1].tolist())


# Shards


@pytest.mark.parametrize("vocab_size", [300, 65536, 65537])
def test_shards_give_back_every_document(tmp_path: Path, vocab_size: int) -> None:
    lengths = [30, 30, 200, 1, 49]
    store = make_store(tmp_path, lengths, vocab_size=vocab_size)
    assert len(store.shards) == 4
    assert store.shards[0].dtype == (np.uint16 if vocab_size <= 65536 else np.uint32)
    tokens = [store.tokens(document, 0, 10**9) for document in range(store.num_documents)]
    assert [len(t) for t in tokens] == lengths
    assert np.concatenate(tokens).tolist() == list(range(sum(lengths)))


@pytest.mark.parametrize("damage", ["missing", "short", "foreign"])
def test_damaged_shards_are_a_clear_error(tmp_path: Path, damage: str) -> None:
    make_store(tmp_path, [30, 30])
    shard = tmp_path / "text-00000.npy"
    if damage == "missing":
        shard.unlink()
    elif damage == "short":
        shard.write_bytes(shard.read_bytes()[:-20])
    else:
        shard.write_bytes(b"something else")
    with pytest.raises(RunError, match=r"token shards: .* are lost or damaged"):
        TokenStore(tmp_path, "text")


# Rows


@given(
    lengths=LENGTHS, row_tokens=st.integers(2, 64), seq_len=st.integers(2, 24), seed=st.integers(0, 2**63 - 1)
)
def test_every_token_but_a_documents_first_is_predicted_once_per_epoch(
    tmp_path_factory: Any, lengths: list[int], row_tokens: int, seq_len: int, seed: int
) -> None:
    store = make_store(tmp_path_factory.mktemp("store"), lengths)
    sampler = PackedSampler(store, row_tokens=row_tokens, seq_len=seq_len, seed=seed)
    total = 3 * store.num_tokens
    rows = [sampler.row(number) for number in range(-(-total // row_tokens))]
    stream = torch.cat([row.input_ids[0] for row in rows])[:total]
    for epoch in stream.split(store.num_tokens):
        assert sorted(epoch.tolist()) == list(range(store.num_tokens))
    wanted = sorted(set(range(store.num_tokens)) - starts_of(lengths))
    predicted = torch.cat([row.shift_labels[0] for row in rows])[:total]
    for epoch in predicted.split(store.num_tokens):
        assert sorted(epoch[epoch != IGNORE_INDEX].tolist()) == wanted
    for row in rows:
        check_row(row, lengths, row_tokens, seq_len)
    again = PackedSampler(store, row_tokens=row_tokens, seq_len=seq_len, seed=seed)
    number = len(rows) // 2  # a fresh sampler at a position gives the same row: that is all resuming needs
    assert torch.equal(again.row(number).input_ids, rows[number].input_ids)
    assert torch.equal(again.row(number).cu_seqlens, rows[number].cu_seqlens)
    assert torch.equal(again.row(number).shift_labels, rows[number].shift_labels)


def check_row(row: PackedRow, lengths: list[int], row_tokens: int | None, seq_len: int) -> None:
    ids, targets, bounds = row.input_ids[0], row.shift_labels[0], row.cu_seqlens
    if row_tokens is not None:
        assert ids.numel() == row_tokens
    assert row.cu_seqlens.dtype == torch.int32
    assert (bounds[0], bounds[-1]) == (0, ids.numel())
    sizes = bounds.diff()
    assert bool((sizes > 0).all())
    assert int(sizes.max()) <= seq_len
    starts = starts_of(lengths)
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        piece = ids[start:stop]
        assert bool((piece.diff() == 1).all()), "a piece is part of one document, in order"
        assert not starts & set(piece[1:].tolist()), "a document begins where a piece begins"
    for token, target in zip(ids.tolist(), targets.tolist(), strict=True):
        last = token + 1 in starts or token + 1 == sum(lengths)
        assert target == (IGNORE_INDEX if last else token + 1)
    assert row.targets.tolist() == targets[targets != IGNORE_INDEX].tolist()
    assert row.num_targets == len(row.targets)


def test_a_long_document_does_not_fill_many_rows_in_a_row(tmp_path: Path) -> None:
    store = make_store(tmp_path, [400, *[20] * 20], shard_tokens=1000)
    sampler = PackedSampler(store, row_tokens=80, seq_len=20, seed=0)
    shares = [int((sampler.row(number).input_ids < 400).sum()) / 80 for number in range(10)]
    assert max(shares) <= 0.75, "half of all tokens are the long document's: every row should have both kinds"
    assert min(shares) >= 0.25


def test_epochs_and_seeds_give_different_orders(tmp_path: Path) -> None:
    store = make_store(tmp_path, [5] * 40)
    rows = {
        (seed, epoch): tuple(
            PackedSampler(store, row_tokens=200, seq_len=9, seed=seed).row(epoch).input_ids[0].tolist()
        )
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(rows.values())) == 4


def test_a_row_may_be_longer_than_all_the_text(tmp_path: Path) -> None:
    store = make_store(tmp_path, [3, 4])
    row = PackedSampler(store, row_tokens=50, seq_len=8, seed=0).row(7)
    check_row(row, [3, 4], 50, 8)


# Evaluation


@given(lengths=LENGTHS, row_tokens=st.integers(2, 64), seq_len=st.integers(2, 24))
def test_an_evaluation_predicts_every_token_but_the_first_once(
    tmp_path_factory: Any, lengths: list[int], row_tokens: int, seq_len: int
) -> None:
    store = make_store(tmp_path_factory.mktemp("store"), lengths)
    rows = evaluation_rows(store, row_tokens=row_tokens, seq_len=seq_len, max_tokens=10**9)
    predicted: list[int] = []
    for pieces in rows:
        row = pack(store, pieces)
        assert row.input_ids.numel() <= row_tokens
        check_row(row, lengths, None, seq_len)
        predicted += row.targets.tolist()
    assert sorted(predicted) == sorted(set(range(sum(lengths))) - starts_of(lengths))


def test_a_short_evaluation_reads_a_fixed_part(tmp_path: Path) -> None:
    store = make_store(tmp_path, [20] * 10)
    rows = evaluation_rows(store, row_tokens=32, seq_len=16, max_tokens=70)
    assert sum(stop - start for row in rows for _, start, stop in row) == 70
    assert rows == evaluation_rows(store, row_tokens=32, seq_len=16, max_tokens=70)
