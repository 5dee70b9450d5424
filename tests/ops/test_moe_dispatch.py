"""moe_plan against its reference; grouped_gemm and moe_experts have files of their own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastlm import ops, reference
from tests.support import conformance, samples, strategies
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.moe_dispatch import experts_call, picks
from tests.support.tolerance import assert_close_to_reference

PLANS = samples.of("moe_plan")


# ---- reference ------------------------------------------------------------------------------------------


def assert_same_plan(ids: Tensor, num_experts: int) -> None:
    found = ops.moe_plan(ids, num_experts)
    for name, got, want in zip(
        ("offsets", "perm", "inv"), found, reference.moe_plan(ids, num_experts), strict=True
    ):
        assert got.dtype == torch.int32, name
        assert torch.equal(got, want), name


@pytest.mark.parametrize("sample", PLANS, ids=str)
def test_matches_reference(sample, device):
    assert_same_plan(*sample.build(device).args)


@pytest.mark.parametrize(
    "routing", ["random", "balanced", "one_pair", "few", "twice", "some_left_out", "none"]
)
@pytest.mark.parametrize("tokens", [0, 1, 7, 128, 1000, 40_000])
def test_forced_routings(routing, tokens):
    for top_k, experts in ((2, 16), (8, 256), (1, 3)):
        ids = picks(Draw(f"forced-{routing}"), tokens, top_k, experts, routing, torch.int32)
        assert_same_plan(ids, experts)


# ---- properties -----------------------------------------------------------------------------------------


@given(
    draw=strategies.draws(),
    tokens=strategies.sizes(0, 200),
    top_k=st.integers(1, 8),
    experts=strategies.sizes(1, 70),
    dtype=strategies.index_dtypes(),
)
def test_every_pick_has_one_place(draw, tokens, top_k, experts, dtype):
    """Both permutations are inverses; rows stand in the order of experts, then of slots."""
    ids = draw.integers(-1, experts, (tokens, top_k), dtype)
    offsets, perm, inv = (t.long() for t in ops.moe_plan(ids, experts))
    slots = torch.arange(tokens * top_k)
    assert torch.equal(perm[inv], slots)
    assert torch.equal(inv[perm], slots)
    behind = torch.where(ids < 0, experts, ids).flatten()[perm].long()
    key = behind * max(1, tokens * top_k) + perm
    assert (key.diff() > 0).all()
    assert torch.equal(offsets[:-1], torch.searchsorted(behind, torch.arange(experts)))
    assert int(offsets[-1]) == int((ids >= 0).sum())


@given(draw=strategies.draws(), tokens=strategies.sizes(1, 60))
def test_the_pieces_make_the_whole(draw, tokens):
    """moe_experts is a plan, two grouped products and a weighted sum."""
    call = experts_call(tokens, 3, 5, draw=draw, dtype=torch.float64, routing="some_left_out")
    x, gate_up_proj, down_proj, ids, weights = call.args
    offsets, perm, inv = ops.moe_plan(ids, 5)
    gate, up = ops.grouped_gemm(x[perm.long() // 3], gate_up_proj, offsets).chunk(2, -1)
    rows = ops.grouped_gemm(torch.nn.functional.silu(gate) * up, down_proj, offsets)
    out = (weights.unsqueeze(-1) * rows[inv.long()].view(tokens, 3, -1)).sum(1)
    assert_close_to_reference("out", ops.moe_experts(*call.args), out)


# ---- gradients ------------------------------------------------------------------------------------------


def test_indices_have_no_gradient():
    assert not any(t.requires_grad for t in ops.moe_plan(torch.tensor([[0, 1]]), 2))


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", PLANS, ids=str)
def test_opcheck(sample):
    conformance.assert_opcheck(sample, with_grad=False)


@pytest.mark.parametrize("sample", PLANS, ids=str)
def test_compile(sample):
    conformance.assert_compiles(sample, ops.moe_plan, with_grad=False)


# ---- errors ---------------------------------------------------------------------------------------------


def _ids(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD_CALLS = [
    ("dtype", (_ids(3, 2, dtype=torch.float32), 4), "topk_ids must have dtype int32 or int64, got float32"),
    ("dim", (_ids(3), 4), "topk_ids must have shape (T, k), got (3,)"),
    ("no_picks", (_ids(3, 0), 4), "topk_ids must have 1 to 8 columns, got 0"),
    ("many_picks", (_ids(3, 9), 4), "topk_ids must have 1 to 8 columns, got 9"),
    ("num_experts", (_ids(3, 2), 0), "num_experts must be at least 1, got 0"),
    ("negative_experts", (_ids(0, 2), -1), "num_experts must be at least 1, got -1"),
]


@pytest.mark.parametrize(("args", "text"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS])
def test_errors(args, text):
    for function in (ops.moe_plan, torch.ops.fastlm.moe_plan):
        conformance.assert_same_error(function, Call(args, {}), ValueError, f"moe_plan: {text}")


def test_too_many_picks_to_count():
    """Values are not looked at before: the memory behind is that of one number."""
    call = Call((_ids(1, 1).expand(2**28, 8), 4), {})
    text = "moe_plan: topk_ids must have at most 2147483647 elements, got 2147483648"
    conformance.assert_same_error(ops.moe_plan, call, ValueError, text, on_meta=False)


@pytest.mark.host_values
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("bad", "at"), [(4, 3), (-2, 0), (2**31 - 1, 5), (-(2**31), 2)])
def test_errors_in_ids(bad, at, dtype):
    ids = _ids(3, 2, dtype=dtype)
    ids.view(-1)[at] = bad
    text = f"moe_plan: topk_ids must be in [-1, 4), got {bad} at index {at}"
    for function in (ops.moe_plan, reference.moe_plan):
        conformance.assert_same_error(function, Call((ids, 4), {}), IndexError, text, on_meta=False)


@pytest.mark.host_values
def test_error_in_an_id_of_64_bits():
    """One whose lower half alone would be fine."""
    call = Call((torch.tensor([[0, 2**32]]), 4), {})
    text = "got 4294967296 at index 1"
    conformance.assert_same_error(ops.moe_plan, call, IndexError, text, on_meta=False)


# ---- twins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", PLANS, ids=str)
def test_every_level(sample):
    for level in conformance.other_levels():
        with conformance.cpu_level(level):
            assert_same_plan(*sample.build().args)


def test_same_bits_for_any_number_of_threads():
    def make_call() -> Call:
        return Call((picks(Draw("threads"), 5000, 8, 60, "some_left_out"), 60), {})

    conformance.assert_same_for_any_thread_count(ops.moe_plan, make_call, with_grad=False)
