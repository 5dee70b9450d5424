"""Small runs for the tests: a text, a configuration of a second, and processes that can be killed."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastlm.training import TrainConfig, make_config

STEPS = 14
SMALL: dict[str, Any] = {
    "preset": "tiny",
    "vocab_size": 300,
    "seq_len": 16,
    "batch_tokens": 64,
    "micro_batch_tokens": 32,
    "steps": STEPS,
    "warmup_steps": 3,
    "checkpoint_steps": 4,
    "evaluations": 2,
    "eval_tokens": 64,
    "final_eval_tokens": 256,
    "held_out": 0.2,
    "threads": 1,
    "dtype": "fp32",
}

# Children start from a process that has imported torch already but has no threads: cheap, and safe to fork. torch's
# optimizers import torch._dynamo when the first one is made.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["fastlm.training", "torch._dynamo"])


def write_text(folder: Path) -> Path:
    """A few small files of different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(9):
        lines = [
            f"def function_{number}_{line}(value):\n    return value + {line}\n" for line in range(3 + number)
        ]
        (folder / f"module_{number}.py").write_text("\n".join(lines))
    return folder


def small_config(text: Path, **changes: Any) -> TrainConfig:
    return make_config({**SMALL, "data": text, **changes})


def start(target: Any, *arguments: Any) -> BaseProcess:
    """Runs `target` in a process of its own."""
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def die_at_write(number: int, target: Any, *arguments: Any) -> None:
    """Runs `target`, but ends the process without a trace just before its `number`-th flush or rename."""
    left = number

    def counted(function: Any) -> Any:
        def call(*a: Any, **k: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(77)
            return function(*a, **k)

        return call

    os.fsync, os.rename, os.replace = counted(os.fsync), counted(os.rename), counted(os.replace)
    target(*arguments)


def final_weights(out: Path) -> dict[str, torch.Tensor]:
    """Weights of the finished model and moments of the last checkpoint."""
    last = max((out / "checkpoints").iterdir())
    return {**load_file(out / "model" / "model.safetensors"), **load_file(last / "optimizer.safetensors")}


def assert_same_bits(left: Path, right: Path) -> None:
    """Two finished runs have the same weights and moments to the last bit."""
    a, b = final_weights(left), final_weights(right)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different
