"""Cross-entropy of a linear head without its logits: per token, as a loss, and of selected tokens only."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastlm import _ops
from fastlm.ops._selection import Scope, TieBreak, select_in_scope

Reduction = Literal["mean", "sum", "none"]


@overload
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    softcap: float = ...,
    return_lse: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...
@overload
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    softcap: float = ...,
    return_lse: bool = ...,
    return_entropy: bool = ...,
) -> Tensor | tuple[Tensor, ...]: ...
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
    """Negative log-likelihood of each token's label under a linear head, without storing logits.

    `z = hidden @ weight.T + bias`, then `softcap * tanh(z / softcap)` if `softcap > 0`; `lse = log sum_v exp(z[v])`,
    `nll = lse - z[label]`, `entropy = lse - sum_v exp(z[v] - lse) * z[v]`. Logits are never rounded to 16 bits.

    Args:
        hidden: shape `(..., h)`, float32, bfloat16, float16 or float64, any strides.
        weight: shape `(V, h)`, dtype of `hidden`, any strides.
        labels: shape `(...)`, int32 or int64, in `[0, V)` or `ignore_index`.
        bias: shape `(V,)`, any floating dtype; default 0. `-inf` takes a word out of the vocabulary.
        ignore_index: label of tokens to leave out.
        softcap: bound of the logits; 0: none.
        return_lse: also return the log-sum-exp of each token's logits.
        return_entropy: also return the entropy of each token's prediction, in nats.

    Returns:
        nll: shape of `labels`, float32 (float64 for float64), in nats. Asked for, after it in this order: lse and entropy, same
        shape and dtype. An ignored token has 0 in each of them and gradient exactly 0.

    Raises:
        ValueError: a shape, dtype or device does not fit, or `softcap` is negative.
        IndexError: a label outside `[0, V)` that is not `ignore_index`.

    Note:
        Differentiable in hidden, weight and bias, through every output. The backward pass recomputes the logits, for those
        tokens only that have a gradient: masking the losses makes it cheaper, and the hidden state of a token without a gradient
        is not read. It accumulates in float32 (float64) and rounds the gradients of hidden and weight once, at the end. Scratch
        memory of the backward pass at `h = 1024`: 4 MB, and 11 KB per token; no `(T, V)` and no second `(V, h)` buffer. Same bits
        for every number of threads and in every run. With `create_graph=True` the backward pass is made of PyTorch's operators, with
        the logits of all tokens that are not ignored in memory, and can be differentiated again.
        Under autocast hidden and weight are cast as for `F.linear`.

    Source: Lin et al., arXiv 2404.07965, equations 1 and 8; the online sum is Milakov and Gimelshein, arXiv 1805.02867.

    Example:
        >>> import torch, fastlm
        >>> hidden, weight = torch.randn(6, 16), torch.randn(100, 16)
        >>> fastlm.ops.linear_nll(hidden, weight, torch.arange(6)).shape
        torch.Size([6])
    """
    nll, lse, entropy = _ops.linear_nll(
        hidden,
        weight,
        labels,
        bias,
        ignore_index=ignore_index,
        softcap=softcap,
        return_entropy=return_entropy,
    )
    extra = (lse,) * return_lse + (entropy,) * return_entropy
    return (nll, *extra) if extra else nll


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    token_weight: Tensor | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of a linear head without storing logits, with optional weights per token and a penalty on the log-sum-exp.

    `loss[t] = token_weight[t] * (nll[t] + z_loss * lse[t]^2)`, with `nll` and `lse` as in `linear_nll`; 0 for ignored tokens. "mean"
    divides the sum by the sum of `token_weight` over tokens that are not ignored (their number without weights).

    Args:
        hidden: shape `(..., h)`, float32, bfloat16, float16 or float64, any strides.
        weight: shape `(V, h)`, dtype of `hidden`, any strides.
        labels: shape `(...)`, int32 or int64, in `[0, V)` or `ignore_index`.
        bias: shape `(V,)`, any floating dtype; default 0.
        ignore_index: label of tokens to leave out.
        reduction: `"mean"`, `"sum"` or `"none"`.
        token_weight: shape of `labels`, any real dtype, not negative; default 1. Weights of ignored tokens are not read.
        softcap: bound of the logits; 0: none.
        z_loss: factor of the squared log-sum-exp.

    Returns:
        loss: float32 (float64 for float64), in nats; a scalar, or the shape of `labels` with `reduction="none"`. Where no token
        counts, the mean is 0 and so are its gradients.

    Raises:
        ValueError: unknown reduction; a shape, dtype or device does not fit; `softcap` is negative.
        IndexError: a label outside `[0, V)` that is not `ignore_index`.

    Note:
        Differentiable in hidden, weight, bias and token_weight, more than once like `linear_nll`, which does the work: memory,
        determinism and autocast are its own. Tokens of weight 0 have a gradient of exactly 0 and no part in the backward pass.

    Source: the usual cross-entropy; z-loss as in Chowdhery et al., arXiv 2204.02311, section 5.

    Example:
        >>> import torch, fastlm
        >>> hidden, weight = torch.randn(6, 16), torch.randn(100, 16)
        >>> fastlm.ops.linear_cross_entropy(hidden, weight, torch.arange(6)).shape
        torch.Size([])
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"linear_cross_entropy: reduction must be 'mean', 'sum' or 'none', got {reduction!r}"
        )
    nll, lse, _ = _ops.linear_nll(hidden, weight, labels, bias, ignore_index=ignore_index, softcap=softcap)
    loss = nll + z_loss * lse.square() if z_loss != 0 else nll
    counted = labels != ignore_index
    if token_weight is not None:
        if token_weight.shape != labels.shape:
            raise ValueError(
                f"linear_cross_entropy: token_weight must have shape {tuple(labels.shape)}, "
                f"got {tuple(token_weight.shape)}"
            )
        share = torch.where(counted, token_weight.to(nll.dtype), 0.0)
        loss = share * loss
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = counted.sum() if token_weight is None else share.sum()
    return loss.sum() / torch.where(total == 0, 1, total)


def select_tokens(
    score: Tensor,
    eligible: Tensor,
    *,
    keep_ratio: float,
    cu_seqlens: Tensor | None = None,
    tie_break: TieBreak = "index",
    seed: int = 0,
) -> Tensor:
    """Which tokens have the largest scores: exactly `K` of the `n` that are eligible and have a finite score.

    `K = clamp(floor(keep_ratio * n + 0.5), 1, n)`; 0 if `keep_ratio` or `n` is 0. Among equal scores at the threshold the first
    come first, or with `tie_break="random"` those that a permutation chosen by `seed` puts first.

    Args:
        score: any shape, float32, bfloat16, float16 or float64, any strides; the largest are selected.
        eligible: shape of `score`, bool. NaN and infinities are not selected either.
        keep_ratio: share to select, in [0, 1].
        cu_seqlens: shape `(S+1,)`, int32 or int64, from 0 to the number of tokens: borders of sequences, over all tokens in order.
            Each selects its own share. Default: one sequence.
        tie_break: `"index"` or `"random"`. By index, many equal scores select the beginning of a batch.
        seed: of the random order; the same seed selects the same tokens.

    Returns:
        mask: shape of `score`, bool.

    Raises:
        ValueError: a shape, dtype or device does not fit, or an option is unknown or out of range.

    Note:
        No gradient. Both zeros are one score. Radix selection: one read of the scores for 11 bits, no sort.

    Source: Lin et al., arXiv 2404.07965, equation 5. Rounding and ties are not given there.

    Example:
        >>> import torch, fastlm
        >>> score = torch.tensor([0.5, 2.0, -1.0, 3.0, 1.0])
        >>> fastlm.ops.select_tokens(score, score > 0, keep_ratio=0.5)
        tensor([False,  True, False,  True, False])
    """
    mask, _, _ = _ops.select_tokens(
        score, eligible, cu_seqlens, keep_ratio=keep_ratio, tie_break=tie_break, seed=seed
    )
    return mask


class SelectionStats(NamedTuple):
    """What `slm_loss` selected. Counts and threshold are of everything that was ranked; with `scope="global"` of all processes."""

    mask: Tensor  # shape of labels, bool: selected
    nll: Tensor  # shape of labels, float32: loss of each token; 0 where it was not computed
    num_selected: Tensor  # scalar, int64
    num_eligible: Tensor  # scalar, int64: labels that are not ignored and have a finite score
    num_nonfinite: (
        Tensor  # scalar, int64, of this process: labels that are not ignored but have no finite score
    )
    threshold: Tensor  # smallest selected score, inf without any: scalar; shape (S,) with scope="sequence"
    num_tied: Tensor  # scalar, int64: eligible tokens whose score is the threshold


@overload
def slm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_nll: Tensor | None,
    *,
    keep_ratio: float = ...,
    scope: Scope = ...,
    score: Literal["excess", "ref_loss", "loss"] | Tensor = ...,
    cu_seqlens: Tensor | None = ...,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    normalizer: Literal["selected", "valid"] | float | Tensor = ...,
    group: torch.distributed.ProcessGroup | None = ...,
    softcap: float = ...,
    z_loss: float = ...,
    tie_break: TieBreak = ...,
    seed: int = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def slm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_nll: Tensor | None,
    *,
    keep_ratio: float = ...,
    scope: Scope = ...,
    score: Literal["excess", "ref_loss", "loss"] | Tensor = ...,
    cu_seqlens: Tensor | None = ...,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    normalizer: Literal["selected", "valid"] | float | Tensor = ...,
    group: torch.distributed.ProcessGroup | None = ...,
    softcap: float = ...,
    z_loss: float = ...,
    tie_break: TieBreak = ...,
    seed: int = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, SelectionStats]: ...
def slm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_nll: Tensor | None,
    *,
    keep_ratio: float = 0.6,
    scope: Scope = "batch",
    score: Literal["excess", "ref_loss", "loss"] | Tensor = "excess",
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    normalizer: Literal["selected", "valid"] | float | Tensor = "selected",
    group: torch.distributed.ProcessGroup | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    tie_break: TieBreak = "index",
    seed: int = 0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, SelectionStats]:
    """Selective language modelling: cross-entropy of the tokens with the largest scores only, without storing logits.

    `loss = sum_t I[t] * (nll[t] + z_loss * lse[t]^2) / normalizer`, where `I` is the exact choice of `select_tokens` by the score:
    `nll - ref_nll` ("excess", Rho-1), `-ref_nll` ("ref_loss"), `nll` ("loss") or the tensor given. Scores and selection are
    constants of the gradient.

    Args:
        hidden: shape `(..., h)`, float32, bfloat16, float16 or float64, any strides.
        weight: shape `(V, h)`, dtype of `hidden`, any strides.
        labels: shape `(...)`, int32 or int64, in `[0, V)` or `ignore_index`; position t holds the token that follows it.
        ref_nll: shape of `labels`, floating: the reference model's loss of the same tokens, in nats; None where the score does not
            need it. NaN and infinities (no reference known) are never selected.
        keep_ratio: share of the eligible tokens to train on, in [0, 1].
        scope: what is ranked together: `"batch"`: all tokens of the call; `"sequence"`: each row of labels `(..., L)`, or each
            sequence of `cu_seqlens`; `"global"`: the tokens of all processes of `group`, which must all make the call.
        score: what is ranked; of a tensor (shape of `labels`) the largest come first. Where it does not depend on the model, with
            "ref_loss" and a tensor, the losses of other tokens are not computed at all.
        cu_seqlens: shape `(S+1,)`, int32 or int64, over all tokens in order; only with `scope="sequence"`.
        bias: shape `(V,)`, any floating dtype; default 0.
        ignore_index: label of tokens to leave out.
        normalizer: `"selected"`: how many tokens are selected; `"valid"`: how many labels are not ignored; or a number, such as the
            count over all micro batches of a step. With `scope="global"` the former two are means over the processes, so that the
            mean of the processes' losses (what DistributedDataParallel takes of gradients) is the loss of all their tokens.
        group: process group of `scope="global"`; default: all processes.
        softcap: bound of the logits; 0: none.
        z_loss: factor of the squared log-sum-exp, of selected tokens.
        tie_break: order among equal scores, see `select_tokens`.
        seed: see `select_tokens`.
        return_stats: also return `SelectionStats`.

    Returns:
        loss: scalar, float32 (float64 for float64), in nats. Where nothing is selected it is 0, and its gradients are zeros.

    Raises:
        ValueError: a shape, dtype or device does not fit, an option is unknown or out of range, or `ref_nll` is missing.
        IndexError: a label outside `[0, V)` that is not `ignore_index`.

    Note:
        Differentiable in hidden, weight and bias. No `(T, V)` buffer in either direction; the backward pass runs over the selected
        tokens alone and gives the others' hidden states a gradient of exactly 0. Deterministic. Memory and autocast are those of
        `linear_nll`.

    Source: Lin et al., arXiv 2404.07965, equations 3 to 5; scores of section 4.5 there: "ref_loss". The paper says neither what a
        batch is, nor how counts are rounded or ties broken.

    Example:
        >>> import torch, fastlm
        >>> hidden, weight, labels = torch.randn(10, 16), torch.randn(100, 16), torch.arange(10)
        >>> loss, stats = fastlm.ops.slm_loss(hidden, weight, labels, torch.full((10,), 4.0), return_stats=True)
        >>> int(stats.num_selected)
        6
    """
    _check_selective(scope, score, cu_seqlens, normalizer, labels, ref_nll)
    valid = labels != ignore_index
    if isinstance(score, Tensor) or score == "ref_loss":
        ranked = score.detach() if isinstance(score, Tensor) else -ref_nll.detach()  # type: ignore[union-attr]
        mask, threshold, counts = select_in_scope(
            ranked, valid, scope, keep_ratio, cu_seqlens, tie_break, seed, group
        )
        kept = torch.where(mask, labels, ignore_index)
        nll, lse, _ = _ops.linear_nll(hidden, weight, kept, bias, ignore_index=ignore_index, softcap=softcap)
    else:
        nll, lse, _ = _ops.linear_nll(
            hidden, weight, labels, bias, ignore_index=ignore_index, softcap=softcap
        )
        ranked = nll.detach()
        if score == "excess":
            ranked = ranked - ref_nll.detach().to(ranked.dtype)  # type: ignore[union-attr]
        mask, threshold, counts = select_in_scope(
            ranked, valid, scope, keep_ratio, cu_seqlens, tie_break, seed, group
        )
    loss = nll + z_loss * lse.square() if z_loss != 0 else nll
    total = torch.where(mask, loss, 0.0).sum()  # where, not a product: 0 * NaN is NaN
    loss = total / _divisor(normalizer, scope, valid, counts, group).to(total.dtype)
    if not return_stats:
        return loss
    unknown = (valid & ~ranked.isfinite()).sum()
    stats = SelectionStats(mask, nll.detach(), counts[1], counts[0], unknown, threshold, counts[2])
    return loss, stats


def _check_selective(
    scope: str,
    score: str | Tensor,
    cu_seqlens: Tensor | None,
    normalizer: str | float | Tensor,
    labels: Tensor,
    ref_nll: Tensor | None,
) -> None:
    if scope not in ("batch", "sequence", "global"):
        raise ValueError(f"slm_loss: scope must be 'batch', 'sequence' or 'global', got {scope!r}")
    if cu_seqlens is not None and scope != "sequence":
        raise ValueError(f"slm_loss: cu_seqlens needs scope 'sequence', got scope {scope!r}")
    if not isinstance(score, Tensor) and score not in ("excess", "ref_loss", "loss"):
        raise ValueError(f"slm_loss: score must be 'excess', 'ref_loss', 'loss' or a tensor, got {score!r}")
    if not isinstance(score, Tensor) and score != "loss" and ref_nll is None:
        raise ValueError(f"slm_loss: score {score!r} needs ref_nll, got None")
    if isinstance(normalizer, str) and normalizer not in ("selected", "valid"):
        raise ValueError(f"slm_loss: normalizer must be 'selected', 'valid' or a number, got {normalizer!r}")
    for name, t in (("ref_nll", ref_nll), ("score", score)):
        if not isinstance(t, Tensor):
            continue
        if t.shape != labels.shape:
            raise ValueError(f"slm_loss: {name} must have shape {tuple(labels.shape)}, got {tuple(t.shape)}")
        if not t.is_floating_point():
            raise ValueError(f"slm_loss: {name} must have a floating dtype, got {t.dtype}")


def _divisor(
    normalizer: str | float | Tensor,
    scope: Scope,
    valid: Tensor,
    counts: Tensor,
    group: torch.distributed.ProcessGroup | None,
) -> Tensor:
    """What the sum is divided by; 1 instead of 0."""
    if isinstance(normalizer, str):
        total = counts[1] if normalizer == "selected" else valid.sum()
        if scope == "global":
            if normalizer == "valid":
                torch.distributed.all_reduce(total, group=group)
            total = total / torch.distributed.get_world_size(group)
    elif isinstance(normalizer, Tensor):
        total = normalizer.to(valid.device)
    else:
        total = torch.full((), normalizer, device=valid.device)  # no copy from the host: CUDA graphs
    return torch.where(total == 0, 1, total)
