"""Items that go wrong on purpose: does the script survive them?"""

from __future__ import annotations

import os
import time
from typing import Any

from .item import Context, Item, SkipError, WrongError


def _dies(context: Context) -> dict[str, Any] | None:
    context.stage("about to abort")
    os.abort()


def _hangs(context: Context) -> dict[str, Any] | None:
    context.stage("about to sleep")
    time.sleep(3600)
    return None


def _raises(context: Context) -> dict[str, Any] | None:
    raise KeyError("no such thing")


def _is_wrong(context: Context) -> dict[str, Any] | None:
    raise WrongError("out: 1, reference 2")


def _does_not_apply(context: Context) -> dict[str, Any] | None:
    raise SkipError("not here")


def faults() -> list[Item]:
    """One of each kind."""
    return [
        Item("faults/dies", _dies),
        Item("faults/hangs", _hangs, limit=1.0),
        Item("faults/raises", _raises),
        Item("faults/is_wrong", _is_wrong),
        Item("faults/does_not_apply", _does_not_apply),
    ]
