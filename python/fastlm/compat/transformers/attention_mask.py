"""What a query sees, as transformers describes it, in the operator's terms: a window, and sequences side by side.

transformers builds a mask out of small functions of `(batch, head, query, key)` and hands them to the mask function
of the attention implementation. Causal, windowed and packed ones are recognised by what they are made of; from a
padding mask and from packed positions follow the sequences a batch holds. Everything else is refused: a mask that is
not understood must not be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_MASKS = "transformers.masking_utils"
# Functions that masks are made of, by the name under which a mask function shows them.
_CAUSAL = "causal_mask_function"
_WINDOW = "sliding_window_overlay.<locals>.inner_mask"
_ALL_OF = "and_masks.<locals>.and_mask"
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
_POSITIONS = "remap_positions_for_packed_sequence.<locals>.inner_mask"
# The same, as they are looked up when the part is enabled.
MAKERS = {
    f"{_MASKS}:causal_mask_function": ("q_idx", "kv_idx"),
    f"{_MASKS}:sliding_window_overlay": ("sliding_window",),
    f"{_MASKS}:and_masks": ("mask_functions",),
    f"{_MASKS}:packed_sequence_mask_function": ("packed_sequence_mask",),
    f"{_MASKS}:remap_positions_for_packed_sequence": ("mask_function", "position_ids"),
}
_WAY_OUT = "Use another implementation for this model: model.set_attn_implementation('sdpa') or 'eager'."


@dataclass(frozen=True)
class Sequences:
    """The sequences in a batch of queries and keys, each one's keys side by side.

    Attributes:
        q_index: `(Tq,)` int64, the queries of all sequences, one after the other, in a flattened `(B * Lq)`.
        k_index: `(Tk,)` int64, their keys in a flattened `(B * Lk)`.
        cu_seqlens_q, cu_seqlens_k: `(S + 1,)` int32, bounds of the sequences.
        rows: if each row of the batch has one query and one run of keys: first and last key (exclusive) of each.
    """

    q_index: Tensor
    k_index: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    rows: tuple[tuple[int, int], ...] | None


@dataclass(frozen=True)
class Seen:
    """What queries see: in models, this is passed along as the attention mask.

    Attributes:
        window: keys a query sees, the one at its own position included; None: all before it.
        sequences: where there are several to a row, or padding; None: each row is one sequence.
    """

    window: int | None
    sequences: Sequences | None


def seen(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **_for_others: Any,
) -> Seen:
    """The mask function of `attn_implementation="fastlm"`, with the arguments that transformers gives to all of them.

    Args:
        batch_size, q_length, kv_length: `B`, `Lq`, `Lk`.
        q_offset, kv_offset: position of the first query and of the first key in their row.
        mask_function: says which keys a query sees.
        attention_mask: `(B, M)` bool, False for padding, over all positions so far.

    Raises:
        ValueError: the mask or the cache is one that the operator does not have.
    """
    ends = kv_offset + kv_length, q_offset + q_length
    if any(isinstance(end, Tensor) for end in ends) or ends[0] != ends[1]:
        raise ValueError(
            f"fastlm attention: keys must end where queries end, got {int(ends[0])} and {int(ends[1])} positions. "
            "Caches of fixed size are not supported; use a DynamicCache."
        )
    parts = list(_parts_of(mask_function))
    names = {name for name, _ in parts}
    if _CAUSAL not in names:
        raise ValueError(f"fastlm attention: the mask must be causal, got {sorted(names)}. {_WAY_OUT}")
    windows = [int(values["sliding_window"]) for name, values in parts if name == _WINDOW]
    window = min(windows, default=None)
    if window is not None and window < 1:
        raise ValueError(f"fastlm attention: sliding_window must be at least 1, got {window}")
    packed = [values["packed_sequence_mask"] for name, values in parts if name == _PACKED]
    if attention_mask is not None:
        runs = _from_padding(attention_mask, q_length, int(kv_length), int(kv_offset), window)
    elif packed:
        runs = packed[0] + 1
    else:
        runs = None
    return Seen(window, None if runs is None else find_sequences(runs, q_length))


def _parts_of(mask_function: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and bound values of each function a mask is made of; all of them must hold."""
    name = getattr(mask_function, "__qualname__", type(mask_function).__qualname__)
    module = getattr(mask_function, "__module__", None)
    if module != _MASKS or name not in (_CAUSAL, _WINDOW, _ALL_OF, _PACKED, _POSITIONS):
        raise ValueError(
            f"fastlm attention: the mask must be causal, with a sliding window or not, got one with {module}.{name}. "
            f"{_WAY_OUT}"
        )
    cells = mask_function.__closure__ or ()
    values = dict(
        zip(mask_function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True)
    )
    yield name, values
    inner = values.get("mask_functions", ()) if name == _ALL_OF else ()
    for function in (values["mask_function"],) if name == _POSITIONS else inner:
        yield from _parts_of(function)


def _from_padding(
    attention_mask: Tensor, q_length: int, kv_length: int, kv_offset: int, window: int | None
) -> Tensor | None:
    """Runs for a padding mask: 1 for tokens, 0 for padding; None where there is none among the keys."""
    if attention_mask.shape[1] != kv_offset + kv_length:
        raise ValueError(
            f"fastlm attention: attention_mask must cover all {kv_offset + kv_length} positions so far, got shape "
            f"{tuple(attention_mask.shape)}"
        )
    real = attention_mask[:, kv_offset:].to(torch.int32)
    if bool(real.all()):
        return None
    if window is not None and window < kv_length:
        # A window counts positions. Without the padding inside a row it would reach further than with it.
        starts = functional.pad(real, (1, 0)).diff(dim=1) == 1
        if bool((starts.sum(1) > 1).any()):
            raise ValueError(
                "fastlm attention: with a sliding window, padding must be at the start or at the end of a row, not "
                "between its tokens. Pad on the left."
            )
    return real


def find_sequences(runs: Tensor, q_length: int) -> Sequences:
    """The sequences of a batch.

    Args:
        runs: `(B, Lk)` int: number of the sequence of each key within its row, never falling among its tokens; 0 for
            padding. Queries are the last `q_length` positions.
        q_length: `Lq`.
    """
    batch, kv_length = runs.shape
    rows = torch.arange(batch, device=runs.device)[:, None]
    keys = runs.flatten() > 0
    label = (rows * (kv_length + 1) + runs).flatten()
    k_index = keys.nonzero().flatten()
    queries = torch.zeros_like(runs, dtype=torch.bool)
    queries[:, kv_length - q_length :] = True
    q_among_keys = queries.flatten()[k_index]
    labels, sequence, k_counts = torch.unique_consecutive(
        label[k_index], return_inverse=True, return_counts=True
    )
    q_counts = torch.bincount(sequence[q_among_keys], minlength=labels.shape[0])
    at = k_index[q_among_keys]
    q_index = at // max(kv_length, 1) * q_length + at % max(kv_length, 1) - (kv_length - q_length)
    return Sequences(
        q_index=q_index,
        k_index=k_index,
        cu_seqlens_q=_bounds(q_counts),
        cu_seqlens_k=_bounds(k_counts),
        rows=_single_runs(runs) if q_length == 1 else None,
    )


def _single_runs(runs: Tensor) -> tuple[tuple[int, int], ...] | None:
    """First and last key (exclusive) of each row, if every row ends with its one run of keys."""
    real = runs > 0
    counts = real.sum(1)
    kv_length = runs.shape[1]
    at_the_end = torch.arange(kv_length, device=runs.device) >= kv_length - counts[:, None]
    if bool((runs > 1).any()) or not torch.equal(real, at_the_end) or bool((counts == 0).any()):
        return None
    return tuple((kv_length - count, kv_length) for count in counts.tolist())


def _bounds(counts: Tensor) -> Tensor:
    return functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
