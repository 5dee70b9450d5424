"""Calls on causal language models of transformers: a training step, and decoding from a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .case import Call, Inputs

_WEIGHT = "weight:"


def as_inputs(weights: dict[str, Tensor]) -> Inputs:
    """Weights as inputs of a case, under names that tell them from others."""
    return {f"{_WEIGHT}{name}": t for name, t in weights.items()}


def weights_of(inputs: Inputs) -> dict[str, Tensor]:
    """The weights among the inputs, by their own names."""
    return {name.removeprefix(_WEIGHT): t for name, t in inputs.items() if name.startswith(_WEIGHT)}


def training_step(run: Any, parameters: dict[str, Any], inputs: Inputs) -> Call:
    """Steps at rate 0: the work of an update, and the same weights before every step. Returns loss and gradients.

    Args:
        run: the model, compiled or not.
        parameters: by the names of the weights.
        inputs: `input_ids`, and the weights.
    """
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, weight_decay=0.1, fused=True)
    ids = inputs["input_ids"]

    def call() -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = run(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return (loss.detach(), *gradients(parameters, inputs))

    return call


def gradients(parameters: dict[str, Any], inputs: Inputs) -> tuple[Tensor, ...]:
    """In the order of the inputs."""
    return tuple(parameters[name].grad for name in weights_of(inputs))


def decoding(model: Any, ids: Tensor, prompt: int) -> Call:
    """The first `prompt` tokens at once, then the others one by one. Returns the logits."""
    first, *steps = ids.split([prompt] + [1] * (ids.shape[1] - prompt), 1)

    def call() -> Tensor:
        output = model(first, use_cache=True)
        logits = [output.logits]
        for step in steps:
            output = model(step, cache=output.cache, use_cache=True)
            logits.append(output.logits)
        return torch.cat(logits, dim=1)

    return call
