"""Gradients of selective_scan against autograd through its reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlm import ops, reference
from tests.support import conformance, samples
from tests.support.conformance import assert_gradients_match_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.selective_scan import scan_inputs

FORWARD = samples.of("selective_scan")


# ---- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", FORWARD, ids=str)
def test_gradients(sample, device):
    assert_gradients_match_reference(
        ops.selective_scan, reference.selective_scan, sample.build(device), return_last_state=True
    )


@pytest.mark.parametrize("layout", ["contiguous", "channel_last"])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_over_several_blocks_and_chunks(layout, groups, dtype):
    inputs = scan_inputs(Draw("blocks"), 3, 150, 131, 16, dtype=dtype, layout=layout, groups=groups)
    inputs["initial_state"] = torch.randn(3, 150, 16)
    assert_gradients_match_reference(
        ops.selective_scan, reference.selective_scan, Call((), inputs), return_last_state=True
    )


@pytest.mark.parametrize("only", [0, 1])
def test_a_missing_upstream_gradient_counts_as_zero(only):
    inputs = scan_inputs(Draw("missing"), 2, 5, 70, 4)
    wanted = [t.requires_grad_() for t in inputs.values() if isinstance(t, Tensor)]
    results = []
    for fn in (ops.selective_scan, reference.selective_scan):
        output = fn(**inputs, return_last_state=True)[only]
        results.append(torch.autograd.grad(output.square().sum(), wanted, allow_unused=True))
    for got, want in zip(*results, strict=True):
        if want is None:
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channel_last"])
def test_an_output_may_be_changed_in_place(layout):
    call = samples.of("selective_scan", "channel_last" if layout == "channel_last" else "everything")[
        0
    ].build()
    out = ops.selective_scan(*call.requires_grad().args, **call.kwargs)
    out += 1
    out.sum().backward()


def test_all_states_carry_no_gradient():
    inputs = scan_inputs(Draw("detached"), 1, 5, 7, 4)
    inputs["u"].requires_grad_()
    out, every = ops.selective_scan(**inputs, return_all_states=True)
    assert out.requires_grad
    assert not every.requires_grad


def test_a_small_decay_keeps_its_gradient():
    """a h is formed as a product: as the difference h - dt B u it would drown in the rounding of h."""
    inputs = scan_inputs(Draw("small"), 1, 16, 40, 4)
    inputs["A"] = torch.full((16, 4), -9.0)
    inputs["delta_bias"] = torch.full((16,), 1.0)  # a ~ exp(-12)
    call = Call((), inputs)
    assert_gradients_match_reference(ops.selective_scan, reference.selective_scan, call)


@pytest.mark.parametrize("form", ["shared", "groups", "constant_B", "constant_C"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(form, packed):
    draw = Draw(f"gradcheck-{form}")
    f64 = {"dtype": torch.float64}
    batch, dim, length, state = (1 if packed else 2), 4, 9, 3
    B, C = (
        draw.normal(dim, state, **f64)
        if form == f"constant_{name}"
        else draw.normal(batch, 2, state, length, **f64)
        if form == "groups"
        else draw.normal(batch, state, length, **f64)
        for name in "BC"
    )
    bounds = torch.tensor([0, 4, 4, 9]) if packed else None
    inputs = [
        draw.normal(batch, dim, length, **f64),
        draw.normal(batch, dim, length, **f64),
        -draw.normal(dim, state, **f64).exp(),
        B,
        C,
        draw.normal(dim, **f64),
        draw.normal(batch, dim, length, **f64),
        draw.normal(dim, **f64),
        draw.normal(3 if packed else batch, dim, state, **f64),
    ]

    def fn(*tensors: Tensor) -> tuple[Tensor, ...]:
        *rest, initial_state = tensors
        return ops.selective_scan(
            *rest, True, return_last_state=True, initial_state=initial_state, cu_seqlens=bounds
        )

    assert torch.autograd.gradcheck(fn, [t.requires_grad_() for t in inputs], check_undefined_grad=True)


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", samples.of("selective_scan_backward"), ids=str)
def test_opcheck_of_backward(sample):
    conformance.assert_opcheck(sample, with_grad=False)


# ---- errors ---------------------------------------------------------------------------------------------


BACKWARD_BAD_CALLS = [
    ("dout", 0, torch.zeros(1, 6, 8), "dout must have shape (1, 6, 9), got (1, 6, 8)"),
    ("dlast_state", 1, torch.zeros(1, 6, 5), "dlast_state must have shape (1, 6, 4), got (1, 6, 5)"),
    (
        "dlast_state_dtype",
        1,
        torch.zeros(1, 6, 4, dtype=torch.bfloat16),
        "dlast_state must have dtype float32, got bfloat16",
    ),
    (
        "chunk_states",
        11,
        torch.zeros(1, 1, 4, 6),
        "chunk_states must have shape (1, 0, 4, 6), got (1, 1, 4, 6)",
    ),
]


@pytest.mark.parametrize(
    ("at", "bad", "text"), [c[1:] for c in BACKWARD_BAD_CALLS], ids=[c[0] for c in BACKWARD_BAD_CALLS]
)
def test_errors_of_backward(at, bad, text):
    u, A, B = torch.zeros(1, 6, 9), torch.zeros(6, 4), torch.zeros(1, 4, 9)
    args = [u, None, u, u, A, B, B, None, None, None, False, torch.zeros(1, 0, 4, 6), None, None]
    args[at] = bad
    conformance.assert_same_error(
        torch.ops.fastlm.selective_scan_backward,
        Call(tuple(args), {}),
        ValueError,
        f"selective_scan_backward: {text}",
    )
