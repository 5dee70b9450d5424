"""The definition of the mixture-of-experts operators: token by token, and against transformers' experts, in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastlm.reference import grouped_gemm, moe_experts, moe_plan
from tests.support.layouts import Draw
from tests.support.samples.moe_dispatch import experts_call, picks
from tests.support.tolerance import assert_close_to_reference

F64 = torch.float64
ROUTINGS = ("random", "balanced", "one_pair", "few", "twice", "some_left_out", "none")
ACTIVATIONS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def one_token_at_a_time(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up_proj_bias: Tensor | None = None,
    down_proj_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """Vectors only, no sorting, no groups."""
    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[t])
        for j in range(ids.shape[1]):
            e = int(ids[t, j])
            if e < 0:
                continue
            inner = gate_up_proj[e] @ x[t]
            if gate_up_proj_bias is not None:
                inner = inner + gate_up_proj_bias[e]
            if gate_up_proj.shape[1] == 2 * down_proj.shape[2]:
                gate, up = inner.chunk(2)
                inner = ACTIVATIONS[activation](gate) * up
            else:
                inner = ACTIVATIONS[activation](inner)
            y = down_proj[e] @ inner
            if down_proj_bias is not None:
                y = y + down_proj_bias[e]
            total = total + weights[t, j] * y
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_plan(routing, top_k):
    ids = picks(Draw(f"plan-{routing}-{top_k}"), 13, top_k, 6, routing)
    offsets, perm, inv = moe_plan(ids, 6)
    flat = ids.flatten().tolist()
    order = [s for e in (*range(6), -1) for s, found in enumerate(flat) if found == e]
    assert perm.tolist() == order
    assert inv[perm.long()].tolist() == list(range(len(flat)))
    assert offsets.diff().tolist() == [flat.count(e) for e in range(6)]
    assert {t.dtype for t in (offsets, perm, inv)} == {torch.int32}


@pytest.mark.parametrize("trans_b", [True, False])
def test_grouped_gemm(trans_b):
    draw = Draw("product")
    a, b = draw.normal(9, 5, dtype=F64), draw.normal(3, 4, 5, dtype=F64)
    out = grouped_gemm(a, b if trans_b else b.mT, torch.tensor([0, 2, 2, 7]), trans_b=trans_b)
    close(out[:2], functional.linear(a[:2], b[0]))
    close(out[2:7], functional.linear(a[2:7], b[2]))
    assert not out[7:].any()


def test_gradients_of_grouped_gemm():
    draw = Draw("product-gradient")
    a, b = draw.normal(6, 3, dtype=F64).requires_grad_(), draw.normal(3, 2, 3, dtype=F64).requires_grad_()
    offsets = torch.tensor([0, 2, 2, 5])
    assert torch.autograd.gradcheck(lambda a, b: grouped_gemm(a, b, offsets), (a, b))
    da, db = torch.autograd.grad(grouped_gemm(a, b, offsets).sum(), (a, b))
    assert not db[1].any()
    assert not da[5:].any()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("bias", [False, True])
def test_experts_token_by_token(routing, bias):
    """Values and all gradients."""
    call = experts_call(draw=Draw(f"tokens-{routing}"), dtype=F64, routing=routing, bias=bias).requires_grad()
    _assert_same_gradients(call)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(activation, gated):
    draw = Draw(f"activation-{activation}")
    call = experts_call(draw=draw, dtype=F64, gated=gated, activation=activation, bias=True).requires_grad()
    _assert_same_gradients(call)


def _assert_same_gradients(call):
    leaves = list(call.floating().values())
    results = []
    for function in (moe_experts, one_token_at_a_time):
        out = function(*call.args, **call.kwargs)
        if not out.requires_grad:  # no pick at all
            results.append([out, *(torch.zeros_like(t) for t in leaves)])
            continue
        found = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        results.append(
            [out, *(torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True))]
        )
    for a, b in zip(*results, strict=True):
        close(a, b)


@pytest.mark.parametrize("with_bias", [False, True])
def test_grad_weights_stand_in_for_everything_but_the_weights(with_bias):
    """The gradients of two plain calls, put together."""
    draw = Draw("stand-in")
    call = experts_call(draw=draw, dtype=F64, bias=with_bias, routing="some_left_out").requires_grad()
    *others, weights = call.args
    stand_in = draw.normal(*weights.shape, dtype=F64)
    dout = draw.normal(*others[0].shape, dtype=F64)
    learned = [others[0], others[1], others[2], *call.kwargs.values()]
    out = moe_experts(*call.args, **call.kwargs, grad_weights=stand_in)
    plain = moe_experts(*call.args, **call.kwargs)
    close(out, plain)
    got = torch.autograd.grad(out, [weights, *learned], dout)
    close(got[0], torch.autograd.grad(plain, weights, dout)[0])
    other = moe_experts(*others, stand_in, **call.kwargs)
    for a, b in zip(got[1:], torch.autograd.grad(other, learned, dout), strict=True):
        close(a, b)


def test_what_no_expert_reads_may_be_anything():
    call = experts_call(draw=Draw("unread"), dtype=F64, bias=True, experts=6, routing="few").requires_grad()
    hidden, gate_up_proj, down_proj, ids, weights = call.args
    ids[3], ids[5, 1] = -1, -1
    with torch.no_grad():
        hidden[3], weights[3], weights[5, 1] = torch.nan, torch.nan, torch.nan
        gate_up_proj[1], down_proj[1] = torch.nan, torch.nan  # nobody's expert
    out = moe_experts(*call.args, **call.kwargs)
    assert not out[3].any()
    assert out.isfinite().all()
    for g in torch.autograd.grad(out.square().sum(), list(call.floating().values())):
        assert g.isfinite().all()
    assert not torch.autograd.grad(moe_experts(*call.args, **call.kwargs).sum(), hidden)[0][3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounds_once(dtype):
    call = experts_call(draw=Draw("rounding"), dtype=dtype)
    got = moe_experts(*call.args)
    assert got.dtype == dtype
    assert_close_to_reference("out", got, moe_experts(*call.to(F64).args))


def test_equals_the_experts_of_mixtral():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    if not hasattr(modeling, "MixtralExperts"):
        pytest.skip("this transformers keeps the experts of Mixtral in a list of modules")
    config = modeling.MixtralConfig(
        hidden_size=12, intermediate_size=7, num_local_experts=4, hidden_act="silu"
    )
    module = modeling.MixtralExperts(config).double()
    call = experts_call(23, draw=Draw("mixtral"), dtype=F64)
    x, gate_up_proj, down_proj, ids, weights = call.args
    with torch.no_grad():
        module.gate_up_proj.copy_(gate_up_proj)
        module.down_proj.copy_(down_proj)
    leaves = [t.requires_grad_() for t in (x, gate_up_proj, down_proj, weights)]
    theirs = module(x, ids, weights)
    ours = moe_experts(*call.args)
    close(ours, theirs)
    want = torch.autograd.grad(theirs.sum(), [x, module.gate_up_proj, module.down_proj, weights])
    for a, b in zip(torch.autograd.grad(ours.sum(), leaves), want, strict=True):
        close(a, b)


@pytest.mark.parametrize("bad", [4, -2, 2**40])
def test_ids_outside(bad):
    ids = torch.tensor([[0, 1], [2, bad]])
    text = rf"topk_ids must be in \[-1, 4\), got {bad} at index 3"
    with pytest.raises(IndexError, match=f"moe_plan: {text}"):
        moe_plan(ids, 4)
    call = experts_call(2, draw=Draw("bad"))
    with pytest.raises(IndexError, match=f"moe_experts: {text}"):
        moe_experts(*call.args[:3], ids, call.args[4])


def test_unknown_activation():
    call = experts_call(draw=Draw("bad"))
    with pytest.raises(ValueError, match="activation must be silu, gelu_tanh, relu or relu2, got tanh"):
        moe_experts(*call.args, activation="tanh")
