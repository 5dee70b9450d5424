"""Gradients of moe_experts: hidden states, both projections, the weights of picks, both biases."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastlm
from fastlm import ops, reference
from tests.support import conformance, samples, strategies
from tests.support.conformance import Function
from tests.support.experts import dense_experts, plain_experts
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.moe_dispatch import experts_call
from tests.support.tolerance import assert_close_to_reference

EXPERTS = samples.of("moe_experts")
BACKWARD = samples.of("moe_experts_backward")
ROUTINGS = ("random", "balanced", "one_pair", "few", "twice", "some_left_out", "none")
RECOMPUTE = pytest.mark.parametrize("recompute", [False, True])


def gradients_of(function: Function, call: Call, dout: Tensor, **options: Any) -> dict[str, Tensor]:
    """One for each floating argument; zeros where the function does not depend on it."""
    call = call.requires_grad()
    leaves = call.floating()
    out = function(*call.args, **call.kwargs, **options)
    if not out.requires_grad:
        return {name: torch.zeros_like(t) for name, t in leaves.items()}
    found = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype), allow_unused=True)
    return {
        name: torch.zeros_like(t) if g is None else g
        for (name, t), g in zip(leaves.items(), found, strict=True)
    }


def assert_gradients(*calls: Call, definition: Function = reference.moe_experts, **options: Any) -> None:
    """Compared with plain PyTorch that rounds after each layer; several calls count as one, whose numbers stand side by side."""
    results: list[dict[str, Tensor]] = []
    for function, exact in ((ops.moe_experts, False), (definition, True), (plain_experts, False)):
        found = []
        for i, call in enumerate(calls):
            x = call.args[0]
            dout = Draw(f"dout-{i}").normal(*x.shape, dtype=x.dtype).to(x.device)
            own = {} if exact else options
            found.append(gradients_of(function, call.to(torch.float64) if exact else call, dout, **own))
        results.append({name: torch.stack([g[name] for g in found]) for name in found[0]})
    for name, got in results[0].items():
        assert_close_to_reference(name, got, *(r[name] for r in results[1:]), dtype=calls[0].args[0].dtype)


# ---- reference ------------------------------------------------------------------------------------------


@RECOMPUTE
@pytest.mark.parametrize("sample", EXPERTS, ids=str)
def test_gradients(sample, recompute, device):
    assert_gradients(sample.build(device), recompute=recompute)


@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7, 128, 1000])
@pytest.mark.parametrize("routing", [name for name in ROUTINGS if name != "none"])
def test_forced_routings(routing, tokens, dtype):
    """Against every expert on every token. The gradients of one token are too few numbers to judge roundings by."""
    calls = [
        experts_call(tokens, 2, 9, 19, 13, draw=Draw(f"forced-{routing}-{i}"), dtype=dtype, routing=routing)
        for i in range(20 if 0 < tokens < 10 and dtype.itemsize == 2 else 1)
    ]
    assert_gradients(*calls, definition=dense_experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [*range(1, 11), 31, 32, 33, 95, 191, 193, 257])
def test_experts_with_so_many_tokens(rows, dtype):
    """Sizes odd, one past a block."""
    call = experts_call(rows + 1, 1, 3, 67, 99, draw=Draw(f"rows-{rows}"), dtype=dtype, bias=True)
    call.args[3][:rows], call.args[3][rows:] = 1, 2
    assert_gradients(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "inner"), [(191, 193), (193, 95), (577, 577), (8, 1200), (1200, 8)])
@pytest.mark.parametrize("tokens", [2, 50])
def test_sizes_next_to_blocks(tokens, size, inner, dtype):
    assert_gradients(experts_call(tokens, 2, 3, size, inner, draw=Draw("sizes"), dtype=dtype))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
def test_activations(activation, gated, dtype):
    draw = Draw(f"activation-{activation}")
    call = experts_call(60, draw=draw, dtype=dtype, gated=gated, activation=activation, bias=True)
    call.args[0].mul_(4)
    assert_gradients(call)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_picks_may_have_the_dtype_of_hidden_states(dtype):
    call = experts_call(draw=Draw("narrow"), dtype=dtype, weight_dtype=dtype, grad_weights=True)
    assert_gradients(call)


@pytest.mark.parametrize("routing", ["balanced", "one_pair"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_rows_than_are_held_at_a_time(routing, dtype):
    """Several waves of experts; with one pair, experts that fill one alone."""
    call = experts_call(4500, 2, 7, 11, 6, draw=Draw("waves"), dtype=dtype, routing=routing, bias=True)
    assert_gradients(call)


def test_equals_the_experts_of_mixtral():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    if not hasattr(modeling, "MixtralExperts"):
        pytest.skip("this transformers keeps the experts of Mixtral in a list of modules")
    config = modeling.MixtralConfig(hidden_size=24, intermediate_size=40, num_local_experts=6)
    call = experts_call(50, 2, 6, 24, 40, draw=Draw("mixtral"), dtype=torch.float64)
    dout = Draw("dout").normal(50, 24, dtype=torch.float64)
    module = modeling.MixtralExperts(config).double()

    def theirs(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        parameters = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
        return torch.func.functional_call(module, parameters, (x, ids, weights))

    ours = gradients_of(ops.moe_experts, call, dout)
    for name, want in gradients_of(theirs, call, dout).items():
        assert_close_to_reference(name, ours[name], want)


# ---- properties -----------------------------------------------------------------------------------------


@given(
    draw=strategies.draws(),
    tokens=strategies.sizes(1, 90),
    dtype=strategies.dtypes(),
    grad_weights=st.booleans(),
)
def test_permuted_tokens_give_permuted_gradients(draw, tokens, dtype, grad_weights):
    """Of tokens and of what they picked; those of the projections are sums in another order."""
    call = experts_call(tokens, 2, 5, draw=draw, dtype=dtype, bias=True, grad_weights=grad_weights)
    order = draw.permutation(tokens)
    dout = draw.normal(tokens, 12, dtype=dtype)
    x, gate_up_proj, down_proj, ids, weights = call.args
    permuted = Call((x[order], gate_up_proj, down_proj, ids[order], weights[order]), dict(call.kwargs))
    if grad_weights:
        permuted.kwargs["grad_weights"] = call.kwargs["grad_weights"][order]
    plain = gradients_of(ops.moe_experts, call, dout)
    moved = gradients_of(ops.moe_experts, permuted, dout[order])
    for name in ("arg0", "arg4"):
        assert torch.equal(moved[name], plain[name][order])


@RECOMPUTE
@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
@pytest.mark.parametrize("tokens", [3, 60])
def test_what_no_pick_names_is_not_read(tokens, dtype, recompute):
    call = experts_call(tokens, 2, 9, draw=Draw("unread"), dtype=dtype, bias=True, routing="few")
    x, gate_up_proj, down_proj, ids, weights = call.args
    ids[1], ids[2, 1] = -1, -1
    x[1], weights[1], weights[2, 1] = torch.nan, torch.nan, torch.nan
    for t in (gate_up_proj, down_proj, *call.kwargs.values()):
        t[1] = torch.nan
    dout = Draw("dout").normal(*x.shape, dtype=dtype)
    dout[1] = torch.nan
    found = gradients_of(ops.moe_experts, call, dout, recompute=recompute)
    assert all(g.isfinite().all() for g in found.values())
    assert not found["arg0"][1].any()
    assert not found["arg4"][1].any()
    assert not found["arg4"][2, 1]
    for name in ("arg1", "arg2", "gate_up_proj_bias", "down_proj_bias"):
        assert not found[name][1].any()


@given(
    draw=strategies.draws(),
    tokens=strategies.sizes(1, 60),
    dtype=strategies.dtypes(),
    recompute=st.booleans(),
)
def test_grad_weights_equal_to_the_weights_change_no_bit(draw, tokens, dtype, recompute):
    call = experts_call(tokens, 3, draw=draw, dtype=dtype, bias=True, routing="some_left_out")
    dout = draw.normal(tokens, 12, dtype=dtype)
    plain = gradients_of(ops.moe_experts, call, dout, recompute=recompute)
    given_too = gradients_of(
        partial(ops.moe_experts, grad_weights=call.args[4]), call, dout, recompute=recompute
    )
    for name, want in plain.items():
        assert torch.equal(given_too[name], want)


@given(draw=strategies.draws(), tokens=strategies.sizes(1, 60), dtype=strategies.dtypes())
def test_grad_weights_are_for_everything_but_the_weights(draw, tokens, dtype):
    """Straight through: as if the forward pass had put these on the experts; a pick's own gradient knows nothing of them."""
    call = experts_call(tokens, draw=draw, dtype=dtype, bias=True)
    *others, weights = call.args
    stand_in = draw.normal(*weights.shape, dtype=weights.dtype)
    dout = draw.normal(tokens, 12, dtype=dtype)
    plain = gradients_of(ops.moe_experts, call, dout)
    other = gradients_of(ops.moe_experts, Call((*others, stand_in), call.kwargs), dout)
    found = gradients_of(partial(ops.moe_experts, grad_weights=stand_in), call, dout)
    for name, got in found.items():
        assert torch.equal(got, (plain if name == "arg4" else other)[name])


# ---- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
@RECOMPUTE
def test_gradcheck(activation, gated, recompute):
    draw = Draw("gradcheck")
    call = experts_call(
        4, 2, 3, 3, 2, draw=draw, dtype=torch.float64, gated=gated, bias=True, routing="some_left_out"
    ).requires_grad()
    x, gate_up_proj, down_proj, ids, weights = call.args

    def fn(x, gate_up_proj, down_proj, weights, gate_up_bias, down_bias):
        return ops.moe_experts(
            x,
            gate_up_proj,
            down_proj,
            ids,
            weights,
            activation=activation,
            gate_up_proj_bias=gate_up_bias,
            down_proj_bias=down_bias,
            recompute=recompute,
        )

    inputs = (x, gate_up_proj, down_proj, weights, *call.kwargs.values())
    assert torch.autograd.gradcheck(fn, inputs, check_undefined_grad=True)


@RECOMPUTE
@pytest.mark.parametrize("asked", ["arg0", "arg1", "arg2", "arg4", "gate_up_proj_bias", "down_proj_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_gradient_alone_has_the_same_bits(asked, dtype, recompute):
    call = experts_call(70, draw=Draw("alone"), dtype=dtype, bias=True)
    dout = Draw("dout").normal(70, 12, dtype=dtype)
    want = gradients_of(ops.moe_experts, call, dout, recompute=recompute)[asked]
    leaf = call.floating()[asked].requires_grad_()
    out = ops.moe_experts(*call.args, **call.kwargs, recompute=recompute)
    assert torch.equal(torch.autograd.grad(out, leaf, dout)[0], want)


@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
def test_a_gradient_that_is_one_number_everywhere(dtype):
    """The gradient of a sum has no strides."""
    call = experts_call(40, draw=Draw("sum"), dtype=dtype)
    ones = torch.ones((), dtype=dtype).expand(40, 12)
    expanded = gradients_of(ops.moe_experts, call, ones)
    for name, want in gradients_of(ops.moe_experts, call, ones.contiguous()).items():
        assert torch.equal(expanded[name], want)


def test_there_is_no_gradient_of_grad_weights():
    call = experts_call(draw=Draw("none"), grad_weights=True).requires_grad()
    out = ops.moe_experts(*call.args, **call.kwargs)
    assert torch.autograd.grad(out.sum(), call.kwargs["grad_weights"], allow_unused=True) == (None,)


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", BACKWARD, ids=str)
def test_opcheck(sample):
    conformance.assert_opcheck(sample, with_grad=False)


# ---- errors ---------------------------------------------------------------------------------------------


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("place", "bad", "text"),
    [
        (0, _x(5, 7), "dout must have shape (5, 6), got (5, 7)"),
        (
            0,
            _x(5, 6, dtype=torch.bfloat16),
            "dout must have the dtype of hidden_states, float32, got bfloat16",
        ),
        (1, _x(5, 7), "down_proj must have shape (4, 7, 7), got (4, 6, 7)"),
        (9, _x(9, 14), "gate_up must have shape (10, 14) or (0,), got (9, 14)"),
        (9, _x(10, 7), "gate_up must have shape (10, 14) or (0,), got (10, 7)"),
        (9, _x(0, 14), "gate_up must have shape (10, 14) or (0,), got (0, 14)"),
        (
            9,
            _x(10, 14, dtype=torch.float64),
            "gate_up must have the dtype of hidden_states, float32, got float64",
        ),
    ],
)
def test_errors(place, bad, text):
    ids = torch.zeros(5, 2, dtype=torch.int64)
    args = [_x(5, 6), _x(5, 6), _x(4, 14, 6), _x(4, 6, 7), ids, _x(5, 2), None, None, None, _x(10, 14)]
    args[place] = bad
    options = {"activation": "silu"}
    options |= dict.fromkeys(("need_dhidden_states", "need_dproj", "need_dtopk_weights"), True)
    conformance.assert_same_error(
        torch.ops.fastlm.moe_experts_backward,
        Call(tuple(args), options),
        ValueError,
        f"moe_experts_backward: {text}",
    )


# ---- twins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", EXPERTS, ids=str)
def test_every_level(sample):
    for level in conformance.other_levels():
        with conformance.cpu_level(level):
            assert_gradients(sample.build())
            assert_gradients(sample.build(), recompute=True)


@RECOMPUTE
@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
@pytest.mark.parametrize("tokens", [3, 300])
def test_same_bits_for_any_number_of_threads(tokens, dtype, recompute):
    def make_call() -> Call:
        return experts_call(tokens, 2, 5, 70, 210, draw=Draw("threads"), dtype=dtype, bias=True)

    conformance.assert_same_for_any_thread_count(
        ops.moe_experts, make_call, with_grad=True, recompute=recompute
    )


@pytest.mark.parametrize("level", fastlm._C.supported_cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_call_matches_the_reference(level, dtype):
    """Several blocks of everything, more than a stretch of the depth, nothing a multiple of anything."""
    draw = Draw("large")
    call = experts_call(601, 2, 5, 587, 211, draw=draw, dtype=dtype, routing="few", bias=True)
    with conformance.cpu_level(level):
        assert_gradients(call)
