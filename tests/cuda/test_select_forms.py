"""Sizes at which the CUDA select_tokens takes another form: one or several blocks a segment, keys in shared memory or read again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import fastlm
from tests.support.layouts import Draw

ONE_BLOCK = 40960  # scores in float32 of one segment that one block takes on sm_90a; 20480 in float64
TIES = pytest.mark.parametrize("tie_break", ["index", "random"])


def select(score: Tensor, eligible: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.fastlm.select_tokens(score, eligible, **options)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def by_sorting(
    score: Tensor,
    eligible: Tensor,
    *,
    keep_ratio: float,
    cu_seqlens: Tensor | None = None,
    tie_break: str = "index",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, with arrays instead of lists: mask, thresholds and counts."""
    dtype = torch.float64 if score.dtype == torch.float64 else torch.float32
    values, allowed = score.cpu().flatten().to(dtype).numpy(), eligible.cpu().flatten().numpy()
    ends = [0, len(values)] if cu_seqlens is None else cu_seqlens.tolist()
    mask, thresholds, counts = np.zeros(len(values), dtype=bool), [], []
    for begin, end in itertools.pairwise(ends):
        found = begin + np.flatnonzero(allowed[begin:end] & np.isfinite(values[begin:end]))
        kept = int(np.floor(keep_ratio * len(found) + 0.5))
        kept = min(max(kept, int(keep_ratio > 0)), len(found))
        place = found.astype(np.uint64)
        if tie_break == "random":
            place = _mix(_mix(np.array([seed % 2**64], dtype=np.uint64)) + place)
        chosen = found[np.lexsort((place, -values[found]))[:kept]]
        mask[chosen] = True
        thresholds.append(values[chosen].min() if kept else np.inf)
        counts.append([len(found), kept, int((values[found] == thresholds[-1]).sum())])
    return (
        torch.from_numpy(mask).reshape(score.shape),
        torch.tensor(thresholds, dtype=dtype),
        torch.tensor(counts, dtype=torch.int64).reshape(-1, 3),
    )


def check(score: Tensor, eligible: Tensor, **options: object) -> None:
    got = select(score, eligible, **options)
    for a, b in zip(got, by_sorting(score, eligible, **options), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b)


def scores(draw: Draw, n: int, dtype: torch.dtype = torch.float32, digits: int = 2) -> Tensor:
    """Many ties, and some of everything that is not finite."""
    score = draw.normal(n, dtype=torch.float64).round(decimals=digits).to(dtype)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf, -torch.nan, 0.0, -0.0)):
        score[i::61] = value
    return score


@TIES
@pytest.mark.parametrize("n", [ONE_BLOCK - 1, ONE_BLOCK, ONE_BLOCK + 1, 50003])
def test_one_block_or_several(n, tie_break, device):
    draw = Draw("several", device)
    check(scores(draw, n), draw.integers(0, 4, (n,)) > 0, keep_ratio=0.6, tie_break=tie_break, seed=n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@TIES
def test_several_blocks_in_every_type(dtype, tie_break, device):
    draw, n = Draw("types", device), 45001
    check(scores(draw, n, dtype), draw.integers(0, 4, (n,)) > 0, keep_ratio=0.3, tie_break=tie_break, seed=-3)


@TIES
@pytest.mark.parametrize("keep_ratio", [0.2499, 0.25, 0.2501, 0.5, 0.75, 0.9999])
def test_ties_that_end_at_the_border_of_blocks(keep_ratio, tie_break, device):
    """All scores are equal: the last one taken lies at the border of a block, or in one of them."""
    n = ONE_BLOCK + 4096
    check(
        torch.zeros(n, device=device),
        torch.ones(n, dtype=torch.bool, device=device),
        keep_ratio=keep_ratio,
        tie_break=tie_break,
        seed=7,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("n", "dtype"), [(130_000, torch.float64), (250_000, torch.bfloat16)])
def test_more_keys_than_shared_memory_holds(n, dtype, device):
    """On the emulated device, whose 4 multiprocessors share them; a GPU has room for millions."""
    draw = Draw("room", device)
    check(scores(draw, n, dtype), draw.integers(0, 4, (n,)) > 0, keep_ratio=0.6, tie_break="random")


@TIES
@pytest.mark.parametrize("lengths", [(50_000, 40_003), (3, 0, 90_000), (90_001, 1, 0)])
def test_several_blocks_for_each_segment(lengths, tie_break, device):
    draw, n = Draw("segments", device), sum(lengths)
    ends = draw.index([0, *torch.tensor(lengths).cumsum(0).tolist()])
    options = {"keep_ratio": 0.55, "tie_break": tie_break, "cu_seqlens": ends, "seed": 2**63 - 1}
    check(scores(draw, n, digits=1), draw.integers(0, 4, (n,)) > 0, **options)


@TIES
def test_a_long_segment_among_short_ones(tie_break, device):
    """One block each, with room for twice the average only."""
    lengths = [3, 9000, 0, 0, 1, 17, 128, 129, 5, 4]
    draw, n = Draw("uneven", device), sum(lengths)
    ends = draw.index([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int64)
    options = {"keep_ratio": 0.6, "tie_break": tie_break, "cu_seqlens": ends}
    for dtype in (torch.float32, torch.float64):
        check(scores(draw, n, dtype, digits=1), draw.integers(0, 4, (n,)) > 0, **options)


@pytest.mark.parametrize("keep_ratio", [0.0, 0.5, 1.0])
def test_many_segments(keep_ratio, device):
    """Empty ones, single tokens, borders at every place between multiples of 4."""
    draw = Draw("many", device)
    lengths = draw.integers(0, 9, (1500,)).cpu()
    n = int(lengths.sum())
    ends = draw.index([0, *lengths.cumsum(0).tolist()])
    check(scores(draw, n), draw.integers(0, 3, (n,)) > 0, keep_ratio=keep_ratio, cu_seqlens=ends)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 127, 128, 129, 511, 513, 4095, 4097])
@pytest.mark.parametrize("shift", [0, 1])
def test_ends_of_rows(n, shift, device):
    """Rows of a warp are 128 tokens; `shift` takes away the alignment that loads of 4 tokens need."""
    draw = Draw("rows", device)
    score, eligible = scores(draw, n + shift)[shift:], (draw.integers(0, 4, (n + shift,)) > 0)[shift:]
    for dtype in (torch.float32, torch.bfloat16):
        check(score.to(dtype) if shift == 0 else score, eligible, keep_ratio=0.6)


@pytest.mark.parametrize("keep_ratio", [0.29, 0.145, 0.5, 1 / 3])
def test_halves_are_rounded_as_on_the_cpu(keep_ratio, device):
    """Segments of every length up to 60: products whose exact value is just below a half, at it and above."""
    draw, lengths = Draw("rounded", device), torch.arange(61)
    n = int(lengths.sum())
    ends = draw.index([0, *lengths.cumsum(0).tolist()])
    eligible = torch.ones(n, dtype=torch.bool, device=device)
    check(draw.normal(n), eligible, keep_ratio=keep_ratio, cu_seqlens=ends)


WRONG = {
    "negative": [0, -5, -(2**40), 300],
    "beyond": [0, 500, 2**40, 2**62],
    "falling": [300, 200, 100, 0],
    "jumping": [0, 300, 10, 250, -1, 300],
    "late": [40, 50, 60],
}


@pytest.mark.parametrize("kind", WRONG)
@TIES
def test_wrong_borders_give_a_mask_of_all_tokens(kind, tie_break, device):
    """Clamped, they cover the tokens, so that nothing is left as it was in fresh memory."""
    if device.type == "cpu" and not fastlm.build_info()["cuda"]["emulated"]:
        pytest.skip("the CPU operator refuses these values")
    draw = Draw("wrong", device)
    ends = draw.index(WRONG[kind], dtype=torch.int64)
    mask, threshold, counts = select(
        scores(draw, 300, digits=0),
        draw.integers(0, 4, (300,)) > 0,
        keep_ratio=0.5,
        cu_seqlens=ends,
        tie_break=tie_break,
    )
    assert (mask.view(torch.uint8) <= 1).all()
    assert threshold.shape == (len(ends) - 1,)
    assert counts.shape == (len(ends) - 1, 3)
    assert ((counts >= 0) & (counts <= 300)).all()
