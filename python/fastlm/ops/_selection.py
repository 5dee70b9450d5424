"""What a scope ranks together: one call of the operator, or, over several processes, the exact choice that one process with all
tokens would make.

The latter is a radix select on order-preserving keys, 8 bits a round: each process counts its digits, the counts are summed over
the group, and every process learns in which digit the threshold lies. 32-bit scores take 4 rounds of 256 counts; nothing else is
exchanged but numbers of tokens. Ties go by (process, index), or by the random order of `select_tokens` in 8 more rounds. The number
of collectives depends on the arguments alone, so a process without tokens takes part like any other.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastlm import _ops

Scope = Literal["batch", "sequence", "global"]
TieBreak = Literal["index", "random"]
_DIGIT = 8
_SIGN = -(2**63)


def select_in_scope(
    ranked: Tensor,
    valid: Tensor,
    scope: Scope,
    keep_ratio: float,
    cu_seqlens: Tensor | None,
    tie_break: TieBreak,
    seed: int,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask, threshold and (eligible, selected, tied) over what the scope ranks together."""
    if scope == "global":
        # The operator's checks; what it finds out about this process alone is not used.
        _ops.select_tokens(ranked[:0], valid[:0], keep_ratio=keep_ratio, tie_break=tie_break)
        score = ranked.to(torch.promote_types(ranked.dtype, torch.float32))
        return select_globally(
            score, valid, keep_ratio=keep_ratio, tie_break=tie_break, seed=seed, group=group
        )
    if scope == "sequence" and cu_seqlens is None:
        length = ranked.shape[-1]
        rows = ranked.shape[:-1].numel()
        cu_seqlens = torch.arange(rows + 1, device=ranked.device) * length
    mask, threshold, counts = _ops.select_tokens(
        ranked, valid, cu_seqlens, keep_ratio=keep_ratio, tie_break=tie_break, seed=seed
    )
    return mask, threshold if scope == "sequence" else threshold.squeeze(0), counts.sum(0)


def select_globally(
    score: Tensor,
    eligible: Tensor,
    *,
    keep_ratio: float,
    tie_break: str,
    seed: int,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This process's part of the choice; arguments as for the operator.

    Returns:
        mask: shape of `score`, bool.
        threshold: scalar, of all processes.
        counts: shape (3,), int64, of all processes: eligible and finite, selected, equal to the threshold.
    """
    flat = score.flatten()
    allowed = eligible.flatten() & flat.isfinite()
    bits = 64 if flat.dtype == torch.float64 else 32
    key = _keys(flat, bits)
    count = _sum(allowed.sum(), group)
    kept = torch.floor(keep_ratio * count.double() + 0.5).long()
    kept = torch.minimum(kept.clamp(min=1 if keep_ratio > 0 else 0), count)

    taken, tied, left, found = _largest(key, allowed, kept, bits, group)
    threshold = _score_of(found, bits, flat)
    threshold = torch.where(kept > 0, threshold, torch.inf)
    num_tied = torch.where(kept > 0, _sum(tied.sum(), group), 0)
    mine, before = _share(tied.sum(), group)
    if tie_break == "random":
        _, first = _share(torch.full_like(mine, flat.numel()), group)
        order = _mix(
            _mix(torch.full_like(key, seed)) + torch.arange(flat.numel(), device=flat.device) + first
        )
        # The smallest come first: the largest of the complement.
        more, rest, still, _ = _largest(order.bitwise_not(), tied, left, 64, group)
        taken = taken | more | (rest & (still > 0))  # no two orders are equal, so the rest is one token
    else:
        rank = tied.cumsum(0)  # 1 for the first tie of this process
        taken = taken | (tied & (rank + before <= left))
    return taken.reshape(score.shape), threshold, torch.stack((count, kept, num_tied))


def _largest(
    key: Tensor, among: Tensor, wanted: Tensor, bits: int, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `wanted` largest of the keys `among`: those above the threshold, those equal to it, how many of these, the threshold."""
    taken, match, found = torch.zeros_like(among), among, torch.zeros_like(wanted)
    left = wanted
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        digit = (key >> shift) & 255
        counts = torch.zeros(257, dtype=torch.int64, device=key.device)
        counts = _sum(
            counts.scatter_add_(0, torch.where(match, digit, 256), torch.ones_like(digit))[:256], group
        )
        above = counts.flip(0).cumsum(0).flip(0) - counts  # of larger digits
        # The largest digit that brings the count to `left`; with nothing wanted, one above all.
        here = torch.where(left > 0, ((above + counts >= left) & (above < left)).long().argmax(), 256)
        taken = taken | (match & (digit > here))
        left = left - torch.where(here < 256, above[here.clamp(max=255)], 0)
        match = match & (digit == here)
        found = (found << _DIGIT) | here.clamp(max=255)
    return taken, match, left, found


def _keys(flat: Tensor, bits: int) -> Tensor:
    """int64 whose lowest `bits`, read as an unsigned number, have the order of the scores."""
    raw = flat + 0.0  # -0 + 0 is +0
    if bits == 64:
        pattern = raw.view(torch.int64)
        return torch.where(pattern < 0, pattern.bitwise_not(), pattern ^ _SIGN)
    pattern = raw.view(torch.int32).long()
    return torch.where(pattern < 0, pattern.bitwise_not(), pattern ^ 2**31) & 0xFFFFFFFF


def _score_of(key: Tensor, bits: int, like: Tensor) -> Tensor:
    if bits == 64:
        return torch.where(key < 0, key ^ _SIGN, key.bitwise_not()).view(torch.float64)
    pattern = torch.where(key >= 2**31, key ^ 2**31, key ^ 0xFFFFFFFF)
    return (
        torch.where(pattern >= 2**31, pattern - 2**32, pattern)
        .to(torch.int32)
        .view(torch.float32)
        .to(like.dtype)
    )


def _mix(x: Tensor) -> Tensor:
    """splitmix64 on int64, whose sums and products wrap around like those of unsigned numbers."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by without the sign."""
    return torch.bitwise_and(x >> by, 2 ** (64 - by) - 1)


def _sum(counts: Tensor, group: ProcessGroup | None) -> Tensor:
    counts = counts.clone()
    torch.distributed.all_reduce(counts, group=group)
    return counts


def _share(count: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """`count` itself, and the sum of the counts of the processes before this one."""
    parts = [torch.empty_like(count) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, count, group=group)
    rank = torch.distributed.get_rank(group)
    return count, torch.stack([torch.zeros_like(count), *parts[:rank]]).sum()
