"""The file in which results are kept from call to call.

schema     1
kind       "fastlm gpu"
created, updated   seconds since 1970
git        {commit, changed} or null
machine    card, compute capability, driver, memory, clocks, host (see facts.py)
software   torch, CUDA, fastlm's build_info, hash of the operator library
parts      {part: {items: {name: item}, missing: {operator: why}, unfinished: [names]}}
item       {status, reason, seconds, data, fingerprint, means, finished}

The fingerprint names the card and the operator library an item ran with: with another library it is run again, and the report
leaves the old result out. The means are the tool or the packages that were there: with others, what lacked one is run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..record import save as save_record
from .item import BAD, GIVEN_UP, SKIPPED, UNAVAILABLE, Item, Outcome

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


def keep(state: State, part: str, name: str, outcome: Outcome, fingerprint: str, means: str = "") -> None:
    """Adds or replaces the result of an item."""
    entry = outcome.as_dict() | {"fingerprint": fingerprint, "means": means, "finished": time.time()}
    state["parts"][part]["items"][name] = entry


def fingerprint_of(facts: Mapping[str, Any], part: str) -> str:
    """What results of a part depend on: the card, and but for the ceilings the operator library."""
    card = f"{facts['machine']['card']}, driver {facts['machine'].get('driver')}"
    return card if part in ("ceilings", "peers") else f"{card}, library {facts['software']['library']}"


def current(state: Mapping[str, Any], part: str) -> dict[str, Any]:
    """A part's results by name, those of the card, driver and library that the head of the file names."""
    mark = fingerprint_of(state, part)
    return {
        name: entry for name, entry in state["parts"][part]["items"].items() if entry["fingerprint"] == mark
    }


def only_current(state: State) -> State:
    """A copy without the results of other cards, drivers and libraries."""
    parts = {part: {**found, "items": current(state, part)} for part, found in state["parts"].items()}
    return {**state, "parts": parts}


def to_do(
    state: State,
    part: str,
    items: Iterable[Item],
    fingerprint: str,
    *,
    redo: bool,
    redo_failed: bool,
    means: str = "",
) -> list[Item]:
    """The items without a result of this card and library, and those that lacked a tool or a package if the means are others now."""
    known = state["parts"][part]["items"]

    def is_done(item: Item) -> bool:
        entry = known.get(item.name)
        if redo or entry is None or entry["fingerprint"] != fingerprint:
            return False
        if _lacked(part, entry) and (part == "peers" or entry.get("means", "") != means):
            return False  # looking for a peer takes no time: always again
        given_up = entry["reason"].startswith(GIVEN_UP)
        return not (redo_failed and (entry["status"] in BAD or given_up))

    return [item for item in items if not is_done(item)]


def _lacked(part: str, entry: Mapping[str, Any]) -> bool:
    """Whether a tool or a package was missing."""
    if part in ("peers", "sanitize"):
        return bool(entry["status"] == SKIPPED)
    results = entry["data"].get("parts", {}).values() if part == "bench" else ()
    return any(row["status"] == UNAVAILABLE for result in results for row in result["contenders"])
