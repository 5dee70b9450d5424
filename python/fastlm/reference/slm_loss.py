"""Cross-entropy of a linear head: per token, and as a loss."""

from __future__ import annotations

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
