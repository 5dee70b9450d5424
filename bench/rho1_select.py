"""Which tokens have a loss in a run of `bench.rho1`: the variants, their scores, and what is counted about the selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.rho1_corpus import DOCUMENT_KINDS
from bench.rho1_noise import CLEAN, KINDS, MIXED
from fastlm import ops
from fastlm.training.batches import IGNORE_INDEX

BUCKETS = (0, 1, 4, 16, 64)  # first positions in a piece; the state restarts at its beginning


@dataclass(frozen=True)
class Variant:
    """How one run is trained.

    `rule` chooses the tokens with a loss, `keep` is their share. `begin` names the run whose final weights this one starts from
    (None: new ones), `reference` the run whose final model scored the tokens. A run with `scores` leaves its scores of the rows that
    the runs of that stage train on. `text` is the side of the corpus. `continued` runs are the second stage.
    """

    rule: str = "all"
    keep: float = 1.0
    text: str = "train"
    begin: str | None = None
    reference: str | None = None
    scores: str | None = None  # "first" or "second": the stage whose rows are scored

    @property
    def continued(self) -> bool:
        return self.begin is not None

    @property
    def needs(self) -> tuple[str, ...]:
        """Runs of the same seed that must be finished before."""
        return tuple(dict.fromkeys(name for name in (self.begin, self.reference) if name))


VARIANTS = {
    "reference": Variant(text="reference", scores="first"),
    # Plain cross-entropy. It is its own (self-)reference, and the base model of the continued runs.
    "ce": Variant(scores="first"),
    **{f"slm_{k}": Variant("excess", k / 100, reference="reference") for k in (60, 40, 50, 70, 80, 90)},
    "random_60": Variant("random", 0.6),
    "oracle": Variant("oracle"),
    "ref_loss_60": Variant("ref_loss", 0.6, reference="reference"),
    "intersection_60": Variant("intersection", 0.6, reference="reference"),
    "self_loss_60": Variant("ref_loss", 0.6, reference="ce"),
    "self_intersection_60": Variant("intersection", 0.6, reference="ce"),
    "continued_reference": Variant(text="reference", begin="ce", scores="second"),
    "continued_ce": Variant(begin="ce"),
    "continued_slm_60": Variant("excess", 0.6, begin="ce", reference="continued_reference"),
    "continued_random_60": Variant("random", 0.6, begin="ce"),
    # What else could be done with the clean text: as many tokens as `continued_ce`, the first stage on the reference's text.
    "reference_then_ce": Variant(begin="reference"),
}
SHOWN = "slm_60"  # the variant whose first seed is shown token by token


@dataclass(frozen=True)
class Batch:
    """One row of packed pieces with what is known about each of its targets."""

    input_ids: Tensor  # (1, T) int64
    cu_seqlens: Tensor  # (S+1,) int32
    labels: Tensor  # (T,) int64: the token to predict, -100 at a document's end
    kinds: Tensor  # (T,) int64: number in `KINDS` of the token to predict
    document_kinds: Tensor  # (T,) int64: number in `DOCUMENT_KINDS`
    positions: Tensor  # (T,) int64: in the piece

    @property
    def eligible(self) -> Tensor:
        return self.labels != IGNORE_INDEX


def score_of(
    rule: str,
    eligible: Tensor,
    nll: Tensor,
    ref: Tensor | None,
    entropy: Tensor | None,
    draw: torch.Generator,
) -> Tensor:
    """Scores `(T,)`, largest first, without gradient.

    `excess`, `ref_loss` and `intersection` need the losses of a reference, the last also its entropies; `random` draws from `draw`.
    """
    if rule in {"all", "oracle"}:
        return torch.zeros_like(nll, requires_grad=False)
    if rule == "random":
        return torch.rand(nll.shape, generator=draw)
    assert ref is not None
    if rule == "excess":
        return nll.detach() - ref
    if rule == "ref_loss":
        return -ref
    assert entropy is not None
    return torch.minimum(_ranks(-ref, eligible), _ranks(-entropy, eligible))


def _ranks(score: Tensor, eligible: Tensor) -> Tensor:
    """Share of the eligible tokens that come after a token, in [0, 1); equal scores in order. Below 0 where not eligible."""
    order = score.masked_fill(~eligible, float("-inf")).argsort(stable=True)
    ranks = torch.empty(score.shape)
    n = int(eligible.sum())
    ranks[order] = (torch.arange(len(score), dtype=torch.float32) - (len(score) - n)) / max(1, n)
    return ranks


def chosen(variant: Variant, batch: Batch, score: Tensor) -> Tensor:
    """The tokens with a loss, `(T,)` bool.

    With `intersection` they are the tokens in both of two equally large sets, those with the smallest reference loss and those with
    the smallest entropy, the sets being as large as it takes to have `keep` of the tokens in both: 1 minus the threshold.
    """
    if variant.rule == "oracle":
        return batch.eligible & (batch.kinds == CLEAN)
    return ops.select_tokens(score, batch.eligible, keep_ratio=variant.keep)


class SelectionLog:
    """What was selected since the last reading."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        # Eligible and selected tokens, of documents of one kind and of mixed ones.
        self._counts = torch.zeros(2, 2, len(KINDS), dtype=torch.long)
        self._buckets = torch.zeros(2, len(BUCKETS), dtype=torch.long)
        self._loss = torch.zeros(2, dtype=torch.float64)  # of selected and unselected tokens, summed
        self._score = torch.zeros(2, dtype=torch.float64)
        self._thresholds: list[float] = []

    def add(self, batch: Batch, mask: Tensor, nll: Tensor, score: Tensor) -> None:
        """Count one step."""
        eligible, nll, score = batch.eligible, nll.detach(), score.double()
        for i, seen in enumerate((eligible, mask)):
            index = ((batch.document_kinds[seen] == DOCUMENT_KINDS.index(MIXED)).long(), batch.kinds[seen])
            self._counts[i].index_put_(index, torch.ones_like(index[0]), accumulate=True)
            bucket = torch.bucketize(batch.positions[seen], torch.tensor(BUCKETS), right=True) - 1
            self._buckets[i] += bucket.bincount(minlength=len(BUCKETS))
        for i, seen in enumerate((mask, eligible & ~mask)):
            self._loss[i] += nll[seen].double().sum()
            self._score[i] += score[seen].sum()
        if bool(mask.any()):
            self._thresholds.append(float(score[mask].min()))

    def read(self) -> dict[str, Any]:
        """Figures since the last reading; starts anew.

        `eligible` and `selected` are counts by kind of token, of documents of that kind alone and of mixed ones; `positions` are the
        same two by bucket; losses and scores are means per token.
        """
        selected = int(self._counts[1].sum())
        both = (selected, int(self._counts[0].sum()) - selected)
        loss = [_mean(float(total), n) for total, n in zip(self._loss, both, strict=True)]
        score = [_mean(float(total), n) for total, n in zip(self._score, both, strict=True)]
        found = {
            "eligible": self._counts[0].tolist(),
            "selected": self._counts[1].tolist(),
            "positions": self._buckets.tolist(),
            "train_loss": _mean(float(self._loss.sum()), sum(both)),
            "selected_loss": loss[0],
            "unselected_loss": loss[1],
            "selected_score": score[0],
            "unselected_score": score[1],
            "threshold": _mean(sum(self._thresholds), len(self._thresholds)),
        }
        self._clear()
        return found


def _mean(total: float, n: int) -> float | None:
    return round(total / n, 5) if n else None
