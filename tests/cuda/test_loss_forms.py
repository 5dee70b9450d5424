"""Sizes at which the CUDA head takes another form: edges of tiles, several waves of tokens and panels of words, hostile labels.

The emulated device has waves of 256 tokens and panels of 512 words, so that small calls see several; a GPU has thousands.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import ops, reference
from tests.support import strategies
from tests.support.conformance import assert_gradients_match_reference, assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.slm_loss import IGNORE, head
from tests.support.tolerance import assert_close_to_reference


def on_device() -> bool:
    """Whether the operators run as CUDA code, on a GPU or emulated."""
    return torch.cuda.is_available() or bool(fastlm.build_info()["cuda"]["emulated"])


def loss_call(
    name: str, tokens: int, vocab: int, size: int, dtype: torch.dtype, device: Any = "cpu", **options: Any
) -> Call:
    draw = Draw(name, device)
    hidden, weight, labels = head(draw, tokens, vocab, size, dtype)
    hidden = hidden / size**0.5
    labels[1::5] = IGNORE
    if options.pop("bias", False):
        options["bias"] = draw.normal(vocab, dtype=dtype)
    return Call((hidden, weight, labels), options)


def check(call: Call) -> None:
    assert_matches_reference(ops.linear_nll, reference.linear_nll, call, return_lse=True)
    assert_gradients_match_reference(ops.linear_nll, reference.linear_nll, call, return_lse=True)


@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
@pytest.mark.parametrize("tokens", [1, 127, 128, 129])
def test_numbers_of_tokens(tokens, dtype, device):
    check(loss_call(f"tokens/{tokens}", tokens, 70, 24, dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 63, 65, 255, 256, 257, 264, 511, 513])
def test_numbers_of_words(vocab, dtype, device):
    """At the edges of slabs (32, 64, 256), tiles and panels (512 where emulated)."""
    check(loss_call(f"words/{vocab}", 21, vocab, 16, dtype, device, return_entropy=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 8, 15, 63, 65, 130])
def test_hidden_sizes(size, dtype, device):
    check(loss_call(f"size/{size}", 19, 77, size, dtype, device, bias=True))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "entropy": {"return_entropy": True},
    "everything": {"bias": True, "softcap": 3.0, "return_entropy": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_several_waves_and_panels(name, dtype, device):
    check(loss_call(f"waves/{name}", 600, 1100, 24, dtype, device, **OPTIONS[name]))


def gradients(call: Call, factor: Tensor | None = None) -> list[Tensor]:
    call = call.requires_grad()
    leaves = [t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    nll = ops.linear_nll(*call.args, **call.kwargs)
    loss = nll if factor is None else factor * nll
    return [nll.detach(), *torch.autograd.grad(loss.sum(), leaves)]


@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
def test_two_runs_have_the_same_bits(dtype, device):
    call = loss_call("twice", 300, 600, 40, dtype, device, bias=True, softcap=5.0)
    for a, b in zip(gradients(call), gradients(call), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [0, 1, 200, 257, 600])
def test_tokens_without_gradient_cost_nothing_and_change_nothing(kept, dtype, device):
    """Exactly zero for them, and for the others and the weight the bits that a call with those alone gives."""
    draw = Draw(f"kept/{kept}", device)
    hidden, weight, labels = head(draw, 600, 600, 24, dtype)
    chosen = torch.zeros(600, dtype=torch.bool, device=device)
    chosen[draw.permutation(600)[:kept]] = True
    masked = torch.where(chosen[:, None], hidden, torch.nan)
    factor = torch.where(chosen, 0.5, 0.0)
    all_of_them = gradients(Call((masked, weight, torch.where(chosen, labels, IGNORE)), {}), factor)
    by_gradient = gradients(Call((hidden, weight, labels), {}), factor)
    alone = gradients(Call((hidden[chosen], weight, labels[chosen]), {}), factor[chosen])
    for _, dhidden, dweight in (all_of_them, by_gradient):
        assert not dhidden[~chosen].any()
        assert torch.equal(dhidden[chosen], alone[1])
        assert torch.equal(dweight, alone[2])
    assert torch.equal(all_of_them[0][chosen], alone[0])
    assert kept > 0 or not all_of_them[2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiny_gradients_survive(dtype, device):
    """A mean over many tokens: products of a probability and 1e-6 lie below what float16 can hold."""
    hidden, weight, labels = head(Draw("tiny", device), 50, 300, 32, dtype)
    results = []
    for fn, kind in ((ops, dtype), (reference, torch.float64)):
        leaves = [t.detach().to(kind).requires_grad_() for t in (hidden, weight)]
        results.append(torch.autograd.grad(1e-6 * fn.linear_nll(*leaves, labels).sum(), leaves))
    for got, want in zip(*results, strict=True):
        step = 6e-8 if dtype == torch.float16 else 0.0  # of the result itself
        assert (got.double() - want).abs().max() <= step + 0.02 * want.abs().max()


HOSTILE = [-1, -2, -(2**31), 2**31 - 1, 41, 42, 10**9]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels_that_are_no_words_count_as_ignored(dtype, device):
    if not on_device():
        pytest.skip("the CPU operators refuse these values")
    device = "cuda" if torch.cuda.is_available() else device
    hidden, weight, labels = head(Draw("hostile", device))
    bad = torch.zeros(23, dtype=torch.bool, device=device)
    bad[3 : 3 + 2 * len(HOSTILE) : 2] = True
    labels = labels.to(dtype)
    wrong = labels.clone()
    wrong[bad] = torch.tensor(HOSTILE, dtype=dtype, device=device)
    if dtype == torch.int64:
        wrong[bad.nonzero()[0]] = -(2**63)
        wrong[bad.nonzero()[1]] = 2**40
    good = gradients(Call((hidden, weight, torch.where(bad, IGNORE, labels)), {}))
    for a, b in zip(gradients(Call((hidden, weight, wrong), {})), good, strict=True):
        assert torch.equal(a, b)


def test_all_ignored_or_none(device):
    for tokens in (0, 300):
        hidden, weight, labels = head(Draw("ignored", device), tokens, 530, 8)
        labels[:] = IGNORE
        bias = torch.zeros(530, device=device)
        found = gradients(Call((hidden * torch.nan, weight, labels), {"bias": bias}))
        assert all(not t.any() for t in found)


@pytest.mark.parametrize("which", ["dnll", "dlse", "dentropy", "none"])
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_what_is_not_needed_is_not_made(needed, which, device):
    draw = Draw("needed", device)
    hidden, weight, labels = head(draw, 280, 520, 8)
    bias = draw.normal(520)
    _, lse, entropy = torch.ops.fastlm.linear_nll(
        hidden, weight, labels, bias, ignore_index=IGNORE, softcap=0.0, return_entropy=True
    )
    given = [draw.normal(280) if name == which else None for name in ("dnll", "dlse", "dentropy")]
    call = partial(
        torch.ops.fastlm.linear_nll_backward,
        *given,
        hidden,
        weight,
        labels,
        bias,
        lse,
        entropy,
        ignore_index=IGNORE,
        softcap=0.0,
    )
    names = ("need_dhidden", "need_dweight", "need_dbias")
    every = call(**dict.fromkeys(names, True))
    some = call(**dict(zip(names, needed, strict=True)))
    for one, all_, is_needed in zip(some, every, needed, strict=True):
        assert torch.equal(one, all_) if is_needed else one.numel() == 0
        assert which != "none" or not all_.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_weight_and_strided_hidden_states(dtype, device):
    draw = Draw("layouts", device)
    wide = draw.normal(2, 40, 48, dtype=dtype)
    call = Call(
        (wide[:, ::2, ::2], draw.normal(24, 70, dtype=dtype).T, draw.integers(0, 70, (2, 20))),
        {"bias": draw.normal(140, dtype=torch.float64)[::2]},
    )
    leaves = [t.detach().requires_grad_() for t in call.args[:2]]
    got = ops.linear_nll(*leaves, call.args[2], call.kwargs["bias"])
    exact = reference.linear_nll(
        call.args[0].double(), call.args[1].double(), call.args[2], call.kwargs["bias"]
    )
    plain = reference.linear_nll(*call.args[:2], call.args[2], call.kwargs["bias"].float())
    assert_close_to_reference("nll", got, exact, plain)
    same = [t.detach().contiguous().requires_grad_() for t in call.args[:2]]
    again = ops.linear_nll(*same, call.args[2], call.kwargs["bias"])
    assert torch.equal(got, again)
    for a, b in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(again.sum(), same), strict=True
    ):
        assert torch.equal(a, b)
