"""The command line: `check`, `sanitize`, `ceilings`, `peers`, `bench`, `report`, or `all` of them in turn."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .item import BAD, Item, Outcome, Settings
from .pool import WorkerError, run_items
from .state import PARTS, State, fingerprint_of, keep, load, new_state, only_current, save, to_do

ROOT = Path(__file__).resolve().parents[2]
_DEFAULT_STATE = Path("build") / "gpu" / "results.json"
_OK, _FOUND, _BAD_INPUT = 0, 1, 2
# Several processes share the card where only results count; one alone has it where times do.
_WORKERS = {"check": 4, "sanitize": 4, "ceilings": 1, "peers": 1, "bench": 1}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="Checks and measures fastlm's CUDA operators on one GPU."
    )
    parser.add_argument("part", choices=(*PARTS, "report", "all"))
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny, to try the script"
    )
    parser.add_argument(
        "--state", type=Path, default=_DEFAULT_STATE, help=f"results (default {_DEFAULT_STATE})"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        help="stop after that many (default 9); what is left comes next time",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="WORDS",
        help="items with this in their name; may be repeated",
    )
    parser.add_argument("--redo", action="store_true", help="also what has a result")
    parser.add_argument("--redo-failed", action="store_true", help="also what failed, crashed or hung")
    parser.add_argument("--workers", type=int, default=0, help="processes at a time (default 4, 1 for times)")
    parser.add_argument("--rounds", type=int, default=31, help="samples of each contender at most")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out contenders that go through torch.compile"
    )
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="DIR",
        help="folder with wheels or packages of peers (default: peers beside the results)",
    )
    parser.add_argument("--peer-wheels", type=Path, dest="peers", help=argparse.SUPPRESS)
    parser.add_argument(
        "--mamba-source", type=Path, metavar="DIR", help="checkout of mamba, whose scan `peers` compiles"
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="a contender of `bench` to leave out; may be repeated",
    )
    parser.add_argument("--library", type=Path, metavar="DIR", help="build folder with libfastlm_ops.so")
    parser.add_argument(
        "--sanitizer", default="", metavar="PATH", help="compute-sanitizer, if it is not found by itself"
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="where `report` writes the file to keep")
    parser.add_argument(
        "--full", action="store_true", help="--device cpu: all samples and sizes of the checks"
    )
    parser.add_argument("--commit", metavar="HASH", help="to record, where the folder is no git checkout")
    parser.add_argument("--list", action="store_true", help="show the items and end")
    parser.add_argument("--faults", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one part, or all.

    Returns:
        0 if nothing failed, 1 if something did, 2 for input that cannot be used.
    """
    arguments = _parser().parse_args(argv)
    _find_package(arguments.library)
    try:
        return _main(arguments)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return _BAD_INPUT


def _find_package(library: Path | None) -> None:
    """Makes `fastlm` importable in a checkout that is not installed."""
    if library is not None:
        os.environ["FASTLM_LIBRARY_DIR"] = str(library.resolve())
    source = ROOT / "python"
    if (source / "fastlm").is_dir() and os.environ.get("FASTLM_LIBRARY_DIR") and str(source) not in sys.path:
        sys.path.insert(0, str(source))


def _main(arguments: argparse.Namespace) -> int:
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device; --device cpu tries the script without one")
    from .facts import gather, slow_build

    facts = gather(arguments.device)
    if arguments.commit:
        facts["git"] = facts["git"] or {"commit": arguments.commit, "changed": False}
    if arguments.device == "cuda" and not facts["software"]["fastlm"]["cuda"]["built"]:
        raise RuntimeError(f"fastlm was built without CUDA: {facts['software']['fastlm']['cuda']['why_not']}")
    state = load(arguments.state) if arguments.state.is_file() else new_state(facts)
    state |= facts
    if lacking := slow_build(facts):
        _say(f"WARNING: {lacking}")
    deadline = time.monotonic() + 60 * arguments.minutes
    parts = [*PARTS, "report"] if arguments.part == "all" else [arguments.part]
    found = [_part(part, state, arguments, deadline) for part in parts if part != "report"]
    if found and all(bad is None for bad in found):
        raise ValueError(f"{arguments.part}: no item has {' or '.join(arguments.only)} in its name")
    if "report" in parts:
        _report(state, arguments)
    return _FOUND if any(found) else _OK


def _settings(arguments: argparse.Namespace) -> Settings:
    folder, usual = arguments.peers, arguments.state.parent / "peers"
    if folder is None and (arguments.mamba_source is not None or usual.is_dir()):
        folder = usual
    if arguments.mamba_source is not None:
        target = folder / "mamba" / "csrc" / "selective_scan"
        source = arguments.mamba_source / "csrc" / "selective_scan"
        if not source.is_dir():
            raise ValueError(f"--mamba-source must hold csrc/selective_scan, got {arguments.mamba_source}")
        shutil.copytree(source, target, dirs_exist_ok=True)
    return Settings(
        device=arguments.device,
        rounds=arguments.rounds,
        compile=not arguments.no_compile,
        peers="" if folder is None else str(folder.resolve()),
        faults=arguments.faults,
        without=tuple(arguments.without),
        sanitizer=arguments.sanitizer,
        full=arguments.full,
    )


def _means(part: str, settings: Settings) -> str:
    """The tool or the packages that a part finds now."""
    from .peers import present
    from .sanitize import find_tool

    if part == "sanitize":
        return find_tool(settings) or ""
    return present(settings.peers) if part == "bench" else ""


def _part(part: str, state: State, arguments: argparse.Namespace, deadline: float) -> bool | None:
    """Runs what is left of a part; whether anything is wrong in it, None if no item has the words in its name."""
    from .worker import items_of

    settings = _settings(arguments)
    words = arguments.only
    everything = items_of(part, settings)
    chosen = [item for item in everything if not words or any(word in item.name for word in words)]
    if not chosen:
        return None
    if arguments.list:
        print("\n".join(item.name for item in chosen))
        return False
    mark, means = fingerprint_of(state, part), _means(part, settings)
    again = {"redo": arguments.redo, "redo_failed": arguments.redo_failed}
    waiting = to_do(state, part, chosen, mark, means=means, **again)
    if part == "check":
        from .check import missing

        state["parts"][part]["missing"] = missing(settings)
    _say(f"{part}: {len(chosen)} items, {len(waiting)} to do")
    begin = time.monotonic()
    counter = _Progress(part, len(waiting))

    def on_result(name: str, outcome: Outcome) -> None:
        keep(state, part, name, outcome, mark, means)
        save(state, arguments.state)
        counter.show(name, outcome)

    left = _run(part, waiting, settings, arguments, deadline, on_result)
    state["parts"][part]["unfinished"] = left
    state["parts"][part]["seconds"] = time.monotonic() - begin
    save(state, arguments.state)
    found = Counter(
        state["parts"][part]["items"][item.name]["status"] for item in chosen if item.name not in left
    )
    _say(
        f"{part}: "
        + ", ".join(f"{n} {status}" for status, n in sorted(found.items()))
        + f"; {len(left)} left"
    )
    return any(found[status] for status in BAD)


def _run(
    part: str,
    items: list[Item],
    settings: Settings,
    arguments: argparse.Namespace,
    deadline: float,
    on_result: Any,
) -> list[str]:
    try:
        return run_items(
            part,
            items,
            settings,
            workers=arguments.workers or _WORKERS[part],
            deadline=deadline,
            on_result=on_result,
        )
    except WorkerError as error:
        raise RuntimeError(f"{part}: {error}") from error


class _Progress:
    """A line for what goes wrong, one for every fiftieth item, and for every item where they are slow."""

    def __init__(self, part: str, total: int) -> None:
        self._slow = part in ("bench", "ceilings", "peers", "sanitize")
        self._total, self._done = total, 0

    def show(self, name: str, outcome: Outcome) -> None:
        self._done += 1
        if outcome.status in BAD or self._slow:
            reason = f": {' '.join(outcome.reason.split())[:240]}" if outcome.reason else ""
            _say(f"  [{self._done}/{self._total}] {outcome.status} {name} ({outcome.seconds:.1f} s){reason}")
        elif self._done % 50 == 0:
            _say(f"  [{self._done}/{self._total}]")


def _report(state: State, arguments: argparse.Namespace) -> None:
    from .facts import slug
    from .report import markdown, plain

    text = markdown(state)
    day = time.strftime("%Y-%m-%d", time.gmtime(state["updated"]))
    kept = arguments.results
    if kept is None:
        kept = ROOT / "bench" / "results" / f"gpu-{slug(state['machine']['card'])}-{day}.json"
        if arguments.device == "cpu":
            kept = arguments.state.with_name(kept.name)
    save(only_current(state), kept)
    page = arguments.state.with_suffix(".md")
    page.write_text(text, encoding="utf-8")
    print(plain(text))
    _say(f"written: {kept}, {page}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
