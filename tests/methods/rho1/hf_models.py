"""Tiny models and documents for the tests of the transformers part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlm.methods.rho1.head import next_tokens
from fastlm.methods.rho1.store import document_key
from tests.methods.rho1.documents import VOCABULARY, FakeStore

transformers = pytest.importorskip("transformers", minversion="5.24", reason="needs the extra fastlm[hf]")
pytest.importorskip("accelerate", reason="needs the extra fastlm[hf]")
pytest.importorskip("fastlm.models.samba.hf")

_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2}
_COMMON |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HEADS = _COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2, "output_router_logits": True}
_GEMMA = {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 6}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 4}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _HEADS),
    "qwen2": ("Qwen2ForCausalLM", _HEADS | {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", _HEADS | _GEMMA),
    "mixtral": ("MixtralForCausalLM", _HEADS | _EXPERTS | {"router_aux_loss_coef": 0.5}),
    "cohere": ("CohereForCausalLM", _HEADS | {"logit_scale": 0.25}),
    "granite": ("GraniteForCausalLM", _HEADS | {"logits_scaling": 0.3}),
    "hyperclovax": ("HyperCLOVAXForCausalLM", _HEADS | {"logits_scaling": 3.0}),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
}


def make_model(name: str, **fields: Any) -> Any:
    """A model without dropout whose logits are far from 0, so that softcaps and factors show."""
    torch.manual_seed(0)
    if name.startswith("samba"):
        from fastlm.models.samba import SambaConfig

        experts = {"num_experts": 4, "router_aux_loss_coef": 0.5} if name == "samba moe" else {}
        values = SambaConfig.from_preset("tiny", vocab_size=VOCABULARY, **experts).to_dict()
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values | fields)
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        class_name, values = CONFIGS[name]
        model_class = getattr(transformers, class_name)
        model = model_class(model_class.config_class(**values | fields))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.add_(0.5 * torch.randn_like(head))
    return model.train()


def own_nll(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Loss of every prediction by the model's own logits, `(B, L)`, 0 where nothing is predicted."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
    model.train(mode)
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), next_tokens(labels).flatten(), reduction="none"
    )
    return losses.view_as(ids)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to float32 rounding, measured by each parameter's largest entry."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        allowed = 1e-5 * max(1.0, float(gradient.abs().max()))
        difference = float((found[name] - gradient).abs().max())
        assert difference <= allowed, f"{name}: differs by {difference:.2e}, allowed {allowed:.2e}"


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scored(rows: list[list[int]], *, model: Any = None, seed: int = 0) -> FakeStore:
    """Reference losses of documents: a model's, each document on its own, or random ones."""
    chance = np.random.default_rng(seed)
    scores = {}
    for row in rows:
        values = chance.uniform(1, 6, len(row) - 1)
        if model is not None:
            values = own_nll(model, torch.tensor([row]))[0, :-1].numpy()
        scores[document_key(np.asarray(row))] = values.astype(np.float32)
    return FakeStore(scores)


def masked_labels(model: Any, batch: dict[str, Tensor], keep_ratio: float) -> Tensor:
    """Labels of the tokens with the largest excess loss, counted as the method says; everything else is -100."""
    loss = own_nll(model, batch["input_ids"], batch["attention_mask"])
    excess = (loss - batch["ref_nll"]).flatten()
    eligible = excess.isfinite()
    n = int(eligible.sum())
    count = min(n, max(1, math.floor(keep_ratio * n + 0.5)))
    chosen = torch.topk(excess.masked_fill(~eligible, -torch.inf), count).indices
    labels = torch.full_like(batch["input_ids"].flatten(), -100)
    labels[chosen + 1] = batch["input_ids"].flatten()[chosen + 1]  # the label stands one place later
    return labels.view_as(batch["input_ids"])
