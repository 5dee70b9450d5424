"""Documents and reference losses for tests."""

from __future__ import annotations

import numpy as np

VOCABULARY = 61


def documents(count: int, seed: int = 0, low: int = 5, high: int = 14) -> list[list[int]]:
    """Token sequences of different lengths; none holds the padding token."""
    chance = np.random.default_rng(seed)
    return [chance.integers(3, VOCABULARY, int(chance.integers(low, high))).tolist() for _ in range(count)]


class FakeStore:
    """The interface of `ScoreStore` over a dictionary."""

    def __init__(self, scores: dict[str, np.ndarray], context: int | None = None) -> None:
        self.scores, self.context = scores, context

    def __contains__(self, key: str) -> bool:
        return key in self.scores

    def nll(self, key: str, start: int, stop: int) -> np.ndarray:
        return self.scores[key][start:stop]
