"""The JSON file of a run: everything that tables and plots are made from.

schema        1
created       seconds since 1970
git           {commit, changed} or null
machine       see machine.py; software: versions, build flags, CPU level
settings      threads, cpus (pinned to), quick, rounds, command
load          load average before and after the run
ceilings      {level, rates: {threads: {name: per second}}} measured here, or null
reference     the machine the targets were set on, same form
results       list of {op, case, dtype, part, shape, threads, work, targets, note, finished, contenders}
contenders    list of {name, ours, orientation, status, reason, errors, tolerance, samples: {wall, cpu}
(seconds per call),
              calls_per_sample, memory: {peak_extra_bytes, result_bytes} or {reason}}
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .ceilings import REFERENCE_MACHINE, REFERENCE_RATES

SCHEMA = 1
_KEYS = (
    "schema",
    "created",
    "git",
    "machine",
    "software",
    "settings",
    "load",
    "ceilings",
    "reference",
    "results",
)

Record = dict[str, Any]


def reference() -> dict[str, Any]:
    """The machine of the targets."""
    return {"machine": REFERENCE_MACHINE, "rates": REFERENCE_RATES}


def save(record: Record, path: str | Path) -> None:
    """Writes a record; the file appears complete or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n")
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files for their owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | Path) -> Record:
    """Reads what `save` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a record of this schema; the text names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"bench: no such file: {path}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{path}: schema must be {SCHEMA}, got {found!r}")
    missing = [key for key in _KEYS if key not in record]
    if missing:
        raise ValueError(f"{path}: expected a bench record, {', '.join(missing)} missing")
    return record


def _plain(value: Any) -> Any:
    """JSON has no infinity: an unbounded error is written as the text "inf"."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value
