"""linear_nll against its reference; losses on top of it in `test_linear_cross_entropy.py` and `test_slm_loss.py`."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import fastlm
from fastlm import ops, reference
from tests.support import conformance, samples, strategies
from tests.support.conformance import assert_gradients_match_reference, assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.slm_loss import IGNORE, head
from tests.support.tolerance import assert_close_to_reference

NLL = samples.of("linear_nll")
BACKWARD = samples.of("linear_nll_backward")


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", NLL, ids=str)
def test_matches_reference(sample, device):
    assert_matches_reference(ops.linear_nll, reference.linear_nll, sample.build(device), return_lse=True)


@pytest.mark.parametrize("bound", [1e3, 1e4])
def test_huge_logits_stay_finite(bound):
    """The loss is a difference of numbers near `bound`: what is below its last digit is lost, no more."""
    hidden = torch.tensor([[bound], [-bound]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    nll, entropy = ops.linear_nll(hidden, weight, torch.tensor([0, 0]), return_entropy=True)
    assert nll.tolist() == [0.0, 2 * bound]
    assert entropy.tolist() == [0.0, 0.0]
    assert all(t.isfinite().all() for t in torch.autograd.grad(nll.sum(), (hidden, weight)))


def test_logits_are_not_rounded_to_the_dtype_of_the_inputs():
    """Scores are differences of losses, so bfloat16 inputs must not mean bfloat16 logits."""
    hidden, weight, labels = head(Draw("exact"), 64, 500, 64, torch.bfloat16)
    exact = reference.linear_nll(hidden.double(), weight.double(), labels)
    assert (ops.linear_nll(hidden, weight, labels) - exact).abs().max() < 1e-4
    rounded = functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")
    assert (rounded - exact).abs().max() > 1e-2


# ---- properties -----------------------------------------------------------------------------------------


@given(
    draw=strategies.draws(),
    tokens=strategies.sizes(1, 130),
    cut=st.floats(0, 1),
    dtype=strategies.dtypes(),
)
def test_tokens_do_not_see_each_other(draw, tokens, cut, dtype):
    """Any cut of the tokens gives the same bits."""
    hidden, weight, labels = head(draw, tokens, dtype=dtype)
    at = int(cut * tokens)
    call = partial(ops.linear_nll, return_lse=True, return_entropy=True)
    whole = call(hidden, weight, labels)
    parts = call(hidden[:at], weight, labels[:at]), call(hidden[at:], weight, labels[at:])
    for i, t in enumerate(whole):
        assert torch.equal(t, torch.cat([parts[0][i], parts[1][i]]))


@given(draw=strategies.draws(), tokens=strategies.sizes(1, 60), dtype=strategies.dtypes())
def test_permuted_tokens_give_permuted_losses(draw, tokens, dtype):
    hidden, weight, labels = head(draw, tokens, dtype=dtype)
    order = draw.permutation(tokens)
    nll = ops.linear_nll(hidden, weight, labels)
    assert torch.equal(ops.linear_nll(hidden[order], weight, labels[order]), nll[order])


@given(draw=strategies.draws(), vocab=strategies.sizes(1, 400), shift=st.floats(-20, 20))
def test_a_shift_of_every_logit_moves_the_normaliser_only(draw, vocab, shift):
    hidden, weight, labels = head(draw, vocab=vocab, dtype=torch.float64)
    bias = draw.normal(vocab, dtype=torch.float64)
    call = partial(ops.linear_nll, return_lse=True, return_entropy=True)
    nll, lse, entropy = call(hidden, weight, labels, bias)
    shifted = call(hidden, weight, labels, bias + shift)
    for got, want in zip(shifted, (nll, lse + shift, entropy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@given(draw=strategies.draws(), vocab=strategies.sizes(1, 400), dtype=strategies.dtypes())
def test_bounds(draw, vocab, dtype):
    hidden, weight, labels = head(draw, vocab=vocab, dtype=dtype)
    nll, entropy = ops.linear_nll(hidden, weight, labels, return_entropy=True)
    assert (nll >= 0).all()
    assert (entropy >= 0).all()
    assert (entropy <= math.log(vocab) + 1e-5).all()
    flat, most = ops.linear_nll(0 * hidden, weight, labels, return_entropy=True)
    for t in (flat, most):
        torch.testing.assert_close(t, torch.full_like(t, math.log(vocab)))


@given(draw=strategies.draws(), layout=strategies.layouts(), dtype=strategies.dtypes())
def test_memory_layout_changes_no_bit(draw, layout, dtype):
    hidden = draw.normal(17, 12, dtype=dtype, layout=layout)
    weight = draw.normal(31, 12, dtype=dtype, layout=layout)
    bias, labels = draw.normal(31, dtype=dtype, layout=layout), draw.integers(0, 31, (17,))
    results = []
    for copy in (lambda t: t.detach(), lambda t: t.detach().contiguous()):
        leaves = [copy(t).requires_grad_() for t in (hidden, weight, bias)]
        nll = ops.linear_nll(*leaves[:2], labels, leaves[2])
        results.append([nll, *torch.autograd.grad(nll.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


# ---- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", NLL, ids=str)
def test_gradients(sample, device):
    assert_gradients_match_reference(
        ops.linear_nll, reference.linear_nll, sample.build(device), return_lse=True
    )


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradcheck(softcap):
    draw = Draw("gradcheck")
    hidden, weight, labels = head(draw, 4, 5, 3, torch.float64)
    labels[1] = IGNORE
    inputs = [hidden, weight, draw.normal(5, dtype=torch.float64)]

    def fn(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return ops.linear_nll(
            hidden, weight, labels, bias, softcap=softcap, return_lse=True, return_entropy=True
        )

    assert torch.autograd.gradcheck(fn, [t.requires_grad_() for t in inputs], check_undefined_grad=True)


@pytest.mark.parametrize("only", [0, 1, 2])
def test_a_missing_upstream_gradient_counts_as_zero(only):
    hidden, weight, labels = head(Draw("missing"), dtype=torch.float64)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    results = []
    for fn in (ops.linear_nll, reference.linear_nll):
        output = fn(*leaves, labels, return_lse=True, return_entropy=True)[only]
        results.append(torch.autograd.grad(output.square().sum(), leaves))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("sample", NLL, ids=str)
def test_opcheck(sample, with_grad):
    conformance.assert_opcheck(sample, with_grad=with_grad)


@pytest.mark.parametrize("sample", BACKWARD, ids=str)
def test_opcheck_of_backward(sample):
    conformance.assert_opcheck(sample, with_grad=False)


@pytest.mark.parametrize(
    "sample", samples.of("linear_nll", "entropy") + samples.of("linear_nll", "past"), ids=str
)
def test_compile(sample):
    conformance.assert_compiles(sample, ops.linear_nll, with_grad=True, return_lse=True)


def test_autocast_takes_a_mixture_and_leaves_float64():
    hidden, weight, labels = head(Draw("mixture"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ops.linear_nll(hidden, weight.bfloat16(), labels)
        double = ops.linear_nll(hidden.double(), weight.double(), labels)
    assert torch.equal(mixed, ops.linear_nll(hidden.bfloat16(), weight.bfloat16(), labels))
    assert double.dtype == torch.float64


# ---- errors ---------------------------------------------------------------------------------------------


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _labels(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD_CALLS = [
    ("hidden_dim", (_x(), _x(5, 4), _labels()), {}, "hidden must have shape (..., h), got ()"),
    (
        "hidden_dtype",
        (_x(3, 4, dtype=torch.int32), _x(5, 4), _labels(3)),
        {},
        "hidden must have dtype float32, bfloat16, float16 or float64, got int32",
    ),
    ("weight_dim", (_x(3, 4), _x(4), _labels(3)), {}, "weight must have shape (V, h), got (4,)"),
    ("weight_size", (_x(3, 4), _x(5, 6), _labels(3)), {}, "weight must have shape (V, 4), got (5, 6)"),
    (
        "weight_dtype",
        (_x(3, 4, dtype=torch.bfloat16), _x(5, 4), _labels(3)),
        {},
        "weight must have the dtype of hidden, bfloat16, got float32",
    ),
    ("labels_shape", (_x(3, 4), _x(5, 4), _labels(2)), {}, "labels must have shape (3,), got (2,)"),
    (
        "labels_same_number",
        (_x(2, 3, 4), _x(5, 4), _labels(3, 2)),
        {},
        "labels must have shape (2, 3), got (3, 2)",
    ),
    (
        "labels_dtype",
        (_x(3, 4), _x(5, 4), _x(3)),
        {},
        "labels must have dtype int32 or int64, got float32",
    ),
    ("bias", (_x(3, 4), _x(5, 4), _labels(3), _x(4)), {}, "bias must have shape (5,), got (4,)"),
    (
        "bias_dtype",
        (_x(3, 4), _x(5, 4), _labels(3), _labels(5)),
        {},
        "bias must have dtype float32, bfloat16, float16 or float64, got int64",
    ),
    (
        "softcap",
        (_x(3, 4), _x(5, 4), _labels(3)),
        {"softcap": -1.5},
        "softcap must not be negative, got -1.5",
    ),
]


@pytest.mark.parametrize(
    ("args", "kwargs", "text"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS]
)
def test_errors(args, kwargs, text):
    for function in (ops.linear_nll, torch.ops.fastlm.linear_nll, ops.linear_cross_entropy):
        conformance.assert_same_error(function, Call(args, kwargs), ValueError, f"linear_nll: {text}")


@pytest.mark.host_values
@pytest.mark.parametrize(
    ("labels", "options", "text"),
    [
        ([0, 5, 1], {}, "labels must be in [0, 5) or -100, got 5 at index 1"),
        ([0, 1, -1], {}, "labels must be in [0, 5) or -100, got -1 at index 2"),
        ([-100, 1, 2], {"ignore_index": -1}, "labels must be in [0, 5) or -1, got -100 at index 0"),
        ([2**40, 1, 2], {}, "got 1099511627776 at index 0"),
    ],
)
def test_errors_in_labels(labels, options, text):
    call = Call((_x(3, 4), _x(5, 4), torch.tensor(labels)), options)
    for function in (ops.linear_nll, reference.linear_nll, ops.linear_cross_entropy):
        conformance.assert_same_error(function, call, IndexError, text, on_meta=False)


@pytest.mark.parametrize(
    ("place", "bad", "text"),
    [
        (0, _x(2), "dnll must have shape (3,), got (2,)"),
        (1, _x(3, dtype=torch.float64), "dlse must have dtype float32, got float64"),
        (7, _x(4), "lse must have shape (3,), got (4,)"),
        (8, _x(0), "entropy must have shape (3,), got (0,)"),
    ],
)
def test_errors_of_backward(place, bad, text):
    args = [_x(3), _x(3), _x(3), _x(3, 4), _x(5, 4), _labels(3), None, _x(3), _x(3)]
    args[place] = bad
    options = {"ignore_index": IGNORE, "softcap": 0.0}
    options |= dict.fromkeys(("need_dhidden", "need_dweight", "need_dbias"), True)
    conformance.assert_same_error(
        torch.ops.fastlm.linear_nll_backward, Call(tuple(args), options), ValueError, text
    )


# ---- twins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", NLL, ids=str)
def test_every_level(sample):
    conformance.assert_levels_match_reference(
        sample, ops.linear_nll, reference.linear_nll, with_grad=True, return_lse=True
    )


@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
@pytest.mark.parametrize("tokens", [3, 400])
def test_same_bits_for_any_number_of_threads(dtype, tokens):
    """Several panels of the vocabulary; with few tokens their width depends on the number of threads."""

    def make_call() -> Call:
        draw = Draw("threads")
        inputs = head(draw, tokens, 900, 70, dtype)
        return Call(inputs, {"bias": draw.normal(900, dtype=dtype), "return_entropy": True})

    conformance.assert_same_for_any_thread_count(ops.linear_nll, make_call, with_grad=True)


@pytest.mark.parametrize("level", fastlm._C.supported_cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_call_matches_the_reference(level, dtype):
    """More tokens than are held at a time, several blocks of everything, nothing a multiple of anything."""
    draw = Draw("large")
    hidden, weight, labels = head(draw, 2101, 1187, 205, dtype)
    hidden /= 14
    labels[5::9] = IGNORE
    names = ("nll", "dhidden", "dweight")
    results = []
    for fn, kind in ((ops, dtype), (reference, torch.float64), (reference, dtype)):
        leaves = [t.detach().to(kind).requires_grad_() for t in (hidden, weight)]
        with conformance.cpu_level(level):
            nll = fn.linear_nll(*leaves, labels)
            results.append([nll, *torch.autograd.grad(nll.sum(), leaves)])
    for name, got, exact, plain in zip(names, *results, strict=True):
        assert_close_to_reference(name, got, exact, plain)
