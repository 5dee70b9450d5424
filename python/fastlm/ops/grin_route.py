"""GRIN's router: which experts a token goes to, with which weights, and the gradient of that choice; balance loss."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastlm import _ops

Estimator = Literal["v2", "v2_star", "v1"]
ShareSource = Literal["dispatched", "topk"]


@overload
def grin_route(
    router_logits: Tensor,
    *,
    top_k: int = ...,
    jitter_eps: float = ...,
    training: bool = ...,
    estimator: Estimator = ...,
    noise: Tensor | None = ...,
    seed: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    valid: Tensor | None = ...,
    return_probs: Literal[False] = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def grin_route(
    router_logits: Tensor,
    *,
    top_k: int = ...,
    jitter_eps: float = ...,
    training: bool = ...,
    estimator: Estimator = ...,
    noise: Tensor | None = ...,
    seed: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    valid: Tensor | None = ...,
    return_probs: bool = ...,
) -> tuple[Tensor, ...]: ...
def grin_route(
    router_logits: Tensor,
    *,
    top_k: int = 2,
    jitter_eps: float = 0.01,
    training: bool = False,
    estimator: Estimator = "v2",
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    valid: Tensor | None = None,
    return_probs: bool = False,
) -> tuple[Tensor, ...]:
    """Experts and weights of each token, sampled in training, with a gradient for the choice: SparseMixer, the router of GRIN.

    Picks come one after the other, without replacement. For pick j, over the experts left, `z* = max z`; expert i survives unless
    `(z* - z[i]) / max(|z[i]|, z*) > 2 * jitter_eps`; p is the softmax of z over the survivors. In eval `D = argmax z` and the
    weight is `p[D]`. In training `D ~ p` and the weight is `m * p[D]`, where m = 1 if D is the argmax, else 1 with probability 1/4
    and 1/3 otherwise. The gradient of a weight is `p[D] * (onehot(D) - p)`: m moves the point at which the loss is differentiated,
    and that makes the gradient of the sampled network a third-order estimate of the gradient of the expected one. Weights are not
    normalised: where one expert survives, its weight is 1.

    Args:
        router_logits: shape `(T, E)`, float32, bfloat16, float16 or float64, any strides; E at least 2.
        top_k: picks per token, 1 to 8 and at most E. The estimator is derived for each pick given the ones before it.
        jitter_eps: threshold of the mask, relative to the logits, not negative; 0 keeps exact maxima only.
        training: sample, reduce weights, and scale gradients as the estimator says.
        estimator: in training, `"v2"`: as above; `"v2_star"`: p is the softmax of `z / 2` over the same survivors, 5/8 instead of
            1/4, the gradient of p twice; `"v1"`: 1/2 instead of 1/4 and 1/2 instead of 1/3, the gradient twice. In eval all
            are the same.
        noise: shape `(T, k, E + 1)`, float32 (or float64 for float64), in `[0, 1]`: the draws of each pick's experts, then the one
            that decides about m. Only for training, which then depends on nothing else.
        seed: shape `(1,)`, int64, instead of noise: draws are computed in the kernel, by Philox, each from its own counter.
        generator: draws the seed if neither is given; default: torch's own of the device, which `torch.utils.checkpoint` replays.
            Not under `torch.compile`, which takes no generators: give a seed there.
        valid: shape `(T,)`, bool; the other tokens (padding) get ids -1, weights 0 and gradient 0, and are not counted.
        return_probs: also return `p[D]`.

    Returns:
        topk_weights: shape `(T, k)`, float32 (float64 for float64).
        topk_ids: shape `(T, k)`, int32, in `[0, E)` and distinct for each token, whatever the logits.
        expert_counts: shape `(E,)`, int32: how many picks each expert got.
        topk_probs: asked for; shape and dtype of `topk_weights`: `p[D]`, without gradient.

    Raises:
        ValueError: a shape, dtype or device does not fit, an option is out of range, or both noise and seed are given in training.

    Note:
        Computed in float32 (float64) from logits as they are; autocast casts nothing. Differentiable once in router_logits, through
        topk_weights. The backward pass keeps logits and ids only. Same bits for every number of threads; the same seed gives the
        same experts on every CPU level. A logit that is NaN counts as the largest; weights of a pick whose largest logit is NaN or
        infinite are NaN. A logit of -inf is never picked while a finite one is left.

    Source: Liu et al., arXiv 2409.12136, equations 2, 7 and 8, and their public code where it says more; "v1": arXiv 2310.00811.
        Factors are exact where that code has 0.3333.

    Example:
        >>> import torch, fastlm
        >>> weights, ids, counts = fastlm.ops.grin_route(torch.randn(6, 4), training=True)
        >>> ids.shape, int(counts.sum())
        (torch.Size([6, 2]), 12)
    """
    if training and noise is None and seed is None:
        seed = torch.randint(2**62, (1,), generator=generator, device=router_logits.device, dtype=torch.int64)
    weights, ids, counts, probs = _ops.grin_route(
        router_logits,
        noise,
        seed,
        valid,
        top_k=top_k,
        jitter_eps=jitter_eps,
        training=training,
        estimator=estimator,
    )
    return (weights, ids, counts, probs) if return_probs else (weights, ids, counts)


def load_balance_loss(
    router_logits: Tensor,
    expert_counts: Tensor | None,
    *,
    alpha: float,
    f_source: ShareSource = "dispatched",
    f_sum: float = 1.0,
    num_tokens: int | Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    valid: Tensor | None = None,
    top_k: int = 2,
) -> Tensor:
    """`alpha * E * sum_i f[i] * P[i]`: small when experts are used evenly.

    `P[i]` is the mean over tokens of `softmax(router_logits)[i]`, without mask. `f[i]` is the share of picks that went to expert i,
    times `f_sum`; it has no gradient. With a process group, f is that of all its processes and P that of this one: with gradients
    averaged over processes of equally many tokens, as in DDP, that is the loss of the whole batch.

    Args:
        router_logits: shape `(T, E)`, any floating dtype.
        expert_counts: shape `(E,)`, integer, as `grin_route` returns it; may be None with `f_source="topk"`.
        alpha: factor of the loss.
        f_source: `"dispatched"`: picks are `expert_counts`; `"topk"`: the `top_k` largest logits of each token, as in
            `load_balancing_loss_func` of transformers, whose loss this is with `f_sum=top_k`.
        f_sum: what the shares sum to, positive; even use gives the loss `alpha * f_sum`.
        num_tokens: what P divides by; default: the number of valid tokens of this process.
        group: process group over which picks are summed first (`torch.distributed.group.WORLD` for all); default: this process.
        valid: shape `(T,)`, bool; other tokens take no part. `expert_counts` must leave them out as well.
        top_k: picks per token with `f_source="topk"`.

    Returns:
        loss: scalar, float32 (float64 for float64); 0 with gradient 0 where there are no tokens.

    Raises:
        ValueError: unknown `f_source`, `f_sum` not positive, or a shape that does not fit.

    Note:
        A composition of torch calls, differentiable in router_logits.

    Source: Liu et al., arXiv 2409.12136, section 3.3; Fedus et al., arXiv 2101.03961, equation 4.

    Example:
        >>> import torch, fastlm
        >>> logits = torch.zeros(8, 4)
        >>> fastlm.ops.load_balance_loss(logits, torch.tensor([4, 4, 4, 4]), alpha=0.5)
        tensor(0.5000)
    """
    op = "load_balance_loss"
    if router_logits.dim() != 2:
        raise ValueError(f"{op}: router_logits must have shape (T, E), got {tuple(router_logits.shape)}")
    tokens, experts = router_logits.shape
    if f_source not in ("dispatched", "topk"):
        raise ValueError(f"{op}: f_source must be 'dispatched' or 'topk', got {f_source!r}")
    if not f_sum > 0:
        raise ValueError(f"{op}: f_sum must be positive, got {f_sum}")
    if valid is not None and valid.shape != (tokens,):
        raise ValueError(f"{op}: valid must have shape ({tokens},), got {tuple(valid.shape)}")
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    if valid is not None:  # what padding holds may not be a number
        logits = torch.where(valid.unsqueeze(-1), logits, 0.0)
    probs = torch.softmax(logits, dim=-1)
    counts = expert_counts
    if f_source == "topk":
        if not 1 <= top_k <= experts:
            raise ValueError(f"{op}: top_k must be from 1 to {experts}, got {top_k}")
        chosen = torch.zeros_like(probs, dtype=torch.int64).scatter_(
            -1, probs.detach().topk(top_k).indices, 1
        )
        counts = (chosen if valid is None else chosen * valid.unsqueeze(-1)).sum(0)
    elif counts is None or counts.shape != (experts,):
        found = "None" if counts is None else tuple(counts.shape)
        raise ValueError(f"{op}: expert_counts must have shape ({experts},), got {found}")
    if group is not None:
        counts = counts.to(torch.int64, copy=True)
        torch.distributed.all_reduce(counts, group=group)
    if valid is not None:
        probs = torch.where(valid.unsqueeze(-1), probs, 0.0)
    if num_tokens is None:
        num_tokens = tokens if valid is None else valid.sum()
    divisor = num_tokens.clamp(min=1) if isinstance(num_tokens, Tensor) else max(num_tokens, 1)
    shares = counts.to(probs.dtype) * (f_sum / counts.sum().clamp(min=1).to(probs.dtype))
    return alpha * experts * (shares * (probs.sum(0) / divisor)).sum()
