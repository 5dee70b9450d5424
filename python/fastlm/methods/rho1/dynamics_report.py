"""What `fastlm dynamics` writes: numbers as JSON, two pictures, and the text coloured by how each token's loss changed.

Pictures need the extra `fastlm[report]`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastlm.methods.rho1.dynamics import CLASSES, MEANINGS, LossHistory, TokenDynamics
from fastlm.methods.rho1.page import Picture, TokenDocument, write_token_page
from fastlm.training.atomic import new_folder, write_json
from fastlm.training.config import reason
from fastlm.training.errors import InputError

FORMAT = "fastlm-dynamics-1"
EXAMPLES = 4  # of each class
SHOWN_TOKENS = 3000  # of the page
SHORTEST_SHOWN = 40  # tokens of a document on the page
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#7A5195",
)  # told apart by colour-blind readers; markers differ, too
_MARKERS = ("o", "^", "s", "D")


def require_matplotlib() -> None:
    """Says what is missing before any work is done.

    Raises:
        ImportError: matplotlib is not installed; the text names the extra.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f"fastlm dynamics needs matplotlib: pip install 'fastlm[report]' ({error})"
        ) from error
    matplotlib.use("Agg")


def check_target(out: Path) -> None:
    """Raises InputError unless `out` is new or empty."""
    try:
        found = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    except OSError as error:
        raise InputError(f"--out: cannot use {out}: {reason(error)}") from error
    if found:
        raise InputError(f"--out: expected a new or empty folder, found {', '.join(found[:3])} in {out}")


def write_dynamics(out: Path, history: LossHistory, dynamics: TokenDynamics) -> dict[str, Any]:
    """Writes the folder of a report, whole or not at all.

    Args:
        out: new or empty folder: `dynamics.json`, `losses.npy` `(models, tokens)` float32, `tokens.npy` `(tokens,)` int64,
            `classes.png`, `examples.png`, `page.html`.
        history: the losses.
        dynamics: what `token_dynamics` made of them.

    Returns:
        summary: the content of `dynamics.json`.

    Raises:
        InputError: `out` holds something.
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    check_target(out)
    summary = summarize(history, dynamics)
    with new_folder(out) as folder:
        np.save(folder / "losses.npy", history.losses)
        np.save(folder / "tokens.npy", history.tokens)
        pictures = [
            Picture(
                "Mean loss of each class at each checkpoint, with its share of the tokens.",
                classes_picture(history, dynamics),
                "lines of the mean loss of the four classes over training",
            ),
            Picture(
                "Typical tokens of each class: those whose change is nearest to the median of their class.",
                examples_picture(history, dynamics),
                "loss curves of single tokens, four classes",
            ),
        ]
        for name, picture in zip(("classes.png", "examples.png"), pictures, strict=True):
            (folder / name).write_bytes(picture.png)
        write_json(folder / "dynamics.json", summary)
        write_token_page(
            folder / "page.html",
            _documents(history, dynamics),
            title="Token dynamics",
            lead=f"How the loss of {len(history.tokens):,} held-out tokens moved from {history.names[0]} to "
            f"{history.names[-1]}: orange rose, blue fell. Losses told are those of the last model.",
            score_name="change of loss",
            pictures=pictures,
        )
    return summary


def summarize(history: LossHistory, dynamics: TokenDynamics) -> dict[str, Any]:
    """All numbers but the losses themselves."""
    counts, shares = dynamics.counts, dynamics.shares
    examples = _examples(dynamics)
    return {
        "format": FORMAT,
        "models": list(history.names),
        "steps": None if history.steps is None else list(history.steps),
        "tokens": len(history.tokens),
        "threshold_nats": dynamics.threshold,
        "mean_loss": [round(float(value), 6) for value in history.losses.mean(1, dtype=np.float64)],
        "classes": {
            name: {
                "meaning": meaning,
                "tokens": counts[name],
                "share": round(shares[name], 6),
                "mean_loss": [
                    None if np.isnan(v) else round(float(v), 6) for v in dynamics.mean_loss[number]
                ],
                "examples": [_example(history, index) for index in examples[number]],
            }
            for number, (name, meaning) in enumerate(zip(CLASSES, MEANINGS, strict=True))
        },
    }


def _example(history: LossHistory, index: int) -> dict[str, Any]:
    return {
        "index": int(index),
        "before": _text(history, max(0, index - 6), index),
        "token": _text(history, index, index + 1),
        "losses": [round(float(value), 4) for value in history.losses[:, index]],
    }


def _text(history: LossHistory, start: int, stop: int) -> str:
    return b"".join(history.spelling[token] for token in history.tokens[start:stop]).decode(
        "utf-8", "replace"
    )


def _examples(dynamics: TokenDynamics) -> list[npt.NDArray[np.int64]]:
    """Indices of the most typical tokens of each class."""
    found = []
    for number in range(len(CLASSES)):
        members = np.flatnonzero(dynamics.classes == number)
        if len(members):
            distance = np.abs(dynamics.change[members] - np.median(dynamics.change[members]))
            members = members[np.argsort(distance, kind="stable")[:EXAMPLES]]
        found.append(members)
    return found


def _documents(history: LossHistory, dynamics: TokenDynamics) -> list[TokenDocument]:
    """The first documents that are long enough to read, up to `SHOWN_TOKENS` tokens."""
    shown: list[TokenDocument] = []
    left = SHOWN_TOKENS
    longest_first = sorted(range(len(history.documents)), key=lambda i: -_length(history, i))
    long = [
        i for i in range(len(history.documents)) if _length(history, i) >= SHORTEST_SHOWN
    ] or longest_first[:1]
    for number in long:
        if left <= 0:
            break
        first, stop = history.documents[number]
        stop = min(stop, first + left)
        tokens = [history.before[number], *history.tokens[first:stop].tolist()]
        shown.append(
            TokenDocument.of_predictions(
                f"document {number + 1}",
                [history.spelling[token] for token in tokens],
                dynamics.change[first:stop],
                loss=history.losses[-1, first:stop],
                notes=[
                    f"{CLASSES[dynamics.classes[i]]} from {history.losses[0, i]:.2f} to {history.losses[-1, i]:.2f}"
                    for i in range(first, stop)
                ],
            )
        )
        left -= stop - first
    return shown


def _length(history: LossHistory, document: int) -> int:
    first, stop = history.documents[document]
    return stop - first


# Pictures


def _axis(history: LossHistory) -> tuple[npt.NDArray[np.float64], str]:
    if history.steps is None:
        return np.arange(1, len(history.names) + 1, dtype=np.float64), "model"
    return np.asarray(history.steps, np.float64), "step"


def classes_picture(history: LossHistory, dynamics: TokenDynamics) -> bytes:
    """Mean loss of each class over training, as PNG."""
    require_matplotlib()
    from matplotlib import pyplot

    x, label = _axis(history)
    figure, axes = pyplot.subplots(figsize=(7.6, 4.2), layout="constrained")
    for number, name in enumerate(CLASSES):
        share = dynamics.shares[name]
        if share > 0:
            axes.plot(
                x,
                dynamics.mean_loss[number],
                color=_COLOURS[number],
                marker=_MARKERS[number],
                markersize=5,
                label=f"{name} {MEANINGS[number]}: {share:.1%}",
            )
    axes.plot(x, history.losses.mean(1), color="#888888", linestyle="--", linewidth=1.2, label="all tokens")
    axes.set_xlabel(label)
    axes.set_ylabel("loss, nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def examples_picture(history: LossHistory, dynamics: TokenDynamics) -> bytes:
    """Curves of a few tokens of each class, as PNG."""
    require_matplotlib()
    from matplotlib import pyplot

    x, label = _axis(history)
    figure, grid = pyplot.subplots(2, 2, figsize=(9.6, 6.0), layout="constrained", sharex=True)
    for number, (axes, indices) in enumerate(zip(grid.flat, _examples(dynamics), strict=True)):
        axes.set_title(f"{CLASSES[number]}  {MEANINGS[number]}", fontsize=10, loc="left")
        for rank, index in enumerate(indices):
            axes.plot(
                x,
                history.losses[:, index],
                color=_COLOURS[number],
                alpha=1 - 0.18 * rank,
                marker=_MARKERS[rank],
                markersize=4,
                linewidth=1.2,
                label=_caption(history, int(index)),
            )
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(indices):
            axes.legend(frameon=False, fontsize=7.5, prop={"family": "monospace", "size": 7})
    for axes in grid[1]:
        axes.set_xlabel(label)
    for axes in grid[:, 0]:
        axes.set_ylabel("loss, nats")
    return _png(figure)


def _caption(history: LossHistory, index: int) -> str:
    """The token in brackets, after a little of what stands before it."""
    before = repr(_text(history, max(0, index - 4), index))[1:-1][-18:]
    token = repr(_text(history, index, index + 1))[1:-1]
    return f"{before}[{token}]".replace("$", r"\$")  # no formulas


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()
