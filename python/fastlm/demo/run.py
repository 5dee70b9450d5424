"""The demo from start to end: train, compress, compare, generate, report."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlm.demo.compressors import compress_after_training_text, compress_held_out
from fastlm.demo.panel import print_panel
from fastlm.demo.peers import Peer, measure_peers
from fastlm.demo.report import render
from fastlm.demo.result import CompressorNumbers, DemoResult, PeerNumbers, Sample
from fastlm.training import InputError, RunError, RunRecord, make_config, train
from fastlm.training.atomic import write_bytes, write_json
from fastlm.training.data import PreparedData, open_data
from fastlm.training.evaluation import held_out_rows, held_out_text
from fastlm.training.generation import GeneratedText, generate_text
from fastlm.training.loading import LoadedModel, load_run
from fastlm.training.log import RunLog
from fastlm.training.progress import Reporter, make_reporter
from fastlm.training.record import now
from fastlm.training.shards import TokenStore

PROMPTS = (
    'class Cache:\n    """',
    "def read_config(path):\n",
    "import os\nimport sys\n\n\ndef main():\n",
)


@dataclass(frozen=True)
class DemoSize:
    """What separates the demo from its quick form."""

    seconds: float
    settings: dict[str, Any]  # of the training
    batch: tuple[int, int]  # rows and tokens per row of the speed comparison
    rounds: int
    budget: float  # seconds for the rounds after the first
    new_tokens: int
    prompts: int


FULL = DemoSize(
    seconds=100.0,
    settings={"seq_len": 512, "batch_tokens": 1024},
    batch=(2, 512),
    rounds=4,
    budget=20.0,
    new_tokens=120,
    prompts=3,
)
QUICK = DemoSize(
    seconds=6.0,
    settings={
        "vocab_size": 1024,
        "seq_len": 128,
        "batch_tokens": 512,
        "warmup_steps": 5,
        "max_bytes": 1_500_000,
        "eval_tokens": 1024,
        "final_eval_tokens": 8192,
        "evaluations": 4,
    },
    batch=(1, 64),
    rounds=2,
    budget=2.0,
    new_tokens=32,
    prompts=1,
)


def run_demo(
    out: Path,
    *,
    seconds: float | None = None,
    data: Path | None = None,
    quick: bool = False,
    replace: bool = False,
    reporter: Reporter | None = None,
) -> DemoResult:
    """Runs the demo into the new folder `out`: `run/`, `demo.json`, `report.html`.

    Args:
        out: new or empty folder; with `replace`, an earlier demo in it is deleted.
        seconds: of training; default 100, quick 6.
        data: text; default Python's library source.
        quick: a tenth of everything, for tests and the impatient.
        replace: see `out`.
        reporter: sees the progress; default: the terminal.

    Raises:
        InputError: `out` or `data` cannot be used.
        RunError: training failed or was stopped.
    """
    started = time.monotonic()
    size = QUICK if quick else FULL
    reporter = reporter or make_reporter()
    _make_room(out, replace)
    length = size.seconds if seconds is None else seconds
    settings = {"preset": "demo", "minutes": length / 60, **size.settings}
    record = train(
        make_config({**settings, **({} if data is None else {"data": data})}), out / "run", reporter=reporter
    )
    if record.status != "finished":
        raise RunError(
            f"demo: stopped while training; fastlm train samba --out {shlex.quote(str(out / 'run'))} "
            f"--resume goes on with it"
        )
    loaded, prepared = load_run(out / "run"), open_data(out / "run" / "data")
    texts = _write_samples(loaded, size, reporter)
    peers = _compare_speed(loaded, prepared.train, size, record.dtype, reporter)
    compressors = _compress(record, prepared, reporter)
    log = RunLog(out / "run").read()
    result = DemoResult(
        quick=quick,
        created=now(),
        seconds=time.monotonic() - started,
        command=_command(out, length, data, quick),
        environment=record.environment,
        preset=record.config.preset,
        parameters=record.parameters,
        dtype=record.dtype,
        threads=record.threads,
        data=asdict(prepared.summary),
        train_tokens=record.tokens,
        train_steps=record.step,
        train_seconds=record.train_seconds,
        tokens_per_second=_result(record)["tokens_per_second"],
        peak_memory_bytes=_result(record)["peak_memory_bytes"],
        curve=[(entry["tokens"], entry["bits_per_byte"]) for entry in log if entry["kind"] == "step"],
        held_out_curve=_held_out_curve(log, record),
        bits_per_byte=_result(record)["bits_per_byte"],
        held_out_bytes=_result(record)["held_out_bytes"],
        compressors=compressors,
        batch=size.batch,
        peers=[_numbers(peer, size) for peer in peers],
        samples=[Sample(prompt=text.prompt, text=text.text) for text in texts],
        generation_tokens_per_second=sum(t.num_tokens for t in texts)
        / max(1e-9, sum(t.seconds for t in texts)),
    )
    try:
        write_json(out / "demo.json", result.to_dict())
        write_bytes(out / "report.html", render(result).encode("utf-8"))
    except OSError as error:
        raise RunError(
            f"demo: could not write the report to {out}: {error.strerror}; the trained run is whole"
        ) from error
    return result


def show(result: DemoResult, out: Path) -> None:
    """The panel on standard output."""
    print_panel(result, out / "report.html")


def _make_room(out: Path, replace: bool) -> None:
    """An earlier demo is deleted only when asked for, and nothing else ever."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"--out: expected a folder, found a file at {out}")
    names = {entry.name for entry in out.iterdir()}
    if not names:
        return
    strangers = sorted(names - {"run", "demo.json", "report.html"})
    if strangers or not (out / "run").is_dir():
        raise InputError(
            f"--out: expected a new or empty folder, found {', '.join(strangers or sorted(names))} in {out}"
        )
    if not replace:
        raise InputError(
            f"--out: {out} already holds a demo; add --replace to delete it, or choose another folder"
        )
    for name in names:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write_samples(loaded: LoadedModel, size: DemoSize, reporter: Reporter) -> list[GeneratedText]:
    reporter.stage("writing")
    return [
        generate_text(loaded, prompt, max_new_tokens=size.new_tokens, temperature=0.6, top_p=0.9, seed=number)
        for number, prompt in enumerate(PROMPTS[: size.prompts])
    ]


def _compare_speed(
    loaded: LoadedModel, store: TokenStore, size: DemoSize, dtype: str, reporter: Reporter
) -> list[Peer]:
    rows, length = size.batch
    tokens: list[np.ndarray[Any, Any]] = []
    for document in range(store.num_documents):
        tokens.append(store.tokens(document, 0, rows * length))
        if sum(map(len, tokens)) >= rows * length:
            break
    stream = np.resize(np.concatenate(tokens), rows * length)  # repeats a text that is shorter than the batch
    input_ids = torch.from_numpy(stream.reshape(rows, length))
    return measure_peers(
        loaded.model, input_ids, dtype=dtype, rounds=size.rounds, budget=size.budget, report=reporter.stage
    )


def _compress(record: RunRecord, prepared: PreparedData, reporter: Reporter) -> list[CompressorNumbers]:
    """The compressors on exactly the bytes of the last evaluation."""
    reporter.stage("compressing the held-out text with gzip and xz")
    schedule = record.schedule or {}
    rows = held_out_rows(
        prepared,
        row_tokens=record.config.micro_batch,
        seq_len=record.config.seq_len,
        max_tokens=schedule["final_eval_tokens"],
    )
    held_out = b"".join(held_out_text(prepared, rows))
    found = compress_held_out(held_out)
    spelling = prepared.spelling()
    training = b"".join(
        b"".join(spelling[token] for token in prepared.train.tokens(document, 0, 2**62).tolist())
        for document in range(prepared.train.num_documents)
    )
    primed = compress_after_training_text(training, held_out)
    return [CompressorNumbers(**asdict(item)) for item in (*found, *([primed] if primed else []))]


def _held_out_curve(log: list[dict[str, Any]], record: RunRecord) -> list[tuple[int, float]]:
    """Evaluations by tokens read; of two at the same step the last (the longer one) counts."""
    per_step = record.config.batch_tokens
    points = {
        entry["step"] * per_step: entry["bits_per_byte"] for entry in log if entry["kind"] == "evaluation"
    }
    return sorted(points.items())


def _numbers(peer: Peer, size: DemoSize) -> PeerNumbers:
    return PeerNumbers(
        name=peer.name,
        what=peer.what,
        tokens_per_second=peer.tokens_per_second(size.batch[0] * size.batch[1]),
        step_seconds=peer.seconds,
        loss=peer.loss,
        peak_bytes=peer.peak_bytes,
        problem=peer.problem,
    )


def _result(record: RunRecord) -> dict[str, Any]:
    assert record.result is not None
    return record.result


def _command(out: Path, seconds: float, data: Path | None, quick: bool) -> str:
    words = ["fastlm", "demo", "--seconds", f"{seconds:g}", "--out", str(out)]
    words += ["--data", str(data)] if data is not None else []
    words += ["--quick"] if quick else []
    return shlex.join(words) + f"  (Python {sys.version_info.major}.{sys.version_info.minor})"
