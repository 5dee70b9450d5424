"""Samba inside transformers: both sides read each other's directories and generate the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from fastlm.models.samba import SambaConfig, SambaForCausalLM

transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs the extra fastlm[hf]")
hf = pytest.importorskip("fastlm.models.samba.hf")


@pytest.fixture
def native() -> SambaForCausalLM:
    torch.manual_seed(0)
    return SambaForCausalLM(SambaConfig.from_preset("tiny")).eval()


@pytest.fixture
def directory(native, tmp_path) -> Path:
    native.save_pretrained(tmp_path / "native")
    return tmp_path / "native"


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(96, (2, 15), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False])
def test_both_sides_read_each_others_directories(tmp_path, ids, tied):
    native = SambaForCausalLM(SambaConfig.from_preset("tiny", tie_word_embeddings=tied)).eval()
    native.save_pretrained(tmp_path / "native")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model(ids).logits, native(ids).logits)
    assert_close(model(ids, labels=ids).loss, native(ids, labels=ids).loss)
    model.save_pretrained(tmp_path / "hf")
    assert torch.equal(SambaForCausalLM.from_pretrained(tmp_path / "hf")(ids).logits, native(ids).logits)


def test_generation_equals_the_native_one(native, directory, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    expected = native.generate(ids, max_new_tokens=20)
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, use_cache=False), expected)
    assert model.generate(ids, max_new_tokens=5, num_beams=3).shape == (2, 20)


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_taken_out(native, directory, ids, left):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    mask = torch.ones_like(ids)
    mask[0, slice(None, 6) if left else slice(9, None)] = 0
    real = mask[0].bool()
    padded = model(ids, attention_mask=mask).logits
    assert_close(padded[0, real], native(ids[:1, real]).logits[0])
    assert_close(padded[1], native(ids[1:]).logits[0])
    labels = ids.masked_fill(mask == 0, -100)
    counts = torch.tensor([int(real.sum()) - 1, 14])
    alone = torch.stack([native(x, labels=x).loss for x in (ids[:1, real], ids[1:])])
    loss = model(ids, attention_mask=mask, labels=labels).loss
    assert_close(loss, (alone * counts).sum() / counts.sum())
    assert_close(
        model(ids, attention_mask=mask, labels=labels, num_items_in_batch=100).loss,
        (alone * counts).sum() / 100,
    )
    if left:
        expected = native.generate(ids, attention_mask=mask, max_new_tokens=12)
        got = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        assert torch.equal(got, expected)


def test_a_checkpoint_that_lacks_weights_is_refused(directory):
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.mamba.A_log"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"Mamba\.A_log of shape \(64, 4\) is missing from the checkpoint"):
        transformers.AutoModelForCausalLM.from_pretrained(directory)


def test_half_precision_keeps_the_state_parameters(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    kept = {name.rsplit("mamba.")[-1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_proj.bias"}


def test_a_new_model_has_the_native_initial_values():
    fields = SambaConfig.from_preset("tiny").to_dict()
    fields.pop("model_type")
    config = transformers.AutoConfig.for_model("fastlm_samba", **fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.model.layers[0].mlp.w3.weight.abs().max() <= 60**-0.5 / 8**0.5
    with pytest.raises(ValueError, match="hidden_size must be an integer"):
        hf.FastlmSambaConfig(hidden_size=0)


def test_gradient_checkpointing_reaches_the_blocks(directory, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).train()
    model(ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.model.gradient_checkpointing
    model(ids, labels=ids).loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(expected, model.parameters(), strict=True))


# Experts


def test_experts_train_and_generate_as_in_the_native_model(tmp_path, ids):
    torch.manual_seed(0)
    changes = {"num_experts": 5, "router_aux_loss_coef": 0.5, "tie_word_embeddings": False}
    native = SambaForCausalLM(SambaConfig.from_preset("tiny", lm_head_bias=True, **changes))
    torch.nn.init.normal_(native.lm_head.bias)
    native.eval().save_pretrained(tmp_path / "native")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert torch.equal(model(ids).logits, native(ids).logits)
    assert_close(model(ids, labels=ids).loss, native(ids, labels=ids).loss)
    expected = native.generate(ids, max_new_tokens=12)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)

    results = []
    for trained in (native.train(), model.train()):
        torch.manual_seed(5)
        trained(ids, labels=ids).loss.backward()
        results.append({name: p.grad for name, p in trained.named_parameters()})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert_close(results[1][name], expected)
    assert results[1]["model.layers.0.mlp.router.weight"].abs().sum() > 0

    model.eval().save_pretrained(tmp_path / "hf")
    assert torch.equal(SambaForCausalLM.from_pretrained(tmp_path / "hf")(ids).logits, model(ids).logits)


def test_padding_meets_no_expert(ids, tmp_path):
    SambaForCausalLM(SambaConfig.from_preset("tiny", num_experts=5)).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    counted: list[int] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _m, args: counted.append(args[0].shape[0]))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    out = model(ids, attention_mask=mask).logits
    assert counted == [int(mask.sum())]
    assert_close(out[0, 6:], model(ids[:1, 6:]).logits[0])
