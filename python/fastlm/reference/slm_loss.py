"""Losses of a linear head: per token, reduced, and of selected tokens only."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float = 0.0,
    return_lse: bool = False,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Negative log-likelihood of each token's label under a linear head.

    Per token, over the vocabulary::

        z       = hidden @ weight.T + bias,   then softcap * tanh(z / softcap) if softcap > 0
        lse     = log sum_v exp(z[v])
        nll     = lse - z[label]
        entropy = lse - sum_v exp(z[v] - lse) * z[v]

    Args:
        hidden: shape `(..., h)`.
        weight: shape `(V, h)`.
        labels: shape `(...)`, integer, in `[0, V)` or `ignore_index`.
        bias: shape `(V,)`; default 0. `-inf` takes a word out of the vocabulary.
        ignore_index: label of tokens to leave out.
        softcap: bound of the logits; 0: none.
        return_lse: also return the log-sum-exp of each token's logits.
        return_entropy: also return the entropy of each token's prediction, in nats.

    Returns:
        nll: shape of `labels`, float32 (float64 for float64), in nats. Asked for, after it in this order: lse
        and entropy, same shape and dtype. An ignored token has 0 in each of them and gradient 0.

    Raises:
        IndexError: a label outside `[0, V)` that is not `ignore_index`.

    Note:
        The hidden state of an ignored token is not read: NaN there reaches neither outputs nor gradients.

    Source: Lin et al., arXiv 2404.07965, equations 1 and 8.
    """
    acc = torch.promote_types(hidden.dtype, torch.float32)
    vocab = weight.shape[0]
    valid = labels != ignore_index
    outside = valid & ((labels < 0) | (labels >= vocab))
    if bool(outside.any()):
        at = int(outside.flatten().nonzero()[0])
        found = int(labels.flatten()[at])
        raise IndexError(
            f"linear_nll: labels must be in [0, {vocab}) or {ignore_index}, got {found} at index {at}"
        )
    # 0 * NaN is NaN in the weight's gradient: rows to leave out are replaced before the product.
    rows = torch.where(valid.unsqueeze(-1), hidden.to(acc), 0.0)
    logits = rows @ weight.to(acc).T
    if bias is not None:
        logits = logits + bias.to(acc)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    lse = torch.logsumexp(logits, dim=-1)
    label = torch.where(valid, labels, 0).long()
    picked = torch.where(valid, logits.gather(-1, label.unsqueeze(-1)).squeeze(-1), 0.0)
    # A word of probability 0 counts 0, and not 0 * -inf.
    finite = torch.where(logits == -torch.inf, 0.0, logits)
    entropy = lse - (torch.exp(logits - lse.unsqueeze(-1)) * finite).sum(-1)
    nll, lse, entropy = (torch.where(valid, t, 0.0) for t in (lse - picked, lse, entropy))
    extra = (lse,) * return_lse + (entropy,) * return_entropy
    return (nll, *extra) if extra else nll


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of a linear head, with optional weights per token and a penalty on the log-sum-exp.

    `loss[t] = token_weight[t] * (nll[t] + z_loss * lse[t]^2)`, with `nll` and `lse` as in `linear_nll`; 0 for
    ignored tokens. "mean" divides the sum by the sum of `token_weight` over tokens that are not ignored
    (their number without weights).

    Args:
        hidden: shape `(..., h)`.
        weight: shape `(V, h)`.
        labels: shape `(...)`, integer, in `[0, V)` or `ignore_index`.
        bias: shape `(V,)`; default 0.
        ignore_index: label of tokens to leave out.
        reduction: `"mean"`, `"sum"` or `"none"`.
        token_weight: shape of `labels`, not negative; default 1.
        softcap: bound of the logits; 0: none.
        z_loss: factor of the squared log-sum-exp.

    Returns:
        loss: float32 (float64 for float64); a scalar, or the shape of `labels` with `reduction="none"`. Where
        no token counts, the mean is 0 and so are its gradients.

    Raises:
        ValueError: unknown reduction.
        IndexError: a label outside `[0, V)` that is not `ignore_index`.

    Source: the usual cross-entropy; z-loss as in Chowdhery et al., arXiv 2204.02311, section 5.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"linear_cross_entropy: reduction must be 'mean', 'sum' or 'none', got {reduction!r}"
        )
    nll, lse = linear_nll(
        hidden, weight, labels, bias, ignore_index=ignore_index, softcap=softcap, return_lse=True
    )
    counted = (labels != ignore_index).to(nll.dtype)
    if token_weight is not None:
        # An ignored token's weight is not read.
        counted = torch.where(labels != ignore_index, token_weight.to(nll.dtype), 0.0)
    loss = counted * (nll + z_loss * lse.square())
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = counted.sum()
    return loss.sum() / torch.where(total == 0, 1.0, total)


def select_tokens(
    score: Tensor,
    eligible: Tensor,
    *,
    keep_ratio: float,
    cu_seqlens: Tensor | None = None,
    tie_break: str = "index",
    seed: int = 0,
) -> Tensor:
    """Which tokens have the largest scores: exactly `K` of the `n` that are eligible and have a finite score.

    `K = clamp(floor(keep_ratio * n + 0.5), 1, n)`; 0 if `keep_ratio` or `n` is 0. Among equal scores at the threshold the first
    come first, or with `tie_break="random"` those with the smallest `mix(mix(seed) + index)`, where `mix` is splitmix64 and
    `index` counts all tokens of the call.

    Args:
        score: any shape, floating.
        eligible: shape of `score`, bool.
        keep_ratio: share to select, in [0, 1].
        cu_seqlens: shape `(S+1,)`, integer: borders of the sequences, over all tokens in order; each selects for itself. Default:
            one.
        tie_break: `"index"` or `"random"`.
        seed: of the random order.

    Returns:
        mask: shape of `score`, bool.

    Raises:
        ValueError: an option does not fit.

    Source: Lin et al., arXiv 2404.07965, equation 5. Rounding and ties are not given there.
    """
    if not 0 <= keep_ratio <= 1:
        raise ValueError(f"select_tokens: keep_ratio must be in [0, 1], got {keep_ratio}")
    if tie_break not in ("index", "random"):
        raise ValueError(f"select_tokens: tie_break must be 'index' or 'random', got {tie_break!r}")
    flat = score.detach().flatten().to(torch.promote_types(score.dtype, torch.float32))
    allowed = eligible.flatten() & flat.isfinite()
    ends = [0, flat.numel()] if cu_seqlens is None else cu_seqlens.tolist()
    mask = torch.zeros_like(allowed)
    for begin, end in itertools.pairwise(ends):
        found = [i for i in range(begin, end) if allowed[i]]
        kept = math.floor(keep_ratio * len(found) + 0.5)
        if found and keep_ratio > 0:
            kept = max(kept, 1)
        values = {i: float(flat[i]) for i in found}

        def place(i: int, values: dict[int, float] = values) -> tuple[float, int]:
            return -values[i], i if tie_break == "index" else _mix(_mix(seed) + i)

        mask[sorted(found, key=place)[:kept]] = True
    return mask.reshape(score.shape)


def _mix(x: int) -> int:
    """splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


class SelectionStats(NamedTuple):
    """What `slm_loss` selected; with `scope="global"` counts and threshold are of all processes."""

    mask: Tensor  # shape of labels, bool
    nll: Tensor  # shape of labels; 0 where the score made it unnecessary
    num_selected: Tensor
    num_eligible: Tensor  # not ignored, with a finite score
    num_nonfinite: Tensor  # not ignored, without one; of this process
    threshold: Tensor  # smallest selected score or inf; (S,) with scope="sequence"
    num_tied: Tensor  # eligible and equal to the threshold


def slm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_nll: Tensor | None,
    *,
    keep_ratio: float = 0.6,
    scope: str = "batch",
    score: str | Tensor = "excess",
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    normalizer: str | float | Tensor = "selected",
    group: torch.distributed.ProcessGroup | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    tie_break: str = "index",
    seed: int = 0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, SelectionStats]:
    """Selective language modelling: cross-entropy of the tokens with the largest scores only.

    `loss = sum_t I[t] * (nll[t] + z_loss * lse[t]^2) / normalizer`, where `I` is `select_tokens` of the score: `nll - ref_nll`
    ("excess"), `-ref_nll` ("ref_loss"), `nll` ("loss") or the tensor given. Scores and selection are constants.

    Args:
        hidden: shape `(..., h)`.
        weight: shape `(V, h)`.
        labels: shape `(...)`, integer, in `[0, V)` or `ignore_index`; position t holds the token that follows it.
        ref_nll: shape of `labels`: the reference model's loss of the same tokens; None where the score does not need it.
        keep_ratio: share of the eligible tokens to train on, in [0, 1].
        scope: what is ranked together: `"batch"`: all tokens; `"sequence"`: each row, or each sequence of `cu_seqlens`;
            `"global"`: the tokens of all processes of `group`.
        score: what is ranked; of a tensor (shape of `labels`) the largest come first.
        cu_seqlens: shape `(S+1,)`, with `scope="sequence"`.
        bias: shape `(V,)`; default 0.
        ignore_index: label of tokens to leave out.
        normalizer: `"selected"`: how many are selected; `"valid"`: how many labels are not ignored; or a number. With
            `scope="global"` the former two are means over the processes, so that the mean of their losses is the loss of all.
        group: process group of `scope="global"`.
        softcap: bound of the logits; 0: none.
        z_loss: factor of the squared log-sum-exp, of selected tokens.
        tie_break: see `select_tokens`.
        seed: see `select_tokens`.
        return_stats: also return `SelectionStats`.

    Returns:
        loss: scalar, float32 (float64 for float64). Where nothing is selected it is 0, and so are its gradients.

    Raises:
        ValueError: an option does not fit.
        IndexError: a label outside `[0, V)` that is not `ignore_index`.

    Source: Lin et al., arXiv 2404.07965, equations 3 to 5.
    """
    with torch.no_grad():
        nll = linear_nll(hidden, weight, labels, bias, ignore_index=ignore_index, softcap=softcap)
    assert isinstance(nll, Tensor)
    every = nll
    if isinstance(score, Tensor):
        ranked = score
    elif score == "loss":
        ranked = nll
    elif score in ("excess", "ref_loss"):
        if ref_nll is None:
            raise ValueError(f"slm_loss: score {score!r} needs ref_nll, got None")
        ranked = nll - ref_nll.to(nll.dtype) if score == "excess" else -ref_nll
    else:
        raise ValueError(f"slm_loss: score must be 'excess', 'ref_loss', 'loss' or a tensor, got {score!r}")
    ranked = ranked.detach().to(torch.promote_types(ranked.dtype, torch.float32))
    valid = labels != ignore_index
    world = 1
    first, everywhere, counted = 0, ranked.flatten(), valid.flatten()
    if scope == "global":
        world, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        parts: list[tuple[Tensor, Tensor]] = [None] * world  # type: ignore[list-item]
        torch.distributed.all_gather_object(parts, (ranked.flatten(), valid.flatten()), group=group)
        first = sum(part[0].numel() for part in parts[:rank])
        everywhere, counted = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    elif scope == "sequence" and cu_seqlens is None:
        rows, length = labels.shape[:-1].numel(), labels.shape[-1]
        cu_seqlens = torch.arange(rows + 1) * length
    elif scope not in ("batch", "sequence"):
        raise ValueError(f"slm_loss: scope must be 'batch', 'sequence' or 'global', got {scope!r}")
    mask = select_tokens(
        everywhere, counted, keep_ratio=keep_ratio, cu_seqlens=cu_seqlens, tie_break=tie_break, seed=seed
    )
    if normalizer == "selected":
        total: float | Tensor = int(mask.sum()) / world
    elif normalizer == "valid":
        total = int(counted.sum()) / world
    elif isinstance(normalizer, str):
        raise ValueError(f"slm_loss: normalizer must be 'selected', 'valid' or a number, got {normalizer!r}")
    else:
        total = normalizer
    mine = mask[first : first + labels.numel()].reshape(labels.shape)
    # Only what is selected takes part: a hidden state of NaN that is not selected reaches no gradient.
    kept = torch.where(mine, labels, ignore_index)
    nll, lse = linear_nll(
        hidden, weight, kept, bias, ignore_index=ignore_index, softcap=softcap, return_lse=True
    )
    loss = (nll + z_loss * lse.square()).sum() / (total if total != 0 else 1.0)
    if not return_stats:
        return loss
    if isinstance(score, Tensor) or score == "ref_loss":
        every = nll.detach()
    eligible = counted & everywhere.isfinite()
    ends = [0, everywhere.numel()] if cu_seqlens is None else cu_seqlens.tolist()
    thresholds, tied = [], 0
    for begin, end in itertools.pairwise(ends):
        part, chosen = everywhere[begin:end], mask[begin:end]
        thresholds.append(part[chosen].min() if chosen.any() else torch.tensor(math.inf, dtype=part.dtype))
        tied += int((eligible[begin:end] & (part == thresholds[-1])).sum())
    threshold = torch.stack(thresholds) if scope == "sequence" else thresholds[0]
    unknown = (valid & ~ranked.isfinite()).sum()
    stats = SelectionStats(mine, every, mask.sum(), eligible.sum(), unknown, threshold, torch.tensor(tied))
    return loss, stats
