"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere, nothing for
`--quiet`.

Everything goes to standard error; standard output is for results.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

RATE_REPORTS = 32  # the speed of other work is a mean over so many reports
PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


@dataclass(frozen=True)
class StepReport:
    """State after one optimizer step."""

    step: int
    total_steps: int | None  # None while a time-limited run measures its first steps
    loss: float  # nats per token of this step's batch
    bits_per_byte: float | None  # of this step's batch; None where not every token's loss was computed
    tokens_per_second: float  # mean over the last steps
    seconds_left: float | None


@dataclass(frozen=True)
class WorkReport:
    """How far a long piece of work is whose amount is known."""

    done: int
    total: int
    unit: str  # plural: "tokens"
    per_second: float  # mean over the last reports
    seconds_left: float


class WorkRate:
    """Makes reports of work that comes in portions.

    Args:
        total: amount of work.
        done: what was done before, and does not count for the speed.
        unit: plural.
    """

    def __init__(self, total: int, done: int, unit: str) -> None:
        self.total, self.done, self.unit = total, done, unit
        self._times: deque[tuple[float, int]] = deque([(time.monotonic(), done)], maxlen=RATE_REPORTS)

    def advanced(self, amount: int) -> WorkReport:
        """The state after another `amount`."""
        self.done = min(self.total, self.done + amount)
        self._times.append((time.monotonic(), self.done))
        (began, before), (now, after) = self._times[0], self._times[-1]
        speed = (after - before) / max(1e-9, now - began)
        left = (self.total - self.done) / max(1e-9, speed)
        return WorkReport(self.done, self.total, self.unit, speed, left)


class Reporter(Protocol):
    """Receives what happens; `trainer` knows nothing about terminals."""

    def stage(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def step(self, report: StepReport) -> None: ...

    def work(self, report: WorkReport) -> None: ...

    def evaluation(self, step: int, bits_per_byte: float) -> None: ...

    def close(self) -> None: ...


class QuietReporter:
    """Shows warnings only."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def stage(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)

    def step(self, report: StepReport) -> None:
        pass

    def work(self, report: WorkReport) -> None:
        pass

    def evaluation(self, step: int, bits_per_byte: float) -> None:
        pass

    def close(self) -> None:
        pass


class PlainReporter(QuietReporter):
    """One line every few seconds."""

    def __init__(self, console: Console | None = None, seconds: float = PLAIN_SECONDS) -> None:
        super().__init__(console)
        self.seconds = seconds
        self._last = time.monotonic() - seconds
        self._held_out: float | None = None

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stage(self, text: str) -> None:
        self._line(f"· {text}")

    def step(self, report: StepReport) -> None:
        if time.monotonic() - self._last < self.seconds and report.step != report.total_steps:
            return
        self._last = time.monotonic()
        self._line(describe(report, self._held_out))

    def work(self, report: WorkReport) -> None:
        if time.monotonic() - self._last < self.seconds and report.done != report.total:
            return
        self._last = time.monotonic()
        self._line(describe_work(report))

    def evaluation(self, step: int, bits_per_byte: float) -> None:
        self._held_out = bits_per_byte


class LiveReporter(QuietReporter):
    """A bar with a line of facts below it, both staying in place."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._live: Live | None = None
        self._held_out: float | None = None

    def stage(self, text: str) -> None:
        self.console.print(f"· {text}", style="cyan", markup=False, highlight=False)

    def step(self, report: StepReport) -> None:
        bar = ProgressBar(total=report.total_steps, completed=report.step, pulse=report.total_steps is None)
        self._show(bar, describe(report, self._held_out))

    def work(self, report: WorkReport) -> None:
        self._show(ProgressBar(total=report.total, completed=report.done), describe_work(report))

    def _show(self, bar: ProgressBar, text: str) -> None:
        facts = Text(text, no_wrap=True, overflow="ellipsis")
        if self._live is None:
            self._live = Live(console=self.console, refresh_per_second=5)
            self._live.start()
        rows = Table.grid(expand=True)
        rows.add_row(bar)
        rows.add_row(facts)
        self._live.update(rows)

    def evaluation(self, step: int, bits_per_byte: float) -> None:
        self._held_out = bits_per_byte

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def describe(report: StepReport, held_out: float | None) -> str:
    """The facts beside the bar on one line."""
    total = "?" if report.total_steps is None else str(report.total_steps)
    parts = [
        f"step {report.step}/{total}",
        f"{report.tokens_per_second:,.0f} tokens/s",
        f"loss {report.loss:.2f}",
    ]
    if report.bits_per_byte is not None:
        parts.append(f"{report.bits_per_byte:.2f} bits/byte")
    if held_out is not None:
        parts.append(f"held-out {held_out:.2f}")
    if report.seconds_left is not None:
        parts.append(_time_left(report.seconds_left))
    return " · ".join(parts)


def describe_work(report: WorkReport) -> str:
    """The facts beside the bar on one line."""
    parts = [
        f"{report.done:,} of {report.total:,} {report.unit}",
        f"{report.per_second:,.0f} {report.unit}/s",
        _time_left(report.seconds_left),
    ]
    return " · ".join(parts)


def _time_left(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes}:{seconds:02d} left"


def make_reporter(*, quiet: bool = False) -> Reporter:
    """The fitting reporter for this process's standard error."""
    if quiet:
        return QuietReporter()
    return LiveReporter() if sys.stderr.isatty() else PlainReporter()
