"""Models of transformers are scored through their hidden states: the losses are those of their own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlm.methods import rho1
from fastlm.training import InputError
from tests.methods.rho1.hf_models import VOCABULARY, make_model, transformers
from tests.methods.rho1.scored import SETTINGS, contents, direct_losses


def documents() -> list[np.ndarray]:
    chance = np.random.default_rng(0)
    return [chance.integers(3, VOCABULARY, n) for n in (1, 2, 15, 16, 17, 40, 31, 30, 33, 64)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "mixtral", "cohere", "gpt2", "samba"])
def test_values_are_the_losses_of_the_models_own_logits(tmp_path: Path, name: str) -> None:
    model = make_model(name)
    store = rho1.score(model, documents(), tmp_path / "s", context=16, entropy=True, **SETTINGS)
    assert model.training
    model.eval()
    for tokens in documents():
        losses, entropies = direct_losses(model, tokens, 16)
        key = rho1.document_key(tokens)
        np.testing.assert_allclose(store.nll(key, 0, 99), losses, atol=5e-5)
        np.testing.assert_allclose(store.entropy(key, 0, 99), entropies, atol=5e-5)


def test_rows_that_are_padded_have_the_same_values(tmp_path: Path) -> None:
    model = make_model("llama").eval()
    store = rho1.score(model, documents(), tmp_path / "s", **{**SETTINGS, "batch_tokens": 400})
    for tokens in documents():
        losses, _ = direct_losses(model, tokens, None)
        np.testing.assert_allclose(store.nll(rho1.document_key(tokens), 0, 99), losses, atol=5e-5)


@pytest.mark.slow
def test_a_model_goes_to_the_workers(tmp_path: Path) -> None:
    model = make_model("llama")
    rho1.score(model, documents(), tmp_path / "a", context=16, **SETTINGS)
    rho1.score(model, documents(), tmp_path / "b", context=16, workers=2, **SETTINGS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_bfloat16_weights_are_scored_as_they_are(tmp_path: Path) -> None:
    model = make_model("llama").bfloat16().eval()
    store = rho1.score(model, documents(), tmp_path / "s", context=16, **{**SETTINGS, "dtype": "auto"})
    assert store.manifest.dtype == "bf16"
    losses, _ = direct_losses(model, documents()[5], 16)
    np.testing.assert_allclose(store.nll(rho1.document_key(documents()[5]), 0, 99), losses, atol=0.1)


class _Odd(transformers.LlamaForCausalLM):
    """Does something to its logits that no configuration tells."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        out = super().forward(*arguments, **keywords)
        out.logits = out.logits * 1.5
        return out


def test_what_cannot_be_scored_is_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_model("llama")
    with pytest.raises(
        InputError, match=r"model: _Odd: its logits are neither those of its output projection"
    ):
        rho1.score(_Odd(model.config), documents(), tmp_path / "a", context=16, **SETTINGS)
    small = make_model("llama", max_position_embeddings=32)
    with pytest.raises(
        InputError, match=r"context: expected at most 32 tokens, the positions of the model, got 33"
    ):
        rho1.score(small, documents(), tmp_path / "b", context=33, **SETTINGS)
    with pytest.raises(
        InputError, match=r"context: expected at most 32 .*, got None, with documents of up to 63"
    ):
        rho1.score(small, documents(), tmp_path / "c", **SETTINGS)
    with pytest.raises(InputError, match=r"expected token ids below 61"):
        rho1.score(small, [[1, 61]], tmp_path / "d", **SETTINGS)
    base = model.model
    with pytest.raises(InputError, match=r"expected a causal language model whose output embeddings"):
        rho1.score(base, documents(), tmp_path / "e", context=16, **SETTINGS)
