"""select_tokens against its definition: sorted(...)[:K]."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastlm import ops, reference
from tests.support import conformance, samples, strategies
from tests.support.layouts import Draw
from tests.support.samples import Call

SELECT = samples.of("select_tokens")


def raw(score: Tensor, eligible: Tensor | None = None, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, with threshold and counts."""
    allowed = torch.ones_like(score, dtype=torch.bool) if eligible is None else eligible
    return torch.ops.fastlm.select_tokens(score, allowed, **options)


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SELECT, ids=str)
def test_matches_reference(sample, device):
    call = sample.build(device)
    assert torch.equal(
        ops.select_tokens(*call.args, **call.kwargs), reference.select_tokens(*call.args, **call.kwargs)
    )


@given(
    draw=strategies.draws(),
    tokens=strategies.sizes(0, 60),
    digits=st.integers(0, 3),
    keep_ratio=st.floats(0, 1),
    tie_break=st.sampled_from(["index", "random"]),
    seed=st.integers(-(2**63), 2**63 - 1),
    dtype=strategies.dtypes(),
)
def test_matches_reference_with_ties(draw, tokens, digits, keep_ratio, tie_break, seed, dtype):
    score = draw.normal(tokens, dtype=torch.float64).round(decimals=digits).to(dtype)
    eligible = draw.integers(0, 4, (tokens,)) > 0
    options = {"keep_ratio": keep_ratio, "tie_break": tie_break, "seed": seed}
    assert torch.equal(
        ops.select_tokens(score, eligible, **options), reference.select_tokens(score, eligible, **options)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distinct_scores_give_the_set_of_topk(dtype):
    score = Draw("distinct").normal(5001, dtype=dtype)
    assert score.unique().numel() == score.numel()
    mask = ops.select_tokens(score, torch.ones(5001, dtype=torch.bool), keep_ratio=0.6)
    assert torch.equal(mask.nonzero().squeeze(1), score.topk(3001).indices.sort().values)


def test_scores_that_differ_in_one_bit_are_told_apart():
    """Every digit of the keys decides somewhere: neighbours in each binade, both signs."""
    for dtype, step in ((torch.float32, 1.0), (torch.float64, 1.0)):
        values = [2.0**e for e in range(-40, 41, 3)]
        base = torch.tensor([-v for v in reversed(values)] + values, dtype=dtype)
        score = torch.cat([base, torch.nextafter(base, torch.full_like(base, math.inf))])
        mask, threshold, _ = raw(score, keep_ratio=step / 2)
        order = score.sort(descending=True)
        assert torch.equal(mask, score >= order.values[len(score) // 2 - 1])
        assert threshold == order.values[len(score) // 2 - 1]


# ---- how many -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "keep_ratio", "expected"),
    [
        (100, 0.29, 29),  # floor(0.29 * 100) is 28
        (5, 0.5, 3),
        (7, 0.5, 4),
        (10, 0.04, 1),  # at least one
        (10, 1e-300, 1),
        (10, 0.0, 0),
        (10, 1.0, 10),
        (1, 0.6, 1),
        (0, 0.6, 0),
        (3, 0.4999, 1),
        (3, 0.5, 2),
    ],
)
def test_number_of_selected_tokens(n, keep_ratio, expected):
    score = Draw("number").normal(n)
    mask, _, counts = raw(score, keep_ratio=keep_ratio)
    assert mask.sum() == expected
    assert counts.tolist()[0][:2] == [n, expected]


@given(draw=strategies.draws(), tokens=strategies.sizes(1, 200), keep_ratio=st.floats(0, 1))
def test_no_score_left_out_is_larger_than_one_selected(draw, tokens, keep_ratio):
    score = draw.normal(tokens).round(decimals=1)
    mask, threshold, counts = raw(score, keep_ratio=keep_ratio)
    assert mask.sum() == counts[0, 1]
    if not mask.any():
        assert threshold == math.inf
        assert counts[0, 2] == 0
        return
    assert threshold == score[mask].min()
    assert counts[0, 2] == (score == threshold).sum()
    if not mask.all():
        assert score[mask].min() >= score[~mask].max()


# ---- properties -----------------------------------------------------------------------------------------


@given(draw=strategies.draws(), tokens=strategies.sizes(1, 100), keep_ratio=st.floats(0, 1))
def test_permuted_tokens_are_selected_alike(draw, tokens, keep_ratio):
    score = draw.permutation(tokens).float()  # distinct
    eligible = draw.integers(0, 3, (tokens,)) > 0
    order = draw.permutation(tokens)
    mask = ops.select_tokens(score, eligible, keep_ratio=keep_ratio)
    assert torch.equal(ops.select_tokens(score[order], eligible[order], keep_ratio=keep_ratio), mask[order])


@given(draw=strategies.draws(), lengths=strategies.lengths(), keep_ratio=st.floats(0, 1))
def test_sequences_are_those_of_a_loop(draw, lengths, keep_ratio):
    score = draw.normal(sum(lengths)).round(decimals=1)
    eligible = draw.integers(0, 3, (sum(lengths),)) > 0
    mask = ops.select_tokens(
        score, eligible, keep_ratio=keep_ratio, cu_seqlens=strategies.cu_seqlens(lengths)
    )
    parts = zip(score.split(lengths), eligible.split(lengths), strict=True)
    want = [ops.select_tokens(s, e, keep_ratio=keep_ratio) for s, e in parts]
    assert torch.equal(mask, torch.cat([torch.empty(0, dtype=torch.bool), *want]))


def test_what_is_not_finite_or_not_eligible_is_neither_selected_nor_counted():
    score = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 2.0, 3.0, -math.nan, 4.0])
    eligible = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0], dtype=torch.bool)
    mask, threshold, counts = raw(score, eligible, keep_ratio=0.67)
    assert mask.tolist() == [False, False, False, False, True, True, False, False]
    assert threshold == 2
    assert counts.tolist() == [[3, 2, 1]]
    assert raw(score, eligible, keep_ratio=1.0)[0].sum() == 3
    assert not raw(score, torch.zeros_like(eligible), keep_ratio=1.0)[0].any()


def test_zeros_of_both_signs_are_one_score():
    score = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    mask, threshold, counts = raw(score, keep_ratio=0.5)
    assert mask.tolist() == [True, True, False, False]
    assert threshold == 0
    assert counts[0, 2] == 4


def test_random_ties_are_spread_and_repeatable():
    """By index the beginning wins; at random every position has its chance, and the seed fixes which."""
    score, eligible = torch.zeros(1000), torch.ones(1000, dtype=torch.bool)
    first = ops.select_tokens(score, eligible, keep_ratio=0.3)
    assert torch.equal(first, torch.arange(1000) < 300)
    masks = torch.stack(
        [ops.select_tokens(score, eligible, keep_ratio=0.3, tie_break="random", seed=s) for s in range(200)]
    )
    assert (masks.sum(1) == 300).all()
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(
        masks[7], ops.select_tokens(score, eligible, keep_ratio=0.3, tie_break="random", seed=7)
    )
    rates = masks.double().mean(0)  # of 200 draws: standard deviation 0.032
    assert rates.min() > 0.3 - 5 * 0.0325
    assert rates.max() < 0.3 + 5 * 0.0325
    together = masks.double().T @ masks.double() / 200  # neighbours are not chosen together
    assert abs(together.diagonal(1).mean() - 0.09) < 0.005


def test_random_ties_touch_only_the_threshold():
    score = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0])
    for seed in range(20):
        mask = ops.select_tokens(
            score, torch.ones(5, dtype=torch.bool), keep_ratio=0.6, tie_break="random", seed=seed
        )
        assert mask[4]
        assert not mask[0]
        assert mask.sum() == 3


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SELECT, ids=str)
def test_opcheck(sample):
    conformance.assert_opcheck(sample, with_grad=False)


@pytest.mark.parametrize("sample", samples.of("select_tokens", "sequences"), ids=str)
def test_compile(sample):
    conformance.assert_compiles(sample, ops.select_tokens, with_grad=False)


# ---- errors ---------------------------------------------------------------------------------------------


def _ones(*shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (
            (_ones(3, dtype=torch.int32), _ones(3)),
            {},
            "score must have dtype float32, bfloat16, float16 or float64, got int32",
        ),
        ((torch.zeros(3), _ones(4)), {}, "eligible must have shape (3,), got (4,)"),
        ((torch.zeros(2, 3), _ones(3, 2)), {}, "eligible must have shape (2, 3), got (3, 2)"),
        (
            (torch.zeros(3), _ones(3, dtype=torch.int64)),
            {},
            "eligible must have dtype bool, got int64",
        ),
        ((torch.zeros(3), _ones(3)), {"keep_ratio": 1.5}, "keep_ratio must be in [0, 1], got 1.5"),
        ((torch.zeros(3), _ones(3)), {"keep_ratio": -0.1}, "keep_ratio must be in [0, 1], got -0.1"),
        ((torch.zeros(3), _ones(3)), {"keep_ratio": math.nan}, "keep_ratio must be in [0, 1], got nan"),
        (
            (torch.zeros(3), _ones(3)),
            {"tie_break": "first"},
            "tie_break must be 'index' or 'random', got 'first'",
        ),
        (
            (torch.zeros(3), _ones(3)),
            {"cu_seqlens": torch.zeros(2)},
            "cu_seqlens must have dtype int32 or int64, got float32",
        ),
        (
            (torch.zeros(3), _ones(3)),
            {"cu_seqlens": torch.zeros(0, dtype=torch.int32)},
            "cu_seqlens must have at least 1 element",
        ),
    ],
)
def test_errors(args, kwargs, text):
    call = Call(args, {"keep_ratio": 0.5} | kwargs)
    for function in (ops.select_tokens, torch.ops.fastlm.select_tokens):
        conformance.assert_same_error(function, call, ValueError, f"select_tokens: {text}")


def test_tokens_of_no_segment():
    call = Call(
        (torch.zeros(3), _ones(3)), {"keep_ratio": 0.5, "cu_seqlens": torch.zeros(1, dtype=torch.int32)}
    )
    text = "select_tokens: cu_seqlens must have at least 2 elements (0 and 3), got shape (1,)"
    conformance.assert_same_error(ops.select_tokens, call, ValueError, text, on_meta=False)


@pytest.mark.host_values
@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ([0, 2], "cu_seqlens must end with 3, got 2"),
        ([1, 3], "cu_seqlens must start with 0, got 1"),
        ([0, 2, 1, 3], "cu_seqlens must never decrease, got 2 then 1 at index 2"),
        ([0, 1 << 40], "cu_seqlens must end with 3, got 1099511627776"),
    ],
)
def test_errors_in_cu_seqlens(ends, text):
    call = Call((torch.zeros(3), _ones(3)), {"keep_ratio": 0.5, "cu_seqlens": torch.tensor(ends)})
    conformance.assert_same_error(ops.select_tokens, call, ValueError, text, on_meta=False)


# ---- twins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_break", ["index", "random"])
def test_same_for_any_number_of_threads(tie_break):
    """More tokens than one thread turns into keys alone."""

    def make_call() -> Call:
        score = Draw("threads").normal(100_000).round(decimals=2)
        options = {"keep_ratio": 0.6, "tie_break": tie_break}
        return Call((score, _ones(100_000)), options)

    conformance.assert_same_for_any_thread_count(ops.select_tokens, make_call, with_grad=False)
