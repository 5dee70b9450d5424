"""What a person sees: facts on one line, a bar that stays in place on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fastlm.training import progress
from fastlm.training.progress import (
    LiveReporter,
    PlainReporter,
    QuietReporter,
    StepReport,
    WorkRate,
    WorkReport,
    describe,
    describe_work,
    make_reporter,
)

REPORT = StepReport(120, 366, 4.1234, 1.7123, 10_240.4, 83.4)


def test_the_facts_fit_a_narrow_terminal() -> None:
    shown = describe(REPORT, 1.8)
    assert shown == "step 120/366 · 10,240 tokens/s · loss 4.12 · 1.71 bits/byte · held-out 1.80 · 1:23 left"
    assert len(shown) <= 88
    assert describe(StepReport(3, None, 4.1, 1.7, 10.0, None), None).startswith("step 3/? · 10 tokens/s")


@pytest.mark.parametrize("width", [60, 120])
def test_the_live_bar_grows_and_ends(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    reporter = LiveReporter(console)
    reporter.stage("looking for text")
    reporter.step(StepReport(1, None, 6.0, 3.0, 100.0, 60.0))
    reporter.evaluation(1, 2.5)
    reporter.warn("a [bracket] is no markup")
    reporter.step(REPORT)
    reporter.close()
    reporter.close()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "looking for text" in shown
    assert "a [bracket] is no markup" in shown
    assert "step 120/366" in shown
    assert "━" in shown
    assert shown.rstrip().endswith("\x1b[?25h"), "the cursor is back"


def test_plain_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=200)
    reporter = PlainReporter(console, seconds=10.0)
    for step in range(1, 31):
        now = float(step)
        reporter.step(StepReport(step, 30, 4.0, 1.7, 10.0, 1.0))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[1] for line in lines] == ["1/30", "11/30", "21/30", "30/30"]


def test_the_kind_of_output_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make_reporter(quiet=True)) is QuietReporter
    assert type(make_reporter()) is PlainReporter
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    assert type(make_reporter()) is LiveReporter


# Other work


def test_the_speed_of_work_is_that_of_the_last_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    rate = WorkRate(10_000, 2_000, "tokens")
    for _ in range(100):  # slow at first
        now += 10.0
        rate.advanced(10)
    for _ in range(progress.RATE_REPORTS):
        now += 1.0
        report = rate.advanced(100)
    assert (report.done, report.total, report.unit) == (6_200, 10_000, "tokens")
    assert report.per_second == pytest.approx(100.0)
    assert report.seconds_left == pytest.approx(38.0)
    assert rate.advanced(10**6).done == 10_000


def test_work_is_shown_like_steps() -> None:
    report = WorkReport(1_500, 20_000, "tokens", 250.4, 74.0)
    assert describe_work(report) == "1,500 of 20,000 tokens · 250 tokens/s · 1:14 left"
    console = Console(file=io.StringIO(), force_terminal=True, width=90)
    live = LiveReporter(console)
    live.work(report)
    live.close()
    assert "1,500 of 20,000 tokens" in console.file.getvalue()  # type: ignore[attr-defined]
    quiet = Console(file=io.StringIO())
    QuietReporter(quiet).work(report)
    assert quiet.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_step_without_every_tokens_loss_has_no_bits_per_byte() -> None:
    shown = describe(StepReport(3, 9, 4.1, None, 10.0, None), 1.8)
    assert shown == "step 3/9 · 10 tokens/s · loss 4.10 · held-out 1.80"
