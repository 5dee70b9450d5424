"""What a Samba model remembers between calls: per row a conv state, a scan state and a key/value ring for
each layer.

The size does not depend on how many tokens have gone by. All buffers are allocated once and written in place,
so their addresses stay. A row is one sequence; rows may have seen different numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.layers import KVRing, MambaState, RingPlan, RotaryTable
from fastlm.models.samba.config import SambaConfig

# Up to here one rotary table from position 0 serves every step; beyond, a table of a few windows moves along.
_FIXED_TABLE_POSITIONS = 8192


@dataclass(frozen=True)
class LayerCache:
    """The state of one block; a part is None where the block has no such mixer."""

    mamba: MambaState | None
    attention: KVRing | None

    def tensors(self) -> list[Tensor]:
        """All buffers, each with the rows of the batch in front."""
        found = [] if self.mamba is None else [self.mamba.conv, self.mamba.scan]
        return found if self.attention is None else [*found, self.attention.k, self.attention.v]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> LayerCache:
        """A copy whose buffers went through `function`."""
        mamba, ring = self.mamba, self.attention
        return LayerCache(
            mamba=None if mamba is None else MambaState(function(mamba.conv), function(mamba.scan)),
            attention=None if ring is None else KVRing(function(ring.k), function(ring.v)),
        )


class SambaCache:
    """State of a batch of sequences, made by `SambaForCausalLM.new_cache`.

    Args:
        layers: one entry per block.
        positions: tokens seen, one number per row.
        window: of the attention.

    Note:
        A forward pass through a model writes the cache in place. Rows never influence each other: resetting
        or replacing one leaves the others bit-identical.
    """

    def __init__(self, layers: Sequence[LayerCache], positions: Sequence[int], window: int) -> None:
        self.layers = tuple(layers)
        self.window = window
        self._lengths = [int(p) for p in positions]
        self.positions = torch.tensor(self._lengths, dtype=torch.int32, device=self._device())

    @classmethod
    @torch.inference_mode(False)  # buffers made under inference_mode could not be written outside of it
    def empty(
        cls,
        config: SambaConfig,
        batch_size: int,
        *,
        step_tokens: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
    ) -> SambaCache:
        """A cache that has seen nothing.

        Args:
            config: of the model.
            batch_size: rows, at least 1.
            step_tokens: most tokens a single decode step may bring (more than 1 for speculative decoding).
            device: of all buffers.
            dtype: of conv states, keys and values: the dtype the model computes in.
            state_dtype: of the scan states; float32 keeps small updates that half types lose.

        Raises:
            ValueError: `batch_size` or `step_tokens` below 1.
        """
        for name, value in (("batch_size", batch_size), ("step_tokens", step_tokens)):
            if value < 1:
                raise ValueError(f"SambaCache: {name} must be at least 1, got {value}")
        inner = config.expand * config.hidden_size
        conv_shape = (batch_size, inner, config.conv_kernel - 1)
        ring_shape = (
            batch_size,
            config.sliding_window + step_tokens - 1,
            config.num_key_value_heads,
            config.head_dim,
        )

        def zeros(shape: Sequence[int | None], dtype: torch.dtype) -> Tensor:
            return torch.zeros([size or 0 for size in shape], device=device, dtype=dtype)

        layers = [
            LayerCache(
                MambaState(
                    zeros(conv_shape, dtype), zeros((batch_size, inner, config.state_size), state_dtype)
                )
                if "mamba" in kind
                else None,
                KVRing(zeros(ring_shape, dtype), zeros(ring_shape, dtype))
                if "sliding_attention" in kind
                else None,
            )
            for kind in config.layer_types
        ]
        return cls(layers, [0] * batch_size, config.sliding_window)

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self._lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens each row has seen, known without asking the device."""
        return tuple(self._lengths)

    def memory_bytes(self) -> int:
        """Bytes of all buffers; independent of the tokens seen."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors())

    def advance(self, seqlens: Sequence[int]) -> None:
        """Count `seqlens[b]` more tokens in row `b`; the model calls this at the end of a pass."""
        if len(set(seqlens)) == 1:
            self.positions.add_(seqlens[0])
        else:
            self.positions.add_(torch.tensor(seqlens, dtype=torch.int32, device=self.positions.device))
        self._lengths = [p + m for p, m in zip(self._lengths, seqlens, strict=True)]

    @torch.no_grad()
    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget everything in `rows` (default: all): conv state, scan state, ring and position."""
        chosen = self._checked(range(self.batch_size) if rows is None else rows)
        index = torch.tensor(chosen, dtype=torch.long, device=self.positions.device)
        for layer in self.layers:
            for buffer in layer.tensors():
                buffer.index_fill_(0, index, 0)
        self.positions.index_fill_(0, index, 0)
        for row in chosen:
            self._lengths[row] = 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def select(self, rows: Sequence[int]) -> SambaCache:
        """A new cache of the given rows in the given order; rows may repeat (beams) or be left out."""
        chosen = self._checked(rows)
        index = torch.tensor(chosen, dtype=torch.long, device=self.positions.device)
        layers = [layer.mapped(lambda buffer: buffer.index_select(0, index)) for layer in self.layers]
        return SambaCache(layers, [self._lengths[row] for row in chosen], self.window)

    def clone(self) -> SambaCache:
        """A copy that shares no memory, to come back to after a speculative pass."""
        return self.select(range(self.batch_size))

    def ring_plan(self, seqlens: Sequence[int]) -> RingPlan | None:
        """How `seqlens[b]` new tokens meet the rings, the same for every layer; None if no layer attends."""
        ring = next((layer.attention for layer in self.layers if layer.attention is not None), None)
        if ring is None:
            return None
        return RingPlan.build(
            self._lengths, seqlens, window=self.window, slots=ring.k.shape[1], device=self.positions.device
        )

    def step_tables(
        self, table: RotaryTable, tokens: int, dtype: torch.dtype
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Positions for the next `tokens` tokens of every row, and the rotary table that they index.

        Far from the start both are counted from a base, a multiple of the ring's slots that leaves every ring
        full: slots and visibility stay the same, and the table stays small however long the sequences are.
        """
        slots = next(layer.attention.k.shape[1] for layer in self.layers if layer.attention is not None)
        end = max(self._lengths) + tokens
        base = 0 if end <= _FIXED_TABLE_POSITIONS else max(0, min(self._lengths) // slots - 1) * slots
        if base == 0:
            return self.positions, table.span(0, end, device=self.positions.device, dtype=dtype)
        stop = base + ((end - base) // slots + 1) * slots  # rounded up, so that a table serves many steps
        return self.positions - base, table.span(base, stop, device=self.positions.device, dtype=dtype)

    def _checked(self, rows: Sequence[int]) -> list[int]:
        chosen = [int(row) for row in rows]
        for row in chosen:
            if not 0 <= row < self.batch_size:
                raise IndexError(f"SambaCache: row must be in [0, {self.batch_size}), got {row}")
        return chosen

    def _device(self) -> torch.device:
        return next(buffer.device for layer in self.layers for buffer in layer.tensors())
