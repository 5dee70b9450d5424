"""The run record `run.json`: settings, machine, versions, schedule, state and result of a run."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fastlm.training.atomic import write_json
from fastlm.training.config import TrainConfig, reason
from fastlm.training.errors import InputError

FORMAT: Literal["fastlm-run-1"] = "fastlm-run-1"
RECORD_NAME = "run.json"


class RunRecord(BaseModel):
    """Saved beside the checkpoints; `config` starts the same run again."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["fastlm-run-1"] = FORMAT
    status: Literal["preparing", "running", "interrupted", "finished"] = "preparing"
    created: str
    config: TrainConfig
    dtype: Literal["fp32", "bf16"]  # what `auto` became
    threads: int
    environment: dict[str, Any]
    parameters: int = 0
    data: dict[str, Any] | None = None
    objective: dict[str, Any] | None = None  # what the objective must find again when the run goes on
    schedule: dict[str, int] | None = None
    step: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    result: dict[str, Any] | None = None

    def save(self, folder: Path) -> None:
        """Replaces the record in one step."""
        write_json(folder / RECORD_NAME, self.model_dump(mode="json"))


def load_record(folder: Path) -> RunRecord:
    """Reads the record of a run.

    Raises:
        InputError: there is no run in `folder`, or its record is damaged or of another version.
    """
    path = folder / RECORD_NAME
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"expected the folder of a run (with {RECORD_NAME}), found none at {folder}"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"run record: {path} cannot be read: {reason(error)}") from error
    found = value.get("format") if isinstance(value, dict) else type(value).__name__
    if found != FORMAT:
        raise InputError(f"run record: expected format {FORMAT} in {path}, found {found!r}")
    try:
        return RunRecord.model_validate(value)
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(str(part) for part in item["loc"])
        raise InputError(f"run record: {where} in {path}: {item['msg']}, got {item['input']!r}") from None


def now() -> str:
    """UTC time to the second, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def describe_environment() -> dict[str, Any]:
    """Versions, machine, build and the working folder's git commit (None outside a repository)."""
    import fastlm

    return {
        "python": platform.python_version(),
        "versions": {
            name: _version(name) for name in ("fastlm", "torch", "numpy", "tokenizers", "safetensors")
        },
        "platform": platform.platform(),
        "machine": machine_name(),
        "cpus": os.cpu_count(),
        "cpu_capability": fastlm.cpu_capability(),
        "build_info": fastlm.build_info(),
        "git_commit": _git_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def machine_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
