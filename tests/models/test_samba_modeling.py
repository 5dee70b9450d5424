"""The whole model: against the plain PyTorch twin, packed, in mixed precision, checkpointed, compiled."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fastlm.demo.plain_samba import PlainSamba
from fastlm.models.samba import SambaConfig, SambaForCausalLM

PATTERNS = {
    "samba": ("mamba", "sliding_attention"),
    "mamba_swa_mlp": ("mamba+sliding_attention",),
    "mamba": ("mamba",),
    "attention": ("sliding_attention",),
}


def make(dtype: torch.dtype = torch.float32, **changes: object) -> SambaForCausalLM:
    torch.manual_seed(0)
    return SambaForCausalLM(SambaConfig.from_preset("tiny", **changes), dtype=dtype)


def plain(model: SambaForCausalLM, scan: str = "plain") -> PlainSamba:
    twin = PlainSamba(model.config, scan=scan).to(model.output_weight.dtype)
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(96, (2, 37), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scan", ["plain", "step_loop"])
@pytest.mark.parametrize(
    "changes",
    [
        *({"layer_pattern": pattern} for pattern in PATTERNS.values()),
        {"tie_word_embeddings": False},
        {"use_rope": False},
        {"num_key_value_heads": 1, "head_dim": 12, "intermediate_size": 33, "time_step_rank": 5},
        {"sliding_window": 100},
    ],
    ids=str,
)
def test_loss_logits_and_gradients_equal_plain_pytorch(ids, changes, scan):
    model = make(torch.float64, **changes)
    twin = plain(model, scan)
    labels = ids.clone()
    labels[0, 5:9] = -100
    out = model(ids, labels=labels, return_logits=True)
    loss, logits = twin(ids, labels)
    assert_close(out.logits, logits)
    assert_close(out.loss, loss)
    out.loss.backward()
    loss.backward()
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(
            parameter.grad, expected[name].grad, msg=lambda text, name=name: f"gradient of {name}: {text}"
        )


def test_float32_error_is_that_of_plain_pytorch(ids):
    exact = make(torch.float64)
    model = make().eval()
    model.load_state_dict(exact.state_dict())
    with torch.no_grad():
        truth = exact(ids).logits
        error = (model(ids).logits.double() - truth).square().mean().sqrt()
        plain_error = (plain(model)(ids)[1].double() - truth).square().mean().sqrt()
    assert error <= 2 * plain_error


def test_without_logits_unless_asked(ids):
    model = make()
    assert model(ids, labels=ids).logits is None
    assert model(ids).loss is None
    full = model(ids).logits
    assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:])
    assert_close(model(ids, logits_to_keep=torch.tensor([0, 11])).logits, full[:, [0, 11]])
    assert_close(model(ids, labels=ids, return_logits=True, logits_to_keep=1).logits, full[:, -1:])


def test_packed_documents_equal_separate_ones(ids):
    model = make(torch.float64)
    bounds = [0, 1, 12, 20, 37]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    packed = model(ids[:1], labels=ids[:1], cu_seqlens=cu_seqlens, return_logits=True)
    alone = [
        model(ids[:1, a:b], labels=ids[:1, a:b], return_logits=True) for a, b in itertools.pairwise(bounds)
    ]
    assert_close(packed.logits, torch.cat([out.logits for out in alone], dim=1))
    predicted = [b - a - 1 for a, b in itertools.pairwise(bounds)]  # first tokens are not predicted
    total = sum(out.loss * n for out, n in zip(alone, predicted, strict=True) if n)
    assert_close(packed.loss, total / sum(predicted))
    packed.loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    (sum(out.loss * n for out, n in zip(alone, predicted, strict=True) if n) / sum(predicted)).backward()
    for name, parameter in model.named_parameters():
        assert_close(got[name], parameter.grad, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_a_window_as_long_as_the_text_is_full_attention(ids):
    model, wide = make(torch.float64, sliding_window=37), make(torch.float64, sliding_window=1000)
    assert_close(model(ids).logits, wide(ids).logits)


def test_tokens_do_not_see_the_future(ids):
    model = make(torch.float64)
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 96
    assert torch.equal(model(ids).logits[:, :20], model(changed).logits[:, :20])


def test_autocast_keeps_residual_stream_and_gradients_in_float32(ids):
    model = make()
    seen = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    reference = model(ids, labels=ids).loss
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids, return_logits=True)
    assert set(seen) == {torch.float32}
    assert (out.loss.dtype, out.logits.dtype) == (torch.float32, torch.bfloat16)
    assert out.loss.item() == pytest.approx(reference.item(), rel=1e-2)
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(ids, dtype):
    model, exact = make(dtype), make()
    exact.load_state_dict(model.state_dict())
    seen = []
    model.model.layers[0].register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    out = model(ids, labels=ids)
    assert seen == [torch.float32]
    assert out.loss.item() == pytest.approx(exact(ids, labels=ids).loss.item(), rel=1e-2)
    out.loss.backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_changes_memory_only(ids):
    model = make().train()

    def run() -> tuple[int, list[torch.Tensor]]:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(ids, labels=ids).loss
        saved = sum(kept.values())
        model.zero_grad()
        loss.backward()
        return saved, [p.grad.clone() for p in model.parameters()]

    saved, grads = run()
    model.gradient_checkpointing_enable()
    saved_less, same = run()
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    assert saved_less < saved / 4


def test_initial_values_of_the_whole_model():
    model = make(num_hidden_layers=8, hidden_size=64, vocab_size=2000)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for block in model.model.layers:
        for linear in (m for m in block.modules() if isinstance(m, nn.Linear) and m.bias is None):
            shrunk = linear is block.mlp.w3 or linear in (
                getattr(block.mamba, "out_proj", None),
                getattr(block.attn, "o_proj", None),
            )
            bound = linear.in_features**-0.5 / (math.sqrt(16) if shrunk else 1)
            assert bound * 0.95 < linear.weight.abs().max() <= bound * 1.0001
    loss = model(torch.randint(2000, (2, 50)), labels=torch.randint(2000, (2, 50))).loss
    assert loss.item() == pytest.approx(math.log(2000), rel=0.02)


def test_parameters_can_be_made_on_meta_and_drawn_later():
    model = SambaForCausalLM(SambaConfig.from_preset("tiny"), device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    model.reset_parameters()
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert all((p == 1).all() for p in norms)
    steps = nn.functional.softplus(model.model.layers[0].mamba.dt_proj.bias)
    assert 1e-3 * 0.99 <= steps.min() <= steps.max() <= 1e-1 * 1.01
    loss = model(torch.randint(96, (2, 30)), labels=torch.randint(96, (2, 30))).loss
    assert loss.item() == pytest.approx(math.log(96), rel=0.05)


def test_a_few_steps_learn_a_repeating_text():
    model = make(vocab_size=16)
    text = torch.arange(48).remainder(7).repeat(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert torch.equal(model.generate(text[:1, :14], max_new_tokens=20), torch.arange(34).remainder(7)[None])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"labels": torch.zeros(2, 5, dtype=torch.long)},
            r"labels must have the shape of input_ids, \(2, 37\), got \(2, 5\)",
        ),
        ({"cu_seqlens": torch.tensor([0, 37])}, "input_ids must have 1 row with cu_seqlens, got 2"),
    ],
)
def test_arguments_that_do_not_fit(ids, arguments, message):
    with pytest.raises(ValueError, match=message):
        make()(ids, **arguments)


def test_token_ids_outside_the_vocabulary(ids):
    with pytest.raises(IndexError):
        make()(ids + 96)


def test_plain_twin_refuses_an_unknown_scan():
    with pytest.raises(ValueError, match="scan must be one of plain, step_loop, got 'fast'"):
        PlainSamba(SambaConfig.from_preset("tiny"), scan="fast")


def test_loss_takes_labels_shifted_by_the_caller(ids):
    model = make()
    hidden = model.model(ids)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.equal(model.loss(hidden, shift_labels=shifted), model.loss(hidden, ids))
    for wrong in ({}, {"labels": ids, "shift_labels": shifted}):
        with pytest.raises(ValueError, match="expected one of labels and shift_labels"):
            model.loss(hidden, **wrong)
