"""Generation: prefill in chunks, then one token per row and step, greedy or sampled.

Prompts of different lengths are packed for the prefill (no padding enters the model) and decoded as one
batch, each row at its own position. Memory does not grow with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlm.models.samba.cache import SambaCache
from fastlm.models.samba.config import SambaConfig
from fastlm.models.samba.wavefront import prefill_wavefront

if TYPE_CHECKING:
    from fastlm.models.samba.modeling import SambaModel

Prompts = Tensor | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Sampling:
    """How a next token is drawn.

    Attributes:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_k: keep the `k` likeliest tokens.
        top_p: keep the fewest likeliest tokens whose probabilities reach `p`.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"generate: temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"generate: top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p must be in (0, 1], got {self.top_p}")

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Next tokens `(B,)` int64 for `logits (B, V)`."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        scaled = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            least = scaled.topk(self.top_k, dim=-1).values[:, -1:]
            scaled = scaled.masked_fill(scaled < least, float("-inf"))
        probs = scaled.softmax(dim=-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = probs.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(dim=-1) - ordered
            probs = torch.zeros_like(probs).scatter_(
                -1, order, ordered.masked_fill(before >= self.top_p, 0.0)
            )
        return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


class GenerationMixin:
    """`generate` for a model with a backbone `model`, `logits` and `new_cache`."""

    if TYPE_CHECKING:
        config: SambaConfig
        model: SambaModel

        def logits(self, hidden: Tensor) -> Tensor: ...
        def new_cache(self, batch_size: int) -> SambaCache: ...

    def generate(
        self,
        input_ids: Prompts,
        *,
        max_new_tokens: int = 64,
        attention_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        stream: bool = False,
        streamer: Callable[[Tensor], object] | None = None,
        cache: SambaCache | None = None,
        prefill_chunk_size: int = 2048,
        wavefront: bool = False,
    ) -> Tensor | list[list[int]] | Iterator[Tensor]:
        """Continue prompts by up to `max_new_tokens` tokens.

        Args:
            input_ids: `(B, L)` token ids, or a list of lists of different lengths.
            max_new_tokens: at least 0.
            attention_mask: `(B, L)`, 0 marks padding on either side, for prompts of different lengths in one
                tensor.
            temperature: 0 is greedy; else logits are divided by it and sampled.
            top_k, top_p: sample among the `k` likeliest tokens, or those that make up probability `p`.
            eos_token_id: token or tokens that end a row; default the configuration's.
            pad_token_id: fills rows that ended; default the configuration's, else the first end token.
            seed: of the random numbers; the same seed gives the same tokens.
            generator: random numbers of your own, instead of `seed`.
            stream: return an iterator over the new tokens `(B,)` of each step instead.
            streamer: called with the new tokens `(B,)` of each step.
            cache: continue earlier sequences; the cache is advanced in place. Afterwards it has seen all but
                the last new token, so a further call starts with that one.
            prefill_chunk_size: prompt tokens per row in one pass; bounds the memory of long prompts.
            wavefront: prefill several chunks at a time, each in another block, so that a scan and an attention
                run side by side. The same tokens come out. It holds the activations of as many chunks as
                there are blocks, and pays where one chunk does not fill all cores.

        Returns:
            Prompts with new tokens: `(B, L + new)` for a tensor, a list of lists (without padding) for a
                list. With
            `stream`, the iterator.

        Raises:
            ValueError: an option is out of range, a prompt is empty, or the cache has another number of rows.
            IndexError: a token id is outside the vocabulary.
        """
        sampling = Sampling(temperature, top_k, top_p)
        if max_new_tokens < 0 or prefill_chunk_size < 1:
            raise ValueError(
                f"generate: max_new_tokens must be at least 0 and prefill_chunk_size at least 1, "
                f"got {max_new_tokens} and {prefill_chunk_size}"
            )
        rows = self._prompt_rows(input_ids, attention_mask)
        if generator is None and seed is not None:
            generator = torch.Generator(device=rows[0].device).manual_seed(seed)
        ends = _end_tokens(self.config.eos_token_id if eos_token_id is None else eos_token_id)
        fill = next((t for t in (pad_token_id, self.config.pad_token_id, *ends) if t is not None), 0)
        if cache is None:
            cache = self.new_cache(len(rows))
        steps = self._steps(
            rows, cache, sampling, generator, max_new_tokens, ends, fill, (prefill_chunk_size, wavefront)
        )
        if streamer is not None:
            steps = _reporting(steps, streamer)
        if stream:
            return steps
        new = list(steps)
        if isinstance(input_ids, Tensor):
            prompt = _two_dimensional(input_ids).to(rows[0].device)
            return torch.cat([prompt, *(tokens.unsqueeze(1) for tokens in new)], dim=1)
        columns = [tokens.tolist() for tokens in new]
        return [row.tolist() + _until_end([c[i] for c in columns], ends) for i, row in enumerate(rows)]

    @torch.inference_mode()
    def _steps(
        self,
        rows: list[Tensor],
        cache: SambaCache,
        sampling: Sampling,
        generator: torch.Generator | None,
        max_new_tokens: int,
        ends: tuple[int, ...],
        fill: int,
        prefill: tuple[int, bool],
    ) -> Iterator[Tensor]:
        """New tokens `(B,)` step by step; a row that ended yields `fill`."""
        device = rows[0].device
        end_ids = torch.tensor(ends, device=device)
        finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
        tokens: Tensor | None = None
        for i in range(max_new_tokens):
            if tokens is None:
                hidden = self._prefill(rows, cache, *prefill)
            else:
                hidden = self.model(tokens.unsqueeze(1), cache)[:, -1]
            tokens = sampling.draw(self.logits(hidden), generator).masked_fill(finished, fill)
            yield tokens
            if ends and i + 1 < max_new_tokens:
                finished |= torch.isin(tokens, end_ids)
                if bool(finished.all()):
                    return

    def _prefill(self, rows: list[Tensor], cache: SambaCache, chunk: int, wavefront: bool) -> Tensor:
        """Run the prompts through the model; hidden states `(B, d)` of each row's last token."""
        pieces = list(_chunks(rows, chunk))
        if wavefront:
            passes = prefill_wavefront(self.model, ((p.input_ids, p.cu_seqlens) for p in pieces), cache)
        else:
            passes = (self.model(p.input_ids, cache, cu_seqlens=p.cu_seqlens) for p in pieces)
        last: list[Tensor | None] = [None] * len(rows)
        for piece, hidden in zip(pieces, passes, strict=True):
            for row, place in piece.last_tokens:
                last[row] = hidden.flatten(0, 1)[place]
        return torch.stack([state for state in last if state is not None])

    def _prompt_rows(self, input_ids: Prompts, attention_mask: Tensor | None) -> list[Tensor]:
        """One 1-D tensor of token ids per row on the model's device, without padding, checked."""
        device = self.model.embed_tokens.weight.device
        if isinstance(input_ids, Tensor):
            ids = _two_dimensional(input_ids)
            rows = list(ids.to(device))
            if attention_mask is not None:
                if attention_mask.shape != ids.shape:
                    raise ValueError(
                        f"generate: attention_mask must have shape {tuple(ids.shape)}, "
                        f"got {tuple(attention_mask.shape)}"
                    )
                rows = [row[mask.to(device).bool()] for row, mask in zip(rows, attention_mask, strict=True)]
        else:
            rows = [torch.tensor(list(row), dtype=torch.long, device=device) for row in input_ids]
        if not rows or any(row.numel() == 0 for row in rows):
            raise ValueError(
                "generate: input_ids must have at least 1 row with at least 1 token each, got an empty prompt"
            )
        lowest, highest = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
        if lowest < 0 or highest >= self.config.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise IndexError(f"generate: input_ids must be in [0, {self.config.vocab_size}), got {wrong}")
        return rows


@dataclass(frozen=True)
class _Chunk:
    """One pass of a prefill: ids `(B, L)`, or packed `(1, T)` with bounds; `(row, place)` of each row's last id in it."""

    input_ids: Tensor
    cu_seqlens: Tensor | None
    last_tokens: list[tuple[int, int]]


def _chunks(rows: list[Tensor], size: int) -> Iterator[_Chunk]:
    """Prompts in pieces of up to `size` tokens a row; packed where they differ in length."""
    lengths = [row.numel() for row in rows]
    if len(set(lengths)) == 1:
        for ids in torch.split(torch.stack(rows), size, dim=1):
            yield _Chunk(ids, None, [(i, (i + 1) * ids.shape[1] - 1) for i in range(len(rows))])
        return
    for start in range(0, max(lengths), size):
        pieces = [row[start : start + size] for row in rows]
        bounds = [0, *accumulate(piece.numel() for piece in pieces)]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=rows[0].device)
        last = [(i, bounds[i + 1] - 1) for i, piece in enumerate(pieces) if piece.numel()]
        yield _Chunk(torch.cat(pieces).unsqueeze(0), cu_seqlens, last)


def _two_dimensional(input_ids: Tensor) -> Tensor:
    """`(B, L)`; one prompt may come as `(L,)`."""
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"generate: input_ids must have shape (B, L), got {tuple(input_ids.shape)}")
    return input_ids.unsqueeze(0) if input_ids.dim() == 1 else input_ids


def _end_tokens(eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    if eos_token_id is None:
        return ()
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)


def _until_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    """`tokens` up to and with the first end token."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: stop + 1]


def _reporting(steps: Iterator[Tensor], streamer: Callable[[Tensor], object]) -> Iterator[Tensor]:
    for tokens in steps:
        streamer(tokens)
        yield tokens
