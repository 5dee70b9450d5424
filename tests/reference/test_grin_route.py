"""The definition of the router against plain Python, token by token, and facts that follow from its source."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastlm.reference import grin_route
from fastlm.reference.grin_route import grin_noise
from tests.support.layouts import Draw
from tests.support.samples.grin_route import crowded, uniform

F64 = torch.float64
RULES = {"v2": (1.0, 0.25, 1 / 3), "v2_star": (0.5, 0.625, 1 / 3), "v1": (1.0, 0.5, 0.5)}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def route_one(
    z: list[float], noise: list[list[float]], jitter_eps: float, rule: tuple[float, float, float] | None
) -> tuple[list[int], list[float], list[float]]:
    """Ids, weights and probabilities of one token; no rule: eval."""
    ids: list[int] = []
    weights, probs = [], []
    scale, keep_one, reduced = rule or (1.0, 0.0, 0.0)
    for u in noise:
        left = [i for i in range(len(z)) if i not in ids]
        top = max(left, key=lambda i: z[i])  # the first of several
        kept = []
        for i in left:
            size = max(abs(z[i]), z[top])
            if not (size > 0 and (z[top] - z[i]) / size > 2 * jitter_eps):
                kept.append(i)
        chosen = top
        if rule:
            chosen = max(kept, key=lambda i, u=u: scale * z[i] - math.log(-math.log(u[i])))
        total = sum(math.exp(scale * (z[i] - z[top])) for i in kept)
        probs.append(math.exp(scale * (z[chosen] - z[top])) / total)
        whole = not rule or chosen == top or u[-1] < keep_one
        weights.append(probs[-1] * (1 if whole else reduced))
        ids.append(chosen)
    return ids, weights, probs


@pytest.mark.parametrize("jitter_eps", [0.0, 0.01, 0.05, 0.4])
@pytest.mark.parametrize("estimator", [None, *RULES])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_equals_plain_python(top_k, estimator, jitter_eps):
    draw = Draw("plain python")
    logits = torch.cat(
        [crowded(draw, 60, 9, F64), draw.normal(60, 9, dtype=F64), torch.zeros(2, 9, dtype=F64)]
    )
    noise = uniform(draw, len(logits), top_k, 10, dtype=F64)
    expected = [
        route_one(z.tolist(), u.tolist(), jitter_eps, RULES.get(estimator))
        for z, u in zip(logits, noise, strict=True)
    ]
    training = estimator is not None
    options = {"top_k": top_k, "jitter_eps": jitter_eps, "training": training, "estimator": estimator or "v2"}
    weights, ids, counts, probs = grin_route(logits, noise=noise, return_probs=True, **options)
    assert ids.tolist() == [row[0] for row in expected]
    close(weights, torch.tensor([row[1] for row in expected], dtype=F64))
    close(probs, torch.tensor([row[2] for row in expected], dtype=F64))
    assert counts.tolist() == [sum(e in row[0] for row in expected) for e in range(9)]


def test_without_training_the_gradient_is_that_of_the_weight():
    """Where no logit is near the mask's edge: p is differentiable, and nothing else is."""
    logits = torch.tensor([[1.0, 1.1, 0.95, -3.0], [2.0, 0.1, 1.9, 1.8]], dtype=F64).requires_grad_()
    for estimator in RULES:
        assert torch.autograd.gradcheck(
            lambda z, e=estimator: grin_route(z, jitter_eps=0.1, estimator=e)[0], logits
        )


def test_noise_has_the_range_and_the_mean_of_uniform_numbers():
    noise = grin_noise(42, 2000, 2, 16)
    assert noise.shape == (2000, 2, 17)
    assert float(noise.min()) > 0
    assert float(noise.max()) < 1
    # The mean of n uniform numbers has a standard error of 1 / sqrt(12 n).
    assert abs(float(noise.double().mean()) - 0.5) < 5 / math.sqrt(12 * noise.numel())
    assert torch.equal(grin_noise(42, 10, 1, 16), noise[:10, :1])
    assert torch.equal(grin_noise(42, 10, 2, 7)[..., :7], noise[:10, :, :7])
    assert len(noise.unique()) > 0.99 * noise.numel()
