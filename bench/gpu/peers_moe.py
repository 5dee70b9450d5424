"""Mixtures of experts by other means: torch's grouped product with rows gathered around it, a loop, ScatterMoE."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..case import UnavailableError
from ..cases import moe_dispatch as experts
from ..peers import package
from .case import Call, Inputs


def _require_grouped_mm() -> None:
    if not hasattr(functional, "grouped_mm"):
        raise UnavailableError(f"torch {torch.__version__} has no F.grouped_mm")


def grouped(inputs: Inputs) -> Call:
    """Rows sorted by expert, two grouped products, back to the order of tokens, weighted sum."""
    _require_grouped_mm()
    return lambda: experts.gathered_experts(**inputs)


def loop(inputs: Inputs) -> Call:
    """One expert after the other, as the eager experts of transformers go about it."""
    return lambda: experts.looped_experts(**inputs)


def dense(inputs: Inputs) -> Call:
    """torch.mm of as many FLOP."""
    rows = inputs["hidden_states"].repeat_interleave(inputs["topk_ids"].shape[1], 0)
    matrix = torch.cat([inputs["gate_up_proj"][0], inputs["down_proj"][0].mT])
    return lambda: rows @ matrix.mT


def grouped_mm(inputs: Inputs) -> Call:
    """torch's grouped product alone."""
    _require_grouped_mm()
    ends = inputs["offsets"][1:]
    return lambda: functional.grouped_mm(inputs["a"], inputs["b"].mT, offs=ends)


def up_first(inputs: Inputs) -> Inputs:
    """ScatterMoE's gated experts take the rows of the gate after those of up."""
    gate, up = inputs["gate_up_proj"].chunk(2, dim=1)
    return inputs | {"gate_up_proj": torch.cat([up, gate], dim=1)}


def scattermoe(inputs: Inputs) -> Call:
    """ScatterMoE's Triton kernels."""
    module = package("scattermoe.mlp", needs="Triton on a GPU")
    E, wide, h = inputs["gate_up_proj"].shape
    layer = module.GLUMLP(h, wide // 2, E, inputs["topk_ids"].shape[1], functional.silu)
    layer = layer.to(inputs["hidden_states"].device, inputs["hidden_states"].dtype)
    with torch.no_grad():
        layer.experts.weight.copy_(inputs["gate_up_proj"])
        layer.output_experts.weight.copy_(inputs["down_proj"])
    weights = inputs["topk_weights"].to(inputs["hidden_states"].dtype)

    def call() -> Tensor:
        out: Tensor = layer(inputs["hidden_states"], weights, inputs["topk_ids"])
        return out

    return call


def sorted_picks(E: int, inputs: Inputs) -> Call:
    """Offsets, order and its inverse with torch's operators."""

    def call() -> tuple[Tensor, ...]:
        flat = inputs["topk_ids"].flatten()
        order = flat.argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=flat.device)
        loads = torch.bincount(flat, minlength=E)
        return functional.pad(loads.cumsum(0), (1, 0)).int(), order.int(), back.int()

    return call
