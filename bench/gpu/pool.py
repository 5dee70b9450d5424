"""Runs items in worker processes. A worker that dies or hangs costs the item it was at, which is recorded; the next item gets a new
worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..machine import usable_cpus
from .item import CRASHED, GIVEN_UP, HUNG, PASSED, SKIPPED, Item, Outcome, Settings

START_LIMIT = 300.0  # seconds until a worker has loaded torch and the library
_ANSWERS = "FASTLM_GPU_ANSWERS"
_MOST_LOST = 3  # workers that items of one kind and operator may cost
_WITH_PEERS = ("bench",)  # parts whose items are tried without peers where one of these costs the worker
_LOG_TAIL = 1500  # characters of a dead worker's output that are kept


class WorkerError(RuntimeError):
    """No worker comes up at all."""


class _Worker:
    """One process, asked one item at a time."""

    def __init__(self, part: str, settings: Settings, threads: int) -> None:
        read, write = os.pipe()
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        environment[_ANSWERS] = str(write)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        words = [sys.executable, "-m", f"{__package__}.worker", part, json.dumps(settings.as_dict())]
        self._process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
            pass_fds=(write,),
            start_new_session=True,  # so that it can be ended with whatever it started
        )
        os.close(write)
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        self.stage = ""
        self._group = 0  # of what it started apart from its own group

    def _listen(self, read: int) -> None:
        with os.fdopen(read, encoding="utf-8") as lines:
            for line in lines:
                self._answers.put(json.loads(line))
        self._answers.put(None)

    def wait_for(self, key: str, seconds: float) -> dict[str, Any] | str:
        """The next answer that has `key`; else "died" or "late"."""
        end = time.monotonic() + seconds
        while True:
            try:
                answer = self._answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return "late"
            if answer is None:
                return "died"
            if key in answer:
                return answer
            self.stage = answer.get("stage", self.stage)
            self._group = answer.get("group", self._group)

    def ask(self, name: str, *, ours_only: bool = False) -> None:
        """Sends an item's name, and whether peers are left out of it."""
        self.stage = ""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"item": name, "ours_only": ours_only}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; wait_for says so

    def end(self) -> str:
        """Stops the process and what it started; the end of its output."""
        for group in (self._process.pid if self._process.poll() is None else 0, self._group):
            with contextlib.suppress(ProcessLookupError):
                if group:
                    os.killpg(group, signal.SIGKILL)
        self._group = 0
        code = self._process.wait()
        if self._log.closed:
            return ""
        self._log.seek(0)
        tail = self._log.read()[-_LOG_TAIL:].strip()
        self._log.close()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"{how}\n{tail}" if tail else how

    def finish(self) -> None:
        """Lets an idle process end by itself."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.end()


def _group(name: str) -> str:
    """Kind and operator of an item."""
    return "/".join(name.split("/")[:2])


def _attempt(worker: _Worker, item: Item, deadline: float, *, ours_only: bool) -> tuple[Outcome | None, bool]:
    """What became of an item, None where the time of the run ended, and whether the worker is lost with it."""
    begin = time.monotonic()
    limit = min(item.limit, max(1.0, deadline - begin))
    worker.ask(item.name, ours_only=ours_only)
    answer = worker.wait_for("result", limit)
    seconds = time.monotonic() - begin
    if isinstance(answer, dict):
        result = answer["result"]
        if answer["fatal"]:
            worker.end()
        return Outcome(result["status"], result["reason"], seconds, result["data"]), answer["fatal"]
    where = f" at: {worker.stage}" if worker.stage else ""
    tail = worker.end()
    if answer == "died":
        return Outcome(CRASHED, f"the process died{where}: {tail}", seconds), True
    late = Outcome(HUNG, f"no answer for {limit:.0f} s{where}", seconds)
    return (None if limit < item.limit else late), True


def _with_and_without_peers(first: Outcome, second: Outcome | None) -> Outcome:
    """A case that cost its worker, and what came of it with fastlm's own contenders alone."""
    if second is None or second.status != PASSED:
        return first
    return replace(second, reason=f"peers left out; with them it {first.status}: {first.reason}")


def run_items(
    part: str,
    items: Sequence[Item],
    settings: Settings,
    *,
    workers: int,
    deadline: float,
    on_result: Callable[[str, Outcome], None],
) -> list[str]:
    """Runs the items, several at a time, until all are done or the time is up.

    Args:
        part: whose items these are.
        items: in order of importance.
        settings: for the workers.
        workers: processes at a time.
        deadline: on the monotonic clock; an item that would run past it is left undone.
        on_result: called with name and outcome, one call at a time.

    Returns:
        Names of items that were left undone.

    Raises:
        WorkerError: a worker does not even start; the text holds its output.
    """
    waiting = deque(items)
    left: list[str] = []
    lock = threading.Lock()
    problems: list[str] = []
    alive: set[_Worker] = set()
    lost: Counter[str] = Counter()
    workers = max(1, min(workers, len(items)))
    threads = max(1, usable_cpus() // workers)

    def take() -> Item | None:
        with lock:
            while waiting and time.monotonic() < deadline and not problems:
                item = waiting.popleft()
                if lost[_group(item.name)] < _MOST_LOST:
                    return item
                on_result(
                    item.name, Outcome(SKIPPED, f"{GIVEN_UP}: {_MOST_LOST} of its kind crashed or hung")
                )
            return None

    def put(name: str, outcome: Outcome, *, fatal: bool) -> None:
        with lock:
            lost[_group(name)] += fatal
            on_result(name, outcome)

    def serve() -> None:
        worker: _Worker | None = None
        while (item := take()) is not None:
            first: Outcome | None = None  # of a case with peers in it, where that cost the worker
            while True:
                if worker is None:
                    worker = _Worker(part, settings, threads)
                    alive.add(worker)
                    if isinstance(found := worker.wait_for("ready", START_LIMIT), str):
                        problems.append(f"the worker did not start ({found}): {worker.end()}")
                        waiting.appendleft(item)
                        return
                outcome, fatal = _attempt(worker, item, deadline, ours_only=first is not None)
                if fatal:
                    worker = None
                if fatal and outcome is not None and part in _WITH_PEERS and first is None:
                    first = outcome
                    continue
                break
            if first is not None:
                outcome = _with_and_without_peers(first, outcome)
            if outcome is None:
                left.append(item.name)  # it was the time of the run that ended
            else:
                put(item.name, outcome, fatal=fatal)
        if worker is not None:
            worker.finish()

    servers = [threading.Thread(target=serve, daemon=True) for _ in range(workers)]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.join()
    except BaseException:  # a keyboard interrupt, say
        for worker in alive:
            worker.end()
        raise
    if problems:
        raise WorkerError(problems[0])
    return left + [item.name for item in waiting]


def answer_pipe() -> int:
    """In a worker: the file descriptor for its answers."""
    return int(os.environ[_ANSWERS])
