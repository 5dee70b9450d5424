"""Depthwise causal convolution with SiLU, as in the Mamba mixer: whole sequences and one decoding step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..case import BOTH, DECODE, DTYPES, FORWARD, Call, Case, Contender, Inputs, Work, direct
from ..peers import definition, operator, package

W = 4  # taps


def cases() -> list[Case]:
    """Channel-last is the layout of the mixer, where x is half of a projection's output."""
    found = []
    for dtype in ("fp32", "bf16"):
        found += [
            _sequence(dtype, 1, 2048, 512, channel_last=True, quick=True),
            _sequence(dtype, 1, 4096, 2048, channel_last=True),
            _sequence(dtype, 1, 4096, 2048, channel_last=False),
            _decode(dtype, 1, 4608, quick=True),
            _decode(dtype, 64, 4608),
        ]
    return found


def _sequence(dtype: str, B: int, D: int, L: int, *, channel_last: bool, quick: bool = False) -> Case:
    def inputs() -> Inputs:
        x = torch.randn(B, L, D).transpose(1, 2) if channel_last else torch.randn(B, D, L)
        weight, bias = torch.randn(D, W) / W**0.5, torch.randn(D)
        return {name: t.to(DTYPES[dtype]) for name, t in {"x": x, "weight": weight, "bias": bias}.items()}

    element = DTYPES[dtype].itemsize
    traffic = {FORWARD: 2 * B * D * L * element, BOTH: 5 * B * D * L * element}  # x out | x dout dx
    return Case(
        op="causal_conv1d",
        name=f"B{B}_D{D}_L{L}_{'channel_last' if channel_last else 'channel_first'}",
        dtype=dtype,
        shape={"B": B, "D": D, "L": L, "W": W},
        inputs=inputs,
        reference=definition("causal_conv1d", activation="silu"),
        contenders=(
            Contender("fastlm", operator("causal_conv1d", activation="silu"), ours=True),
            Contender("F.conv1d", direct(conv_and_silu)),
            Contender("F.conv1d compiled", _compiled, compiled=True),
            Contender("causal_conv1d", _cuda_package),
        ),
        work={part: Work(amount, "bytes", {"dram_copy": amount}, amount) for part, amount in traffic.items()},
        gradients=("x", "weight", "bias"),
        quick=quick,
    )


def conv_and_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The plain PyTorch form."""
    L = x.shape[-1]
    return functional.silu(
        functional.conv1d(x, weight.unsqueeze(1), bias, padding=W - 1, groups=x.shape[1])[..., :L]
    )


def _compiled(inputs: Inputs) -> Call:
    function = torch.compile(conv_and_silu)
    return lambda: function(**inputs)


def _cuda_package(inputs: Inputs) -> Call:
    function = package("causal_conv1d", needs="CUDA only").causal_conv1d_fn
    return lambda: function(**inputs, activation="silu")


def _decode(dtype: str, B: int, D: int, *, quick: bool = False) -> Case:
    def inputs() -> Inputs:
        shapes = {"x": (B, D), "conv_state": (B, D, W - 1), "weight": (D, W), "bias": (D,)}
        return {name: torch.randn(shape).to(DTYPES[dtype]) for name, shape in shapes.items()}

    traffic = B * D * (2 + 2 * (W - 1)) * DTYPES[dtype].itemsize + (W + 1) * D * DTYPES[dtype].itemsize
    return Case(
        op="causal_conv1d",
        name=f"update_B{B}_D{D}",
        dtype=dtype,
        shape={"B": B, "D": D, "W": W},
        inputs=inputs,
        reference=definition("causal_conv1d_update", activation="silu"),
        contenders=(
            Contender(
                "fastlm", operator("causal_conv1d_update", activation="silu"), ours=True, mode="inference"
            ),
            Contender("roll and sum", plain_update, mode="inference"),
        ),
        work={DECODE: Work(traffic, "bytes", {"dram_copy": traffic}, traffic)},
        part=DECODE,
        mutated=("conv_state",),
        quick=quick,
        note="The state stays in the cache, so the share of the memory ceiling may exceed 100 %."
        if B == 1
        else "",
    )


def plain_update(inputs: Inputs) -> Call:
    """The usual form: shift the state, append, multiply, sum."""
    x, state, weight, bias = (inputs[name] for name in ("x", "conv_state", "weight", "bias"))

    def call() -> Tensor:
        window = torch.cat((state, x.unsqueeze(-1)), dim=-1)
        state.copy_(window[..., 1:])
        return functional.silu((window * weight).sum(-1) + bias)

    return call
