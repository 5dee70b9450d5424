"""Prefill along diagonals of (layer, chunk) beside one chunk after the other: the same prompt, model and threads.

    python -m bench.wavefront --json out.json

Both are timed in turn, `--rounds` times for every size of chunk; the ratio is that of the medians. Weights are random: speed does not
depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

CHUNKS = (64, 256, 1024, 2048)


def measure(preset: str, dtype: torch.dtype, length: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a prefill, by the size of its chunks."""
    from fastlm.models import SambaConfig, SambaForCausalLM

    torch.manual_seed(0)
    model = SambaForCausalLM(SambaConfig.from_preset(preset), dtype=dtype).eval()
    ids = torch.randint(model.config.vocab_size, (1, length))
    rows = []
    for chunk in CHUNKS:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for wavefront in (False, True):
                begin = time.perf_counter()
                model.generate(ids, max_new_tokens=1, prefill_chunk_size=chunk, wavefront=wavefront)
                seconds[wavefront].append(time.perf_counter() - begin)
        one, other = (statistics.median(seconds[which]) for which in (False, True))
        name = str(dtype).removeprefix("torch.")
        rows.append(
            {"preset": preset, "dtype": name, "tokens": length, "chunk": chunk, "ratio": one / other}
            | {"chunk_by_chunk_seconds": seconds[False], "wavefront_seconds": seconds[True]}
        )
        print(
            f"{preset} {name} chunks of {chunk:>5}: {length / one:8,.0f} tokens/s one by one, "
            f"{length / other:8,.0f} along diagonals, {one / other:.2f}x",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.wavefront", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", action="append", help="may be repeated; default demo")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [
        row
        for preset in options.preset or ["demo"]
        for dtype in (torch.float32, torch.bfloat16)
        for row in measure(preset, dtype, options.tokens, options.rounds)
    ]
    if options.json:
        from bench.machine import git_commit, machine_facts

        record = {
            "git": git_commit(),
            "machine": machine_facts(),
            "threads": torch.get_num_threads(),
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
