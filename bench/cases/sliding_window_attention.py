"""Attention over a window of keys: whole sequences, and one token on a ring buffer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..case import (
    BOTH,
    DECODE,
    DTYPES,
    FORWARD,
    Build,
    Call,
    Case,
    Contender,
    Inputs,
    Target,
    UnavailableError,
    Work,
)
from ..peers import definition, member, operator, package

MASK, CAUSAL = "SDPA, window mask", "SDPA, full causal"
# Of the window mask's time, by dtype and window.
_SPEEDUPS = {("fp32", 512): 10, ("fp32", 2048): 3.3, ("bf16", 512): 12, ("bf16", 2048): 4}
_RATES = {"fp32": 75e9, "bf16": 120e9}


def cases() -> list[Case]:
    """Shapes of the design notes, of the demo model, and a decoding step with a full window."""
    found = []
    for dtype in ("fp32", "bf16"):
        found += [
            sequence(dtype, 2, 4, 2, 512, 64, 128, quick=True),
            sequence(dtype, 1, 4, 4, 4096, 128, 512),
            sequence(dtype, 1, 4, 4, 4096, 128, 2048),
            _decode(dtype, 1, 4, 2, 64, 128, quick=True),
            _decode(dtype, 1, 18, 18, 128, 2048),
        ]
    return found


def sequence(
    dtype: str, B: int, H: int, Hkv: int, L: int, K: int, window: int, *, quick: bool = False
) -> Case:
    def inputs() -> Inputs:
        shapes = {"q": (B, L, H, K), "k": (B, L, Hkv, K), "v": (B, L, Hkv, K)}
        return {name: torch.randn(shape).to(DTYPES[dtype]) for name, shape in shapes.items()}

    pairs = B * H * (L * window - window * (window - 1) // 2)  # of a query and a key it sees
    flops = 4 * K * pairs
    product = "dot" if dtype == "bf16" else "fma"
    # Its backward pass in bf16 runs at the speed of torch.mm on all pairs, which is slow where the CPU has no
    # bf16 products.
    backward_cost = {BOTH: {f"mm_{dtype}": 2 * K * B * H * L * L}}
    size = (window - 1, 0)
    speedup = _SPEEDUPS.get((dtype, window))
    targets = (
        ()
        if speedup is None
        else (Target(FORWARD, "rate", _RATES[dtype]), Target(FORWARD, "speedup", speedup, MASK))
    )
    return Case(
        op="sliding_window_attention",
        name=f"B{B}_H{H}_Hkv{Hkv}_L{L}_K{K}_window{window}",
        dtype=dtype,
        shape={"B": B, "H": H, "Hkv": Hkv, "L": L, "K": K, "window": window},
        inputs=inputs,
        reference=_reference_by_heads(size),
        contenders=(
            Contender("fastlm", operator("sliding_window_attention", window_size=size), ours=True),
            Contender(MASK, _sdpa(window), cost=backward_cost),
            Contender(CAUSAL, _sdpa(None), reference=_reference_by_heads((-1, 0)), cost=backward_cost),
            Contender(
                "flex_attention compiled",
                _flex(window),
                compiled=True,
                skip_parts={BOTH: "flex_attention has no backward on CPU"},
            ),
            Contender("flash_attn", _flash_attn(size)),
        ),
        # Useful work only: pairs inside the window. Backward recomputes the scores and has four more
        # products.
        work={
            FORWARD: Work(flops, "FLOP", {product: flops, "exp2": pairs}),
            BOTH: Work(3.5 * flops, "FLOP", {product: 3.5 * flops, "exp2": 2 * pairs}),
        },
        gradients=("q", "k", "v"),
        targets=targets,
        quick=quick,
    )


def _reference_by_heads(size: tuple[int, int]) -> Build:
    """The definition, one key/value head at a time: heads do not depend on each other."""

    def build(inputs: Inputs) -> Call:
        attention = member("fastlm.reference", "sliding_window_attention")
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        kv_heads = k.shape[2]
        group = q.shape[2] // kv_heads

        def piece(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = attention(q, k, v, window_size=size)
            return out

        def call() -> Tensor:
            heads = [
                checkpoint(
                    piece,
                    q[:, :, h * group : (h + 1) * group],
                    k[:, :, h : h + 1],
                    v[:, :, h : h + 1],
                    use_reentrant=False,
                )
                for h in range(kv_heads)
            ]
            return torch.cat(heads, dim=2)

        return call

    return build


def window_mask(L: int, window: int) -> Tensor:
    """`(L, L)`, True where a query sees a key."""
    distance = torch.arange(L)[:, None] - torch.arange(L)
    return (distance >= 0) & (distance < window)


def _sdpa(window: int | None) -> Build:
    """SDPA with the mask made beforehand, or full causal attention, which sees more and is there for
    orientation.
    """

    def build(inputs: Inputs) -> Call:
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        mask = None if window is None else window_mask(q.shape[1], window)
        grouped = q.shape[2] != k.shape[2]

        def call() -> Tensor:
            heads_first = (t.transpose(1, 2) for t in (q, k, v))
            out = functional.scaled_dot_product_attention(
                *heads_first, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
            )
            return out.transpose(1, 2)

        return call

    return build


def _flex(window: int) -> Build:
    def build(inputs: Inputs) -> Call:
        module = package("torch.nn.attention.flex_attention")
        if any(t.requires_grad for t in inputs.values()):
            raise UnavailableError("flex_attention has no backward on CPU")
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        L, grouped = q.shape[1], q.shape[2] != k.shape[2]

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < window)

        blocks = module.create_block_mask(sees, B=None, H=None, Q_LEN=L, KV_LEN=L, device="cpu")
        attention = torch.compile(module.flex_attention)

        def call() -> Tensor:
            heads_first = (t.transpose(1, 2) for t in (q, k, v))
            out: Tensor = attention(*heads_first, block_mask=blocks, enable_gqa=grouped)
            return out.transpose(1, 2)

        return call

    return build


def _flash_attn(size: tuple[int, int]) -> Build:
    def build(inputs: Inputs) -> Call:
        function = package("flash_attn", needs="CUDA only").flash_attn_func
        return lambda: function(**inputs, causal=True, window_size=size)

    return build


def _decode(dtype: str, B: int, H: int, Hkv: int, K: int, window: int, *, quick: bool = False) -> Case:
    """One token when the ring holds a full window and has wrapped around."""
    seen = window + window // 2

    def inputs() -> Inputs:
        shapes = {
            "q": (B, 1, H, K),
            "k": (B, 1, Hkv, K),
            "v": (B, 1, Hkv, K),
            "k_cache": (B, window, Hkv, K),
            "v_cache": (B, window, Hkv, K),
        }
        tensors = {name: torch.randn(shape).to(DTYPES[dtype]) for name, shape in shapes.items()}
        return tensors | {"cache_seqlens": torch.full((B,), seen, dtype=torch.int32)}

    traffic = 2 * B * window * Hkv * K * DTYPES[dtype].itemsize
    size = (window - 1, 0)
    return Case(
        op="sliding_window_attention",
        name=f"update_B{B}_H{H}_Hkv{Hkv}_K{K}_window{window}",
        dtype=dtype,
        shape={"B": B, "H": H, "Hkv": Hkv, "K": K, "window": window},
        inputs=inputs,
        reference=definition("sliding_window_attention_update", window_size=size),
        contenders=(
            Contender(
                "fastlm",
                operator("sliding_window_attention_update", window_size=size),
                ours=True,
                mode="inference",
            ),
            Contender("SDPA on the ring", _sdpa_on_ring(seen % window), mode="inference"),
        ),
        work={DECODE: Work(traffic, "bytes", {"dram_read": traffic}, traffic)},
        part=DECODE,
        mutated=("k_cache", "v_cache"),
        quick=quick,
        note="Caches that fit the processor's own can exceed the memory ceiling.",
    )


def _sdpa_on_ring(slot: int) -> Build:
    """Writes the slot, attends to the whole ring: the order of keys does not matter, and all are in the
    window.
    """

    def build(inputs: Inputs) -> Call:
        q, k, v, keys, values = (inputs[name] for name in ("q", "k", "v", "k_cache", "v_cache"))
        grouped = q.shape[2] != k.shape[2]

        def call() -> Tensor:
            keys[:, slot : slot + 1] = k
            values[:, slot : slot + 1] = v
            heads_first = (t.transpose(1, 2) for t in (q, keys, values))
            out = functional.scaled_dot_product_attention(*heads_first, enable_gqa=grouped)
            return out.transpose(1, 2)

        return call

    return build
