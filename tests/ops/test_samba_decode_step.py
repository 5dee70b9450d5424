"""samba_decode_step against its reference and against the layers of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlm import ops, reference
from tests.support import conformance, samples, strategies
from tests.support.conformance import assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.samba_decode_step import RECIPES

SAMPLES = samples.of("samba_decode_step")
STATES = ("conv_state", "scan_state", "k_cache", "v_cache")


def model_call(**changes: Any) -> Call:
    call = RECIPES["samba_decode_step"]["model"](draw=Draw("model"))
    return Call(call.args, call.kwargs | changes)


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_matches_reference(sample, device):
    """Result, states and rings."""
    assert_matches_reference(ops.samba_decode_step, reference.samba_decode_step, sample.build(device))


# ---- properties -----------------------------------------------------------------------------------------


@given(
    draw=strategies.draws(), rows=st.integers(2, 9), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_a_row_does_not_depend_on_the_rows_beside_it(draw, rows, dtype):
    seen = tuple(range(rows))
    together = RECIPES["samba_decode_step"]["model"](seen=seen, draw=draw, dtype=dtype)
    row = rows // 2
    alone = Call(
        (together.args[0][row : row + 1].clone(),),
        {
            name: a[row : row + 1].clone() if name in (*STATES, "cache_seqlens") else a
            for name, a in together.kwargs.items()
        },
    )
    out = ops.samba_decode_step(*together.args, **together.kwargs)
    assert torch.equal(out[row : row + 1], ops.samba_decode_step(*alone.args, **alone.kwargs))
    for name in STATES:
        torch.testing.assert_close(
            alone.kwargs[name], together.kwargs[name][row : row + 1], rtol=0, atol=0, equal_nan=True
        )


def test_the_residual_stream_it_got_stays():
    call = model_call()
    before = call.args[0].clone()
    ops.samba_decode_step(*call.args, **call.kwargs)
    assert torch.equal(call.args[0], before)


@pytest.mark.parametrize(
    "name",
    [
        *("bfloat16", "float16", "five_rows", "odd_sizes", "odd_states_one_row"),
        *("odd_states_one_row_bfloat16", "past_a_piece_bfloat16"),
    ],
)
def test_one_launch_gives_the_bits_of_many(name, device, monkeypatch):
    """FASTLM_STEP_LAUNCH chooses between launches of the CUDA twin; the CPU twin does not look at it."""
    results = []
    for launch in ("phases", "whole"):
        monkeypatch.setenv("FASTLM_STEP_LAUNCH", launch)
        call = RECIPES["samba_decode_step"][name](draw=Draw(name)).map(
            lambda a: a.to(device) if isinstance(a, torch.Tensor) else a
        )
        out = ops.samba_decode_step(*call.args, **call.kwargs)
        results.append([out, *(call.kwargs[state] for state in STATES)])
    for many, one in zip(*results, strict=True):
        torch.testing.assert_close(one, many, rtol=0, atol=0, equal_nan=True)


# ---- framework ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sample", samples.of("samba_decode_step", "model") + samples.of("samba_decode_step", "float64"), ids=str
)
def test_opcheck(sample):
    conformance.assert_opcheck(sample, with_grad=False)


def test_compile():
    conformance.assert_compiles(
        samples.of("samba_decode_step", "model")[0], ops.samba_decode_step, with_grad=False
    )


# ---- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mamba_norm": torch.ones(11)}, "mamba_norm must have shape (12,), got (11,)"),
        ({"in_proj": torch.zeros(40, 11)}, "in_proj must have shape (40, 12), got (40, 11)"),
        (
            {"in_proj": torch.zeros(40, 12, dtype=torch.int32)},
            "in_proj must have dtype float32, bfloat16, float16 or float64",
        ),
        ({"A_log": torch.zeros(20)}, "A_log must have shape (D, N), got (20,)"),
        ({"x_proj": torch.zeros(11, 21)}, "x_proj must have shape (11, 20), got (11, 21)"),
        (
            {"dt_proj": torch.zeros(20, 3).bfloat16()},
            "dt_proj must have the dtype of in_proj, float32, got bfloat16",
        ),
        ({"out_proj": torch.zeros(12)}, "out_proj must have shape (12, 20), got (12,)"),
        ({"mamba_w1": torch.zeros(3)}, "mamba_w1 must have shape (f, d), got (3,)"),
        ({"mamba_w2": torch.zeros(17, 12)}, "mamba_w2 must have shape (18, 12), got (17, 12)"),
        ({"attn_w3": torch.zeros(10, 12)}, "attn_w3 must have shape (12, 10), got (10, 12)"),
        (
            {"attn_mlp_norm": torch.zeros(12, dtype=torch.int64)},
            "attn_mlp_norm must have dtype float32, bfloat16",
        ),
        (
            {"q_proj": torch.zeros(23, 12)},
            "q_proj must have a multiple of 6 rows (the head dim of k_cache), got 23",
        ),
        (
            {"q_proj": torch.zeros(18, 12), "o_proj": torch.zeros(12, 18)},
            "k must have a number of heads that divides",
        ),
        ({"k_proj": torch.zeros(6, 12)}, "k_proj must have shape (12, 12), got (6, 12)"),
        ({"conv_weight": torch.zeros(19, 4)}, "weight must have shape (20, W), got (19, 4)"),
        (
            {"conv_state": torch.zeros(3, 20, 2)},
            "conv_state must have a length S of at least 3 (W - 1), got 2",
        ),
        ({"scan_state": torch.zeros(3, 20, 5)}, "state must have shape (3, 20, 4), got (3, 20, 5)"),
        ({"dt_bias": torch.zeros(21)}, "dt_bias must have shape (20,), got (21,)"),
        (
            {"k_cache": torch.zeros(3, 5, 2, 6), "v_cache": torch.zeros(3, 5, 2, 6)},
            "k_cache must have at least 5 + 1 slots",
        ),
        ({"k_cache": torch.zeros(3, 8, 2)}, "k_cache must have shape (B, R, Hkv, K), got (3, 8, 2)"),
        (
            {"cache_seqlens": torch.zeros(2, dtype=torch.int32)},
            "cache_seqlens must have shape (3,), got (2,)",
        ),
        ({"rotary_sin": None}, "rotary_cos and rotary_sin must be given together"),
        ({"eps": -1.0}, "eps must not be negative, got -1"),
    ],
)
def test_errors(changes, text):
    call = model_call(**changes)
    conformance.assert_same_error(ops.samba_decode_step, call, ValueError, f"samba_decode_step: {text}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_errors_in_hidden(dtype):
    call = model_call()
    bad = Call((call.args[0].to(dtype),), call.kwargs)
    text = "samba_decode_step: hidden must have dtype float32 (that of sums)"
    conformance.assert_same_error(ops.samba_decode_step, bad, ValueError, text)


@pytest.mark.host_values
@pytest.mark.parametrize(("seen", "error"), [((0, -1, 2), ValueError), ((0, 30, 2), IndexError)])
def test_errors_in_positions_leave_everything_as_it_was(seen, error):
    call = model_call(cache_seqlens=torch.tensor(seen, dtype=torch.int32))
    before = {name: call.kwargs[name].clone() for name in STATES}
    with pytest.raises(error, match="samba_decode_step: cache_seqlens must"):
        ops.samba_decode_step(*call.args, **call.kwargs)
    for name, t in before.items():
        torch.testing.assert_close(call.kwargs[name], t, rtol=0, atol=0, equal_nan=True)


# ---- machine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", samples.of("samba_decode_step", "past_a_piece"), ids=str)
def test_every_level(sample):
    conformance.assert_levels_match_reference(
        sample, ops.samba_decode_step, reference.samba_decode_step, with_grad=False
    )


@pytest.mark.parametrize("sample", samples.of("samba_decode_step", "past_a_piece"), ids=str)
def test_same_bits_for_any_number_of_threads(sample):
    conformance.assert_same_for_any_thread_count(ops.samba_decode_step, sample.build, with_grad=False)
