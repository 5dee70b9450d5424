"""Stands in for `ops.slm_loss` until it is there: the definition in a few lines, all logits in memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastlm import ops


class Stats(NamedTuple):
    mask: Tensor
    nll: Tensor
    num_selected: Tensor
    num_eligible: Tensor
    num_nonfinite: Tensor
    threshold: Tensor
    num_tied: Tensor


def count(keep_ratio: float, n: int) -> int:
    return max(min(math.floor(keep_ratio * n + 0.5), n), 1 if keep_ratio > 0 and n > 0 else 0)


def choose(score: Tensor, eligible: Tensor, keep_ratio: float) -> Tensor:
    keys = score.masked_fill(~eligible, -math.inf)
    order = torch.argsort(keys, descending=True, stable=True)
    mask = torch.zeros_like(eligible)
    mask[order[: count(keep_ratio, int(eligible.sum()))]] = True
    return mask


def slm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_nll: Tensor | None,
    *,
    keep_ratio: float = 0.6,
    scope: str = "batch",
    score: str = "excess",
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    normalizer: str | float = "selected",
    group: Any = None,
    tie_break: str = "index",
    seed: int = 0,
    return_stats: bool = False,
) -> Any:
    nll = ops.linear_nll(hidden, weight, labels, bias, softcap=softcap)
    valid = labels != ignore_index
    values = {"excess": lambda: nll - ref_nll, "ref_loss": lambda: -ref_nll, "loss": lambda: nll}[
        score
    ]().detach()
    eligible = valid & values.isfinite()
    if scope == "sequence":
        mask = torch.stack([choose(s, e, keep_ratio) for s, e in zip(values, eligible, strict=True)])
    elif scope == "global" and dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (values.flatten(), eligible.flatten()))
        whole = choose(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), keep_ratio)
        start = sum(p[0].numel() for p in parts[: dist.get_rank()])
        mask = whole[start : start + values.numel()].view_as(valid)
    else:
        mask = choose(values.flatten(), eligible.flatten(), keep_ratio).view_as(valid)
    total = {"selected": mask.sum().clamp(min=1), "valid": valid.sum().clamp(min=1)}.get(
        normalizer, normalizer
    )
    loss = nll.where(mask, 0.0).sum() / total
    threshold = values[mask].min() if mask.any() else values.new_tensor(math.nan)
    stats = Stats(
        mask,
        nll.detach(),
        mask.sum(),
        eligible.sum(),
        (valid & ~eligible).sum(),
        threshold,
        (eligible & (values == threshold)).sum(),
    )
    return (loss, stats) if return_stats else loss
