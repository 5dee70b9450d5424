"""One token through a pair of Samba blocks: the operator beside the layers it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..case import DECODE, DTYPES, Build, Call, Case, Contender, Inputs, Work
from ..peers import definition, member, operator

_STATES = ("conv_state", "scan_state", "k_cache", "v_cache")
_SEEN = 700  # tokens before this one at least


def cases() -> list[Case]:
    """The demo's blocks and those of Samba-421M, one row and four."""
    found = []
    for dtype in ("fp32", "bf16"):
        found += [
            pair(dtype, B=1, d=256, H=4, K=64, f=688, window=128, quick=True),
            pair(dtype, B=1, d=1536, H=12, K=128, f=4096, window=512),
            pair(dtype, B=4, d=1536, H=12, K=128, f=4096, window=512),
        ]
    return found


def pair(dtype: str, B: int, d: int, H: int, K: int, f: int, window: int, *, quick: bool = False) -> Case:
    """Two blocks of width `d` with `H` heads of `K` and feed-forward layers of `f`, `B` rows."""
    dim, state, rank = 2 * d, 16, -(-d // 16)
    cast = DTYPES[dtype]
    seen = max(_SEEN, window + 1)  # the window is full

    def inputs() -> Inputs:
        def weight(*shape: int) -> Tensor:
            return (torch.randn(shape) / shape[-1] ** 0.5).to(cast)

        positions = torch.arange(seen + 1, dtype=torch.float64).unsqueeze(1)
        angles = positions * 10000.0 ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
        ones = torch.ones(d)
        return {
            "hidden": torch.randn(B, d),
            "mamba_norm": ones,
            "in_proj": weight(2 * dim, d),
            "conv_weight": weight(dim, 4),
            "conv_bias": torch.zeros(dim).to(cast),
            "x_proj": weight(rank + 2 * state, dim),
            "dt_proj": weight(dim, rank),
            "dt_bias": torch.full((dim,), -4.0),
            "A_log": torch.arange(1.0, state + 1).log().repeat(dim, 1),
            "D": torch.ones(dim),
            "out_proj": weight(d, dim),
            "mamba_mlp_norm": ones.clone(),
            "mamba_w1": weight(f, d),
            "mamba_w2": weight(f, d),
            "mamba_w3": weight(d, f),
            "conv_state": torch.randn(B, dim, 3).to(cast),
            "scan_state": torch.randn(B, dim, state),
            "attn_norm": ones.clone(),
            "q_proj": weight(H * K, d),
            "k_proj": weight(H * K, d),
            "v_proj": weight(H * K, d),
            "o_proj": weight(d, H * K),
            "attn_mlp_norm": ones.clone(),
            "attn_w1": weight(f, d),
            "attn_w2": weight(f, d),
            "attn_w3": weight(d, f),
            "k_cache": torch.randn(B, window, H, K).to(cast),
            "v_cache": torch.randn(B, window, H, K).to(cast),
            "cache_seqlens": torch.full((B,), seen, dtype=torch.int32),
            "rotary_cos": angles.cos().float(),
            "rotary_sin": angles.sin().float(),
        }

    weights = 2 * dim * d + dim * (2 * rank + 2 * state + d) + 6 * f * d + 4 * H * K * d
    read = float(weights * cast.itemsize + 2 * B * window * H * K * cast.itemsize)
    size = (window - 1, 0)
    return Case(
        op="samba_decode_step",
        name=f"B{B}_d{d}_H{H}_K{K}_f{f}_window{window}",
        dtype=dtype,
        shape={"B": B, "d": d, "H": H, "K": K, "f": f, "window": window},
        inputs=inputs,
        reference=definition("samba_decode_step", window_size=size),
        contenders=(
            Contender("fastlm", operator("samba_decode_step", window_size=size), ours=True, mode="inference"),
            Contender("the layers", _layers(d, H, K, f, window), ours=True, mode="inference"),
        ),
        work={DECODE: Work(read, "bytes", {"dram_read": read}, read)},
        part=DECODE,
        mutated=_STATES,
        quick=quick,
        note="the layers are those of fastlm.models.samba, with their calls of Python",
    )


def _layers(d: int, H: int, K: int, f: int, window: int) -> Build:
    """The two blocks of a model with these weights and states."""

    def build(inputs: Inputs) -> Call:
        config = member("fastlm.models", "SambaConfig")(
            hidden_size=d,
            num_hidden_layers=2,
            num_attention_heads=H,
            num_key_value_heads=H,
            head_dim=K,
            intermediate_size=f,
            vocab_size=16,
            sliding_window=window,
        )
        like = inputs["in_proj"]
        blocks = member("fastlm.models", "SambaForCausalLM")(
            config, device=like.device, dtype=like.dtype
        ).model.layers
        names = {
            "mamba": ("in_proj", "x_proj", "dt_proj", "out_proj"),
            "attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        }
        with torch.no_grad():
            for block, (part, projections) in zip(blocks, names.items(), strict=True):
                mixer = getattr(block, part)
                for name in projections:
                    getattr(mixer, name).weight.copy_(inputs[name])
                for name in ("w1", "w2", "w3"):
                    getattr(block.mlp, name).weight.copy_(inputs[f"{part}_{name}"])
            mamba = blocks[0].mamba
            mamba.conv1d.weight.copy_(inputs["conv_weight"].unsqueeze(1))
            mamba.conv1d.bias.copy_(inputs["conv_bias"])
            mamba.dt_proj.bias.copy_(inputs["dt_bias"])
            mamba.A_log.copy_(inputs["A_log"])
            mamba.D.copy_(inputs["D"])
        layers = member("fastlm.models.samba.cache", "LayerCache")
        state = member("fastlm.layers", "MambaState")(inputs["conv_state"], inputs["scan_state"])
        ring = member("fastlm.layers", "KVRing")(inputs["k_cache"], inputs["v_cache"])
        caches = (layers(state, None), layers(None, ring))
        step = member("fastlm.models.samba.passes", "Pass")(
            rotary=(inputs["rotary_cos"], inputs["rotary_sin"]),
            seqlens=[1] * inputs["hidden"].shape[0],
            step_positions=inputs["cache_seqlens"],
        )

        def call() -> Tensor:
            x = inputs["hidden"].unsqueeze(1)
            for block, cache in zip(blocks, caches, strict=True):
                x = block(x, step, cache)
            return x.squeeze(1)

        return call

    return build
