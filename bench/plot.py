"""Draws a record as a PNG: per case, how long each contender takes relative to fastlm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .figures import duration, main_row, spread

_OURS, _PEER = "#1f77b4", "#a0a0a0"


def bars(
    record: Mapping[str, Any], clock: str = "wall"
) -> list[tuple[str, list[tuple[str, float, float, bool]]]]:
    """What is drawn: per case a title and `(contender, median seconds, ratio to fastlm, ours)`."""
    groups = []
    for result in record["results"]:
        own = main_row(result)
        mine = None if own is None else spread(own, clock)
        if mine is None:
            continue
        rows = []
        for row in result["contenders"]:
            times = spread(row, clock)
            if times is not None:
                rows.append((row["name"], times.median, times.median / mine.median, bool(row["ours"])))
        if len(rows) > 1:
            groups.append((f"{result['op']} {result['case']} {result['dtype']}: {result['part']}", rows))
    return groups


def plot(record: Mapping[str, Any], path: str | Path, clock: str = "wall") -> Path:
    """Writes the picture.

    Raises:
        ImportError: matplotlib is missing; the text names the extra.
        ValueError: no case has fastlm and a peer.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("bench plot needs matplotlib: pip install 'fastlm[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    groups = bars(record, clock)
    if not groups:
        raise ValueError("bench plot: the record must hold a case with fastlm and a peer, got none")
    heights = [len(rows) + 1.2 for _, rows in groups]
    inches = 0.28 * sum(heights) + 1
    figure, axes = pyplot.subplots(
        len(groups),
        1,
        figsize=(9, inches),
        sharex=True,
        squeeze=False,
        height_ratios=heights,
    )
    for axis, (title, rows) in zip(axes[:, 0], groups, strict=True):
        for position, (_, seconds, ratio, ours) in enumerate(rows):
            color = _OURS if ours else _PEER
            axis.hlines(position, min(1, ratio), max(1, ratio), color=color, linewidth=4)
            axis.plot(ratio, position, "o", color=color, markersize=6)
            axis.text(
                max(1, ratio), position, f"   {duration(seconds)} ({ratio:.2g}x)", va="center", fontsize=6
            )
        axis.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=7)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}x"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.axvline(1, color="black", linewidth=0.6)
        axis.set_title(title, fontsize=8, loc="left", pad=2)
        axis.margins(x=0.25, y=0.25)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(
        "time over fastlm's (log scale; right of the line: slower than fastlm)", fontsize=8
    )
    threads = record["settings"]["threads"]
    words = (
        record["machine"]["cpu"],
        f"{threads} thread(s)",
        record["software"]["cpu_level"],
        f"{clock} clock",
    )
    figure.suptitle(", ".join(words), fontsize=9, y=1 - 0.15 / inches)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / inches))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
