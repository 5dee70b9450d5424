"""The one call all attention functions end in: flash-attn's options checked and translated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastlm import ops

# `(left, right)`; a tensor of two integers is taken as well.
Window = Sequence[int] | Tensor
# What a function returns with `return_attn_probs`: out, lse, and None in place of the probabilities.
Attended = Tensor | tuple[Tensor, Tensor, None]


@dataclass(frozen=True)
class Options:
    """The options every function has.

    Attributes:
        name: function for errors.
        dropout_p: must be 0.
        softmax_scale: default `1 / sqrt(K)`.
        causal: no key to the right.
        window_size: keys seen to the left and right; negative: no bound.
        softcap: bound of the scores; 0 or negative: none.
        alibi_slopes: must be None.
    """

    name: str
    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: Window
    softcap: float
    alibi_slopes: Tensor | None

    def window(self) -> tuple[int, int]:
        """The bounds as the operator takes them, -1 for none."""
        bounds = [max(int(bound), -1) for bound in self.window_size]
        if len(bounds) != 2:
            raise ValueError(f"{self.name}: window_size must be (left, right), got {len(bounds)} bounds")
        return bounds[0], bounds[1]

    def refuse_unsupported(self) -> None:
        """Raise for what these functions cannot do."""
        if self.dropout_p != 0:
            raise NotImplementedError(f"{self.name}: dropout_p must be 0, got {self.dropout_p}")
        if self.alibi_slopes is not None:
            raise NotImplementedError(
                f"{self.name}: alibi_slopes must be None, got a tensor of shape {tuple(self.alibi_slopes.shape)}"
            )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of `fastlm.ops.sliding_window_attention`.

    Raises:
        NotImplementedError: dropout or ALiBi slopes.
        ValueError: in the words of the operator.
    """
    options.refuse_unsupported()
    return ops.sliding_window_attention(
        q,
        k,
        v,
        window_size=options.window(),
        causal=options.causal,
        softmax_scale=options.softmax_scale,
        softcap=max(float(options.softcap), 0.0),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=None if max_seqlen_q is None else int(max_seqlen_q),
        max_seqlen_k=None if max_seqlen_k is None else int(max_seqlen_k),
        return_lse=True,
    )


def attended(out: Tensor, lse: Tensor, return_attn_probs: bool) -> Attended:
    """What a function returns."""
    return (out, lse, None) if return_attn_probs else out


def unpacked(name: str, argument: str, packed: Tensor, parts: int, dim: int) -> tuple[Tensor, ...]:
    """The `parts` tensors stacked along `dim` of `packed`, as views."""
    if packed.dim() != dim + 3 or packed.shape[dim] != parts:
        raise ValueError(
            f"{name}: {argument} must have {dim + 3} dimensions and {parts} tensors in dimension {dim}, "
            f"got shape {tuple(packed.shape)}"
        )
    return packed.unbind(dim)
