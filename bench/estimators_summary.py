"""Means, intervals and paired differences of the runs of `bench.estimators`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (
    12.7062,
    4.3027,
    3.1824,
    2.7764,
    2.5706,
    2.4469,
    2.3646,
    2.3060,
    2.2622,
    2.2281,
    2.2010,
    2.1788,
    2.1604,
    2.1448,
    2.1314,
)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t); the half width of one value is not a number."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, _T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def by_seed(runs: list[dict[str, Any]], variant: str) -> dict[int, dict[str, Any]]:
    """The runs of a variant."""
    return {run["seed"]: run for run in runs if run["variant"] == variant}


def differences(runs: list[dict[str, Any]], variant: str, base: str) -> list[float]:
    """Final bits per byte minus those of `base`, for the seeds that both have."""
    ours, theirs = by_seed(runs, variant), by_seed(runs, base)
    return [ours[seed]["bits"] - theirs[seed]["bits"] for seed in sorted(ours.keys() & theirs.keys())]


def summary(runs: list[dict[str, Any]], base: str) -> list[dict[str, Any]]:
    """One row per variant, in the order of the runs; routing figures are of the last stretch of training, over seeds."""
    rows = []
    for variant in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for _, run in sorted(by_seed(runs, variant).items())]
        mean, half = interval([run["bits"] for run in mine])
        row: dict[str, Any] = {
            "variant": variant,
            "seeds": len(mine),
            "parameters": mine[0]["parameters"],
            "bits": _rounded(mean),
            "half": _rounded(half),
        }
        paired = differences(runs, variant, base)
        if variant != base and paired:
            mean, half = interval(paired)
            row |= {
                "difference": _rounded(mean),
                "difference_half": _rounded(half),
                "pairs": len(paired),
                "wins": sum(d < 0 for d in paired),
            }
        last = [run["curve"][-1] for run in mine]
        if "load" in last[0]:
            layers = range(len(last[0]["load"]))
            row["max_load"] = [_rounded(statistics.fmean(max(x["load"][i]) for x in last)) for i in layers]
            row["min_load"] = [_rounded(statistics.fmean(min(x["load"][i]) for x in last)) for i in layers]
            for name in ("entropy", "unlikely", "rivals"):
                row[name] = [_rounded(statistics.fmean(x[name][i] for x in last)) for i in layers]
            told = [[information(run["affinity"]["kinds"], i) for i in layers] for run in mine]
            row["information"] = [_rounded(statistics.fmean(x[i] for x in told)) for i in layers]
        rows.append(row)
    return rows


def information(kinds: dict[str, Any], layer: int) -> float:
    """Bits that the kind of a token tells about the expert of a pick (mutual information)."""
    shares = [entry["share"] for entry in kinds.values()]
    rows = [entry["experts"][layer] for entry in kinds.values()]
    overall = [
        sum(share * row[e] for share, row in zip(shares, rows, strict=True)) for e in range(len(rows[0]))
    ]
    return sum(
        share * p * math.log2(p / q)
        for share, row in zip(shares, rows, strict=True)
        for p, q in zip(row, overall, strict=True)
        if p > 0
    )


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 5)


def table(rows: list[dict[str, Any]]) -> str:
    """The summary as Markdown."""
    lines = [
        "| variant | seeds | bits per byte | minus v2, by seed | max load | entropy, bits | not the likeliest | with a rival "
        "| kind tells |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [row["variant"], str(row["seeds"]), _with_interval(row["bits"], row["half"], "")]
        shown = "difference" in row
        cells.append(_with_interval(row["difference"], row["difference_half"], "+") if shown else "")
        for name, form in (
            ("max_load", ".3f"),
            ("entropy", ".2f"),
            ("unlikely", ".1%"),
            ("rivals", ".1%"),
            ("information", ".2f"),
        ):
            cells.append(", ".join(format(x, form) for x in row.get(name, [])))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _with_interval(value: float, half: float | None, sign: str) -> str:
    return format(value, sign + ".4f") + ("" if half is None else f" ± {half:.4f}")
