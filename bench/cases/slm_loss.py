"""Cross-entropy of a linear head: as a loss with gradients, and as a score per token. Memory is part of the
result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..case import BOTH, DTYPES, FORWARD, Call, Case, Contender, Inputs, Target, UnavailableError, Work
from ..peers import definition, operator, package

EAGER, CHUNKED = "logits stored", "F.linear_cross_entropy, chunks"
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
        ]
    return found


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


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits, then the loss in float32."""
    return functional.cross_entropy(functional.linear(hidden, weight).float(), labels)


def _eager(inputs: Inputs) -> Call:
    return lambda: eager(**inputs)


def _eager_compiled(inputs: Inputs) -> Call:
    function = torch.compile(eager)
    return lambda: function(**inputs)


def _eager_scores(inputs: Inputs) -> Call:
    def call() -> Tensor:
        logits = functional.linear(inputs["hidden"], inputs["weight"]).float()
        return functional.cross_entropy(logits, inputs["labels"], reduction="none")

    return call


def _chunked(inputs: Inputs) -> Call:
    function = getattr(functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise UnavailableError(f"torch {torch.__version__} has no F.linear_cross_entropy with chunks")
    return lambda: function(inputs["hidden"], inputs["weight"], inputs["labels"], options=options())


def _cut_cross_entropy(inputs: Inputs) -> Call:
    function = package("cut_cross_entropy").linear_cross_entropy
    return lambda: function(inputs["hidden"], inputs["weight"], inputs["labels"], impl="torch_compile")


def _liger(inputs: Inputs) -> Call:
    package("liger_kernel", needs="Triton on a GPU")
    raise UnavailableError("needs Triton on a GPU")
