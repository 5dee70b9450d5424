"""Pictures of `bench.estimators`; made from its record alone."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from bench.estimators_summary import by_seed, differences, interval

LABELS = {
    "v2": "v2 (GRIN)",
    "topk": "top-k, as GShard",
    "v2_star": "v2*",
    "v1": "v1",
    "v2_straight_through": "v2, straight-through experts",
    "v2_wide": "v2, r = 0.1",
    "v2_no_balance": "v2, no load-balance loss",
    "dense": "dense, equal active size",
}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _variants(record: dict[str, Any]) -> list[str]:
    return [row["variant"] for row in record["summary"]]


def _colours(record: dict[str, Any]) -> dict[str, Any]:
    return {variant: f"C{i}" for i, variant in enumerate(_variants(record))}


def _spelled(name: str) -> str:
    """A token for an axis: a long run of blanks as its number."""
    text = ast.literal_eval(name.split(" ", 1)[1])
    blanks = len(text) - len(text.rstrip(" "))
    return repr(text) if blanks < 2 else f"{text.rstrip(' ')!r} + {blanks} blanks"


def curves(record: dict[str, Any], path: Path) -> None:
    """Held-out bits per byte over training with 95 % bands, and the final differences to v2 seed by seed."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), width_ratios=(1.25, 1))
    colours, runs = _colours(record), record["runs"]
    for variant in _variants(record):
        mine = by_seed(runs, variant)
        points = list(zip(*(run["curve"] for run in mine.values()), strict=True))
        x = [point[0]["step"] * record["sizes"]["batch_tokens"] / 1e6 for point in points]
        both = [interval([run["bits"] for run in point]) for point in points]
        mean, half = zip(*both, strict=True)
        dashes = {"ls": "--"} if variant == "dense" else {}
        left.plot(x, mean, color=colours[variant], label=LABELS.get(variant, variant), lw=1.4, **dashes)
        low, high = ([m + s * h for m, h in both] for s in (-1, 1))
        left.fill_between(x, low, high, color=colours[variant], alpha=0.12, lw=0)
    # The first stretch falls so far that nothing else could be seen beside it.
    shown = [point["bits"] for run in runs for point in run["curve"][len(run["curve"]) // 4 :]]
    left.set(
        xlabel="tokens of training (millions)",
        ylabel="bits per byte, watched part of the held-out text",
        ylim=(min(shown) - 0.03, max(shown) + 0.03),
    )
    left.legend(fontsize=8)
    left.grid(alpha=0.3)

    others = [variant for variant in _variants(record) if variant != "v2"]
    for place, variant in enumerate(others):
        values = differences(runs, variant, "v2")
        mean, half = interval(values)
        right.errorbar(mean, place, xerr=half, fmt="o", color=colours[variant], capsize=4)
        right.plot(values, [place - 0.22] * len(values), "|", color=colours[variant], ms=8, alpha=0.8)
    right.axvline(0, color="gray", lw=1)
    right.set_yticks(range(len(others)), [LABELS.get(variant, variant) for variant in others], fontsize=8)
    right.invert_yaxis()
    right.set_xlabel(
        "final bits per byte minus those of v2 with the same seed\n(mean, 95 %; ticks: seeds; left: better)"
    )
    right.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def loads(record: dict[str, Any], path: Path) -> None:
    """Load of each expert at the end, with and without the load-balance loss, and the largest load over training."""
    pyplot = _pyplot()
    runs, colours = record["runs"], _colours(record)
    routed = [v for v in _variants(record) if "load" in next(iter(by_seed(runs, v).values()))["curve"][-1]]
    bars = [variant for variant in ("v2", "v2_no_balance") if variant in routed]
    layers = len(by_seed(runs, routed[0])[min(by_seed(runs, routed[0]))]["curve"][-1]["load"])
    even = 1 / record["sizes"]["num_experts"]
    figure, axes = pyplot.subplots(2, layers, figsize=(5.5 * layers, 6.6), squeeze=False, sharey="row")
    for layer in range(layers):
        top, bottom = axes[0][layer], axes[1][layer]
        for k, variant in enumerate(bars):
            # Experts have no names that seeds share: the busiest comes first in each.
            sorted_loads = [
                sorted(run["curve"][-1]["load"][layer], reverse=True)
                for run in by_seed(runs, variant).values()
            ]
            both = [interval(values) for values in zip(*sorted_loads, strict=True)]
            x = [i + 1 + (k - 0.5) * 0.4 for i in range(len(both))]
            top.bar(x, [m for m, _ in both], 0.38, color=colours[variant], alpha=0.75, label=LABELS[variant])
            for values in sorted_loads:
                top.plot(x, values, ".", color="black", ms=3)
        top.set(title=f"layer {layer + 1}", xlabel="expert, busiest first (dots: seeds)")
        for variant in routed:
            points = list(zip(*(run["curve"] for run in by_seed(runs, variant).values()), strict=True))
            x = [point[0]["step"] * record["sizes"]["batch_tokens"] / 1e6 for point in points]
            both = [interval([max(run["load"][layer]) for run in point]) for point in points]
            bottom.plot(x, [m for m, _ in both], color=colours[variant], label=LABELS[variant], lw=1.4)
            low, high = ([m + s * h for m, h in both] for s in (-1, 1))
            bottom.fill_between(x, low, high, color=colours[variant], alpha=0.1, lw=0)
        bottom.set(xlabel="tokens of training (millions)")
        for axis in (top, bottom):
            axis.axhline(even, color="gray", ls=":", lw=1)
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of picks, end of training")
    axes[1][0].set_ylabel("largest share (dotted: even)")
    axes[0][0].legend(fontsize=8)
    axes[1][0].legend(fontsize=7, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def affinities(record: dict[str, Any], path: Path, variant: str = "v2") -> None:
    """Where kinds of tokens and the most frequent tokens went, in the first run of a variant."""
    from bench.estimators_text import KINDS

    pyplot = _pyplot()
    mine = by_seed(record["runs"], variant)
    found = mine[min(mine)]["affinity"]
    kinds = [kind for kind in KINDS if kind in found["kinds"]]
    layers = len(found["kinds"][kinds[0]]["experts"])
    figure, axes = pyplot.subplots(
        2,
        layers,
        figsize=(4.3 * layers + 1.5, 8.6),
        height_ratios=(len(kinds), len(found["tokens"])),
        squeeze=False,
    )
    largest = max(
        x for part in found.values() for entry in part.values() for row in entry["experts"] for x in row
    )
    for layer in range(layers):
        for axis, (names, part) in zip(
            axes[:, layer], ((kinds, "kinds"), (list(found["tokens"]), "tokens")), strict=True
        ):
            shares = [found[part][name]["experts"][layer] for name in names]
            image = axis.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=largest)
            axis.set_xticks(range(len(shares[0])), [str(i + 1) for i in range(len(shares[0]))], fontsize=8)
            labels = [
                f"{name if part == 'kinds' else _spelled(name)}  {found[part][name]['share']:.1%}"
                for name in names
            ]
            axis.set_yticks(range(len(names)), labels if layer == 0 else [""] * len(names), fontsize=8)
        axes[0, layer].set_title(f"layer {layer + 1}")
        axes[1, layer].set_xlabel("expert")
    figure.tight_layout()
    figure.colorbar(
        image, ax=axes, label="share of the token's picks (even: 1 / experts)", fraction=0.03, pad=0.02
    )
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
