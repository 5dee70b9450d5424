"""Cross-entropy of a linear head: as a loss with gradients, of selected tokens only, and as a score per token; the selection alone.

Memory is part of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..case import BOTH, DTYPES, FORWARD, Call, Case, Contender, Inputs, Target, UnavailableError, Work
from ..peers import definition, member, operator, package

EAGER, CHUNKED = "logits stored", "F.linear_cross_entropy, chunks"
TWO_PASSES = "losses, then chunks of the chosen"
KEEP = 0.6
_RATES = {"fp32": 75e9, "bf16": 150e9}
_SPEEDUPS = {"fp32": 1.7, "bf16": 5}


def cases() -> list[Case]:
    """A small head, the demo model's, and a 32000-word vocabulary."""
    found = []
    for dtype in ("fp32", "bf16"):
        found += [
            _loss(dtype, 128, 256, 4096, quick=True),
            _loss(dtype, 1024, 256, 4096),
            _loss(dtype, 1024, 1024, 32000),
            _score(dtype, 1024, 1024, 32000),
            _selective(dtype, 128, 256, 4096, quick=True),
            _selective(dtype, 1024, 256, 4096),
            _selective(dtype, 1024, 1024, 32000),
        ]
    return [*found, _select(4096, quick=True), _select(32768), _select(1 << 20)]


def _inputs(dtype: str, T: int, h: int, V: int) -> Inputs:
    return {
        "hidden": torch.randn(T, h).to(DTYPES[dtype]),
        "weight": (torch.randn(V, h) / h**0.5).to(DTYPES[dtype]),
        "labels": torch.randint(0, V, (T,)),
    }


def _loss(dtype: str, T: int, h: int, V: int, *, quick: bool = False) -> Case:
    product = "dot" if dtype == "bf16" else "fma"
    cost = {FORWARD: {f"mm_{dtype}": 2.0 * T * h * V}, BOTH: {f"mm_{dtype}": 6.0 * T * h * V}}
    targets = (
        Target(BOTH, "rate", _RATES[dtype]),
        Target(BOTH, "speedup", _SPEEDUPS[dtype], CHUNKED),
        Target(BOTH, "speedup", 1.0, EAGER),
        Target(BOTH, "memory", 1 / 50, EAGER),
    )
    return Case(
        op="slm_loss",
        name=f"loss_T{T}_h{h}_V{V}",
        dtype=dtype,
        shape={"T": T, "h": h, "V": V},
        inputs=lambda: _inputs(dtype, T, h, V),
        reference=definition("linear_cross_entropy"),
        contenders=(
            Contender("fastlm", operator("linear_cross_entropy"), ours=True),
            Contender(EAGER, _eager, cost=cost),
            Contender("logits stored, compiled", _eager_compiled, compiled=True, cost=cost),
            Contender(CHUNKED, _chunked, cost=cost),
            Contender("cut_cross_entropy", _cut_cross_entropy, compiled=True, cost=cost),
            Contender("liger_kernel", _liger),
        ),
        # 6 T h V: logits, their gradient times the weight, and times the inputs. Computing the logits a
        # second time in the backward pass is a way of saving memory and not counted.
        work={
            FORWARD: Work(2.0 * T * h * V, "FLOP", {product: 2.0 * T * h * V, "exp2": T * V}),
            BOTH: Work(6.0 * T * h * V, "FLOP", {product: 6.0 * T * h * V, "exp2": T * V}),
        },
        gradients=("hidden", "weight"),
        targets=targets if V >= 32000 else (),
        quick=quick,
        memory=not quick or dtype == "fp32",
    )


def _score(dtype: str, T: int, h: int, V: int) -> Case:
    product = "dot" if dtype == "bf16" else "fma"
    cost = {FORWARD: {f"mm_{dtype}": 2.0 * T * h * V}}
    return Case(
        op="slm_loss",
        name=f"score_T{T}_h{h}_V{V}",
        dtype=dtype,
        shape={"T": T, "h": h, "V": V},
        inputs=lambda: _inputs(dtype, T, h, V),
        reference=definition("linear_nll"),
        contenders=(
            Contender("fastlm", operator("linear_nll"), ours=True),
            Contender(EAGER, _eager_scores, cost=cost),
        ),
        work={FORWARD: Work(2.0 * T * h * V, "FLOP", {product: 2.0 * T * h * V, "exp2": T * V})},
        memory=True,
    )


def _selective(dtype: str, T: int, h: int, V: int, *, quick: bool = False) -> Case:
    """Forward 2 T h V for every token, backward 4 T h V for the chosen; computing logits again is not counted."""
    product, flop = "dot" if dtype == "bf16" else "fma", 2.0 * T * h * V
    both = flop * (1 + 2 * KEEP)
    cost = {FORWARD: {f"mm_{dtype}": flop}, BOTH: {f"mm_{dtype}": 3 * flop}}
    targets = (
        Target(BOTH, "speedup", 1.6, EAGER),
        Target(BOTH, "speedup", 1.0, "fastlm, every token"),
        Target(BOTH, "memory", 1 / 50, EAGER),
    )
    return Case(
        op="slm_loss",
        name=f"selective_T{T}_h{h}_V{V}",
        dtype=dtype,
        shape={"T": T, "h": h, "V": V, "keep %": int(100 * KEEP)},
        inputs=lambda: _inputs(dtype, T, h, V) | {"ref_nll": _reference_losses(T)},
        reference=definition("slm_loss", keep_ratio=KEEP),
        contenders=(
            Contender("fastlm", operator("slm_loss", keep_ratio=KEEP), ours=True),
            Contender("fastlm, every token", _every_token, ours=True, reference=_every_token_reference),
            Contender(EAGER, _eager_selective, cost=cost),
            Contender(TWO_PASSES, _two_passes, cost=cost),
        ),
        work={
            FORWARD: Work(flop, "FLOP", {product: flop, "exp2": T * V}),
            BOTH: Work(both, "FLOP", {product: both, "exp2": T * V}),
        },
        gradients=("hidden", "weight"),
        targets=targets if V >= 32000 else (),
        quick=quick,
        memory=not quick,
    )


def _reference_losses(T: int) -> Tensor:
    """Far apart, so that rounding of the losses chooses no other tokens."""
    return torch.where(torch.randperm(T) < int(KEEP * T + 0.5), 0.0, 50.0)


def _select(T: int, *, quick: bool = False) -> Case:
    return Case(
        op="slm_loss",
        name=f"select_tokens_T{T}",
        dtype="fp32",
        shape={"T": T},
        inputs=lambda: {"score": torch.randn(T), "eligible": torch.rand(T) < 0.9},
        reference=definition("select_tokens", keep_ratio=KEEP),
        contenders=(
            Contender("fastlm", operator("select_tokens", keep_ratio=KEEP), ours=True),
            Contender("torch.topk and scatter", topk),
        ),
        work={FORWARD: Work(T, "tokens", bytes=6.0 * T)},
        quick=quick,
    )


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits, then the loss in float32."""
    return functional.cross_entropy(functional.linear(hidden, weight).float(), labels)


def _eager(inputs: Inputs) -> Call:
    return lambda: eager(**inputs)


def _chosen(nll: Tensor, ref_nll: Tensor) -> Tensor:
    """Positions of the tokens to train on, with torch's operators."""
    excess = nll.detach() - ref_nll
    return excess.topk(int(KEEP * len(excess) + 0.5), sorted=False).indices.sort().values


def _eager_selective(inputs: Inputs) -> Call:
    def call() -> Tensor:
        logits = functional.linear(inputs["hidden"], inputs["weight"]).float()
        nll = functional.cross_entropy(logits, inputs["labels"], reduction="none")
        return nll[_chosen(nll, inputs["ref_nll"])].mean()

    return call


def _two_passes(inputs: Inputs) -> Call:
    """What can be put together today: losses in chunks without gradient, then the fused loss of the chosen rows."""
    chunked = _chunked_function()

    def call() -> Tensor:
        hidden, weight, labels = inputs["hidden"], inputs["weight"], inputs["labels"]
        with torch.no_grad():
            parts = [
                functional.cross_entropy(functional.linear(h, weight).float(), y, reduction="none")
                for h, y in zip(hidden.split(256), labels.split(256), strict=True)
            ]
        chosen = _chosen(torch.cat(parts), inputs["ref_nll"])
        return chunked(hidden[chosen], weight, labels[chosen])

    return call


def _every_token(inputs: Inputs) -> Call:
    function = member("fastlm.ops", "linear_cross_entropy")
    return lambda: function(inputs["hidden"], inputs["weight"], inputs["labels"])


def _every_token_reference(inputs: Inputs) -> Call:
    function = member("fastlm.reference", "linear_cross_entropy")
    return lambda: function(inputs["hidden"], inputs["weight"], inputs["labels"])


def topk(inputs: Inputs) -> Call:
    """torch.topk, whose count the host reads first."""

    def call() -> Tensor:
        score = inputs["score"].masked_fill(~inputs["eligible"], -torch.inf)
        count = int(KEEP * int(inputs["eligible"].sum()) + 0.5)
        mask = torch.zeros_like(inputs["eligible"])
        mask[score.topk(count, sorted=False).indices] = True
        return mask

    return call


def _eager_compiled(inputs: Inputs) -> Call:
    function = torch.compile(eager)
    return lambda: function(**inputs)


def _eager_scores(inputs: Inputs) -> Call:
    def call() -> Tensor:
        logits = functional.linear(inputs["hidden"], inputs["weight"]).float()
        return functional.cross_entropy(logits, inputs["labels"], reduction="none")

    return call


def _chunked(inputs: Inputs) -> Call:
    function = _chunked_function()
    return lambda: function(inputs["hidden"], inputs["weight"], inputs["labels"])


def _chunked_function() -> Callable[..., Tensor]:
    function = getattr(functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise UnavailableError(f"torch {torch.__version__} has no F.linear_cross_entropy with chunks")
    return partial(function, options=options())


def _cut_cross_entropy(inputs: Inputs) -> Call:
    function = package("cut_cross_entropy").linear_cross_entropy
    return lambda: function(inputs["hidden"], inputs["weight"], inputs["labels"], impl="torch_compile")


def _liger(inputs: Inputs) -> Call:
    package("liger_kernel", needs="Triton on a GPU")
    raise UnavailableError("needs Triton on a GPU")
