"""The run's log: one JSON object per line; survives a process that dies while writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastlm.training.atomic import write_bytes

LOG_NAME = "log.jsonl"


class RunLog:
    """Appends entries; each has `kind` (`step` or `evaluation`) and `step` (steps done)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG_NAME

    def rewind(self, step: int) -> None:
        """Drops entries past `step` and a half-written last line: they will be written again."""
        kept = [entry for entry in self.read() if entry["step"] <= step]
        write_bytes(self.path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())

    def append(self, **entry: Any) -> None:
        """Adds one line."""
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole entries in order; unreadable lines are left out."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        entries = []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                entries.append(entry)
        return entries
