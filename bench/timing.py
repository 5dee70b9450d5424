"""Timing: rounds in which all contenders take turns, so that a disturbance hits all of them alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .case import MODES


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        rounds: samples of each contender at most.
        least_rounds: samples of a contender that is too slow for the budget.
        budget: seconds for all samples of one contender.
        sample: least seconds of one sample; shorter calls are repeated within it.
    """

    rounds: int
    least_rounds: int
    budget: float
    sample: float


QUICK = Plan(rounds=9, least_rounds=3, budget=0.3, sample=0.005)
FULL = Plan(rounds=31, least_rounds=5, budget=6.0, sample=0.02)


@dataclass
class Runner:
    """A contender that is timed, and its samples: seconds per call."""

    call: Callable[[], object]
    mode: str
    calls_per_sample: int = 1
    rounds: int = 0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def warm_up(self, plan: Plan) -> None:
        """Runs a few calls, then decides on repetitions and rounds."""
        with MODES[self.mode]():
            seconds = math.inf
            for _ in range(3):
                begin = time.perf_counter()
                self.call()
                seconds = min(seconds, time.perf_counter() - begin)
                if seconds > plan.budget / 2:
                    break
        self.calls_per_sample = max(1, math.ceil(plan.sample / max(seconds, 1e-9)))
        cost = seconds * self.calls_per_sample
        self.rounds = min(plan.rounds, max(plan.least_rounds, int(plan.budget / max(cost, 1e-9))))

    def sample(self) -> None:
        """One sample on the wall clock and on the CPU clock of all threads together."""
        with MODES[self.mode]():
            count = self.calls_per_sample
            call = self.call
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(count):
                call()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.wall.append(wall / count)
        self.cpu.append(cpu / count)


def takes_part(round_: int, own_rounds: int, rounds: int) -> bool:
    """Spreads `own_rounds` samples evenly over `rounds` rounds."""
    return (round_ + 1) * own_rounds // rounds > round_ * own_rounds // rounds


def interleave(runners: Sequence[Runner], plan: Plan) -> list[int]:
    """Times all runners in turns; every round starts with another one.

    Returns:
        The order in which runners were sampled, by position: for tests and the curious.
    """
    order: list[int] = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for runner in runners:
            runner.warm_up(plan)
        rounds = max((runner.rounds for runner in runners), default=0)
        for round_ in range(rounds):
            for offset in range(len(runners)):
                position = (round_ + offset) % len(runners)
                if takes_part(round_, runners[position].rounds, rounds):
                    runners[position].sample()
                    order.append(position)
    finally:
        if collecting:
            gc.enable()
    return order
