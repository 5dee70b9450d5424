"""State between calls: decode parity, chunks, rows that do not touch each other, constant memory."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fastlm.layers import KVRing, apply_rotary
from fastlm.models.samba import LayerCache, SambaCache, SambaConfig, SambaForCausalLM
from fastlm.models.samba import cache as cache_module

WINDOW = 8  # of the "tiny" preset


def make(**changes: object) -> SambaForCausalLM:
    torch.manual_seed(0)
    return SambaForCausalLM(SambaConfig.from_preset("tiny", **changes), dtype=torch.float64).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(96, (3, 43), generator=torch.Generator().manual_seed(1))


def run(model: SambaForCausalLM, ids: torch.Tensor, pieces: list[int], cache: SambaCache) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(piece, cache=cache).logits for piece in ids.split(pieces, dim=1)], dim=1)


@pytest.mark.parametrize(
    "pieces",
    [[1] * 43, [43], [42, 1], [1, 42], [5] * 8 + [3], [3, 1, 1, 20, 1, 16, 1], [WINDOW] * 5 + [3]],
    ids=str,
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_pattern": ("mamba+sliding_attention",)},
        {"layer_pattern": ("mamba",)},
        {"use_rope": False},
        {"sliding_window": 1},
        {"sliding_window": 64},
    ],
    ids=str,
)
def test_any_split_equals_one_pass(ids, pieces, changes):
    """The ring wraps five times; every piece length meets empty, partly filled and full rings."""
    model = make(**changes)
    with torch.no_grad():
        whole = model(ids).logits
    cache = model.new_cache(3)
    assert_close(run(model, ids, pieces, cache), whole)
    assert cache.lengths == (43, 43, 43)
    assert cache.positions.tolist() == [43, 43, 43]


def test_far_positions_use_a_table_that_moves_along(ids, monkeypatch):
    monkeypatch.setattr(cache_module, "_FIXED_TABLE_POSITIONS", 10)
    model = make()
    with torch.no_grad():
        whole = model(ids).logits
    cache = model.new_cache(3)
    assert_close(run(model, ids, [1] * 43, cache), whole)
    positions, (cos, _) = cache.step_tables(model.model.rotary, 1, torch.float64)
    assert positions.tolist() == [43 - 32] * 3
    assert cos.shape[0] <= 3 * WINDOW


def test_a_million_tokens_later_nothing_has_drifted(ids):
    """Only distances count: the same cache moved by a million positions gives the same logits."""
    model, shift = make(), 1_000_000  # a multiple of the ring's slots, so that slots stay the same
    near = model.new_cache(3)
    run(model, ids[:, :24], [24], near)
    turn = model.model.rotary.at(torch.tensor([shift]), dtype=torch.float64)
    moved = [
        LayerCache(
            layer.mamba, layer.attention and KVRing(apply_rotary(layer.attention.k, *turn), layer.attention.v)
        )
        for layer in near.clone().layers
    ]
    far = SambaCache(moved, [shift + 24] * 3, WINDOW)
    pieces = [1, 1, 5, 1, 11]
    assert_close(run(model, ids[:, 24:], pieces, far), run(model, ids[:, 24:], pieces, near))
    assert far.lengths == (shift + 43,) * 3


def test_rows_at_different_positions_decode_together(ids):
    model = make()
    lengths = [30, 4, 11]
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.new_cache(3)
        packed = torch.cat([row[:n] for row, n in zip(ids, lengths, strict=True)])[None]
        cu_seqlens = torch.tensor([0, 30, 34, 45], dtype=torch.int32)
        prefill = model(packed, cache=cache, cu_seqlens=cu_seqlens).logits[0]
        assert cache.lengths == (30, 4, 11)
        for row, (start, n) in enumerate(zip([0, 30, 34], lengths, strict=True)):
            assert_close(prefill[start : start + n], whole[row, :n])
        for step in range(12):
            tokens = torch.stack([ids[row, n + step] for row, n in enumerate(lengths)])[:, None]
            logits = model(tokens, cache=cache).logits[:, 0]
            assert_close(logits, torch.stack([whole[row, n + step] for row, n in enumerate(lengths)]))
        dense = torch.stack(
            [ids[row, n + 12 : n + 13] for row, n in enumerate(lengths)]
        )  # one more, then two at once
        model(dense, cache=cache)
        two = torch.stack([ids[row, n : n + 2] for row, n in enumerate([n % 40 for n in cache.lengths])])
        before = cache.clone()
        together = model(two, cache=cache).logits
        for row in range(3):
            alone = model(two[row : row + 1], cache=before.select([row])).logits
            assert_close(together[row : row + 1], alone)


def test_reset_of_a_row_leaves_the_others_bit_identical(ids):
    model = make()
    cache = model.new_cache(3)
    run(model, ids[:, :20], [20], cache)
    untouched = cache.clone()
    cache.reset([1])
    assert cache.lengths == (20, 0, 20)
    for layer, before in zip(cache.layers, untouched.layers, strict=True):
        for buffer, old in zip(layer.tensors(), before.tensors(), strict=True):
            assert torch.equal(buffer[[0, 2]], old[[0, 2]])
            assert (buffer[1] == 0).all()
    with torch.no_grad():
        after = model(ids[:, 20:21], cache=cache).logits
        expected = model(ids[:, 20:21], cache=untouched).logits
        fresh = model(ids[1:2, 20:21]).logits
    assert torch.equal(after[[0, 2]], expected[[0, 2]])
    assert_close(after[1:2], fresh)


def test_reset_of_everything_equals_a_new_cache(ids):
    model = make()
    cache = model.new_cache(3)
    first = run(model, ids, [7, 36], cache)
    cache.reset()
    assert torch.equal(run(model, ids, [7, 36], cache), first)


def test_select_reorders_repeats_and_drops_rows(ids):
    model = make()
    cache = model.new_cache(3)
    run(model, ids[:, :15], [15], cache)
    beams = cache.select([2, 0, 2, 2])
    assert beams.lengths == (15,) * 4
    tokens = torch.tensor([[1], [2], [1], [3]])
    with torch.no_grad():
        out = model(tokens, cache=beams).logits
        same = model(torch.tensor([[2], [5], [1]]), cache=cache).logits  # the old cache lives on
    assert torch.equal(out[0], out[2])
    assert_close(out[1], same[0])
    assert_close(out[0], same[2])


def test_clone_is_independent(ids):
    model = make()
    cache = model.new_cache(3)
    run(model, ids[:, :15], [15], cache)
    snapshot = cache.clone()
    first = run(model, ids[:, 15:], [1] * 28, cache)
    assert torch.equal(run(model, ids[:, 15:], [1] * 28, snapshot), first)


def test_memory_does_not_grow(ids):
    model = make()
    cache = model.new_cache(3)
    places = [buffer.data_ptr() for layer in cache.layers for buffer in layer.tensors()]
    before = cache.memory_bytes()
    run(model, ids, [20] + [1] * 23, cache)
    assert cache.memory_bytes() == before
    assert [buffer.data_ptr() for layer in cache.layers for buffer in layer.tensors()] == places
    inner, n, taps, kv = 64, 4, 4, 2 * 8  # 2 Mamba and 2 attention blocks of "tiny", 8 bytes a number
    assert before == 3 * 8 * 2 * (inner * (n + taps - 1) + 2 * WINDOW * kv)


def test_step_tokens_make_room_for_steps_of_several_tokens():
    cache = make().new_cache(2, step_tokens=5)
    assert cache.layers[1].attention.k.shape == (2, WINDOW + 4, 2, 8)


def test_cache_dtypes_follow_the_model():
    model = SambaForCausalLM(SambaConfig.from_preset("tiny"), dtype=torch.bfloat16)
    state = model.new_cache(1).layers[0].mamba
    assert (state.conv.dtype, state.scan.dtype) == (torch.bfloat16, torch.float32)
    model = SambaForCausalLM(SambaConfig.from_preset("tiny"))
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(1)
        ids = torch.randint(96, (1, 30))
        chunks = run(model, ids, [13, 1, 1, 15], cache)
        assert cache.layers[1].attention.k.dtype == torch.bfloat16
        whole = model(ids).logits
    assert (chunks - whole).abs().max() < 0.02 * whole.abs().max()


def test_a_cache_made_in_inference_mode_serves_outside_of_it(ids):
    model = make()
    with torch.inference_mode():
        cache = model.new_cache(3)
        model(ids[:, :9], cache=cache)
        cache = cache.select([0, 1, 2])
    run(model, ids[:, 9:], [2, 32], cache)


@pytest.mark.parametrize("rows", [[3], [-1]])
def test_rows_that_do_not_exist(rows):
    cache = make().new_cache(3)
    for action in (cache.reset, cache.select):
        with pytest.raises(IndexError, match=rf"row must be in \[0, 3\), got {rows[0]}"):
            action(rows)


def test_sizes_that_do_not_fit(ids):
    model = make()
    with pytest.raises(ValueError, match="cache must have 3 rows, got 2"):
        model(ids, cache=model.new_cache(2))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.new_cache(0)
    with pytest.raises(ValueError, match="step_tokens must be at least 1, got 0"):
        model.new_cache(1, step_tokens=0)
