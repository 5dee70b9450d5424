"""Mixtures of experts by other means: ScatterMoE, and torch's operators for the plan."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..peers import package
from .case import Call, Inputs


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
