"""Sizes at which the CUDA router and plan take another form, and ids that no CPU operator would take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import ops, reference
from tests.support.conformance import assert_gradients_match_reference, assert_matches_reference
from tests.support.layouts import Draw, with_layout
from tests.support.samples import Call
from tests.support.samples.grin_route import crowded, uniform
from tests.support.samples.moe_dispatch import picks

# Around 2, 4, 8, 16 and 32 lanes of four experts, two fours in a lane, and logits read again for each pick.
EXPERTS = [2, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129, 255, 256, 257, 515]
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
# Of the plan: one block up to 8192 slots and 371 experts, counts summed by each block up to 4096 of them, 1024 slots a tile, one
# sort up to 1364 experts, two digits.
PLANS = [
    (8192, 1, 16),
    (8193, 1, 16),
    (4096, 2, 371),
    (1024, 1, 372),
    (1025, 1, 372),
    (10 * 1024, 1, 371),
    (10 * 1024 + 1, 1, 409),
    (2049, 1, 1364),
    (700, 3, 1365),
    (3000, 1, 1365),
    (3000, 1, 5000),
    (0, 2, 5000),
]


def is_cuda() -> bool:
    return torch.cuda.is_available() and bool(fastlm.build_info()["cuda"]["built"])


def hostile_device() -> str:
    """Where wrong values are not refused; skips where they are."""
    if not is_cuda() and not fastlm.build_info()["cuda"]["emulated"]:
        pytest.skip("the CPU operators refuse these values")
    return "cuda" if is_cuda() else "cpu"


def routed(experts: int, dtype: torch.dtype, device: torch.device, *, near: bool) -> Call:
    """Several picks of an odd number of tokens, drawn from a seed."""
    draw = Draw(f"experts-{experts}", device)
    logits = crowded(draw, 45, experts, dtype) if near else draw.normal(45, experts, dtype=dtype)
    options = {"training": True, "top_k": min(5, experts), "jitter_eps": 0.05}
    return Call((logits,), options | {"seed": torch.tensor([experts * 12345], device=device)})


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", EXPERTS)
def test_every_form_picks_what_the_reference_picks(experts, dtype, near, device):
    call = routed(experts, DTYPES[dtype], device, near=near)
    found, want = (f(*call.args, **call.kwargs) for f in (ops.grin_route, reference.grin_route))
    assert torch.equal(found[1], want[1])
    assert torch.equal(found[2], want[2])


def weights_of(function):
    return lambda *args, **kwargs: function(*args, **kwargs)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [8, 9, 64, 129, 256, 257])
def test_weights_and_gradients_of_every_form(experts, dtype, device):
    functions = weights_of(ops.grin_route), weights_of(reference.grin_route)
    assert_matches_reference(*functions, routed(experts, DTYPES[dtype], device, near=True))
    assert_gradients_match_reference(*functions, routed(experts, DTYPES[dtype], device, near=True))


def test_close_calls_are_those_of_the_cpu():
    """Two experts whose sums of logit and noise differ by a rounding, decided by the logarithm written out in float32."""

    def log(x: Tensor) -> Tensor:
        bits = x.view(torch.int32)
        e = (bits - 0x3F3504F3) >> 23
        f = (bits - e * 2**23).view(torch.float32) - 1
        s = f / (f + 2)
        z = s * s
        p = ((0.24279078841 * z + 0.28498786688) * z + 0.40000972152) * z + 0.66666662693
        h = f * f * 0.5
        y = s * (h + z * p) + e.float() * 9.0580006145e-6
        return e.float() * 0.69313812256 + ((y - h) + f)

    noise = uniform(Draw("close"), 4000, 1, 3)
    gumbel = -log(-log(noise[:, 0, :2]))
    logits = torch.stack([torch.zeros(4000), gumbel[:, 0] - gumbel[:, 1]], -1)
    top = logits.max(-1, keepdim=True).values
    scores = torch.where(logits == top, gumbel, (logits - top) + gumbel)
    want = torch.where(scores[:, 1] > scores[:, 0], 1, 0).int()
    assert 0 < int(want.sum()) < 4000
    device = "cuda" if is_cuda() else "cpu"
    call = {"top_k": 1, "training": True, "jitter_eps": 1e30, "noise": noise.to(device)}
    assert torch.equal(ops.grin_route(logits.to(device), **call)[1][:, 0].cpu(), want)


def test_more_experts_than_a_block_counts(device):
    """Counted in global memory: the shared memory holds 12288 counters."""
    logits = Draw("counts", device).normal(40, 12_290)
    _, ids, counts = ops.grin_route(logits, top_k=8)
    assert torch.equal(ids.long(), logits.topk(8).indices)
    assert torch.equal(counts.long(), torch.bincount(ids.flatten().long(), minlength=12_290))


def assert_same_plan(ids: Tensor, experts: int) -> None:
    found, want = (f(ids, experts) for f in (ops.moe_plan, reference.moe_plan))
    for name, got, expected in zip(("offsets", "perm", "inv"), found, want, strict=True):
        assert torch.equal(got, expected), name


@pytest.mark.parametrize("routing", ["random", "twice", "some_left_out"])
@pytest.mark.parametrize("case", PLANS, ids=str)
def test_every_form_of_the_plan(case, routing, device):
    tokens, top_k, experts = case
    draw = Draw(f"plan-{case}", device)
    if routing == "twice":
        ids = picks(draw, tokens, top_k, experts, routing, torch.int32)
    else:
        ids = draw.integers(0, experts, (tokens, top_k), torch.int32)
    if routing == "some_left_out":
        ids = with_layout(ids.masked_fill(ids % 3 == 1, -1), "no_unit_stride")
    assert_same_plan(ids, experts)


def test_a_plan_of_three_digits(device):
    ids = Draw("digits", device).integers(-1, 1_100_000, (40, 8))
    assert_same_plan(ids, 1_100_000)


# ---- ids that are no expert ------------------------------------------------------------------------------

NO_EXPERTS = [-2, -(2**31), 2**31 - 1, "experts", "experts + 1"]


def spoilt(ids: Tensor, value: int | str, experts: int) -> tuple[Tensor, Tensor]:
    """The ids with every third one no expert, and with -1 in its place."""
    bad = {"experts": experts, "experts + 1": experts + 1}.get(str(value), value)
    at = torch.arange(ids.numel(), device=ids.device).view_as(ids) % 3 == 1
    return ids.masked_fill(at, bad), ids.masked_fill(at, -1)


@pytest.mark.parametrize("value", NO_EXPERTS, ids=str)
@pytest.mark.parametrize("experts", [4, 64, 300])
def test_the_gradient_takes_ids_that_are_no_expert_for_none(experts, value):
    draw = Draw("hostile", hostile_device())
    logits = crowded(draw, 37, experts)
    weights, ids, _ = ops.grin_route(logits, top_k=3, jitter_eps=0.1)
    upstream = draw.normal(*weights.shape)
    options = {"jitter_eps": 0.1, "training": False, "estimator": "v2"}
    found, want = (
        torch.ops.fastlm.grin_route_backward(upstream, logits, given, **options)
        for given in spoilt(ids, value, experts)
    )
    assert torch.equal(found, want)
    assert found.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("value", [*NO_EXPERTS, 2**32, 2**40 + 1, -(2**63)], ids=str)
@pytest.mark.parametrize(("tokens", "experts"), [(50, 4), (5000, 16), (600, 1365)])
def test_the_plan_takes_ids_that_are_no_expert_for_none(tokens, experts, value, dtype):
    if isinstance(value, int) and not torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max:
        pytest.skip("no such id")
    ids = Draw("hostile", hostile_device()).integers(0, experts, (tokens, 2), dtype)
    found, want = (ops.moe_plan(given, experts) for given in spoilt(ids, value, experts))
    for got, expected in zip(found, want, strict=True):
        assert torch.equal(got, expected)
