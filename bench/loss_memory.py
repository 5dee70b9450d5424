"""Memory of a loss over a large vocabulary, forward and backward, against the number of tokens.

    python -m bench.loss_memory --json out.json --plot out.png

Each point runs in a process of its own. Memory is the largest resident set during one call minus the one before and minus the
gradients of hidden states and weight, with an allocator that gives freed blocks back at once (see `bench.memory`). Stored logits and
PyTorch's chunks stop where a call would take too much memory or time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

OURS, SELECTIVE = "fastlm, every token", "fastlm, 60 % of the tokens"
STORED, CHUNKS = "logits stored", "F.linear_cross_entropy, chunks"
MOST_TOKENS = {OURS: 8192, SELECTIVE: 8192, STORED: 4096, CHUNKS: 1024}
HIDDEN = 1024


def measure(contender: str, tokens: int, vocab: int) -> int:
    """Extra bytes of one call, in this process; bfloat16."""
    import torch
    from torch import Tensor, nn
    from torch.nn import functional

    from bench.cases.slm_loss import eager
    from bench.memory import peak_of
    from fastlm import ops

    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, HIDDEN) / HIDDEN**0.5).bfloat16().requires_grad_()
    labels, ref_nll = torch.randint(vocab, (tokens,)), torch.rand(tokens)
    losses: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: ops.linear_cross_entropy(hidden, weight, labels),
        SELECTIVE: lambda: ops.slm_loss(hidden, weight, labels, ref_nll, keep_ratio=0.6),
        STORED: lambda: eager(hidden, weight, labels),
        CHUNKS: lambda: functional.linear_cross_entropy(
            hidden, weight, labels, options=nn.LinearCrossEntropyOptions()
        ),
    }
    peak, results = peak_of(lambda: torch.autograd.grad(losses[contender](), (hidden, weight)))
    return max(0, peak - results)


def run(vocab: int) -> list[dict[str, int | str]]:
    """All points, each in a child process."""
    rows: list[dict[str, int | str]] = []
    for contender, most in MOST_TOKENS.items():
        for tokens in (512, 1024, 2048, 4096, 8192):
            if tokens <= most:
                extra = _in_child(contender, tokens, vocab)
                rows.append({"contender": contender, "tokens": tokens, "extra_bytes": extra})
                print(f"{contender:32} {tokens:>5} tokens: {extra / 2**20:9.1f} MiB", flush=True)
    return rows


def _in_child(contender: str, tokens: int, vocab: int) -> int:
    environment = dict(os.environ)
    environment["MALLOC_MMAP_THRESHOLD_"] = environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
    command = [
        sys.executable,
        "-m",
        "bench.loss_memory",
        "--vocab",
        str(vocab),
        "--one",
        contender,
        str(tokens),
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["killed"])[-1]
        raise RuntimeError(f"bench.loss_memory: {contender}, {tokens} tokens: {last}")
    return int(answer.stdout.splitlines()[-1])


def plot(rows: list[dict[str, int | str]], vocab: int, path: Path) -> None:
    """One line per contender, and what the logits alone take."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4))
    for contender in MOST_TOKENS:
        points = [
            (row["tokens"], int(row["extra_bytes"]) / 2**20) for row in rows if row["contender"] == contender
        ]
        axis.plot(*zip(*points, strict=True), marker="o", label=contender)
    tokens = sorted({int(row["tokens"]) for row in rows})
    logits = [n * vocab * 2 / 2**20 for n in tokens]
    axis.plot(tokens, logits, ls=":", color="gray", label="the logits alone, in bfloat16")
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="memory beyond inputs and gradients (MiB)")
    axis.set_xticks(tokens, [str(n) for n in tokens])
    axis.minorticks_off()
    axis.set_title(f"h = {HIDDEN}, vocabulary {vocab:,}, bfloat16, forward and backward", fontsize=10)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.one is not None:
        print(measure(options.one[0], int(options.one[1]), options.vocab))
        return
    rows = run(options.vocab)
    if options.json:
        from bench.machine import git_commit, machine_facts

        record = {
            "vocab": options.vocab,
            "hidden": HIDDEN,
            "git": git_commit(),
            "machine": machine_facts(),
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(rows, options.vocab, options.plot)


if __name__ == "__main__":
    main()
