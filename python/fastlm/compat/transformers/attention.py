"""`attn_implementation="fastlm"`: attention of transformers models on `sliding_window_attention`.

Two functions under one name: `attention_mask.seen` says once per forward pass what queries see, `attend` runs in each
layer. Tensors stay where they are: the operator gets `(B, L, H, K)` views of the `(B, H, L, K)` tensors of the models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlm import ops
from fastlm.compat.transformers._interfaces import Registered, functions_of
from fastlm.compat.transformers._interfaces import check as check_interfaces
from fastlm.compat.transformers._names import find_function
from fastlm.compat.transformers.attention_mask import MAKERS, Seen, Sequences, seen

INTERFACES = (
    "transformers.modeling_utils:AttentionInterface",
    "transformers.masking_utils:AttentionMaskInterface",
)
# Functions that are called, and the parameters they must have.
FUNCTIONS = {**functions_of(INTERFACES), **MAKERS}
# Arguments of other implementations that change the result, and that this one does not have.
_UNKNOWN = ("s_aux", "position_bias", "head_mask")

_registered = Registered()


def check() -> None:
    """Raises if transformers lacks a name that is needed."""
    for name, parameters in FUNCTIONS.items():
        find_function(name, parameters)
    check_interfaces(INTERFACES)


def install() -> None:
    """Makes the name known."""
    functions: tuple[Callable[..., Any], ...] = (attend, seen)
    for name, function in zip(INTERFACES, functions, strict=True):
        _registered.add(name, function)


def remove() -> None:
    """Makes the name unknown again, or what it was before."""
    _registered.remove()


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Seen | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of `attn_implementation="fastlm"`, with the arguments that models give to all of them.

    Args:
        module: the attention layer.
        query: `(B, H, Lq, K)`.
        key, value: `(B, Hkv, Lk, K)`, the cached ones included.
        attention_mask: from `seen`; None where a model makes no mask.
        dropout: must be 0.
        scaling: of the scores.
        sliding_window: keys a query sees, the one at its own position included; the mask's own word counts more.
        softcap: bound of the scores.
        is_causal: default: what the layer says.

    Returns:
        `(B, Lq, H, K)`, and no weights.

    Raises:
        ValueError: dropout, a mask of the user's own, or another argument that the operator does not have.
    """
    _refuse_others(attention_mask, dropout, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    sequences = None
    if isinstance(attention_mask, Seen):
        sliding_window, sequences, causal = attention_mask.window, attention_mask.sequences, True
    options: dict[str, Any] = {
        "window_size": (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1),
        "causal": causal,
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
    }
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if sequences is not None:
        return _by_sequence(q, k, v, sequences, options), None
    if kwargs.get("cu_seq_lens_q") is not None:  # packed rows, as the flash-attention collators say it
        out: Tensor = ops.sliding_window_attention(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            cu_seqlens_q=kwargs["cu_seq_lens_q"],
            cu_seqlens_k=kwargs["cu_seq_lens_k"],
            **options,
        )
        return out.view_as(q), None
    return ops.sliding_window_attention(q, k, v, **options), None


def _by_sequence(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: dict[str, Any]) -> Tensor:
    """Attention within each sequence; 0 for queries that are padding."""
    if sequences.rows is not None:  # a decoding step: views of the cache instead of copies
        rows = [
            ops.sliding_window_attention(q[b : b + 1], k[b : b + 1, i:j], v[b : b + 1, i:j], **options)
            for b, (i, j) in enumerate(sequences.rows)
        ]
        return torch.cat(rows)
    packed: Tensor = ops.sliding_window_attention(
        q.flatten(0, 1).index_select(0, sequences.q_index),
        k.flatten(0, 1).index_select(0, sequences.k_index),
        v.flatten(0, 1).index_select(0, sequences.k_index),
        cu_seqlens_q=sequences.cu_seqlens_q,
        cu_seqlens_k=sequences.cu_seqlens_k,
        **options,
    )
    out = packed.new_zeros(q.shape[0] * q.shape[1], *packed.shape[1:])
    return out.index_copy(0, sequences.q_index, packed).view(*q.shape[:2], *packed.shape[1:])


def _refuse_others(attention_mask: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raises for what would be left out in silence."""
    if attention_mask is not None and not isinstance(attention_mask, Seen):
        kind = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask)
        raise ValueError(
            f"fastlm attention: attention_mask must be None or have shape (batch, positions), got {kind}. Use "
            "model.set_attn_implementation('sdpa') for a mask of your own."
        )
    if dropout:
        raise ValueError(
            f"fastlm attention: dropout must be 0, got {dropout:g}. Set attention_dropout = 0 in the configuration, or "
            "use model.set_attn_implementation('sdpa')."
        )
    given = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if given:
        raise ValueError(
            f"fastlm attention: {given[0]} is not supported. Use model.set_attn_implementation('eager')."
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "fastlm attention: output_attentions is not supported, the weights are never stored. Use "
            "model.set_attn_implementation('eager')."
        )
