"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere, nothing for
`--quiet`.

Everything goes to standard error; standard output is for results.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


@dataclass(frozen=True)
class StepReport:
    """State after one optimizer step."""

    step: int
    total_steps: int | None  # None while a time-limited run measures its first steps
    loss: float  # nats per token of this step's batch
    bits_per_byte: float  # of this step's batch
    tokens_per_second: float  # mean over the last steps
    seconds_left: float | None


class Reporter(Protocol):
    """Receives what happens; `trainer` knows nothing about terminals."""

    def stage(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def step(self, report: StepReport) -> None: ...

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
        facts = Text(describe(report, self._held_out), no_wrap=True, overflow="ellipsis")
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
        f"{report.bits_per_byte:.2f} bits/byte",
    ]
    if held_out is not None:
        parts.append(f"held-out {held_out:.2f}")
    if report.seconds_left is not None:
        minutes, seconds = divmod(int(report.seconds_left + 0.5), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return " · ".join(parts)


def make_reporter(*, quiet: bool = False) -> Reporter:
    """The fitting reporter for this process's standard error."""
    if quiet:
        return QuietReporter()
    return LiveReporter() if sys.stderr.isatty() else PlainReporter()
