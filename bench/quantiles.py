"""Order statistics of samples."""

from __future__ import annotations

from collections.abc import Sequence


def quantile(samples: Sequence[float], q: float) -> float:
    """The `q` quantile, linear between neighbours.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("quantile: samples must not be empty")
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def median(samples: Sequence[float]) -> float:
    """The middle one."""
    return quantile(samples, 0.5)
