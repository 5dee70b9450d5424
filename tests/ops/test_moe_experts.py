"""moe_experts, forward; gradients in `test_moe_experts_backward.py`."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlm
from fastlm import ops, reference
from tests.support import conformance, samples, strategies
from tests.support.conformance import assert_matches_reference
from tests.support.experts import dense_experts
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.moe_dispatch import experts_call, picks
from tests.support.tolerance import assert_close_to_reference

EXPERTS = samples.of("moe_experts")
ROUTINGS = ("random", "balanced", "one_pair", "few", "twice", "some_left_out", "none")


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", EXPERTS, ids=str)
def test_matches_reference(sample, device):
    assert_matches_reference(ops.moe_experts, reference.moe_experts, sample.build(device))


@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7, 128, 1000])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_forced_routings(routing, tokens, dtype):
    """Against every expert on every token."""
    call = experts_call(tokens, 2, 9, 19, 13, draw=Draw(f"forced-{routing}"), dtype=dtype, routing=routing)
    assert_matches_reference(ops.moe_experts, dense_experts, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [*range(1, 11), 31, 32, 33, 191, 193, 255, 257])
def test_experts_with_so_many_tokens(rows, dtype):
    """Single tokens, few and many: each has a kernel of its own; sizes odd, one past a block of rows and half a block."""
    call = experts_call(rows + 1, 1, 3, 67, 99, draw=Draw(f"rows-{rows}"), dtype=dtype, bias=True)
    call.args[3][:rows], call.args[3][rows:] = 1, 2
    assert_matches_reference(ops.moe_experts, reference.moe_experts, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", range(1, 9))
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_every_number_of_picks(tokens, top_k, dtype):
    call = experts_call(
        tokens, top_k, 11, draw=Draw("picks"), dtype=dtype, routing="some_left_out", bias=True
    )
    assert_matches_reference(ops.moe_experts, reference.moe_experts, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "inner"), [(191, 193), (193, 95), (575, 97), (577, 577), (8, 1200), (1200, 8)]
)
@pytest.mark.parametrize("tokens", [2, 50])
def test_sizes_next_to_blocks(tokens, size, inner, dtype):
    call = experts_call(tokens, 2, 3, size, inner, draw=Draw("sizes"), dtype=dtype)
    assert_matches_reference(ops.moe_experts, reference.moe_experts, call)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
def test_activations(activation, gated, dtype):
    """Few tokens and many, far from zero too."""
    draw = Draw(f"activation-{activation}")
    call = experts_call(60, 2, 12, draw=draw, dtype=dtype, gated=gated, activation=activation, routing="few")
    call.args[0].mul_(4)
    assert_matches_reference(ops.moe_experts, reference.moe_experts, call)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_picks_may_have_the_dtype_of_hidden_states(dtype):
    call = experts_call(draw=Draw("narrow"), dtype=dtype, weight_dtype=dtype)
    assert_matches_reference(ops.moe_experts, reference.moe_experts, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_experts_of_mixtral(dtype):
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    if not hasattr(modeling, "MixtralExperts"):
        pytest.skip("this transformers keeps the experts of Mixtral in a list of modules")
    config = modeling.MixtralConfig(hidden_size=24, intermediate_size=40, num_local_experts=6)
    call = experts_call(50, 2, 6, 24, 40, draw=Draw("mixtral"), dtype=dtype)
    module = modeling.MixtralExperts(config).to(dtype).eval()
    exact = reference.moe_experts(*call.to(torch.float64).args)
    with torch.no_grad():
        module.gate_up_proj.copy_(call.args[1])
        module.down_proj.copy_(call.args[2])
        theirs = module(call.args[0], *call.args[3:])
    assert_close_to_reference("out", ops.moe_experts(*call.args), exact, theirs)


def test_more_tokens_than_are_held_at_a_time():
    """Every token gets its own experts' result, whatever chunk it is in."""
    call = experts_call(21_000, 2, 3, 5, 3, draw=Draw("chunks"), routing="some_left_out")
    assert_matches_reference(ops.moe_experts, reference.moe_experts, call)


# ---- properties -----------------------------------------------------------------------------------------


@given(
    draw=strategies.draws(),
    tokens=strategies.sizes(1, 150),
    top_k=st.integers(1, 8),
    experts=strategies.sizes(1, 20),
    dtype=strategies.dtypes(),
)
def test_permuted_tokens_give_permuted_outputs(draw, tokens, top_k, experts, dtype):
    call = experts_call(tokens, top_k, experts, draw=draw, dtype=dtype, bias=True)
    x, gate_up_proj, down_proj, ids, weights = call.args
    order = draw.permutation(tokens)
    out = ops.moe_experts(*call.args, **call.kwargs)
    permuted = ops.moe_experts(x[order], gate_up_proj, down_proj, ids[order], weights[order], **call.kwargs)
    assert torch.equal(permuted, out[order])


@given(
    draw=strategies.draws(),
    tokens=strategies.sizes(1, 60),
    experts=strategies.sizes(1, 20),
    dtype=strategies.dtypes(),
)
def test_renamed_experts_change_no_bit(draw, tokens, experts, dtype):
    call = experts_call(tokens, 3, experts, draw=draw, dtype=dtype)
    x, gate_up_proj, down_proj, ids, weights = call.args
    order = draw.permutation(experts)
    renamed = ops.moe_experts(x, gate_up_proj[order], down_proj[order], order.argsort()[ids], weights)
    assert torch.equal(renamed, ops.moe_experts(*call.args))


@given(
    draw=strategies.draws(),
    tokens=strategies.sizes(1, 90),
    top_k=st.integers(1, 8),
    dtype=strategies.dtypes(),
)
def test_every_pick_contributes_exactly_once(draw, tokens, top_k, dtype):
    """Token t is the unit vector t and expert e multiplies by 2^e, so that the digits of a sum say who was in it."""
    ids = picks(draw, tokens, top_k, 8, "random")
    left_out = draw.integers(0, 4, ids.shape) == 0
    unit = torch.eye(tokens, dtype=dtype)
    factors = 2.0 ** torch.arange(8, dtype=dtype)
    down = factors.view(8, 1, 1) * unit
    weights = torch.ones(ids.shape, dtype=torch.promote_types(dtype, torch.float32))
    picked = ids.masked_fill(left_out, -1)
    out = ops.moe_experts(unit, unit.expand(8, tokens, tokens), down, picked, weights, activation="relu")
    want = torch.where(left_out, 0, factors[ids]).sum(1)
    assert torch.equal(out, torch.diag(want))


@given(draw=strategies.draws(), tokens=strategies.sizes(1, 40), dtype=strategies.dtypes())
def test_doubled_weights_double_the_output(draw, tokens, dtype):
    call = experts_call(tokens, draw=draw, dtype=dtype)
    *others, weights = call.args
    assert torch.equal(ops.moe_experts(*others, 2 * weights), 2 * ops.moe_experts(*call.args))


@given(draw=strategies.draws(), tokens=strategies.sizes(1, 60), dtype=strategies.dtypes())
def test_a_column_of_picks_without_experts_is_as_if_absent(draw, tokens, dtype):
    x, gate_up_proj, down_proj, ids, weights = experts_call(tokens, draw=draw, dtype=dtype).args
    out = ops.moe_experts(x, gate_up_proj, down_proj, ids[:, :1], weights[:, :1])
    for place in (0, 1):
        pair = [torch.full_like(ids[:, 0], -1)] * 2
        pair[place] = ids[:, 0]
        counted = torch.full_like(weights, torch.nan)
        counted[:, place] = weights[:, 0]
        assert torch.equal(ops.moe_experts(x, gate_up_proj, down_proj, torch.stack(pair, 1), counted), out)


@given(
    draw=strategies.draws(),
    tokens=strategies.sizes(2, 60),
    experts=st.integers(1, 5),
    dtype=strategies.dtypes(),
)
def test_a_token_of_nan_stays_alone(draw, tokens, experts, dtype):
    call = experts_call(tokens, 2, experts, draw=draw, dtype=dtype)
    clean = ops.moe_experts(*call.args)
    bad = int(draw.integers(0, tokens, ()))
    call.args[0][bad] = torch.nan
    out = ops.moe_experts(*call.args)
    assert out[bad].isnan().all()
    others = torch.arange(tokens) != bad
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
@pytest.mark.parametrize("tokens", [3, 60])
def test_what_no_pick_names_is_not_read(tokens, dtype):
    call = experts_call(tokens, 2, 9, draw=Draw("unread"), dtype=dtype, bias=True, routing="few")
    x, gate_up_proj, down_proj, ids, weights = call.args
    ids[1], ids[2, 1] = -1, -1
    x[1], weights[1], weights[2, 1] = torch.nan, torch.nan, torch.nan
    for t in (gate_up_proj, down_proj, *call.kwargs.values()):
        t[1] = torch.nan
    out = ops.moe_experts(*call.args, **call.kwargs)
    assert not out[1].any()
    assert out.isfinite().all()


@pytest.mark.parametrize("layout", ["gaps", "no_unit_stride"])
@given(
    draw=strategies.draws(),
    tokens=st.sampled_from([1, 2, 5, 30]),
    dtype=strategies.dtypes(),
    transposed=st.booleans(),
)
def test_memory_layout_changes_the_rounding_at_most(layout, draw, tokens, dtype, transposed):
    call = experts_call(tokens, 2, 3, draw=draw, dtype=dtype, layout=layout, transposed=transposed, bias=True)
    assert_matches_reference(ops.moe_experts, reference.moe_experts, call)


# ---- gradients: what the forward pass keeps for them ----------------------------------------------------


def _keep(call: Call) -> tuple[Tensor, Tensor]:
    return torch.ops.fastlm.moe_experts(*call.args, **call.kwargs, keep_gate_up=True)


@pytest.mark.parametrize(
    "name", ["everything", "no_gate", "bfloat16", "float64", "eight_picks", "past_a_tile_bfloat16"]
)
def test_kept_rows_are_what_goes_into_the_activation(name):
    call = next(s for s in EXPERTS if s.name == name).build()
    x, gate_up_proj, _, ids, _ = call.args
    out, kept = _keep(call)
    assert torch.equal(out, ops.moe_experts(*call.args, **call.kwargs))
    offsets, perm, _ = reference.moe_plan(ids, len(gate_up_proj))
    rows = x[perm.long() // ids.shape[1]]
    bias = call.kwargs.get("gate_up_proj_bias")
    results = []
    for dtype in (torch.float64, torch.promote_types(x.dtype, torch.float32)):
        want = reference.grouped_gemm(rows.to(dtype), gate_up_proj.to(dtype), offsets)
        if bias is not None:
            behind = torch.repeat_interleave(torch.arange(len(bias)), offsets.diff())
            want[: len(behind)] += bias[behind].to(dtype)
        results.append(want[: int(offsets[-1])])
    exact, plain = results
    assert_close_to_reference("gate_up", kept[: len(exact)], exact, plain.to(x.dtype))


def test_rows_are_kept_for_a_gradient_only():
    call = experts_call(draw=Draw("keep"))
    seen = []

    def watch(ctx_input: Tensor) -> Tensor:
        seen.append(ctx_input.shape)
        return ctx_input

    for recompute, rows in ((False, (22, 14)), (True, (0,))):
        leaves = call.requires_grad()
        with torch.autograd.graph.saved_tensors_hooks(watch, lambda t: t):
            ops.moe_experts(*leaves.args, recompute=recompute)
        assert seen[-1] == rows
    seen.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(watch, lambda t: t):
        ops.moe_experts(*call.requires_grad().args)
    assert not seen


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("sample", EXPERTS, ids=str)
def test_opcheck(sample, with_grad):
    conformance.assert_opcheck(sample, with_grad=with_grad)


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("name", ["grad_weights", "bfloat16", "no_gate", "no_tokens"])
def test_opcheck_of_kept_rows(name, with_grad):
    call = next(s for s in EXPERTS if s.name == name).build()
    if with_grad:
        call = call.requires_grad()
    op = torch.ops.fastlm.moe_experts.default
    torch.library.opcheck(op, call.args, {**call.kwargs, "keep_gate_up": True})
    with FakeTensorMode() as mode:
        fake = _keep(call.map(lambda a: mode.from_tensor(a) if isinstance(a, Tensor) else a))
    for got, want in zip(fake, _keep(call), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["everything", "bfloat16", "no_gate", "transposed"])
def test_compile(name, recompute):
    sample = next(s for s in EXPERTS if s.name == name)
    conformance.assert_compiles(sample, partial(ops.moe_experts, recompute=recompute), with_grad=True)


# ---- errors ---------------------------------------------------------------------------------------------


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _ids(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


HALF, DOUBLE = torch.bfloat16, torch.float64
GOOD = {
    "hidden_states": _x(5, 6),
    "gate_up_proj": _x(4, 14, 6),
    "down_proj": _x(4, 6, 7),
    "topk_ids": _ids(5, 2),
    "topk_weights": _x(5, 2),
}
GATE_UP = "gate_up_proj must have shape (4, 14, 6) or, without a gate, (4, 7, 6), got"
BAD_CALLS = [
    (
        {"hidden_states": _ids(5, 6)},
        "hidden_states must have dtype float32, bfloat16, float16 or float64, got int64",
    ),
    ({"hidden_states": _x(6)}, "hidden_states must have shape (T, h), got (6,)"),
    ({"hidden_states": _x(1, 5, 6)}, "hidden_states must have shape (T, h), got (1, 5, 6)"),
    ({"down_proj": _x(6, 7)}, "down_proj must have shape (E, h, I), got (6, 7)"),
    ({"down_proj": _x(4, 7, 6)}, "down_proj must have shape (4, 6, 6), got (4, 7, 6)"),
    (
        {"down_proj": _x(4, 6, 7, dtype=HALF)},
        "down_proj must have the dtype of hidden_states, float32, got bfloat16",
    ),
    ({"gate_up_proj": _x(4, 6, 14)}, f"{GATE_UP} (4, 6, 14)"),
    ({"gate_up_proj": _x(3, 14, 6)}, f"{GATE_UP} (3, 14, 6)"),
    ({"gate_up_proj": _x(4, 13, 6)}, f"{GATE_UP} (4, 13, 6)"),
    ({"gate_up_proj": _x(14, 6)}, f"{GATE_UP} (14, 6)"),
    (
        {"gate_up_proj": _x(4, 14, 6, dtype=DOUBLE)},
        "gate_up_proj must have the dtype of hidden_states, float32, got float64",
    ),
    ({"topk_ids": _x(5, 2)}, "topk_ids must have dtype int32 or int64, got float32"),
    ({"topk_ids": _ids(5)}, "topk_ids must have shape (T, k), got (5,)"),
    ({"topk_ids": _ids(5, 9)}, "topk_ids must have 1 to 8 columns, got 9"),
    ({"topk_ids": _ids(5, 0)}, "topk_ids must have 1 to 8 columns, got 0"),
    ({"topk_ids": _ids(4, 2)}, "topk_ids must have shape (5, k), got (4, 2)"),
    ({"topk_weights": _x(5, 3)}, "topk_weights must have shape (5, 2), got (5, 3)"),
    ({"topk_weights": _x(5, 2, dtype=DOUBLE)}, "topk_weights must have dtype float32, got float64"),
    ({"grad_weights": _x(2, 5)}, "grad_weights must have shape (5, 2), got (2, 5)"),
    ({"grad_weights": _x(5, 2, dtype=HALF)}, "grad_weights must have dtype float32, got bfloat16"),
    ({"gate_up_proj_bias": _x(4, 7)}, "gate_up_proj_bias must have shape (4, 14), got (4, 7)"),
    ({"down_proj_bias": _x(4, 7)}, "down_proj_bias must have shape (4, 6), got (4, 7)"),
    (
        {"down_proj_bias": _ids(4, 6)},
        "down_proj_bias must have dtype float32, bfloat16, float16 or float64, got int64",
    ),
    ({"activation": "swish"}, "activation must be silu, gelu_tanh, relu or relu2, got swish"),
    ({"gate_up_proj": _x(0, 14, 6), "down_proj": _x(0, 6, 7)}, "num_experts must be at least 1, got 0"),
]


@pytest.mark.parametrize(("change", "text"), BAD_CALLS, ids=[text for _, text in BAD_CALLS])
def test_errors(change, text):
    for function in (ops.moe_experts, torch.ops.fastlm.moe_experts):
        conformance.assert_same_error(function, Call((), GOOD | change), ValueError, f"moe_experts: {text}")


@pytest.mark.parametrize("weights", [torch.float64, torch.float16], ids=str)
def test_error_in_the_dtype_of_weights_beside_bfloat16(weights):
    narrow = {name: t.bfloat16() if t.is_floating_point() else t for name, t in GOOD.items()}
    call = Call((), narrow | {"topk_weights": _x(5, 2, dtype=weights)})
    text = f"topk_weights must have dtype float32 or bfloat16, got {str(weights).removeprefix('torch.')}"
    conformance.assert_same_error(ops.moe_experts, call, ValueError, text)


@pytest.mark.host_values
@pytest.mark.parametrize(("bad", "at"), [(4, 9), (-2, 0), (2**32, 3)])
def test_errors_in_ids(bad, at):
    ids = _ids(5, 2)
    ids.view(-1)[at] = bad
    call = Call((), GOOD | {"topk_ids": ids})
    text = f"moe_experts: topk_ids must be in [-1, 4), got {bad} at index {at}"
    for function in (ops.moe_experts, reference.moe_experts):
        conformance.assert_same_error(function, call, IndexError, text, on_meta=False)


# ---- twins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", EXPERTS, ids=str)
def test_every_level(sample):
    conformance.assert_levels_match_reference(sample, ops.moe_experts, reference.moe_experts, with_grad=False)


@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_same_bits_for_any_number_of_threads(tokens, dtype):
    def make_call() -> Call:
        return experts_call(tokens, 2, 5, 70, 210, draw=Draw("threads"), dtype=dtype, bias=True)

    conformance.assert_same_for_any_thread_count(ops.moe_experts, make_call, with_grad=False)


@pytest.mark.parametrize("level", fastlm._C.supported_cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_call_matches_the_reference(level, dtype):
    """Several blocks of everything, nothing a multiple of anything."""
    call = experts_call(601, 2, 5, 587, 211, draw=Draw("large"), dtype=dtype, bias=True)
    with conformance.cpu_level(level):
        assert_matches_reference(ops.moe_experts, reference.moe_experts, call)
