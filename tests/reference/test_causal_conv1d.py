"""The definition of causal_conv1d against independent formulations, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fastlm.reference import causal_conv1d, causal_conv1d_update
from tests.support import samples
from tests.support.layouts import Draw

F64 = torch.float64


@pytest.fixture
def draw() -> Draw:
    return Draw("reference-conv")


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 4, 9])
def test_equals_a_padded_depthwise_convolution(draw, width):
    x, weight, bias = (
        draw.normal(2, 5, 11, dtype=F64),
        draw.normal(5, width, dtype=F64),
        draw.normal(5, dtype=F64),
    )
    padded = functional.conv1d(functional.pad(x, (width - 1, 0)), weight.unsqueeze(1), bias, groups=5)
    close(causal_conv1d(x, weight, bias), padded)
    close(causal_conv1d(x, weight, bias, activation="swish"), functional.silu(padded))


def test_a_unit_tap_delays():
    x = torch.arange(6, dtype=F64).view(1, 1, 6)
    weight = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=F64)
    assert causal_conv1d(x, weight).tolist() == [[[0, 0, 0, 1, 2, 3]]]
    state = torch.tensor([[[-3.0, -2.0, -1.0]]], dtype=F64)
    assert causal_conv1d(x, weight, initial_states=state).tolist() == [[[-2, -1, 0, 1, 2, 3]]]


@pytest.mark.parametrize("at", [0, 1, 2, 5, 10, 11])
def test_two_pieces_with_carried_state_equal_one(draw, at):
    x, weight = draw.normal(2, 5, 11, dtype=F64), draw.normal(5, 4, dtype=F64)
    start = draw.normal(2, 5, 3, dtype=F64)
    options = {"return_final_states": True, "activation": "silu"}
    whole, end = causal_conv1d(x, weight, initial_states=start, **options)
    first, state = causal_conv1d(x[..., :at], weight, initial_states=start, **options)
    second, last = causal_conv1d(x[..., at:], weight, initial_states=state, **options)
    close(torch.cat([first, second], dim=-1), whole)
    assert torch.equal(last, end)


def test_packed_equals_separate(draw):
    bounds = [0, 0, 1, 3, 11]
    x, weight, bias = (
        draw.normal(1, 5, 11, dtype=F64),
        draw.normal(5, 4, dtype=F64),
        draw.normal(5, dtype=F64),
    )
    start = draw.normal(4, 5, 3, dtype=F64)
    out, ends = causal_conv1d(
        x, weight, bias, initial_states=start, return_final_states=True, cu_seqlens=torch.tensor(bounds)
    )
    for s in range(4):
        part = slice(bounds[s], bounds[s + 1])
        alone, end = causal_conv1d(
            x[..., part], weight, bias, initial_states=start[s : s + 1], return_final_states=True
        )
        close(out[..., part], alone)
        assert torch.equal(ends[s : s + 1], end)
    assert torch.equal(ends[0], start[0])
    assert torch.equal(ends[1, :, :2], start[1, :, 1:])


def test_documents_equal_separate_rows(draw):
    ids = torch.tensor([[4] * 3 + [9] * 1 + [-1] * 2 + [5] * 5])
    x, weight = draw.normal(1, 5, 11, dtype=F64), draw.normal(5, 4, dtype=F64)
    start = draw.normal(1, 5, 3, dtype=F64)
    out, end = causal_conv1d(x, weight, None, ids, start, return_final_states=True)
    close(out[..., :3], causal_conv1d(x[..., :3], weight, initial_states=start))
    close(out[..., 3:4], causal_conv1d(x[..., 3:4], weight))
    assert not out[..., 4:6].any()
    close(out[..., 6:], causal_conv1d(x[..., 6:], weight))
    assert torch.equal(end, x[..., -3:])


def test_final_states_hold_the_last_document_alone(draw):
    x, weight = draw.normal(1, 2, 6, dtype=F64), draw.normal(2, 4, dtype=F64)
    ids = torch.tensor([[0, 0, 0, 0, 0, 1]])
    _, end = causal_conv1d(x, weight, None, ids, return_final_states=True)
    assert torch.equal(end[..., -1], x[..., -1])
    assert not end[..., :-1].any()


def test_nan_in_another_document_stays_there(draw):
    x, weight = draw.normal(1, 2, 8, dtype=F64), draw.normal(2, 4, dtype=F64)
    x[..., :4] = float("nan")
    out = causal_conv1d(x, weight, None, torch.tensor([[0] * 4 + [1] * 4]))
    assert not out[..., 4:].isnan().any()


@pytest.mark.parametrize("new", [1, 2, 5])
@pytest.mark.parametrize("ring", [False, True])
def test_decoding_equals_the_whole_sequence(draw, new, ring):
    x, weight, bias = (
        draw.normal(2, 5, 20, dtype=F64),
        draw.normal(5, 4, dtype=F64),
        draw.normal(5, dtype=F64),
    )
    whole = causal_conv1d(x, weight, bias, activation="silu")
    state, seen, pieces = torch.zeros(2, 5, 5, dtype=F64), torch.zeros(2, dtype=torch.int32), []
    for t in range(0, 20, new):
        piece = x[..., t : t + new] if new > 1 else x[..., t]
        out = causal_conv1d_update(piece, state, weight, bias, "silu", seen if ring else None)
        assert out.shape == piece.shape
        pieces.append(out.view(2, 5, new))
        seen += new
    close(torch.cat(pieces, dim=-1), whole)
    order = [n % 5 for n in range(15, 20)] if ring else list(range(5))
    assert torch.equal(state[..., order], x[..., -5:])


def test_padding_rows_touch_nothing(draw):
    x, weight = draw.normal(3, 5, dtype=F64), draw.normal(5, 4, dtype=F64)
    state = draw.normal(4, 5, 4, dtype=F64)
    before = state.clone()
    out = causal_conv1d_update(x, state, weight, conv_state_indices=torch.tensor([2, -1, 0]))
    assert not out[1].any()
    assert torch.equal(state[[1, 3]], before[[1, 3]])
    alone = before[[2, 0]]
    close(out[[0, 2]], causal_conv1d_update(x[[0, 2]], alone, weight))
    assert torch.equal(state[[2, 0]], alone)


@pytest.mark.parametrize("name", ["initial", "documents_initial", "packed_initial", "plain"])
def test_gradcheck(name):
    call = samples.of("causal_conv1d", name)[0].build().to(F64).requires_grad()
    inputs = call.floating()

    def function(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        args = [named.get(f"arg{i}", a) for i, a in enumerate(call.args)]
        kwargs = {key: named.get(key, a) for key, a in call.kwargs.items()}
        return causal_conv1d(*args, **kwargs, return_final_states=True)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)


def test_dtypes_and_final_states_out():
    x = torch.randn(2, 5, 7, dtype=torch.bfloat16)
    room = torch.empty(2, 5, 3, dtype=torch.bfloat16)
    out, end = causal_conv1d(x, torch.randn(5, 4), return_final_states=True, final_states_out=room)
    assert out.dtype == end.dtype == torch.bfloat16
    assert torch.equal(room, x[..., -3:])


def test_errors():
    x, weight = torch.randn(2, 5, 7), torch.randn(5, 4)
    with pytest.raises(ValueError, match="activation"):
        causal_conv1d(x, weight, activation="relu")
    with pytest.raises(ValueError, match="batch"):
        causal_conv1d(x, weight, cu_seqlens=torch.tensor([0, 7]))
