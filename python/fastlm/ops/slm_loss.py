"""Cross-entropy of a linear head without its logits: per token, and as a loss."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastlm import _ops

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
        Differentiable once in hidden, weight and bias, through every output. The backward pass recomputes the logits, for those
        tokens only that have a gradient: masking the losses makes it cheaper, and the hidden state of a token without a gradient
        is not read. It accumulates in float32 (float64) and rounds the gradients of hidden and weight once, at the end.
        Scratch memory of the backward pass at `h = 1024`: 4 MB, and 11 KB per token; no `(T, V)` and no second `(V, h)` buffer.
        Same bits for every number of threads and in every run. Under autocast hidden and weight are cast as for `F.linear`.

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
        Differentiable once in hidden, weight, bias and token_weight. Tokens of weight 0 have a gradient of exactly 0 and no part in
        the backward pass. Memory, determinism and autocast are those of `linear_nll`, which does the work.

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
