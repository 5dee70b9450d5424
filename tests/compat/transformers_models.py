"""Tiny random transformers models, and what is compared between two ways to run one of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

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


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from a second thread, and wait for it when others use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A model with weights large enough that every part of it matters."""
    class_name, config_fields = (MAMBA | ATTENTION)[name]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**config_fields | fields)
    config._attn_implementation = "eager"
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
