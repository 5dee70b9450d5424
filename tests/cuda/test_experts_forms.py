"""Sizes at which the CUDA experts take another form: groups that end at tiles, picks of nobody, rows that 16 bytes do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import ops, reference
from tests.ops.test_moe_experts_backward import assert_gradients
from tests.support.conformance import assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.moe_dispatch import experts_call

GROUPS = {
    "one_row_each": (1, 1, 1),
    "around_128": (127, 128, 129),
    "around_256": (255, 0, 256, 257),
    "one_and_many": (1, 0, 0, 130, 1),
    "all_to_one": (0, 0, 300, 0),
    "nobody": (0, 0, -5),
    "some_of_nobody": (64, 0, -70, 3),
    "seventeen": (17, 15, 16, 0, 33),
}
# Wide rows for tile copies and pieces of 16 bytes, a row that is longer than a tile, and rows that neither fits.
SIZES = {"wide": (64, 40), "past_a_tile": (264, 272), "narrow": (20, 35), "mixed": (72, 33)}


def call_of(
    groups: tuple[int, ...], size: int, inner: int, dtype: torch.dtype, device: torch.device, **options
) -> Call:
    """One pick per token, shuffled; a negative group is of tokens that picked nobody."""
    draw = Draw(f"forms-{groups}", device)
    ids = torch.cat([torch.full((abs(n),), e if n >= 0 else -1) for e, n in enumerate(groups)])
    call = experts_call(len(ids), 1, len(groups), size, inner, draw=draw, dtype=dtype, bias=True, **options)
    call.args[3].copy_(ids[draw.permutation(len(ids)).cpu()].unsqueeze(1))
    return call


def raw(call: Call, keep: bool) -> list[Tensor]:
    """Everything that both passes return."""
    names = ("gate_up_proj_bias", "down_proj_bias", "grad_weights")
    optional = [call.kwargs.get(name) for name in names]
    activation = call.kwargs.get("activation", "silu")
    out, gate_up = torch.ops.fastlm.moe_experts(
        *call.args, *optional, activation=activation, keep_gate_up=keep
    )
    dout = Draw("dout", out.device).normal(*out.shape, dtype=out.dtype)
    needed = {"need_dhidden_states": True, "need_dproj": True, "need_dtopk_weights": True}
    gradients = torch.ops.fastlm.moe_experts_backward(
        dout, *call.args, *optional, gate_up, activation=activation, **needed
    )
    return [out, gate_up, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("groups", GROUPS)
def test_groups(groups, size, dtype, device):
    if size == "past_a_tile" and groups not in ("around_128", "seventeen"):
        pytest.skip("one group after the other is enough of these")
    call = call_of(GROUPS[groups], *SIZES[size], dtype, device)
    assert_matches_reference(ops.moe_experts, reference.moe_experts, call)
    assert_gradients(call)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_wide_rows(dtype, gated, activation, transposed, device):
    """Every epilogue where rows lie on 16 bytes, with weights that lie either way."""
    options = {"gated": gated, "activation": activation, "transposed": transposed}
    call = call_of((130, 0, 70), 136, 144, dtype, device, **options)
    assert_matches_reference(ops.moe_experts, reference.moe_experts, call)
    assert_gradients(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ["random", "some_left_out", "one_pair"])
@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_eight_picks(size, routing, dtype, device):
    draw = Draw("eight", device)
    call = experts_call(
        70, 8, 12, *SIZES[size], draw=draw, dtype=dtype, routing=routing, bias=True, grad_weights=True
    )
    assert_matches_reference(ops.moe_experts, reference.moe_experts, call)
    assert_gradients(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_runs_are_equal_and_so_is_what_is_computed_again(size, dtype, device):
    """The same bits twice, and whether the forward pass kept its rows or not; kept rows of nobody are 0."""
    call = call_of((129, -7, 0, 40), *SIZES[size], dtype, device)
    first, second, again = raw(call, True), raw(call, True), raw(call, False)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    for i, (one, other) in enumerate(zip(first, again, strict=True)):
        assert i == 1 or torch.equal(one, other)
    assert not first[1][169:].any()


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ids_of_no_expert_count_as_nobody(dtype, id_dtype, device):
    """The host does not look at them; whatever they are, they are picks of -1."""
    if device.type == "cpu" and not fastlm.build_info()["cuda"]["emulated"]:
        pytest.skip("the CPU operators refuse these values")
    call = call_of((40, 0, 30, -30), 64, 40, dtype, device, id_dtype=id_dtype)
    want = raw(call, True)
    ids = call.args[3]
    limits = torch.iinfo(id_dtype)
    values = torch.tensor([limits.min, limits.max, 4, -2, 2**30, -(2**31)], device=device).to(id_dtype)
    ids[ids < 0] = values.repeat(5)
    for got, expected in zip(raw(call, True), want, strict=True):
        assert torch.equal(got, expected)


def test_one_row_for_each_of_many_experts(device):
    """More experts than a sum of biases is split for."""
    call = experts_call(
        300, 1, 300, 16, 8, draw=Draw("many", device), dtype=torch.float32, bias=True, routing="balanced"
    )
    assert_matches_reference(ops.moe_experts, reference.moe_experts, call)
    assert_gradients(call)
