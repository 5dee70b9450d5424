"""Mixture of experts: the experts of a layer as trained and as decoded, the grouped product alone, the router and the plan."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..cases import grin_route as router
from ..cases import moe_dispatch as experts
from ..peers import member, operator
from . import float64, peers_moe
from .case import (
    BACKWARD,
    FORWARD,
    STEP,
    Call,
    Contender,
    GpuCase,
    Inputs,
    Problem,
    Target,
    Work,
    upstream_of,
)
from .item import Context

_LEARNED = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights")
# T, E, h, I, k: GRIN-MoE and Phi-3.5-MoE; many small experts.
_LAYERS = (
    (16384, 16, 4096, 6400, 2),
    (4096, 16, 4096, 6400, 2),
    (32768, 16, 4096, 6400, 2),
    (16384, 64, 2048, 1024, 8),
)
_DECODED = ((64, 16, 4096, 6400, 2), (1, 16, 4096, 6400, 2), (8, 16, 4096, 6400, 2), (512, 16, 4096, 6400, 2))
# Useful TFLOP/s where a product of 8192^3 runs at 790: from 16K tokens, at 4K, backward.
_LARGE_SHARE, _SMALL_SHARE, _BACKWARD_SHARE = 620 / 790, 560 / 790, 580 / 790


def cases(*, tiny: bool) -> list[GpuCase]:
    """In the order of importance."""
    layers = ((40, 4, 32, 48, 2),) if tiny else _LAYERS
    decoded = ((3, 4, 32, 48, 2),) if tiny else _DECODED
    products = ((70, 4, 48, 32),) if tiny else ((32768, 16, 12800, 4096), (32768, 16, 4096, 6400))
    routed = ((70, 4),) if tiny else ((65536, 16), (4096, 16), (16384, 64))
    plans = ((70, 4, 2),) if tiny else ((65536, 16, 2), (16384, 64, 8))
    found = [GpuCase(f"moe_experts/{_name(*size)}", partial(_layer, *size), limit=400) for size in layers]
    found += [GpuCase(f"moe_experts_decode/{_name(*size)}", partial(_decode, *size)) for size in decoded]
    found += [
        GpuCase(f"grouped_gemm/M{M}_E{E}_N{N}_Kd{Kd}", partial(_product, M, E, N, Kd))
        for M, E, N, Kd in products
    ]
    for training in (True, False):
        word = "training" if training else "eval"
        found += [GpuCase(f"grin_route/{word}_T{T}_E{E}", partial(_route, T, E, training)) for T, E in routed]
    return found + [GpuCase(f"moe_plan/T{T}_E{E}_k{k}", partial(_plan, T, E, k)) for T, E, k in plans]


def _name(T: int, E: int, h: int, I: int, k: int) -> str:
    return f"T{T}_E{E}_h{h}_I{I}_k{k}"


def layer_inputs(T: int, E: int, h: int, I: int, k: int, device: str) -> Inputs:
    """bfloat16 experts behind random routing, whose loads differ as those of a trained router do."""
    bf16 = torch.bfloat16
    weights, ids = torch.randn(T, E, device=device).softmax(-1).topk(k)
    return {
        "hidden_states": torch.randn(T, h, device=device, dtype=bf16),
        "gate_up_proj": torch.randn(E, 2 * I, h, device=device, dtype=bf16) / h**0.5,
        "down_proj": torch.randn(E, h, I, device=device, dtype=bf16) / I**0.5,
        "topk_ids": ids,
        "topk_weights": weights,
    }


def layer_flops(T: int, h: int, I: int, k: int) -> float:
    """Three products of `T k` rows."""
    return 6.0 * T * k * h * I


def _layer(T: int, E: int, h: int, I: int, k: int, context: Context) -> Problem:
    inputs = layer_inputs(T, E, h, I, k, context.device)
    upstream = upstream_of(inputs["hidden_states"])
    flops = layer_flops(T, h, I, k)
    aimed = (E, h, I) == (16, 4096, 6400)
    share = _LARGE_SHARE if T >= 16384 else _SMALL_SHARE
    return Problem(
        shape={"T": T, "E": E, "h": h, "I": I, "k": k},
        inputs=inputs,
        contenders=(
            Contender("fastlm", operator("moe_experts"), ours=True),
            Contender("fastlm, recompute", operator("moe_experts", recompute=True), ours=True),
            Contender(experts.GROUPED, experts.grouped),
            Contender("expert loop", experts.loop),
            Contender("scattermoe", peers_moe.scattermoe, prepare=peers_moe.up_first, parts=(FORWARD,)),
            Contender("one dense product", experts.dense, full_check=False, parts=(FORWARD,)),
        ),
        work={
            FORWARD: Work(flops, "FLOP", {"bf16": flops}, (Target("share", share),) if aimed else ()),
            BACKWARD: Work(
                2 * flops, "FLOP", {"bf16": 2 * flops}, (Target("share", _BACKWARD_SHARE),) if aimed else ()
            ),
        },
        expected=lambda part: float64.experts(inputs, part, upstream, _LEARNED),
        gradients=_LEARNED,
        upstream=upstream,
        note="one dense product: torch.mm of as many FLOP, for orientation. Recomputed products are not counted as work.",
    )


def _decode(T: int, E: int, h: int, I: int, k: int, context: Context) -> Problem:
    """Few tokens: the weights of every expert that is used are read once."""
    inputs = layer_inputs(T, E, h, I, k, context.device)
    used = int(inputs["topk_ids"].unique().numel())
    moved = 2.0 * 3 * used * h * I
    timed = (Target("time", 0.73e-3),) if (T, E, h, I) == (64, 16, 4096, 6400) else ()
    calls = (("fastlm", operator("moe_experts"), True), (experts.GROUPED, experts.grouped, False))
    found = [Contender(name, build, ours=ours, parts=(STEP,)) for name, build, ours in calls]
    return Problem(
        shape={"T": T, "E": E, "h": h, "I": I, "k": k, "experts used": used},
        inputs=inputs,
        contenders=(
            found[0],
            replace(found[0], name="fastlm, graph", graph=True),
            found[1],
            Contender("expert loop", experts.loop, parts=(STEP,)),
        ),
        work={STEP: Work(moved, "bytes", {"read": moved}, (Target("share", 0.8), *timed) if T == 64 else ())},
        expected=lambda part: float64.experts(inputs, FORWARD, (), ()),
    )


def _product(M: int, E: int, N: int, Kd: int, context: Context) -> Problem:
    device, bf16 = context.device, torch.bfloat16
    loads = torch.bincount(torch.randint(0, E, (M,), device=device), minlength=E)
    inputs: Inputs = {
        "a": torch.randn(M, Kd, device=device, dtype=bf16),
        "b": torch.randn(E, N, Kd, device=device, dtype=bf16) / Kd**0.5,
        "offsets": functional.pad(loads.cumsum(0), (1, 0)).int(),
    }
    upstream = (torch.randn(M, N, device=device, dtype=bf16),)
    flops = 2.0 * M * N * Kd
    return Problem(
        shape={"M": M, "E": E, "N": N, "Kd": Kd},
        inputs=inputs,
        contenders=(
            Contender("fastlm", operator("grouped_gemm"), ours=True),
            Contender("F.grouped_mm", experts.grouped_mm_alone),
        ),
        work={
            FORWARD: Work(flops, "FLOP", {"bf16": flops}),
            BACKWARD: Work(2 * flops, "FLOP", {"bf16": 2 * flops}),
        },
        expected=lambda part: float64.grouped(inputs, part, upstream),
        gradients=("a", "b"),
        upstream=upstream,
    )


def _route(T: int, E: int, training: bool, context: Context) -> Problem:
    """Weights, which depend on every pick; contenders with the same random numbers."""
    device, picks = context.device, router.PICKS
    inputs: Inputs = {"router_logits": torch.randn(T, E, device=device)}
    if training:
        noise = member("fastlm.reference.grin_route", "grin_noise")(router.SEED, T, picks, E)
        inputs |= {"noise": noise.to(device), "seed": torch.tensor([router.SEED], device=device)}
    upstream = (torch.randn(T, picks, device=device),)
    moved = 4.0 * T * (E + 3 * picks)
    aimed = (T, E) == (65536, 16)
    return Problem(
        shape={"T": T, "E": E, "k": picks},
        inputs=inputs,
        contenders=(
            Contender("fastlm", partial(_routed, "fastlm.ops", "seed", training), ours=True),
            Contender(router.PLAIN, partial(_plain_router, training)),
        ),
        work={
            FORWARD: Work(moved, "bytes", {"copy": moved}, (Target("time", 15e-6),) if aimed else ()),
            BACKWARD: Work(4.0 * T * (2 * E + 2 * picks), "bytes", {"copy": 4.0 * T * (2 * E + 2 * picks)}),
        },
        # In float32 like the contenders: in float64 other experts might be picked.
        expected=lambda part: _same_picks(inputs, part, training, upstream),
        gradients=("router_logits",),
        upstream=upstream,
        allowed=1e-5,
        note="The random numbers of the plain router are made beforehand and not timed." if training else "",
    )


def _routed(module: str, chance: str, training: bool, inputs: Inputs) -> Call:
    function = member(module, "grin_route")
    options = {chance: inputs[chance]} if training else {}
    return lambda: function(
        inputs["router_logits"], training=training, jitter_eps=router.JITTER, top_k=router.PICKS, **options
    )[0]


def _plain_router(training: bool, inputs: Inputs) -> Call:
    return lambda: router.plain(inputs["router_logits"], inputs["noise"] if training else None)


def _same_picks(inputs: Inputs, part: str, training: bool, upstream: tuple[Tensor, ...]) -> dict[str, Tensor]:
    logits = inputs["router_logits"].detach().cpu().requires_grad_(part == BACKWARD)
    words = {name: t.cpu() for name, t in inputs.items()} | {"router_logits": logits}
    with torch.set_grad_enabled(part == BACKWARD):
        out = _routed("fastlm.reference", "noise", training, words)()
    if part != BACKWARD:
        return {"out": out.to(inputs["router_logits"].device)}
    (found,) = torch.autograd.grad(out, logits, upstream[0].cpu())
    return {"drouter_logits": found.to(inputs["router_logits"].device)}


def _plan(T: int, E: int, k: int, context: Context) -> Problem:
    ids = torch.randn(T, E, device=context.device).topk(k).indices
    moved = T * k * (ids.element_size() + 8.0)
    return Problem(
        shape={"T": T, "E": E, "k": k},
        inputs={"topk_ids": ids},
        contenders=(
            Contender("fastlm", partial(_planned, "fastlm.ops", E), ours=True),
            Contender("argsort and bincount", partial(peers_moe.sorted_picks, E)),
        ),
        work={FORWARD: Work(moved, "bytes", {"copy": moved})},
        expected=lambda part: dict(
            zip(
                ("offsets", "perm", "inv"),
                (t.to(ids.device) for t in _planned("fastlm.reference", E, {"topk_ids": ids.cpu()})()),
                strict=True,
            )
        ),
        outputs=("offsets", "perm", "inv"),
        allowed=0.0,
    )


def _planned(module: str, E: int, inputs: Inputs) -> Call:
    function = member(module, "moe_plan")
    return lambda: function(inputs["topk_ids"], E)
