"""selective_scan against its reference; gradients in `test_selective_scan_backward.py`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastlm import ops, reference
from tests.support import conformance, samples, strategies
from tests.support.conformance import assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.selective_scan import positions, scan_inputs

FORWARD = samples.of("selective_scan")


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", FORWARD, ids=str)
def test_matches_reference(sample, device):
    assert_matches_reference(
        ops.selective_scan, reference.selective_scan, sample.build(device), return_last_state=True
    )


@pytest.mark.parametrize("length", [63, 64, 65, 128, 129])
@pytest.mark.parametrize(("dim", "state"), [(15, 16), (17, 8), (33, 5), (130, 256)])
def test_sizes_around_tiles_and_vectors(dim, state, length):
    inputs = scan_inputs(Draw(f"sizes-{dim}-{state}-{length}"), 1, dim, length, state)
    call = Call((), inputs)
    assert_matches_reference(ops.selective_scan, reference.selective_scan, call, return_last_state=True)


@pytest.mark.parametrize("layout", ["state_outside", "transposed", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_of_the_model(layout, dtype):
    """B and C as views of one projection, the gate as half of another, all in (B, L, D) memory; and others."""
    draw = Draw("model")
    inputs = scan_inputs(draw, 2, 24, 70, 16, dtype=dtype, layout="channel_last")
    if layout == "half":
        projected = draw.normal(2, 70, 5 + 2 * 16, dtype=dtype)
        projected[..., :5] = float("nan")
        both = draw.normal(2, 70, 48, dtype=dtype)
        inputs["B"], inputs["C"] = (projected[..., k : k + 16].transpose(1, 2) for k in (5, 21))
        inputs["z"] = both[..., 24:].transpose(1, 2)
        both[..., :24] = float("nan")
    elif layout == "transposed":
        inputs["delta"] = inputs["delta"].contiguous()
        inputs["A"] = inputs["A"].t().contiguous().t()
    else:
        inputs["B"] = inputs["B"].movedim(1, 0).contiguous().movedim(0, 1)
        inputs["C"] = inputs["C"].flip(2)[..., ::2].repeat_interleave(2, 2)
    assert_matches_reference(
        ops.selective_scan, reference.selective_scan, Call((), inputs), return_last_state=True
    )


def test_output_keeps_the_memory_layout(device):
    inputs = scan_inputs(Draw("layout", device), 2, 16, 9, 4)
    assert ops.selective_scan(**inputs).stride() == inputs["u"].stride()
    inputs["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    assert ops.selective_scan(**inputs).stride() == inputs["u"].stride()


@pytest.mark.parametrize("scale", [200.0, -0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exponents_out_of_range(scale, dtype):
    """exp(dt A) that underflows to 0 wipes the state; a positive A lets it grow, finitely over few steps."""
    inputs = scan_inputs(Draw("range"), 1, 20, 6, 16, dtype=dtype)
    inputs["A"] = inputs["A"] * scale
    inputs["initial_state"] = torch.randn(1, 20, 16)
    assert_matches_reference(
        ops.selective_scan, reference.selective_scan, Call((), inputs), return_last_state=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("delta", [-1e30, -3.3e38, -math.inf])
def test_a_step_of_nothing_after_softplus(delta, dtype, device):
    """Such a position neither decays the state nor adds to it, and has no gradient above the smallest numbers."""
    inputs = scan_inputs(Draw("nothing", device), 1, 20, 9, 4, dtype=dtype)
    inputs["delta"] = inputs["delta"].clone()
    inputs["delta"][..., 3:] = delta
    inputs["delta"].requires_grad_()
    out, last = ops.selective_scan(**inputs, return_last_state=True)
    _, before = ops.selective_scan(**positions(inputs, 0, 3), return_last_state=True)
    torch.testing.assert_close(last, before, rtol=1e-6, atol=0)
    assert out.isfinite().all()
    (gradient,) = torch.autograd.grad(out.sum(), inputs["delta"])
    assert gradient.isfinite().all()
    assert gradient[..., 3:].abs().max() <= 1e-36


def test_nan_stays_where_it_came_in():
    inputs = scan_inputs(Draw("nan"), 2, 20, 70, 4)
    inputs["delta"][1, 3, 5] = float("nan")
    out, last = ops.selective_scan(**inputs, return_last_state=True)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[1, 3, 5:] = True
    assert torch.equal(out.isnan(), expected)
    assert torch.equal(last.isnan().any(-1), expected[..., -1])
    inputs["A"][7, 2] = float("nan")
    out = ops.selective_scan(**inputs)
    expected[:, 7] = True
    assert torch.equal(out.isnan(), expected)


# ---- properties -----------------------------------------------------------------------------------------


@given(
    draw=strategies.draws(),
    dim=strategies.sizes(1, 40),
    length=strategies.sizes(1, 140),
    state=strategies.sizes(1, 20),
    cut=st.floats(0, 1),
    layout=strategies.layouts(),
    dtype=strategies.dtypes(),
)
def test_two_pieces_with_carried_state_equal_one(draw, dim, length, state, cut, layout, dtype):
    inputs = scan_inputs(draw, 2, dim, length, state, dtype=dtype, layout=layout)
    whole, last = ops.selective_scan(**inputs, return_last_state=True)
    at = int(cut * length)
    first, carried = ops.selective_scan(**positions(inputs, 0, at), return_last_state=True)
    second, end = ops.selective_scan(
        **positions(inputs, at, length), initial_state=carried, return_last_state=True
    )
    # The same operations in the same order, wherever the row is cut.
    assert torch.equal(torch.cat([first, second], dim=2), whole)
    assert torch.equal(end, last)


@given(
    draw=strategies.draws(),
    lengths=strategies.lengths(longest=150),
    layout=strategies.layouts(),
    index_dtype=strategies.index_dtypes(),
    groups=st.sampled_from([None, 1, 3]),
)
def test_packed_equals_separate(draw, lengths, layout, index_dtype, groups):
    """Outputs, states and gradients."""
    dim, state = 21, 5
    inputs = scan_inputs(draw, 1, dim, sum(lengths), state, layout=layout, groups=groups)
    start = draw.normal(len(lengths), dim, state)
    bounds = strategies.cu_seqlens(lengths, index_dtype)

    def packed(u: Tensor, start: Tensor) -> tuple[Tensor, ...]:
        out, last = ops.selective_scan(
            **inputs | {"u": u}, initial_state=start, cu_seqlens=bounds, return_last_state=True
        )
        return out, last

    def separate(u: Tensor, start: Tensor) -> tuple[Tensor, ...]:
        outs, lasts = [u[..., :0]], [start[:0]]
        for i in range(len(lengths)):
            pieces = positions(inputs | {"u": u}, int(bounds[i]), int(bounds[i + 1]))
            out, last = ops.selective_scan(**pieces, initial_state=start[i : i + 1], return_last_state=True)
            outs.append(out)
            lasts.append(last)
        return torch.cat(outs, dim=2), torch.cat(lasts)

    results = []
    for fn in (packed, separate):
        u, first = inputs["u"].detach().requires_grad_(), start.clone().requires_grad_()
        out, last = fn(u, first)
        loss = out.square().sum() + last.square().sum()
        results.append((out, last, *torch.autograd.grad(loss, (u, first))))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@given(draw=strategies.draws(), at=st.integers(1, 79), layout=strategies.layouts(writable=True))
def test_a_changed_suffix_changes_nothing_before_it(draw, at, layout):
    inputs = scan_inputs(draw, 2, 19, 80, 4, layout=layout)
    before = ops.selective_scan(**inputs)
    inputs["u"][..., at:] = float("nan")
    inputs["delta"][..., at:] = 1e4
    assert torch.equal(ops.selective_scan(**inputs)[..., :at], before[..., :at])


def test_known_solutions():
    """No decay: a running sum. Instant decay: no memory. Constant inputs: a geometric series."""
    ones = torch.ones(1, 3, 100, dtype=torch.float64)
    A = torch.zeros(3, 1, dtype=torch.float64)
    u, delta = torch.rand_like(ones), torch.rand_like(ones)
    row = ones[:, :1]
    torch.testing.assert_close(ops.selective_scan(u, delta, A, row, row), (delta * u).cumsum(-1))
    assert torch.equal(ops.selective_scan(u, delta, A - 1e9, row, row), delta * u)
    a = torch.exp(torch.tensor(-0.25, dtype=torch.float64))
    series = 0.25 * (1 - a ** torch.arange(1, 101)) / (1 - a)
    got = ops.selective_scan(ones, 0.25 * ones, A - 1, row, row)
    torch.testing.assert_close(got, series.expand(1, 3, 100))


def test_a_longer_batch_gives_a_row_the_same_bits():
    inputs = scan_inputs(Draw("batch"), 5, 40, 70, 16)
    whole = ops.selective_scan(**inputs)
    for row in range(5):
        along_batch = ("u", "delta", "B", "C", "z")
        alone = {n: t[row : row + 1] if n in along_batch else t for n, t in inputs.items()}
        assert torch.equal(ops.selective_scan(**alone), whole[row : row + 1])


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("sample", FORWARD, ids=str)
def test_opcheck(sample, with_grad):
    conformance.assert_opcheck(sample, with_grad=with_grad)


@pytest.mark.parametrize(
    "sample",
    samples.of("selective_scan", "packed_channel_last") + samples.of("selective_scan", "past_a_chunk"),
    ids=str,
)
def test_compile(sample):
    conformance.assert_compiles(sample, ops.selective_scan, with_grad=True, return_last_state=True)


# ---- errors ---------------------------------------------------------------------------------------------


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _good() -> dict[str, Tensor]:
    return {"u": _x(1, 6, 9), "delta": _x(1, 6, 9), "A": _x(6, 4), "B": _x(1, 4, 9), "C": _x(1, 4, 9)}


BAD_CALLS = [
    ("u_dim", {"u": _x(6, 9)}, "u must have shape (B, D, L), got (6, 9)"),
    (
        "u_dtype",
        {"u": _x(1, 6, 9, dtype=torch.int32)},
        "u must have dtype float32, bfloat16, float16 or float64, got int32",
    ),
    ("delta_shape", {"delta": _x(1, 6, 8)}, "delta must have shape (1, 6, 9), got (1, 6, 8)"),
    (
        "delta_dtype",
        {"delta": _x(1, 6, 9, dtype=torch.bfloat16)},
        "delta must have the dtype of u, float32, got bfloat16",
    ),
    (
        "A_complex",
        {"A": _x(6, 4, dtype=torch.complex64)},
        "A must have dtype float32, bfloat16, float16 or float64, got complex64",
    ),
    ("A_dim", {"A": _x(6)}, "A must have shape (D, N), got (6,)"),
    ("A_rows", {"A": _x(5, 4)}, "A must have shape (6, N), got (5, 4)"),
    ("A_no_state", {"A": _x(6, 0)}, "A must have a state size between 1 and 256, got 0"),
    ("A_large_state", {"A": _x(6, 257)}, "A must have a state size between 1 and 256, got 257"),
    ("B_dim", {"B": _x(9)}, "B must have shape (B, N, L), (B, G, N, L) or (D, N), got (9,)"),
    ("B_length", {"B": _x(1, 4, 8)}, "B must have shape (1, 4, 9), got (1, 4, 8)"),
    ("B_state", {"B": _x(1, 2, 3, 9)}, "B must have shape (1, 2, 4, 9), got (1, 2, 3, 9)"),
    ("B_constant", {"B": _x(5, 4)}, "B must have shape (6, 4), got (5, 4)"),
    (
        "B_groups",
        {"B": _x(1, 4, 4, 9)},
        "B must have a number of groups that divides 6, got 4",
    ),
    (
        "C_dtype",
        {"C": _x(1, 4, 9, dtype=torch.float64)},
        "C must have the dtype of u, float32, got float64",
    ),
    (
        "C_constant_complex",
        {"C": _x(6, 4, dtype=torch.complex64)},
        "C must have dtype float32, bfloat16, float16 or float64, got complex64",
    ),
    ("D", {"D": _x(5)}, "D must have shape (6,), got (5,)"),
    ("z", {"z": _x(1, 6, 10)}, "z must have shape (1, 6, 9), got (1, 6, 10)"),
    ("delta_bias", {"delta_bias": _x(6, 1)}, "delta_bias must have shape (6,), got (6, 1)"),
    (
        "initial_state",
        {"initial_state": _x(2, 6, 4)},
        "initial_state must have shape (1, 6, 4), got (2, 6, 4)",
    ),
    (
        "initial_state_packed",
        {"initial_state": _x(1, 6, 4), "cu_seqlens": torch.tensor([0, 4, 9])},
        "initial_state must have shape (2, 6, 4), got (1, 6, 4)",
    ),
    (
        "cu_seqlens_dtype",
        {"cu_seqlens": _x(2)},
        "cu_seqlens must have dtype int32 or int64, got float32",
    ),
    (
        "cu_seqlens_empty",
        {"cu_seqlens": _x(0, dtype=torch.int32)},
        "cu_seqlens must have at least 1 element (0), got shape (0,)",
    ),
    (
        "packed_batch",
        {
            "u": _x(2, 6, 9),
            "delta": _x(2, 6, 9),
            "B": _x(2, 4, 9),
            "C": _x(2, 4, 9),
            "cu_seqlens": torch.tensor([0, 9]),
        },
        "u must have batch 1 when cu_seqlens is given, got 2",
    ),
]


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_positions_of_no_sequence(op):
    bounds = torch.zeros(1, dtype=torch.int32)
    inputs = _good() if op == "selective_scan" else {"x": _x(1, 6, 9), "weight": _x(6, 4)}
    text = f"{op}: cu_seqlens must have at least 2 elements (0 and 9), got shape (1,)"
    call = Call((), inputs | {"cu_seqlens": bounds})
    conformance.assert_same_error(getattr(ops, op), call, ValueError, text, on_meta=False)


@pytest.mark.parametrize(("changes", "text"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS])
def test_errors(changes, text):
    for function in (ops.selective_scan, torch.ops.fastlm.selective_scan):
        call = Call((), _good() | changes)
        conformance.assert_same_error(function, call, ValueError, f"selective_scan: {text}")


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
    call = Call((), _good() | {"cu_seqlens": torch.tensor(bounds)})
    conformance.assert_same_error(ops.selective_scan, call, ValueError, text, on_meta=False)


# ---- twins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", FORWARD, ids=str)
def test_every_level(sample):
    conformance.assert_levels_match_reference(
        sample, ops.selective_scan, reference.selective_scan, with_grad=True, return_last_state=True
    )


@pytest.mark.parametrize("layout", ["contiguous", "channel_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(layout, dtype):
    """Large enough that torch splits the work."""

    def make_call() -> Call:
        inputs = scan_inputs(Draw("threads"), 3, 200, 300, 16, dtype=dtype, layout=layout)
        return Call((), inputs | {"initial_state": torch.zeros(3, 200, 16)})

    conformance.assert_same_for_any_thread_count(
        ops.selective_scan, make_call, with_grad=True, return_last_state=True
    )


def test_same_bits_for_any_number_of_threads_packed():
    def make_call() -> Call:
        draw = Draw("threads-packed")
        lengths = [100, 0, 3, 250, 64, 1, 129]
        inputs = scan_inputs(draw, 1, 100, sum(lengths), 16, layout="channel_last", groups=2)
        return Call((), inputs | {"cu_seqlens": strategies.cu_seqlens(lengths)})

    conformance.assert_same_for_any_thread_count(
        ops.selective_scan, make_call, with_grad=True, return_last_state=True
    )
