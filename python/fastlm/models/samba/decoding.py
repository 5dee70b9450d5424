"""A decoding step through a pair of blocks by one operator, `samba_decode_step`, where that is possible."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.layers import Mamba, RMSNorm, SlidingWindowAttention, SwiGLU
from fastlm.models.samba.cache import LayerCache
from fastlm.models.samba.passes import Pass

if TYPE_CHECKING:
    from fastlm.models.samba.block import SambaBlock

# Rows up to which it is faster than the layers, by device. On CPU the operator reads the weights once for every four rows, a matrix
# product once for all; on CUDA once for every sixteen (by arithmetic: not measured yet).
_MOST_ROWS = {"cpu": 4, "cuda": 16}


def step_pair(
    blocks: Iterable[nn.Module], caches: Sequence[LayerCache], x: Tensor, step: Pass
) -> Tensor | None:
    """The residual stream `x (B, 1, d)` behind a Mamba block and an attention block; their caches are written.

    None where the layers must do it: not a single token per row, gradients or autocast are on, another device, other blocks than
    these two, or a layer that is not what it was made as (an adapter, a quantised weight, a hook).
    """
    device = x.device.type
    if step.step_positions is None or x.shape[0] > _MOST_ROWS.get(device, 0):
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled(device):
        return None
    first, second = _as_pair(blocks)
    if first is None or second is None:
        return None
    mamba, attn = first.mamba, second.attn
    mlps = first.mlp, second.mlp
    state, ring = caches[0].mamba, caches[1].attention
    if mamba is None or attn is None or state is None or ring is None:
        return None
    if not isinstance(mlps[0], SwiGLU) or not isinstance(mlps[1], SwiGLU):
        return None
    if mamba.in_proj.weight.dtype != state.conv.dtype or ring.k.dtype != state.conv.dtype:
        return None
    cos, sin = step.rotary or (None, None)
    out = ops.samba_decode_step(
        x.squeeze(1),
        mamba_norm=first.mamba_norm.weight,
        in_proj=mamba.in_proj.weight,
        conv_weight=mamba.conv1d.weight.squeeze(1),
        conv_bias=mamba.conv1d.bias,
        x_proj=mamba.x_proj.weight,
        dt_proj=mamba.dt_proj.weight,
        dt_bias=mamba.dt_proj.bias,
        A_log=mamba.A_log,
        D=mamba.D,
        out_proj=mamba.out_proj.weight,
        mamba_mlp_norm=first.mlp_norm.weight,
        mamba_w1=mlps[0].w1.weight,
        mamba_w2=mlps[0].w2.weight,
        mamba_w3=mlps[0].w3.weight,
        conv_state=state.conv,
        scan_state=state.scan,
        attn_norm=second.attn_norm.weight,
        q_proj=attn.q_proj.weight,
        k_proj=attn.k_proj.weight,
        v_proj=attn.v_proj.weight,
        o_proj=attn.o_proj.weight,
        attn_mlp_norm=second.mlp_norm.weight,
        attn_w1=mlps[1].w1.weight,
        attn_w2=mlps[1].w2.weight,
        attn_w3=mlps[1].w3.weight,
        k_cache=ring.k,
        v_cache=ring.v,
        cache_seqlens=step.step_positions,
        window_size=attn.window_size,
        eps=first.mamba_norm.eps,
        rotary_cos=cos,
        rotary_sin=sin,
    )
    return out.unsqueeze(1)


# What the operator stands for, by the path of a module in a block.
_MAMBA_BLOCK = {
    "mamba": Mamba,
    "mamba_norm": RMSNorm,
    "mamba.in_proj": nn.Linear,
    "mamba.conv1d": nn.Conv1d,
    "mamba.x_proj": nn.Linear,
    "mamba.dt_proj": nn.Linear,
    "mamba.out_proj": nn.Linear,
}
_ATTENTION_BLOCK = {
    "attn": SlidingWindowAttention,
    "attn_norm": RMSNorm,
    "attn.q_proj": nn.Linear,
    "attn.k_proj": nn.Linear,
    "attn.v_proj": nn.Linear,
    "attn.o_proj": nn.Linear,
}
_MLP = {
    "mlp_norm": RMSNorm,
    "mlp": SwiGLU,
    "mlp.w1": nn.Linear,
    "mlp.w2": nn.Linear,
    "mlp.w3": nn.Linear,
}


def _as_pair(blocks: Iterable[nn.Module]) -> tuple[SambaBlock, SambaBlock] | tuple[None, None]:
    """The two blocks, if they are a Mamba block and an attention block as they were made."""
    found: list[Any] = list(blocks)
    if len(found) != 2:
        return None, None
    first, second = found
    if first.attn is not None or second.mamba is not None:
        return None, None
    if not _is_plain(first, _MAMBA_BLOCK | _MLP) or not _is_plain(second, _ATTENTION_BLOCK | _MLP):
        return None, None
    mamba, attn = first.mamba, second.attn
    extras = (mamba.in_proj.bias, mamba.out_proj.bias, mamba.dt_layernorm, attn.q_proj.bias)
    if any(part is not None for part in extras):
        return None, None
    if len({norm.eps for norm in (first.mamba_norm, first.mlp_norm, second.attn_norm, second.mlp_norm)}) != 1:
        return None, None
    return first, second


def _is_plain(block: nn.Module, kinds: dict[str, type[nn.Module]]) -> bool:
    modules = dict(block.named_modules())
    return not _has_hooks(block) and all(
        type(modules.get(path)) is kind and not _has_hooks(modules[path]) for path, kind in kinds.items()
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
