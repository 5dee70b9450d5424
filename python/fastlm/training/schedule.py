"""Learning rate over steps, and how a time budget becomes a fixed number of steps.

A run limited by time measures its own warm-up steps and then fixes the rest of the schedule once. From then
on nothing depends on the clock, which is what makes a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from fastlm.training.config import TrainConfig

MEASURED_SHARE = 0.1  # of the budget: slow models stop measuring after this even if warm-up is not over
FEWEST_MEASURED = 3
EVALUATION_SHARE = 0.05  # of the budget, for all evaluations during the run
FINAL_SHARE = 0.12  # of the budget, for the last evaluation


@dataclass(frozen=True)
class Schedule:
    """Fixed lengths of a run, stored with it."""

    warmup_steps: int
    total_steps: int
    evaluate_every: int  # steps; 0: only before the first and after the last step
    final_eval_tokens: int

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation follows after `step` steps."""
        return self.evaluate_every > 0 and 0 < step < self.total_steps and step % self.evaluate_every == 0


def learning_rate(
    step: int, warmup_steps: int, total_steps: int | None, *, peak: float, min_ratio: float
) -> float:
    """Rate of step `step` (from 0): linear warm-up to `peak`, then half a cosine down to `peak * min_ratio`.

    `total_steps` may be unknown (None) during warm-up.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if total_steps is None:
        return peak
    progress = (step + 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def fixed_schedule(config: TrainConfig) -> Schedule:
    """Schedule of a run limited by `config.steps`."""
    assert config.steps is not None
    every = config.steps // (config.evaluations + 1) if config.evaluations else 0
    return Schedule(
        min(config.warmup_steps, config.steps // 4), config.steps, every, config.final_eval_tokens
    )


def enough_measured(config: TrainConfig, step_seconds: list[float]) -> bool:
    """Whether the schedule of a time-limited run can be fixed now."""
    budget = config.budget_seconds
    assert budget is not None
    count = len(step_seconds)
    return count >= FEWEST_MEASURED and (
        count >= config.warmup_steps or sum(step_seconds) > MEASURED_SHARE * budget
    )


def measured_schedule(
    config: TrainConfig, *, step: int, step_seconds: list[float], elapsed: float, evaluation_seconds: float
) -> Schedule:
    """Fixes the schedule of a time-limited run from what was measured.

    Args:
        config: the run's; `budget_seconds` is spent.
        step: steps done.
        step_seconds: duration of measured steps; the first (which pays for start-up) is left out.
        elapsed: seconds of the budget already spent.
        evaluation_seconds: duration of one evaluation of `config.eval_tokens`.
    """
    budget = config.budget_seconds
    assert budget is not None
    per_step = max(1e-6, statistics.median(step_seconds[1:] or step_seconds))
    affordable = FINAL_SHARE * budget / max(1e-6, evaluation_seconds)
    final_tokens = int(min(config.final_eval_tokens, max(1.0, affordable) * config.eval_tokens))
    final_seconds = evaluation_seconds * final_tokens / config.eval_tokens
    evaluations = min(config.evaluations, int(EVALUATION_SHARE * budget / max(1e-6, evaluation_seconds)))
    left = budget - elapsed - final_seconds - evaluations * evaluation_seconds
    total = step + max(1, int(left / per_step))
    warmup = max(step, min(config.warmup_steps, total // 4))
    return Schedule(warmup, total, total // (evaluations + 1) if evaluations else 0, final_tokens)
