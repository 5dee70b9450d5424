"""What one call costs before any work is done: tiny tensors, every way to call."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..case import CALL, Build, Call, Case, Contender, Inputs, Work
from ..peers import definition, member
from .causal_conv1d import conv_and_silu


def cases() -> list[Case]:
    """One operator with autograd, one decoding step without."""
    return [_causal_conv1d(), _causal_conv1d_update()]


def _ways(raw: Build, wrapper: Build) -> tuple[Contender, ...]:
    """The raw operator and the public function, in every gradient mode."""
    return (
        Contender("fastlm wrapper", wrapper, ours=True),
        Contender("torch.ops, inference_mode", raw, ours=True, mode="inference"),
        Contender("wrapper, inference_mode", wrapper, ours=True, mode="inference"),
        Contender("torch.ops, no_grad", raw, ours=True),
    )


def _with_grad(build: Build, names: tuple[str, ...]) -> Build:
    """The same call on inputs that require a gradient."""

    def with_grad(inputs: Inputs) -> Call:
        return build(
            {name: t.detach().requires_grad_() if name in names else t for name, t in inputs.items()}
        )

    return with_grad


def _raw(name: str, positional: Callable[[Inputs], tuple[object, ...]], first: bool) -> Build:
    """`torch.ops.fastlm.<name>.default`; `first`: of several outputs only the first counts."""

    def build(inputs: Inputs) -> Call:
        function = member("fastlm._ops", name)
        words = positional(inputs)
        return (lambda: function(*words)[0]) if first else (lambda: function(*words))

    return build


def _wrapped(name: str) -> Build:
    def build(inputs: Inputs) -> Call:
        function = member("fastlm.ops", name)
        return lambda: function(**inputs, activation="silu")

    return build


def _causal_conv1d() -> Case:
    def inputs() -> Inputs:
        return {"x": torch.randn(1, 8, 4), "weight": torch.randn(8, 4), "bias": torch.randn(8)}

    raw = _raw("causal_conv1d", lambda i: (i["x"], i["weight"], i["bias"], None, None, "silu"), first=True)
    wrapper = _wrapped("causal_conv1d")
    names = ("x", "weight", "bias")
    return Case(
        op="call_overhead",
        name="causal_conv1d",
        dtype="fp32",
        shape={"B": 1, "D": 8, "L": 4, "W": 4},
        inputs=inputs,
        reference=definition("causal_conv1d", activation="silu"),
        contenders=(
            *_ways(raw, wrapper),
            Contender("torch.ops, with grad", _with_grad(raw, names), ours=True, mode="grad"),
            Contender("wrapper, with grad", _with_grad(wrapper, names), ours=True, mode="grad"),
            Contender("F.conv1d and F.silu, no_grad", lambda i: lambda: conv_and_silu(**i)),
        ),
        work={CALL: Work(1, "calls")},
        part=CALL,
        quick=True,
    )


def _causal_conv1d_update() -> Case:
    def inputs() -> Inputs:
        return {
            "x": torch.randn(1, 8),
            "conv_state": torch.randn(1, 8, 3),
            "weight": torch.randn(8, 4),
            "bias": torch.randn(8),
        }

    raw = _raw(
        "causal_conv1d_update",
        lambda i: (i["x"], i["conv_state"], i["weight"], i["bias"], "silu"),
        first=False,
    )
    return Case(
        op="call_overhead",
        name="causal_conv1d_update",
        dtype="fp32",
        shape={"B": 1, "D": 8, "W": 4},
        inputs=inputs,
        reference=definition("causal_conv1d_update", activation="silu"),
        contenders=_ways(raw, _wrapped("causal_conv1d_update")),
        work={CALL: Work(1, "calls")},
        part=CALL,
        mutated=("conv_state",),
        quick=True,
    )
