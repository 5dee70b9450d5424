"""The definition of the loss operators against torch's cross-entropy on full logits, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fastlm.reference import linear_cross_entropy, linear_nll
from tests.support import samples
from tests.support.layouts import Draw

F64 = torch.float64
TOKENS, VOCAB, HIDDEN = 13, 37, 10


@pytest.fixture
def draw() -> Draw:
    return Draw("reference-loss")


@pytest.fixture
def head(draw):
    """hidden, weight, labels (some ignored), bias."""
    labels = draw.integers(0, VOCAB, (TOKENS,))
    labels[::4] = -100
    return (
        draw.normal(TOKENS, HIDDEN, dtype=F64),
        draw.normal(VOCAB, HIDDEN, dtype=F64),
        labels,
        draw.normal(VOCAB, dtype=F64),
    )


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def logits_of(hidden, weight, bias=None, softcap=0.0):
    logits = functional.linear(hidden, weight, bias)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_nll_lse_and_entropy(head, softcap):
    hidden, weight, labels, bias = head
    nll, lse, entropy = linear_nll(
        hidden, weight, labels, bias, softcap=softcap, return_lse=True, return_entropy=True
    )
    logits = logits_of(hidden, weight, bias, softcap)
    valid = labels != -100
    close(nll, functional.cross_entropy(logits, labels, reduction="none"))
    close(lse, logits.logsumexp(-1) * valid)
    close(entropy, torch.distributions.Categorical(logits=logits).entropy() * valid)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_cross_entropy(head, reduction, with_bias):
    hidden, weight, labels, bias = head
    bias = bias if with_bias else None
    want = functional.cross_entropy(logits_of(hidden, weight, bias), labels, reduction=reduction)
    close(linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction), want)


def test_gradients_equal_those_of_cross_entropy(head):
    hidden, weight, labels, bias = head
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, bias), inputs)
    theirs = torch.autograd.grad(functional.cross_entropy(logits_of(hidden, weight, bias), labels), inputs)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
    assert not ours[0][labels == -100].any()


def test_token_weights_and_z_loss(head, draw):
    hidden, weight, labels, bias = head
    tokens = draw.normal(TOKENS, dtype=F64).abs()
    options = {"token_weight": tokens, "z_loss": 0.3}
    logits = logits_of(hidden, weight, bias)
    each = functional.cross_entropy(logits, labels, reduction="none") + 0.3 * logits.logsumexp(-1) ** 2
    each = torch.where(labels == -100, 0, each * tokens)
    none = linear_cross_entropy(hidden, weight, labels, bias, reduction="none", **options)
    close(none, each)
    total = linear_cross_entropy(hidden, weight, labels, bias, reduction="sum", **options)
    close(total, each.sum())
    mean = linear_cross_entropy(hidden, weight, labels, bias, **options)
    close(mean, each.sum() / tokens[labels != -100].sum())


def test_weights_of_zero_and_one_select_tokens(head):
    hidden, weight, labels, _ = head
    chosen = torch.arange(TOKENS) % 3 == 0
    masked = torch.where(chosen, labels, -100)
    close(
        linear_cross_entropy(hidden, weight, labels, token_weight=chosen.to(F64)),
        functional.cross_entropy(hidden @ weight.T, masked),
    )


@pytest.mark.parametrize(
    "labels", [torch.full((5,), -100), torch.zeros(0, dtype=torch.int64)], ids=["ignored", "none"]
)
@pytest.mark.parametrize("token_weight", [False, True])
def test_no_token_counts(draw, labels, token_weight):
    hidden = draw.normal(len(labels), HIDDEN, dtype=F64).requires_grad_()
    weight = draw.normal(VOCAB, HIDDEN, dtype=F64).requires_grad_()
    tokens = torch.ones(len(labels), dtype=F64) if token_weight else None
    loss = linear_cross_entropy(hidden, weight, labels, token_weight=tokens, z_loss=1.0)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, [hidden, weight]):
        assert not gradient.any()


def test_all_weights_zero(head):
    hidden, weight, labels, _ = head
    loss = linear_cross_entropy(hidden, weight, labels, token_weight=torch.zeros(TOKENS, dtype=F64))
    assert loss.item() == 0


def test_ignored_tokens_are_not_read(head):
    hidden, weight, labels, _ = head
    hidden[labels == -100] = float("nan")
    tokens = torch.where(labels == -100, torch.nan, 1.0)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = linear_cross_entropy(hidden, weight, labels, token_weight=tokens, z_loss=0.1)
    assert all(t.isfinite().all() for t in (loss, *torch.autograd.grad(loss, inputs)))


def test_ignore_index_may_be_a_label(head):
    hidden, weight, labels, _ = head
    labels = torch.where(labels == -100, 3, labels)
    close(
        linear_cross_entropy(hidden, weight, labels, ignore_index=3),
        functional.cross_entropy(hidden @ weight.T, labels, ignore_index=3),
    )


@pytest.mark.parametrize("label", [VOCAB, -1, -99, 2**40])
def test_labels_outside_the_vocabulary(head, label):
    hidden, weight, labels, _ = head
    labels[6] = label
    with pytest.raises(IndexError, match=rf"\[0, {VOCAB}\).*got {label} at index 6"):
        linear_cross_entropy(hidden, weight, labels)


def test_rows_and_columns_are_tokens_like_any(head):
    hidden, weight, labels, bias = head
    flat = linear_nll(hidden[:12], weight, labels[:12], bias)
    close(linear_nll(hidden[:12].view(3, 4, -1), weight, labels[:12].view(3, 4), bias), flat.view(3, 4))
    labels[5] = 99
    with pytest.raises(IndexError, match="got 99 at index 5"):
        linear_nll(hidden[:12].view(3, 4, -1), weight, labels[:12].view(3, 4))


def test_a_word_may_be_left_out(head):
    """With a bias of -inf a word has probability 0; the others are as if it did not exist."""
    hidden, weight, labels, bias = head
    last = VOCAB - 1
    labels = torch.where(labels == last, 0, labels)
    without = linear_nll(hidden, weight[:last], labels, bias[:last], return_lse=True, return_entropy=True)
    bias[last] = -torch.inf
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    results = linear_nll(hidden, weight, labels, bias, return_lse=True, return_entropy=True)
    for a, b in zip(results, without, strict=True):
        close(a, b)
    gradients = torch.autograd.grad(sum(t.sum() for t in results), inputs)
    assert all(t.isfinite().all() for t in gradients)
    assert not gradients[1][last].any()


def test_large_logits_do_not_overflow(head):
    hidden, weight, labels, _ = head
    nll = linear_nll(1e4 * hidden.float(), weight.float(), labels)
    assert nll.isfinite().all()
    assert nll.dtype == torch.float32


@pytest.mark.parametrize("name", ["entropy", "softcap_entropy"])
def test_gradcheck(name):
    call = samples.of("linear_nll", name)[0].build().to(F64)
    hidden, weight, labels = call.args
    inputs = [t.requires_grad_() for t in (hidden, weight, call.kwargs["bias"])]

    def function(hidden, weight, bias):
        options = call.kwargs | {"bias": bias}
        return linear_nll(hidden, weight, labels, **options, return_lse=True)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_reduction_is_checked(head):
    hidden, weight, labels, _ = head
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'avg'"):
        linear_cross_entropy(hidden, weight, labels, reduction="avg")
