"""Rho-1 from text to model: a reference trained on clean text scores a noisy one, and a model learns the tokens worth learning.
Runs on a CPU in seconds.

python examples/rho1_selective_training.py [--steps 60]
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import numpy as np

from fastlm import training
from fastlm.methods import rho1
from fastlm.training.loading import load_run

TEXT = "the scan remembers what a window forgets and every window recalls what some scan blurs"
SMALL = {
    "preset": "tiny",
    "vocab_size": 300,
    "seq_len": 32,
    "batch_tokens": 256,
    "warmup_steps": 5,
    "lr": 5e-3,
}
SMALL |= {"dtype": "fp32", "threads": 1, "evaluations": 0, "final_eval_tokens": 2048, "held_out": 0.1}


def write_texts(folder: Path) -> tuple[Path, Path]:
    """A clean text, and one whose lines are clean or noise in turn."""
    chance, words = random.Random(0), TEXT.split()

    def clean() -> str:
        start = chance.randrange(len(words))
        return " ".join(words[(start + i) % len(words)] for i in range(8))

    def noise() -> str:
        return "".join(chance.choices("qxzjkvw0123456789", k=40))

    (folder / "clean").mkdir()
    (folder / "web").mkdir()
    for number in range(12):
        (folder / "clean" / f"{number}.txt").write_text("\n".join(clean() for _ in range(40)))
        lines = [clean() if line % 2 else noise() for line in range(40)]
        (folder / "web" / f"{number}.txt").write_text("\n".join(lines))
    return folder / "clean", folder / "web"


def kept_shares(model: Path, scores: rho1.ScoreStore, text: str, keep: float) -> tuple[float, float]:
    """Shares of the clean and of the noisy tokens of a text that have the largest excess losses under a trained model."""
    loaded = load_run(model)
    encoded = loaded.tokenizer.encode(text, add_special_tokens=False)
    tokens = [loaded.end_token, *encoded.ids, loaded.end_token]
    with tempfile.TemporaryDirectory() as folder:
        own = rho1.score(loaded.model, [tokens], folder, context=scores.context, dtype="fp32", threads=1)
        key = rho1.document_key(tokens)
        excess = own.nll(key, 0, len(tokens)) - scores.nll(key, 0, len(tokens))
    lines = np.array([text.count("\n", 0, start) for start, _ in encoded.offsets])  # even ones are noise
    kept = np.zeros(len(excess), bool)
    kept[np.argsort(-excess, kind="stable")[: int(keep * len(excess) + 0.5)]] = True
    kept = kept[:-1]  # value i is of token i + 1, and the last one, the closing mark, is on no line
    return float(kept[lines % 2 == 1].mean()), float(kept[lines % 2 == 0].mean())


def main(steps: int = 60, keep: float = 0.5) -> tuple[float, float]:
    """Returns the shares of the clean and of the noisy tokens that are kept at the end."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        clean, web = write_texts(place)
        # The vocabulary must serve the noisy text; so its tokenizer comes first, from a run of one step on it.
        training.train(training.make_config({**SMALL, "data": web, "steps": 1}), place / "tokenizer")
        shared = {name: value for name, value in SMALL.items() if name != "vocab_size"}
        shared["tokenizer"] = place / "tokenizer"
        # 1. A reference model, on clean text.
        reference = training.make_config({**shared, "data": clean, "steps": 2 * steps})
        training.train(reference, place / "reference")
        # 2. Its loss for every token of the noisy text, once.
        scores = rho1.score_text(
            place / "reference",
            web,
            place / "scores",
            held_out=SMALL["held_out"],
            context=32,
            threads=1,
            dtype="fp32",
        )
        # 3. Training on the tokens whose loss exceeds the reference's the most.
        settings = {
            **shared,
            "data": web,
            "steps": steps,
            "loss": "slm",
            "scores": place / "scores",
            "keep": keep,
        }
        rho1.train(training.make_config(settings), place / "model")
        clean_kept, noise_kept = kept_shares(place / "model", scores, (web / "0.txt").read_text(), keep)
        print(f"{len(scores)} documents scored, mean reference loss {scores.part('nll', 0).mean():.2f} nats")
    print(
        f"{keep:.0%} of the tokens are kept: {clean_kept:.0%} of the clean ones, {noise_kept:.0%} of the noise"
    )
    return clean_kept, noise_kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
