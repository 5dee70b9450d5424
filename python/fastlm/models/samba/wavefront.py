"""Prefill along diagonals of (layer, chunk): while a Mamba block takes one chunk of a prompt, the attention block behind it takes
the chunk before, and both mixers run in one `scan_swa`.

Block `l` meets chunk `c` at step `l + c`: what it needs, the same chunk behind block `l - 1` and its own state after chunk `c - 1`,
is of step `l + c - 1`. So as many chunks are on their way as there are blocks, and their activations are held: memory does not
grow with the prompt, but is larger than chunk by chunk. A chunk of several tokens gets the bits it would get by
itself; one of a single token goes through the layers here, where alone it would go through `samba_decode_step`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fastlm import ops
from fastlm.layers.rms_norm import at_least_float32
from fastlm.models.samba.cache import LayerCache, SambaCache
from fastlm.models.samba.passes import Pass, plan_pass

if TYPE_CHECKING:
    from fastlm.models.samba.block import SambaBlock
    from fastlm.models.samba.modeling import SambaModel


@dataclass(frozen=True)
class _Waiting:
    """A chunk in front of a block: its residual stream and what the blocks need to know about it."""

    x: Tensor
    step: Pass


def prefill_wavefront(
    model: SambaModel, chunks: Iterable[tuple[Tensor, Tensor | None]], cache: SambaCache
) -> Iterator[Tensor]:
    """Hidden states after the final norm, `(B, L, d)`, of one chunk after the other; `cache` is advanced in place.

    Args:
        model: the backbone.
        chunks: `input_ids` and `cu_seqlens` of each, as `SambaModel.forward` takes them.
        cache: one row per sequence. Its positions run ahead of what is returned, so take all chunks.
    """
    blocks = cast("list[SambaBlock]", list(model.layers))
    waiting: list[_Waiting | None] = [None] * len(blocks)  # in front of each block
    coming = iter(chunks)
    while True:
        chunk = next(coming, None)
        if chunk is not None:
            ids, cu_seqlens = chunk
            x = at_least_float32(model.embed_tokens(ids))
            step = plan_pass(x, model.rotary, cache, cu_seqlens, None)
            if step.step_positions is not None:  # a view of what the cache counts on
                step = replace(step, step_positions=step.step_positions.clone())
            cache.advance(step.seqlens)
            waiting[0] = _Waiting(x, step)
        if all(w is None for w in waiting):
            return
        done = _diagonal(blocks, cache.layers, waiting)
        last = done[-1]
        if last is not None:
            yield model.norm(last.x)
        waiting = [None, *done[:-1]]


def _diagonal(
    blocks: list[SambaBlock], caches: Sequence[LayerCache], waiting: list[_Waiting | None]
) -> list[_Waiting | None]:
    """Every waiting chunk through its block."""
    done: list[_Waiting | None] = [None] * len(blocks)
    for i, here in enumerate(waiting):
        if here is None or done[i] is not None:
            continue
        ahead = waiting[i + 1] if i + 1 < len(blocks) else None
        if ahead is not None and _may_meet(blocks[i], here, blocks[i + 1], ahead):
            x, y = _side_by_side(blocks[i], here, caches[i], blocks[i + 1], ahead, caches[i + 1])
            done[i], done[i + 1] = _Waiting(x, here.step), _Waiting(y, ahead.step)
        else:
            done[i] = _Waiting(blocks[i](here.x, here.step, caches[i]), here.step)
    return done


def _may_meet(first: SambaBlock, here: _Waiting, second: SambaBlock, ahead: _Waiting) -> bool:
    """Whether these are a Mamba block and an attention block with several tokens each: one token is a decoding step."""
    kinds = first.attn is None and second.mamba is None
    return kinds and here.step.step_positions is None and ahead.step.step_positions is None


def _side_by_side(
    first: SambaBlock,
    here: _Waiting,
    first_cache: LayerCache,
    second: SambaBlock,
    ahead: _Waiting,
    second_cache: LayerCache,
) -> tuple[Tensor, Tensor]:
    """One chunk through a Mamba block, the chunk before it through an attention block."""
    mamba, attn, state, ring = first.mamba, second.attn, first_cache.mamba, second_cache.attention
    assert mamba is not None
    assert attn is not None
    assert state is not None
    h = second.attn_norm(ahead.x)
    scan, conv = mamba.before_scan(first.mamba_norm(here.x), state, cu_seqlens=here.step.cu_seqlens)
    heads, options = attn.before_attention(
        h, ring, ahead.step.ring_plan, rotary=ahead.step.rotary, cu_seqlens=ahead.step.cu_seqlens
    )
    y, last_state, out, _ = ops.scan_swa(
        *scan,
        True,
        state.scan,
        *heads,
        window_size=attn.window_size,
        cu_seqlens=here.step.cu_seqlens,
        **options,
    )
    with torch.no_grad():
        state.conv.copy_(conv)
        state.scan.copy_(last_state)
    return (
        first.feed_forward(here.x + mamba.after_scan(y)),
        second.feed_forward(ahead.x + attn.after_attention(out, h)),
    )
