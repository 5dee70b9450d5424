"""The Samba language model: blocks of (Mamba | sliding-window attention) and a feed-forward layer, SwiGLU or a
mixture of experts, over a float32 residual stream.

Ren et al., arXiv 2406.07522, section 2. Activations are `(B, L, d)` from end to end. With labels the loss
comes from a fused linear cross-entropy, so no `(tokens, vocabulary)` logits exist unless they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fastlm import ops
from fastlm.layers import (
    GrinMoE,
    LayerNorm,
    Mamba,
    RMSNorm,
    RotaryTable,
    Routing,
    SlidingWindowAttention,
    SwiGLU,
)
from fastlm.layers.rms_norm import at_least_float32, compute_dtype
from fastlm.models.samba.block import SambaBlock, make_norm
from fastlm.models.samba.cache import SambaCache
from fastlm.models.samba.checkpoint import load_pretrained, save_pretrained
from fastlm.models.samba.config import SambaConfig
from fastlm.models.samba.decoding import step_pair
from fastlm.models.samba.generation import GenerationMixin
from fastlm.models.samba.passes import plan_pass


@dataclass
class SambaOutput:
    """What `SambaForCausalLM.forward` returns.

    Attributes:
        loss: float32 scalar, mean over labelled tokens, if labels were given; in training with experts `aux_loss` is part of it.
        logits: `(B, kept, V)`, if kept.
        cache: the cache that was passed in, now further on.
        aux_loss: float32 scalar, the load-balance loss of all layers times its coefficient, with experts and labels.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: SambaCache | None = None
    aux_loss: Tensor | None = None


class SambaModel(nn.Module):
    """Embedding, blocks and final norm: token ids in, hidden states out."""

    def __init__(self, config: SambaConfig, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            SambaBlock(config, kind, device=device, dtype=dtype) for kind in config.layer_types
        )
        self.norm = make_norm(config, device=device, dtype=dtype)
        self.rotary: RotaryTable | None = None  # one table for all blocks
        if config.use_rope and any("sliding_attention" in kind for kind in config.layer_types):
            self.rotary = RotaryTable(config.head_dim or 2, config.rope_theta)

    def forward(
        self,
        input_ids: Tensor,
        cache: SambaCache | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        routing: list[Routing] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, `(B, L, d)`; arguments as in `SambaForCausalLM.forward`.

        What the routers of mixture-of-experts layers decide is appended to `routing`, in the order of the layers.
        """
        x = at_least_float32(self.embed_tokens(input_ids))
        step = plan_pass(x, self.rotary, cache, cu_seqlens, max_seqlen)
        remember = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        done = 0  # blocks
        while done < len(self.layers):
            pair = (
                None
                if cache is None
                else step_pair(self.layers[done : done + 2], cache.layers[done:], x, step)
            )
            if pair is not None:
                x, done = pair, done + 2
                continue
            block = self.layers[done]
            decided: Routing | None = None
            if remember:
                x, decided = checkpoint(block, x, step, routing=True, use_reentrant=False)
            elif routing is None:
                x = block(x, step, None if cache is None else cache.layers[done])
            else:
                x, decided = block(x, step, None if cache is None else cache.layers[done], routing=True)
            if routing is not None and decided is not None:
                routing.append(decided)
            done += 1
        if cache is not None:
            cache.advance(step.seqlens)
        hidden: Tensor = self.norm(x)
        return hidden


class SambaForCausalLM(GenerationMixin, nn.Module):
    """Samba with an output projection, for training and generation.

    Args:
        config: sizes; `SambaConfig.from_preset("Samba_421M")` and others are published ones.
        device, dtype: of the parameters. Mixed precision is autocast over float32 parameters; with
            half-precision parameters the residual stream, norms and scan states are float32 all the same.

    Source: Ren et al., arXiv 2406.07522; initialisation of the public code: residual projections are divided
    by the square root of the number of residual branches.

    Example:
        >>> import torch
        >>> model = SambaForCausalLM(SambaConfig.from_preset("tiny"))
        >>> ids = torch.randint(96, (2, 12))
        >>> model(ids, labels=ids).loss.shape
        torch.Size([])
        >>> model.generate(ids, max_new_tokens=3).shape
        torch.Size([2, 15])
    """

    def __init__(self, config: SambaConfig, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = SambaModel(config, device=device, dtype=dtype)
        # tied: the embedding is the projection, and there is no second name for it
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(
                config.hidden_size, config.vocab_size, bias=config.lm_head_bias, device=device, dtype=dtype
            )
        scale_initial_values(self, config)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, for instance after `to_empty`."""
        for module in self.modules():
            if isinstance(module, (GrinMoE, LayerNorm, Mamba, RMSNorm, SlidingWindowAttention, SwiGLU)):
                module.reset_parameters()
        if self.lm_head is not None:
            self.lm_head.reset_parameters()
        scale_initial_values(self, self.config)

    @property
    def output_weight(self) -> Tensor:
        """`(V, d)` weight of the output projection."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def output_bias(self) -> Tensor | None:
        """`(V,)` bias of the output projection, if it has one."""
        return None if self.lm_head is None else self.lm_head.bias

    def gradient_checkpointing_enable(self, enabled: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.model.gradient_checkpointing = enabled

    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def new_cache(
        self, batch_size: int, *, step_tokens: int = 1, dtype: torch.dtype | None = None, **options: Any
    ) -> SambaCache:
        """An empty cache on the model's device, in the dtype it computes in; see `SambaCache.empty`."""
        weight = self.model.embed_tokens.weight
        options = {"device": weight.device, "state_dtype": at_least_float32(weight[:0]).dtype, **options}
        dtype = dtype or compute_dtype(weight, weight)
        return SambaCache.empty(self.config, batch_size, step_tokens=step_tokens, dtype=dtype, **options)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        cache: SambaCache | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool | None = None,
    ) -> SambaOutput:
        """Run the model over new tokens.

        Args:
            input_ids: `(B, L)` token ids; with `cu_seqlens`, `(1, T)`.
            labels: shape of `input_ids`; position `t` is compared with label `t + 1`, -100 is left out.
                Between packed sequences nothing is predicted.
            cache: state of earlier tokens, one row per sequence; advanced in place. `L > 1` continues by many
                tokens (a prefill chunk), `L = 1` is a decode step; both equal one pass over everything. For
                inference: gradients do not reach back through the cache.
            cu_seqlens: `(S+1,)` int32, bounds of packed sequences, which then do not see each other.
            max_seqlen: longest packed sequence in tokens, if known.
            logits_to_keep: number of last positions to compute logits for, 0 for all; or a 1-D index of
                positions.
            return_logits: default: only without labels.

        Returns:
            `SambaOutput(loss, logits, cache, aux_loss)`.

        Raises:
            ValueError: the rows of `input_ids`, `cu_seqlens` and `cache` do not fit, or labels have another
                shape.
            IndexError: a token id is outside the vocabulary.
        """
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"SambaForCausalLM: labels must have the shape of input_ids, {tuple(input_ids.shape)}, "
                f"got {tuple(labels.shape)}"
            )
        routing: list[Routing] | None = [] if labels is not None and self.config.num_experts else None
        hidden = self.model(input_ids, cache, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, routing=routing)
        loss = None if labels is None else self.loss(hidden, labels, cu_seqlens=cu_seqlens)
        aux_loss = self.auxiliary_loss(routing) if routing else None
        if loss is not None and aux_loss is not None and self.training:
            loss = loss + aux_loss
        logits = None
        if return_logits or (return_logits is None and labels is None):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.logits(hidden[:, kept])
        return SambaOutput(loss=loss, logits=logits, cache=cache, aux_loss=aux_loss)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `(..., V)` of hidden states `(..., d)` after the final norm."""
        return functional.linear(hidden, self.output_weight, self.output_bias)

    def auxiliary_loss(
        self, routing: Sequence[Routing], group: torch.distributed.ProcessGroup | None = None
    ) -> Tensor:
        """The load-balance loss of what `SambaModel.forward` collected, see the function of this name."""
        return auxiliary_loss(routing, self.config.router_aux_loss_coef, group)

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        *,
        shift_labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """Next-token cross-entropy of hidden states `(B, L, d)`.

        Args:
            hidden: after the final norm.
            labels: `(B, L)` token ids, compared one position later, see `forward`; or
            shift_labels: `(B, L)`, what each position predicts, -100 where nothing.
            cu_seqlens: bounds of packed sequences, for `labels`.
            reduction: `none` gives `(B*L,)`.

        Raises:
            ValueError: both or none of `labels` and `shift_labels`.
        """
        if (labels is None) == (shift_labels is None):
            raise ValueError("SambaForCausalLM.loss: expected one of labels and shift_labels")
        targets = shift_labels if labels is None else next_tokens(labels, cu_seqlens)
        assert targets is not None
        weight = self.output_weight.to(hidden.dtype)
        return ops.linear_cross_entropy(
            hidden.flatten(0, 1), weight, targets.flatten(), self.output_bias, reduction=reduction
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, see `fastlm.models.samba.checkpoint`."""
        save_pretrained(self, directory)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> SambaForCausalLM:
        """Read a model that `save_pretrained` wrote, see `fastlm.models.samba.checkpoint`."""
        return load_pretrained(cls, directory, device=device, dtype=dtype)


def auxiliary_loss(
    routing: Sequence[Routing], coefficient: float, group: torch.distributed.ProcessGroup | None = None
) -> Tensor:
    """Sum of the layers' load-balance losses times `coefficient`, float32 scalar.

    Args:
        routing: of every layer.
        coefficient: `alpha`; GRIN's is not published.
        group: the shares of the experts are taken over all its processes, as in GRIN.

    Source: Liu et al., arXiv 2409.12136, section 3.3.
    """
    losses = [
        ops.load_balance_loss(r.router_logits, r.expert_counts, alpha=coefficient, group=group)
        for r in routing
    ]
    return torch.stack(losses).sum()


_RESIDUAL_PROJECTIONS = (
    "mamba.out_proj.weight",
    "attn.o_proj.weight",
    "mlp.w3.weight",
    "mlp.experts.down_proj",
)


@torch.no_grad()
def scale_initial_values(model: nn.Module, config: SambaConfig) -> None:
    """What the layers cannot know: a narrow embedding, and residual projections that shrink with depth."""
    scale = 1.0 / math.sqrt(config.num_residual_branches)
    for name, parameter in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            nn.init.normal_(parameter, std=config.initializer_range)
        elif name.endswith(_RESIDUAL_PROJECTIONS):
            parameter.mul_(scale)


def next_tokens(labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """What each position predicts: `labels (B, L)` shifted left, -100 at the ends of rows and sequences."""
    targets = torch.full_like(labels, -100)
    targets[:, :-1] = labels[:, 1:]
    if cu_seqlens is not None:
        targets[:, cu_seqlens[1:].long() - 1] = -100
    return targets
