"""Scoring a corpus beside the model's own forward pass with stored logits, on the same packed batches.

    python -m bench.rho1_scoring --json out.json [--preset demo] [--vocab 8192] [--tokens 32768] [--threads 1]

Rounds take turns; a figure is the best of them, in tokens per second, since other work on the machine can only slow one down. "whole
call" includes hashing the model, reading the corpus and writing the files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from bench.machine import git_commit, machine_facts
from fastlm.methods import rho1
from fastlm.methods.rho1.part_scorer import PartScorer
from fastlm.models.samba import SambaConfig, SambaForCausalLM
from fastlm.training.evaluation import autocast

CONTEXT, BATCH_TOKENS = 512, 4096
STORED, WITHIN, WHOLE = "model, logits, cross-entropy", "the same batches within rho1.score", "whole call"


def make_documents(tokens: int, vocab: int) -> list[np.ndarray]:
    """Random tokens in documents of 200 to 3000."""
    chance = np.random.default_rng(0)
    documents: list[np.ndarray] = []
    while sum(len(document) for document in documents) < tokens:
        documents.append(chance.integers(0, vocab, int(chance.integers(200, 3000))))
    return documents


def stored_logits(model: SambaForCausalLM, documents: list[np.ndarray], dtype: str) -> float:
    """Seconds of the forward passes with whole logits."""
    pieces = [
        document[start : min(start + CONTEXT, len(document) - 1) + 1]
        for document in documents
        for start in range(0, len(document) - 1, CONTEXT)
    ]
    batches: list[list[np.ndarray]] = [[]]
    for piece in pieces:
        if batches[-1] and sum(len(p) - 1 for p in batches[-1]) + len(piece) - 1 > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(piece)
    began = time.perf_counter()
    with torch.inference_mode(), autocast(dtype):
        for batch in batches:
            ids = torch.from_numpy(np.concatenate([piece[:-1] for piece in batch])).unsqueeze(0)
            labels = torch.from_numpy(np.concatenate([piece[1:] for piece in batch]))
            ends = np.cumsum([0, *(len(piece) - 1 for piece in batch)])
            hidden = model.model(ids, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
            functional.cross_entropy(model.logits(hidden)[0].float(), labels, reduction="none")
    return time.perf_counter() - began


def scored(
    model: SambaForCausalLM, documents: list[np.ndarray], dtype: Any, threads: int
) -> tuple[float, float]:
    """Seconds within the parts, and of the whole call."""
    within = 0.0
    original = PartScorer.score

    def timed(self: PartScorer, *arguments: Any) -> Any:
        nonlocal within
        began = time.perf_counter()
        result = original(self, *arguments)
        within += time.perf_counter() - began
        return result

    PartScorer.score = timed  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            rho1.score(
                model,
                documents,
                folder,
                context=CONTEXT,
                batch_tokens=BATCH_TOKENS,
                dtype=dtype,
                threads=threads,
            )
            return within, time.perf_counter() - began
    finally:
        PartScorer.score = original  # type: ignore[method-assign]


def run(preset: str, vocab: int, tokens: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    """One row per dtype and contender: tokens per second, best first, and every round's seconds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = SambaForCausalLM(SambaConfig.from_preset(preset, vocab_size=vocab)).eval()
    documents = make_documents(tokens, vocab)
    predictions = sum(len(document) - 1 for document in documents)
    rows = []
    for dtype in ("fp32", "bf16"):
        seconds: dict[str, list[float]] = {STORED: [], WITHIN: [], WHOLE: []}
        for _ in range(rounds):
            seconds[STORED].append(stored_logits(model, documents, dtype))
            within, whole = scored(model, documents, dtype, threads)
            seconds[WITHIN].append(within)
            seconds[WHOLE].append(whole)
        for name, found in seconds.items():
            rows.append(
                {
                    "dtype": dtype,
                    "contender": name,
                    "tokens_per_second": predictions / min(found),
                    "seconds": found,
                }
            )
            print(f"{dtype}  {name:36} {predictions / min(found):>10,.0f} tokens/s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = vars(parser.parse_args())
    out = options.pop("json")
    rows = run(**options)
    if out is not None:
        record = {"settings": options, "git": git_commit(), "machine": machine_facts(), "rows": rows}
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
