"""Arguments of every operator for the self-test of `fastlm doctor`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = tuple[list[Any], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """Arguments of one operator: a small odd shape for the comparison, a larger one for the time."""

    small: Callable[[], Call]
    large: Callable[[], Call]


def _conv(b: int, d: int, length: int) -> Call:
    return [torch.randn(b, d, length), torch.randn(d, 4), torch.randn(d)], {"activation": "silu"}


def _conv_update(b: int, d: int) -> Call:
    return [torch.randn(b, d), torch.randn(b, d, 3), torch.randn(d, 4), torch.randn(d)], {
        "activation": "silu"
    }


def _scan(b: int, d: int, length: int, n: int) -> Call:
    u, delta, z = (torch.randn(b, d, length) for _ in range(3))
    shared = [torch.randn(b, n, length) for _ in range(2)]
    arguments = [u, delta, -torch.rand(d, n) - 0.5, *shared, torch.randn(d), z, torch.randn(d) - 2]
    return arguments, {"delta_softplus": True, "return_last_state": True}


def _state_update(b: int, d: int, n: int) -> Call:
    state, a = torch.randn(b, d, n), -torch.rand(d, n) - 0.5
    x, dt, z = (torch.randn(b, d) for _ in range(3))
    shared = [torch.randn(b, n) for _ in range(2)]
    return [state, x, dt, a, *shared, torch.randn(d), z, torch.randn(d) - 2], {"dt_softplus": True}


def _attention(b: int, length: int, window: int) -> Call:
    heads = [torch.randn(b, length, count, 32) for count in (4, 2, 2)]
    return heads, {"window_size": (window - 1, 0)}


def _attention_update(b: int, window: int) -> Call:
    heads = [torch.randn(b, 1, count, 32) for count in (4, 2, 2)]
    caches = [torch.randn(b, window, 2, 32) for _ in range(2)]
    seen = torch.arange(b, dtype=torch.int32) * 5 + 3
    return [*heads, *caches, seen], {"window_size": (window - 1, 0)}


def _both(length: int, d: int, window: int) -> Call:
    scan, options = _scan(1, d, length, 16)
    heads, _ = _attention(1, length, window)
    return [*scan, options["delta_softplus"], None, *heads], {"window_size": (window - 1, 0)}


def _decode_step(rows: int, d: int, window: int) -> Call:
    """Two blocks of width `d` with heads of 8 and a scan of twice the width."""
    dim, state, rank, inner = 2 * d, 16, max(1, d // 16), 3 * d
    heads, kv_heads = d // 8, max(1, d // 16)

    def weight(*shape: int) -> Tensor:
        scale: float = shape[-1] ** -0.5
        return torch.randn(shape) * scale

    def norm() -> Tensor:
        return 1 + torch.randn(d) / 10

    weights = {
        "mamba_norm": norm(),
        "in_proj": weight(2 * dim, d),
        "conv_weight": weight(dim, 4),
        "conv_bias": torch.randn(dim),
        "x_proj": weight(rank + 2 * state, dim),
        "dt_proj": weight(dim, rank),
        "dt_bias": torch.randn(dim) - 2,
        "A_log": torch.randn(dim, state),
        "D": torch.randn(dim),
        "out_proj": weight(d, dim),
        "mamba_mlp_norm": norm(),
        "attn_norm": norm(),
        "q_proj": weight(heads * 8, d),
        "k_proj": weight(kv_heads * 8, d),
        "v_proj": weight(kv_heads * 8, d),
        "o_proj": weight(d, heads * 8),
        "attn_mlp_norm": norm(),
    }
    for kind in ("mamba", "attn"):
        weights |= {
            f"{kind}_w1": weight(inner, d),
            f"{kind}_w2": weight(inner, d),
            f"{kind}_w3": weight(d, inner),
        }
    states = {
        "conv_state": torch.randn(rows, dim, 3),
        "scan_state": torch.randn(rows, dim, state),
        "k_cache": torch.randn(rows, window, kv_heads, 8),
        "v_cache": torch.randn(rows, window, kv_heads, 8),
        "cache_seqlens": torch.arange(rows, dtype=torch.int32) + window - 1,
    }
    return [torch.randn(rows, d)], weights | states | {"window_size": (window - 1, 0)}


def _route(tokens: int, experts: int) -> Call:
    return [torch.randn(tokens, experts)], {"jitter_eps": 0.2}


def _plan(tokens: int, experts: int) -> Call:
    return [torch.randint(-1, experts, (tokens, 2)), experts], {}


def _grouped_gemm(rows: int, depth: int, columns: int) -> Call:
    offsets = torch.tensor([0, rows // 3, rows // 3, rows])  # one group is empty
    return [torch.randn(rows, depth), torch.randn(3, columns, depth), offsets], {}


def _experts(tokens: int, hidden: int, inner: int, experts: int) -> Call:
    weights, ids = torch.randn(tokens, experts).softmax(-1).topk(2)
    gate_up, down = torch.randn(experts, 2 * inner, hidden), torch.randn(experts, hidden, inner)
    return [torch.randn(tokens, hidden), gate_up * 0.1, down * 0.1, ids, weights], {}


def _linear_nll(tokens: int, hidden: int, vocab: int) -> Call:
    labels = torch.randint(vocab, (tokens,))
    labels[::7] = -100
    return [torch.randn(tokens, hidden), torch.randn(vocab, hidden) * 0.1, labels], {}


def _select_tokens(tokens: int) -> Call:
    arguments = [torch.randn(tokens), torch.rand(tokens) < 0.9]
    return arguments, {"keep_ratio": 0.6}


CASES: dict[str, Case] = {
    "causal_conv1d": Case(lambda: _conv(2, 19, 37), lambda: _conv(1, 512, 2048)),
    "causal_conv1d_update": Case(lambda: _conv_update(3, 19), lambda: _conv_update(16, 1024)),
    "selective_scan": Case(lambda: _scan(2, 19, 37, 5), lambda: _scan(1, 512, 2048, 16)),
    "selective_state_update": Case(lambda: _state_update(3, 19, 5), lambda: _state_update(16, 1024, 16)),
    "sliding_window_attention": Case(lambda: _attention(2, 37, 9), lambda: _attention(1, 2048, 256)),
    "sliding_window_attention_update": Case(
        lambda: _attention_update(3, 9), lambda: _attention_update(16, 256)
    ),
    "scan_swa": Case(lambda: _both(37, 19, 9), lambda: _both(2048, 512, 256)),
    "samba_decode_step": Case(lambda: _decode_step(3, 24, 9), lambda: _decode_step(4, 256, 256)),
    "grin_route": Case(lambda: _route(37, 5), lambda: _route(4096, 16)),
    "moe_plan": Case(lambda: _plan(37, 5), lambda: _plan(4096, 16)),
    "grouped_gemm": Case(lambda: _grouped_gemm(37, 19, 23), lambda: _grouped_gemm(512, 256, 256)),
    "moe_experts": Case(lambda: _experts(37, 19, 23, 5), lambda: _experts(512, 256, 256, 8)),
    "linear_nll": Case(lambda: _linear_nll(37, 19, 53), lambda: _linear_nll(512, 256, 4096)),
    "select_tokens": Case(lambda: _select_tokens(37), lambda: _select_tokens(32768)),
}
