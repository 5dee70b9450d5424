"""The mixture-of-experts layer: against its formulas written out, in training, in evaluation and in odd company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fastlm.layers import GrinMoE
from tests.support.experts import dense_experts, plain_experts
from tests.support.tolerance import assert_close_to_reference

SIZE, INNER, EXPERTS, TOKENS = 24, 20, 6, 50
ESTIMATORS = ("v2", "v2_star", "v1", "topk")


def make(dtype: torch.dtype = torch.float32, **options: Any) -> GrinMoE:
    """A layer whose routers are undecided enough that several experts survive their mask."""
    torch.manual_seed(0)
    options = {"router_jitter_noise": 0.3, "input_jitter_noise": 0.0, **options}
    return GrinMoE(SIZE, INNER, EXPERTS, dtype=dtype, **options)


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (TOKENS,)), SIZE, generator=generator, dtype=torch.float64).to(dtype)


def gradients(layer: GrinMoE, y: Tensor, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    named = {"x": x, **dict(layer.named_parameters())}
    return dict(zip(named, torch.autograd.grad(y, list(named.values()), upstream), strict=True))


def survivors_softmax(logits: Tensor, ids: Tensor, jitter_eps: float, temperature: float = 1.0) -> Tensor:
    """`p[D]` of each pick, differentiable in the logits, by the words of `fastlm.ops.grin_route`."""
    left, probs = logits, []
    for pick in ids.long().split(1, dim=1):
        largest = left.detach().amax(-1, keepdim=True)
        far = (largest - logits.detach()) / torch.maximum(logits.detach().abs(), largest) > 2 * jitter_eps
        probs.append((left.masked_fill(far, -torch.inf) / temperature).softmax(-1).gather(1, pick))
        left = left.scatter(1, pick, -torch.inf)
    return torch.cat(probs, dim=1)


# Names and values


def test_names_shapes_and_description():
    layer = make()
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "router.weight": (EXPERTS, SIZE),
        "experts.gate_up_proj": (EXPERTS, 2 * INNER, SIZE),
        "experts.down_proj": (EXPERTS, SIZE, INNER),
    }
    assert layer.num_experts == EXPERTS
    assert "num_experts_per_tok=2, estimator=v2" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("training", [True, False])
def test_output_is_the_weighted_sum_of_what_was_picked(dtype, estimator, training):
    layer, x = make(dtype, estimator=estimator).train(training), tokens(dtype=dtype)
    y, routing = layer.forward_with_routing(x)
    weights = layer.experts.gate_up_proj, layer.experts.down_proj
    picks = routing.topk_ids, routing.topk_weights
    exact = dense_experts(x.double(), *(w.double() for w in weights), picks[0], picks[1].double())
    assert y.dtype == dtype
    assert_close_to_reference("y", y, exact, plain_experts(x, *weights, *picks))
    assert routing.topk_weights.dtype == routing.router_logits.dtype
    assert routing.router_logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact_logits = x.double() @ layer.router.weight.double().T
    assert_close_to_reference("logits", routing.router_logits, exact_logits)
    assert torch.equal(routing.expert_counts, routing.topk_ids.flatten().bincount(minlength=EXPERTS).int())


@pytest.mark.parametrize("shape", [(TOKENS,), (5, 10), (5, 2, 5)])
def test_leading_dimensions_do_not_matter(shape):
    layer, x = make().eval(), tokens()
    assert torch.equal(layer(x.view(*shape, SIZE)), layer(x).view(*shape, SIZE))
    spread = torch.zeros(*shape, 2 * SIZE)[..., ::2]
    spread.copy_(x.view(*shape, SIZE))
    assert torch.equal(layer(spread), layer(x).view(*shape, SIZE))
    assert torch.equal(layer(x[3]), layer(x[3:4])[0])


def test_topk_is_the_normalised_softmax_of_the_largest():
    """As Mixtral and GShard weigh their experts, in training and in evaluation."""
    layer, x = make(torch.float64, estimator="topk", num_experts_per_tok=3), tokens(dtype=torch.float64)
    expected = torch.zeros_like(x)
    for t, logits in enumerate(x @ layer.router.weight.T):
        chosen = logits.argsort(descending=True)[:3]
        odds = logits[chosen].exp()
        for share, e in zip(odds / odds.sum(), chosen.tolist(), strict=True):
            gate, up = (layer.experts.gate_up_proj[e] @ x[t]).chunk(2)
            expected[t] += share * (layer.experts.down_proj[e] @ (gate * gate.sigmoid() * up))
    assert_close_to_reference("training", layer.train()(x), expected)
    assert torch.equal(layer.eval()(x), layer.train()(x))


# Gradients


@pytest.mark.parametrize("expert_grad", ["full", "straight_through"])
@pytest.mark.parametrize(
    ("estimator", "factor", "temperature"), [("v2", 1, 1.0), ("v2_star", 2, 2.0), ("v1", 2, 1.0)]
)
def test_gradients_are_those_of_the_closed_form(estimator, factor, temperature, expert_grad):
    """`full`: experts are differentiated with what they were multiplied with; `straight_through`: with p, as in Algorithm 1."""
    layer = make(torch.float64, estimator=estimator, expert_grad=expert_grad).train()
    x = tokens(dtype=torch.float64).requires_grad_()
    upstream = tokens(dtype=torch.float64, seed=2)
    y, routing = layer.forward_with_routing(x)
    ids, used = routing.topk_ids, routing.topk_weights.detach()
    p = survivors_softmax(x @ layer.router.weight.T, ids, 0.3, temperature)
    assert (used < p.detach() * 0.9).any()
    assert (used > p.detach() * 0.9).any()

    experts = layer.experts.gate_up_proj, layer.experts.down_proj
    for_router = used + factor * temperature / (2 if estimator == "v2_star" else 1) * (p - p.detach())
    whole = dense_experts(x, *experts, ids, for_router)
    if expert_grad == "straight_through":
        scale = 2 if estimator == "v2_star" else 1
        # the router sees the outputs as they are, the experts are told that they counted for p
        router_only = dense_experts(x.detach(), *(w.detach() for w in experts), ids, for_router)
        experts_only = dense_experts(x, *experts, ids, scale * p.detach())
        whole = router_only + experts_only - experts_only.detach()
    assert_close_to_reference("y", y, whole)
    expected = gradients(layer, whole, x, upstream)
    for name, got in gradients(layer, y, x, upstream).items():
        assert_close_to_reference(f"d{name}", got, expected[name])
        assert got.abs().sum() > 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_of_the_weights_in_evaluation_is_that_of_the_forward_pass(estimator):
    layer = make(torch.float64, estimator=estimator, expert_grad="straight_through").eval()
    x = tokens(6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


# Training and evaluation


def test_training_samples_and_evaluation_does_not():
    layer, x = make(), tokens()
    layer.eval()
    before = torch.get_rng_state()
    first = layer.forward_with_routing(x)[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.topk_ids, layer.forward_with_routing(x)[1].topk_ids)
    assert torch.equal(first.topk_ids[:, 0].long(), first.router_logits.argmax(-1))
    layer.train()
    torch.manual_seed(3)
    drawn = [layer.forward_with_routing(x)[1].topk_ids for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(layer.forward_with_routing(x)[1].topk_ids, drawn[0])
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("jitter_experts", [False, True])
def test_a_checkpointed_layer_draws_the_same_again(use_reentrant, jitter_experts):
    layer = make(input_jitter_noise=0.3, jitter_experts=jitter_experts).train()
    upstream = tokens(seed=2)

    def run(call: Any) -> list[Tensor]:
        torch.manual_seed(7)
        layer.zero_grad()
        x = tokens().requires_grad_()
        y = call(x)
        torch.rand(3)  # what others draw before the backward pass does not matter
        y.backward(upstream)
        return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]

    kept = run(layer)
    again = run(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_gradients_have_the_same_bits_in_every_run():
    layer, upstream = make(input_jitter_noise=0.1).train(), tokens(400, seed=2)
    runs = []
    for _ in range(3):
        torch.manual_seed(5)
        x = tokens(400).requires_grad_()
        runs.append(gradients(layer, layer(x), x, upstream))
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in other)


# Input jitter


@pytest.mark.parametrize("jitter_experts", [False, True])
def test_jitter_is_on_a_copy_and_for_the_router_only_unless_asked(jitter_experts):
    layer = make(input_jitter_noise=0.2, jitter_experts=jitter_experts)
    seen: list[Tensor] = []
    layer.experts.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    powers = torch.randint(-2, 3, (TOKENS, SIZE)).float().exp2()  # products with them are exact
    x = (powers * tokens().sign()).requires_grad_()  # a leaf: writing into it would raise
    before, version = x.detach().clone(), x._version
    y, routing = layer.train().forward_with_routing(x)
    y.sum().backward()
    assert torch.equal(x.detach(), before)
    assert x._version == version
    assert x.grad.isfinite().all()

    ratio = seen[0] / before
    if jitter_experts:
        assert ((ratio >= torch.tensor(0.8)) & (ratio <= torch.tensor(1.2))).all()
        assert ratio.min() < 0.85
        assert ratio.max() > 1.15
        noisy = seen[0] @ layer.router.weight.T  # the router saw the very same numbers
        assert_close_to_reference("logits", routing.router_logits, noisy.double(), noisy)
    else:
        assert torch.equal(seen[0], before)
    clean = layer.eval().forward_with_routing(x)[1].router_logits
    moved = (routing.router_logits - clean).abs()
    assert (moved < 0.25 * before.abs() @ layer.router.weight.abs().T).all()
    assert (moved > 0).all()
    assert torch.equal(seen[1], before), "evaluation adds no noise"


# Valid tokens


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("training", [True, False])
def test_skipped_tokens_give_zero_and_are_not_counted(estimator, training):
    options = {"expert_grad": "straight_through", "input_jitter_noise": 0.1}
    layer = make(torch.float64, estimator=estimator, **options).train(training)
    x = tokens(5, 10, dtype=torch.float64)
    valid = torch.rand(5, 10) < 0.6
    valid[2] = False
    poisoned = torch.where(valid.unsqueeze(-1), x, torch.nan)

    def run(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Any, dict[str, Tensor]]:
        torch.manual_seed(4)
        x = x.clone().requires_grad_()
        y, routing = layer.forward_with_routing(x, valid=mask)
        upstream = tokens(5, 10, dtype=torch.float64, seed=2) * valid.unsqueeze(-1)
        return y.detach(), routing, gradients(layer, y, x, upstream)

    whole, every, whole_grads = run(x, None)
    y, routing, grads = run(x, valid)
    assert (y[~valid] == 0).all()
    assert_close_to_reference("y", y[valid], whole[valid])
    flat = valid.flatten()
    assert (routing.topk_ids[~flat] == -1).all()
    assert (routing.topk_weights[~flat] == 0).all()
    assert torch.equal(routing.topk_ids[flat], every.topk_ids[flat])
    assert torch.equal(
        routing.expert_counts, every.topk_ids[flat].flatten().bincount(minlength=EXPERTS).int()
    )
    assert (grads["x"][~valid] == 0).all()
    for name, got in grads.items():
        assert_close_to_reference(f"d{name}", got, whole_grads[name])

    same, again, same_grads = run(poisoned, valid)
    assert torch.equal(same, y)
    assert torch.equal(again.expert_counts, routing.expert_counts)
    assert all(torch.equal(same_grads[name], got) for name, got in grads.items())


@pytest.mark.parametrize("estimator", ["v2", "topk"])
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_no_tokens(shape, estimator):
    layer = make(estimator=estimator, input_jitter_noise=0.1).train()
    x = torch.zeros(*shape, SIZE, requires_grad=True)
    for valid in (None, torch.ones(shape, dtype=torch.bool)):
        y, routing = layer.forward_with_routing(x, valid=valid)
        assert y.shape == x.shape
        assert routing.expert_counts.tolist() == [0] * EXPERTS
        y.sum().backward()
    assert x.grad.shape == x.shape
    assert all((p.grad == 0).all() for p in layer.parameters())


# Mixed precision and compilation


def test_autocast_rounds_the_experts_and_not_the_router():
    layer, x = make().train(), tokens()
    torch.manual_seed(2)
    full = layer.forward_with_routing(x)[1]
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer.forward_with_routing(x)
    assert torch.equal(routing.router_logits, full.router_logits)
    assert torch.equal(routing.topk_ids, full.topk_ids)
    assert y.dtype == torch.bfloat16
    experts = layer.experts.gate_up_proj, layer.experts.down_proj
    picks = routing.topk_ids, routing.topk_weights
    exact = dense_experts(x.double(), *(w.double() for w in experts), picks[0], picks[1].double())
    rounded = (t.to(torch.bfloat16) for t in (x, *experts))
    assert_close_to_reference("y", y, exact, plain_experts(*rounded, *picks))
    y.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("estimator", ["v2", "topk"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_compiled_without_graph_breaks(estimator, masked, training):
    layer = make(estimator=estimator, input_jitter_noise=0.1).train(training)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (TOKENS, 31):
        valid = torch.arange(count) % 3 > 0 if masked else None
        upstream, results = tokens(count, seed=2), []
        for call in (layer, compiled):
            torch.manual_seed(6)
            x = tokens(count).requires_grad_()
            y = call(x, valid=valid)
            results.append([y.detach(), *gradients(layer, y, x, upstream).values()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_can_be_made_on_meta_and_filled_later():
    layer = make(device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    for weight in (layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
        bound = weight.shape[-1] ** -0.5
        assert 0.9 * bound < weight.abs().max() <= bound


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 1}, "num_experts must be at least 2, got 1"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be between 1 and 4, got 0"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok must be between 1 and 4, got 5"),
        ({"num_experts": 20, "num_experts_per_tok": 9}, "num_experts_per_tok must be between 1 and 8, got 9"),
        ({"estimator": "v3"}, "estimator must be one of v2, v2_star, v1, topk, got 'v3'"),
        ({"expert_grad": "half"}, "expert_grad must be one of full, straight_through, got 'half'"),
        ({"router_jitter_noise": -0.1}, r"router_jitter_noise must be in \[0, 1\), got -0.1"),
        ({"input_jitter_noise": 1.0}, r"input_jitter_noise must be in \[0, 1\), got 1.0"),
        ({"input_jitter_noise": float("nan")}, r"input_jitter_noise must be in \[0, 1\), got nan"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"GrinMoE: {message}"):
        GrinMoE(8, 12, **{"num_experts": 4, **options})


@pytest.mark.parametrize("estimator", ["v2", "topk"])
def test_masks_that_do_not_fit(estimator):
    layer = make(estimator=estimator)
    with pytest.raises(ValueError, match=r"GrinMoE: valid must have shape \(5, 10\), got \(50,\)"):
        layer(tokens(5, 10), valid=torch.ones(50, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"GrinMoE: valid must have shape \(50,\), got \(1,\)"):
        layer(tokens(), valid=torch.ones(1, dtype=torch.bool))


def test_an_unknown_activation_is_refused_by_the_operator():
    with pytest.raises(ValueError, match="activation must be"):
        make(activation="tanh")(tokens())


def test_closeness_of_an_evaluation_in_one_go_and_token_by_token():
    layer, x = make(torch.float64).eval(), tokens(dtype=torch.float64)
    assert_close(torch.cat([layer(row) for row in x.split(1)]), layer(x))
