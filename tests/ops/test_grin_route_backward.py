"""The gradient of grin_route: its closed form, the estimator's expectation by enumeration and by sampling.

The expectations are those of one pick given the ones before it: the estimator takes no account of how an earlier
pick changes a later one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastlm import ops, reference
from tests.support import conformance, samples, strategies
from tests.support.conformance import assert_gradients_match_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.grin_route import crowded, uniform
from tests.support.tolerance import assert_close_to_reference

ROUTE = samples.of("grin_route")
# Scale of the logits in p, probability that a pick keeps its weight, factor otherwise, factor of the gradient.
ESTIMATORS = {
    "v2": (1.0, 1 / 4, 1 / 3, 1.0),
    "v2_star": (0.5, 5 / 8, 1 / 3, 2.0),
    "v1": (1.0, 1 / 2, 1 / 2, 2.0),
}
F64 = torch.float64


def weights_of(function: Any) -> Any:
    return lambda *args, **kwargs: function(*args, **kwargs)[0]


# ---- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ROUTE, ids=str)
def test_gradients(sample, device):
    assert_gradients_match_reference(
        weights_of(ops.grin_route), weights_of(reference.grin_route), sample.build(device)
    )


def masked_softmax(z: Tensor, picked: list[int], jitter_eps: float, scale: float = 1.0) -> Tensor:
    """p of one token, written out: nothing of the reference is used."""
    top = max(float(z[i]) for i in range(len(z)) if i not in picked)
    kept = [
        i
        for i in range(len(z))
        if i not in picked
        and not (
            max(abs(float(z[i])), top) > 0 and (top - z[i]) / max(abs(float(z[i])), top) > 2 * jitter_eps
        )
    ]
    p = torch.zeros_like(z)
    p[kept] = torch.softmax(scale * z[kept], 0)
    return p


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_closed_form(estimator, training):
    """dz = sum over picks of c G p[D] (onehot(D) - p), whatever became of the weight."""
    draw = Draw("closed form")
    logits, jitter_eps = crowded(draw, 40, 7, F64), 0.05
    scale, _, _, factor = ESTIMATORS[estimator] if training else (1.0, 0, 0, 1.0)
    leaf = logits.clone().requires_grad_()
    options = {"top_k": 3, "jitter_eps": jitter_eps, "training": training, "estimator": estimator}
    weights, ids, _ = ops.grin_route(leaf, noise=uniform(draw, 40, 3, 8), **options)
    upstream = draw.normal(40, 3, dtype=F64)
    (found,) = torch.autograd.grad(weights, leaf, upstream)
    expected = torch.zeros_like(logits)
    for t, j in product(range(40), range(3)):
        chosen = int(ids[t, j])
        p = masked_softmax(logits[t], ids[t, :j].tolist(), jitter_eps, scale)
        onehot = torch.zeros(7, dtype=F64)
        onehot[chosen] = 1
        expected[t] += scale * factor * upstream[t, j] * p[chosen] * (onehot - p)
    assert_close_to_reference("dz", found, expected)


@given(draw=strategies.draws(), dtype=strategies.dtypes(), training=st.booleans())
def test_a_row_of_gradients_sums_to_zero(draw, dtype, training):
    """A softmax does not see a shift; a single survivor has gradient exactly 0."""
    logits = draw.normal(60, 16, dtype=dtype).requires_grad_()
    weights, _, _, probs = ops.grin_route(logits, training=training, return_probs=True)
    (gradient,) = torch.autograd.grad(weights.sum(), logits)
    alone = (probs == 1).all(-1)
    assert alone.any()
    assert (gradient[alone] == 0).all()
    rows = gradient.double().sum(-1)
    assert_close_to_reference("sum", rows + 1, torch.ones_like(rows), dtype=dtype)


def test_only_the_weights_have_a_gradient():
    logits = crowded(Draw("differentiable"), 9, 4).requires_grad_()
    outputs = ops.grin_route(logits, training=True, return_probs=True)
    assert [t.requires_grad for t in outputs] == [True, False, False, False]


def test_padding_has_no_gradient_and_is_not_read():
    logits, valid = crowded(Draw("padding"), 50, 8), torch.arange(50) % 3 > 0
    logits[~valid] = torch.nan
    leaf = logits.requires_grad_()
    weights, _, _ = ops.grin_route(leaf, jitter_eps=0.1, valid=valid)
    upstream = torch.where(valid.unsqueeze(-1), 1.0, torch.nan).expand(50, 2)
    (gradient,) = torch.autograd.grad(weights, leaf, upstream)
    assert (gradient[~valid] == 0).all()
    assert gradient[valid].isfinite().all()


def test_upstream_gradients_that_are_not_numbers_stay_visible():
    logits = Draw("upstream").normal(40, 8).requires_grad_()
    upstream = torch.zeros(40, 2)
    upstream[3, 1] = torch.nan
    upstream[20, 0] = torch.inf
    weights, _, _ = ops.grin_route(logits)
    (gradient,) = torch.autograd.grad(weights, logits, upstream)
    assert gradient[[3, 20]].isnan().any(-1).all()
    assert gradient[[t for t in range(40) if t not in (3, 20)]].isfinite().all()


# ---- the estimator --------------------------------------------------------------------------------------

# Polynomials f of degree 3 and 2 with derivatives; what stands for the network after the layer.
Network = tuple[Callable[[Any], Any], Callable[[Any], Any]]
CUBIC: Network = (lambda h: 0.7 - 1.1 * h + 0.6 * h**2 + 0.9 * h**3, lambda h: -1.1 + 1.2 * h + 2.7 * h**2)
SQUARE: Network = (lambda h: 0.7 - 1.1 * h + 0.6 * h**2, lambda h: -1.1 + 1.2 * h)
# Of v2 the multiplier is a constant inside f; of the others it is not. v1's rule is exact to degree 2.
NETWORKS = {"v2": CUBIC, "v2_star": CUBIC, "v1": SQUARE}
LOGITS = torch.tensor([1.0, 1.3, 0.8, 1.25, -3.0], dtype=F64)  # the last one does not survive
SCALARS = torch.tensor([0.5, -1.2, 2.0, 0.3, 5.0], dtype=F64)  # what each expert gives
JITTER = 0.3


def objective_gradient(estimator: str, picked: list[int]) -> Tensor:
    """Of the expected loss, by autograd: sum_i p[i] f(h[i]), h = p E."""
    f, _ = NETWORKS[estimator]
    z = LOGITS.clone().requires_grad_()
    top = masked_softmax(LOGITS, picked, JITTER) > 0
    p = torch.softmax((ESTIMATORS[estimator][0] * z).masked_fill(~top, -torch.inf), 0)
    inner = p.detach() if estimator == "v2" else p
    (gradient,) = torch.autograd.grad((p * f(inner * SCALARS)).sum(), z)
    return gradient


def routed(estimator: str, forced: list[int], keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaf, weights, ids and probabilities of one token whose picks are `forced` by the noise."""
    noise = torch.full((1, len(forced), 6), 0.5, dtype=F64)
    noise[..., 5] = 0.0 if keep else 1.0
    for j, expert in enumerate(forced):
        noise[0, j, expert] = 1.0
    leaf = LOGITS[None].clone().requires_grad_()
    weights, ids, _, probs = ops.grin_route(
        leaf,
        top_k=len(forced),
        jitter_eps=JITTER,
        training=True,
        estimator=estimator,
        noise=noise,
        return_probs=True,
    )
    assert ids[0].tolist() == forced
    return leaf, weights[0, -1], ids, probs[0, -1]


def enumerated(estimator: str, earlier: list[int], *, override: bool) -> Tensor:
    """The mean of the operator's gradient over every outcome of the last pick."""
    scale, keep_one, reduced, _ = ESTIMATORS[estimator]
    _, derivative = NETWORKS[estimator]
    p = masked_softmax(LOGITS, earlier, JITTER, scale)
    total = torch.zeros_like(LOGITS)
    for chosen, keep in product(p.nonzero().flatten().tolist(), (True, False)):
        leaf, weight, _, prob = routed(estimator, [*earlier, chosen], keep)
        m = 1.0 if keep or (override and chosen == int(p.argmax())) else reduced
        if override:
            assert_close_to_reference("weight", weight, m * prob)
        G = derivative(m * prob.detach() * SCALARS[chosen]) * SCALARS[chosen]
        (gradient,) = torch.autograd.grad(weight, leaf, G)
        total += p[chosen] * (keep_one if keep else 1 - keep_one) * gradient[0]
    return total


@pytest.mark.parametrize("earlier", [[], [1], [0], [3, 1]], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_mean_over_all_outcomes_is_the_gradient(estimator, earlier):
    """Given the earlier picks, and without the exception for the largest expert."""
    found = enumerated(estimator, earlier, override=False)
    assert_close_to_reference("mean", found, objective_gradient(estimator, earlier))


@pytest.mark.parametrize("earlier", [[], [1]], ids=str)
def test_the_bias_of_the_exception_for_the_largest(earlier):
    """p_a (f'(h_a) h_a - (f(h_a) - f(0))) (onehot(a) - p), a the largest, and nothing else."""
    f, derivative = CUBIC
    p = masked_softmax(LOGITS, earlier, JITTER)
    a = int(p.argmax())
    h = p[a] * SCALARS[a]
    onehot = torch.zeros_like(p)
    onehot[a] = 1
    bias = p[a] * (derivative(h) * h - (f(h) - f(0.0))) * (onehot - p)
    found = enumerated("v2", earlier, override=True)
    assert_close_to_reference("mean", found, objective_gradient("v2", earlier) + bias)


# ---- sampling -------------------------------------------------------------------------------------------

TOKENS = 300_000
# A frequency or mean of independent draws lies within 5 standard errors of its expectation but once in 1.7 million.
SIGMAS = 5.0


def assert_frequency(hits: Tensor, probability: float, what: str) -> None:
    """A binomial count has variance n q (1 - q)."""
    n = hits.numel()
    deviation = abs(float(hits.sum()) - n * probability)
    assert deviation <= SIGMAS * (n * probability * (1 - probability)) ** 0.5, (
        f"{what}: {hits.double().mean()}"
    )


@pytest.fixture(params=list(ESTIMATORS))
def sampled(request) -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
    """Estimator, leaf, weights, ids and probabilities of many tokens with the same logits."""
    leaf = LOGITS.float().expand(TOKENS, 5).clone().requires_grad_()
    options = {"jitter_eps": JITTER, "training": True, "return_probs": True, "estimator": request.param}
    weights, ids, counts, probs = ops.grin_route(leaf, seed=torch.tensor([2024]), **options)
    assert int(counts.sum()) == 2 * TOKENS
    return request.param, leaf, weights, ids, probs


def test_frequencies_of_picks(sampled):
    """Of the first pick, of ordered pairs, and of equal neighbours, which independent tokens have now and then."""
    estimator, _, _, ids, _ = sampled
    scale = ESTIMATORS[estimator][0]
    first = masked_softmax(LOGITS, [], JITTER, scale)
    for d1 in range(4):
        assert_frequency(ids[:, 0] == d1, float(first[d1]), f"first {d1}")
    for d1, d2 in permutations(range(4), 2):
        second = masked_softmax(LOGITS, [d1], JITTER, scale)
        pair = (ids[:, 0] == d1) & (ids[:, 1] == d2)
        assert_frequency(pair, float(first[d1] * second[d2]), f"pair {d1}, {d2}")
    assert not (ids == 4).any()
    neighbours = ids[0::2, 0] == ids[1::2, 0]
    assert_frequency(neighbours, float(first.square().sum()), "neighbours")


def test_frequencies_of_whole_weights(sampled):
    """A pick beside the largest keeps its weight as often as the estimator says, and alike for each expert."""
    estimator, _, weights, ids, probs = sampled
    _, keep_one, _, _ = ESTIMATORS[estimator]
    assert (weights == probs)[ids[:, 0] == 1, 0].all()  # expert 1 is the largest
    for expert in (0, 2, 3):
        of_it = ids[:, 0] == expert
        assert_frequency((weights == probs)[of_it, 0], keep_one, f"whole weight of {expert}")


def test_mean_gradient_of_the_first_pick(sampled):
    """Within the standard error, which is measured, of what enumeration gives."""
    estimator, leaf, weights, ids, _ = sampled
    _, derivative = NETWORKS[estimator]
    given_out = SCALARS.float()[ids[:, 0].long()]
    G = torch.zeros_like(weights)
    G[:, 0] = derivative(weights[:, 0].detach() * given_out) * given_out
    (gradient,) = torch.autograd.grad(weights, leaf, G)
    mean, deviation = gradient.double().mean(0), gradient.double().std(0)
    expected = enumerated(estimator, [], override=True)
    assert ((mean - expected).abs() <= SIGMAS * deviation / TOKENS**0.5).all(), (mean, expected)
    assert (deviation[:4] > 0).all()


# ---- errors ---------------------------------------------------------------------------------------------

_Z, _IDS, _G = torch.zeros(5, 4), torch.zeros(5, 2, dtype=torch.int32), torch.zeros(5, 2)
_OPTIONS = {"jitter_eps": 0.01, "training": True, "estimator": "v2"}
BAD_CALLS = [
    ("ids_dim", (_G, _Z, _IDS[0]), {}, "topk_ids must have shape (T, k), got (2,)"),
    ("ids_tokens", (_G, _Z, _IDS[:4]), {}, "topk_ids must have shape (5, 2), got (4, 2)"),
    (
        "ids_picks",
        (_G, _Z, _IDS.repeat(1, 3)),
        {},
        "topk_ids must have shape (T, k) with k from 1 to 4, got (5, 6)",
    ),
    ("ids_dtype", (_G, _Z, _IDS.long()), {}, "topk_ids must have dtype int32, got int64"),
    ("gradient_shape", (_G[:, :1], _Z, _IDS), {}, "dtopk_weights must have shape (5, 2), got (5, 1)"),
    ("gradient_dtype", (_G.bfloat16(), _Z, _IDS), {}, "dtopk_weights must have dtype float32, got bfloat16"),
    ("gradient_double", (_G, _Z.double(), _IDS), {}, "dtopk_weights must have dtype float64, got float32"),
    ("experts", (_G, _Z[:, :1], _IDS), {}, "(T, E) with at least 2 experts, got (5, 1)"),
    ("estimator", (_G, _Z, _IDS), {"estimator": ""}, "estimator must be 'v2', 'v2_star' or 'v1', got ''"),
    ("jitter", (_G, _Z, _IDS), {"jitter_eps": -1.0}, "jitter_eps must not be negative, got -1"),
]


@pytest.mark.parametrize(
    ("args", "options", "text"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS]
)
def test_errors(args, options, text):
    conformance.assert_same_error(
        torch.ops.fastlm.grin_route_backward, Call(args, _OPTIONS | options), ValueError, text
    )


@pytest.mark.host_values
@pytest.mark.parametrize("bad", [4, -2, 2**31 - 1, -(2**31)])
def test_errors_in_ids(bad):
    ids = _IDS.clone()
    ids[3, 1] = bad
    text = f"grin_route_backward: topk_ids must be in [0, 4) or -1, got {bad} at (3, 1)"
    call = Call((_G, _Z, ids), _OPTIONS)
    conformance.assert_same_error(torch.ops.fastlm.grin_route_backward, call, IndexError, text, on_meta=False)


def test_ids_that_no_routing_gives_are_harmless():
    """The same expert twice, or one that does not survive, has probability 0 and no gradient."""
    logits = torch.tensor([[1.0, 1.01, -4.0, 0.9]] * 3)
    ids = torch.tensor([[1, 1], [2, -1], [-1, 0]], dtype=torch.int32)
    found = torch.ops.fastlm.grin_route_backward(torch.ones(3, 2), logits, ids, **_OPTIONS)
    once = torch.tensor([[1, -1], [-1, -1], [0, -1]], dtype=torch.int32)
    expected = torch.ops.fastlm.grin_route_backward(torch.ones(3, 2), logits, once, **_OPTIONS)
    assert torch.equal(found, expected)
    assert found[0].abs().sum() > 0
