"""Held-out loss in bits per byte: the sum of the negative log-likelihoods in bits over the UTF-8 bytes of the
text.

Unlike the loss per token it does not depend on the tokenizer, and it is the size (per byte) a lossless
compressor driven by the model would reach, so it can stand beside gzip and xz.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastlm.training.batches import PackedRow, Piece, evaluation_rows, pack
from fastlm.training.data import PreparedData

if TYPE_CHECKING:
    from fastlm.layers import Routing
    from fastlm.models.samba import SambaForCausalLM


@dataclass(frozen=True)
class Evaluation:
    """Result on one side's text."""

    nats: float  # summed over predicted tokens
    tokens: int  # predicted tokens, the closing mark of each document among them
    bytes: int  # UTF-8 bytes of the predicted tokens

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def autocast(dtype: str) -> AbstractContextManager[object]:
    """bf16 arithmetic over fp32 weights, or nothing for fp32."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if dtype == "bf16" else nullcontext()


def held_out_rows(data: PreparedData, *, row_tokens: int, seq_len: int, max_tokens: int) -> list[list[Piece]]:
    """The fixed held-out pieces that an evaluation of `max_tokens` reads."""
    return evaluation_rows(data.held_out, row_tokens=row_tokens, seq_len=seq_len, max_tokens=max_tokens)


def held_out_text(data: PreparedData, rows: list[list[Piece]]) -> Iterator[bytes]:
    """The very bytes that an evaluation of `rows` is about, document by document: all that is read and predicted."""
    ends: dict[int, int] = {}
    for row in rows:
        for document, _, stop in row:
            ends[document] = max(stop, ends.get(document, 0))
    spelling = data.spelling()
    for document, stop in ends.items():
        yield b"".join(spelling[token] for token in data.held_out.tokens(document, 0, stop + 1).tolist())


def row_loss(
    model: SambaForCausalLM, row: PackedRow, dtype: str, routing: list[Routing] | None = None
) -> torch.Tensor:
    """Summed nats of a row's targets, float32 scalar; what routers decide is appended to `routing`."""
    with autocast(dtype):
        hidden = model.model(row.input_ids, cu_seqlens=row.cu_seqlens, routing=routing)
        return model.loss(hidden, shift_labels=row.shift_labels, reduction="sum")


@torch.no_grad()
def evaluate(
    model: SambaForCausalLM,
    data: PreparedData,
    rows: list[list[Piece]],
    *,
    dtype: str,
    between: Callable[[], None] | None = None,
) -> Evaluation:
    """Loss of `model` on held-out rows.

    Args:
        model: in any mode; it is put back into training mode if it was in it.
        data: the run's.
        rows: from `held_out_rows`.
        dtype: `fp32` or `bf16`.
        between: called before every row; may raise to stop.
    """
    sizes = torch.tensor([len(piece) for piece in data.spelling()])
    nats, tokens, num_bytes = 0.0, 0, 0
    was_training = model.training
    model.eval()
    try:
        for pieces in rows:
            if between is not None:
                between()
            row = pack(data.held_out, pieces)
            if row.num_targets == 0:
                continue
            nats += float(row_loss(model, row, dtype))
            tokens += row.num_targets
            num_bytes += int(sizes[row.targets].sum())
    finally:
        model.train(was_training)
    return Evaluation(nats, tokens, max(1, num_bytes))
