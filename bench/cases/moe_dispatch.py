"""Mixture of experts behind a router that has decided already: the layer's experts, grouped products by themselves, and the plan."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..case import (
    BOTH,
    DECODE,
    DTYPES,
    FORWARD,
    Build,
    Call,
    Case,
    Contender,
    Inputs,
    Target,
    UnavailableError,
    Work,
)
from ..ceilings import REFERENCE_RATES
from ..peers import definition, member, operator

GROUPED, LOOP, DENSE = "F.grouped_mm, gathered", "expert loop", "one dense product"
_LEARNED = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights")
_LARGE = 1024  # tokens from which on arithmetic bounds the experts


def cases() -> list[Case]:
    """GRIN's experts at a quarter of their width, from one token to a batch; one layer of many small experts."""
    found = []
    for dtype in ("fp32", "bf16"):
        found += [
            _training(dtype, T=64, E=4, h=128, I=192, k=2, quick=True),
            _decoding(dtype, E=16, h=2048, I=3200, k=2),
        ]
        for T in (128, 1024, 4096):
            found += [
                _experts(dtype, T=T, E=16, h=1024, I=3200, k=2),
                _training(dtype, T=T, E=16, h=1024, I=3200, k=2),
            ]
        found += [
            _experts(dtype, T=1024, E=64, h=1024, I=512, k=8),
            _training(dtype, T=1024, E=64, h=1024, I=512, k=8),
            _product(dtype, M=128, E=4, N=192, Kd=160, quick=True),
            _product(dtype, M=2048, E=16, N=6400, Kd=1024),
            _product(dtype, M=2048, E=16, N=1024, Kd=3200),
            _product(dtype, M=8192, E=64, N=1024, Kd=1024),
        ]
    return [*found, _plan(T=4096, E=16, k=2, quick=True), _plan(T=4096, E=256, k=8)]


def _inputs(dtype: str, T: int, E: int, h: int, I: int, k: int) -> Inputs:
    """Random routing: loads differ as those of a trained router do."""
    weights, ids = torch.randn(T, E).softmax(-1).topk(k)
    return {
        "hidden_states": torch.randn(T, h).to(DTYPES[dtype]),
        "gate_up_proj": (torch.randn(E, 2 * I, h) / h**0.5).to(DTYPES[dtype]),
        "down_proj": (torch.randn(E, h, I) / I**0.5).to(DTYPES[dtype]),
        "topk_ids": ids,
        "topk_weights": weights,
    }


def _flop(dtype: str, T: int, h: int, I: int, k: int) -> tuple[Work, Work, dict[str, dict[str, float]]]:
    """Forward, both passes, and what they cost peers at least. Three products of T k rows; twice as many more for the gradients."""
    product = "dot" if dtype == "bf16" else "fma"
    amount = 6.0 * T * k * h * I
    forward, both = (Work(times * amount, "FLOP", {product: times * amount}) for times in (1, 3))
    return forward, both, {FORWARD: {f"mm_{dtype}": amount}, BOTH: {f"mm_{dtype}": 3 * amount}}


def _experts(dtype: str, T: int, E: int, h: int, I: int, k: int) -> Case:
    forward, _, cost = _flop(dtype, T, h, I, k)
    targets = (Target(FORWARD, "speedup", 0.85, DENSE), Target(FORWARD, "speedup", 1.25, GROUPED))
    return Case(
        op="moe_dispatch",
        name=f"experts_T{T}_E{E}_h{h}_I{I}_k{k}",
        dtype=dtype,
        shape={"T": T, "E": E, "h": h, "I": I, "k": k},
        inputs=lambda: _inputs(dtype, T, E, h, I, k),
        reference=definition("moe_experts"),
        contenders=(
            Contender("fastlm", operator("moe_experts"), ours=True),
            Contender(GROUPED, grouped, cost=cost),
            Contender(LOOP, loop, cost=cost),
            Contender(DENSE, dense, reference=dense, cost=cost),
        ),
        work={FORWARD: forward},
        targets=targets if T >= _LARGE else (),
        note="one dense product: torch.mm of as many FLOP, T k rows times one matrix of 3 I rows",
    )


def _training(dtype: str, T: int, E: int, h: int, I: int, k: int, *, quick: bool = False) -> Case:
    forward, both, cost = _flop(dtype, T, h, I, k)
    targets = (Target(BOTH, "speedup", 1.25, GROUPED), Target(BOTH, "memory", 1.0, GROUPED))
    return Case(
        op="moe_dispatch",
        name=f"training_T{T}_E{E}_h{h}_I{I}_k{k}",
        dtype=dtype,
        shape={"T": T, "E": E, "h": h, "I": I, "k": k},
        inputs=lambda: _inputs(dtype, T, E, h, I, k),
        reference=definition("moe_experts"),
        contenders=(
            Contender("fastlm", operator("moe_experts"), ours=True),
            Contender("fastlm, recompute", operator("moe_experts", recompute=True), ours=True),
            Contender(GROUPED, grouped, cost=cost),
            Contender(LOOP, loop, cost=cost),
        ),
        # Gate and up a second time are a way of saving memory and not counted.
        work={FORWARD: forward, BOTH: both},
        gradients=_LEARNED,
        targets=targets if T >= _LARGE else (),
        quick=quick,
        memory=T >= _LARGE,
    )


def _decoding(dtype: str, E: int, h: int, I: int, k: int) -> Case:
    """One token: the weights of its experts are read once."""
    read = 3.0 * k * h * I * DTYPES[dtype].itemsize
    return Case(
        op="moe_dispatch",
        name=f"decode_E{E}_h{h}_I{I}_k{k}",
        dtype=dtype,
        shape={"T": 1, "E": E, "h": h, "I": I, "k": k},
        inputs=lambda: _inputs(dtype, 1, E, h, I, k),
        reference=definition("moe_experts"),
        contenders=(
            Contender("fastlm", operator("moe_experts"), ours=True, mode="inference"),
            Contender(GROUPED, grouped, mode="inference"),
            Contender(LOOP, loop, mode="inference"),
        ),
        work={DECODE: Work(read, "bytes", {"dram_read": read}, read)},
        part=DECODE,
        targets=(Target(DECODE, "rate", 0.85 * REFERENCE_RATES["1"]["dram_read"]),),
    )


def _product(dtype: str, M: int, E: int, N: int, Kd: int, *, quick: bool = False) -> Case:
    """Rows that are sorted already."""
    amount = 2.0 * M * N * Kd
    product = "dot" if dtype == "bf16" else "fma"
    cost = {FORWARD: {f"mm_{dtype}": amount}, BOTH: {f"mm_{dtype}": 3 * amount}}

    def inputs() -> Inputs:
        expert = torch.randint(0, E, (M,))
        return {
            "a": torch.randn(M, Kd).to(DTYPES[dtype]),
            "b": (torch.randn(E, N, Kd) / Kd**0.5).to(DTYPES[dtype]),
            "offsets": _offsets(expert, E),
        }

    return Case(
        op="moe_dispatch",
        name=f"grouped_gemm_M{M}_E{E}_N{N}_Kd{Kd}",
        dtype=dtype,
        shape={"M": M, "E": E, "N": N, "Kd": Kd},
        inputs=inputs,
        reference=definition("grouped_gemm"),
        contenders=(
            Contender("fastlm", operator("grouped_gemm"), ours=True),
            Contender("F.grouped_mm", grouped_mm_alone, cost=cost),
        ),
        work={
            FORWARD: Work(amount, "FLOP", {product: amount}),
            BOTH: Work(3 * amount, "FLOP", {product: 3 * amount}),
        },
        gradients=("a", "b"),
        quick=quick,
    )


def _plan(T: int, E: int, k: int, *, quick: bool = False) -> Case:
    return Case(
        op="moe_dispatch",
        name=f"plan_T{T}_E{E}_k{k}",
        dtype="fp32",
        shape={"T": T, "E": E, "k": k},
        inputs=lambda: {"router_logits": (x := torch.randn(T, E)), "topk_ids": x.topk(k).indices},
        reference=_plan_of("fastlm.reference", E),
        contenders=(
            Contender("fastlm", _plan_of("fastlm.ops", E), ours=True),
            Contender("argsort and bincount", _sorted(E)),
        ),
        work={FORWARD: Work(T, "tokens", bytes=16.0 * T * k)},
        quick=quick,
    )


# ---- contenders -----------------------------------------------------------------------------------------


def _offsets(expert: Tensor, E: int) -> Tensor:
    """Where each expert's rows begin, and where the last one's end."""
    return functional.pad(torch.bincount(expert, minlength=E).cumsum(0), (1, 0)).int()


def _require_grouped_mm() -> None:
    if not hasattr(functional, "grouped_mm"):
        raise UnavailableError(f"torch {torch.__version__} has no F.grouped_mm")


def gathered_experts(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    """Rows sorted by expert, two grouped products, back to the order of tokens, weighted sum."""
    T, k = topk_ids.shape
    flat = topk_ids.flatten()
    order = flat.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(T * k, device=flat.device)
    ends = _offsets(flat, len(gate_up_proj))[1:]
    gate, up = functional.grouped_mm(hidden_states[order // k], gate_up_proj.mT, offs=ends).chunk(2, -1)
    rows = functional.grouped_mm(functional.silu(gate) * up, down_proj.mT, offs=ends)
    return (rows[back].view(T, k, -1) * topk_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def looped_experts(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    """One expert after the other, as the eager experts of transformers go about it."""
    out = torch.zeros_like(hidden_states)
    for e in topk_ids.unique().tolist():
        token, pick = (topk_ids == e).nonzero(as_tuple=True)
        gate, up = functional.linear(hidden_states[token], gate_up_proj[e]).chunk(2, -1)
        y = functional.linear(functional.silu(gate) * up, down_proj[e])
        out = out.index_add(0, token, (y * topk_weights[token, pick, None]).to(out.dtype))
    return out


def grouped(inputs: Inputs) -> Call:
    """Rows gathered around torch's grouped product."""
    _require_grouped_mm()
    return lambda: gathered_experts(**inputs)


def loop(inputs: Inputs) -> Call:
    """Experts one after the other."""
    return lambda: looped_experts(**inputs)


def dense(inputs: Inputs) -> Call:
    """torch.mm of as many FLOP."""
    rows = inputs["hidden_states"].repeat_interleave(inputs["topk_ids"].shape[1], 0)
    matrix = torch.cat([inputs["gate_up_proj"][0], inputs["down_proj"][0].mT])
    return lambda: rows @ matrix.mT


def grouped_mm_alone(inputs: Inputs) -> Call:
    """torch's grouped product."""
    _require_grouped_mm()
    ends = inputs["offsets"][1:]
    return lambda: functional.grouped_mm(inputs["a"], inputs["b"].mT, offs=ends)


def _plan_of(module: str, E: int) -> Build:
    def build(inputs: Inputs) -> Call:
        function = member(module, "moe_plan")
        return lambda: function(inputs["topk_ids"], E)

    return build


def _sorted(E: int) -> Build:
    def build(inputs: Inputs) -> Call:
        def call() -> tuple[Tensor, ...]:
            flat = inputs["topk_ids"].flatten()
            order = flat.argsort(stable=True)
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order))
            return _offsets(flat, E), order.int(), back.int()

        return call

    return build
