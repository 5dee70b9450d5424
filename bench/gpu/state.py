"""The file in which results are kept from call to call.

schema     1
kind       "fastlm gpu"
created, updated   seconds since 1970
git        {commit, changed} or null
machine    card, compute capability, driver, memory, clocks, host (see facts.py)
software   torch, CUDA, fastlm's build_info, hash of the operator library
parts      {part: {items: {name: item}, missing: {operator: why}, unfinished: [names]}}
item       {status, reason, seconds, data, fingerprint, finished}

The fingerprint names the card and the operator library an item ran with: with another library it is run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..record import save as save_record
from .item import BAD, GIVEN_UP, Item, Outcome

SCHEMA = 1
KIND = "fastlm gpu"
PARTS = ("check", "sanitize", "ceilings", "peers", "bench")

State = dict[str, Any]


def new_state(facts: dict[str, Any]) -> State:
    """Without any result."""
    now = time.time()
    head = {"schema": SCHEMA, "kind": KIND, "created": now, "updated": now, **facts}
    return {**head, "parts": {part: {"items": {}} for part in PARTS}}


def load(path: Path) -> State:
    """Reads what `save` wrote.

    Raises:
        ValueError: not such a file; the text names it.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(state, dict) or state.get("kind") != KIND or state.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected results of {KIND}, schema {SCHEMA}")
    for part in PARTS:
        state["parts"].setdefault(part, {"items": {}})
    return state


def save(state: State, path: Path) -> None:
    """Writes the file; it appears complete or not at all."""
    state["updated"] = time.time()
    save_record(state, path)


def keep(state: State, part: str, name: str, outcome: Outcome, fingerprint: str) -> None:
    """Adds or replaces the result of an item."""
    entry = outcome.as_dict() | {"fingerprint": fingerprint, "finished": time.time()}
    state["parts"][part]["items"][name] = entry


def to_do(
    state: State, part: str, items: Iterable[Item], fingerprint: str, *, redo: bool, redo_failed: bool
) -> list[Item]:
    """The items without a result of this card and library."""
    known = state["parts"][part]["items"]

    def is_done(item: Item) -> bool:
        entry = known.get(item.name)
        if redo or entry is None or entry["fingerprint"] != fingerprint:
            return False
        given_up = entry["reason"].startswith(GIVEN_UP)
        return not (redo_failed and (entry["status"] in BAD or given_up))

    return [item for item in items if not is_done(item)]
