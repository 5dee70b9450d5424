"""Works through the parts of a scoring run; `main` is one of several processes that do.

`crew` starts it as a program of its own: `main([SCORES, WORK, PARENT])`. WORK is a temporary folder that `scoring.score` filled. On
standard output the worker writes one line after every batch, the number of predictions, and `error` with a sentence if it cannot go
on. It ends between two batches when it gets SIGTERM or its parent is gone.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from fastlm.methods.rho1.claims import Claims
from fastlm.methods.rho1.gather import GatheredTokens
from fastlm.methods.rho1.part_scorer import Between, PartScorer
from fastlm.methods.rho1.score_files import (
    Layout,
    Manifest,
    load_manifest,
    part_metadata,
    part_name,
    write_tensors,
)
from fastlm.methods.rho1.store import load_layout
from fastlm.training.atomic import is_leftover
from fastlm.training.memory import keep_freed_memory
from fastlm.training.stopping import StopRequestedError, StopRequests

MODEL = "model.pt"
STOPPED = 3  # exit code
_WAIT_SECONDS = 0.1  # while other processes hold all parts that are left


def unfinished_parts(folder: Path, layout: Layout) -> list[int]:
    """Numbers of the parts whose file is not there."""
    there = {entry.name for entry in os.scandir(folder)}
    return [number for number in range(layout.num_parts) if part_name(number) not in there]


def work(
    folder: Path,
    manifest: Manifest,
    layout: Layout,
    scorer: PartScorer,
    claims: Claims,
    between: Between,
) -> None:
    """Scores parts until every part's file is there, whoever wrote it.

    Args:
        folder: of the scores, with its manifest.
        scorer: computes one part.
        claims: this process's.
        between: called after every batch, and with 0 while there is nothing to do but to wait; may raise to stop.

    Raises:
        OSError: a part cannot be written.
    """
    while pending := unfinished_parts(folder, layout):
        worked = False
        for number in pending:
            if not claims.take(number):
                continue
            try:
                path = folder / part_name(number)
                if path.exists():  # finished by another process since we looked
                    continue
                for entry in folder.glob(f"{path.name}.*"):
                    if is_leftover(entry.name):  # of the process that had this part and died
                        entry.unlink(missing_ok=True)
                between(0)
                tensors = scorer.score(number, between)
                write_tensors(path, tensors, part_metadata(manifest, number, tensors))
                worked = True
            finally:
                claims.give(number)
        if not worked:
            time.sleep(_WAIT_SECONDS)
            between(0)


def main(arguments: list[str]) -> int:
    """The program; see above."""
    folder, temporary, parent = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and that one decides
    manifest = load_manifest(folder)
    torch.set_num_threads(manifest.threads)
    keep_freed_memory()
    with StopRequests() as stop:

        def between(predictions: int) -> None:
            if predictions:
                print(predictions, flush=True)
            stop.check()
            if os.getppid() != parent:
                raise StopRequestedError

        try:
            # A pickle, but of our own parent, in a folder of its own that is gone with it: any class of model can travel.
            model = torch.load(temporary / MODEL, weights_only=False, mmap=True)
            layout = load_layout(folder, manifest)
            scorer = PartScorer(model, GatheredTokens.open(temporary), layout, manifest)
            work(folder, manifest, layout, scorer, Claims(folder), between)
        except (StopRequestedError, BrokenPipeError):
            return STOPPED
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            print(f"error {type(error).__name__}: {text}", flush=True)
            return 1
    return 0
