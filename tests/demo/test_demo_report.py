"""The report and the panel: made from the numbers alone, self-contained, honest about what was lost."""

from __future__ import annotations

import gzip
import lzma
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastlm.demo.compressors import compress_after_training_text, compress_held_out
from fastlm.demo.panel import print_panel
from fastlm.demo.report import render
from fastlm.demo.result import DemoResult
from fastlm.demo.svg import Bar, Level, Series, bar_chart, line_chart, ticks

TEXT = "".join(f"def function_{i}(value):\n    return value + {i}\n" for i in range(400)).encode()


def numbers(**changes: Any) -> DemoResult:
    environment = {
        "machine": "A <fast> machine",
        "cpus": 2,
        "platform": "Linux",
        "cpu_capability": "avx2",
        "python": "3.11",
        "versions": {"torch": "2.13.0"},
        "git_commit": None,
    }
    data = {
        "is_stdlib": True,
        "source": "/lib",
        "held_out_names": ["a", "b"],
        "train_files": 700,
        "train_bytes": 10_000_000,
        "train_tokens": 3_000_000,
        "held_out_files": 2,
        "digest": "0" * 64,
        "vocab_size": 4096,
    }
    peers = [
        ("fastlm", 10_000.0, [0.1, 0.1], 50 << 20, None),
        ("plain PyTorch", 1000.0, [1.0, 1.1], 500 << 20, None),
        ("transformers-style step loop", 50.0, [20.0], 900 << 20, None),
    ]
    values: dict[str, Any] = {
        "quick": False,
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": 150.0,
        "command": "fastlm demo",
        "environment": environment,
        "preset": "demo",
        "parameters": 4_000_000,
        "dtype": "fp32",
        "threads": 2,
        "data": data,
        "train_tokens": 1_500_000,
        "train_steps": 366,
        "train_seconds": 100.0,
        "tokens_per_second": 15_000.0,
        "peak_memory_bytes": 700 << 20,
        "curve": [(4096 * i, 1.7 + 2.8 * math.exp(-i / 60)) for i in range(1, 367)],
        "held_out_curve": [(4096 * i, 1.8 + 2.8 * math.exp(-i / 60)) for i in range(0, 367, 40)],
        "bits_per_byte": 1.8,
        "held_out_bytes": 214_644,
        "compressors": [
            {"name": "gzip -9", "bits_per_byte": 2.149, "seen": "nothing else"},
            {"name": "xz -9e", "bits_per_byte": 1.911, "seen": "nothing else"},
        ],
        "batch": (2, 512),
        "peers": [
            {
                "name": name,
                "what": "how",
                "tokens_per_second": rate,
                "step_seconds": seconds,
                "loss": 4.0,
                "peak_bytes": peak,
                "problem": problem,
            }
            for name, rate, seconds, peak, problem in peers
        ],
        "samples": [{"prompt": "class A:", "text": "\n    <script>alert(1)</script> & more"}],
        "generation_tokens_per_second": 500.0,
    }
    return DemoResult.model_validate({**values, **changes})


# The page


class Reader(HTMLParser):
    """Collects tags and attributes, and checks that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself() -> None:
    page = render(numbers())
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    tags = {tag for tag, _ in reader.seen}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert not [attrs for _, attrs in reader.seen if {"src", "href"} & set(attrs)]
    assert "url(http" not in page
    assert "@import" not in page
    assert sum(tag == "svg" for tag, _ in reader.seen) == 3


def test_what_the_model_wrote_is_shown_as_text() -> None:
    page = render(numbers())
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert "A &lt;fast&gt; machine" in page


def test_both_colour_schemes_define_the_same_colours() -> None:
    page = render(numbers())
    light, dark = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    names = [set(re.findall(r"--(\w+):", block)) for block in (light, dark)]
    assert names[0] == names[1]
    used = set(re.findall(r"var\(--(\w+)\)", page))
    assert used <= names[0]


def test_every_number_that_counts_is_on_the_page() -> None:
    page = render(numbers())
    for shown in ("1.800", "2.149", "1.911", "15,000", "10.0×", "200.0×", "700 MiB", "214,644", "366 steps"):
        assert shown in page, shown


def test_a_contender_that_was_not_timed_is_shown_as_such() -> None:
    result = numbers()
    result.peers[1].tokens_per_second, result.peers[1].step_seconds = None, []
    result.peers[1].problem = "not timed: its loss is 5, fastlm's is 4"
    assert result.speed_up("plain PyTorch") is None
    page = render(result)
    assert "not timed: its loss is 5" in page
    assert any("not timed: its loss is 5" in line for line in result.caveats())
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    print_panel(result, Path("runs/demo/report.html"), console)
    assert "not timed" in console.export_text()


# Losses are told


def test_a_better_compressor_is_named_as_better() -> None:
    ahead = [line for line in numbers(bits_per_byte=2.0).caveats() if "is ahead of the model" in line]
    assert ahead == ["xz -9e is ahead of the model on the held-out text: 1.911 against 2.000 bits per byte."]
    assert not [line for line in numbers().caveats() if "is ahead of the model" in line]


def test_a_faster_or_smaller_contender_is_named() -> None:
    result = numbers()
    result.peers[1].tokens_per_second, result.peers[1].peak_bytes = 20_000.0, 1 << 20
    lines = result.caveats()
    assert "plain PyTorch trained faster than fastlm on this batch." in lines
    assert "plain PyTorch needed less memory for a step than fastlm." in lines
    assert result.speed_up("plain PyTorch") == 0.5


@pytest.mark.parametrize("width", [80, 140])
def test_the_panel_fits_the_terminal(width: int) -> None:
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    print_panel(numbers(), Path("runs/demo/report.html"), console)
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= width
    for word in (
        "1.800",
        "2.149",
        "10,000",
        "200.0×",
        "900 MiB",
        "transformers-style step loop",
        "report.html",
    ):
        assert word in shown


# Pictures


def test_pictures_are_well_formed_and_inside_their_frame() -> None:
    points = [(float(i), 5.0 / (i + 1)) for i in range(200)]
    chart = line_chart(
        [Series("a <b>", points, "own", dots=True)], [Level("gzip", 2.0)], x_label="x & y", y_label="bits"
    )
    root = ElementTree.fromstring(chart)
    assert root.get("viewBox") == "0 0 860 340"
    for circle in root.iter("circle"):
        assert 0 <= float(circle.get("cx", "")) <= 860
    bars = ElementTree.fromstring(bar_chart([Bar("x", 0.0, "0"), Bar("y", 3.0, "3", own=True)]))
    widths = [float(rect.get("width", "")) for rect in bars.iter("rect")]
    assert widths[0] < widths[1]
    assert line_chart([], [], x_label="", y_label="") == ""
    assert ElementTree.fromstring(bar_chart([])) is not None


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.4, 3.6), (0, 2_000_000), (5.0, 5.0)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert len(found) <= 7
    if high > low:
        assert len(found) >= 3


# Compressors


def test_compressors_are_what_they_say() -> None:
    found = {item.name: item.bits_per_byte for item in compress_held_out(TEXT)}
    assert found["gzip -9"] == 8 * len(gzip.compress(TEXT, 9, mtime=0)) / len(TEXT)
    assert found["xz -9e"] == 8 * len(lzma.compress(TEXT, preset=9 | lzma.PRESET_EXTREME)) / len(TEXT)


def test_training_text_in_front_helps_xz_and_is_not_counted() -> None:
    alone = next(item for item in compress_held_out(TEXT) if item.name == "xz -9e")
    primed = compress_after_training_text(TEXT[: len(TEXT) // 2] * 3, TEXT)
    assert primed is not None
    assert primed.bits_per_byte < 0.8 * alone.bits_per_byte
    unrelated = compress_after_training_text(bytes(range(256)) * 40, TEXT)
    assert unrelated is not None
    assert unrelated.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=0.25)
    assert compress_after_training_text(b"x" * (25 << 20), TEXT) is None
