"""A prompt of growing length through a Samba model: memory and speed of the prefill.

    python -m bench.long_prompt --json out.json --plot out.png

Each length runs in processes of its own. Memory is the largest resident set while `generate` runs minus the one before, with an
allocator that gives freed blocks back at once (see `bench.memory`): the cache, one chunk of activations, and the prompt's ids, 8
bytes a token. Speed is measured without that. Weights are random: neither memory nor speed depends on them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

NEW_TOKENS = 32


def measure(what: str, length: int, preset: str) -> float:
    """Bytes (`what` is "memory") or seconds ("speed") of one prompt, in this process."""
    import torch

    from bench.memory import peak_of
    from fastlm.models import SambaConfig, SambaForCausalLM

    torch.manual_seed(0)
    model = SambaForCausalLM(SambaConfig.from_preset(preset)).eval()
    ids = torch.randint(model.config.vocab_size, (1, length))
    model.generate(ids[:, :4096], max_new_tokens=1)  # libraries take their workspaces
    if what == "memory":
        return float(peak_of(lambda: model.generate(ids, max_new_tokens=NEW_TOKENS))[0])
    begin = time.perf_counter()
    model.generate(ids, max_new_tokens=1)
    return time.perf_counter() - begin


def run(lengths: list[int], preset: str) -> list[dict[str, float]]:
    """All lengths, each in child processes."""
    rows = []
    for length in lengths:
        memory, seconds = (_in_child(what, length, preset) for what in ("memory", "speed"))
        rows.append({"tokens": length, "extra_bytes": memory, "prefill_seconds": seconds})
        print(
            f"{length:>9,} tokens: {memory / 2**20:7.1f} MiB, {length / seconds:9,.0f} tokens/s", flush=True
        )
    return rows


def _in_child(what: str, length: int, preset: str) -> float:
    environment = dict(os.environ)
    if what == "memory":
        environment["MALLOC_MMAP_THRESHOLD_"] = environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
    command = [sys.executable, "-m", "bench.long_prompt", "--one", what, str(length), "--preset", preset]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if answer.returncode:
        raise RuntimeError(f"bench.long_prompt: {length} tokens: {answer.stderr.strip().splitlines()[-1]}")
    return float(answer.stdout.splitlines()[-1])


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Memory and speed against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    tokens = [row["tokens"] for row in rows]
    left.plot(tokens, [row["extra_bytes"] / 2**20 for row in rows], marker="o", label="measured")
    left.plot(
        tokens,
        [8 * n / 2**20 for n in tokens],
        ls=":",
        color="gray",
        label="the prompt's ids, 8 bytes a token",
    )
    left.set(xscale="log", xlabel="prompt (tokens)", ylabel="memory beyond the model (MiB)")
    left.legend()
    right.plot(tokens, [row["tokens"] / row["prefill_seconds"] for row in rows], marker="o")
    right.set(xscale="log", xlabel="prompt (tokens)", ylabel="prefill (tokens/s)")
    for axis in (left, right):
        axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--longest", type=int, default=2**20)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.one is not None:
        print(measure(options.one[0], int(options.one[1]), options.preset))
        return
    lengths = [2**i for i in range(12, 40, 2) if 2**i <= options.longest]
    rows = run(lengths, options.preset)
    if options.json:
        from bench.machine import git_commit, machine_facts

        record = {"preset": options.preset, "git": git_commit(), "machine": machine_facts(), "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
