"""Sliding-window attention, forward and backward, and the scan beside it in one launch. FLOP count visible keys only."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..peers import member, operator
from . import float64, peers
from .case import BACKWARD, FORWARD, Call, Contender, GpuCase, Inputs, Problem, Target, Work, upstream_of
from .cases_scan import scan_inputs, scan_work
from .item import Context

# B, L, H, Hkv, K, window: 2048 wide in heads of 128, 64 and 256; Samba-1.7B's groups; Samba-1.3B's width.
_SHAPES = (
    (1, 32768, 16, 16, 128, 2048),
    (1, 4096, 16, 16, 128, 2048),
    (1, 32768, 16, 16, 128, 512),
    (1, 4096, 16, 16, 128, 512),
    (1, 32768, 32, 32, 64, 2048),
    (1, 4096, 32, 32, 64, 2048),
    (1, 32768, 8, 8, 256, 2048),
    (1, 4096, 8, 8, 256, 2048),
    (1, 32768, 18, 18, 128, 2048),
    (8, 4096, 16, 16, 128, 2048),
    (1, 32768, 32, 4, 64, 2048),
    (1, 32768, 32, 32, 64, 512),
    (1, 4096, 32, 32, 64, 512),
    (1, 32768, 8, 8, 256, 512),
    (1, 4096, 8, 8, 256, 512),
)
_FUSED = ((4096, 16, 16, 128, 2048, 32768), (4608, 16, 18, 128, 2048, 32768), (4096, 16, 16, 128, 2048, 4096))
# 560 and 430 useful TFLOP/s where a product of 8192^3 runs at 790.
_FORWARD_SHARE, _BACKWARD_SHARE = 560 / 790, 430 / 790


def cases(*, tiny: bool) -> list[GpuCase]:
    """In the order of importance."""
    shapes = ((1, 70, 4, 2, 16, 32),) if tiny else _SHAPES
    fused = ((16, 4, 2, 16, 32, 70),) if tiny else _FUSED
    found = []
    for B, L, H, Hkv, K, W in shapes:
        name = f"sliding_window_attention/B{B}_L{L}_H{H}_Hkv{Hkv}_K{K}_W{W}"
        found.append(GpuCase(name, partial(_attention, B, L, H, Hkv, K, W)))
    for D, N, H, K, W, L in fused:
        found.append(GpuCase(f"scan_swa/D{D}_H{H}_K{K}_W{W}_L{L}", partial(_side_by_side, D, N, H, K, W, L)))
    return found


def attention_inputs(B: int, L: int, H: int, Hkv: int, K: int, device: str) -> Inputs:
    """bfloat16 queries, keys and values."""
    shapes = {"q": (B, L, H, K), "k": (B, L, Hkv, K), "v": (B, L, Hkv, K)}
    return {name: torch.randn(shape, device=device, dtype=torch.bfloat16) for name, shape in shapes.items()}


def useful_flops(B: int, L: int, H: int, K: int, W: int) -> float:
    """Two products over the pairs of a query and a key it sees."""
    W = min(W, L)
    return 4.0 * K * B * H * (L * W - W * (W - 1) // 2)


def _attention(B: int, L: int, H: int, Hkv: int, K: int, W: int, context: Context) -> Problem:
    inputs = attention_inputs(B, L, H, Hkv, K, context.device)
    upstream = upstream_of(inputs["q"])
    flops = useful_flops(B, L, H, K, W)
    aimed = L >= 32768 and K == 128 and W == 2048
    return Problem(
        shape={"B": B, "L": L, "H": H, "Hkv": Hkv, "K": K, "window": W},
        inputs=inputs,
        contenders=(
            Contender("fastlm", operator("sliding_window_attention", window_size=(W - 1, 0)), ours=True),
            Contender("flash_attn 2", peers.flash_attn(W, "flash_attn")),
            Contender("flash_attn 3", peers.flash_attn(W, "flash_attn_interface")),
            Contender("flex_attention compiled", peers.flex(W), compiled=True),
            Contender("SDPA, window mask", peers.sdpa(W)),
            Contender("SDPA, full causal", peers.sdpa(None), full_check=False),
        ),
        work={
            FORWARD: Work(
                flops, "FLOP", {"bf16": flops}, (Target("share", _FORWARD_SHARE),) if aimed else ()
            ),
            BACKWARD: Work(
                2.5 * flops,
                "FLOP",
                {"bf16": 2.5 * flops},
                (Target("share", _BACKWARD_SHARE),) if aimed else (),
            ),
        },
        expected=lambda part: float64.attention(inputs, W, part, upstream),
        gradients=("q", "k", "v"),
        upstream=upstream,
        note="SDPA, full causal, sees more keys: for orientation; its rate counts the window's work.",
    )


def _side_by_side(D: int, N: int, H: int, K: int, W: int, L: int, context: Context) -> Problem:
    scan, attention = scan_inputs(1, D, L, N, context.device), attention_inputs(1, L, H, H, K, context.device)
    flops, work = useful_flops(1, L, H, K, W), scan_work(1, D, L, N)[FORWARD]

    def expected(part: str) -> dict[str, Tensor]:
        return {
            "out": float64.scan(scan, part, (), ())["out"],
            "attn_out": float64.attention(attention, W, part, ())["out"],
        }

    size: dict[str, Any] = {"window_size": (W - 1, 0)}
    return Problem(
        shape={"B": 1, "D": D, "N": N, "L": L, "H": H, "K": K, "window": W},
        inputs=scan | attention,
        contenders=(
            Contender("fastlm", partial(_fused, size), ours=True),
            Contender("two launches", partial(_apart, size, False), ours=True),
            Contender("two streams", partial(_apart, size, True), ours=True),
        ),
        # Both halves at their floors at the same time; the scan's is the longer one, or the other way round.
        work={
            FORWARD: Work(
                L, "tokens", {**work.floor, "bf16": flops}, (Target("speedup", 1.0, "two launches"),)
            )
        },
        expected=expected,
        outputs=("out", "attn_out"),
        note="two streams: the same two launches, left to the card to run side by side",
    )


_SCAN = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def _fused(size: dict[str, Any], inputs: Inputs) -> Call:
    function = member("fastlm.ops", "scan_swa")
    words = (*(inputs[name] for name in _SCAN), True, None, *(inputs[name] for name in ("q", "k", "v")))

    def call() -> tuple[Tensor, Tensor]:
        out, _, attn_out, _ = function(*words, **size)
        return out, attn_out

    return call


def _apart(size: dict[str, Any], on_two_streams: bool, inputs: Inputs) -> Call:
    scan, attend = member("fastlm.ops", "selective_scan"), member("fastlm.ops", "sliding_window_attention")
    left, right = {name: inputs[name] for name in _SCAN}, tuple(inputs[name] for name in ("q", "k", "v"))

    def one() -> tuple[Tensor, Tensor]:
        return scan(**left, delta_softplus=True), attend(*right, **size)

    if not on_two_streams or inputs["u"].device.type != "cuda":
        return one
    side = torch.cuda.Stream()

    def two() -> tuple[Tensor, Tensor]:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            attended = attend(*right, **size)
        out = scan(**left, delta_softplus=True)
        torch.cuda.current_stream().wait_stream(side)
        return out, attended

    return two
