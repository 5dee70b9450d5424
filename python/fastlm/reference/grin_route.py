"""GRIN's router: which experts a token goes to, with which weights, and the gradient of that choice; balance loss."""

from __future__ import annotations

import torch
from torch import Tensor

# Of each estimator: scale of the logits in p, probability that a pick other than the largest keeps its weight,
# factor of the weight otherwise, factor of the gradient of p.
_ESTIMATORS = {
    "v2": (1.0, 1 / 4, 1 / 3, 1.0),
    "v2_star": (0.5, 5 / 8, 1 / 3, 2.0),
    "v1": (1.0, 1 / 2, 1 / 2, 2.0),
}


def grin_noise(seed: int, tokens: int, top_k: int, num_experts: int) -> Tensor:
    """The numbers that `grin_route(..., seed=seed)` draws, as the `noise` that gives the same result.

    Philox4x32-10 with the seed as its key. The draw `[t, j, i]` is word `i % 4` for the counter
    `(t, j, i // 4, 0)`, as an odd multiple of 2^-24: `(2 * (word >> 9) + 1) * 2^-24`.

    Args:
        seed: any int64.
        tokens: T.
        top_k: k.
        num_experts: E.

    Returns:
        noise: shape `(T, k, E + 1)`, float32, in the open interval (0, 1).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    blocks = (num_experts + 4) // 4
    shape = (tokens, top_k, blocks)
    places = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    words = philox([*places, torch.zeros(shape, dtype=torch.int64)], seed)
    draws = torch.stack(words, -1).flatten(2)[..., : num_experts + 1]
    return (((draws >> 9) * 2 + 1).double() * 2.0**-24).float()


def philox(counter: list[Tensor], seed: int) -> list[Tensor]:
    """Philox4x32-10: four words of 32 bits, as int64, for a counter of four words and a key of 64 bits."""
    mask = 0xFFFFFFFF

    def multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
        """High and low word of the product; in halves of b, since int64 is one bit short."""
        upper = a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)
        return upper >> 16, (a * b) & mask

    c0, c1, c2, c3 = counter
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        high0, low0 = multiply(c0, 0xD2511F53)
        high1, low1 = multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def grin_route(
    router_logits: Tensor,
    *,
    top_k: int = 2,
    jitter_eps: float = 0.01,
    training: bool = False,
    estimator: str = "v2",
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    valid: Tensor | None = None,
    return_probs: bool = False,
) -> tuple[Tensor, ...]:
    """Experts and weights of each token, with the estimator's gradient.

    Picks come one after the other, without replacement. For pick j, over the experts left::

        z*      = max of z
        keep i  unless (z* - z[i]) / max(|z[i]|, z*) > 2 * jitter_eps
        p[i]    = softmax of z over the experts kept, 0 elsewhere
        eval    D = argmax of z,                             weight = p[D]
        train   D = argmax over kept of z[i] - log(-log u[i]),  weight = m * p[D]

    with `u = noise[t, j, :E]`, and m = 1 if D is the argmax of z or `noise[t, j, E] < 1/4`, else 1/3. The gradient
    of a weight with respect to z is that of `p[D]`: neither m, nor the choice, nor the mask has one.
    In training, `"v2_star"` takes p from `z / 2`, 5/8 for 1/4, and twice the gradient; `"v1"` takes 1/2 for 1/4, 1/2
    for 1/3, and twice the gradient.

    Args:
        router_logits: shape `(T, E)`, E at least 2.
        top_k: picks per token, 1 to 8 and at most E.
        jitter_eps: threshold of the mask, relative to the logits; 0 keeps exact maxima only.
        training: sample, reduce weights, and scale gradients as the estimator says.
        estimator: `"v2"`, `"v2_star"` or `"v1"`; without training all are the same.
        noise: shape `(T, k, E + 1)` in `[0, 1]`.
        seed: shape `(1,)`, int64: the noise is `grin_noise(seed)`.
        generator: of the seed, where neither noise nor seed is given; default: torch's own.
        valid: shape `(T,)`, bool; other tokens get ids -1, weights 0 and gradient 0, and are not counted.
        return_probs: also return `p[D]`.

    Returns:
        topk_weights: shape `(T, k)`, float32 (float64 for float64).
        topk_ids: shape `(T, k)`, int32, distinct for each token.
        expert_counts: shape `(E,)`, int32: picks of each expert.
        topk_probs: asked for; shape and dtype of `topk_weights`, without gradient.

    Raises:
        ValueError: a shape or option does not fit.

    Note:
        A logit that is NaN counts as the largest. Weights of a pick whose largest logit is NaN or infinite are NaN.

    Source: Liu et al., arXiv 2409.12136, equations 2, 7 and 8; arXiv 2310.00811 for v1.
    """
    tokens, experts = router_logits.shape
    if not (experts >= 2 and 1 <= top_k <= min(8, experts)):
        raise ValueError(f"grin_route: top_k must be from 1 to {min(8, experts)}, got {top_k}")
    if estimator not in _ESTIMATORS:
        raise ValueError(f"grin_route: estimator must be 'v2', 'v2_star' or 'v1', got {estimator!r}")
    scale, keep_one, reduced, factor = _ESTIMATORS[estimator] if training else (1.0, 1.0, 1.0, 1.0)
    if training and noise is None:
        if seed is None:
            seed = torch.randint(2**62, (1,), generator=generator, device=router_logits.device)
        noise = grin_noise(int(seed), tokens, top_k, experts).to(router_logits.device)

    z = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    counted = torch.ones(tokens, dtype=torch.bool, device=z.device) if valid is None else valid
    z = torch.where(counted.unsqueeze(-1), z, 0.0)
    picked = torch.zeros_like(z, dtype=torch.bool)
    weights, ids, probs = [], [], []
    for j in range(top_k):
        top, kept = _survivors(z.detach(), picked, jitter_eps)
        p = torch.softmax((scale * z).masked_fill(~kept, -torch.inf), -1)
        if training:
            assert noise is not None
            chosen = _sample(z.detach(), top, kept, noise[:, j, :experts].to(z.dtype), scale)
            whole = (chosen == top) | (noise[:, j, experts:] < keep_one)
        else:
            chosen, whole = top, torch.ones_like(top, dtype=torch.bool)
        p_chosen = p.gather(-1, chosen)
        value = p_chosen.detach()
        weights.append(torch.where(whole, value, value * reduced) + factor * (p_chosen - value))
        probs.append(value)
        ids.append(chosen)
        picked = picked.scatter(-1, chosen, True)
    topk_weights, topk_probs = (
        torch.where(counted.unsqueeze(-1), torch.cat(t, -1), 0.0) for t in (weights, probs)
    )
    topk_ids = torch.where(counted.unsqueeze(-1), torch.cat(ids, -1), -1)
    counts = torch.bincount(topk_ids[counted].flatten(), minlength=experts).int()
    result = (topk_weights, topk_ids.int(), counts)
    return (*result, topk_probs) if return_probs else result


def _survivors(z: Tensor, picked: Tensor, jitter_eps: float) -> tuple[Tensor, Tensor]:
    """Index `(T, 1)` of the largest logit left, and which experts `(T, E)` the mask keeps."""
    left = z.masked_fill(picked, -torch.inf)
    largest = left.max(-1, keepdim=True).values
    # torch.max names NaN first, but takes a picked expert's -inf for as good as another's.
    is_largest = ((left == largest) | (left.isnan() & largest.isnan())) & ~picked
    top = is_largest.int().argmax(-1, keepdim=True)
    dropped = (largest - z) / z.abs().clamp(min=largest) > 2 * jitter_eps
    return top, ~dropped & ~picked


def _sample(z: Tensor, top: Tensor, kept: Tensor, u: Tensor, scale: float) -> Tensor:
    """Gumbel-max over the kept experts; where differences are not numbers, the largest logit wins."""
    info = torch.finfo(u.dtype)
    gumbel = -torch.log(-torch.log(u.nan_to_num(nan=0.0).clamp(info.tiny, 1 - info.eps / 2)))
    # Differences from the largest logit: large logits would round the noise away.
    gap = torch.where(kept, scale * (z - z.gather(-1, top)), -torch.inf).nan_to_num(nan=-torch.inf)
    gap = gap.scatter(-1, top, 0.0)
    return (gap + gumbel).argmax(-1, keepdim=True)


def load_balance_loss(
    router_logits: Tensor,
    expert_counts: Tensor | None,
    *,
    alpha: float,
    f_source: str = "dispatched",
    f_sum: float = 1.0,
    num_tokens: int | Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    valid: Tensor | None = None,
    top_k: int = 2,
) -> Tensor:
    """`alpha * E * sum_i f[i] * P[i]`: small when experts are used evenly.

    `P[i]` is the mean over tokens of `softmax(router_logits)[i]`, without mask. `f[i]` is the share of picks that went
    to expert i, times `f_sum`; it has no gradient.

    Args:
        router_logits: shape `(T, E)`.
        expert_counts: shape `(E,)`; not used with `f_source="topk"`.
        alpha: factor of the loss.
        f_source: `"dispatched"`: the picks are `expert_counts`; `"topk"`: the `top_k` largest logits.
        f_sum: what the shares sum to.
        num_tokens: what P divides by; default: the number of valid tokens.
        group: process group over which the picks are summed first; default: those of this process.
        valid: shape `(T,)`, bool; other tokens take no part.
        top_k: with `f_source="topk"`.

    Returns:
        loss: scalar, float32 (float64 for float64); 0 where there are no tokens.

    Raises:
        ValueError: an option does not fit.

    Source: Liu et al., arXiv 2409.12136, section 3.3; Fedus et al., arXiv 2101.03961, equation 4.
    """
    tokens, experts = router_logits.shape
    rows = range(tokens) if valid is None else [t for t in range(tokens) if valid[t]]
    z = router_logits[list(rows)].to(torch.promote_types(router_logits.dtype, torch.float32))
    probs = torch.softmax(z, -1)
    if f_source == "topk":
        counts = torch.bincount(probs.detach().topk(top_k).indices.flatten(), minlength=experts)
    elif f_source == "dispatched" and expert_counts is not None:
        counts = expert_counts.long()
    else:
        raise ValueError(f"load_balance_loss: f_source must be 'dispatched' or 'topk', got {f_source!r}")
    if group is not None:
        counts = counts.clone()
        torch.distributed.all_reduce(counts, group=group)
    shares = f_sum * counts.to(z.dtype) / counts.sum().clamp(min=1)
    divisor = len(rows) if num_tokens is None else num_tokens
    mean = probs.sum(0) / max(int(divisor), 1)
    return alpha * experts * (shares * mean).sum()
