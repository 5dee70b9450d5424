"""The fused loss in place of a model's own: same value, same gradients, no logits."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch.testing import assert_close

from fastlm.methods import rho1
from tests.methods.rho1.documents import VOCABULARY
from tests.methods.rho1.hf_models import (
    assert_same_gradients,
    gradients,
    make_model,
    transformers,
)

FAMILIES = [
    "llama",
    "qwen2",
    "gemma2",
    "mixtral",
    "cohere",
    "granite",
    "hyperclovax",
    "gpt2",
    "samba",
    "samba moe",
]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels(ids: torch.Tensor) -> torch.Tensor:
    labels = ids.clone()
    labels[0, :4] = -100
    return labels


def results(model, seed=3, **arguments):
    model.zero_grad()
    torch.manual_seed(seed)  # Samba's routers draw
    output = model(**arguments)
    output.loss.backward()
    return output, gradients(model)


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_are_the_models_own(family, items, ids, labels):
    model = make_model(family)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if items is not None:
        batch["num_items_in_batch"] = items
    expected, expected_gradients = results(model, **batch)
    output, found = results(rho1.patch_loss(model), **batch)
    assert output.logits is None
    assert_close(output.loss, expected.loss)
    assert_same_gradients(found, expected_gradients)
    if "mo" in family or family == "mixtral":
        assert_close(output.aux_loss, expected.aux_loss)


def test_a_soft_cap_and_a_factor_matter_here(ids):
    """Else the test above could not fail."""
    for family, field, other in (
        ("gemma2", "final_logit_softcapping", 1.0),
        ("granite", "logits_scaling", 0.6),
    ):
        losses = [make_model(family, **f)(input_ids=ids, labels=ids).loss for f in ({}, {field: other})]
        assert abs(losses[0] - losses[1]) > 0.05


@pytest.mark.parametrize("family", ["llama", "gemma2", "samba"])
def test_without_labels_nothing_changes(family, ids):
    model = make_model(family).eval()
    expected = model(input_ids=ids).logits
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    signature = inspect.signature(model.forward)
    rho1.patch_loss(model)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(model.train()(input_ids=ids).logits, expected)
    assert torch.equal(model.eval().generate(ids, max_new_tokens=5, do_sample=False), generated)
    assert inspect.signature(model.forward) == signature  # Trainer reads the columns it keeps from it


def test_evaluation_keeps_its_logits_unless_told(ids, labels):
    model = make_model("llama").eval()
    expected = model(input_ids=ids, labels=labels)
    rho1.patch_loss(model)
    assert torch.equal(model(input_ids=ids, labels=labels).logits, expected.logits)
    rho1.patch_loss(model, logits_in_eval=False)
    output = model(input_ids=ids, labels=labels)
    assert output.logits is None
    assert_close(output.loss, expected.loss)


def test_unpatching_gives_the_very_forward_back(ids):
    model = make_model("llama")
    own = model.forward
    assert rho1.unpatch_loss(model) is model  # not patched: nothing happens
    rho1.unpatch_loss(rho1.patch_loss(rho1.patch_loss(model)))
    assert model.forward == own
    assert "forward" not in model.__dict__
    assert model(input_ids=ids, labels=ids).logits is not None
    model.forward = own  # a forward of the instance, as accelerate puts there
    rho1.unpatch_loss(rho1.patch_loss(model))
    assert model.__dict__["forward"] == own


def test_tuples_positions_and_shifted_labels(ids, labels):
    model = make_model("llama")
    expected = model(input_ids=ids, labels=labels).loss
    rho1.patch_loss(model)
    assert_close(model(ids, labels=labels, return_dict=False)[0], expected)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    assert_close(model(ids, None, labels=labels, shift_labels=shifted).loss, expected)
    wrong = torch.full_like(labels, -100)
    wrong[:, 0] = 5
    assert_close(
        model(ids, labels=labels, shift_labels=wrong).loss,
        make_model("llama")(ids, labels=labels, shift_labels=wrong).loss,
    )


def test_a_copy_uses_its_own_weights(ids):
    model = rho1.patch_loss(make_model("llama"))
    before = model(input_ids=ids, labels=ids).loss
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert abs(other(input_ids=ids, labels=ids).loss - before) > 0.1
    assert_close(model(input_ids=ids, labels=ids).loss, before)


def test_a_saved_model_loads_as_ever(tmp_path, ids):
    model = rho1.patch_loss(make_model("qwen2"))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert_close(again(input_ids=ids, labels=ids).loss, model.eval()(input_ids=ids, labels=ids).loss)


def test_no_label_gives_zero(ids):
    model = rho1.patch_loss(make_model("llama"))
    loss = model(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0
    assert all(bool((g == 0).all()) for g in gradients(model).values())


def test_half_precision_and_autocast(ids):
    model = make_model("gemma2", final_logit_softcapping=20.0)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids, labels=ids).loss
        found = rho1.patch_loss(model)(input_ids=ids, labels=ids).loss
    assert_close(found, expected, rtol=0.02, atol=0.02)
    model = make_model("llama").to(torch.bfloat16)
    expected = model(input_ids=ids, labels=ids).loss
    assert_close(rho1.patch_loss(model)(input_ids=ids, labels=ids).loss, expected, rtol=0.02, atol=0.02)


def test_a_factor_that_16_bits_cannot_carry_is_refused(ids):
    model = rho1.patch_loss(make_model("granite", logits_scaling=6.0).to(torch.bfloat16))
    with pytest.raises(
        ValueError, match=r"GraniteForCausalLM: its logits are multiplied by 0\.166667, which is no power"
    ):
        model(input_ids=ids, labels=ids)
    model = rho1.patch_loss(make_model("granite", logits_scaling=8.0).to(torch.bfloat16))
    assert model(input_ids=ids, labels=ids).loss.isfinite()


# What cannot be fused


class ShiftedLogits(transformers.LlamaForCausalLM):
    """Does something to its logits that no configuration names."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output["logits"] = output.logits + torch.arange(output.logits.shape[-1])
        return output


class ExtraTerm(transformers.LlamaForCausalLM):
    """Adds a term to its loss, as Bamba's z-loss."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if labels is not None:
            output["loss"] = output.loss + 0.01 * output.logits.logsumexp(-1).square().mean()
        return output


@pytest.mark.parametrize(
    ("model_class", "text"),
    [
        (ShiftedLogits, "ShiftedLogits: its logits are neither those of its output projection nor"),
        (
            ExtraTerm,
            r"ExtraTerm: its loss is .* where the next-token cross-entropy of its logits is .* terms",
        ),
    ],
)
def test_a_model_with_something_else_in_its_loss_is_refused(model_class, text, ids):
    model = model_class(make_model("llama").config)
    with pytest.raises(ValueError, match=text):
        rho1.patch_loss(model)
    assert "forward" not in model.__dict__
    assert all(module.training for module in model.modules())


def test_a_head_that_is_no_linear_layer_is_refused():
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = make_model("llama", tie_word_embeddings=False)
    model.lm_head = Adapted(24, VOCABULARY, bias=False)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: expected .* are an nn\.Linear, got Adapted"):
        rho1.patch_loss(model)
    with pytest.raises(ValueError, match=r"LlamaModel: expected .* got none"):
        rho1.patch_loss(model.model)
    t5 = transformers.T5Config(
        vocab_size=61, d_model=8, num_layers=1, num_heads=2, d_ff=8, decoder_start_token_id=0
    )
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration: .* an encoder and a decoder"):
        rho1.patch_loss(transformers.T5ForConditionalGeneration(t5))


def test_labels_of_another_length_are_told(ids):
    model = rho1.patch_loss(make_model("llama"))
    with pytest.raises(ValueError, match=r"labels must have shape \(2, 3\), .* got \(2, 11\)"):
        model(input_ids=ids, labels=ids, logits_to_keep=3)
