"""The end of a demo on a terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastlm.demo.result import DemoResult

NAME = 28  # characters of the longest name, so that the bars of both tables stand under each other


def print_panel(result: DemoResult, report: Path, console: Console | None = None) -> None:
    """Shows quality, speed, memory, a sample and what was lost."""
    console = console or Console(highlight=False)
    width = max(8, min(40, console.width - NAME - 42))  # of the longest bar
    sample = result.samples[0] if result.samples else None
    parts: list[object] = [_heading("Held-out text, bits per byte (less is better)"), _quality(result, width)]
    rows, length = result.batch
    parts += [
        Text(),
        _heading(
            f"Training in {result.dtype}, tokens per second on {rows} × {length} tokens (more is better)"
        ),
        _speed(result, width),
    ]
    facts = Text()
    facts.append(
        f"\n{result.parameters / 1e6:.1f} M parameters · {result.train_tokens / 1e6:.2f} M tokens in "
        f"{result.train_seconds:.0f} s "
        f"({result.tokens_per_second:,.0f} tokens/s, {result.dtype}, {result.threads} threads) · "
        f"peak memory {result.peak_memory_bytes / 2**20:,.0f} MiB · generates "
        f"{result.generation_tokens_per_second:,.0f} tokens/s"
    )
    parts.append(facts)
    if sample is not None:
        lines = (sample.prompt + sample.text).rstrip().splitlines()[:10]
        parts += [Text(), _heading("The model continues"), Text("\n".join(lines), style="dim")]
    parts += [Text(), _heading("What this does not show")]
    parts += [Text(f"· {line}") for line in result.caveats()]
    title = "fastlm demo (quick form)" if result.quick else "fastlm demo"
    console.print(Panel(Group(*parts), title=title, box=box.ROUNDED, padding=(1, 2)))  # type: ignore[arg-type]
    console.print(f"report  {report}", soft_wrap=True, markup=False)
    console.print(
        f"more    fastlm generate {report.parent / 'run'} --prompt 'class Cache:' --stream",
        soft_wrap=True,
        markup=False,
    )


def _heading(text: str) -> Text:
    return Text(text, style="bold")


def _quality(result: DemoResult, width: int) -> Table:
    rows = [("fastlm Samba", result.bits_per_byte, True)]
    rows += [(c.name, c.bits_per_byte, False) for c in result.compressors]
    largest = max(value for _, value, _ in rows)
    table = _grid(width, "")
    for name, value, own in rows:
        table.add_row(name, _bar(value / largest, own, width), f"{value:.3f}")
    return table


def _speed(result: DemoResult, width: int) -> Table:
    largest = max((peer.tokens_per_second or 0.0 for peer in result.peers), default=0.0) or 1.0
    table = _grid(width, "tokens/s", "fastlm is", "memory")
    for index, peer in enumerate(result.peers):
        memory = f"{peer.peak_bytes / 2**20:,.0f} MiB" if peer.peak_bytes else "–"
        rate = peer.tokens_per_second
        if rate is None:
            table.add_row(peer.name, Text("not timed", style="red"), "–", "–", memory)
            continue
        ratio = "" if index == 0 else f"{result.speed_up(peer.name):.1f}×"
        table.add_row(peer.name, _bar(rate / largest, index == 0, width), f"{rate:,.0f}", ratio, memory)
    return table


def _grid(width: int, *titles: str) -> Table:
    """Name, bar, and a column of numbers per title."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=any(titles), header_style="dim", pad_edge=False)
    table.add_column("", no_wrap=True, min_width=NAME)
    table.add_column("", width=width)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _bar(share: float, own: bool, width: int) -> Text:
    return Text("█" * max(1, round(share * width)), style="bright_cyan" if own else "bright_black")
