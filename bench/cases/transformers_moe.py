"""transformers' own Mixtral, its experts on fastlm and on each of transformers' implementations: a training step, and
decoding from its cache.

Two layers of moderate size: few large experts as in Mixtral, and many small ones as in the Qwen mixtures, whose
experts compute the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..case import DECODE, DTYPES, STEP, Build, Call, Case, Contender, Inputs, Target, Work
from ..causal_lm import as_inputs, decoding, gradients, training_step, weights_of
from ..peers import package

_LAYERS, _HIDDEN, _HEADS, _KV_HEADS, _VOCABULARY = 2, 512, 8, 2, 2048
_HEAD = _HIDDEN // _HEADS
_EPS, _THETA = 1e-5, 10_000.0
_PROMPT = 16


@dataclass(frozen=True)
class _Mixture:
    """A name, the number of experts, picks per token, and the experts' inner size."""

    name: str
    experts: int
    picks: int
    inner: int


_MIXTURES = (_Mixture("E8_k2_I1024", 8, 2, 1024), _Mixture("E32_k4_I256", 32, 4, 256))


def cases() -> list[Case]:
    """Both mixtures: training steps of 64, 256 and 1024 tokens, and decoding."""
    found = []
    for mixture in _MIXTURES:
        for dtype in ("fp32", "bf16"):
            found += [_step(mixture, dtype, 64, quick=dtype == "fp32")]
            found += [_step(mixture, dtype, 256), _step(mixture, dtype, 1024)]
            found += [_decode(mixture, dtype, 1), _decode(mixture, dtype, 8)]
    return found


def _shape(mixture: _Mixture, **sizes: int) -> dict[str, int]:
    return {
        **sizes,
        "layers": _LAYERS,
        "h": _HIDDEN,
        "E": mixture.experts,
        "k": mixture.picks,
        "I": mixture.inner,
        "V": _VOCABULARY,
    }


def _step(mixture: _Mixture, dtype: str, L: int, *, quick: bool = False) -> Case:
    # batched_mm copies an expert's weights for every pick, and adds up as many gradients: seconds at 64 tokens.
    size = _LAYERS * L * mixture.picks * 3 * mixture.inner * _HIDDEN * DTYPES[dtype].itemsize / 1e9
    too_much = {} if L <= 64 else {STEP: f"would copy {size:.0f} GB of weights, and their gradients"}
    return Case(
        op="transformers_moe",
        name=f"training_step_{mixture.name}_B1_L{L}",
        dtype=dtype,
        shape=_shape(mixture, B=1, L=L),
        inputs=lambda: _inputs(mixture, dtype, 1, L),
        reference=lambda inputs: _plain_step(mixture, inputs),
        contenders=(
            Contender("fastlm", _training(mixture, "fastlm"), ours=True, mode="grad"),
            Contender("eager", _training(mixture, "eager"), mode="grad"),
            Contender("grouped_mm", _training(mixture, "grouped_mm"), mode="grad"),
            Contender("batched_mm", _training(mixture, "batched_mm"), mode="grad", skip_parts=too_much),
        ),
        work={STEP: Work(L, "tokens")},
        part=STEP,
        targets=(Target(STEP, "speedup", 1, "eager"), Target(STEP, "speedup", 1, "grouped_mm")),
        quick=quick,
        # In bf16 one token in some hundred picks another expert than in float64, whoever computes it.
        tolerance=1e-3 if dtype == "fp32" else 0.2,
        note="Two layers of Mixtral's class and fused AdamW; the rows differ in experts_implementation alone.",
    )


def _decode(mixture: _Mixture, dtype: str, B: int) -> Case:
    steps = 32
    return Case(
        op="transformers_moe",
        name=f"decode_{mixture.name}_B{B}_T{steps}",
        dtype=dtype,
        shape=_shape(mixture, B=B, T=steps),
        inputs=lambda: _inputs(mixture, dtype, B, _PROMPT + steps),
        reference=lambda inputs: _plain_logits(mixture, inputs),
        contenders=(
            Contender("fastlm", _decoding(mixture, "fastlm"), ours=True, mode="inference"),
            Contender("eager", _decoding(mixture, "eager"), mode="inference"),
            Contender("grouped_mm", _decoding(mixture, "grouped_mm"), mode="inference"),
            Contender("batched_mm", _decoding(mixture, "batched_mm"), mode="inference"),
        ),
        work={DECODE: Work(B * steps, "tokens")},
        part=DECODE,
        targets=(Target(DECODE, "speedup", 1, "eager"), Target(DECODE, "speedup", 1, "grouped_mm")),
        tolerance=1e-3 if dtype == "fp32" else 0.1,
        note=f"{_PROMPT} tokens at once, then {steps} one by one; two layers, so call overhead counts much.",
    )


# ---- Weights


def _inputs(mixture: _Mixture, dtype: str, B: int, L: int) -> Inputs:
    """Token ids, and weights as the model draws them, but for routers that tell experts apart: in bf16 a choice between
    two that are as good as each other would be another one than in the reference."""
    width = _KV_HEADS * _HEAD
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (_VOCABULARY, _HIDDEN),
        "model.norm.weight": (_HIDDEN,),
        "lm_head.weight": (_VOCABULARY, _HIDDEN),
    }
    for i in range(_LAYERS):
        layer = {
            "input_layernorm.weight": (_HIDDEN,),
            "post_attention_layernorm.weight": (_HIDDEN,),
            "self_attn.q_proj.weight": (_HIDDEN, _HIDDEN),
            "self_attn.k_proj.weight": (width, _HIDDEN),
            "self_attn.v_proj.weight": (width, _HIDDEN),
            "self_attn.o_proj.weight": (_HIDDEN, _HIDDEN),
            "mlp.gate.weight": (mixture.experts, _HIDDEN),
            "mlp.experts.gate_up_proj": (mixture.experts, 2 * mixture.inner, _HIDDEN),
            "mlp.experts.down_proj": (mixture.experts, _HIDDEN, mixture.inner),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    weights = {name: _initial(name, shape).to(DTYPES[dtype]) for name, shape in shapes.items()}
    return {"input_ids": torch.randint(0, _VOCABULARY, (B, L)), **as_inputs(weights)}


def _initial(name: str, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    return (0.3 if name.endswith("mlp.gate.weight") else 0.02) * torch.randn(shape)


# ---- Contenders


def _model(mixture: _Mixture, implementation: str, inputs: Inputs) -> Any:
    """The model of transformers with the weights of the inputs, all of which it must have."""
    transformers, weights = package("transformers", needs="pip install 'fastlm[hf]'"), weights_of(inputs)
    transformers.logging.set_verbosity_error()
    package("fastlm.compat.transformers").enable("experts")  # a name more; nobody else's functions change
    config = transformers.MixtralConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_HIDDEN,
        intermediate_size=mixture.inner,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        num_local_experts=mixture.experts,
        num_experts_per_tok=mixture.picks,
        sliding_window=None,
        rms_norm_eps=_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": _THETA},
    )
    model = transformers.MixtralForCausalLM(config).to(weights["lm_head.weight"].dtype)
    model.load_state_dict(weights)
    model.set_experts_implementation(implementation)
    return model


def _training(mixture: _Mixture, implementation: str) -> Build:
    def build(inputs: Inputs) -> Call:
        model = _model(mixture, implementation, inputs).train()
        return training_step(model, dict(model.named_parameters()), inputs)

    return build


def _decoding(mixture: _Mixture, implementation: str) -> Build:
    def build(inputs: Inputs) -> Call:
        return decoding(_model(mixture, implementation, inputs).eval(), inputs["input_ids"], _PROMPT)

    return build


# ---- The definition, without transformers and without an operator of fastlm


def _plain_step(mixture: _Mixture, inputs: Inputs) -> Call:
    def call() -> tuple[Tensor, ...]:
        parameters = {name: nn.Parameter(t) for name, t in weights_of(inputs).items()}
        ids = inputs["input_ids"]
        logits = _plain_model(mixture, ids, parameters)
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return (loss.detach(), *gradients(parameters, inputs))

    return call


def _plain_logits(mixture: _Mixture, inputs: Inputs) -> Call:
    @torch.no_grad()
    def call() -> Tensor:
        return _plain_model(mixture, inputs["input_ids"], weights_of(inputs))

    return call


def _plain_model(mixture: _Mixture, ids: Tensor, weights: dict[str, Any]) -> Tensor:
    """Logits `(B, L, V)`."""
    hidden = functional.embedding(ids, weights["model.embed_tokens.weight"])
    for i in range(_LAYERS):
        w = {name.removeprefix(f"model.layers.{i}."): t for name, t in weights.items()}
        x = functional.rms_norm(hidden, (_HIDDEN,), w["input_layernorm.weight"], _EPS)
        q, k, v = (
            functional.linear(x, w[f"self_attn.{name}_proj.weight"])
            .unflatten(-1, (-1, _HEAD))
            .transpose(1, 2)
            for name in "qkv"
        )
        seen = functional.scaled_dot_product_attention(
            _rotated(q), _rotated(k), v, is_causal=True, enable_gqa=True
        )
        hidden = hidden + functional.linear(seen.transpose(1, 2).flatten(2), w["self_attn.o_proj.weight"])
        x = functional.rms_norm(hidden, (_HIDDEN,), w["post_attention_layernorm.weight"], _EPS)
        hidden = hidden + _plain_mixture(mixture, x.flatten(0, 1), w).view_as(x)
    normed = functional.rms_norm(hidden, (_HIDDEN,), weights["model.norm.weight"], _EPS)
    return functional.linear(normed, weights["lm_head.weight"])


def _rotated(x: Tensor) -> Tensor:
    """`x (B, H, L, K)` turned by its positions: number i with number `K / 2 + i`."""
    positions = torch.arange(x.shape[2], dtype=x.dtype)
    rates = _THETA ** (-torch.arange(0, _HEAD, 2, dtype=x.dtype) / _HEAD)
    angles = positions[:, None] * rates
    a, b = x.chunk(2, dim=-1)
    return torch.cat(
        [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()],
        dim=-1,
    )


def _plain_mixture(mixture: _Mixture, x: Tensor, w: dict[str, Any]) -> Tensor:
    """One expert after the other on its tokens."""
    shares, ids = functional.linear(x, w["mlp.gate.weight"]).softmax(-1).topk(mixture.picks)
    shares = shares / shares.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for e in range(mixture.experts):
        token, pick = torch.where(ids == e)
        gate, up = functional.linear(x[token], w["mlp.experts.gate_up_proj"][e]).chunk(2, dim=-1)
        y = functional.linear(functional.silu(gate) * up, w["mlp.experts.down_proj"][e])
        out = out.index_add(0, token, shares[token, pick, None] * y)
    return out
