"""Sizes at which the CUDA scan takes another form: time split, wide and ragged tiles, one launch with an attention."""

from __future__ import annotations

import pytest
import torch

from fastlm import ops, reference
from tests.support.conformance import assert_gradients_match_reference, assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.selective_scan import scan_inputs

SPLIT = {
    "whole_parts": (1, 40, 1024, None),
    "ragged": (1, 33, 1100, None),
    "rows": (2, 24, 1030, None),
    "packed": (1, 8, 1600, [0, 5, 5, 700, 1600]),
}


@pytest.mark.parametrize("layout", ["contiguous", "channel_last"])
@pytest.mark.parametrize("case", SPLIT)
def test_time_split(case, layout, device):
    """Few channels and long sequences: parts of time are scanned side by side, with states carried over."""
    batch, dim, length, bounds = SPLIT[case]
    inputs = scan_inputs(Draw(case, device), batch, dim, length, 16, layout=layout)
    rows = batch
    if bounds is not None:
        inputs["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        rows = len(bounds) - 1
    inputs["initial_state"] = torch.randn(rows, dim, 16, device=device)
    assert_matches_reference(
        ops.selective_scan, reference.selective_scan, Call((), inputs), return_last_state=True
    )


def test_gradients_of_split_time(device):
    inputs = scan_inputs(Draw("split", device), 1, 24, 1030, 4, layout="channel_last")
    inputs["initial_state"] = torch.randn(1, 24, 4, device=device)
    assert_gradients_match_reference(
        ops.selective_scan, reference.selective_scan, Call((), inputs), return_last_state=True
    )


PAIRED = {
    "whole_pieces": (1, 128, 136, 16, None),
    "ragged": (1, 93, 77, 11, None),
    "packed": (1, 64, 200, 16, [0, 3, 3, 72, 200]),
    "split": (1, 64, 1032, 3, None),
}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channel_last", "no_unit_stride"])
@pytest.mark.parametrize("case", PAIRED)
def test_gradients_of_two_channels_a_lane(case, layout, gated, device):
    """16 bits and more than 32 channels: two of them share a lane where a block has the memory for it."""
    batch, dim, length, state, bounds = PAIRED[case]
    dtype = torch.bfloat16 if gated else torch.float16
    inputs = scan_inputs(Draw(case, device), batch, dim, length, state, dtype=dtype, layout=layout)
    rows = batch
    if bounds is not None:
        inputs["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        rows = len(bounds) - 1
    if not gated:
        del inputs["z"]
    inputs["initial_state"] = torch.randn(rows, dim, state, device=device)
    assert_gradients_match_reference(
        ops.selective_scan, reference.selective_scan, Call((), inputs), return_last_state=True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "dim", "length", "heads", "kv_heads", "head_dim", "window", "bounds"),
    [
        (1, 200, 300, 4, 2, 64, 100, None),
        (2, 64, 257, 3, 1, 128, 70, None),
        (1, 40, 200, 2, 2, 256, 50, None),
        (1, 72, 400, 2, 1, 64, 90, [0, 3, 3, 200, 400]),
    ],
)
def test_one_launch_gives_the_bits_of_two(
    batch, dim, length, heads, kv_heads, head_dim, window, bounds, dtype, device
):
    draw = Draw("fused", device)
    scan = scan_inputs(draw, batch, dim, length, 16, dtype=dtype, layout="channel_last")
    rows = (length,) if bounds is not None else (batch, length)
    q = torch.randn(*rows, heads, head_dim, device=device).to(dtype)
    k, v = (torch.randn(*rows, kv_heads, head_dim, device=device).to(dtype) for _ in range(2))
    packed = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state")
    given = [scan.get(name) for name in names]
    given[8] = bool(given[8])
    options = {"window_size": [window - 1, 0]}
    together = torch.ops.fastlm.scan_swa(*given, q, k, v, packed, packed, packed, **options)
    alone = torch.ops.fastlm.selective_scan(*given, packed)[:3]
    alone += torch.ops.fastlm.sliding_window_attention(q, k, v, packed, packed, **options)
    for i, (a, b) in enumerate(zip(together, alone, strict=True)):
        assert torch.equal(a, b), f"output {i}"
