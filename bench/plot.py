"""Draws a record as a PNG: per case, how long each contender takes relative to fastlm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .figures import duration, main_row, spread

_OURS, _PEER = "#1f77b4", "#b0b0b0"


def bars(record: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, float, float, bool]]]]:
    """What is drawn: per case a title and `(contender, median seconds, ratio to fastlm, ours)`."""
    groups = []
    for result in record["results"]:
        own = main_row(result)
        mine = None if own is None else spread(own)
        if mine is None:
            continue
        rows = []
        for row in result["contenders"]:
            times = spread(row)
            if times is not None:
                rows.append((row["name"], times.median, times.median / mine.median, bool(row["ours"])))
        if len(rows) > 1:
            groups.append((f"{result['op']} {result['case']} {result['dtype']}: {result['part']}", rows))
    return groups


def plot(record: Mapping[str, Any], path: str | Path) -> Path:
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
    from matplotlib import pyplot

    groups = bars(record)
    if not groups:
        raise ValueError("bench plot: the record must hold a case with fastlm and a peer, got none")
    heights = [len(rows) + 1.2 for _, rows in groups]
    figure, axes = pyplot.subplots(
        len(groups),
        1,
        figsize=(9, 0.28 * sum(heights) + 1),
        sharex=True,
        squeeze=False,
        height_ratios=heights,
    )
    for axis, (title, rows) in zip(axes[:, 0], groups, strict=True):
        positions = range(len(rows))
        axis.barh(positions, [row[2] for row in rows], color=[_OURS if row[3] else _PEER for row in rows])
        axis.set_yticks(positions, [row[0] for row in rows], fontsize=7)
        for position, (_, seconds, ratio, _) in zip(positions, rows, strict=True):
            axis.text(ratio, position, f" {duration(seconds)} ({ratio:.2g}x)", va="center", fontsize=6)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.axvline(1, color="black", linewidth=0.6)
        axis.set_title(title, fontsize=8, loc="left", pad=2)
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(
        "time relative to fastlm (log scale; right of the line: slower than fastlm)", fontsize=8
    )
    settings = record["settings"]
    figure.suptitle(
        f"{record['machine']['cpu']}, {settings['threads']} threads, {record['software']['cpu_level']}",
        fontsize=9,
    )
    figure.tight_layout()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
