"""What a selective loss did between two lines of the log, summed on the device and read once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TIED_SHARE = 0.1  # of the eligible tokens; more at the threshold, and the choice is one of positions
_SUMS = (
    "valid",
    "nll",
    "eligible",
    "selected",
    "nonfinite",
    "selected_score",
    "unselected_score",
    "threshold",
    "with_threshold",
    "tied",
)


class SelectionLog:
    """Sums over calls of the loss.

    Args:
        score: its name; with `ref_loss` the losses of unselected tokens are not computed, and so not told.
    """

    def __init__(self, score: str) -> None:
        self.score = score
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, stats: Any, targets: Tensor, ref_nll: Tensor | None) -> None:
        """Takes in one call.

        Args:
            stats: `SelectionStats` of `ops.slm_loss`.
            targets: `(B, L)`, -100 where nothing is predicted.
            ref_nll: `(B, L)` or None.
        """
        valid, nll = targets != -100, stats.nll
        score = nll
        if self.score == "excess" and ref_nll is not None:
            score = nll - ref_nll
        elif self.score == "ref_loss" and ref_nll is not None:
            score = -ref_nll
        eligible = valid & score.isfinite()
        chosen = stats.mask
        known = score.where(eligible, torch.zeros_like(score)).double()
        limits = (
            stats.threshold.isfinite()
        )  # one for every sequence with scope "sequence"; infinite where nothing was chosen
        # A choice of all is none, and one token at the threshold is no tie.
        tied = (
            (stats.num_tied > 1)
            & (stats.num_tied > TIED_SHARE * stats.num_eligible)
            & (stats.num_selected < stats.num_eligible)
        )
        sums = torch.stack(
            [
                torch.as_tensor(value, dtype=torch.float64, device=nll.device)
                for value in (
                    valid.sum(),
                    nll.where(valid, torch.zeros_like(nll)).double().sum(),
                    eligible.sum(),  # not the counts of `stats`, which with scope "global" are those of all processes
                    chosen.sum(),
                    stats.num_nonfinite,
                    known.where(chosen, torch.zeros_like(known)).sum(),
                    known.where(chosen, torch.zeros_like(known)).sub(known).neg().sum(),
                    stats.threshold.where(limits, torch.zeros_like(stats.threshold)).sum(),
                    limits.sum(),
                    tied,
                )
            ]
        )
        self._sums = sums if self._sums is None else self._sums + sums

    def flush(self, total: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], bool]:
        """The lines for the log since the last flush, and whether too many tokens tied at a threshold.

        Args:
            total: sums a tensor over all processes.
        """
        if self._sums is None:
            return {}, False
        values = dict(zip(_SUMS, total(self._sums).tolist(), strict=True))
        self._sums = None
        unselected = values["eligible"] - values["selected"]
        logs = {
            "selected_fraction": values["selected"] / max(1.0, values["eligible"]),
            "score_selected": values["selected_score"] / max(1.0, values["selected"]),
            "score_unselected": values["unselected_score"] / max(1.0, unselected),
            "selection_threshold": values["threshold"] / max(1.0, values["with_threshold"]),
            "nonfinite_scores": values["nonfinite"],
        }
        if self.score != "ref_loss":
            logs = {"full_loss": values["nll"] / max(1.0, values["valid"]), **logs}
        return logs, values["tied"] > 0
