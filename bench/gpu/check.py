"""Part `check`: every operator that has a kernel for the device, against the reference and at its edges.

Names of items: `sample/`, `sizes/` and `direct/` compare with float64, `hostile/`, `unaligned/`, `errors/`, `mixed/`, `alone/`,
`fused/`, `graph/`, `stream/`, `large/` and `model/` are described where they are defined.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from . import cuda_only, edges, models, sizes
from .conform import check_backward_operator, check_sample
from .item import Item, Settings
from .operators import registered, schemas, support

# Arguments with one row each, by operator.
_ROWS: dict[str, tuple[str, ...]] = {
    "selective_scan": ("u", "delta", "B", "C", "z", "initial_state"),
    "selective_state_update": ("state", "x", "dt", "B", "C", "z"),
    "causal_conv1d": ("x", "initial_states"),
    "causal_conv1d_update": ("x", "conv_state"),
    "sliding_window_attention": ("q", "k", "v"),
    "sliding_window_attention_update": ("q", "k", "v", "k_cache", "v_cache", "cache_seqlens"),
    "samba_decode_step": ("hidden", "conv_state", "scan_state", "k_cache", "v_cache", "cache_seqlens"),
}
_LIMIT = 60.0  # seconds: a kernel that waits for ever must not cost the whole time
_CAPTURED = 4  # samples of an operator that are captured, run on a stream, shifted off their alignment


def items(settings: Settings) -> list[Item]:
    """All checks, the quickest verdict on everything first."""
    library = support()
    here = registered(settings.device)
    ops = [op for op in library.operators() if op in here]
    found = [item for op in ops for item in _samples(op, settings)]
    found += [item for op in ops for item in _edges(op, settings)]
    found += [item for op in ops for item in _sizes(op, settings)]
    if "scan_swa" in here:
        both = [*library.of("scan_swa"), *sizes.samples("scan_swa", tiny=settings.few)]
        chosen = both[:2] if settings.few else both
        found += [Item(f"fused/{s.name}", partial(_on_sample, edges.check_fused, s)) for s in chosen]
    if all(op in here for op in models.needs()):
        for word, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            found += [
                Item(f"model/forward_{word}", partial(models.check_forward, dtype=dtype), limit=240),
                Item(f"model/decoding_{word}", partial(models.check_decoding, dtype=dtype), limit=240),
            ]
    large = [(name, run) for name, (op, run) in cuda_only.LARGE.items() if op in here]
    found += [Item(name, partial(cuda_only.one_at_a_time, run), limit=400) for name, run in large]
    return found


def missing(settings: Settings) -> dict[str, str]:
    """Operators that cannot be checked, and why."""
    here, sampled = registered(settings.device), support().operators()
    reasons = {op: f"no kernel for {settings.device} in this build" for op in schemas() if op not in here}
    return reasons | {op: "no samples in tests/support/samples" for op in here if op not in sampled}


def _chosen(op: str, settings: Settings) -> list[Any]:
    found: list[Any] = support().of(op)
    return found[:3] if settings.few else found


def _samples(op: str, settings: Settings) -> Iterator[Item]:
    backward = op.endswith("_backward")
    kind, check = ("direct", check_backward_operator) if backward else ("sample", check_sample)
    for sample in _chosen(op, settings):
        yield Item(f"{kind}/{op}/{sample.name}", partial(_on_sample, check, sample), limit=_LIMIT)


def _on_sample(check: Any, sample: Any, context: Any) -> Any:
    return check(sample, context)


def _on_operator(check: Any, op: str, sample: Any, context: Any) -> Any:
    return check(op, sample, context)


def _sizes(op: str, settings: Settings) -> Iterator[Item]:
    for sample in sizes.samples(op, tiny=settings.few):
        yield Item(f"sizes/{op}/{sample.name}", partial(_on_sample, check_sample, sample), limit=_LIMIT)


def _edges(op: str, settings: Settings) -> Iterator[Item]:
    everything = support().of(op)
    filled = [s for s in everything if not any(word in s.name for word in ("no_", "nothing", "none"))]
    few = (filled or everything)[: 2 if settings.few else _CAPTURED]
    for argument in edges.index_names(op):
        yield Item(f"hostile/{op}/{argument}", partial(edges.check_hostile_samples, op, filled, argument))
    yield Item(f"errors/{op}", partial(_on_operator, edges.check_errors, op, few[0]))
    if settings.device == "cuda":
        yield Item(f"mixed/{op}", partial(edges.check_mixed_devices, op, filled))
    for sample in few + [
        s for s in everything if s.name in ("bfloat16", "packed", "packed_bfloat16", "rotary_bfloat16")
    ]:
        yield Item(f"unaligned/{op}/{sample.name}", partial(_on_sample, edges.check_unaligned, sample))
    if settings.device == "cuda":
        for sample in few:
            run = partial(_on_operator, cuda_only.check_graph, op, sample)
            yield Item(f"graph/{op}/{sample.name}", run)
        yield Item(f"stream/{op}", partial(_on_operator, cuda_only.check_stream, op, few[0]))
    for sample in _row_samples(op, settings):
        run = partial(_rows_alone, sample, _ROWS[op])
        yield Item(f"alone/{op}/{sample.name}", run)


def _rows_alone(sample: Any, along: tuple[str, ...], context: Any) -> Any:
    return edges.check_alone(sample, along, context)


def _row_samples(op: str, settings: Settings) -> list[Any]:
    """Several rows, each of more than one tile."""
    if op not in _ROWS:
        return []
    library = support()
    recipes = {name: r for family in library.FAMILIES.values() for name, r in family.RECIPES.items()}[op]
    bf16 = torch.bfloat16
    made: dict[str, Any] = {
        "selective_scan": {"shape": (3, 40, 270), "state": 16, "layout": "channel_last", "dtype": bf16},
        "causal_conv1d": {"shape": (3, 70, 150), "layout": "channel_last", "dtype": bf16},
        "sliding_window_attention": {"batch": 3, "queries": 150, "head_dim": 64, "dtype": bf16},
        "selective_state_update": {"batch": 9, "dim": 140, "state": 16, "dtype": bf16},
        "causal_conv1d_update": {"batch": 9, "dim": 140, "size": 3, "dtype": bf16},
        "sliding_window_attention_update": {"seen": (9, 300, 70), "ring": 70, "head_dim": 64, "dtype": bf16},
        "samba_decode_step": {"seen": (9, 300, 70, 1, 12), "dtype": bf16},
    }
    base = {
        "selective_scan": "everything",
        "causal_conv1d": "initial",
        "sliding_window_attention": "window",
        "selective_state_update": "everything",
        "causal_conv1d_update": "one_input",
        "sliding_window_attention_update": "one_new",
        "samba_decode_step": "model",
    }[op]
    found = [library.Sample(op, "rows_bf16", partial(recipes[base], **made[op]))]
    found.append(
        library.Sample(op, "rows_fp32", partial(recipes[base], **(made[op] | {"dtype": torch.float32})))
    )
    return found[:1] if settings.few else found
