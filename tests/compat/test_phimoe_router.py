"""grin_route beside the router of transformers' PhiMoE: the same experts, weights and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.24", reason="needs the extra fastlm[hf]")

from transformers.models.phimoe.modeling_phimoe import sparsemixer

from fastlm import ops
from tests.support.layouts import Draw
from tests.support.tolerance import assert_close_to_reference

LOGITS = {
    "normal": lambda draw: draw.normal(20_000, 16),
    "near_each_other": lambda draw: draw.normal(20_000, 16, scale=0.1, shift=2.0),
    "negative": lambda draw: -draw.normal(20_000, 16).abs(),
    "positive": lambda draw: draw.normal(20_000, 16).abs(),
    "two_experts": lambda draw: draw.normal(20_000, 2),
    "many_experts": lambda draw: draw.normal(500, 130),
    "zeros": lambda draw: 0 * draw.normal(5, 16),
    "ties": lambda draw: draw.normal(2_000, 16).round(),
}


@pytest.mark.parametrize("jitter_eps", [0.0, 0.01, 0.1, 0.3])
@pytest.mark.parametrize("name", LOGITS)
def test_eval(name, jitter_eps):
    """The same ids and survivors to the last token. Their weights are sums of exponentials, each library's own."""
    logits = LOGITS[name](Draw(name))
    expected, chosen = sparsemixer(logits, jitter_eps, training=False)
    weights, ids, _ = ops.grin_route(logits, jitter_eps=jitter_eps)
    assert torch.equal(ids.long(), chosen)
    assert torch.equal(weights == 1, expected == 1)
    assert_close_to_reference("weights", weights, expected.double())


def _choices(weights: Tensor, logits: Tensor, ids: Tensor, jitter_eps: float) -> Tensor:
    """m of each pick: weight / p, p from our operator given the same picks, which noise can force."""
    noise = torch.full((*ids.shape, logits.shape[1] + 1), 1e-9, dtype=logits.dtype)
    noise.scatter_(-1, ids.unsqueeze(-1), 1.0)
    _, ours, _, probs = ops.grin_route(
        logits, jitter_eps=jitter_eps, training=True, noise=noise, return_probs=True
    )
    assert torch.equal(ours.long(), ids), "the noise did not force the picks"
    return weights / probs


@pytest.mark.parametrize("jitter_eps", [0.01, 0.1, 0.3])
def test_training(jitter_eps):
    """Picks and m are read back from their result; p and the gradient given those must be ours."""
    draw = Draw("training")
    logits = draw.normal(5_000, 16, dtype=torch.float64, scale=0.3, shift=1.0).requires_grad_()
    expected, chosen = sparsemixer(logits, jitter_eps, training=True)
    upstream = draw.normal(5_000, 2, dtype=torch.float64)
    (theirs,) = torch.autograd.grad(expected, logits, upstream)

    m = _choices(expected.detach(), logits.detach(), chosen, jitter_eps)
    reduced = m < 0.9
    # 0.3333 and 0.3333 + 0.6667 in float64, where ours are exactly 1/3 and 1.
    known = torch.where(reduced, 0.3333, 0.3333 + 0.6667).double()
    assert_close_to_reference("m", m, known)
    assert reduced.any()

    ours = torch.ops.fastlm.grin_route_backward(
        upstream, logits.detach(), chosen.int(), jitter_eps=jitter_eps, training=True, estimator="v2"
    )
    assert_close_to_reference("dz", ours, theirs)
    assert ours.abs().sum() > 0
