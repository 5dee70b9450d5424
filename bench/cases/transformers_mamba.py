"""transformers' own Mamba model, with `fastlm.compat.transformers` enabled and as it comes: a training step, and
decoding from its cache.

Two layers of the 130M model; the vocabulary is cut as the layers are, so that the output layer keeps its share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..case import DECODE, DTYPES, STEP, Build, Call, Case, Contender, Inputs, Outputs, Target, Work
from ..causal_lm import as_inputs, decoding, gradients, training_step, weights_of
from ..peers import member, package

_LAYERS, _HIDDEN, _INNER, _STATE, _WIDTH, _RANK, _VOCABULARY = 2, 768, 1536, 16, 4, 48, 4192
_EPS = 1e-5
_PROMPT = 16


def cases() -> list[Case]:
    """Lengths at which the eager backward pass ends within minutes, and steps of one token."""
    found = []
    for dtype in ("fp32", "bf16"):
        found += [_step(dtype, 128, quick=dtype == "fp32"), _step(dtype, 256), _step(dtype, 1024)]
        found += [_decode(dtype, 1), _decode(dtype, 8)]
    return found


def _step(dtype: str, L: int, *, quick: bool = False) -> Case:
    # transformers fills a whole (D, L, N) tensor for every position of the backward pass, twice.
    eager = {STEP: {"dram_copy": _LAYERS * 9.0 * L * L * _INNER * _STATE * 4}}
    targets = [
        Target(STEP, "speedup", 50, "transformers"),
        Target(STEP, "speedup", 2, "transformers compiled"),
    ]
    return Case(
        op="transformers_mamba",
        name=f"training_step_B1_L{L}",
        dtype=dtype,
        shape={"B": 1, "L": L, "layers": _LAYERS, "d": _HIDDEN, "V": _VOCABULARY},
        inputs=lambda: _inputs(dtype, 1, L),
        reference=lambda inputs: _plain_step(inputs),
        contenders=(
            Contender("fastlm", _training(enabled=True), ours=True, mode="grad"),
            Contender("transformers", _training(enabled=False), mode="grad", cost=eager),
            Contender(
                "transformers compiled", _training(enabled=False, compiled=True), mode="grad", compiled=True
            ),
        ),
        work={STEP: Work(L, "tokens")},
        part=STEP,
        targets=tuple(targets) if L == 1024 else (),
        quick=quick,
        tolerance=1e-3 if dtype == "fp32" else 0.1,
        note="Two layers of the 130M model and fused AdamW. The same class of transformers in every row.",
    )


def _decode(dtype: str, B: int) -> Case:
    steps = 32
    return Case(
        op="transformers_mamba",
        name=f"decode_B{B}_T{steps}",
        dtype=dtype,
        shape={"B": B, "T": steps, "layers": _LAYERS, "d": _HIDDEN, "V": _VOCABULARY},
        inputs=lambda: _inputs(dtype, B, _PROMPT + steps),
        reference=_plain_logits,
        contenders=(
            Contender("fastlm", _decoding(enabled=True), ours=True, mode="inference"),
            Contender("transformers", _decoding(enabled=False), mode="inference"),
        ),
        work={DECODE: Work(B * steps, "tokens")},
        part=DECODE,
        tolerance=1e-3 if dtype == "fp32" else 0.1,
        note=f"{_PROMPT} tokens at once, then {steps} one by one; two layers, so call overhead counts much.",
    )


# ---- Weights


def _inputs(dtype: str, B: int, L: int) -> Inputs:
    """Token ids, and weights as the model draws them."""
    cast = DTYPES[dtype]
    shapes: dict[str, tuple[int, ...]] = {"embeddings.weight": (_VOCABULARY, _HIDDEN)}
    for i in range(_LAYERS):
        layer = {
            "norm.weight": (_HIDDEN,),
            "mixer.A_log": (_INNER, _STATE),
            "mixer.D": (_INNER,),
            "mixer.conv1d.weight": (_INNER, 1, _WIDTH),
            "mixer.conv1d.bias": (_INNER,),
            "mixer.in_proj.weight": (2 * _INNER, _HIDDEN),
            "mixer.x_proj.weight": (_RANK + 2 * _STATE, _INNER),
            "mixer.dt_proj.weight": (_INNER, _RANK),
            "mixer.dt_proj.bias": (_INNER,),
            "mixer.out_proj.weight": (_HIDDEN, _INNER),
        }
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["norm_f.weight"] = (_HIDDEN,)
    weights = {name: _initial(name, shape).to(cast) for name, shape in shapes.items()}
    return {"input_ids": torch.randint(0, _VOCABULARY, (B, L)), **as_inputs(weights)}


def _initial(name: str, shape: tuple[int, ...]) -> Tensor:
    kind = name.partition("mixer.")[2] or name
    if kind == "A_log":
        return torch.arange(1.0, _STATE + 1).log().repeat(_INNER, 1)
    if kind == "dt_proj.bias":
        steps = torch.exp(torch.empty(shape).uniform_(math.log(1e-3), math.log(1e-1)))
        return steps + torch.log(-torch.expm1(-steps))
    if kind == "D" or kind.startswith("norm"):
        return torch.ones(shape)
    if kind == "embeddings.weight":
        return 0.02 * torch.randn(shape)
    bound = (_WIDTH if kind.startswith("conv1d") else shape[-1]) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound)


# ---- Contenders


def _model(inputs: Inputs) -> Any:
    """The model of transformers with the weights of the inputs, all of which it must have."""
    transformers, weights = package("transformers", needs="pip install 'fastlm[hf]'"), weights_of(inputs)
    transformers.logging.set_verbosity_error()
    config = transformers.MambaConfig(vocab_size=_VOCABULARY, hidden_size=_HIDDEN, num_hidden_layers=_LAYERS)
    model = transformers.MambaForCausalLM(config).to(weights["norm_f.weight"].dtype)
    model.backbone.load_state_dict(weights)
    return model


def _switched(call: Call, enabled: bool) -> Call:
    """With fastlm enabled for the time of the call, which takes a millisecond."""
    if not enabled:
        return call
    switch = package("fastlm.compat.transformers")

    def enabled_call() -> Outputs:
        switch.enable("mamba")
        try:
            return call()
        finally:
            switch.disable("mamba")

    return enabled_call


def _training(*, enabled: bool, compiled: bool = False) -> Build:
    def build(inputs: Inputs) -> Call:
        model = _model(inputs).train()
        run = torch.compile(model) if compiled else model
        return _switched(training_step(run, dict(model.backbone.named_parameters()), inputs), enabled)

    return build


def _decoding(*, enabled: bool) -> Build:
    def build(inputs: Inputs) -> Call:
        return _switched(decoding(_model(inputs).eval(), inputs["input_ids"], _PROMPT), enabled)

    return build


# ---- The definition, without transformers and without an operator of fastlm


def _plain_step(inputs: Inputs) -> Call:
    def call() -> tuple[Tensor, ...]:
        parameters = {name: nn.Parameter(t) for name, t in weights_of(inputs).items()}
        ids = inputs["input_ids"]
        logits = _plain_model(ids, parameters)
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        return (loss.detach(), *gradients(parameters, inputs))

    return call


def _plain_logits(inputs: Inputs) -> Call:
    @torch.no_grad()
    def call() -> Tensor:
        return _plain_model(inputs["input_ids"], weights_of(inputs))

    return call


def _plain_model(ids: Tensor, weights: dict[str, Any]) -> Tensor:
    """Logits `(B, L, V)`."""
    scan: Callable[..., Tensor] = member("fastlm.demo.plain_samba", "plain_scan")
    hidden = functional.embedding(ids, weights["embeddings.weight"])
    for i in range(_LAYERS):
        w = {name.removeprefix(f"layers.{i}."): t for name, t in weights.items()}
        normed = functional.rms_norm(hidden, (_HIDDEN,), w["norm.weight"], _EPS)
        x, z = functional.linear(normed, w["mixer.in_proj.weight"]).transpose(1, 2).chunk(2, dim=1)
        conv = functional.pad(x, (_WIDTH - 1, 0))
        u = functional.silu(
            functional.conv1d(conv, w["mixer.conv1d.weight"], w["mixer.conv1d.bias"], groups=_INNER)
        )
        low, b, c = functional.linear(u.transpose(1, 2), w["mixer.x_proj.weight"]).split(
            [_RANK, _STATE, _STATE], dim=-1
        )
        dt = functional.softplus(functional.linear(low, w["mixer.dt_proj.weight"], w["mixer.dt_proj.bias"]))
        y = scan(u, dt.transpose(1, 2), -torch.exp(w["mixer.A_log"]), b, c) + w["mixer.D"][:, None] * u
        hidden = hidden + functional.linear(
            (y * functional.silu(z)).transpose(1, 2), w["mixer.out_proj.weight"]
        )
    normed = functional.rms_norm(hidden, (_HIDDEN,), weights["norm_f.weight"], _EPS)
    return functional.linear(normed, weights["embeddings.weight"])
