"""linear_cross_entropy, the loss made of linear_nll, against its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fastlm import ops, reference
from tests.support import conformance, strategies
from tests.support.compile import assert_compiled_equals_eager
from tests.support.conformance import assert_gradients_match_reference, assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.slm_loss import IGNORE, head

# Every keyword of linear_cross_entropy, alone and together.
LOSSES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "softcap": {"softcap": 2.0},
    "z_loss": {"z_loss": 1e-2},
    "weights": {"token_weight": True},
    "weights_sum": {"token_weight": True, "reduction": "sum"},
    "weights_none": {"token_weight": True, "reduction": "none"},
    "everything": {"token_weight": True, "softcap": 3.0, "z_loss": 1e-2, "bias": True, "ignore_index": 7},
}


def _loss_call(name: str, dtype: torch.dtype = torch.float32) -> Call:
    draw, options = Draw(f"loss/{name}"), dict(LOSSES[name])
    hidden, weight, labels = head(draw, dtype=dtype)
    labels[::4] = options.get("ignore_index", IGNORE)
    if options.pop("bias", False):
        options["bias"] = draw.normal(len(weight), dtype=dtype)
    if options.pop("token_weight", False):
        options["token_weight"] = draw.normal(len(hidden), dtype=dtype).abs()
        options["token_weight"][1] = 0
    return Call((hidden, weight, labels), options)


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_matches_reference(name, dtype):
    call = _loss_call(name, dtype)
    assert_matches_reference(ops.linear_cross_entropy, reference.linear_cross_entropy, call)
    assert_gradients_match_reference(ops.linear_cross_entropy, reference.linear_cross_entropy, call)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_is_the_usual_cross_entropy(reduction):
    hidden, weight, labels = head(Draw("usual"))
    labels[3] = IGNORE
    got = ops.linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    want = functional.cross_entropy(hidden @ weight.T, labels, reduction=reduction)
    torch.testing.assert_close(got, want)


def _peak_bytes(call) -> int:
    """The most that torch's allocator held at once beyond what it held before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        call()
    held = peak = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_buffer_of_tokens_times_vocabulary(dtype):
    """Forward and backward need less than a tenth of what stored logits do, gradients included."""
    hidden, weight, labels = head(Draw("memory"), 2048, 4096, 32, dtype)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())

    def run(loss) -> None:
        torch.autograd.grad(loss(), leaves)

    ours = _peak_bytes(lambda: run(lambda: ops.linear_cross_entropy(hidden, weight, labels)))
    stored = _peak_bytes(lambda: run(lambda: functional.cross_entropy((hidden @ weight.T).float(), labels)))
    assert stored > 2048 * 4096 * 4
    assert ours < stored / 10


# ---- properties -----------------------------------------------------------------------------------------


@given(draw=strategies.draws(), tokens=strategies.sizes(0, 40), reduction=st.sampled_from(["mean", "sum"]))
def test_all_ignored_means_zero_loss_and_gradient(draw, tokens, reduction):
    hidden, weight, labels = head(draw, tokens)
    bias = draw.normal(len(weight))
    labels[:] = IGNORE
    hidden[:] = torch.nan
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = ops.linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, z_loss=0.1)
    assert loss.item() == 0
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


@given(draw=strategies.draws(), tokens=strategies.sizes(2, 130), dtype=strategies.dtypes())
def test_weights_of_zero_and_one_select_tokens(draw, tokens, dtype):
    """The loss of the selected tokens alone, the same bits in dweight, exactly 0 elsewhere in dhidden."""
    hidden, weight, labels = head(draw, tokens, dtype=dtype)
    chosen = draw.integers(0, 2, (tokens,)).bool()
    chosen[0] = True
    poisoned = hidden.clone()
    poisoned[~chosen] = torch.nan
    labels_left = torch.where(chosen, labels, IGNORE)
    results = []
    for rows, names, mask in (
        (hidden, labels, chosen.to(dtype)),
        (poisoned, labels_left, None),
        (hidden[chosen], labels[chosen], None),
    ):
        leaves = [rows.detach().requires_grad_(), weight.detach().requires_grad_()]
        loss = ops.linear_cross_entropy(*leaves, names, token_weight=mask, reduction="sum")
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    (masked, dmasked, dweight), (left, dleft, dweight_left), (alone, dalone, dweight_alone) = results
    torch.testing.assert_close(masked, alone)
    torch.testing.assert_close(left, alone)
    for dhidden in (dmasked, dleft):
        assert not dhidden[~chosen].any()
        assert torch.equal(dhidden[chosen], dalone)
    assert torch.equal(dweight, dweight_alone)
    assert torch.equal(dweight_left, dweight_alone)


# ---- gradients ------------------------------------------------------------------------------------------


def test_gradcheck_of_the_loss():
    draw = Draw("gradcheck loss")
    hidden, weight, labels = head(draw, 4, 5, 3, torch.float64)
    labels[1] = IGNORE
    inputs = [hidden, weight, draw.normal(5, dtype=torch.float64), draw.normal(4, dtype=torch.float64).abs()]

    def fn(hidden: Tensor, weight: Tensor, bias: Tensor, token_weight: Tensor) -> Tensor:
        return ops.linear_cross_entropy(hidden, weight, labels, bias, token_weight=token_weight, z_loss=0.1)

    assert torch.autograd.gradcheck(fn, [t.requires_grad_() for t in inputs], check_undefined_grad=True)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_needs_no_gradient_changes_no_other(frozen, dtype):
    draw = Draw("frozen")
    hidden, weight, labels = head(draw, 130, 300, 40, dtype)
    inputs = (hidden, weight, draw.normal(300, dtype=dtype))
    results = []
    for needed in ((0, 1, 2), tuple(i for i in range(3) if i not in frozen)):
        leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        loss = ops.linear_cross_entropy(*leaves[:2], labels, leaves[2])
        found = torch.autograd.grad(loss, [leaves[i] for i in needed])
        results.append(dict(zip(needed, found, strict=True)))
    for i, grad in results[1].items():
        assert torch.equal(grad, results[0][i])


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean", "none", "everything"])
def test_compile_of_the_loss(name):
    call = _loss_call(name).requires_grad()
    assert_compiled_equals_eager(ops.linear_cross_entropy, *call.args, **call.kwargs)


def test_export():
    class Head(torch.nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return ops.linear_cross_entropy(hidden, weight, labels)

    inputs = head(Draw("export"))
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(Head(), inputs, dynamic_shapes=({0: tokens}, None, {0: tokens}))
    other = head(Draw("export"), 57)
    assert torch.equal(program.module()(*other), Head()(*other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_like_linear(dtype, compiled):
    """hidden and weight take autocast's dtype; the bias keeps its own, gradients those of their inputs."""
    hidden, weight, labels = head(Draw("autocast"))
    bias = torch.randn(len(weight))
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            assert functional.linear(hidden, weight).dtype == dtype
            return ops.linear_cross_entropy(hidden, weight, labels, bias)

    if compiled:
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    got = step(*leaves)
    want = ops.linear_cross_entropy(hidden.to(dtype), weight.to(dtype), labels, bias)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


# ---- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"reduction": "batchmean"}, "reduction must be 'mean', 'sum' or 'none', got 'batchmean'"),
        ({"token_weight": torch.zeros(4)}, "token_weight must have shape (3,), got (4,)"),
        ({"token_weight": torch.zeros(3, 1)}, "token_weight must have shape (3,), got (3, 1)"),
    ],
)
def test_errors_of_the_loss(options, text):
    call = Call((torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)), options)
    conformance.assert_same_error(ops.linear_cross_entropy, call, ValueError, f"linear_cross_entropy: {text}")
