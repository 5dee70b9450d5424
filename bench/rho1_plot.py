"""Pictures of `bench.rho1`; made from its record alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import estimators_summary
from bench.estimators_summary import by_seed
from bench.rho1_noise import KINDS
from bench.rho1_select import BUCKETS, SHOWN, VARIANTS
from bench.rho1_summary import (
    LABELS,
    base_of,
    last_quarter,
    less_bits,
    noise_rate,
    paired,
    rates,
    variants_of,
)

DRAWN = ("ce", "slm_60", "random_60", "oracle", "ref_loss_60", "reference")  # as curves


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def interval(values: Sequence[float | None]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval of the seeds that have a value; without any not a number."""
    there = [value for value in values if value is not None]
    return estimators_summary.interval(there) if there else (math.nan, math.nan)


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _millions(record: dict[str, Any], points: list[Any]) -> list[float]:
    return [point[0]["step"] * record["sizes"]["batch_tokens"] / 1e6 for point in points]


def _band(axis: Any, x: list[float], values: Sequence[Sequence[float | None]], **style: Any) -> None:
    """Mean over seeds with its 95 % interval."""
    both = [interval(found) for found in values]
    (line,) = axis.plot(x, [mean for mean, _ in both], lw=1.4, **style)
    low, high = ([mean + sign * half for mean, half in both] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.12, lw=0)


def _points(record: dict[str, Any], variant: str) -> list[Any]:
    """Evaluations of a variant, each over seeds."""
    return list(zip(*(found["curve"] for found in by_seed(record["runs"], variant).values()), strict=True))


def curves(record: dict[str, Any], path: Path) -> None:
    """Clean held-out loss over training, and final differences to plain cross-entropy seed by seed."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.4), width_ratios=(1.15, 1))
    there = variants_of(record)
    shown = []
    for place, variant in enumerate(name for name in DRAWN if name in there):
        points = _points(record, variant)
        values = [[found["clean_bits"] for found in point] for point in points]
        shown += [x for found in values[len(values) // 4 :] for x in found]
        dashes = "--" if variant == "reference" else "-"
        _band(left, _millions(record, points), values, color=f"C{place}", label=LABELS[variant], ls=dashes)
    left.set(
        xlabel="tokens of training (millions)",
        ylabel="bits per byte, watched part of the clean held-out text",
    )
    if shown:  # the first stretch falls so far that nothing else could be seen beside it
        left.set_ylim(min(shown) - 0.03, max(shown) + 0.03)
        left.legend(fontsize=8)
    left.grid(alpha=0.3)
    others = [variant for variant in there if paired(record["runs"], variant, base_of(variant), less_bits)]
    others = [variant for variant in others if variant != base_of(variant)]
    for place, variant in enumerate(others):
        values = paired(record["runs"], variant, base_of(variant), less_bits)
        mean, half = interval(values)
        right.errorbar(mean, place, xerr=half, fmt="o", color="C0", capsize=4)
        right.plot(values, [place - 0.25] * len(values), "|", color="C0", ms=8, alpha=0.8)
    right.axvline(0, color="gray", lw=1)
    right.set_yticks(range(len(others)), [LABELS[variant] for variant in others], fontsize=8)
    right.invert_yaxis()
    right.set_xlabel(
        "final clean bits per byte minus those of plain cross-entropy\nwith the same seed (mean, 95 %; ticks: seeds; left: better)"
    )
    right.grid(alpha=0.3, axis="x")
    _save(pyplot, figure, path)


def k_sweep(record: dict[str, Any], path: Path) -> None:
    """Difference to plain cross-entropy, and what was selected, over the share kept."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    swept = sorted((v for v in variants_of(record) if v.startswith("slm_")), key=lambda v: VARIANTS[v].keep)
    swept = [variant for variant in swept if paired(record["runs"], variant, "ce", less_bits)]
    keeps = [VARIANTS[variant].keep for variant in swept]
    both = [interval(paired(record["runs"], variant, "ce", less_bits)) for variant in swept]
    left.errorbar(
        [*keeps, 1.0], [*(m for m, _ in both), 0.0], yerr=[*(h for _, h in both), 0.0], fmt="o-", capsize=4
    )
    for variant, keep in zip(swept, keeps, strict=True):
        values = paired(record["runs"], variant, "ce", less_bits)
        left.plot([keep] * len(values), values, "_", color="C0", alpha=0.6)
    left.axhline(0, color="gray", lw=1)
    left.set(
        xlabel="k, share of tokens with a loss (1: plain)",
        ylabel="final clean bits per byte minus plain, 95 %",
    )
    for name, of in (
        ("clean tokens", lambda points: rates(points, "token")["clean"]),
        ("noise tokens", noise_rate),
    ):
        values = [
            [of(last_quarter(found["curve"])) for found in by_seed(record["runs"], variant).values()]
            for variant in swept
        ]
        _band(right, keeps, values, marker="o", label=name)
    right.plot([0, 1], [0, 1], color="gray", ls=":", lw=1, label="no preference")
    right.set(xlabel="k", ylabel="share selected, last quarter of training", xlim=(0.35, 1), ylim=(0, 1))
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    _save(pyplot, figure, path)


def selection(record: dict[str, Any], path: Path, variant: str = SHOWN) -> None:
    """What a variant selected over training: by kind of token and document, by position; losses of selected and other tokens."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 8.6))
    keep = VARIANTS[variant].keep
    mine = by_seed(record["runs"], variant)
    if mine:
        points = _points(record, variant)
        x = _millions(record, points)
        for kind in KINDS:
            values = [[rates([found], "token").get(kind) for found in point] for point in points]
            style = {"color": "black", "lw": 2.2} if kind == "clean" else {}
            axes[0][0].plot(x, [interval(found)[0] for found in values], label=kind, **style)
        for name in ("selected_loss", "unselected_loss"):
            values = [[found[name] for found in point] for point in points]
            _band(axes[1][0], x, values, label=name.replace("_loss", " tokens"))
        ends = {seed: last_quarter(found["curve"]) for seed, found in mine.items()}
        bars = [("token", kind) for kind in KINDS] + [("mixed", "clean"), ("mixed", "noise")]
        names = [
            *(f"{kind} tokens" for kind in KINDS),
            "clean in mixed documents",
            "noise in mixed documents",
        ]
        for place, (by, kind) in enumerate(bars):
            values = [found[kind] for found in (rates(end, by) for end in ends.values()) if kind in found]
            if values:
                mean, half = interval(values)
                axes[0][1].barh(
                    place, mean, 0.7, xerr=half, color="black" if kind == "clean" else "C1", alpha=0.7
                )
        axes[0][1].set_yticks(range(len(bars)), names, fontsize=8)
        axes[0][1].invert_yaxis()
        buckets = [bucket for bucket in BUCKETS if bucket < record["sizes"]["seq_len"]]
        for place in range(len(buckets)):
            values = [rates(end, "position").get(str(place)) for end in ends.values()]
            mean, half = interval(values)
            axes[1][1].errorbar(place, mean, yerr=half, fmt="o", color="C0", capsize=4)
        stops = [f"{stop - 1}" for stop in (*buckets[1:], record["sizes"]["seq_len"])]
        spans = [f"{a}" if str(a) == b else f"{a} to {b}" for a, b in zip(buckets, stops, strict=True)]
        axes[1][1].set_xticks(range(len(buckets)), spans)
        axes[0][0].legend(fontsize=7, ncol=4, loc="upper center")
        axes[1][0].legend(fontsize=8)
    axes[0][0].axhline(keep, color="gray", ls=":", lw=1)
    axes[0][1].axvline(keep, color="gray", ls=":", lw=1)
    axes[1][1].axhline(keep, color="gray", ls=":", lw=1)
    axes[0][0].set(
        xlabel="tokens of training (millions)", ylabel="share selected (dotted: k)", ylim=(0, 1.15)
    )
    axes[0][0].set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes[0][1].set(xlabel="share selected, last quarter of training", xlim=(0, 1))
    axes[1][0].set(xlabel="tokens of training (millions)", ylabel="training loss, nats per token")
    axes[1][1].set(
        xlabel="position in its piece of the token before", ylabel="share selected, last quarter", ylim=(0, 1)
    )
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.suptitle(LABELS[variant])
    _save(pyplot, figure, path)
