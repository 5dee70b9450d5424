"""grin_route: fake kernels and gradient. Checks use the words of csrc/ops/grin_route/checks.cpp.

Autocast casts nothing: a router works in the dtype its logits come in, best float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import _ops
from fastlm._registration import checks

_MOST_PICKS = 8
_TOKEN_LIMIT = 2**31


def _acc_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _check_logits(op: str, router_logits: Tensor, jitter_eps: float) -> None:
    checks.floating(op, "router_logits", router_logits)
    checks.dim(op, "router_logits", router_logits, 2, "(T, E)")
    tokens, experts = router_logits.shape
    torch._check_value(
        experts >= 2,
        lambda: (
            f"{op}: router_logits must have shape (T, E) with at least 2 experts, "
            f"got {checks.shape_text(router_logits.shape)}"
        ),
    )
    if isinstance(tokens, int):  # a symbolic size would get a bound that no caller can state
        torch._check_value(
            tokens < _TOKEN_LIMIT,
            lambda: f"{op}: router_logits must have less than {_TOKEN_LIMIT} tokens, got {tokens}",
        )
    torch._check_value(jitter_eps >= 0, lambda: f"{op}: jitter_eps must not be negative, got {jitter_eps:g}")


def _check_estimator(op: str, estimator: str) -> None:
    torch._check_value(
        estimator in ("v2", "v2_star", "v1"),
        lambda: f"{op}: estimator must be 'v2', 'v2_star' or 'v1', got '{estimator}'",
    )


def _check_dtype(op: str, name: str, t: Tensor, *allowed: torch.dtype) -> None:
    words = " or ".join(dict.fromkeys(checks.name_of(dtype) for dtype in allowed))
    torch._check_value(
        t.dtype in allowed, lambda: f"{op}: {name} must have dtype {words}, got {checks.name_of(t.dtype)}"
    )


def _fake_forward(
    router_logits: Tensor,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    top_k: int = 2,
    jitter_eps: float = 0.01,
    training: bool = False,
    estimator: str = "v2",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "grin_route"
    _check_logits(op, router_logits, jitter_eps)
    tokens, experts = router_logits.shape
    most = min(_MOST_PICKS, experts)
    torch._check_value(1 <= top_k <= most, lambda: f"{op}: top_k must be from 1 to {most}, got {top_k}")
    _check_estimator(op, estimator)
    acc = _acc_dtype(router_logits)
    if noise is not None:
        checks.shape(op, "noise", noise, (tokens, top_k, experts + 1))
        _check_dtype(op, "noise", noise, torch.float32, acc)
        checks.same_device(op, "noise", noise, "router_logits", router_logits)
    if seed is not None:
        checks.shape(op, "seed", seed, (1,))
        _check_dtype(op, "seed", seed, torch.int64)
        checks.same_device(op, "seed", seed, "router_logits", router_logits)
    if valid is not None:
        checks.shape(op, "valid", valid, (tokens,))
        _check_dtype(op, "valid", valid, torch.bool)
        checks.same_device(op, "valid", valid, "router_logits", router_logits)
    found = "neither" if noise is None else "both"
    torch._check_value(
        not training or (noise is None) != (seed is None),
        lambda: f"{op}: training needs exactly one of noise and seed, got {found}",
    )
    return (
        router_logits.new_empty((tokens, top_k), dtype=acc),
        router_logits.new_empty((tokens, top_k), dtype=torch.int32),
        router_logits.new_empty((experts,), dtype=torch.int32),
        router_logits.new_empty((tokens, top_k), dtype=acc),
    )


def _fake_backward(
    dtopk_weights: Tensor,
    router_logits: Tensor,
    topk_ids: Tensor,
    *,
    jitter_eps: float,
    training: bool,
    estimator: str,
) -> Tensor:
    op = "grin_route_backward"
    _check_logits(op, router_logits, jitter_eps)
    most = min(_MOST_PICKS, router_logits.shape[1])
    checks.dim(op, "topk_ids", topk_ids, 2, "(T, k)")
    picks = topk_ids.shape[1]
    torch._check_value(
        1 <= picks <= most,
        lambda: (
            f"{op}: topk_ids must have shape (T, k) with k from 1 to {most}, "
            f"got {checks.shape_text(topk_ids.shape)}"
        ),
    )
    checks.shape(op, "topk_ids", topk_ids, (router_logits.shape[0], picks))
    _check_dtype(op, "topk_ids", topk_ids, torch.int32)
    checks.same_device(op, "topk_ids", topk_ids, "router_logits", router_logits)
    checks.shape(op, "dtopk_weights", dtopk_weights, topk_ids.shape)
    _check_dtype(op, "dtopk_weights", dtopk_weights, _acc_dtype(router_logits))
    checks.same_device(op, "dtopk_weights", dtopk_weights, "router_logits", router_logits)
    _check_estimator(op, estimator)
    return router_logits.new_empty(router_logits.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    _, ids, counts, probs = output
    ctx.mark_non_differentiable(ids, counts, probs)
    ctx.save_for_backward(inputs[0], ids)
    ctx.options = {name: keyword_only_inputs[name] for name in ("jitter_eps", "training", "estimator")}
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dtopk_weights: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dtopk_weights is None:
        return None, None, None, None
    router_logits, ids = ctx.saved_tensors
    return _ops.grin_route_backward(dtopk_weights, router_logits, ids, **ctx.options), None, None, None


FAKES = {"grin_route": _fake_forward, "grin_route_backward": _fake_backward}
GRADIENTS = {"grin_route": (_setup_context, _backward)}
