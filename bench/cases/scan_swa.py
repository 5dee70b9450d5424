"""A scan beside an attention: the mixers of a parallel hybrid layer, and two chunks of a prompt on their way."""

from __future__ import annotations

import torch
from torch import Tensor

from ..case import BOTH, FORWARD, Build, Call, Case, Contender, Inputs, Work
from ..peers import operator
from . import selective_scan, sliding_window_attention

N = selective_scan.N
_QKV = ("q", "k", "v")
_FIXED = {"delta_softplus": True, "initial_state": None}


def cases() -> list[Case]:
    """The halves take about the same time, one of them most of it, or both very little."""
    found = []
    for dtype in ("fp32", "bf16"):
        found += [
            _layer(dtype, "even", D=1024, L=1024, H=8, K=64, window=512),
            _layer(dtype, "small", D=512, L=128, H=4, K=64, window=128, quick=True),
            _layer(dtype, "scan_mostly", D=4096, L=512, H=4, K=64, window=128),
        ]
    return found


def _layer(
    dtype: str, balance: str, D: int, L: int, H: int, K: int, window: int, *, quick: bool = False
) -> Case:
    scan = selective_scan.sequence(dtype, 1, D, L)
    attention = sliding_window_attention.sequence(dtype, 1, H, H, L, K, window)
    size = {"window_size": (window - 1, 0)}

    def work(part: str) -> Work:
        floor: dict[str, float] = {}
        for half in (scan, attention):
            for name, amount in half.work[part].floor.items():
                floor[name] = floor.get(name, 0) + amount
        return Work(L, "tokens", floor)

    return Case(
        op="scan_swa",
        name=f"{balance}_D{D}_L{L}_H{H}_K{K}_window{window}",
        dtype=dtype,
        shape={"D": D, "N": N, "L": L, "H": H, "K": K, "window": window},
        inputs=lambda: scan.inputs() | attention.inputs(),
        reference=_one_after_the_other(scan.reference, attention.reference),
        contenders=(
            Contender("fastlm", _scan_swa(size), ours=True),
            Contender(
                "the two operators",
                _one_after_the_other(
                    operator("selective_scan", delta_softplus=True),
                    operator("sliding_window_attention", **size),
                ),
                ours=True,
            ),
            Contender(
                "step loop, SDPA with a mask",
                _one_after_the_other(scan.contenders[1].build, attention.contenders[1].build),
            ),
        ),
        work={part: work(part) for part in (FORWARD, BOTH)},
        gradients=scan.gradients + _QKV,
        quick=quick,
    )


def _scan_swa(size: dict[str, tuple[int, int]]) -> Build:
    def build(inputs: Inputs) -> Call:
        call = operator("scan_swa", **_FIXED, **size)(inputs)

        def outputs() -> tuple[Tensor, ...]:
            out, _, attn_out, _ = call()
            return out, attn_out

        return outputs

    return build


def _one_after_the_other(scan: Build, attention: Build) -> Build:
    def build(inputs: Inputs) -> Call:
        first = scan({name: t for name, t in inputs.items() if name not in _QKV})
        second = attention({name: inputs[name] for name in _QKV})

        def outputs() -> tuple[Tensor, ...]:
            outs = (first(), second())
            assert all(isinstance(out, torch.Tensor) for out in outs)
            return outs  # type: ignore[return-value]

        return outputs

    return build
