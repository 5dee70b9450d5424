"""Facts about the card, the driver and the software of a run, and what the card does while something is measured."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..machine import git_commit, machine_facts, software_facts

_QUERY = ("clocks.sm", "power.draw", "temperature.gpu")


def gather(device: str) -> dict[str, Any]:
    """Git, machine and software, as `state.py` describes."""
    import fastlm

    host = machine_facts()
    machine: dict[str, Any] = {"card": host["cpu"], "host": host, "device": device}
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        machine |= {
            "card": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": getattr(p, "L2_cache_size", None),
            "driver": _smi("driver_version"),
            "clocks_max_sm": _smi("clocks.max.sm"),
            "power_limit": _smi("power.limit"),
            "ecc": _smi("ecc.mode.current"),
        }
    software = software_facts() | {"cuda": torch.version.cuda, "platform": platform.platform()}
    library = Path(fastlm._library._folder()) / "libfastlm_ops.so"
    software["library"] = hashlib.sha256(library.read_bytes()).hexdigest()[:16]
    software["triton"] = _version("triton")
    return {"git": git_commit(), "machine": machine, "software": software}


def slow_build(facts: Mapping[str, Any]) -> str:
    """What a build lacks for the card at hand, in a sentence; empty if nothing."""
    if facts["machine"].get("capability") != "9.0":
        return ""
    info = facts["software"]["fastlm"]
    lacks = []
    if info["cutlass"]["version"] is None:
        lacks.append("CUTLASS's headers (package nvidia-cutlass, at build time)")
    if "90a" not in info["cuda"]["architectures"]:
        lacks.append("the architecture 90a")
    if not lacks:
        return ""
    return (
        f"fastlm was built without {' and without '.join(lacks)}: its kernels for this card (wgmma) are missing, those for sm_80 "
        "run in their place, and the targets are not meant for them"
    )


def slug(card: str) -> str:
    """A card's name as part of a file's name: `h100-80gb-hbm3`."""
    words = "".join(c if c.isalnum() else " " for c in card.lower()).split()
    return "-".join(word for word in words if word not in ("nvidia", "geforce", "r", "tm")) or "gpu"


def _version(package: str) -> str | None:
    try:
        return str(__import__(package).__version__)
    except (ImportError, AttributeError):
        return None


def _smi(query: str) -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    words = [tool, f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().splitlines()[0].strip() if answer.stdout.strip() else None


class Watch:
    """SM clock, power and temperature while a block runs: `with Watch(device) as watch: ...; watch.data()`.

    Through pynvml every 20 ms; without it, one look by nvidia-smi at the end.
    """

    def __init__(self, device: str) -> None:
        self._samples: list[tuple[float, ...]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._handle: Any = None
        self._nvml: Any = None
        self._on = device == "cuda"
        if not self._on:
            return
        try:
            pynvml = importlib.import_module("pynvml")

            pynvml.nvmlInit()
            card = torch.cuda.get_device_properties(0)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{card.uuid}")
            self._nvml = pynvml
        except Exception:  # absent, another version, or a machine that hides it
            self._handle = None

    def _look(self) -> None:
        nvml, handle = self._nvml, self._handle
        while not self._stop.is_set():
            try:
                clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
                power = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
                heat = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
                self._samples.append((float(clock), float(power), float(heat)))
            except Exception:
                return
            time.sleep(0.02)

    def __enter__(self) -> Watch:
        if self._handle is not None:
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._on and not self._samples:
            found = [_smi(query) for query in _QUERY]
            with contextlib.suppress(ValueError):
                self._samples.append(tuple(float(x) for x in found if x is not None))

    def data(self) -> dict[str, Any]:
        """Least, middle and largest of each, or nothing."""
        if not self._samples or len(self._samples[0]) != 3:
            return {}
        names = ("sm_mhz", "watts", "celsius")
        columns = {
            name: sorted(column) for name, column in zip(names, zip(*self._samples, strict=True), strict=True)
        }
        return {name: [c[0], c[len(c) // 2], c[-1]] for name, c in columns.items()}
