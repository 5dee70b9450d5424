"""causal_conv1d and causal_conv1d_update against their reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastlm
from fastlm import ops, reference
from tests.support import conformance, samples, strategies
from tests.support.conformance import assert_gradients_match_reference, assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.tolerance import assert_close_to_reference

FORWARD = samples.of("causal_conv1d")
UPDATE = samples.of("causal_conv1d_update")
BACKWARD = samples.of("causal_conv1d_backward")


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", FORWARD, ids=str)
def test_matches_reference(sample, device):
    assert_matches_reference(
        ops.causal_conv1d, reference.causal_conv1d, sample.build(device), return_final_states=True
    )


@pytest.mark.parametrize("sample", UPDATE, ids=str)
def test_update_matches_reference(sample, device):
    assert_matches_reference(ops.causal_conv1d_update, reference.causal_conv1d_update, sample.build(device))


def test_output_keeps_the_memory_layout(device):
    x = torch.randn(2, 16, 9, device=device)
    weight = torch.randn(16, 4, device=device)
    assert ops.causal_conv1d(x, weight).stride() == x.stride()
    rows = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert ops.causal_conv1d(rows, weight).stride() == rows.stride()


def test_final_states_out_is_filled():
    x, weight = torch.randn(2, 5, 9), torch.randn(5, 4)
    room = torch.empty(2, 5, 3)
    _, states = ops.causal_conv1d(x, weight, return_final_states=True, final_states_out=room)
    assert torch.equal(room, states)


# ---- properties -----------------------------------------------------------------------------------------


@given(
    draw=strategies.draws(),
    dim=strategies.sizes(1, 40),
    length=strategies.sizes(1, 140),
    cut=st.floats(0, 1),
    width=st.integers(1, 6),
    layout=strategies.layouts(),
    dtype=strategies.dtypes(),
)
def test_two_pieces_with_carried_state_equal_one(draw, dim, length, cut, width, layout, dtype):
    x = draw.normal(2, dim, length, dtype=dtype, layout=layout)
    weight, bias = draw.normal(dim, width, dtype=dtype), draw.normal(dim, dtype=dtype)
    whole, last = ops.causal_conv1d(x, weight, bias, return_final_states=True, activation="silu")
    at = int(cut * length)
    first, state = ops.causal_conv1d(x[..., :at], weight, bias, return_final_states=True, activation="silu")
    second, end = ops.causal_conv1d(
        x[..., at:], weight, bias, initial_states=state, return_final_states=True, activation="silu"
    )
    torch.testing.assert_close(torch.cat([first, second], dim=2), whole)
    assert torch.equal(end, last)


@given(
    draw=strategies.draws(),
    lengths=strategies.lengths(),
    layout=strategies.layouts(),
    index_dtype=strategies.index_dtypes(),
)
def test_packed_equals_separate(draw, lengths, layout, index_dtype):
    total, dim = sum(lengths), 7
    x = draw.normal(1, dim, total, layout=layout)
    weight, bias = draw.normal(dim, 4), draw.normal(dim)
    states = draw.normal(len(lengths), dim, 3)
    bounds = strategies.cu_seqlens(lengths, index_dtype)
    out, ends = ops.causal_conv1d(
        x, weight, bias, initial_states=states, return_final_states=True, cu_seqlens=bounds
    )
    for i, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        alone, state = ops.causal_conv1d(
            x[..., begin:end], weight, bias, initial_states=states[i : i + 1], return_final_states=True
        )
        torch.testing.assert_close(out[..., begin:end], alone)
        assert torch.equal(ends[i : i + 1], state)


@given(draw=strategies.draws(), at=st.integers(1, 19), layout=strategies.layouts(writable=True))
def test_a_changed_suffix_changes_nothing_before_it(draw, at, layout):
    x, weight = draw.normal(2, 9, 20, layout=layout), draw.normal(9, 4)
    before = ops.causal_conv1d(x, weight)
    x[..., at:] = float("nan")
    assert torch.equal(ops.causal_conv1d(x, weight)[..., :at], before[..., :at])


@given(draw=strategies.draws(), steps=st.integers(1, 9), width=st.integers(1, 5), ring=st.booleans())
def test_decoding_equals_the_whole_sequence(draw, steps, width, ring):
    x, weight, bias = draw.normal(2, 6, steps), draw.normal(6, width), draw.normal(6)
    whole = ops.causal_conv1d(x, weight, bias, activation="silu")
    state = torch.zeros(2, 6, max(width, 1))
    for t in range(steps):
        seen = torch.tensor([t, t], dtype=torch.int32) if ring else None
        out = ops.causal_conv1d_update(x[..., t], state, weight, bias, "silu", cache_seqlens=seen)
        torch.testing.assert_close(out, whole[..., t])


def test_slots_of_other_rows_stay_as_they_were():
    state = torch.randn(5, 6, 4)
    before = state.clone()
    x = torch.randn(2, 6)
    ops.causal_conv1d_update(x, state, torch.randn(6, 4), conv_state_indices=torch.tensor([3, -1]))
    assert torch.equal(state[[0, 1, 2, 4]], before[[0, 1, 2, 4]])
    assert torch.equal(state[3, :, -1], x[0])


# ---- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", FORWARD, ids=str)
def test_gradients(sample, device):
    assert_gradients_match_reference(
        ops.causal_conv1d, reference.causal_conv1d, sample.build(device), return_final_states=True
    )


@pytest.mark.parametrize("only", [0, 1])
def test_a_missing_upstream_gradient_counts_as_zero(only):
    x, weight = torch.randn(2, 5, 9, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    results = []
    for fn in (ops.causal_conv1d, reference.causal_conv1d):
        output = fn(x, weight, return_final_states=True, activation="silu")[only]
        results.append(torch.autograd.grad(output.square().sum(), (x, weight), allow_unused=True))
    for got, want in zip(*results, strict=True):
        if want is None:
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("layout", ["contiguous", "channel_last"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(layout, activation):
    draw = Draw("gradcheck")
    inputs = [
        draw.normal(2, 3, 6, dtype=torch.float64, layout=layout),
        draw.normal(3, 4, dtype=torch.float64),
        draw.normal(3, dtype=torch.float64),
        draw.normal(2, 3, 3, dtype=torch.float64),
    ]

    def fn(x: Tensor, weight: Tensor, bias: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        return ops.causal_conv1d(
            x, weight, bias, None, states, return_final_states=True, activation=activation
        )

    assert torch.autograd.gradcheck(fn, [t.requires_grad_() for t in inputs], check_undefined_grad=True)


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("sample", FORWARD, ids=str)
def test_opcheck(sample, with_grad):
    conformance.assert_opcheck(sample, with_grad=with_grad)


@pytest.mark.parametrize("sample", BACKWARD + UPDATE, ids=str)
def test_opcheck_of_backward_and_update(sample):
    conformance.assert_opcheck(sample, with_grad=False)


@pytest.mark.parametrize(
    "sample", samples.of("causal_conv1d", "packed_initial") + samples.of("causal_conv1d", "past"), ids=str
)
def test_compile(sample):
    conformance.assert_compiles(sample, ops.causal_conv1d, with_grad=True, return_final_states=True)


def test_compile_update():
    (sample,) = samples.of("causal_conv1d_update", "slots_ring_padding")
    conformance.assert_compiles(sample, ops.causal_conv1d_update, with_grad=False)


# ---- errors ---------------------------------------------------------------------------------------------


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD_CALLS = [
    ("x_dim", (_x(4, 9), _x(4, 4)), {}, "causal_conv1d: x must have shape (B, D, L), got (4, 9)"),
    (
        "x_dtype",
        (_x(1, 4, 9, dtype=torch.int32), _x(4, 4)),
        {},
        "causal_conv1d: x must have dtype float32, bfloat16, float16 or float64, got int32",
    ),
    ("weight_dim", (_x(1, 4, 9), _x(4)), {}, "causal_conv1d: weight must have shape (D, W), got (4,)"),
    ("weight_rows", (_x(1, 4, 9), _x(3, 4)), {}, "causal_conv1d: weight must have shape (4, W), got (3, 4)"),
    (
        "weight_width",
        (_x(1, 4, 9), _x(4, 33)),
        {},
        "causal_conv1d: weight must have a width between 1 and 32, got 33",
    ),
    (
        "bias",
        (_x(1, 4, 9), _x(4, 4)),
        {"bias": _x(5)},
        "causal_conv1d: bias must have shape (4,), got (5,)",
    ),
    (
        "states_shape",
        (_x(1, 4, 9), _x(4, 4)),
        {"initial_states": _x(1, 4, 4)},
        "causal_conv1d: initial_states must have shape (1, 4, 3), got (1, 4, 4)",
    ),
    (
        "states_dtype",
        (_x(1, 4, 9), _x(4, 4)),
        {"initial_states": _x(1, 4, 3, dtype=torch.float64)},
        "causal_conv1d: initial_states must have the dtype of x, float32, got float64",
    ),
    (
        "activation",
        (_x(1, 4, 9), _x(4, 4)),
        {"activation": "gelu"},
        "causal_conv1d: activation must be None, 'silu' or 'swish', got 'gelu'",
    ),
    (
        "seq_idx_shape",
        (_x(1, 4, 9), _x(4, 4)),
        {"seq_idx": _x(1, 8, dtype=torch.int32)},
        "causal_conv1d: seq_idx must have shape (1, 9), got (1, 8)",
    ),
    (
        "seq_idx_dtype",
        (_x(1, 4, 9), _x(4, 4)),
        {"seq_idx": _x(1, 9)},
        "causal_conv1d: seq_idx must have dtype int32 or int64, got float32",
    ),
    (
        "both",
        (_x(1, 4, 9), _x(4, 4)),
        {"seq_idx": _x(1, 9, dtype=torch.int32), "cu_seqlens": _x(2, dtype=torch.int32)},
        "causal_conv1d: seq_idx and cu_seqlens must not both be given",
    ),
    (
        "packed_batch",
        (_x(2, 4, 9), _x(4, 4)),
        {"cu_seqlens": torch.tensor([0, 9])},
        "causal_conv1d: x must have batch 1 when cu_seqlens is given, got 2",
    ),
]


@pytest.mark.parametrize(
    ("args", "kwargs", "text"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS]
)
def test_errors(args, kwargs, text):
    for function in (ops.causal_conv1d, torch.ops.fastlm.causal_conv1d):
        conformance.assert_same_error(function, Call(args, kwargs), ValueError, text)


@pytest.mark.host_values
@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ([1, 9], "cu_seqlens must start with 0, got 1"),
        ([0, 5, 4, 9], "cu_seqlens must never decrease, got 5 then 4 at index 2"),
        ([0, 8], "cu_seqlens must end with 9, got 8"),
        ([0, 2**40], "cu_seqlens must end with 9, got 1099511627776"),
    ],
)
def test_errors_in_cu_seqlens(bounds, text):
    call = Call((_x(1, 4, 9), _x(4, 4)), {"cu_seqlens": torch.tensor(bounds)})
    conformance.assert_same_error(ops.causal_conv1d, call, ValueError, text, on_meta=False)


@pytest.mark.host_values
def test_error_of_a_document_that_comes_back():
    call = Call((_x(1, 4, 5), _x(4, 4)), {"seq_idx": torch.tensor([[0, 1, 0, 0, 0]])})
    text = "seq_idx must not return to an earlier id within 3 positions, got id 0 again at row 0, position 2"
    conformance.assert_same_error(ops.causal_conv1d, call, ValueError, text, on_meta=False)


UPDATE_BAD_CALLS = [
    (
        (_x(2), _x(2, 4, 3), _x(4, 4)),
        {},
        "causal_conv1d_update: x must have shape (B, D) or (B, D, m), got (2,)",
    ),
    (
        (_x(2, 4), _x(2, 4, 2), _x(4, 4)),
        {},
        "causal_conv1d_update: conv_state must have a length S of at least 3 (W - 1), got 2",
    ),
    (
        (_x(2, 4), _x(3, 4, 3), _x(4, 4)),
        {},
        "causal_conv1d_update: conv_state must have shape (2, 4, S), got (3, 4, 3)",
    ),
    (
        (_x(2, 4), _x(2, 4, 3, dtype=torch.float64), _x(4, 4)),
        {},
        "causal_conv1d_update: conv_state must have the dtype of x, float32, got float64",
    ),
    (
        (_x(2, 4), _x(2, 4, 3), _x(4, 4)),
        {"cache_seqlens": torch.tensor([1])},
        "causal_conv1d_update: cache_seqlens must have shape (2,), got (1,)",
    ),
]


@pytest.mark.parametrize(("args", "kwargs", "text"), UPDATE_BAD_CALLS)
def test_errors_of_update(args, kwargs, text):
    for function in (ops.causal_conv1d_update, torch.ops.fastlm.causal_conv1d_update):
        conformance.assert_same_error(function, Call(args, kwargs), ValueError, text)


@pytest.mark.host_values
@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"conv_state_indices": [0, 7]}, IndexError, "conv_state_indices must be below 3, got 7 at index 1"),
        (
            {"conv_state_indices": [1, 1]},
            ValueError,
            "must name each slot at most once, got 1 again at index 1",
        ),
        (
            {"conv_state_indices": [0, 1], "cache_seqlens": [3, -2]},
            ValueError,
            "cache_seqlens must not be negative, got -2 at index 1",
        ),
    ],
)
def test_errors_in_slots(kwargs, error, text):
    tensors = {name: torch.tensor(values) for name, values in kwargs.items()}
    call = Call((_x(2, 4), _x(3, 4, 3), _x(4, 4)), tensors)
    conformance.assert_same_error(ops.causal_conv1d_update, call, error, text, on_meta=False)


# ---- twins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", FORWARD, ids=str)
def test_every_level(sample):
    conformance.assert_levels_match_reference(
        sample, ops.causal_conv1d, reference.causal_conv1d, with_grad=True, return_final_states=True
    )


@pytest.mark.parametrize("layout", ["contiguous", "channel_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(layout, dtype):
    """Large enough that torch splits the work."""

    def make_call() -> Call:
        draw = Draw("threads")
        x, weight = draw.normal(3, 70, 700, dtype=dtype, layout=layout), draw.normal(70, 4, dtype=dtype)
        return Call((x, weight), {"bias": draw.normal(70, dtype=dtype), "activation": "silu"})

    conformance.assert_same_for_any_thread_count(ops.causal_conv1d, make_call, with_grad=True)


@pytest.mark.parametrize("layout", ["contiguous", "channel_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 4])
def test_same_bits_for_any_alignment(layout, dtype, width, device):
    """Where memory is not aligned, elements are moved one by one; that changes no result."""
    draw = Draw("alignment", device)
    shape = (2, 64, 208)
    weight, bias = draw.normal(64, width, dtype=dtype), draw.normal(64, dtype=dtype)
    results = []
    for room in (0, 1):
        values = Draw("alignment of x", device).normal(*shape, dtype=dtype)
        memory = values if layout == "contiguous" else values.transpose(1, 2)
        padded = memory.new_zeros((*memory.shape[:2], memory.shape[2] + room))
        padded[..., room:] = memory
        x = padded[..., room:] if layout == "contiguous" else padded[..., room:].transpose(1, 2)
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        out, states = ops.causal_conv1d(*leaves, activation="silu", return_final_states=True)
        weights = torch.linspace(-1, 1, out.numel(), device=device).view(shape)
        grads = torch.autograd.grad((out.float() * weights).sum(), leaves)
        results.append((out, states, *grads))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_large_call_matches_the_reference():
    """Several tiles and several blocks of channels at once."""
    draw = Draw("large")
    x = draw.normal(2, 300, 200, layout="channel_last")
    weight, bias = draw.normal(300, 4), draw.normal(300)
    got = ops.causal_conv1d(x, weight, bias, activation="silu")
    exact = reference.causal_conv1d(x.double(), weight.double(), bias.double(), activation="silu")
    plain = reference.causal_conv1d(x, weight, bias, activation="silu")
    assert_close_to_reference("out", got, exact, plain)


def test_the_level_can_be_forced():
    for level in fastlm._C.supported_cpu_capabilities():
        with conformance.cpu_level(level):
            assert fastlm.cpu_capability() == level
    with pytest.raises(ValueError, match="must be one of default, avx2, avx512, avx512_bf16, got 'sse9'"):
        fastlm._C.set_cpu_capability("sse9")
