"""Tiny random transformers models, and what is compared between two ways to run one of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.tolerance import assert_close_to_reference

transformers = pytest.importorskip("transformers", minversion="5.24", reason="needs the extra fastlm[hf]")

VOCABULARY = 61
WINDOW = 6
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = _COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
_ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_JAMBA = _HEADS | {"mamba_d_state": 5, "mamba_dt_rank": 3, "num_experts": 1, "num_experts_per_tok": 1}

# Classes and fields of their configurations, by the name of the family.
MAMBA = {
    "mamba": ("MambaForCausalLM", _COMMON | {"state_size": 5, "conv_kernel": 4}),
    "mamba biased gelu": (
        "MambaForCausalLM",
        _COMMON | {"state_size": 4, "conv_kernel": 3, "use_bias": True, "hidden_act": "gelu"},
    ),
    "falcon_mamba": ("FalconMambaForCausalLM", _COMMON | {"state_size": 5, "use_conv_bias": False}),
    "jamba": ("JambaForCausalLM", _JAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1}),
}
ATTENTION = {
    "llama": ("LlamaForCausalLM", _HEADS),
    "mistral": ("MistralForCausalLM", _HEADS | {"sliding_window": WINDOW}),
    "phi3": ("Phi3ForCausalLM", _HEADS | {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2ForCausalLM", _HEADS | _ALTERNATING | {"use_sliding_window": True}),
    "gemma2": (
        "Gemma2ForCausalLM",
        _HEADS | _ALTERNATING | {"head_dim": 8, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 1.5},
    ),
    "gemma3": ("Gemma3ForCausalLM", _HEADS | _ALTERNATING | {"head_dim": 16}),
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
_LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
_ROUTED = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
_SMALL = {"moe_intermediate_size": 16}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_BLOCKS = {"mamba_num_heads": 6, "mamba_head_dim": 8, "ssm_state_size": 5, "n_groups": 1, "chunk_size": 8}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
# Mixtures of experts, each with what sets it apart.
MOE = {
    "mixtral": ("MixtralForCausalLM", _HEADS | _LOCAL),
    "phimoe": ("PhimoeForCausalLM", _HEADS | _LOCAL | {"router_jitter_noise": 0.4}),
    "olmoe": ("OlmoeForCausalLM", _HEADS | _EXPERTS),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _HEADS | _EXPERTS | _SMALL | {"head_dim": 8}),
    # A shared expert with a gate.
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        _HEADS | _EXPERTS | _SMALL | {"shared_expert_intermediate_size": 20},
    ),
    # Experts in every second layer, beside Mamba layers.
    "jamba moe": (
        "JambaForCausalLM",
        _JAMBA | _EXPERTS | {"attn_layer_period": 2, "expert_layer_period": 2, "attn_layer_offset": 1},
    ),
    # A dense layer in front, a shared expert, a latent attention.
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        _HEADS | _ROUTED | _SMALL | _LATENT | {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    # Biases, transposed weights, gate and up interleaved, a gate of its own.
    "gpt_oss": ("GptOssForCausalLM", _HEADS | _LOCAL | {"head_dim": 8, "sliding_window": WINDOW}),
    # No gate, relu squared, between the experts and the model a narrower space.
    "nemotron_h": (
        "NemotronHForCausalLM",
        _HEADS
        | _ROUTED
        | _SMALL
        | _BLOCKS
        | {
            "layers_block_type": ["moe", "full_attention", "moe"],
            "num_hidden_layers": 3,
            "head_dim": 8,
            "moe_latent_size": 12,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    # GELU by its tanh formula.
    "gemma4": (
        "Gemma4ForCausalLM",
        _HEADS
        | _SMALL
        | {
            "num_experts": 6,
            "top_k_experts": 2,
            "enable_moe_block": True,
            "head_dim": 8,
            "global_head_dim": 8,
        }
        | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 0},
    ),
    # Transposed weights.
    "aria": ("AriaTextForCausalLM", _HEADS | {"moe_num_experts": 6, "moe_topk": 2}),
    # More picks than the operator takes at once.
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        _HEADS
        | _SMALL
        | _LINEAR
        | {
            "num_experts": 12,
            "num_experts_per_tok": 10,
            "head_dim": 8,
            "shared_expert_intermediate_size": 16,
        },
    ),
    # An activation that the operator does not have.
    "mixtral gelu": ("MixtralForCausalLM", _HEADS | _LOCAL | {"hidden_act": "gelu"}),
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from a second thread, and wait for it when others use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A model with weights large enough that every part of it matters."""
    class_name, config_fields = (MAMBA | ATTENTION | MOE)[name]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**config_fields | fields)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            spread = 0.1 if parameter.dim() == 1 else 1 / parameter.shape[-1] ** 0.5
            parameter.add_(spread * torch.randn_like(parameter))
            if parameter_name.endswith("dt_proj.bias"):
                parameter.add_(3)  # larger steps: more passes through the state
    return model.to(dtype)


def random_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    """Token ids, without those that mean something to `generate`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def left_padding(ids: Tensor, *counts: int) -> Tensor:
    """A mask with that many positions of padding in front of each row."""
    return (torch.arange(ids.shape[1]) >= torch.tensor(counts)[:, None]).long()


def results_of(model: Any, ids: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Logits, loss and the gradient of every parameter, by name."""
    model.zero_grad()
    output = model(ids, labels=ids, use_cache=False, **arguments)
    output.loss.backward()
    gradients = {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), "loss": output.loss.detach()} | gradients


class Choices:
    """What `topk` chose in one run, to be chosen again in others.

    A router's second and third expert may be nearer to each other than two roundings: then a result is that of other
    experts, and says nothing about how exactly it was computed.
    """

    def __init__(self) -> None:
        self.indices: list[Tensor] = []

    def recorded(self) -> TorchDispatchMode:
        """Within: remembers the choices."""
        return _Recorded(self.indices)

    def repeated(self) -> TorchDispatchMode:
        """Within: chooses as before, in the same order of calls."""
        return _Repeated(list(self.indices))


class _Recorded(TorchDispatchMode):
    def __init__(self, indices: list[Tensor]) -> None:
        super().__init__()
        self.indices = indices

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return self.chosen(result, args[0]) if func is torch.ops.aten.topk.default else result

    def chosen(self, result: Any, scores: Tensor) -> Any:
        self.indices.append(result[1])
        return result


class _Repeated(_Recorded):
    def chosen(self, result: Any, scores: Tensor) -> Any:
        before = self.indices.pop(0)
        assert before.shape == result[1].shape
        return scores.gather(-1, before), before


def side_by_side(results: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several results as one: a tensor of few numbers may be rounded well by luck, and its twin then fails the rule."""
    found = [{name: value.clone() for name, value in result.items()} for result in results]
    return {name: torch.stack([result[name] for result in found]) for name in found[0]}


def in_double(model: Any) -> Any:
    """A copy in float64."""
    return copy.deepcopy(model).double()


def assert_all_close(
    actual: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """The tolerance rule for each result."""
    assert actual.keys() == exact.keys() == plain.keys()
    for name, value in actual.items():
        assert_close_to_reference(name, value, exact[name].to(torch.float64), plain[name], dtype=dtype)


def generated(model: Any, ids: Tensor, tokens: int = 14, **arguments: Any) -> Tensor:
    """Greedy continuation, the prompt included, that does not stop early."""
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    result: Tensor = model.generate(
        ids, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, **arguments
    )
    return result
