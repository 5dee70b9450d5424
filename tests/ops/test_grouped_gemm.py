"""grouped_gemm and its backward pass against the reference."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastlm
from fastlm import ops, reference
from tests.support import conformance, samples, strategies
from tests.support.conformance import assert_gradients_match_reference, assert_matches_reference
from tests.support.layouts import Draw, with_layout
from tests.support.samples import Call
from tests.support.samples.moe_dispatch import product_call
from tests.support.tolerance import assert_close_to_reference

PRODUCTS = samples.of("grouped_gemm")
BACKWARD = samples.of("grouped_gemm_backward")
# Single rows, both sides of where another kernel takes over, of register tiles and of blocks.
ROWS = (1, 2, 3, 5, 7, 8, 9, 10, 16, 31, 32, 33, 95, 96, 97, 191, 193)


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", PRODUCTS, ids=str)
def test_matches_reference(sample, device):
    assert_matches_reference(ops.grouped_gemm, reference.grouped_gemm, sample.build(device))


@pytest.mark.parametrize("trans_b", [True, False])
@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
def test_groups_of_every_size(dtype, trans_b, device):
    """Odd sizes, all group sizes in one call, and once more in the other order."""
    for groups in (ROWS, ROWS[::-1]):
        call = product_call(groups, 37, 29, draw=Draw("groups", device), dtype=dtype, trans_b=trans_b)
        assert_matches_reference(ops.grouped_gemm, reference.grouped_gemm, call)
        assert_gradients_match_reference(ops.grouped_gemm, reference.grouped_gemm, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [(3, 0, 20), (8,), (9,), (40, 1)], ids=str)
@pytest.mark.parametrize(("depth", "columns"), [(1, 33), (191, 193), (575, 31), (577, 97), (1160, 8)])
def test_depths_and_columns(dtype, groups, depth, columns):
    """Next to blocks of columns and to stretches of the depth."""
    call = product_call(groups, depth, columns, draw=Draw("sizes"), dtype=dtype)
    assert_matches_reference(ops.grouped_gemm, reference.grouped_gemm, call)
    assert_gradients_match_reference(ops.grouped_gemm, reference.grouped_gemm, call)


# ---- properties -----------------------------------------------------------------------------------------


@given(
    draw=strategies.draws(),
    groups=strategies.lengths(6, 20),
    dtype=strategies.dtypes(),
    trans_b=st.booleans(),
)
def test_each_group_is_a_product_of_its_own(draw, groups, dtype, trans_b):
    """The same bits as a call with this group alone."""
    call = product_call(tuple(groups), draw=draw, dtype=dtype, trans_b=trans_b)
    a, b, offsets = call.args
    out = ops.grouped_gemm(a, b, offsets, trans_b=trans_b)
    bounds = offsets.tolist()
    for e, (begin, end) in enumerate(pairwise(bounds)):
        alone = ops.grouped_gemm(a[begin:end], b[e : e + 1], torch.tensor([0, end - begin]), trans_b=trans_b)
        assert torch.equal(out[begin:end], alone)


@given(draw=strategies.draws(), layout=strategies.layouts(), dtype=strategies.dtypes(), trans_b=st.booleans())
def test_every_memory_layout(draw, layout, dtype, trans_b):
    call = product_call(
        (4, 0, 11, 2), 19, 23, 3, draw=draw, dtype=dtype, layout="contiguous", trans_b=trans_b
    )
    a, b, offsets = call.args
    call = Call((with_layout(a, layout), with_layout(b, layout), offsets), call.kwargs)
    assert_matches_reference(ops.grouped_gemm, reference.grouped_gemm, call)
    assert_gradients_match_reference(ops.grouped_gemm, reference.grouped_gemm, call)


@given(draw=strategies.draws(), layout=st.sampled_from(["gaps", "broadcast"]), dtype=strategies.dtypes())
def test_gaps_between_rows_change_no_bit(draw, layout, dtype):
    """Where single values lie apart, small groups take another way, and their sums another order."""
    call = product_call((4, 0, 11, 2), 19, 23, 3, draw=draw, dtype=dtype)
    results = []
    for copy in (lambda t: with_layout(t, layout), lambda t: with_layout(t, layout).contiguous()):
        a, b = (copy(t.detach()).requires_grad_() for t in call.args[:2])
        out = ops.grouped_gemm(a, b, call.args[2])
        results.append([out, *torch.autograd.grad(out.square().sum(), (a, b))])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@given(draw=strategies.draws(), rest=st.integers(0, 5), dtype=strategies.dtypes())
def test_rows_behind_the_groups_are_zero_and_not_read(draw, rest, dtype):
    call = product_call((2, 0, 10), rest=rest, draw=draw, dtype=dtype).requires_grad()
    a, b, offsets = call.args
    with torch.no_grad():
        a[12:] = torch.nan
        b[1] = torch.nan
    out = ops.grouped_gemm(a, b, offsets)
    assert not out[12:].any()
    dout = draw.normal(*out.shape, dtype=dtype)
    dout[12:] = torch.nan
    da, db = torch.autograd.grad(out, (a, b), dout)
    assert not da[12:].any()
    assert not db[1].any()
    assert all(t.isfinite().all() for t in (out, da, db))


# ---- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", PRODUCTS, ids=str)
def test_gradients(sample, device):
    assert_gradients_match_reference(ops.grouped_gemm, reference.grouped_gemm, sample.build(device))


@pytest.mark.parametrize("trans_b", [True, False])
@pytest.mark.parametrize("groups", [(2, 0, 1), (9, 1)], ids=str)
def test_gradcheck(groups, trans_b):
    call = product_call(groups, 3, 2, 1, draw=Draw("gradcheck"), dtype=torch.float64, trans_b=trans_b)
    a, b, offsets = call.requires_grad().args
    fn = partial(ops.grouped_gemm, offsets=offsets, trans_b=trans_b)
    assert torch.autograd.gradcheck(fn, (a, b), check_undefined_grad=True)


@pytest.mark.parametrize("only", [0, 1])
def test_one_gradient_alone_has_the_same_bits(only):
    call = product_call((3, 0, 20), 40, 35, draw=Draw("alone")).requires_grad()
    a, b, offsets = call.args
    both = torch.autograd.grad(ops.grouped_gemm(a, b, offsets).square().sum(), (a, b))
    leaves = [t if i == only else t.detach() for i, t in enumerate((a, b))]
    (alone,) = torch.autograd.grad(ops.grouped_gemm(*leaves, offsets).square().sum(), leaves[only])
    assert torch.equal(alone, both[only])


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("sample", PRODUCTS, ids=str)
def test_opcheck(sample, with_grad):
    conformance.assert_opcheck(sample, with_grad=with_grad)


@pytest.mark.parametrize("sample", BACKWARD, ids=str)
def test_opcheck_of_backward(sample):
    conformance.assert_opcheck(sample, with_grad=False)


@pytest.mark.parametrize("name", ["rows_behind", "bfloat16_not_transposed", "past_a_tile"])
def test_compile(name):
    conformance.assert_compiles(samples.of("grouped_gemm", name)[0], ops.grouped_gemm, with_grad=True)


# ---- errors ---------------------------------------------------------------------------------------------


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


OFFSETS = torch.tensor([0, 2, 3])
BAD_CALLS = [
    ("a_dtype", (_x(3, 4, dtype=torch.int64), _x(2, 5, 4), OFFSETS), {}, "a must have dtype float32"),
    ("a_dim", (_x(3, 4, 1), _x(2, 5, 4), OFFSETS), {}, "a must have shape (M, Kd), got (3, 4, 1)"),
    ("b_dim", (_x(3, 4), _x(5, 4), OFFSETS), {}, "b must have shape (E, N, Kd), got (5, 4)"),
    (
        "b_dim_not_transposed",
        (_x(3, 4), _x(4, 5), OFFSETS),
        {"trans_b": False},
        "b must have shape (E, Kd, N), got (4, 5)",
    ),
    ("b_depth", (_x(3, 4), _x(2, 4, 5), OFFSETS), {}, "b must have shape (E, N, 4), got (2, 4, 5)"),
    (
        "b_depth_not_transposed",
        (_x(3, 4), _x(2, 5, 4), OFFSETS),
        {"trans_b": False},
        "b must have shape (E, 4, N), got (2, 5, 4)",
    ),
    (
        "b_dtype",
        (_x(3, 4, dtype=torch.bfloat16), _x(2, 5, 4), OFFSETS),
        {},
        "b must have the dtype of a, bfloat16, got float32",
    ),
    (
        "offsets_dtype",
        (_x(3, 4), _x(2, 5, 4), _x(3)),
        {},
        "offsets must have dtype int32 or int64, got float32",
    ),
    (
        "offsets_dim",
        (_x(3, 4), _x(2, 5, 4), OFFSETS.view(1, 3)),
        {},
        "offsets must have one dimension, got (1, 3)",
    ),
    ("offsets_size", (_x(3, 4), _x(3, 5, 4), OFFSETS), {}, "offsets must have shape (4,), got (3,)"),
]


@pytest.mark.parametrize(
    ("args", "kwargs", "text"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS]
)
def test_errors(args, kwargs, text):
    for function in (ops.grouped_gemm, torch.ops.fastlm.grouped_gemm):
        conformance.assert_same_error(function, Call(args, kwargs), ValueError, f"grouped_gemm: {text}")


@pytest.mark.host_values
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("offsets", "text"),
    [
        ([1, 2, 3], "offsets must start with 0, got 1"),
        ([0, 3, 2], "offsets must not decrease, got 2 after 3 at index 2"),
        ([0, 2, 4], "offsets must end at most at the number of rows, 3, got 4"),
        ([0, -1, 3], "offsets must not decrease, got -1 after 0 at index 1"),
    ],
)
def test_errors_in_offsets(offsets, text, dtype):
    call = Call((_x(3, 4), _x(2, 5, 4), torch.tensor(offsets, dtype=dtype)), {})
    conformance.assert_same_error(ops.grouped_gemm, call, ValueError, f"grouped_gemm: {text}", on_meta=False)


@pytest.mark.parametrize(
    ("dout", "text"),
    [
        (_x(3, 4), "dout must have shape (3, 5), got (3, 4)"),
        (_x(3, 5, dtype=torch.float64), "dout must have the dtype of a, float32, got float64"),
    ],
)
def test_errors_of_backward(dout, text):
    call = Call((dout, _x(3, 4), _x(2, 5, 4), OFFSETS), {"trans_b": True, "need_da": True, "need_db": True})
    conformance.assert_same_error(
        torch.ops.fastlm.grouped_gemm_backward, call, ValueError, f"grouped_gemm_backward: {text}"
    )


# ---- twins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", PRODUCTS, ids=str)
def test_every_level(sample):
    conformance.assert_levels_match_reference(
        sample, ops.grouped_gemm, reference.grouped_gemm, with_grad=True
    )


@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    def make_call() -> Call:
        return product_call((300, 1, 8, 0, 33), 70, 210, draw=Draw("threads"), dtype=dtype)

    conformance.assert_same_for_any_thread_count(ops.grouped_gemm, make_call, with_grad=True)


@pytest.mark.parametrize("level", fastlm._C.supported_cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_call_matches_the_reference(level, dtype):
    """Several blocks of everything, nothing a multiple of anything."""
    call = product_call((700, 3, 0, 411), 613, 405, 9, draw=Draw("large"), dtype=dtype)
    results = []
    for fn, kind in ((ops, dtype), (reference, torch.float64), (reference, dtype)):
        a, b, offsets = call.to(kind).requires_grad().args
        with conformance.cpu_level(level):
            out = fn.grouped_gemm(a, b, offsets)
            dout = torch.ones_like(out)
            results.append([out, *torch.autograd.grad(out, (a, b), dout)])
    for name, got, exact, plain in zip(("out", "da", "db"), *results, strict=True):
        assert_close_to_reference(name, got, exact, plain)
