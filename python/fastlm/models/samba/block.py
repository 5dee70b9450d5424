"""One block of the model: mixers and a feed-forward layer, each behind its norm and added to the residual stream."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlm.layers import GrinMoE, LayerNorm, Mamba, RMSNorm, Routing, SlidingWindowAttention, SwiGLU
from fastlm.models.samba.cache import LayerCache
from fastlm.models.samba.config import SambaConfig
from fastlm.models.samba.passes import Pass


def make_norm(config: SambaConfig, **like: Any) -> RMSNorm | LayerNorm:
    """A norm of the residual stream, of the configuration's kind."""
    kind = RMSNorm if config.norm_type == "rms_norm" else LayerNorm
    return kind(config.hidden_size, config.rms_norm_eps, **like)


class SambaBlock(nn.Module):
    """Mixers and feed-forward layer of one block, each behind its norm and added to the residual stream."""

    def __init__(
        self, config: SambaConfig, kind: str, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        like = {"device": device, "dtype": dtype}
        self.mamba: Mamba | None = None
        self.attn: SlidingWindowAttention | None = None
        if "mamba" in kind:
            self.mamba_norm = make_norm(config, **like)
            self.mamba = Mamba(
                config.hidden_size,
                config.state_size,
                config.conv_kernel,
                config.expand,
                config.time_step_rank or "auto",
                dt_min=config.time_step_min,
                dt_max=config.time_step_max,
                dt_init_floor=config.time_step_floor,
                **like,
            )
        if "sliding_attention" in kind:
            self.attn_norm = make_norm(config, **like)
            self.attn = SlidingWindowAttention(
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                head_dim=config.head_dim,
                sliding_window=config.sliding_window,
                rope_theta=config.rope_theta if config.use_rope else None,
                bias=config.attention_bias,
                **like,
            )
        self.mlp_norm = make_norm(config, **like)
        self.mlp: SwiGLU | GrinMoE
        if config.num_experts:
            self.mlp = GrinMoE(
                config.hidden_size,
                config.intermediate_size,
                config.num_experts,
                config.num_experts_per_tok,
                router_jitter_noise=config.router_jitter_noise,
                input_jitter_noise=config.input_jitter_noise,
                estimator=cast("Any", config.router_estimator),
                expert_grad=cast("Any", config.expert_grad),
                **like,
            )
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, **like)

    def forward(
        self, x: Tensor, step: Pass, cache: LayerCache | None = None, *, routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing | None]:
        """Residual stream `x (B, L, d)` in, residual stream out; `cache` is written in place.

        With `routing` also what the router decided, None where the feed-forward layer has none.
        """
        if self.mamba is not None:
            x = x + self._mamba(self.mamba, self.mamba_norm(x), step, cache)
        if self.attn is not None:
            x = x + self._attend(self.attn, self.attn_norm(x), step, cache)
        if not routing:
            return self.feed_forward(x)
        if isinstance(self.mlp, GrinMoE):
            out, decided = self.mlp.forward_with_routing(self.mlp_norm(x))
            return x + out, decided
        return self.feed_forward(x), None

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half of the block: residual stream behind the mixers in, behind the block out."""
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out

    @staticmethod
    def _mamba(mamba: Mamba, h: Tensor, step: Pass, cache: LayerCache | None) -> Tensor:
        state = None if cache is None else cache.mamba
        if state is None:
            out: Tensor = mamba(h, cu_seqlens=step.cu_seqlens)
            return out
        if step.step_positions is not None:
            return mamba.step(h, state)
        out, new = mamba(h, state, cu_seqlens=step.cu_seqlens, return_state=True)
        with torch.no_grad():
            state.conv.copy_(new.conv)
            state.scan.copy_(new.scan)
        return out

    @staticmethod
    def _attend(attn: SlidingWindowAttention, h: Tensor, step: Pass, cache: LayerCache | None) -> Tensor:
        ring = None if cache is None else cache.attention
        if ring is not None and step.step_positions is not None:
            return attn.step(h, ring, step.step_positions, rotary=step.rotary)
        out: Tensor = attn(
            h,
            ring,
            step.ring_plan,
            rotary=step.rotary,
            cu_seqlens=step.cu_seqlens,
            max_seqlen=step.max_seqlen,
        )
        return out
