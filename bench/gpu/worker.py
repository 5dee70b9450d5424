"""A worker process: reads names of items, one a line, runs them, and answers on a pipe of its own.

An error of CUDA stays with a process for good. After one the worker says so and ends; the next item gets a new process.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from dataclasses import replace
from typing import IO, Any

import torch

from .faults import faults
from .item import FAILED, PASSED, SKIPPED, Context, Item, Settings, SkipError, WrongError
from .pool import answer_pipe


def items_of(part: str, settings: Settings) -> list[Item]:
    """What a part consists of, the most important first."""
    if part == "check":
        from .check import items
    elif part == "sanitize":
        from .sanitize import items
    elif part == "ceilings":
        from .ceilings import items
    elif part == "peers":
        from .peers import items
    elif part == "bench":
        from .measure import items
    else:
        raise ValueError(f"no part is called {part!r}")
    found = items(settings)
    return [*faults(), *found] if settings.faults else found


def _run(item: Item, context: Context) -> dict[str, Any]:
    try:
        data = item.run(context)
        _synchronize(context)
        return {"status": PASSED, "reason": "", "data": data or {}}
    except SkipError as why:
        return {"status": SKIPPED, "reason": str(why), "data": {}}
    except (WrongError, AssertionError) as wrong:
        return {"status": FAILED, "reason": str(wrong).strip()[:2000], "data": {}}
    except torch.OutOfMemoryError as error:
        return {"status": SKIPPED, "reason": f"out of memory: {_first_line(error)}", "data": {}}
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__)[-3:])
        return {"status": FAILED, "reason": f"{type(error).__name__}: {error}\n{where}"[:3000], "data": {}}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _synchronize(context: Context) -> None:
    if context.device == "cuda":
        torch.cuda.synchronize()


def _is_fatal(context: Context) -> bool:
    """Whether CUDA is in an error that stays with this process."""
    try:
        _synchronize(context)
    except Exception:
        return True
    return False


def main() -> int:
    """Serves until the input ends."""
    part, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    answers: IO[str] = os.fdopen(answer_pipe(), "w", encoding="utf-8")

    def say(words: dict[str, Any]) -> None:
        answers.write(json.dumps(words, default=str) + "\n")
        answers.flush()

    context = Context(settings, lambda words: say({"stage": words}), lambda group: say({"group": group}))
    if settings.peers:
        from .peers import add_folder

        add_folder(settings.peers)
    items = {item.name: item for item in items_of(part, settings)}
    say({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        result = _run(items[asked["item"]], replace(context, ours_only=asked["ours_only"]))
        fatal = _is_fatal(context)
        if fatal and result["status"] in (PASSED, SKIPPED):
            result = {"status": FAILED, "reason": "CUDA is in an error state afterwards", "data": {}}
        say({"result": result, "fatal": fatal})
        if fatal:
            os._exit(0)  # torch's own clean-up would hang or abort
        gc.collect()
        if context.device == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
