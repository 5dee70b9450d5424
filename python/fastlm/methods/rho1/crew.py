"""Several scoring processes and the one that started them: progress, deaths, and the end of all when it must be."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch
from torch import nn

from fastlm.methods.rho1.score_files import Layout, Manifest
from fastlm.methods.rho1.worker import MODEL, STOPPED, unfinished_parts
from fastlm.training.config import reason
from fastlm.training.errors import InputError, RunError
from fastlm.training.progress import Reporter, WorkRate
from fastlm.training.stopping import StopRequests

_PROGRAM = "import sys; from fastlm.methods.rho1.worker import main; sys.exit(main(sys.argv[1:]))"
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 60.0  # for a batch to end after a stop


def run_workers(
    model: nn.Module,
    folder: Path,
    temporary: Path,
    manifest: Manifest,
    layout: Layout,
    count: int,
    stop: StopRequests,
    reporter: Reporter,
    rate: WorkRate,
) -> None:
    """Starts `count` processes and waits until every part is there.

    A worker that is killed loses the part it was in; the others score it. They see the model through a memory map, so its weights
    are in memory once.

    Raises:
        InputError: the model cannot be handed to another process, or a worker could not use what it was given.
        StopRequestedError: SIGINT or SIGTERM; all workers have ended.
        RunError: no worker is left and parts are missing.
    """
    try:
        torch.save(model, temporary / MODEL)
    except (OSError, RuntimeError) as error:
        raise RunError(f"scoring: could not write {temporary / MODEL}: {reason(error)}") from error
    except Exception as error:
        raise InputError(
            f"workers: expected 1 for this model, got {count}: it cannot be handed to another process ({error})"
        ) from error
    # A program of its own instead of multiprocessing: the caller's main module is not imported again, so scripts without a guard,
    # notebooks and programs with threads can score.
    command = [sys.executable, "-c", _PROGRAM, str(folder), str(temporary), str(os.getpid())]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "OMP_NUM_THREADS": str(manifest.threads),
    }
    crew = [
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment)
        for _ in range(count)
    ]
    try:
        _watch(crew, stop, reporter, rate)
    finally:
        _end(crew)
    if unfinished_parts(folder, layout):
        raise RunError(
            f"scoring: all {count} workers ended before the last part was scored; finished parts are kept, "
            f"to score the rest, {manifest.repair}"
        )


def _watch(
    crew: list[subprocess.Popen[bytes]], stop: StopRequests, reporter: Reporter, rate: WorkRate
) -> None:
    """Reads what the workers say until all have ended."""
    with selectors.DefaultSelector() as selector:
        for worker in crew:
            assert worker.stdout is not None
            os.set_blocking(worker.stdout.fileno(), False)
            selector.register(worker.stdout, selectors.EVENT_READ, worker)
        rest: dict[int, bytes] = {}
        while selector.get_map():
            stop.check()
            done = 0
            for key, _ in selector.select(_POLL_SECONDS):
                process: subprocess.Popen[bytes] = key.data
                stream: IO[bytes] = process.stdout  # type: ignore[assignment]
                block = stream.read()
                if not block:
                    selector.unregister(stream)
                    _ended(process, crew, reporter)
                    continue
                *lines, rest[process.pid] = (rest.get(process.pid, b"") + block).split(b"\n")
                for line in lines:
                    if line.startswith(b"error "):
                        raise _failure(line.decode("utf-8", "replace").removeprefix("error "))
                    if line.isdigit():
                        done += int(line)
            if done:
                reporter.work(rate.advanced(done))


def _failure(text: str) -> Exception:
    kind, _, sentence = text.partition(": ")
    if kind == "InputError":
        return InputError(sentence)
    return RunError(f"scoring: a worker failed: {text}")


def _ended(process: subprocess.Popen[bytes], crew: list[subprocess.Popen[bytes]], reporter: Reporter) -> None:
    code = process.wait()
    if code in (0, 1):
        return
    if code == STOPPED:
        how = "was stopped by SIGTERM"
    elif code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    else:
        how = f"ended with code {code}"
    left = sum(other.poll() is None for other in crew)
    reporter.warn(f"worker {process.pid} {how}; {left} of {len(crew)} workers go on with its part")


def _end(crew: list[subprocess.Popen[bytes]]) -> None:
    """Asks the workers to stop after their batch, and waits; a second signal to us ends them at once."""
    for process in crew:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    try:
        for process in crew:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE_SECONDS)
    finally:
        for process in crew:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
