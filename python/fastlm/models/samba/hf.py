"""Samba inside transformers: `AutoConfig` and `AutoModelForCausalLM` know `model_type` `fastlm_samba` after
importing this.

Parameter names are those of `SambaForCausalLM`, so a directory that either side saved is read by both. Needs
the extra `fastlm[hf]`; nothing else of fastlm imports this file.

Example:
    import fastlm.models.samba.hf
    model = transformers.AutoModelForCausalLM.from_pretrained("my-samba")
    model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=50)
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        f"fastlm.models.samba.hf needs transformers 5: pip install 'fastlm[hf]' ({error})"
    ) from error

from fastlm import ops
from fastlm.layers import Routing
from fastlm.layers.rms_norm import compute_dtype
from fastlm.models.samba.cache import SambaCache
from fastlm.models.samba.config import MODEL_TYPE, SambaConfig
from fastlm.models.samba.modeling import SambaModel, auxiliary_loss, next_tokens, scale_initial_values

_FIELDS = tuple(field.name for field in fields(SambaConfig))


class FastlmSambaConfig(PreTrainedConfig):  # type: ignore[misc]  # untyped base
    """`SambaConfig` as transformers wants it; the same fields, checked the same way."""

    model_type = MODEL_TYPE

    def __init__(self, **values: Any) -> None:
        own = {name: values.pop(name) for name in _FIELDS if name in values}
        checked = SambaConfig.from_dict({"model_type": MODEL_TYPE, **own})
        for name in _FIELDS:
            setattr(self, name, getattr(checked, name))
        super().__init__(**values)

    def to_samba(self) -> SambaConfig:
        """The native configuration."""
        return SambaConfig(**{name: getattr(self, name) for name in _FIELDS})


class FastlmSambaForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # untyped bases
    """Samba as a transformers model: `generate`, `Trainer`, `pipeline` and evaluation harnesses take it as
    they are.

    Padding on either side, told by `attention_mask`, is taken out before the model runs and put back into the
    output.
    """

    config_class = FastlmSambaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # the cache cannot be cropped
    loss_is_fused = True  # read by fastlm.methods.rho1.patch_loss: there is nothing to improve
    _no_split_modules = ("SambaBlock",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (read by transformers)

    def __init__(self, config: FastlmSambaConfig) -> None:
        super().__init__(config)
        sizes = config.to_samba()
        self.model = SambaModel(sizes)
        self.lm_head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=sizes.lm_head_bias)
        scale_initial_values(self.model, sizes)
        self._drawn = not self.lm_head.weight.is_meta
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Layers draw their own initial values; a checkpoint has to bring every tensor."""
        for name, parameter in module.named_parameters(recurse=False):
            if (
                not self._drawn
                and not parameter.is_meta
                and not getattr(parameter, "_is_hf_initialized", False)
            ):
                raise ValueError(
                    f"FastlmSambaForCausalLM: {type(module).__name__}.{name} of shape "
                    f"{tuple(parameter.shape)} is missing from the checkpoint"
                )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the cache is a SambaCache, made in prepare_inputs_for_generation

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: SambaCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **_ignored: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        """Hidden states, then loss or logits; arguments as in transformers, labels are shifted inside.

        Without labels logits are returned; with labels the loss alone, since the logits would take most of
        the memory. In training a model with experts also returns `aux_loss`, without its coefficient.
        """
        if use_cache and past_key_values is None:
            past_key_values = self._new_cache(input_ids.shape[0])
        routing: list[Routing] | None = [] if self.config.num_experts and self.training else None
        hidden = self._hidden(input_ids, attention_mask, past_key_values, routing)
        output: dict[str, Any] = {"past_key_values": past_key_values}
        if labels is not None:
            output["loss"] = self._loss(hidden, labels, attention_mask, num_items_in_batch)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output["logits"] = self.lm_head(hidden[:, kept])
        if not routing:
            return CausalLMOutputWithPast(**output)
        output["aux_loss"] = auxiliary_loss(routing, 1.0)
        if labels is not None:
            output["loss"] = output["loss"] + self.config.router_aux_loss_coef * output["aux_loss"]
        return MoeCausalLMOutputWithPast(**output)

    def _hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: SambaCache | None,
        routing: list[Routing] | None,
    ) -> Tensor:
        """Hidden states `(B, L, d)`; padded positions are left out of the pass and get zeros."""
        if attention_mask is None or bool(attention_mask.all()):
            hidden: Tensor = self.model(input_ids, cache, routing=routing)
            return hidden
        real = attention_mask.bool()
        cu_seqlens = functional.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        packed: Tensor = self.model(
            input_ids[real].unsqueeze(0), cache, cu_seqlens=cu_seqlens, routing=routing
        )
        return packed.new_zeros(*input_ids.shape, packed.shape[-1]).index_put((real,), packed[0])

    def _loss(
        self, hidden: Tensor, labels: Tensor, attention_mask: Tensor | None, num_items: Tensor | int | None
    ) -> Tensor:
        """Mean over labelled tokens, or their sum divided by `num_items`; padding predicts nothing."""
        targets = next_tokens(labels)
        if attention_mask is not None:
            targets = targets.masked_fill(attention_mask == 0, -100)
        weight = self.lm_head.weight.to(hidden.dtype)
        reduction: Literal["mean", "sum"] = "mean" if num_items is None else "sum"
        loss = ops.linear_cross_entropy(
            hidden.flatten(0, 1), weight, targets.flatten(), self.lm_head.bias, reduction=reduction
        )
        return loss if num_items is None else loss / num_items

    def _new_cache(self, batch_size: int) -> SambaCache:
        weight = self.lm_head.weight
        return SambaCache.empty(
            self.config.to_samba(), batch_size, device=weight.device, dtype=compute_dtype(weight, weight)
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: SambaCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        **_ignored: Any,
    ) -> dict[str, Any]:
        """Only what the cache has not seen yet goes to the model."""
        if not use_cache:
            return {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "use_cache": False,
                "logits_to_keep": 1,
            }
        if past_key_values is None:
            past_key_values = self._new_cache(input_ids.shape[0])
        total = (
            [input_ids.shape[1]] * input_ids.shape[0]
            if attention_mask is None
            else attention_mask.sum(1).tolist()
        )
        new = input_ids.shape[1]
        if any(past_key_values.lengths):
            new = max(t - seen for t, seen in zip(total, past_key_values.lengths, strict=True))
        return {
            "input_ids": input_ids[:, -new:],
            "attention_mask": None if attention_mask is None or new == 1 else attention_mask[:, -new:],
            "past_key_values": past_key_values,
            "use_cache": True,
            "logits_to_keep": 1,
        }

    def _reorder_cache(self, past_key_values: SambaCache, beam_idx: Tensor) -> SambaCache:
        return past_key_values.select(beam_idx.tolist())


AutoConfig.register(MODEL_TYPE, FastlmSambaConfig, exist_ok=True)
AutoModelForCausalLM.register(FastlmSambaConfig, FastlmSambaForCausalLM, exist_ok=True)
