"""What general compressors make of the same held-out bytes.

Three numbers are plain: each compressor gets the held-out files in one stream, as the model predicts them.
The last one is for honesty: the model has read the training text before, so xz gets the training text in
front too, and only what the held-out part adds is counted. The size of the model itself is in none of these
numbers.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

PRIMED_BYTES = 24 << 20  # more training text than this takes longer than a demo should


@dataclass(frozen=True)
class Compressed:
    """One compressor on the held-out bytes."""

    name: str
    bits_per_byte: float
    seen: str  # what it could read besides the held-out bytes


def compress_held_out(held_out: bytes) -> list[Compressed]:
    """gzip and xz at their strongest settings on the held-out bytes alone."""
    return [
        Compressed("gzip -9", _bits(len(gzip.compress(held_out, 9, mtime=0)), held_out), "nothing else"),
        Compressed(
            "xz -9e",
            _bits(len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)), held_out),
            "nothing else",
        ),
    ]


def compress_after_training_text(training: bytes, held_out: bytes) -> Compressed | None:
    """xz with the training text in front: size of both minus size of the first; None for too much text."""
    if len(training) > PRIMED_BYTES:
        return None
    with ThreadPoolExecutor(2) as pool:  # lzma works without the interpreter's lock
        alone, both = pool.map(_xz_size, ([training], [training, held_out]))
    return Compressed("xz, training text first", _bits(both - alone, held_out), "the training text")


def _xz_size(parts: Iterable[bytes]) -> int:
    compressor = lzma.LZMACompressor(filters=[{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 26}])
    return sum(len(compressor.compress(part)) for part in parts) + len(compressor.flush())


def _bits(compressed: int, original: bytes) -> float:
    return 8 * compressed / max(1, len(original))
