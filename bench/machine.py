"""Facts about the machine and the software of a run."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16"),
)


def usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def pin(threads: int) -> list[int] | None:
    """Fixes torch's threads and lets them run on as many CPUs; returns these CPUs, None where that is not
    possible.
    """
    torch.set_num_threads(threads)
    if not hasattr(os, "sched_setaffinity"):
        return None
    chosen = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, chosen)
    return chosen


def machine_facts() -> dict[str, Any]:
    """Model, number of CPUs, instruction sets, memory, caches."""
    cpuinfo = _read("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "family": fields.get("cpu family"),
        "model": fields.get("model"),
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in present],
        "caches": _caches(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
    }


def software_facts() -> dict[str, Any]:
    """Versions and flags of everything that was compiled."""
    import fastlm

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fastlm": fastlm.build_info(),
        "cpu_level": fastlm.cpu_capability(),
    }


def load_average() -> float | None:
    """Mean number of runnable processes in the last minute: what else went on."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def git_commit() -> dict[str, Any] | None:
    """Commit of the checkout this package lies in and whether it was changed; None outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        # Only a folder that git tracks belongs to the repository around it (an environment may lie inside
        # one).
        if not _git(folder, "ls-files", Path(__file__).name):
            return None
        return {
            "commit": commit,
            "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None


def _git(folder: Path, *words: str) -> str:
    answer = subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True
    )
    return answer.stdout.strip()


def _caches() -> dict[str, str]:
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level = _read(folder / "type").strip(), _read(folder / "level").strip()
        if kind != "Instruction":
            found[f"L{level}"] = _read(folder / "size").strip()
    return found


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
