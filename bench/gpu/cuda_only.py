"""Checks that only make sense on a GPU: capture into a CUDA graph, other streams, tensors of more than 2^31 elements.

On the CPU the last ones run at small sizes, to try them.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .conform import assert_same_bits
from .item import Context, SkipError, WrongError
from .operators import build, named_arguments, poison_fresh_memory, public, raw, tensors_of

_STEPS = 3
_MANY = 2**31


def _snapshot(arguments: dict[str, Any], outputs: Any) -> dict[str, Tensor]:
    """Outputs and floating arguments as they are now."""
    found = {f"output {i}": t.detach().clone() for i, t in enumerate(tensors_of(outputs))}
    return found | {
        f"{name} afterwards": a.detach().clone()
        for name, a in arguments.items()
        if isinstance(a, Tensor) and a.is_floating_point()
    }


def _advance(arguments: dict[str, Any]) -> None:
    """Between two steps: other lengths, which the device must read anew."""
    for name in ("cache_seqlens", "state_batch_indices", "conv_state_indices"):
        if isinstance(arguments.get(name), Tensor):
            arguments[name].copy_(arguments[name].flip(0))


def check_graph(op: str, sample: Any, context: Context) -> dict[str, Any]:
    """Captured once and replayed, three steps give what three calls give, bit for bit; lengths change in between."""
    if context.device != "cuda":
        raise SkipError("graphs are a matter of CUDA")
    poison_fresh_memory()
    eager = named_arguments(op, build(sample, context.device))
    wanted = []
    with torch.no_grad():
        for _ in range(_STEPS):
            wanted.append(_snapshot(eager, raw(op)(**eager)))
            _advance(eager)
        context.stage("warm-up")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            raw(op)(**named_arguments(op, build(sample, context.device)))
        torch.cuda.current_stream().wait_stream(side)
        static = named_arguments(op, build(sample, context.device))
        context.stage("capture")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = raw(op)(**static)
        context.stage("replay")
        for step in range(_STEPS):
            graph.replay()
            torch.cuda.synchronize()
            assert_same_bits(f"step {step}, replayed and called", _snapshot(static, outputs), wanted[step])
            _advance(static)
    return {"steps": _STEPS}


def check_stream(op: str, sample: Any, context: Context) -> None:
    """The operator runs on torch's current stream: inputs that arrive late on another stream are waited for."""
    if context.device != "cuda":
        raise SkipError("streams are a matter of CUDA")
    poison_fresh_memory()
    with torch.no_grad():
        clean = named_arguments(op, build(sample, context.device))
        late = named_arguments(op, build(sample, context.device))
        source = {
            name: a.detach().clone()
            for name, a in clean.items()
            if isinstance(a, Tensor) and a.is_floating_point() and 0 not in a.stride()
        }
        wanted = _snapshot(clean, raw(op)(**clean))
        for name in source:
            late[name].fill_(float("nan"))
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(40_000_000)
            for name, a in source.items():
                late[name].copy_(a)
            found = _snapshot(late, raw(op)(**late))
        side.synchronize()
    assert_same_bits("on another stream", found, wanted)


# ---- more than 2^31 elements ----------------------------------------------------------------------------


def _room(context: Context, gigabytes: float) -> None:
    if context.device != "cuda":
        return
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        raise SkipError(f"needs {gigabytes:.0f} GB of free memory, there are {free:.0f}")


@contextmanager
def _alone_with_the_memory() -> Iterator[None]:
    """One worker at a time takes most of the card's memory."""
    with open(Path(tempfile.gettempdir()) / f"fastlm-gpu-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def one_at_a_time(run: Callable[[Context], dict[str, Any]], context: Context) -> dict[str, Any]:
    """Runs a check that takes much memory."""
    with _alone_with_the_memory():
        return run(context)


def _random(context: Context, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=context.device).normal_()


def large_scan(context: Context) -> dict[str, Any]:
    """The last row of a batch of more than 2^31 elements is what it is alone."""
    _room(context, 32)
    D, N = (4096, 16) if context.device == "cuda" else (8, 4)
    L = 131072 + 5 if context.device == "cuda" else 37
    B = _MANY // (D * L) + 1 if context.device == "cuda" else 3
    poison_fresh_memory(False)  # filling it would take longer than the scan
    u, delta, z = (_random(context, B, L, D).transpose(1, 2) for _ in range(3))
    maps = [_random(context, B, L, N).transpose(1, 2) for _ in range(2)]
    A, bias = -torch.rand(D, N, device=context.device) - 0.1, torch.full((D,), -3.0, device=context.device)

    def run(rows: slice) -> dict[str, Tensor]:
        with torch.no_grad():
            out, last = public("selective_scan")(
                u[rows],
                delta[rows],
                A,
                *(t[rows] for t in maps),
                z=z[rows],
                delta_bias=bias,
                delta_softplus=True,
                return_last_state=True,
            )
        return {"out": out, "last_state": last}

    context.stage("alone")
    alone = run(slice(B - 1, B))
    context.stage("all rows")
    whole = {name: t[-1:] for name, t in run(slice(0, B)).items()}
    assert_same_bits("the last row", whole, alone)
    return {"elements": u.numel()}


def large_conv(context: Context) -> dict[str, Any]:
    """As the scan, for the convolution, in both layouts."""
    _room(context, 20)
    D = 4096 if context.device == "cuda" else 8
    L = 131072 + 5 if context.device == "cuda" else 37
    B = _MANY // (D * L) + 1 if context.device == "cuda" else 3
    poison_fresh_memory(False)
    weight, bias = _random(context, D, 4), _random(context, D)
    for channel_last in (True, False):
        x = _random(context, B, L, D).transpose(1, 2) if channel_last else _random(context, B, D, L)
        with torch.no_grad():
            context.stage(f"channel_last {channel_last}")
            alone = public("causal_conv1d")(x[-1:], weight, bias, activation="silu")
            whole = public("causal_conv1d")(x, weight, bias, activation="silu")
        assert_same_bits("the last row", {"out": whole[-1:]}, {"out": alone})
        del x, whole, alone
    return {"elements": B * D * L}


def large_attention(context: Context) -> dict[str, Any]:
    """The last tokens of one sequence of more than 2^31 elements depend on the window before them alone."""
    _room(context, 24)
    H, K, W = (16, 128, 512) if context.device == "cuda" else (2, 8, 8)
    L = _MANY // (H * K) + 1000 if context.device == "cuda" else 500
    poison_fresh_memory(False)
    q, k, v = (_random(context, 1, L, H, K) for _ in range(3))
    tail = min(L, 4 * W)
    with torch.no_grad():
        context.stage("the whole sequence")
        out = public("sliding_window_attention")(q, k, v, window_size=(W - 1, 0))
        context.stage("its end")
        end = public("sliding_window_attention")(*(t[:, -tail:] for t in (q, k, v)), window_size=(W - 1, 0))
    found, wanted = out[:, -W:].float(), end[:, -W:].float()
    error = float((found - wanted).norm() / wanted.norm())
    if not error < 1e-2:  # tiles begin elsewhere, so the bits may differ
        raise WrongError(f"out: relative error {error:.3g} at the end of the sequence")
    return {"elements": q.numel(), "relative_error": error}


def large_state(context: Context) -> dict[str, Any]:
    """The last row of a state of more than 2^31 elements is updated as it is alone."""
    _room(context, 12)
    D, N = (4096, 16) if context.device == "cuda" else (8, 4)
    B = _MANY // (D * N) + 3 if context.device == "cuda" else 5
    poison_fresh_memory(False)
    state = _random(context, B, D, N, dtype=torch.float32)
    x, dt = (_random(context, B, D) for _ in range(2))
    b, c = (_random(context, B, N) for _ in range(2))
    A = -torch.rand(D, N, device=context.device) - 0.1
    kept = state[-1:].clone()
    with torch.no_grad():
        context.stage("alone")
        alone = public("selective_state_update")(kept, x[-1:], dt[-1:], A, b[-1:], c[-1:], dt_softplus=True)
        context.stage("all rows")
        whole = public("selective_state_update")(state, x, dt, A, b, c, dt_softplus=True)
    assert_same_bits("the last row", {"out": whole[-1:], "state": state[-1:]}, {"out": alone, "state": kept})
    return {"elements": state.numel()}


def large_ring(context: Context) -> dict[str, Any]:
    """As the state, for the rings of keys and values."""
    _room(context, 12)
    R, H, K = (2048, 8, 128) if context.device == "cuda" else (8, 2, 8)
    B = _MANY // (R * H * K) + 3 if context.device == "cuda" else 5
    poison_fresh_memory(False)
    rings = [_random(context, B, R, H, K) for _ in range(2)]
    q, k, v = (_random(context, B, 1, H, K) for _ in range(3))
    seen = torch.full((B,), 3 * R // 2, dtype=torch.int32, device=context.device)
    kept = [t[-1:].clone() for t in rings]
    with torch.no_grad():
        context.stage("alone")
        alone = public("sliding_window_attention_update")(
            q[-1:], k[-1:], v[-1:], *kept, seen[-1:], window_size=(R - 1, 0)
        )
        context.stage("all rows")
        whole = public("sliding_window_attention_update")(q, k, v, *rings, seen, window_size=(R - 1, 0))
    found = {"out": whole[-1:], "k": rings[0][-1:], "v": rings[1][-1:]}
    assert_same_bits("the last row", found, {"out": alone, "k": kept[0], "v": kept[1]})
    return {"elements": rings[0].numel()}


LARGE: dict[str, tuple[str, Callable[[Context], dict[str, Any]]]] = {
    "large/selective_scan": ("selective_scan", large_scan),
    "large/causal_conv1d": ("causal_conv1d", large_conv),
    "large/sliding_window_attention": ("sliding_window_attention", large_attention),
    "large/selective_state_update": ("selective_state_update", large_state),
    "large/sliding_window_attention_update": ("sliding_window_attention_update", large_ring),
}
