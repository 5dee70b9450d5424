"""Losses of a linear head by other means: stored logits, torch's chunks, Liger, cut-cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..case import UnavailableError
from ..cases.slm_loss import KEEP
from ..cases.slm_loss import eager as stored_logits
from ..peers import package
from .case import Call, Inputs

_CHUNK = 1024  # tokens whose logits are there at a time


def _three(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs["hidden"], inputs["weight"], inputs["labels"]


def eager(inputs: Inputs) -> Call:
    """All logits, then the loss in float32."""
    return lambda: stored_logits(*_three(inputs))


def eager_scores(inputs: Inputs) -> Call:
    """The loss of every token, through all logits."""

    def call() -> Tensor:
        hidden, weight, labels = _three(inputs)
        logits = functional.linear(hidden, weight).float()
        return functional.cross_entropy(logits, labels, reduction="none")

    return call


def liger(inputs: Inputs) -> Call:
    """Liger's fused loss, which forms gradients in its forward pass."""
    loss = package("liger_kernel.transformers", needs="Triton on a GPU").LigerFusedLinearCrossEntropyLoss()
    hidden, weight, labels = _three(inputs)
    return lambda: loss(weight, hidden, labels)


def chunked(inputs: Inputs) -> Call:
    """torch's own, in chunks."""
    function = getattr(functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise UnavailableError(f"torch {torch.__version__} has no F.linear_cross_entropy with chunks")
    return lambda: function(*_three(inputs), options=options())


def _cut(inputs: Inputs, reduction: str) -> Call:
    function = package("cut_cross_entropy", needs="Triton on a GPU").linear_cross_entropy
    return lambda: function(*_three(inputs), reduction=reduction)


def cut(inputs: Inputs) -> Call:
    """Cut cross-entropy, as it comes: gradients below its threshold are dropped."""
    return _cut(inputs, "mean")


def cut_scores(inputs: Inputs) -> Call:
    """Cut cross-entropy of every token."""
    return _cut(inputs, "none")


def _chosen(nll: Tensor, ref_nll: Tensor) -> Tensor:
    excess = nll.detach() - ref_nll
    return excess.topk(int(KEEP * len(excess) + 0.5), sorted=False).indices.sort().values


def chosen_then_liger(inputs: Inputs) -> Call:
    """What can be put together: losses in chunks without gradient, then Liger's loss of the chosen rows."""
    loss = package("liger_kernel.transformers", needs="Triton on a GPU").LigerFusedLinearCrossEntropyLoss()

    def call() -> Tensor:
        hidden, weight, labels = _three(inputs)
        with torch.no_grad():
            parts = [
                functional.cross_entropy(functional.linear(h, weight).float(), y, reduction="none")
                for h, y in zip(hidden.split(_CHUNK), labels.split(_CHUNK), strict=True)
            ]
        chosen = _chosen(torch.cat(parts), inputs["ref_nll"])
        found: Tensor = loss(weight, hidden[chosen], labels[chosen])
        return found

    return call


def eager_selective(inputs: Inputs) -> Call:
    """All logits, losses, the mean of the chosen ones."""

    def call() -> Tensor:
        nll = eager_scores(inputs)()
        return nll[_chosen(nll, inputs["ref_nll"])].mean()

    return call
