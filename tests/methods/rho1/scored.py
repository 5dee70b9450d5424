"""A small Samba, documents for it, and their losses computed the slow way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fastlm.methods import rho1
from fastlm.models.samba import SambaConfig, SambaForCausalLM

VOCABULARY = 96
# Small enough for many batches and parts, and of one thread: bits depend on the number.
SETTINGS: dict[str, Any] = {"batch_tokens": 60, "part_tokens": 90, "threads": 1, "dtype": "fp32"}


def small_model(seed: int = 0) -> SambaForCausalLM:
    """Untrained, with predictions that are far from uniform."""
    torch.manual_seed(seed)
    model = SambaForCausalLM(SambaConfig.from_preset("tiny", vocab_size=VOCABULARY))
    with torch.no_grad():
        model.output_weight.mul_(20.0)
    return model.eval()


def small_documents(count: int = 24, seed: int = 0) -> list[np.ndarray]:
    """Of 0 to 80 tokens; the first few have the lengths where off-by-ones live, and one comes twice."""
    chance = np.random.default_rng(seed)
    lengths = [0, 1, 2, 15, 16, 17, 32, 33, 80, *chance.integers(2, 60, count - 10)]
    documents = [chance.integers(0, VOCABULARY, n) for n in lengths]
    return [*documents, documents[5].copy()]


@torch.no_grad()
def direct_losses(model: Any, tokens: np.ndarray, context: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Loss of every token but the first, and entropy of its prediction, piece by piece from whole logits in float64."""
    ids = torch.from_numpy(np.asarray(tokens, np.int64))
    step = context or max(1, len(ids))
    losses, entropies = [np.empty(0)], [np.empty(0)]
    for start in range(0, len(ids) - 1, step):
        piece = ids[start : min(start + step, len(ids) - 1)]
        logits = model(piece.unsqueeze(0)).logits[0].double()
        targets = ids[start + 1 : start + 1 + len(piece)]
        losses.append(functional.cross_entropy(logits, targets, reduction="none").numpy())
        log_p = logits.log_softmax(-1)
        entropies.append(-(log_p.exp() * log_p).sum(-1).numpy())
    return np.concatenate(losses), np.concatenate(entropies)


def score_small(out: Path, **changes: Any) -> None:
    """What the processes of the tests do."""
    rho1.score(small_model(), small_documents(), out, **{**SETTINGS, "context": 16, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of finished scores, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
