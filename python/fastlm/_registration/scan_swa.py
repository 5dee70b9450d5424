"""scan_swa: fake kernel, gradient and autocast, put together from those of its two halves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm._registration import selective_scan as scan
from fastlm._registration import sliding_window_attention as attention
from fastlm._registration.autocast import Cast

_OP = "scan_swa"
_SCAN_INPUTS = 10  # u .. initial_state
_TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def _fake_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    window_size: Sequence[int],
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    max_seqlen_q: int | torch.SymInt | None = None,
    max_seqlen_k: int | torch.SymInt | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scan.check_forward(_OP, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    bounds = (cu_seqlens_q, cu_seqlens_k)
    attention.check_forward(
        _OP, q, k, v, *bounds, window_size, softmax_scale, softcap, max_seqlen_q, max_seqlen_k
    )
    out, last_state, chunk_states, _ = scan.empty_outputs(u, A, cu_seqlens, all_states=False)
    return out, last_state, chunk_states, *attention.empty_outputs(q)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    *tensors, delta_softplus, initial_state = inputs[:_SCAN_INPUTS]
    q, k, v, cu_seqlens, cu_seqlens_q, cu_seqlens_k = inputs[_SCAN_INPUTS:]
    _, _, chunk_states, attn_out, lse = output
    ctx.save_for_backward(
        *tensors, initial_state, cu_seqlens, chunk_states, q, k, v, cu_seqlens_q, cu_seqlens_k, attn_out, lse
    )
    ctx.delta_softplus = delta_softplus
    ctx.options = attention.options_of(keyword_only_inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(chunk_states)


def _backward(
    ctx: Any,
    dscan: Tensor | None,
    dlast_state: Tensor | None,
    _chunk_states: None,
    dattn: Tensor | None,
    dlse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    of_scan = scan.gradients(saved[: len(_TENSORS) + 3], ctx.delta_softplus, dscan, dlast_state)
    of_attention = attention.gradients(saved[len(_TENSORS) + 3 :], ctx.options, dattn, dlse)
    return *of_scan, *of_attention, None, None, None


FAKES = {"scan_swa": _fake_forward}
GRADIENTS = {"scan_swa": (_setup_context, _backward)}
AUTOCAST = {"scan_swa": Cast(("u", "delta", "B", "C", "z", "q", "k", "v"), least_dim=3)}
