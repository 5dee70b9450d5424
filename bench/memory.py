"""Peak of extra memory of one call, measured in a process of its own.

Linux counts the largest resident set of a process and lets it be reset. A fresh process makes the inputs,
runs the call once (libraries take their workspaces), gives freed memory back, resets the counter, and runs
the call again: the largest resident set minus the one before the call is what the call needed beyond its
    inputs, results included. The allocator is told to map
every block above 64 KiB separately, so that freed memory leaves the resident set and cannot hide a need.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .case import BOTH, MODES, Case, Contender
from .checking import as_tuple, backward_call, copies_of, leaves_of

_TIMEOUT = 600.0  # seconds


def peak_of(call: Callable[[], object]) -> tuple[int, int]:
    """Extra bytes at the peak of `call()`, and the bytes of the tensors it returned.

    Raises:
        OSError: the system does not count (only Linux does).
    """
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_bytes("VmRSS")
    results = call()
    peak = _status_bytes("VmHWM")
    tensors = results if isinstance(results, tuple) else (results,)
    kept = sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor))
    return max(0, peak - before), kept


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def measure_in_child(
    case: Case, part: str, contenders: Sequence[str], threads: int
) -> dict[str, dict[str, int]] | str:
    """`{"peak_extra_bytes", "result_bytes"}` by contender, one after the other; or why there is no answer."""
    words = [case.op, case.name, case.dtype, part, str(threads), *contenders]
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    environment["MALLOC_MMAP_THRESHOLD_"] = environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
    try:
        child = subprocess.run(
            [sys.executable, "-m", __name__, *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {_TIMEOUT:.0f} s"
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit status {child.returncode}"
    answer: dict[str, dict[str, int]] = json.loads(child.stdout.strip().splitlines()[-1])
    return answer


def prepare(case: Case, part: str, contender: Contender) -> Callable[[], object]:
    """The call of one part on fresh inputs."""
    torch.manual_seed(0)
    inputs = case.inputs()
    if part != BOTH:
        call = contender.build(copies_of(inputs, case.mutated))

        def in_its_mode() -> object:
            with MODES[contender.mode]():
                return call()

        return in_its_mode
    leaves = leaves_of(inputs, case.gradients)
    call = contender.build(leaves)
    with torch.no_grad():
        doutputs = tuple(torch.ones_like(out) for out in as_tuple(call()))
    return backward_call(call, leaves, case.gradients, doutputs)


def _child(words: list[str]) -> None:
    from .cases import find_case

    op, name, dtype, part, threads, *names = words
    torch.set_num_threads(int(threads))
    case = find_case(op, name, dtype)
    answer = {}
    for contender in case.contenders:
        if contender.name in names:
            peak, kept = peak_of(prepare(case, part, contender))
            answer[contender.name] = {"peak_extra_bytes": peak, "result_bytes": kept}
    print(json.dumps(answer))


if __name__ == "__main__":
    _child(sys.argv[1:])
