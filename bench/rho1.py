"""Does training on chosen tokens help? Rho-1's selective loss against plain cross-entropy and random choice, on real noisy text.

    python -m bench.rho1 run                # trains; continues where it was stopped
    python -m bench.rho1 plot               # pictures and table into docs/methods, from the JSON alone
    python -m bench.rho1 page               # the tokens of some documents, coloured by what was chosen

About half of the training tokens are noise of known kinds (`bench.rho1_documents`); everything is judged by clean text that no model
has seen. Of one seed all variants see the same rows in the same order and begin with the same weights, so differences are taken by
seed; every seed has a reference model of its own. Each run is a job of a process of its own; they go seed by seed. The JSON is
written anew after every job, and a job is done once: a second call does what is missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.rho1_corpus import CorpusSizes, LabelledCorpus, build_corpus, open_corpus
from bench.rho1_noise import MIXED
from bench.rho1_select import SHOWN, VARIANTS
from bench.rho1_train import Rows, Sizes, artefacts, new_model, shown_documents, token_losses, train
from fastlm.training.atomic import write_bytes
from fastlm.training.errors import InputError, RunError

JSON = Path("bench/results/rho1.json")
PAGES = Path("docs/methods")
SHOWN_TOKENS = {MIXED: 640, "": 112}  # of each document on the page, by kind

Job = tuple[str, int]  # variant, seed
Done = dict[Job, dict[str, Any]]


def job(
    name: str, seed: int, sizes: Sizes, corpus_sizes: CorpusSizes, work: Path, threads: int
) -> dict[str, Any]:
    """A run in a process of its own: reads the corpus, gives its record, leaves in `work` what others need."""
    torch.set_num_threads(threads)
    begin = time.monotonic()
    corpus = open_corpus(work / "corpus", corpus_sizes)
    record = train(name, seed, sizes, corpus, work)
    if name == SHOWN and seed == 0:
        record["documents"] = shown_documents(corpus, sizes, work, seed, SHOWN_TOKENS)
    return record | {"seconds": round(time.monotonic() - begin, 1)}


def planned(variants: list[str], seeds: int) -> list[Job]:
    """All runs in order, seed by seed, with those that others need; needed ones first."""
    names: list[str] = []

    def add(name: str) -> None:
        for other in VARIANTS[name].needs:
            add(other)
        if name not in names:
            names.append(name)

    for name in variants:
        add(name)
    return [(name, seed) for seed in range(seeds) for name in names]


def missing(jobs: list[Job], done: Done, work: Path) -> list[Job]:
    """Runs to do, in order: those without a record, and those whose files are lost while a run to do needs them."""
    left = {key for key in jobs if key not in done}
    for name, seed in reversed(jobs):  # whoever needs comes after what it needs
        if (name, seed) in left:
            for other in VARIANTS[name].needs:
                if not all(path.exists() for path in artefacts(work, other, seed)):
                    left.add((other, seed))
    return [key for key in jobs if key in left]


def finished(
    jobs: list[Job], submit: Callable[[Job], Future[Any]], processes: int
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Results as they come; a job starts when those it needs are finished and a process is free, the first in order first."""
    waiting = list(jobs)
    running: dict[Future[Any], Job] = {}
    while waiting or running:
        unfinished = {*waiting, *running.values()}
        for key in list(waiting):
            ready = all((other, key[1]) not in unfinished for other in VARIANTS[key[0]].needs)
            if ready and len(running) < processes:
                waiting.remove(key)
                running[submit(key)] = key
        over, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in over:
            yield running.pop(future), future.result()


class InThisProcess:
    """A pool of no processes: a job is done when it is submitted."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None: ...


def step_seconds(corpus: LabelledCorpus, sizes: Sizes, threads: int) -> float:
    """Duration of a training step, the second of two."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    model, rows = new_model(sizes, corpus, 0), Rows(corpus.sides["train"], sizes, 0)
    seconds = 0.0
    for number in range(2):
        begin = time.perf_counter()
        token_losses(model, rows.batch(number), sizes).sum().backward()
        seconds = time.perf_counter() - begin
    torch.set_num_threads(before)
    return seconds


def estimate(jobs: list[Job], sizes: Sizes, seconds: float, processes: int) -> float:
    """Seconds that the jobs will take, from those of a training step; a forward pass is a third of one."""
    watched = sizes.evaluations * (sizes.eval_tokens + sizes.noise_eval_tokens)
    tokens = watched + sizes.final_eval_tokens + sizes.final_noise_eval_tokens
    total = 0.0
    for name, _ in jobs:
        variant = VARIANTS[name]
        steps = sizes.continual_steps if variant.continued else sizes.steps
        scored = {None: 0, "first": sizes.steps, "second": sizes.continual_steps}[variant.scores]
        total += seconds * (1.1 * steps + (tokens / sizes.batch_tokens + scored) / 3) + 2.0
    return total / max(1, processes)


def run(
    variants: list[str],
    seeds: int,
    sizes: Sizes,
    corpus_sizes: CorpusSizes,
    *,
    work: Path,
    path: Path,
    threads: int = 1,
    processes: int = 2,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Does all missing runs, `processes` at a time (0: in this process), and writes `path` after each.

    Returns:
        The record as in `path`.

    Raises:
        RunError: `path` or `work` is of other sizes or of another text.
    """
    corpus = build_corpus(work / "corpus", corpus_sizes, report)
    record = _opened(path, sizes, corpus)
    done = {(found["variant"], found["seed"]): found for found in record["runs"]}
    jobs = planned(variants, seeds)
    left = missing(jobs, done, work)
    if left:
        seconds = estimate(left, sizes, step_seconds(corpus, sizes, threads), processes)
        report(
            f"{len(left)} of {len(jobs)} runs to do, about {seconds / 60:.0f} minutes if the machine has nothing else to do"
        )
    begin = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when a worker loads torch
    pool: Any = (
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) if processes else InThisProcess()
    )
    commit = (record["git"] or {}).get("commit")
    with pool:
        arguments = (sizes, corpus_sizes, work, threads)
        results = finished(left, lambda key: pool.submit(job, *key, *arguments), max(1, processes))
        for count, (key, found) in enumerate(results, 1):
            done[key] = found | {"commit": commit}
            order = {key: place for place, key in enumerate(jobs)}
            record["runs"] = [done[key] for key in sorted(done, key=lambda key: order.get(key, len(order)))]
            write_bytes(path, compact(record).encode())
            passed = time.monotonic() - begin
            report(
                f"{count:>3} of {len(left)}  {key[0]:<22} seed {key[1]}  clean {found['final']['clean']['bits']:.4f} bits per byte, "
                f"{found['seconds']:.0f} s; about {passed / count * (len(left) - count) / 60:.0f} minutes left"
            )
    return record


def _opened(path: Path, sizes: Sizes, corpus: LabelledCorpus) -> dict[str, Any]:
    """The record of an earlier call, or a new one."""
    from bench.machine import git_commit, machine_facts, software_facts

    facts = {
        "git": git_commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine_facts(),
        "software": software_facts(),
        "sizes": asdict(sizes),
        "corpus": corpus.manifest,
    }
    if not path.exists():
        return {**facts, "runs": []}
    record = read_record(path)
    for part, found in (("sizes", record["sizes"]), ("text", record["corpus"]["digest"])):
        expected = facts["sizes"] if part == "sizes" else corpus.manifest["digest"]
        if found != expected:
            raise RunError(
                f"--json: expected runs of {part} {expected}, found {found} in {path}; give another --json or delete it"
            )
    return {**facts, "runs": record["runs"]}


def read_record(path: Path) -> dict[str, Any]:
    """What `run` has written.

    Raises:
        InputError: there is no such file, or it is another one.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = record["sizes"], record["corpus"]["digest"]
        for found in record["runs"]:
            found["curve"] = [
                dict(zip(found["curve"], row, strict=True))
                for row in zip(*found["curve"].values(), strict=True)
            ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--json: expected a record of `python -m bench.rho1 run`, found {path}: {error!r}"
        ) from error
    return record


def compact(record: dict[str, Any]) -> str:
    """JSON with one line per run, its curve by columns."""
    runs = [
        {**found, "curve": {name: [point[name] for point in found["curve"]] for name in found["curve"][0]}}
        for found in record["runs"]
    ]
    head = json.dumps({**record, "runs": "RUNS"}, indent=1)
    lines = ",\n".join("  " + json.dumps(found, separators=(",", ":")) for found in runs)
    return head.replace('"RUNS"', f"[\n{lines}\n ]") + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.rho1", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="train what is missing")
    runs.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help=f"of {', '.join(VARIANTS)}; those that others need are added",
    )
    runs.add_argument("--seeds", type=int, default=4, help="how many")
    runs.add_argument(
        "--steps", type=int, default=Sizes.steps, help="of the first stage; continued runs take half"
    )
    runs.add_argument("--threads", type=int, default=1, help="of each process")
    runs.add_argument("--processes", type=int, default=2, help="at a time; 0: none but this one")
    runs.add_argument(
        "--work", type=Path, default=Path("runs/rho1"), help="folder of the text, of weights and scores"
    )
    runs.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    plots = commands.add_parser("plot", help="pictures, and the tables in the page of the experiment")
    pages = commands.add_parser("page", help="tokens of some documents, coloured")
    for command in (runs, plots, pages):
        command.add_argument("--json", type=Path, default=JSON)
    plots.add_argument(
        "--out", type=Path, default=PAGES, help="folder of the pictures and of rho1_experiment.md"
    )
    pages.add_argument("--out", type=Path, default=PAGES / "rho1_tokens.html")
    options = parser.parse_args(arguments)
    try:
        if options.command == "run":
            _run(options)
        elif options.command == "plot":
            _plot(read_record(options.json), options.out)
        else:
            _page(read_record(options.json), options.out)
    except (InputError, RunError) as error:
        parser.exit(1, f"{error}\n")


def _run(options: argparse.Namespace) -> None:
    import fastlm
    from bench.rho1_summary import tables

    for name, least in (("seeds", 1), ("steps", 1), ("threads", 1), ("processes", 0)):
        if getattr(options, name) < least:
            raise InputError(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    if options.dtype == "auto":  # elsewhere bf16 is slower and coarser
        options.dtype = "bf16" if fastlm.cpu_capability() == "avx512_bf16" else "fp32"
    half = max(1, options.steps // 2)
    sizes = replace(Sizes(), steps=options.steps, continual_steps=half, dtype=options.dtype)
    record = run(
        options.variants,
        options.seeds,
        sizes,
        CorpusSizes(),
        work=options.work,
        path=options.json,
        threads=options.threads,
        processes=options.processes,
        report=lambda line: print(line, flush=True),
    )
    print(tables(record))


def _plot(record: dict[str, Any], folder: Path) -> None:
    from bench import rho1_plot
    from bench.rho1_summary import tables, with_tables

    rho1_plot.curves(record, folder / "rho1_curves.png")
    rho1_plot.k_sweep(record, folder / "rho1_k_sweep.png")
    rho1_plot.selection(record, folder / "rho1_selection.png")
    page = folder / "rho1_experiment.md"
    if page.exists():
        write_bytes(page, with_tables(page.read_text(encoding="utf-8"), record).encode())
    print(tables(record))


def _page(record: dict[str, Any], path: Path) -> None:
    from bench.rho1_page import write_page

    write_page(record, path)
    print(path)


if __name__ == "__main__":
    main()
