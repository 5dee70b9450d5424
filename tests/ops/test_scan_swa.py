"""scan_swa against the two operators it runs side by side, bit for bit, and against its reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlm import ops, reference
from tests.support import conformance, samples
from tests.support.conformance import assert_gradients_match_reference, assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.selective_scan import scan_inputs
from tests.support.samples.sliding_window_attention import qkv

SAMPLES = samples.of("scan_swa")
SCAN = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state")


def separate(call: Call) -> tuple[Tensor, ...]:
    """The same from the two operators."""
    scan = dict(zip(SCAN, call.args[: len(SCAN)], strict=True))
    options = dict(call.kwargs)
    scan["delta_softplus"] = bool(scan["delta_softplus"])
    out, last = ops.selective_scan(**scan, cu_seqlens=options.pop("cu_seqlens", None), return_last_state=True)
    return out, last, *ops.sliding_window_attention(*call.args[len(SCAN) :], **options, return_lse=True)


def hybrid(
    dtype: torch.dtype = torch.float32, dim: int = 70, length: int = 150, layout: str = "channel_last"
) -> Call:
    """A layer whose two halves are large enough for several pieces each."""
    draw = Draw("hybrid")
    scan = scan_inputs(draw, 2, dim, length, 16, dtype=dtype, layout=layout)
    args = [scan.get(name) for name in SCAN]
    return Call((*args, *qkv(draw, length, head_dim=32, dtype=dtype)), {"window_size": (40, 0)})


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_matches_reference(sample, device):
    assert_matches_reference(ops.scan_swa, reference.scan_swa, sample.build(device))


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_gradients(sample, device):
    assert_gradients_match_reference(ops.scan_swa, reference.scan_swa, sample.build(device))


# ---- properties -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_each_half_has_the_bits_of_its_operator(sample):
    call = sample.build()
    together, alone = ops.scan_swa(*call.args, **call.kwargs), separate(call)
    for i, (a, b) in enumerate(zip(together, alone, strict=True)):
        assert (a.dtype, a.stride()) == (b.dtype, b.stride()), f"output {i}"
        assert torch.equal(a, b), f"output {i}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_has_the_bits_of_its_operators_forward_and_backward(dtype):
    call = hybrid(dtype)

    def run(function):
        leaves = call.requires_grad()
        outs = function(leaves)
        total = torch.stack([t.double().square().sum() for t in outs]).sum()
        return outs, torch.autograd.grad(total, list(leaves.floating().values()))

    together = run(lambda c: ops.scan_swa(*c.args, **c.kwargs))
    alone = run(separate)
    for a, b in zip((*together[0], *together[1]), (*alone[0], *alone[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_one_output_alone_has_a_gradient(which):
    """What does not lead to the loss costs nothing and gets zero or no gradient."""
    leaves = hybrid().requires_grad()
    out = ops.scan_swa(*leaves.args, **leaves.kwargs)[which]
    inputs = leaves.floating()
    grads = dict(
        zip(inputs, torch.autograd.grad(out.sum(), list(inputs.values()), allow_unused=True), strict=True)
    )
    of_attention = {f"arg{i}" for i in range(len(SCAN), len(SCAN) + 3)}
    for name, grad in grads.items():
        if (name in of_attention) != (which >= 2):
            assert grad is None


# ---- framework ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    "sample", samples.of("scan_swa", "packed") + samples.of("scan_swa", "float64"), ids=str
)
def test_opcheck(sample, with_grad):
    conformance.assert_opcheck(sample, with_grad=with_grad)


@pytest.mark.parametrize("sample", samples.of("scan_swa", "hybrid"), ids=str)
def test_compile(sample):
    conformance.assert_compiles(sample, ops.scan_swa, with_grad=True)


def test_autocast_casts_activations():
    call = hybrid()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scan_out, last_state, attn_out, lse = ops.scan_swa(*call.args, **call.kwargs)
    assert (scan_out.dtype, attn_out.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (last_state.dtype, lse.dtype) == (torch.float32, torch.float32)


# ---- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "bad", "text"),
    [
        (1, torch.zeros(2, 70, 149), "scan_swa: delta must have shape (2, 70, 150), got (2, 70, 149)"),
        (2, torch.zeros(70), "scan_swa: A must have shape (D, N), got (70,)"),
        (
            11,
            torch.zeros(2, 150, 3, 32),
            "scan_swa: k must have a number of heads that divides that of q, 4, got 3",
        ),
        (12, torch.zeros(2, 150, 2, 31), "scan_swa: v must have shape (2, 150, 2, 32), got (2, 150, 2, 31)"),
    ],
)
def test_errors(at, bad, text):
    """Of either half, in this operator's name."""
    call = hybrid()
    args = list(call.args)
    args[at] = bad
    conformance.assert_same_error(ops.scan_swa, Call(tuple(args), call.kwargs), ValueError, text)


@pytest.mark.host_values
def test_errors_in_bounds():
    sample = samples.of("scan_swa", "packed")[0]
    for name in ("cu_seqlens", "cu_seqlens_q"):
        call = sample.build()
        call.kwargs[name] = call.kwargs[name].flip(0).contiguous()
        with pytest.raises(ValueError, match=f"scan_swa: {name} must"):
            ops.scan_swa(*call.args, **call.kwargs)


# ---- machine --------------------------------------------------------------------------------------------


def test_every_level():
    sample = samples.of("scan_swa", "past_a_tile")[0]
    conformance.assert_levels_match_reference(sample, ops.scan_swa, reference.scan_swa, with_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    conformance.assert_same_for_any_thread_count(ops.scan_swa, lambda: hybrid(dtype), with_grad=True)
