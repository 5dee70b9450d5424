"""Keys and values in pages: token `t` of sequence `s` lies in page `block_table[s, t // page_size]`."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_pages(
    name: str, argument: str, k: Tensor, v: Tensor, block_table: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens of all sequences, packed: one copy.

    Args:
        name, argument: function and its word for `k`, for errors.
        k, v: shape `(pages, page_size, Hkv, K)`.
        block_table: shape `(S, M)`, integer.
        lengths: shape `(S,)`, integer: tokens of each sequence.

    Returns:
        k, v: shape `(T, Hkv, K)`, `T` the sum of the lengths.

    Raises:
        ValueError: a shape does not fit, or `M` pages are too few for a length.
        IndexError: a page that does not exist.
    """
    check_pages(name, argument, k, block_table, lengths)
    lengths = lengths.long()
    sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    position = torch.arange(len(sequence), device=lengths.device) - (lengths.cumsum(0) - lengths)[sequence]
    at = page_places(block_table, sequence, position, k.shape[1])
    return k[at], v[at]


def page_places(
    block_table: Tensor, sequence: Tensor, position: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    """Page, and place in it, of `position` in `sequence`; both integer, shapes that broadcast."""
    return block_table.long()[sequence, position // page_size], position % page_size


def check_pages(name: str, argument: str, k: Tensor, block_table: Tensor, lengths: Tensor) -> None:
    """Every token of every sequence lies in a page that exists; values are looked at on the CPU only."""
    if k.dim() != 4 or k.shape[1] == 0:
        raise ValueError(
            f"{name}: {argument} must have shape (pages, page_size, Hkv, K) when block_table is given, got {tuple(k.shape)}"
        )
    if block_table.dim() != 2 or block_table.shape[0] != lengths.shape[0]:
        raise ValueError(
            f"{name}: block_table must have shape ({lengths.shape[0]}, M), got {tuple(block_table.shape)}"
        )
    if block_table.device.type != "cpu" or lengths.numel() == 0:
        return
    pages, size = k.shape[:2]
    used = -(-lengths.long() // size)  # pages of each sequence
    if int(used.max()) > block_table.shape[1]:
        raise ValueError(
            f"{name}: block_table must have at least {int(used.max())} columns for {int(lengths.max())} tokens in "
            f"pages of {size}, got {block_table.shape[1]}"
        )
    named = block_table[torch.arange(block_table.shape[1]) < used.unsqueeze(1)]
    bad = named[(named < 0) | (named >= pages)]
    if bad.numel():
        raise IndexError(f"{name}: block_table must name pages below {pages}, got {int(bad[0])}")
