"""The selective scan and the convolution before it: forward and backward at the sizes of the published Samba models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..peers import operator
from . import float64, peers
from .case import BACKWARD, FORWARD, Contender, GpuCase, Inputs, Problem, Target, Work, upstream_of
from .item import Context

_SCAN_GRADIENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
_CONV_GRADIENTS = ("x", "weight", "bias")
# D: 4096 Samba-1.7B, 4608 Samba-1.3B, 5632 Samba-3.8B, 3072 Samba-421M.
_SCANS = (
    (1, 4096, 32768),
    (1, 4096, 4096),
    (8, 4096, 4096),
    (1, 4608, 4096),
    (1, 4608, 32768),
    (1, 5632, 4096),
    (1, 3072, 4096),
)
_CONVS = ((1, 4608, 4096, True), (1, 4608, 32768, True), (8, 4096, 4096, True), (1, 4096, 4096, False))


def cases(*, tiny: bool) -> list[GpuCase]:
    """In the order of importance."""
    scans = ((1, 16, 70),) if tiny else _SCANS
    convs = ((1, 16, 70, True),) if tiny else _CONVS
    found = [GpuCase(f"selective_scan/B{B}_D{D}_L{L}_N16", partial(_scan, B, D, L, 16)) for B, D, L in scans]
    for B, D, L, last in convs:
        word = "channel_last" if last else "channel_first"
        found.append(GpuCase(f"causal_conv1d/B{B}_D{D}_L{L}_{word}", partial(_conv, B, D, L, last)))
    return found


def scan_inputs(B: int, D: int, L: int, N: int, device: str) -> Inputs:
    """Channel-last bfloat16 activations, step sizes between 1e-3 and 1e-1, A as Mamba starts it."""

    def activations(width: int) -> Tensor:
        return torch.randn(B, L, width, device=device, dtype=torch.bfloat16).transpose(1, 2)

    steps = torch.exp(torch.empty(D, device=device).uniform_(-6.9, -2.3))
    return {
        "u": activations(D),
        "delta": activations(D),
        "A": -torch.arange(1.0, N + 1, device=device).repeat(D, 1),
        "B": activations(N),
        "C": activations(N),
        "D": torch.randn(D, device=device),
        "z": activations(D),
        "delta_bias": steps + torch.log(-torch.expm1(-steps)),
    }


def scan_work(B: int, D: int, L: int, N: int) -> dict[str, Work]:
    """Per channel and position: N + 4 exponentials and the like forward, N + 6 backward; 4 N + 12 and 16 N + 30 fp32 instructions;
    u, delta, z and out cross the memory bus, backward twice as much; B and C once for all channels.
    """
    channels, shared = B * D * L, 2 * B * N * L * 2
    large = D == 4096 and L == 32768
    forward = {"exp2": channels * (N + 4), "fp32": channels * (4 * N + 12), "bytes": 8 * channels + shared}
    backward = {
        "exp2": channels * (N + 6),
        "fp32": channels * (16 * N + 30),
        "bytes": 16 * channels + 2 * shared,
    }
    steps = float(channels * N)
    return {
        FORWARD: Work(
            steps, "state-steps", forward | {"balanced": 1.0}, (Target("floor", 1.35),) if large else ()
        ),
        BACKWARD: Work(steps, "state-steps", backward, (Target("floor", 1.6),) if large else ()),
    }


def _scan(B: int, D: int, L: int, N: int, context: Context) -> Problem:
    inputs = scan_inputs(B, D, L, N, context.device)
    upstream = upstream_of(inputs["u"])
    contenders = [
        Contender("fastlm", operator("selective_scan", delta_softplus=True), ours=True),
        Contender("mamba_ssm", peers.mamba_scan, prepare=peers.channel_first),
        Contender("torch, chunks in step", peers.chunked_scan),
        Contender("associative_scan compiled", peers.associative_scan, compiled=True, parts=(FORWARD,)),
        Contender("fla", peers.fla_scan),
    ]
    if B * L <= 4096:
        contenders.append(Contender("torch, step loop", peers.step_loop, parts=(FORWARD,)))
    return Problem(
        shape={"B": B, "D": D, "L": L, "N": N},
        inputs=inputs,
        contenders=tuple(contenders),
        work=scan_work(B, D, L, N),
        expected=lambda part: float64.scan(inputs, part, upstream, _SCAN_GRADIENTS),
        gradients=_SCAN_GRADIENTS,
        upstream=upstream,
    )


def _conv(B: int, D: int, L: int, channel_last: bool, context: Context) -> Problem:
    device, bf16 = context.device, torch.bfloat16
    x = torch.randn(B, L, D, device=device, dtype=bf16).transpose(1, 2)
    inputs: Inputs = {
        "x": x if channel_last else x.contiguous(),
        "weight": (torch.randn(D, 4, device=device) / 2).to(bf16),
        "bias": torch.randn(D, device=device, dtype=bf16),
    }
    upstream = upstream_of(inputs["x"])
    moved = B * D * L * 2  # bytes of one activation
    first: Callable[[Inputs], Inputs] = peers.channel_first
    return Problem(
        shape={"B": B, "D": D, "L": L, "W": 4},
        inputs=inputs,
        contenders=(
            Contender("fastlm", operator("causal_conv1d", activation="silu"), ours=True),
            Contender("causal_conv1d", peers.causal_conv1d),
            Contender("fla", peers.fla_conv, prepare=peers.channel_last),
            Contender("F.conv1d", peers.conv1d, prepare=first),
        ),
        work={
            FORWARD: Work(2.0 * moved, "bytes", {"bytes": 2.0 * moved}),
            BACKWARD: Work(3.0 * moved, "bytes", {"bytes": 3.0 * moved}),  # x and dout in, dx out
        },
        expected=lambda part: float64.conv(inputs, part, upstream, _CONV_GRADIENTS),
        gradients=_CONV_GRADIENTS,
        upstream=upstream,
    )
