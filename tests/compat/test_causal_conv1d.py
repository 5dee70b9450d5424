"""`fastlm.compat.causal_conv1d`: the other project's words reach the operators, states are written in place."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from fastlm import reference
from fastlm.compat.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    causal_conv1d_varlen_states,
    causal_conv1d_varlen_states_ref,
)

STATES = [causal_conv1d_varlen_states, causal_conv1d_varlen_states_ref]


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def plain(x, weight, bias, initial, activation):
    """The convolution as PyTorch has it."""
    padded = (
        functional.pad(x, (weight.shape[1] - 1, 0)) if initial is None else torch.cat((initial, x), dim=-1)
    )
    out = functional.conv1d(padded, weight.unsqueeze(1), bias, groups=weight.shape[0])
    return out if activation is None else functional.silu(out)


# ---- Whole sequences


@pytest.mark.parametrize("function", [causal_conv1d_fn, causal_conv1d_ref])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("with_states", [False, True])
def test_outputs_and_gradients_equal_plain_pytorch(function, activation, channel_last, with_states):
    memory = leaf(2, 9, 6) if channel_last else leaf(2, 6, 9)
    x = memory.transpose(1, 2) if channel_last else memory
    weight, bias = leaf(6, 4), leaf(6)
    initial = leaf(2, 6, 3) if with_states else None
    inputs = [memory, weight, bias] + ([initial] if with_states else [])
    out, final = function(
        x, weight, bias, initial_states=initial, return_final_states=True, activation=activation
    )
    expected = plain(x, weight, bias, initial, activation)
    assert_close(out, expected)
    assert_close(final, x[..., -3:])
    weights, of_final = torch.randn_like(out), torch.randn_like(final)
    got = torch.autograd.grad((out * weights).sum() + (final * of_final).sum(), inputs)
    want = torch.autograd.grad((expected * weights).sum() + (x[..., -3:] * of_final).sum(), inputs)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w)


def test_arguments_by_position_are_in_the_original_order():
    x, weight, bias = leaf(1, 2, 5), leaf(2, 3), leaf(2)
    out, final = causal_conv1d_fn(x, weight, bias, None, leaf(1, 2, 2) * 0, True, None, "silu")
    assert_close(out, plain(x, weight, bias, None, "silu"))
    out, final = causal_conv1d_ref(x, weight, bias, None, True, None, "silu")
    assert_close(out, plain(x, weight, bias, None, "silu"))
    assert final.shape == (1, 2, 2)


def test_documents_do_not_see_each_other_and_padding_is_zero():
    x, weight = leaf(1, 2, 7), leaf(2, 4)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, -1, -1]], dtype=torch.int32)
    out = causal_conv1d_fn(x, weight, seq_idx=seq_idx)
    first, second = plain(x[..., :3], weight, None, None, None), plain(x[..., 3:5], weight, None, None, None)
    assert_close(out, torch.cat((first, second, torch.zeros(1, 2, 2, dtype=x.dtype)), dim=-1))


def test_final_states_go_into_the_buffer_without_a_graph():
    x, weight = leaf(2, 3, 5), leaf(3, 4)
    buffer = torch.full((2, 3, 3), torch.nan, dtype=x.dtype)
    _, final = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=buffer)
    assert not buffer.requires_grad
    assert final.requires_grad
    assert_close(buffer, final)
    with torch.no_grad():
        _, final = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=buffer)
    assert final is buffer
    assert isinstance(causal_conv1d_fn(x, weight, final_states_out=buffer), torch.Tensor)


# ---- Decoding steps


@pytest.mark.parametrize("new", [None, 1, 3])
@pytest.mark.parametrize("ring", [False, True])
def test_steps_write_the_state_in_place(new, ring):
    x = torch.randn(2, 4) if new is None else torch.randn(2, 4, new)
    state, weight, bias = torch.randn(2, 4, 6), torch.randn(4, 3), torch.randn(4)
    seen = torch.tensor([5, 11], dtype=torch.int32) if ring else None
    expected_state, also = state.clone(), state.clone()
    place = state.data_ptr()
    out = causal_conv1d_update(x, state, weight, bias, "silu", seen)
    expected = reference.causal_conv1d_update(x, expected_state, weight, bias, "silu", seen)
    assert_close(out, expected)
    assert_close(state, expected_state)
    assert state.data_ptr() == place
    assert_close(causal_conv1d_update_ref(x, also, weight, bias, "silu", seen), expected)
    assert_close(also, expected_state)


def test_steps_in_slots_with_padding_rows_and_no_gradient():
    weight = torch.randn(4, 3, requires_grad=True)
    state = torch.randn(5, 4, 3)
    before = state.clone()
    out = causal_conv1d_update(torch.randn(2, 4), state, weight, conv_state_indices=torch.tensor([3, -1]))
    assert not out.requires_grad
    assert not state.requires_grad
    assert_close(out[1], torch.zeros(4))
    assert [bool((state[s] != before[s]).any()) for s in range(5)] == [False, False, False, True, False]


# ---- States of packed sequences


@pytest.mark.parametrize("function", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_states_are_the_last_inputs_of_each_sequence(function, dtype, index):
    x = torch.randn(10, 3).to(dtype)
    states = function(x, torch.tensor([0, 2, 2, 3, 9], dtype=index), 4)
    zero = torch.zeros(3, dtype=dtype)
    rows = [[zero, zero, x[0], x[1]], [zero] * 4, [zero, zero, zero, x[2]], list(x[5:9])]
    assert_close(states, torch.stack([torch.stack(row, dim=1) for row in rows]), rtol=0, atol=0)


@pytest.mark.parametrize("function", STATES)
def test_states_continue_the_convolution(function):
    x, weight = torch.randn(12, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    bounds = torch.tensor([0, 2, 12])
    _, final = reference.causal_conv1d(x.T[None], weight, return_final_states=True, cu_seqlens=bounds)
    assert_close(function(x, bounds, 3), final)


@pytest.mark.parametrize("function", STATES)
def test_states_of_nothing(function):
    assert function(torch.randn(0, 3), torch.tensor([0]), 2).shape == (0, 3, 2)
    assert_close(function(torch.randn(0, 3), torch.tensor([0, 0]), 2), torch.zeros(1, 3, 2))


@pytest.mark.parametrize("function", STATES)
@pytest.mark.parametrize(
    ("x", "bounds", "state_len", "text"),
    [
        ((2, 5, 3), [0, 5], 2, r"x must have shape \(T, D\), got \(2, 5, 3\)"),
        ((5, 3), [0, 6], 2, r"cu_seqlens must rise from 0 to at most 5, got \[0, 6\]"),
        ((5, 3), [0, 3, 2], 2, r"cu_seqlens must rise from 0 to at most 5, got \[0, 3, 2\]"),
        ((5, 3), [-1, 3], 2, r"cu_seqlens must rise"),
        ((5, 3), [0.0, 3.0], 2, r"cu_seqlens must have shape \(S\+1,\) and dtype int32 or int64, got \(2,\)"),
        ((5, 3), [], 2, r"cu_seqlens must have shape"),
        ((5, 3), [0, 5], 0, r"state_len must be at least 1, got 0"),
    ],
)
def test_states_of_wrong_input(function, x, bounds, state_len, text):
    with pytest.raises(ValueError, match=rf"{function.__name__}: {text}"):
        function(torch.randn(x), torch.tensor(bounds), state_len)


# ---- Errors


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: causal_conv1d_fn(leaf(1, 2, 5), leaf(3, 3)), "weight must have shape"),
        (
            lambda: causal_conv1d_fn(leaf(1, 2, 5), leaf(2, 3), activation="gelu"),
            "activation must be .* 'gelu'",
        ),
        (
            lambda: causal_conv1d_ref(leaf(1, 2, 5), leaf(2, 3), activation="gelu"),
            "activation must be .* 'gelu'",
        ),
        (
            lambda: causal_conv1d_fn(leaf(1, 2, 5), leaf(2, 3), final_states_out=torch.zeros(1, 2, 1)),
            r"final_states_out must have shape \(1, 2, 2\), got \(1, 2, 1\)",
        ),
        (
            lambda: causal_conv1d_update(torch.randn(1, 2), torch.randn(1, 2, 1), torch.randn(2, 3)),
            "conv_state must have",
        ),
    ],
)
def test_wrong_input_raises(call, text):
    with pytest.raises(ValueError, match=text):
        call()
