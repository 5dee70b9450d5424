"""load_balance_loss: its closed form, its reference, transformers' loss, and the global shares of two processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastlm import ops, reference
from tests.support import strategies
from tests.support.compile import assert_compiled_equals_eager
from tests.support.conformance import assert_gradients_match_reference, assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.tolerance import assert_close_to_reference

F64 = torch.float64
# Every keyword, alone and together.
LOSSES: dict[str, dict[str, Any]] = {
    "dispatched": {},
    "topk": {"f_source": "topk"},
    "topk_three": {"f_source": "topk", "top_k": 3, "f_sum": 3},
    "sum_of_two": {"f_sum": 2},
    "num_tokens": {"num_tokens": 100},
    "num_tokens_tensor": {"num_tokens": torch.tensor(100)},
    "padding": {"valid": True},
    "everything": {"f_source": "topk", "f_sum": 2.5, "valid": True, "num_tokens": 50, "top_k": 4},
}


def _call(name: str, dtype: torch.dtype = torch.float32, tokens: int = 37) -> Call:
    draw, options = Draw(f"balance/{name}"), dict(LOSSES[name])
    logits, counts = draw.normal(tokens, 8, dtype=dtype), draw.integers(0, 20, (8,), torch.int32)
    if "valid" in options:
        options["valid"] = draw.integers(0, 3, (tokens,)) > 0
        logits[~options["valid"]] = torch.nan
    return Call((logits, counts), {"alpha": 0.3, **options})


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_matches_reference(name, dtype):
    call = _call(name, dtype)
    assert_matches_reference(ops.load_balance_loss, reference.load_balance_loss, call)
    assert_gradients_match_reference(ops.load_balance_loss, reference.load_balance_loss, call)


def test_closed_form_of_the_gradient():
    """dz = (alpha E / T) softmax (f - sum_i f_i softmax_i)."""
    draw = Draw("closed form")
    logits, counts = draw.normal(21, 6, dtype=F64).requires_grad_(), draw.integers(1, 9, (6,))
    (found,) = torch.autograd.grad(ops.load_balance_loss(logits, counts, alpha=0.7, f_sum=2), logits)
    p, f = logits.detach().softmax(-1), 2 * counts.double() / counts.sum()
    assert_close_to_reference("dz", found, 0.7 * 6 / 21 * p * (f - (f * p).sum(-1, keepdim=True)))


@pytest.mark.parametrize("padded", [False, True])
def test_is_the_loss_of_transformers(padded):
    """Which counts the plain top-k, takes shares that sum to k, and has no factor alpha."""
    pytest.importorskip("transformers", minversion="5.24", reason="needs the extra fastlm[hf]")
    from transformers.models.phimoe.modeling_phimoe import load_balancing_loss_func

    logits = Draw("transformers").normal(24, 8).requires_grad_()
    mask = torch.ones(2, 12, dtype=torch.int64)
    if padded:
        mask[1, 5:] = 0
    theirs = load_balancing_loss_func((logits,), 8, 2, mask if padded else None)
    valid = mask.flatten() == 1
    ours = ops.load_balance_loss(logits, None, alpha=1.0, f_source="topk", f_sum=2, valid=valid)
    exact = reference.load_balance_loss(
        logits.double(), None, alpha=1.0, f_source="topk", f_sum=2, valid=valid
    )
    assert_close_to_reference("loss", ours, exact, theirs)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, exact, theirs)]
    assert_close_to_reference("dz", *gradients)


# ---- properties -----------------------------------------------------------------------------------------


@given(draw=strategies.draws(), f_sum=st.floats(0.1, 4), experts=strategies.sizes(2, 40))
def test_even_use_gives_alpha_times_f_sum(draw, f_sum, experts):
    counts = torch.full((experts,), 5)
    loss = ops.load_balance_loss(draw.normal(9, experts, dtype=F64), counts, alpha=0.5, f_sum=f_sum)
    assert math.isclose(float(loss), 0.5 * f_sum, rel_tol=1e-12)


@given(draw=strategies.draws(), tokens=strategies.sizes(1, 40))
def test_counts_of_the_largest_are_the_top_one(draw, tokens):
    """Routing in eval by one pick counts what `topk` counts."""
    logits = draw.normal(tokens, 8)
    counts = ops.grin_route(logits, top_k=1)[2]
    one = ops.load_balance_loss(logits, counts, alpha=1.0)
    assert torch.equal(one, ops.load_balance_loss(logits, None, alpha=1.0, f_source="topk", top_k=1))


@pytest.mark.parametrize("name", LOSSES)
def test_no_tokens(name):
    call = _call(name, tokens=0).requires_grad()
    loss = ops.load_balance_loss(*call.args, **call.kwargs)
    assert loss == 0
    assert torch.autograd.grad(loss, call.args[0])[0].shape == (0, 8)


def test_no_token_that_counts():
    logits = torch.full((5, 4), torch.nan, requires_grad=True)
    counts, valid = torch.zeros(4, dtype=torch.int32), torch.zeros(5, dtype=torch.bool)
    for source in ("dispatched", "topk"):
        loss = ops.load_balance_loss(logits, counts, alpha=1.0, f_source=source, valid=valid)
        assert loss == 0
        assert (torch.autograd.grad(loss, logits)[0] == 0).all()


# ---- several processes ----------------------------------------------------------------------------------

PARTS = (30, 14)  # tokens of each process


def _whole() -> Tensor:
    return Draw("processes").normal(sum(PARTS), 8, dtype=F64)


def _process(rank: int, folder: str) -> None:
    """One of two processes: the loss of its tokens with everybody's shares, and the gradient."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    logits = _whole().split(PARTS)[rank].clone().requires_grad_()
    _, _, counts = ops.grin_route(logits)
    before = counts.clone()
    results = {}
    for source in ("dispatched", "topk"):
        # Divided by the tokens of all, the losses of the processes sum to the loss of the batch.
        loss = ops.load_balance_loss(
            logits, counts, alpha=0.5, f_source=source, num_tokens=sum(PARTS), group=dist.group.WORLD
        )
        results[source] = (loss.detach(), *torch.autograd.grad(loss, logits))
    assert torch.equal(counts, before)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")
def test_shares_of_two_processes_are_those_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    logits = _whole().requires_grad_()
    _, _, counts = ops.grin_route(logits)
    for source in ("dispatched", "topk"):
        loss = ops.load_balance_loss(logits, counts, alpha=0.5, f_source=source)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert_close_to_reference("loss", parts[0][source][0] + parts[1][source][0], loss.detach())
        assert_close_to_reference("dz", torch.cat([part[source][1] for part in parts]), gradient)
        local = logits[: PARTS[0]].detach()
        alone = ops.load_balance_loss(
            local, ops.grin_route(local)[2], alpha=0.5, f_source=source, num_tokens=sum(PARTS)
        )
        assert not torch.isclose(alone, parts[0][source][0])


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_compile(name):
    call = _call(name).requires_grad()
    assert_compiled_equals_eager(ops.load_balance_loss, *call.args, **call.kwargs)


def test_autocast_keeps_float32():
    logits, counts = _call("dispatched").args
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ops.load_balance_loss(logits, counts, alpha=1.0)
    assert torch.equal(inside, ops.load_balance_loss(logits, counts, alpha=1.0))


# ---- errors ---------------------------------------------------------------------------------------------

BAD_CALLS = [
    ((torch.zeros(4), None), {}, "router_logits must have shape (T, E), got (4,)"),
    ((torch.zeros(3, 4), None), {}, "expert_counts must have shape (4,), got None"),
    ((torch.zeros(3, 4), torch.zeros(3)), {}, "expert_counts must have shape (4,), got (3,)"),
    (
        (torch.zeros(3, 4), torch.zeros(4)),
        {"f_source": "all"},
        "f_source must be 'dispatched' or 'topk', got 'all'",
    ),
    ((torch.zeros(3, 4), torch.zeros(4)), {"f_sum": 0}, "f_sum must be positive, got 0"),
    ((torch.zeros(3, 4), None), {"f_source": "topk", "top_k": 5}, "top_k must be from 1 to 4, got 5"),
    (
        (torch.zeros(3, 4), torch.zeros(4)),
        {"valid": torch.ones(4, dtype=torch.bool)},
        "valid must have shape (3,), got (4,)",
    ),
]


@pytest.mark.parametrize(("args", "options", "text"), BAD_CALLS, ids=[c[2] for c in BAD_CALLS])
def test_errors(args, options, text):
    with pytest.raises(ValueError, match=r"^load_balance_loss: ") as caught:
        ops.load_balance_loss(*args, alpha=1.0, **options)
    assert str(caught.value) == f"load_balance_loss: {text}"
