"""What a run minimises. The loop asks an `Objective` for the loss of each pass; the plain one is the cross-entropy of every token.

Methods bring objectives of their own (`fastlm.methods.rho1`); the loop, the data and the checkpoints stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fastlm.training.batches import PackedRow
from fastlm.training.config import TrainConfig
from fastlm.training.data import PreparedData
from fastlm.training.evaluation import row_loss

if TYPE_CHECKING:
    from fastlm.layers import Routing
    from fastlm.models.samba import SambaForCausalLM


@dataclass(frozen=True)
class StepNumbers:
    """What is known of an optimizer step after its last pass."""

    loss: float  # what was minimised, nats per token that counts
    nats: float | None  # summed over all predicted tokens; None where they were not all computed
    log: dict[str, Any] = field(default_factory=dict)  # more numbers for the run's log
    warning: str | None = None


class StepObjective(Protocol):
    """The losses of one optimizer step."""

    def loss(
        self, model: SambaForCausalLM, index: int, dtype: str, routing: list[Routing] | None
    ) -> torch.Tensor:
        """Share of the step's loss that pass `index` has, a scalar; the step's gradient is that of the shares' sum.

        Args:
            model: in training mode.
            index: of the row; each is asked for once, in order.
            dtype: `fp32` or `bf16`.
            routing: collects what routers decide, see `SambaModel.forward`.
        """
        ...

    def numbers(self) -> StepNumbers:
        """Of the whole step, after its last pass."""
        ...


class Objective(Protocol):
    """What a run minimises; one object serves one run."""

    def prepare(
        self,
        config: TrainConfig,
        data: PreparedData,
        dtype: str,
        saved: dict[str, Any] | None,
        warn: Callable[[str], None],
    ) -> dict[str, Any] | None:
        """Gets ready for a run, new or resumed.

        Args:
            config: the run's.
            data: the run's, opened.
            dtype: what the run computes in.
            saved: what this returned when the run began; None for a new run.
            warn: takes a sentence for the user.

        Returns:
            record: what a resumed run must find again; kept in `run.json`.

        Raises:
            InputError: the data or `saved` do not fit.
        """
        ...

    def begin(self, rows: Sequence[PackedRow], seed: int) -> StepObjective:
        """The losses of a step over `rows`, one per pass; `seed` depends on the run and the step alone."""
        ...


class CrossEntropy:
    """Mean cross-entropy over every predicted token of a step."""

    def prepare(
        self,
        config: TrainConfig,
        data: PreparedData,
        dtype: str,
        saved: dict[str, Any] | None,
        warn: Callable[[str], None],
    ) -> None:
        """Needs nothing."""

    def begin(self, rows: Sequence[PackedRow], seed: int) -> StepObjective:
        """See `Objective`."""
        return _CrossEntropyStep(rows)


class _CrossEntropyStep:
    def __init__(self, rows: Sequence[PackedRow]) -> None:
        self.rows, self.nats = rows, 0.0
        self.targets = max(1, sum(row.num_targets for row in rows))

    def loss(
        self, model: SambaForCausalLM, index: int, dtype: str, routing: list[Routing] | None
    ) -> torch.Tensor:
        loss = row_loss(model, self.rows[index], dtype, routing)
        self.nats += float(loss.detach())
        return loss / self.targets

    def numbers(self) -> StepNumbers:
        return StepNumbers(self.nats / self.targets, self.nats)
