"""The layer beside transformers' PhiMoE block: the same weights under the same names give the same output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.24", reason="needs the extra fastlm[hf]")

from transformers import PhimoeConfig
from transformers.models.phimoe.modeling_phimoe import PhimoeSparseMoeBlock, sparsemixer

from fastlm.layers import GrinMoE
from tests.support.tolerance import assert_close_to_reference

SIZE, INNER, EXPERTS = 32, 24, 8


def both(dtype: torch.dtype, jitter: float = 0.1) -> tuple[PhimoeSparseMoeBlock, GrinMoE]:
    """Their block in `dtype`, and ours with its weights."""
    config = PhimoeConfig(
        hidden_size=SIZE,
        intermediate_size=INNER,
        num_local_experts=EXPERTS,
        router_jitter_noise=jitter,
        input_jitter_noise=0.0,
    )
    config._experts_implementation = "eager"
    theirs = PhimoeSparseMoeBlock(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = theirs.to(dtype).eval()
    ours = GrinMoE(SIZE, INNER, EXPERTS, router_jitter_noise=jitter, dtype=dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def in_float64(block: PhimoeSparseMoeBlock, x: Tensor) -> Tensor:
    exact, _ = both(torch.float64)
    exact.load_state_dict({name: t.double() for name, t in block.state_dict().items()})
    return exact(x.double())


def test_evaluation_in_float32():
    theirs, ours = both(torch.float32)
    x = torch.randn(3, 70, SIZE)
    assert_close_to_reference("y", ours(x), in_float64(theirs, x), theirs(x))


def test_evaluation_in_bfloat16():
    """Their router rounds its logits to bfloat16: tokens for which that decides otherwise are left out."""
    theirs, ours = both(torch.bfloat16)
    x = torch.randn(1, 2000, SIZE).to(torch.bfloat16)
    logits = x[0].double() @ theirs.router.weight.double().T
    chosen = []
    for scores in (logits, theirs.router(x[0])[0]):
        _, ids = sparsemixer(scores, 0.1, training=False)
        chosen.append((ids, _survivors(scores.double(), ids)))
    same = (chosen[0][0] == chosen[1][0]).all(-1) & (chosen[0][1] == chosen[1][1]).flatten(1).all(-1)
    assert same.sum() > 1500
    x = x[:, same]
    assert_close_to_reference("y", ours(x), in_float64(theirs, x), theirs(x))


def _survivors(logits: Tensor, ids: Tensor) -> Tensor:
    """Who is left in the softmax of each pick, `(T, 2, E)`."""
    second = logits.scatter(1, ids[:, :1], -torch.inf)
    tops = torch.stack([logits.amax(-1), second.amax(-1)], dim=1).unsqueeze(-1)
    left = torch.stack([logits, second], dim=1)
    return ((tops - logits.unsqueeze(1)) / torch.maximum(logits.abs().unsqueeze(1), tops) <= 0.2) & (
        left > -torch.inf
    )


def test_gradients_in_evaluation():
    """Theirs do flow through the softmax then, as ours do."""
    theirs, ours = both(torch.float64)
    x, upstream = (torch.randn(2, 40, SIZE, dtype=torch.float64) for _ in range(2))
    grads = []
    for block in (theirs, ours):
        leaf = x.clone().requires_grad_()
        named = {"x": leaf, **dict(block.named_parameters())}
        found = torch.autograd.grad(block(leaf), list(named.values()), upstream)
        grads.append(dict(zip(named, found, strict=True)))
    for name, expected in grads[0].items():
        assert_close_to_reference(f"d{name}", grads[1][name], expected)


def test_jitter_writes_into_their_input_and_not_into_ours():
    """They multiply twice and in place; with `jitter_experts` ours multiplies a copy, once, for router and experts."""
    theirs, ours = both(torch.float32)
    theirs.train().input_jitter_noise = theirs.router.input_jitter_noise = 0.1
    x = torch.randn(1, 5, SIZE)
    touched = x.clone()
    theirs(touched)
    assert not torch.equal(touched, x)
    ours.train().input_jitter_noise, ours.jitter_experts = 0.1, True
    touched = x.clone()
    ours(touched)
    assert torch.equal(touched, x)
