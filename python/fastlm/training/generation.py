"""Text in, text out: what `fastlm generate` and the demo call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from tokenizers.decoders import DecodeStream

from fastlm.training.errors import InputError
from fastlm.training.loading import LoadedModel


@dataclass(frozen=True)
class GeneratedText:
    """A continuation."""

    prompt: str
    text: str  # without the prompt
    num_tokens: int
    seconds: float
    ended: bool  # the model wrote its mark for the end of a document

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / max(1e-9, self.seconds)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def generate_text(
    loaded: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> GeneratedText:
    """Continues `prompt` as the beginning of a document.

    Args:
        loaded: model and tokenizer.
        prompt: any text, may be empty.
        max_new_tokens: at least 1.
        temperature, top_k, top_p: see `SambaForCausalLM.generate`.
        seed: of the sampling; None: a new one each time.
        on_text: called with each new piece of text, whole characters only.

    Raises:
        InputError: an option is out of its range.
    """
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: expected at least 1, got {max_new_tokens}")
    if not temperature >= 0 or temperature == float("inf"):
        raise InputError(f"--temperature: expected a number of at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"--top-k: expected at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"--top-p: expected a number in (0, 1], got {top_p}")
    if seed is not None and not 0 <= seed < 2**63:
        raise InputError(f"--seed: expected a number in [0, 2^63), got {seed}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"--prompt: expected UTF-8 text, got {error.object[error.start]!r} at {error.start}"
        ) from None
    mark = loaded.end_token
    ids = [mark, *loaded.tokenizer.encode(prompt, add_special_tokens=False).ids]
    stream = DecodeStream(skip_special_tokens=True)
    tokens: list[int] = []
    shown, ended = 0, False
    started = time.monotonic()
    steps = loaded.model.generate(
        torch.tensor([ids]),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_token_id=mark,
        stream=True,
    )
    for step in cast("Iterator[torch.Tensor]", steps):
        token = int(step[0])
        ended = token == mark
        if ended:
            break
        tokens.append(token)
        if on_text is not None and (piece := stream.step(loaded.tokenizer, token)):
            shown += len(piece)
            on_text(piece)
    seconds = time.monotonic() - started
    text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    if on_text is not None and len(text) > shown:
        on_text(text[shown:])  # bytes that never became a whole character
    return GeneratedText(prompt, text, len(tokens) + ended, seconds, ended)
