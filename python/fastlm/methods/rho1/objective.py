"""The loss of `fastlm train --loss slm`: the cross-entropy of the tokens with the largest scores.

Two kinds of score. Those that depend on the model (`excess`, `loss`) are known in the forward pass, and the tokens of one pass are
ranked together. Those that do not (`ref_loss`, `ref_entropy`, `intersection`, `random`) are known beforehand: the tokens of the whole
optimizer step are ranked together, whatever the number of passes, and the losses of the others are not computed.

Either way a step's loss is the mean over all tokens that it selects: how many those are is known before the first backward pass, so
gradients of several passes add up to that of one.

Source: Lin et al., arXiv 2404.07965, equations 3 to 5, section 4.5; what the paper leaves open is decided in docs/methods/rho1.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastlm import ops
from fastlm.methods.rho1.score_files import KEY_BYTES, tokenizer_digest
from fastlm.methods.rho1.store import ScoreStore, key_bytes
from fastlm.training.batches import IGNORE_INDEX, PackedRow
from fastlm.training.config import TrainConfig
from fastlm.training.data import PreparedData
from fastlm.training.errors import InputError
from fastlm.training.evaluation import autocast
from fastlm.training.objective import StepNumbers, StepObjective

if TYPE_CHECKING:
    from fastlm.layers import Routing
    from fastlm.models.samba import SambaForCausalLM

DYNAMIC = ("excess", "loss")  # scores that depend on the model
NEEDS_SCORES = ("excess", "ref_loss", "ref_entropy", "intersection")
TIED_SHARE = 0.1  # of the eligible tokens; more of them at the threshold are worth a word


class SelectiveLoss:
    """An `Objective` of `fastlm.training`.

    Args:
        keep: share of the eligible tokens that is trained on, in [0, 1].
        score: `excess` (the model's loss minus the reference's), `loss`, `ref_loss` (low ones first), `ref_entropy` (low ones
            first), `intersection` (in the share `keep` of both), `random`.
        store: reference losses; not needed for `loss` and `random`.

    Raises:
        InputError: the score needs a store, or one with entropies.
    """

    def __init__(self, *, keep: float, score: str, store: ScoreStore | None) -> None:
        if score in NEEDS_SCORES and store is None:
            raise InputError(f"--scores: expected a folder of scores for --score {score}, got none")
        if score in ("ref_entropy", "intersection") and store is not None and not store.manifest.entropy:
            raise InputError(
                f"--score: {score} needs entropies, and {store.folder} was scored without; "
                "score the corpus with --entropy into another folder"
            )
        self.keep, self.score, self.store = keep, score, store
        self._first: Any = None  # (documents,) first value of each training document
        self._predictions: Any = None  # (documents,)
        self._warned = False

    def prepare(
        self,
        config: TrainConfig,
        data: PreparedData,
        dtype: str,
        saved: dict[str, Any] | None,
        warn: Callable[[str], None],
    ) -> dict[str, Any]:
        """Finds every training document in the scores; see `Objective`."""
        record = {"name": "slm", "scores": None if self.store is None else self.store.digest}
        if saved is not None and saved != record:
            raise InputError(
                f"--scores: the run was begun with scores of digest {saved.get('scores')}, {config.scores} now holds "
                f"{record['scores']}; put the former back, or start a new run"
            )
        if self.store is None:
            return record
        manifest = self.store.manifest
        found = tokenizer_digest(data.tokenizer)
        if manifest.tokenizer != found:
            raise InputError(
                f"--scores: {self.store.folder} is of another tokenizer than the run's: expected {found}, "
                f"found {manifest.tokenizer or 'plain token ids'}"
            )
        check_context(self.store, config)
        if manifest.dtype != dtype and self.score == "excess":
            warn(
                f"the reference losses were computed in {manifest.dtype} and the run computes in {dtype}: "
                "the difference of the roundings is part of every excess loss"
            )
        self._locate(self.store, data)
        return record

    def _locate(self, store: ScoreStore, data: PreparedData) -> None:
        side = data.train
        keys = b"".join(
            key_bytes(side.tokens(document, 0, int(side.lengths[document])))
            for document in range(side.num_documents)
        )
        self._first = store.locate(np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES))
        self._predictions = np.maximum(side.lengths - 1, 0)
        missing = np.flatnonzero((self._first < 0) & (self._predictions > 0))
        if len(missing):
            raise InputError(
                f"--scores: {store.folder} has no losses for {len(missing)} of the {side.num_documents} training documents "
                f"(the first is number {missing[0]}, of {side.lengths[missing[0]]} tokens); "
                "score the same --data, with the same --held-out if it is one file"
            )

    def begin(self, rows: Sequence[PackedRow], seed: int) -> StepObjective:
        """See `Objective`."""
        if self.score in DYNAMIC:
            return _RankedByPass(self, rows, seed)
        return _RankedByStep(self, rows, seed)

    def reference(self, row: PackedRow, name: str) -> Tensor:
        """The stored numbers of a row's predictions, `(T,)` float32; NaN where nothing is predicted."""
        assert self.store is not None
        out = np.full(row.input_ids.shape[1], np.nan, np.float32)
        at = 0
        for document, start, stop in row.pieces:
            count = min(stop, int(self._predictions[document])) - start
            if count > 0:
                out[at : at + count] = self.store.values(name, int(self._first[document]) + start, count)
            at += stop - start
        return torch.from_numpy(out)

    def tie_warning(self, tied: int, eligible: int) -> str | None:
        """A sentence, once in a run, if the choice was made by chance for many tokens."""
        if self._warned or tied <= TIED_SHARE * eligible or self.keep in (0.0, 1.0):
            return None
        self._warned = True
        return (
            f"{tied} of {eligible} tokens have the very score of the threshold, and chance decides among them: "
            f"--score {self.score} does not tell them apart"
            + (" (as when the model is the reference model itself)" if self.score == "excess" else "")
        )


def check_context(store: ScoreStore, config: TrainConfig) -> None:
    """Scores and run cut documents into the same pieces.

    Raises:
        InputError: they do not.
    """
    if store.context != config.seq_len:
        raise InputError(
            f"--seq-len: expected {store.context or 'whole documents'}, the context of the scores in {store.folder}, "
            f"got {config.seq_len}; train with that, or score with --context {config.seq_len}"
        )


def count_selected(keep: float, eligible: int) -> int:
    """How many of the eligible tokens `ops.select_tokens` selects."""
    least = 1 if keep > 0 and eligible > 0 else 0
    return min(eligible, max(least, math.floor(keep * eligible + 0.5)))


class _RankedByPass:
    """Scores that depend on the model: each pass selects among its own tokens."""

    def __init__(self, objective: SelectiveLoss, rows: Sequence[PackedRow], seed: int) -> None:
        self.objective, self.rows, self.seed = objective, rows, seed
        self.references: list[Tensor | None] = [None] * len(rows)
        if objective.score == "excess":
            self.references = [objective.reference(row, "nll") for row in rows]
        selected = 0
        for row, reference in zip(rows, self.references, strict=True):
            eligible = row.shift_labels[0] != IGNORE_INDEX
            if reference is not None:
                eligible &= reference.isfinite()
            selected += count_selected(objective.keep, int(eligible.sum()))
        self.divisor = float(max(1, selected))
        self.sum = 0.0
        self.totals = _Totals()

    def loss(self, model: SambaForCausalLM, index: int, dtype: str, routing: list[Routing] | None) -> Tensor:
        row, reference = self.rows[index], self.references[index]
        labels = row.shift_labels[0]
        with autocast(dtype):
            hidden = model.model(row.input_ids, cu_seqlens=row.cu_seqlens, routing=routing)
            loss, stats = ops.slm_loss(
                hidden[0],
                model.output_weight.to(hidden.dtype),
                labels,
                reference,
                keep_ratio=self.objective.keep,
                score="loss" if reference is None else "excess",
                bias=model.output_bias,
                normalizer=self.divisor,
                tie_break="random",
                seed=(self.seed + index) % 2**63,
                return_stats=True,
            )
        self.sum += float(loss.detach())
        scores = stats.nll if reference is None else stats.nll - reference
        self.totals.add(
            scores,
            (labels != IGNORE_INDEX) & scores.isfinite(),
            stats.mask,
            threshold=float(stats.threshold),
            tied=int(stats.num_tied),
        )
        self.totals.nonfinite += int(stats.num_nonfinite)
        self.totals.nats += float(stats.nll.sum())
        return loss

    def numbers(self) -> StepNumbers:
        totals = self.totals
        targets = max(1, sum(row.num_targets for row in self.rows))
        log = {"full_loss": totals.nats / targets, **totals.log()}
        return StepNumbers(
            self.sum, totals.nats, log, self.objective.tie_warning(totals.tied, totals.eligible)
        )


class _RankedByStep:
    """Scores that are known beforehand: the whole step selects, and only what is selected is computed."""

    def __init__(self, objective: SelectiveLoss, rows: Sequence[PackedRow], seed: int) -> None:
        self.objective, self.rows = objective, rows
        labels = torch.cat([row.shift_labels[0] for row in rows])
        valid = labels != IGNORE_INDEX
        rankings = self._rankings(labels, seed)
        masks = [
            ops.select_tokens(scores, valid, keep_ratio=objective.keep, tie_break="random", seed=seed)
            for scores in rankings
        ]
        chosen = torch.stack(masks).all(0)
        # Of two rankings the log tells about the first. A token without a finite score is never selected.
        scores, eligible = rankings[0], valid & rankings[0].isfinite()
        threshold = float(scores[masks[0]].min()) if bool(masks[0].any()) else math.inf
        self.totals = _Totals()
        tied = int((eligible & (scores == threshold)).sum())
        self.totals.add(scores, eligible, chosen, threshold=threshold, tied=tied)
        self.totals.nonfinite = int(valid.sum()) - int(eligible.sum())
        self.targets, self.selected = int(valid.sum()), int(chosen.sum())
        kept = torch.where(chosen, labels, IGNORE_INDEX)
        self.kept = kept.split([row.shift_labels.shape[1] for row in rows])
        self.sum = 0.0

    def _rankings(self, labels: Tensor, seed: int) -> list[Tensor]:
        """What is ranked, larger first; of several a token must be among the first of each."""
        objective = self.objective
        if objective.score == "random":
            generator = torch.Generator().manual_seed(seed)
            return [torch.rand(len(labels), generator=generator)]
        names = {"ref_loss": ("nll",), "ref_entropy": ("entropy",), "intersection": ("nll", "entropy")}
        return [
            -torch.cat([objective.reference(row, name) for row in self.rows])
            for name in names[objective.score]
        ]

    def loss(self, model: SambaForCausalLM, index: int, dtype: str, routing: list[Routing] | None) -> Tensor:
        row = self.rows[index]
        with autocast(dtype):
            hidden = model.model(row.input_ids, cu_seqlens=row.cu_seqlens, routing=routing)
            nats = model.loss(hidden, shift_labels=self.kept[index].unsqueeze(0), reduction="sum")
        loss = nats / max(1, self.selected)
        self.sum += float(loss.detach())
        return loss

    def numbers(self) -> StepNumbers:
        totals = self.totals
        nats = self.sum * self.selected if self.selected == self.targets else None  # else not all are known
        return StepNumbers(
            self.sum, nats, totals.log(), self.objective.tie_warning(totals.tied, totals.eligible)
        )


class _Totals:
    """Sums over the passes of a step, for the log."""

    def __init__(self) -> None:
        self.eligible = self.selected = self.tied = self.nonfinite = 0
        self.sum_selected = self.sum_unselected = self.nats = 0.0
        self.thresholds: list[float] = []

    def add(self, scores: Tensor, eligible: Tensor, mask: Tensor, *, threshold: float, tied: int) -> None:
        self.eligible += int(eligible.sum())
        self.selected += int(mask.sum())
        self.sum_selected += float(scores[mask].sum())
        self.sum_unselected += float(scores[eligible & ~mask].sum())
        self.tied += tied
        self.thresholds.append(threshold)

    def log(self) -> dict[str, Any]:
        """Share of the eligible tokens, threshold (mean over passes), mean scores; None where there is no such token."""
        finite = [threshold for threshold in self.thresholds if math.isfinite(threshold)]
        unselected = self.eligible - self.selected
        return {
            "selected_fraction": self.selected / max(1, self.eligible),
            "selection_threshold": sum(finite) / len(finite) if finite else None,
            "score_selected": self.sum_selected / self.selected if self.selected else None,
            "score_unselected": self.sum_unselected / unselected if unselected else None,
            "tied_at_threshold": self.tied,
            "nonfinite_scores": self.nonfinite,
        }
