"""How well a trained model predicts held-out text far beyond the length it was trained at.

    fastlm train samba --preset demo --minutes 2 --seq-len 512 --out runs/first
    python -m bench.loss_by_length runs/first --json out.json --plot out.png

The held-out documents are laid end to end, as they come, and cut into streams. Every stream is read twice: by one model state from
its first token to its last, and with a fresh state every time the trained length is reached. Losses are averaged over streams in bins
of positions that double in length, and compared token by token: texts differ more than lengths do. A model that falls apart beyond
its training length shows a rise above the restarted one; the band is two standard errors of the difference over pieces of the trained
length.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CHUNK = 2048  # tokens of a pass


@torch.no_grad()
def stream_losses(model: Any, ids: Tensor) -> Tensor:
    """Loss in nats of each token of `ids (R, L)` given all before it, `(R, L - 1)`."""
    cache = model.new_cache(ids.shape[0])
    found = []
    for start in range(0, ids.shape[1] - 1, _CHUNK):
        piece = ids[:, start : start + _CHUNK + 1]
        hidden = model.model(piece[:, :-1], cache)
        losses = model.loss(hidden, shift_labels=piece[:, 1:], reduction="none")
        found.append(losses.view(ids.shape[0], -1))
    return torch.cat(found, dim=1)


def measure(run: Path, trained: int, longest: int, most_streams: int) -> dict[str, Any]:
    """Loss per bin of positions, in bits per token."""
    from fastlm.training.data import open_data
    from fastlm.training.loading import load_run

    model, store = load_run(run).model, open_data(run / "data").held_out
    documents = [torch.from_numpy(store.tokens(i, 0, 1 << 62)) for i in range(store.num_documents)]
    tokens = torch.cat(documents)
    count = min(most_streams, tokens.numel() // longest)
    if count < 2:
        raise ValueError(f"{run}: expected at least {2 * longest} held-out tokens, got {tokens.numel()}")
    ids = tokens[: count * longest].view(count, longest)
    through = stream_losses(model, ids) / math.log(2)
    pieces = ids.unfold(1, trained + 1, trained).flatten(
        0, 1
    )  # each piece begins with the token before its first
    restarted = stream_losses(model, pieces).view(count, -1) / math.log(2)
    rows, begin, end = [], 0, trained
    while begin < restarted.shape[1]:
        both = [t[:, begin : min(end, restarted.shape[1])].double().mean(dim=1) for t in (through, restarted)]
        difference = (through - restarted)[:, begin : min(end, restarted.shape[1])]
        by_piece = difference.double().unflatten(1, (-1, trained)).mean(dim=2).flatten()
        rows.append(
            {
                "begin": begin,
                "end": end,
                "bits": both[0].mean().item(),
                "restarted_bits": both[1].mean().item(),
                "difference": by_piece.mean().item(),
                "error": by_piece.std().item() / math.sqrt(by_piece.numel()),
            }
        )
        begin, end = end, 2 * end
    return {"trained_length": trained, "window": model.config.sliding_window, "streams": count, "rows": rows}


def plot(record: dict[str, Any], path: Path) -> None:
    """Difference to the restarted model against position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.6))
    rows = record["rows"]
    edges = [max(row["begin"], record["trained_length"] / 2) for row in rows]
    middle = [math.sqrt(begin * row["end"]) for begin, row in zip(edges, rows, strict=True)]
    mean = [row["difference"] for row in rows]
    axis.axhline(0, color="gray", lw=1, label=f"fresh state every {record['trained_length']} tokens")
    axis.plot(middle, mean, marker="o", label="one state through the whole stream")
    axis.fill_between(
        middle,
        [m - 2 * row["error"] for m, row in zip(mean, rows, strict=True)],
        [m + 2 * row["error"] for m, row in zip(mean, rows, strict=True)],
        alpha=0.2,
    )
    axis.axvline(record["trained_length"], ls=":", color="gray")
    axis.set(
        xscale="log", xlabel="position (tokens; dotted: trained length)", ylabel="bits per token, difference"
    )
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--trained", type=int, default=512, help="the --seq-len of the run")
    parser.add_argument("--longest", type=int, default=512 * 64 + 1)
    parser.add_argument("--streams", type=int, default=24)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    record = measure(options.run, options.trained, options.longest, options.streams)
    for row in record["rows"]:
        print(
            f"{row['begin']:>7,} to {row['end']:>7,}: {row['bits']:.3f} bits per token, restarted "
            f"{row['restarted_bits']:.3f}, difference {row['difference']:+.3f} +-{2 * row['error']:.3f}"
        )
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(record, options.plot)


if __name__ == "__main__":
    main()
