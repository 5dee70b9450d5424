"""Samba with experts: decoding, gradients, the load-balance loss, files, and the norms and biases of PhiMoE."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from fastlm import ops
from fastlm.layers import GrinMoE, LayerNorm, Routing
from fastlm.models.samba import SambaConfig, SambaForCausalLM
from fastlm.models.samba.wavefront import prefill_wavefront
from tests.support.conformance import num_threads

EXPERTS = 5
PHIMOE = {
    "layer_pattern": ("sliding_attention",),
    "norm_type": "layer_norm",
    "attention_bias": True,
    "lm_head_bias": True,
    "tie_word_embeddings": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "samba": {},
    "both in a block": {"layer_pattern": ("mamba+sliding_attention",)},
    "phimoe": PHIMOE,
    "topk": {"router_estimator": "topk", "num_experts_per_tok": 3},
}


def make(dtype: torch.dtype = torch.float32, **changes: Any) -> SambaForCausalLM:
    """A model whose routers and biases say something: initial ones are the same for every token."""
    torch.manual_seed(0)
    sizes = {"num_experts": EXPERTS, "intermediate_size": 20, "router_jitter_noise": 0.1, **changes}
    model = SambaForCausalLM(SambaConfig.from_preset("tiny", **sizes), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter.mul_(4)
            elif name.endswith((".bias", "norm.weight")) and "dt_proj" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(96, (2, 37), generator=torch.Generator().manual_seed(1))


def seeded(model: SambaForCausalLM, ids: Tensor, seed: int = 3, **options: Any) -> Any:
    torch.manual_seed(seed)
    return model(ids, labels=ids, **options)


def routers(model: SambaForCausalLM) -> list[GrinMoE]:
    return [module for module in model.modules() if isinstance(module, GrinMoE)]


# Decoding


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 37, [36, 1], [5] * 7 + [2], [3, 1, 1, 20, 12]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_split_equals_one_pass(ids, pieces, kind):
    model = make(torch.float64, **KINDS[kind]).eval()
    whole = model(ids).logits
    cache = model.new_cache(2)
    parts = [model(piece, cache=cache).logits for piece in ids.split(pieces, dim=1)]
    assert_close(torch.cat(parts, dim=1), whole)
    assert len({tuple(row.topk(3).indices.tolist()) for row in whole[0]}) > 5, "all tokens say the same"


@pytest.mark.parametrize("kind", KINDS)
def test_generation_one_by_one_together_and_along_diagonals(ids, kind):
    model = make(torch.float64, **KINDS[kind]).eval()
    prompts = [ids[0, :5].tolist(), ids[1].tolist(), ids[0, :1].tolist()]
    alone = [model.generate(torch.tensor([prompt]), max_new_tokens=15)[0].tolist() for prompt in prompts]
    assert model.generate(prompts, max_new_tokens=15) == alone
    assert model.generate(prompts, max_new_tokens=15, prefill_chunk_size=4) == alone
    assert model.generate(prompts, max_new_tokens=15, prefill_chunk_size=6, wavefront=True) == alone
    grown = torch.tensor([prompts[0]])
    for _ in range(15):  # without a cache
        grown = torch.cat([grown, model(grown).logits[:, -1:].argmax(-1)], dim=1)
    assert grown[0].tolist() == alone[0]


def test_the_wavefront_has_the_bits_of_single_chunks(ids):
    model = make().eval()
    pieces = torch.split(ids, 12, dim=1)[:3]
    one, other = model.new_cache(2), model.new_cache(2)
    with torch.inference_mode():
        expected = [model.model(piece, one) for piece in pieces]
        got = list(prefill_wavefront(model.model, ((piece, None) for piece in pieces), other))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_packed_documents_equal_separate_ones(ids):
    model = make(torch.float64, **PHIMOE).eval()
    bounds = [0, 1, 12, 20, 37]
    packed = model(ids[:1], cu_seqlens=torch.tensor(bounds, dtype=torch.int32)).logits
    alone = [model(ids[:1, a:b]).logits for a, b in itertools.pairwise(bounds)]
    assert_close(packed, torch.cat(alone, dim=1))


# Gradients


def test_gradients_reach_the_router_and_every_expert_that_was_used(ids):
    model, ids = make(num_experts=30).train(), ids[:, :6]  # 24 picks
    routing: list[Routing] = []
    torch.manual_seed(3)
    model.model(ids, routing=routing)
    torch.manual_seed(3)
    model(ids).logits.square().sum().backward()  # unlike the loss, every token's output counts
    assert len(routing) == len(routers(model)) == 4
    for layer, decided in zip(routers(model), routing, strict=True):
        used = decided.expert_counts > 0
        assert 2 < used.sum() < 30
        assert layer.router.weight.grad.abs().sum() > 0
        for weight in (layer.experts.gate_up_proj, layer.experts.down_proj):
            assert torch.equal(weight.grad.flatten(1).abs().sum(1) > 0, used)
    rest = [p for name, p in model.named_parameters() if ".experts." not in name]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in rest)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_change_no_bit(ids, kind):
    model = make(input_jitter_noise=0.1, **KINDS[kind]).train()

    def run() -> list[Tensor]:
        model.zero_grad()
        out = seeded(model, ids)
        out.loss.backward()
        return [out.loss.detach(), out.aux_loss.detach(), *(p.grad.clone() for p in model.parameters())]

    kept = run()
    model.gradient_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(kept, run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_have_the_same_bits_in_every_run(dtype, packed):
    model = make(dtype).train()
    ids = torch.randint(96, (1, 120) if packed else (2, 60))
    bounds = torch.tensor([0, 7, 80, 81, 120], dtype=torch.int32) if packed else None
    runs = []
    for _ in range(3):
        with num_threads(2):  # torch's own matrix products give other bits with other numbers of threads
            loss = seeded(model, ids, cu_seqlens=bounds).loss
            runs.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_and_autocast(ids, dtype):
    """The routers of both see other roundings of the stream, so that some tokens go elsewhere: the losses are near."""
    model, exact = make(dtype).eval(), make().eval()
    exact.load_state_dict(model.state_dict())
    expected = exact(ids, labels=ids).loss.item()
    out = model(ids, labels=ids)
    assert out.loss.item() == pytest.approx(expected, rel=1e-2)
    (out.loss + out.aux_loss).backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())
    with torch.autocast("cpu", dtype):
        out = exact(ids, labels=ids)
    assert out.loss.item() == pytest.approx(expected, rel=1e-2)
    (out.loss + out.aux_loss).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in exact.parameters())


def test_a_few_steps_learn_a_repeating_text():
    model = make(vocab_size=16, router_jitter_noise=0.01).train()
    text = torch.arange(48).remainder(7).repeat(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(60):
        loss = model(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert model(text, labels=text).loss.item() < 0.1
    assert torch.equal(model.generate(text[:1, :14], max_new_tokens=20), torch.arange(34).remainder(7)[None])


# The load-balance loss


@pytest.mark.parametrize("training", [True, False])
def test_auxiliary_loss_is_that_of_every_layer_and_joins_the_loss_in_training(ids, training):
    model = make(torch.float64, router_aux_loss_coef=0.25).train(training)
    out = seeded(model, ids, return_logits=True)
    routing: list[Routing] = []
    torch.manual_seed(3)
    model.model(ids, routing=routing)
    layers = []
    for decided in routing:
        assert decided.expert_counts.sum() == 2 * ids.numel()
        layers.append(ops.load_balance_loss(decided.router_logits, decided.expert_counts, alpha=0.25))
        by_hand = 0.25 * EXPERTS * (decided.expert_counts / (2 * ids.numel()))
        assert_close(layers[-1], (by_hand * decided.router_logits.softmax(-1).mean(0)).sum())
    assert len(layers) == 4
    assert_close(out.aux_loss, sum(layers))
    token_loss = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(out.loss, token_loss + out.aux_loss if training else token_loss)


def test_a_coefficient_of_zero_and_a_pass_without_labels(ids):
    model = make(router_aux_loss_coef=0.0).train()
    assert seeded(model, ids).aux_loss.item() == 0.0
    assert model(ids).aux_loss is None
    dense = make(num_experts=0)
    assert dense(ids, labels=ids).aux_loss is None


def test_the_loss_spreads_the_load():
    """Trained on nothing else, experts become used evenly."""
    model = make(router_aux_loss_coef=1.0).train()
    ids = torch.randint(96, (4, 60))
    optimizer = torch.optim.AdamW([layer.router.weight for layer in routers(model)], lr=3e-2)

    def most() -> float:
        routing: list[Routing] = []
        with torch.no_grad():
            model.eval().model(ids, routing=routing)
        model.train()
        return max(float(r.expert_counts.max() / r.expert_counts.sum()) for r in routing)

    before = most()
    for _ in range(40):
        loss = model(ids, labels=ids).aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert most() < 0.8 * before


# Files and configurations


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_exact(ids, tmp_path, kind):
    model = make(**KINDS[kind]).eval()
    model.save_pretrained(tmp_path)
    again = SambaForCausalLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(ids).logits, model(ids).logits)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    block = "model.layers.1"
    assert {f"{block}.mlp.router.weight", f"{block}.mlp.experts.gate_up_proj"} <= names
    assert (f"{block}.attn.q_proj.bias" in names) == (f"{block}.mlp_norm.bias" in names) == (kind == "phimoe")
    half = SambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[0].mlp.router.weight.dtype == torch.bfloat16
    assert half(ids).logits.isfinite().all()


def test_initial_values_and_drawing_them_later():
    torch.manual_seed(0)
    config = SambaConfig.from_preset("tiny", num_experts=EXPERTS, **PHIMOE)
    drawn = SambaForCausalLM(config)
    later = SambaForCausalLM(config, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    later.reset_parameters()
    branches = config.num_residual_branches
    for model in (drawn, later):
        for layer in routers(model):
            down, gate_up = layer.experts.down_proj, layer.experts.gate_up_proj
            bound = config.intermediate_size**-0.5 / math.sqrt(branches)
            assert 0.95 * bound < down.abs().max() <= bound * 1.0001
            assert 0.95 * 32**-0.5 < gate_up.abs().max() <= 32**-0.5
        norms = [module for module in model.modules() if isinstance(module, LayerNorm)]
        assert len(norms) == branches + 1
        assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 1}, "num_experts must be 0 or at least 2, got 1"),
        ({"num_experts": -2}, "num_experts must be an integer of at least 0, got -2"),
        ({"num_experts": 4.0}, "num_experts must be an integer of at least 0, got 4.0"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok must be at most 4, got 5"),
        ({"num_experts": 16, "num_experts_per_tok": 9}, "num_experts_per_tok must be at most 8, got 9"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be an integer of at least 1, got 0"),
        ({"lm_head_bias": True}, "lm_head_bias must be False while tie_word_embeddings is True, got True"),
        ({"attention_bias": 1}, "attention_bias must be True or False, got 1"),
        ({"norm_type": "batch_norm"}, "norm_type must be one of rms_norm, layer_norm, got 'batch_norm'"),
        ({"router_estimator": "v3"}, "router_estimator must be one of v2, v2_star, v1, topk, got 'v3'"),
        ({"expert_grad": "none"}, "expert_grad must be one of full, straight_through, got 'none'"),
        ({"router_jitter_noise": -0.1}, "router_jitter_noise must be a number of at least 0, got -0.1"),
        ({"input_jitter_noise": 1.0}, "input_jitter_noise must be below 1, got 1.0"),
        (
            {"router_aux_loss_coef": float("inf")},
            "router_aux_loss_coef must be a number of at least 0, got inf",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_fields_out_of_range(changes, message):
    with pytest.raises(ValueError, match=f"SambaConfig: {message}"):
        SambaConfig.from_preset("tiny", **changes)


# Norms and biases without experts


@pytest.mark.parametrize("part", ["norm_type", "attention_bias", "lm_head_bias"])
def test_each_of_phimoes_parts_works_in_a_dense_samba(ids, part):
    changes = {part: PHIMOE[part], "tie_word_embeddings": False, "num_experts": 0}
    model, plain = (
        make(torch.float64, **changes),
        make(torch.float64, num_experts=0, tie_word_embeddings=False),
    )
    plain.load_state_dict(model.state_dict(), strict=False)
    out = model(ids, labels=ids, return_logits=True)
    assert not torch.equal(out.logits, plain(ids).logits), "it has no effect"
    assert_close(out.loss, functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    out.loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "k_proj.bias" not in name)
    with torch.no_grad():
        cache = model.eval().new_cache(2)
        steps = [model(piece, cache=cache).logits for piece in ids.split([4, *[1] * 33], dim=1)]
    assert_close(torch.cat(steps, dim=1), out.logits.detach())


# Compilation and export


@pytest.mark.slow
def test_exported_model_runs_at_other_lengths():
    model = make().eval()
    program = torch.export.export(
        _Logits(model),
        (torch.randint(96, (2, 200)),),
        dynamic_shapes={"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=128)}},
    ).module()
    for batch, length in ((1, 128), (3, 300)):
        ids = torch.randint(96, (batch, length))
        assert_close(program(ids), model(ids).logits)


class _Logits(torch.nn.Module):
    """Token ids in, logits out."""

    def __init__(self, model: SambaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor | None:
        return self.model(input_ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["samba", "phimoe"])
def test_compiled_training_step_equals_eager_without_graph_breaks(kind):
    model = make(**KINDS[kind]).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (40, 23):
        ids = torch.randint(96, (2, length))
        results = []
        for call in (model, compiled):
            loss = seeded(call, ids).loss
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        for got, want in zip(*results, strict=True):
            assert_close(got, want)
