"""Means, intervals, paired differences and tables of the runs of `bench.rho1`; from its record alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from bench.estimators_summary import by_seed, interval
from bench.rho1_noise import CLEAN, KINDS, MIXED
from bench.rho1_select import VARIANTS

LABELS = {
    "ce": "plain cross-entropy",
    **{f"slm_{k}": f"SLM, k = {k / 100}" for k in (40, 50, 60, 70, 80, 90)},
    "random_60": "random, k = 0.6",
    "oracle": "noise masked by its labels",
    "ref_loss_60": "low reference loss, k = 0.6",
    "intersection_60": "low loss and entropy of the reference, k = 0.6",
    "self_loss_60": "low loss of a model of the same text, k = 0.6",
    "self_intersection_60": "low loss and entropy of it, k = 0.6",
    "reference": "(the reference itself)",
    "continued_ce": "continued: plain cross-entropy",
    "continued_slm_60": "continued: SLM, k = 0.6",
    "continued_random_60": "continued: random, k = 0.6",
    "continued_reference": "continued: (the reference itself)",
    "reference_then_ce": "continued from the first reference: plain cross-entropy",
}
# Comparisons that do not involve plain cross-entropy, chosen before the experiment, after trials with one seed.
PAIRS = (
    ("slm_60", "random_60"),
    ("slm_60", "oracle"),
    ("slm_60", "ref_loss_60"),
    ("slm_60", "reference"),
    ("continued_slm_60", "continued_random_60"),
    ("continued_slm_60", "reference_then_ce"),
)
BEGIN, END = "<!-- tables: written by python -m bench.rho1 plot -->", "<!-- end of tables -->"


def base_of(variant: str) -> str:
    """The plain run that a variant is compared with."""
    return "continued_ce" if VARIANTS[variant].continued else "ce"


def variants_of(record: dict[str, Any]) -> list[str]:
    """Variants with runs, in the order of `LABELS`."""
    there = {found["variant"] for found in record["runs"]}
    return [variant for variant in LABELS if variant in there]


def paired(
    runs: list[dict[str, Any]],
    variant: str,
    base: str,
    value: Callable[[dict[str, Any], dict[str, Any]], float],
) -> list[float]:
    """`value(run, run of base)` for the seeds that both have."""
    ours, theirs = by_seed(runs, variant), by_seed(runs, base)
    return [value(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def less_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Final clean held-out bits per byte minus those of the other run; negative is better."""
    return float(ours["final"]["clean"]["bits"] - theirs["final"]["clean"]["bits"])


def steps_to(curve: list[dict[str, Any]], bits: float) -> float | None:
    """Steps until the watched clean loss is first at `bits`, between evaluations on a line; None: never."""
    before = None
    for point in curve:
        found = point["clean_bits"]
        if found <= bits:
            if before is None or before["clean_bits"] == found:
                return float(point["step"])
            share = (before["clean_bits"] - bits) / (before["clean_bits"] - found)
            return float(before["step"] + share * (point["step"] - before["step"]))
        before = point
    return None


def speed_up(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """How many times fewer tokens than `theirs` it took to reach its final watched clean loss.

    Below 1 where that was never reached: the share of its tokens at which `theirs` had our final loss.
    """
    steps = theirs["curve"][-1]["step"]
    reached = steps_to(ours["curve"], theirs["curve"][-1]["clean_bits"])
    if reached is not None:
        return steps / reached
    other = steps_to(theirs["curve"], ours["curve"][-1]["clean_bits"])
    assert other is not None  # theirs ends lower than ours
    return other / steps


def geometric(values: list[float]) -> tuple[float, float, float]:
    """Geometric mean and its 95 % interval: Student's t on logarithms."""
    mean, half = interval([math.log(value) for value in values])
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def last_quarter(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of the last quarter of training."""
    return curve[-max(1, len(curve) // 4) :]


def rates(points: list[dict[str, Any]], by: str) -> dict[str, float]:
    """Share of the eligible tokens that were selected.

    Args:
        points: of a curve.
        by: `token` or `document`, whose kind it is by; `mixed`: clean and noise tokens of mixed documents; `position`: the bucket.
    """
    eligible, selected = (_tally(points, which, by) for which in (0, 1))
    return {name: selected[name] / count for name, count in eligible.items() if count}


def _tally(points: list[dict[str, Any]], which: int, by: str) -> dict[str, int]:
    """Tokens by name: the eligible ones (0) or the selected ones (1)."""
    sums: dict[str, int] = {}
    for point in points:
        alone, mixed = point[("eligible", "selected")[which]]
        if by == "position":
            found = {str(bucket): count for bucket, count in enumerate(point["positions"][which])}
        elif by == "mixed":
            found = {"clean": mixed[CLEAN], "noise": sum(mixed) - mixed[CLEAN]}
        elif by == "document":
            found = dict(zip((*KINDS, MIXED), (*alone, sum(mixed)), strict=True))
        else:
            found = dict(zip(KINDS, map(sum, zip(alone, mixed, strict=True)), strict=True))
        for name, count in found.items():
            sums[name] = sums.get(name, 0) + count
    return sums


def noise_rate(points: list[dict[str, Any]]) -> float:
    """Share of the noise tokens that were selected."""
    eligible, selected = (_tally(points, which, "token") for which in (0, 1))
    clean = KINDS[CLEAN]
    return (sum(selected.values()) - selected[clean]) / (sum(eligible.values()) - eligible[clean])


def summary(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per variant."""
    rows = []
    for variant in variants_of(record):
        mine = [found for _, found in sorted(by_seed(record["runs"], variant).items())]
        row: dict[str, Any] = {"variant": variant, "seeds": len(mine), "parameters": mine[0]["parameters"]}
        row["bits"] = interval([found["final"]["clean"]["bits"] for found in mine])
        row["loss"] = interval([found["final"]["clean"]["loss"] for found in mine])
        row["noise_bits"] = interval([found["final"]["noise"]["bits"] for found in mine])
        base = base_of(variant)
        found = paired(record["runs"], variant, base, less_bits) if variant != base else []
        if found:
            row |= {"difference": interval(found), "pairs": len(found), "better": sum(x < 0 for x in found)}
            row["speed_up"] = geometric(paired(record["runs"], variant, base, speed_up))
        rows.append(row)
    return rows


def tables(record: dict[str, Any]) -> str:
    """All tables as Markdown."""
    parts = [_main_table(record), _pair_table(record), _rate_table(record), _loss_table(record)]
    return "\n\n".join(part for part in parts if part)


def with_tables(text: str, record: dict[str, Any]) -> str:
    """The page with its tables replaced.

    Raises:
        ValueError: the marks around the tables are not there.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"rho1_experiment.md: expected one {BEGIN!r} and after it one {END!r}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{tables(record)}\n\n{END}{rest.split(END)[1]}"


def _main_table(record: dict[str, Any]) -> str:
    lines = [
        "| which tokens have a loss | seeds | clean, bits per byte | minus plain, by seed | better in | clean, nats per token "
        "| tokens to plain's final loss: times fewer | noise, bits per byte |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in summary(record):
        shown = "difference" in row
        lines.append(
            _line(
                LABELS[row["variant"]],
                str(row["seeds"]),
                _number(*row["bits"]),
                _number(*row["difference"], sign="+") if shown else "",
                f"{row['better']} of {row['pairs']}" if shown else "",
                _number(*row["loss"]),
                _factor(*row["speed_up"]) if shown else "",
                _number(*row["noise_bits"]),
            )
        )
    return "\n".join(lines)


def _pair_table(record: dict[str, Any]) -> str:
    lines = ["| | minus | clean, bits per byte, by seed | better in |", "|---|---|--:|--:|"]
    for ours, theirs in PAIRS:
        found = paired(record["runs"], ours, theirs, less_bits)
        if found:
            better = f"{sum(x < 0 for x in found)} of {len(found)}"
            lines.append(_line(LABELS[ours], LABELS[theirs], _number(*interval(found), sign="+"), better))
    return "\n".join(lines) if len(lines) > 2 else ""


def _choosing(record: dict[str, Any]) -> list[str]:
    return [variant for variant in variants_of(record) if VARIANTS[variant].rule not in {"all", "oracle"}]


def _rate_table(record: dict[str, Any]) -> str:
    """Rows: variants; columns: documents of one kind, the tokens of mixed documents, all tokens."""
    names = (*KINDS, "mixed: clean", "mixed: noise", "all clean", "all noise")
    lines = [
        "| selected, last quarter of training | " + " | ".join(names) + " |",
        "|---|" + "--:|" * len(names),
    ]
    for variant in _choosing(record):
        points = [last_quarter(found["curve"]) for found in by_seed(record["runs"], variant).values()]
        documents, mixed, tokens = (
            [rates(each, by) for each in points] for by in ("document", "mixed", "token")
        )
        cells = [_share(documents, kind) for kind in KINDS]
        cells += [_share(mixed, name) for name in ("clean", "noise")]
        cells += [_share(tokens, "clean"), _share([{"noise": noise_rate(each)} for each in points], "noise")]
        lines.append(_line(LABELS[variant], *cells))
    return "\n".join(lines) if len(lines) > 2 else ""


def _loss_table(record: dict[str, Any]) -> str:
    """Losses and scores of selected and of other tokens."""
    parts = ("selected_loss", "unselected_loss", "selected_score", "unselected_score", "threshold")
    lines = [
        "| training tokens, last quarter | loss of selected | of the others | score of selected | of the others | threshold |",
        "|---|" + "--:|" * len(parts),
    ]
    for variant in _choosing(record):
        mine = by_seed(record["runs"], variant).values()
        cells = []
        for part in parts:
            found = [
                [point[part] for point in last_quarter(run["curve"]) if point[part] is not None]
                for run in mine
            ]
            means = [statistics.fmean(values) for values in found if values]
            cells.append(_number(*interval(means), digits=2) if means else "")
        lines.append(_line(LABELS[variant], *cells))
    return "\n".join(lines) if len(lines) > 2 else ""


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(mean: float, half: float, *, sign: str = "", digits: int = 4) -> str:
    return format(mean, f"{sign}.{digits}f") + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def _factor(mean: float, low: float, high: float) -> str:
    return f"{mean:.2f}" + ("" if math.isnan(low) else f" ({low:.2f} to {high:.2f})")


def _share(found: list[dict[str, float]], name: str) -> str:
    values = [each[name] for each in found if name in each]
    return f"{statistics.fmean(values):.0%}" if values else ""
