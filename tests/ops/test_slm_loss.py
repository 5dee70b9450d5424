"""linear_nll and linear_cross_entropy against their reference."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import fastlm
from fastlm import ops, reference
from tests.support import conformance, samples, strategies
from tests.support.compile import assert_compiled_equals_eager
from tests.support.conformance import assert_gradients_match_reference, assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.tolerance import assert_close_to_reference

NLL = samples.of("linear_nll")
BACKWARD = samples.of("linear_nll_backward")
IGNORE = -100


def _head(
    draw: Draw, tokens: int = 23, vocab: int = 41, size: int = 12, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and labels, none ignored."""
    hidden, weight = draw.normal(tokens, size, dtype=dtype), draw.normal(vocab, size, dtype=dtype)
    return hidden, weight, draw.integers(0, vocab, (tokens,))


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
    hidden, weight, labels = _head(draw, dtype=dtype)
    labels[::4] = options.get("ignore_index", IGNORE)
    if options.pop("bias", False):
        options["bias"] = draw.normal(len(weight), dtype=dtype)
    if options.pop("token_weight", False):
        options["token_weight"] = draw.normal(len(hidden), dtype=dtype).abs()
        options["token_weight"][1] = 0
    return Call((hidden, weight, labels), options)


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", NLL, ids=str)
def test_matches_reference(sample, device):
    assert_matches_reference(ops.linear_nll, reference.linear_nll, sample.build(device), return_lse=True)


@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_matches_reference(name, dtype):
    call = _loss_call(name, dtype)
    assert_matches_reference(ops.linear_cross_entropy, reference.linear_cross_entropy, call)
    assert_gradients_match_reference(ops.linear_cross_entropy, reference.linear_cross_entropy, call)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_is_the_usual_cross_entropy(reduction):
    hidden, weight, labels = _head(Draw("usual"))
    labels[3] = IGNORE
    got = ops.linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    want = functional.cross_entropy(hidden @ weight.T, labels, reduction=reduction)
    torch.testing.assert_close(got, want)


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
    hidden, weight, labels = _head(Draw("exact"), 64, 500, 64, torch.bfloat16)
    exact = reference.linear_nll(hidden.double(), weight.double(), labels)
    assert (ops.linear_nll(hidden, weight, labels) - exact).abs().max() < 1e-4
    rounded = functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")
    assert (rounded - exact).abs().max() > 1e-2


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
    hidden, weight, labels = _head(Draw("memory"), 2048, 4096, 32, dtype)
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
    hidden, weight, labels = _head(draw, tokens)
    bias = draw.normal(len(weight))
    labels[:] = IGNORE
    hidden[:] = torch.nan
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = ops.linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, z_loss=0.1)
    assert loss.item() == 0
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


@given(
    draw=strategies.draws(),
    tokens=strategies.sizes(1, 130),
    cut=st.floats(0, 1),
    dtype=strategies.dtypes(),
)
def test_tokens_do_not_see_each_other(draw, tokens, cut, dtype):
    """Any cut of the tokens gives the same bits."""
    hidden, weight, labels = _head(draw, tokens, dtype=dtype)
    at = int(cut * tokens)
    call = partial(ops.linear_nll, return_lse=True, return_entropy=True)
    whole = call(hidden, weight, labels)
    parts = call(hidden[:at], weight, labels[:at]), call(hidden[at:], weight, labels[at:])
    for i, t in enumerate(whole):
        assert torch.equal(t, torch.cat([parts[0][i], parts[1][i]]))


@given(draw=strategies.draws(), tokens=strategies.sizes(1, 60), dtype=strategies.dtypes())
def test_permuted_tokens_give_permuted_losses(draw, tokens, dtype):
    hidden, weight, labels = _head(draw, tokens, dtype=dtype)
    order = draw.permutation(tokens)
    nll = ops.linear_nll(hidden, weight, labels)
    assert torch.equal(ops.linear_nll(hidden[order], weight, labels[order]), nll[order])


@given(draw=strategies.draws(), vocab=strategies.sizes(1, 400), shift=st.floats(-20, 20))
def test_a_shift_of_every_logit_moves_the_normaliser_only(draw, vocab, shift):
    hidden, weight, labels = _head(draw, vocab=vocab, dtype=torch.float64)
    bias = draw.normal(vocab, dtype=torch.float64)
    call = partial(ops.linear_nll, return_lse=True, return_entropy=True)
    nll, lse, entropy = call(hidden, weight, labels, bias)
    shifted = call(hidden, weight, labels, bias + shift)
    for got, want in zip(shifted, (nll, lse + shift, entropy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@given(draw=strategies.draws(), vocab=strategies.sizes(1, 400), dtype=strategies.dtypes())
def test_bounds(draw, vocab, dtype):
    hidden, weight, labels = _head(draw, vocab=vocab, dtype=dtype)
    nll, entropy = ops.linear_nll(hidden, weight, labels, return_entropy=True)
    assert (nll >= 0).all()
    assert (entropy >= 0).all()
    assert (entropy <= math.log(vocab) + 1e-5).all()
    flat, most = ops.linear_nll(0 * hidden, weight, labels, return_entropy=True)
    for t in (flat, most):
        torch.testing.assert_close(t, torch.full_like(t, math.log(vocab)))


@given(draw=strategies.draws(), tokens=strategies.sizes(2, 130), dtype=strategies.dtypes())
def test_weights_of_zero_and_one_select_tokens(draw, tokens, dtype):
    """The loss of the selected tokens alone, the same bits in dweight, exactly 0 elsewhere in dhidden."""
    hidden, weight, labels = _head(draw, tokens, dtype=dtype)
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
    hidden, weight, labels = _head(draw, 4, 5, 3, torch.float64)
    labels[1] = IGNORE
    inputs = [hidden, weight, draw.normal(5, dtype=torch.float64)]

    def fn(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return ops.linear_nll(
            hidden, weight, labels, bias, softcap=softcap, return_lse=True, return_entropy=True
        )

    assert torch.autograd.gradcheck(fn, [t.requires_grad_() for t in inputs], check_undefined_grad=True)


def test_gradcheck_of_the_loss():
    draw = Draw("gradcheck loss")
    hidden, weight, labels = _head(draw, 4, 5, 3, torch.float64)
    labels[1] = IGNORE
    inputs = [hidden, weight, draw.normal(5, dtype=torch.float64), draw.normal(4, dtype=torch.float64).abs()]

    def fn(hidden: Tensor, weight: Tensor, bias: Tensor, token_weight: Tensor) -> Tensor:
        return ops.linear_cross_entropy(hidden, weight, labels, bias, token_weight=token_weight, z_loss=0.1)

    assert torch.autograd.gradcheck(fn, [t.requires_grad_() for t in inputs], check_undefined_grad=True)


@pytest.mark.parametrize("only", [0, 1, 2])
def test_a_missing_upstream_gradient_counts_as_zero(only):
    hidden, weight, labels = _head(Draw("missing"), dtype=torch.float64)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    results = []
    for fn in (ops.linear_nll, reference.linear_nll):
        output = fn(*leaves, labels, return_lse=True, return_entropy=True)[only]
        results.append(torch.autograd.grad(output.square().sum(), leaves))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_needs_no_gradient_changes_no_other(frozen, dtype):
    draw = Draw("frozen")
    hidden, weight, labels = _head(draw, 130, 300, 40, dtype)
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


@pytest.mark.parametrize("name", ["mean", "none", "everything"])
def test_compile_of_the_loss(name):
    call = _loss_call(name).requires_grad()
    assert_compiled_equals_eager(ops.linear_cross_entropy, *call.args, **call.kwargs)


def test_export():
    class Head(torch.nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return ops.linear_cross_entropy(hidden, weight, labels)

    inputs = _head(Draw("export"))
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(Head(), inputs, dynamic_shapes=({0: tokens}, None, {0: tokens}))
    other = _head(Draw("export"), 57)
    assert torch.equal(program.module()(*other), Head()(*other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_like_linear(dtype, compiled):
    """hidden and weight take autocast's dtype; the bias keeps its own, gradients those of their inputs."""
    hidden, weight, labels = _head(Draw("autocast"))
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


def test_autocast_takes_a_mixture_and_leaves_float64():
    hidden, weight, labels = _head(Draw("mixture"))
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
    ("options", "text"),
    [
        ({"reduction": "batchmean"}, "reduction must be 'mean', 'sum' or 'none', got 'batchmean'"),
        ({"token_weight": _x(4)}, "token_weight must have shape (3,), got (4,)"),
        ({"token_weight": _x(3, 1)}, "token_weight must have shape (3,), got (3, 1)"),
    ],
)
def test_errors_of_the_loss(options, text):
    call = Call((_x(3, 4), _x(5, 4), _labels(3)), options)
    conformance.assert_same_error(ops.linear_cross_entropy, call, ValueError, f"linear_cross_entropy: {text}")


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
        head = _head(draw, tokens, 900, 70, dtype)
        return Call(head, {"bias": draw.normal(900, dtype=dtype), "return_entropy": True})

    conformance.assert_same_for_any_thread_count(ops.linear_nll, make_call, with_grad=True)


@pytest.mark.parametrize("level", fastlm._C.supported_cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_call_matches_the_reference(level, dtype):
    """More tokens than are held at a time, several blocks of everything, nothing a multiple of anything."""
    draw = Draw("large")
    hidden, weight, labels = _head(draw, 2101, 1187, 205, dtype)
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
