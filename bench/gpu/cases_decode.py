"""One token: the state update, the ring of keys and values, the pair of blocks as one operator. Called, and as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..case import Build
from ..cases.samba_decode_step import pair
from ..cases.selective_scan import plain_state_update
from ..peers import definition, operator, package
from .case import STEP, Call, Contender, GpuCase, Inputs, Problem, Results, Target, Work
from .item import Context

_N = 16


def cases(*, tiny: bool) -> list[GpuCase]:
    """In the order of importance."""
    updates = ((3, 40),) if tiny else ((64, 4608), (256, 4608), (1, 4608), (64, 4096))
    rings = (
        ((2, 4, 2, 16, 32),)
        if tiny
        else ((1, 18, 18, 128, 2048), (16, 18, 18, 128, 2048), (64, 32, 4, 64, 2048))
    )
    pairs = ((1, 64, 2, 32, 100, 32),) if tiny else tuple((B, 2304, 18, 128, 6144, 2048) for B in (1, 4, 16))
    found = [GpuCase(f"selective_state_update/B{B}_D{D}_N{_N}", partial(_update, B, D)) for B, D in updates]
    for B, H, Hkv, K, R in rings:
        name = f"sliding_window_attention_update/B{B}_H{H}_Hkv{Hkv}_K{K}_R{R}"
        found.append(GpuCase(name, partial(_ring, B, H, Hkv, K, R)))
    for B, d, H, K, f, W in pairs:
        found.append(
            GpuCase(f"samba_decode_step/B{B}_d{d}_H{H}_K{K}_f{f}_W{W}", partial(_pair, B, d, H, K, f, W))
        )
    return found


def _both_ways(name: str, build: Callable[[Inputs], Call], *, ours: bool = False) -> list[Contender]:
    """Called from Python, and replayed as a graph."""
    called = Contender(name, build, ours=ours)
    return [called, replace(called, name=f"{name}, graph", graph=True)]


def _results(build: Build, inputs: Inputs, mutated: tuple[str, ...]) -> Results:
    """The definition in float64 on the device."""
    exact = {
        name: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
        for name, a in inputs.items()
    }
    exact |= {name: exact[name].clone() for name in mutated}
    with torch.no_grad():
        out = build(exact)()
    assert isinstance(out, Tensor)
    return {"out": out} | {name: exact[name] for name in mutated}


def _update(B: int, D: int, context: Context) -> Problem:
    device, bf16 = context.device, torch.bfloat16
    inputs: Inputs = {
        "state": torch.randn(B, D, _N, device=device),
        **{name: torch.randn(B, D, device=device, dtype=bf16) for name in ("x", "dt", "z")},
        **{name: torch.randn(B, _N, device=device, dtype=bf16) for name in ("B", "C")},
        "A": -torch.arange(1.0, _N + 1, device=device).repeat(D, 1),
        "D": torch.randn(D, device=device),
        "dt_bias": torch.full((D,), -3.0, device=device),
    }
    moved = float(
        B * D * (8 * _N + 4 * 2) + 4 * D * (_N + 2) + 4 * B * _N
    )  # state twice, x dt z out, A D bias
    targets = (Target("share", 0.8),) if B >= 64 else ()
    fixed = {"dt_softplus": True}
    return Problem(
        shape={"B": B, "D": D, "N": _N},
        inputs=inputs,
        contenders=(
            *_both_ways("fastlm", operator("selective_state_update", **fixed), ours=True),
            *_both_ways("mamba_ssm, Triton", _triton_update),
            *_both_ways("plain PyTorch", plain_state_update),
        ),
        work={STEP: Work(moved, "bytes", {"bytes": moved}, targets)},
        expected=lambda part: _results(definition("selective_state_update", **fixed), inputs, ("state",)),
        mutated=("state",),
    )


def _triton_update(inputs: Inputs) -> Call:
    function = package("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    return lambda: function(**inputs, dt_softplus=True)


def _ring(B: int, H: int, Hkv: int, K: int, R: int, context: Context) -> Problem:
    device, bf16, seen = context.device, torch.bfloat16, R + R // 2
    shapes = {"q": (B, 1, H, K), "k": (B, 1, Hkv, K), "v": (B, 1, Hkv, K)}
    shapes |= dict.fromkeys(("k_cache", "v_cache"), (B, R, Hkv, K))
    inputs: Inputs = {name: torch.randn(s, device=device, dtype=bf16) for name, s in shapes.items()}
    inputs["cache_seqlens"] = torch.full((B,), seen, dtype=torch.int32, device=device)
    moved = float(2 * B * R * Hkv * K * 2)
    size = (R - 1, 0)
    rings = ("k_cache", "v_cache")
    build = operator("sliding_window_attention_update", window_size=size)
    exact = definition("sliding_window_attention_update", window_size=size)
    return Problem(
        shape={"B": B, "H": H, "Hkv": Hkv, "K": K, "R": R},
        inputs=inputs,
        contenders=(
            *_both_ways("fastlm", build, ours=True),
            *_both_ways("SDPA on the ring", partial(_sdpa_on_ring, seen % R)),
            *_both_ways("flash_attn on the ring", partial(_flash_on_ring, seen % R)),
        ),
        work={STEP: Work(moved, "bytes", {"read": moved})},
        expected=lambda part: _results(exact, inputs, rings),
        mutated=rings,
    )


def _sdpa_on_ring(slot: int, inputs: Inputs) -> Call:
    """The order of keys does not matter, and all are in the window."""
    q, k, v, keys, values = (inputs[name] for name in ("q", "k", "v", "k_cache", "v_cache"))

    def call() -> Tensor:
        keys[:, slot : slot + 1] = k
        values[:, slot : slot + 1] = v
        heads_first = (t.transpose(1, 2) for t in (q, keys, values))
        out = functional.scaled_dot_product_attention(*heads_first, enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2)

    return call


def _flash_on_ring(slot: int, inputs: Inputs) -> Call:
    function = package("flash_attn").flash_attn_func
    q, k, v, keys, values = (inputs[name] for name in ("q", "k", "v", "k_cache", "v_cache"))

    def call() -> Tensor:
        keys[:, slot : slot + 1] = k
        values[:, slot : slot + 1] = v
        out: Tensor = function(q, keys, values)
        return out

    return call


def _pair(B: int, d: int, H: int, K: int, f: int, W: int, context: Context) -> Problem:
    """The case of the CPU's bench with its tensors on the device."""
    case = pair("bf16", B, d, H, K, f, W)
    inputs: Inputs = {name: a.to(context.device) for name, a in case.inputs().items()}
    moved = case.work["decode step"].floor["dram_read"]
    ours, layers = (contender.build for contender in case.contenders)
    exact = definition("samba_decode_step", window_size=(W - 1, 0))
    return Problem(
        shape=dict(case.shape),
        inputs=inputs,
        contenders=(
            *_both_ways("fastlm", ours, ours=True),
            *_both_ways("the layers", layers, ours=True),
        ),
        work={STEP: Work(moved, "bytes", {"read": moved}, (Target("speedup", 1.0, "the layers, graph"),))},
        expected=lambda part: _results(exact, inputs, case.mutated),
        mutated=case.mutated,
        note="the weights of both blocks are read once; the layers are those of fastlm.models.samba",
    )
