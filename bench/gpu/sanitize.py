"""Part `sanitize`: small calls of every operator under compute-sanitizer's tools: memcheck, racecheck, synccheck, initcheck.

One process for each tool and family. Memory comes from cudaMalloc tensor by tensor, so a read past a tensor is a read past an
allocation. Hostile index values are part of memcheck. Reports that name neither a kernel of fastlm nor its library are counted
apart: torch's own are not ours to judge.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .item import Context, Item, Settings, SkipError, WrongError
from .operators import (
    build,
    is_differentiable,
    poison_fresh_memory,
    raw,
    registered,
    support,
    writes_into_arguments,
)

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin", "/usr/local/cuda/compute-sanitizer")
_PREFERRED = (
    *("everything", "packed_initial", "channel_last_bfloat16", "groups", "past_a_chunk", "bfloat16"),
    *("window", "packed_more_keys", "packed_bfloat16", "past_a_tile_bfloat16", "past_a_tile", "odd_head_dim"),
    *("hybrid", "packed", "model", "past_a_piece_bfloat16", "slots_padding", "ring_several_new"),
    *("several_new_at_the_wrap", "rotary_bfloat16", "documents_initial", "silu", "gaps"),
)
_MOST = 8  # samples of an operator
_LIMIT = 400.0
_OWN_LIMIT = 380  # seconds after which the program ends by itself
_TIMEOUT = "Timeout (0:"  # begins what faulthandler says then


def find_tool(settings: Settings) -> str | None:
    """Path of compute-sanitizer."""
    if settings.sanitizer:
        return settings.sanitizer
    nvcc = shutil.which("nvcc")
    folders = [*_PLACES, *([str(Path(nvcc).resolve().parent)] if nvcc else [])]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders)
    )


def items(settings: Settings) -> list[Item]:
    """Memcheck of everything first."""
    here = registered(settings.device)
    families = [
        family for family, module in support().FAMILIES.items() if any(op in here for op in module.RECIPES)
    ]
    return [
        Item(f"{tool}/{family}", partial(_sanitize, tool, family), limit=_LIMIT + 20)
        for tool in TOOLS
        for family in families
    ]


def chosen_samples(family: str, settings: Settings) -> list[Any]:
    """A few samples of every operator of a family, those with the most going on first."""
    library, here = support(), registered(settings.device)
    found = []
    for op in library.FAMILIES[family].RECIPES:
        if op not in here:
            continue
        samples = library.of(op)
        known = {s.name: s for s in samples}
        preferred = [known[name] for name in _PREFERRED if name in known]
        rest = [s for s in samples if s not in preferred]
        found += (preferred + rest)[: 2 if settings.few else _MOST]
    return found


def _sanitize(tool: str, family: str, context: Context) -> dict[str, Any]:
    path = find_tool(context.settings)
    if path is None:
        raise SkipError("compute-sanitizer was not found; --sanitizer PATH names it")
    words = [path, "--tool", tool, "--error-exitcode", "77", "--target-processes", "all"]
    if tool != "initcheck":  # which must see every kernel that writes
        words += ["--kernel-name", "kns=fastlm"]
    words += [sys.executable, "-m", __name__, tool, family, json.dumps(context.settings.as_dict())]
    environment = dict(os.environ) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    context.stage(f"{tool} of {family}")
    text, code = run_group(words, environment, _LIMIT, context)
    return judge(text, code)


def run_group(
    words: list[str], environment: dict[str, str], limit: float, context: Context
) -> tuple[str, int | None]:
    """Output and exit status of a command, None where it was ended at its limit with everything that it started.

    The output goes through a file: of a pipe, the end would only come with the end of every process that holds it.
    """
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            words, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        context.started(process.pid)
        code: int | None = None
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            context.started(0)
        log.seek(0)
        return log.read(), code


def judge(text: str, code: int | None) -> dict[str, Any]:
    """What a run of the tool found; the exit status is None where it was ended.

    Raises:
        SkipError: the tool does not work here, or takes too long.
        WrongError: reports about fastlm, or the program failed.
    """
    if any(
        words in text
        for words in ("Device not supported", "Unable to find injection library", "unknown option")
    ):
        raise SkipError(f"compute-sanitizer does not work here: {text.strip()[:300]}")
    reports = list(split_reports(text))
    ours = [r for r in reports if "fastlm::" in r or "libfastlm" in r]
    calls = [line for line in text.splitlines() if line.startswith("calls: ")]
    if ours:
        raise WrongError(
            f"{len(ours)} of {len(reports)} reports are about fastlm:\n" + "\n".join(ours[:3])[:2500]
        )
    if code is None or (not calls and _TIMEOUT in text):
        raise SkipError(f"it took longer than {_LIMIT:.0f} s")
    if not calls:
        raise WrongError(
            f"exit status {code}, and the calls did not come to their end:\n{text.strip()[-1500:]}"
        )
    done = json.loads(calls[-1].removeprefix("calls: "))
    return {
        "calls": done["calls"],
        "refused": done["refused"],
        "reports_about_others": len(reports),
        "exit": code,
    }


def split_reports(text: str) -> Iterator[str]:
    """The tool's reports: a line that starts one is indented less than those that belong to it."""
    current: list[str] = []
    for line in text.splitlines():
        if not line.startswith("========="):
            continue
        words = line.removeprefix("=========")
        is_head = words.startswith(" ") and not words.startswith("   ") and words.strip() != ""
        if is_head:
            if current:
                yield "\n".join(current)
            quiet = (
                "COMPUTE-SANITIZER",
                "ERROR SUMMARY",
                "RACECHECK SUMMARY",
                "LEAK SUMMARY",
                "Target application",
            )
            current = [] if words.strip().startswith(quiet) else [words.strip()]
        elif current and words.strip():
            current.append(words.rstrip())
    if current:
        yield "\n".join(current)


def main() -> int:
    """Runs under the tool: every chosen sample once, gradients and hostile values included."""
    faulthandler.dump_traceback_later(_OWN_LIMIT, exit=True)
    tool, family, settings = sys.argv[1], sys.argv[2], Settings(**json.loads(sys.argv[3]))
    poison_fresh_memory(tool != "initcheck")  # filled memory is initialised memory
    warnings.simplefilter("ignore")
    context, count, refused = Context(settings), 0, 0
    for sample in chosen_samples(family, settings):
        print(f"{sample}", flush=True)
        call = build(sample, settings.device)
        gradients = is_differentiable(sample.op) and not writes_into_arguments(sample.op)
        _run(sample, call.requires_grad() if gradients else call, gradients)
        count += 1
        if tool == "memcheck":
            refused += _hostile(sample, context)
    if settings.device == "cuda":
        torch.cuda.synchronize()
    print("calls: " + json.dumps({"calls": count, "refused": refused}), flush=True)
    return 0


def _run(sample: Any, call: Any, gradients: bool) -> None:
    from .operators import tensors_of

    outputs = tensors_of(raw(sample.op)(*call.args, **call.kwargs))
    roots = [t for t in outputs if t.requires_grad and t.numel() > 0]
    if gradients and roots:
        leaves = list(call.floating().values())
        torch.autograd.grad(roots, leaves, [torch.ones_like(t) for t in roots], allow_unused=True)


def _hostile(sample: Any, context: Context) -> int:
    from . import edges

    refused = 0
    for argument in edges.index_arguments(sample.op, sample):
        refused += len(edges.check_hostile(sample.op, sample, argument, context)["refused"])
    return refused


if __name__ == "__main__":
    sys.exit(main())
