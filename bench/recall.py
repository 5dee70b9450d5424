"""Whether a small Samba finds again what it saw long before its attention window, at lengths it was never trained at.

    python -m bench.recall --json out.json --plot out.png

Two tasks of one text each, a few minutes together on two cores:

induction   random letters; once, anywhere, a marker and a letter behind it. At the end the marker comes again: which letter?
            (the task of Gu and Dao, arXiv 2312.00752, section 4.1.2, with the marker at any depth)
passkey     random letters; once, anywhere, a marker and a key of four digits. At the end a question: which key?
            All four digits must be right.

The model has one Mamba block and one attention block. It is trained on short texts first and then on longer ones, up to 64 times
the attention window: of those, the window covers a sixty-fourth, and only what the Mamba layer carries can tell the answer. Then it
is asked at lengths up to 32 times the longest it was trained at, which it reads in chunks with a carried state, as `generate` reads a
prompt. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 64
MARKER, QUESTION, FIRST_DIGIT, FIRST_LETTER = 0, 1, 2, 12


@dataclass(frozen=True)
class Task:
    """A kind of text: `key` tokens behind the marker, drawn from `[low, high)`, asked for by `question`."""

    name: str
    key: int
    low: int
    high: int
    question: int

    def texts(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """`(count, length)` token ids; the last `key` are the answer."""
        ids = torch.randint(FIRST_LETTER, VOCABULARY, (count, length), generator=generator)
        keys = torch.randint(self.low, self.high, (count, self.key), generator=generator)
        body = length - self.key - 1
        places = torch.randint(0, body - self.key, (count, 1), generator=generator)
        ids.scatter_(1, places, MARKER)
        ids.scatter_(1, places + 1 + torch.arange(self.key), keys)
        ids[:, body] = self.question
        ids[:, body + 1 :] = keys
        return ids


TASKS = {
    "induction": Task("induction", 1, FIRST_LETTER, VOCABULARY, MARKER),
    "passkey": Task("passkey", 4, FIRST_DIGIT, FIRST_LETTER, QUESTION),
}


def train(
    task: Task,
    *,
    length: int,
    window: int,
    width: int,
    steps: int,
    batch: int,
    seed: int = 0,
    lr: float = 3e-3,
) -> Any:
    """A model trained on texts of up to `length` tokens, `batch` of the longest in a step; the loss is that of the answer alone."""
    from fastlm.models import SambaConfig, SambaForCausalLM

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = SambaConfig.from_preset(
        "tiny",
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        state_size=16,
        time_step_rank=None,
        sliding_window=window,
    )
    model = SambaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    shortest = 2 * window
    for step in range(steps):
        # Short texts first, where there is little to forget; longer ones join one after the other.
        reached = shortest * 2 ** int(min(1.0, 2 * step / steps) * math.log2(length / shortest))
        choices = [n for n in (shortest << i for i in range(16)) if n <= reached]
        n = choices[int(torch.randint(len(choices), (), generator=generator))]
        ids = task.texts(batch * length // (2 * n) + batch // 2, n, generator)
        hidden = model.model(ids[:, :-1])[:, -task.key :]
        loss = model.loss(hidden, shift_labels=ids[:, -task.key :])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: Any, task: Task, length: int, texts: int, *, seed: int = 1, chunk: int = 2048) -> float:
    """Share of texts whose whole answer is the likeliest continuation."""
    generator = torch.Generator().manual_seed(seed)
    right = 0
    at_once = max(1, min(texts, 65536 // length))
    for start in range(0, texts, at_once):
        ids = task.texts(min(at_once, texts - start), length, generator)
        cache = model.new_cache(ids.shape[0])
        for piece in torch.split(ids[:, : -task.key - 1], chunk, dim=1):
            model.model(piece, cache)
        hidden = model.model(ids[:, -task.key - 1 : -1], cache)
        right += int((model.logits(hidden).argmax(-1) == ids[:, -task.key :]).all(dim=1).sum())
    return right / texts


def interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share of `count`."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def measure(lengths: list[int], texts: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Train a model for each task and ask it at every length."""
    found: dict[str, Any] = {"sizes": sizes, "tasks": {}}
    for name, task in TASKS.items():
        begin = time.perf_counter()
        model = train(task, **sizes)
        seconds = time.perf_counter() - begin
        parameters = model.num_parameters()
        print(f"{name}: {parameters:,} parameters trained in {seconds:.0f} s", flush=True)
        rows = []
        for length in lengths:
            count = max(50, min(texts, texts * 16384 // length))
            share = accuracy(model, task, length, count)
            low, high = interval(share, count)
            rows.append({"length": length, "texts": count, "accuracy": share, "low": low, "high": high})
            print(f"  {length:>8,} tokens: {share:6.1%} [{low:.1%}, {high:.1%}] of {count}", flush=True)
        found["tasks"][name] = {"parameters": parameters, "train_seconds": seconds, "rows": rows}
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """Accuracy against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    for (name, task), marker in zip(found["tasks"].items(), "os", strict=True):
        rows = task["rows"]
        x, y = [row["length"] for row in rows], [row["accuracy"] for row in rows]
        axes.fill_between(x, [row["low"] for row in rows], [row["high"] for row in rows], alpha=0.2)
        axes.plot(x, y, marker=marker, label=name)
    for place, text in ((found["sizes"]["window"], "window"), (found["sizes"]["length"], "longest trained")):
        axes.axvline(place, ls=":", color="gray")
        axes.text(place * 1.05, 0.03, text, color="gray", fontsize=8)
    axes.set(xlabel="tokens in the text", ylabel="answers right", ylim=(0, 1.03))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.legend(loc="center left")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recall", description=__doc__.split("\n")[0])
    parser.add_argument("--longest", type=int, default=1 << 15, help="longest text, tokens")
    parser.add_argument("--texts", type=int, default=512, help="texts per length, fewer of long ones")
    parser.add_argument("--length", type=int, default=1024, help="longest trained length")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    lengths = [2 * options.window]
    while lengths[-1] * 2 <= options.longest:
        lengths.append(lengths[-1] * 2)
    sizes = {name: getattr(options, name) for name in ("length", "window", "width", "steps", "batch")}
    found = measure(lengths, options.texts, sizes)
    if options.json:
        from bench.machine import git_commit, machine_facts

        record = {"git": git_commit(), "machine": machine_facts(), **found}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
