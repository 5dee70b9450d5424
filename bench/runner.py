"""Runs cases: reference, check of every contender, interleaved timing, memory. Answers plain data for the
record.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import timing
from .case import BOTH, Case, Contender, Inputs, UnavailableError
from .ceilings import floor_seconds
from .checking import (
    Expected,
    as_tuple,
    backward_call,
    check,
    compute_expected,
    copies_of,
    doutputs_like,
    leaves_of,
)
from .memory import measure_in_child

TIMED, WRONG, FAILED, UNAVAILABLE, SKIPPED = "timed", "wrong", "failed", "unavailable", "skipped"


@dataclass(frozen=True)
class Settings:
    """What a run was asked for."""

    plan: timing.Plan
    threads: int = 1
    compile: bool = False
    memory: bool = True
    patience: float = 20.0  # seconds a single call may take by estimate
    rates: Mapping[str, float] = field(default_factory=dict)  # measured ceilings


@dataclass
class Verdict:
    """Result of the check of one contender."""

    status: str
    reason: str = ""
    errors: dict[str, float] | None = None
    tolerance: float = 0.0


def run_case(
    case: Case, settings: Settings, report: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Measures one case.

    Args:
        case: what to measure.
        settings: how, and the ceilings that decide whom to wait for.
        report: called with a line before every longer step.

    Returns:
        One result per part, as `record.py` describes.
    """
    torch.manual_seed(0)
    inputs = case.inputs()
    report(f"{case.label}: checking")
    verdicts = _check_all(case, inputs, settings)
    results = []
    for part in case.parts:
        report(f"{case.label}: {part}")
        results.append(_run_part(case, part, inputs, verdicts, settings))
    return results


def _check_all(case: Case, inputs: Inputs, settings: Settings) -> dict[str, Verdict]:
    """A verdict for each contender, by name."""
    references: dict[Any, Expected] = {}
    verdicts = {}
    for contender in case.contenders:
        build = contender.reference or case.reference
        if contender.compiled and not settings.compile:
            verdicts[contender.name] = Verdict(SKIPPED, "torch.compile takes its time: --compile includes it")
            continue
        try:
            if build not in references:
                references[build] = compute_expected(case, inputs, build)
        except Exception as error:
            verdicts[contender.name] = Verdict(FAILED, f"no reference to check against: {_one_line(error)}")
            continue
        verdicts[contender.name] = _check_one(case, contender, inputs, references[build], settings)
        gc.collect()
    return verdicts


def _check_one(
    case: Case, contender: Contender, inputs: Inputs, expected: Expected, settings: Settings
) -> Verdict:
    allowed = case.allowed_error if contender.tolerance is None else contender.tolerance
    skipped = skipped_parts(case, contender, settings)
    if len(skipped) == len(case.parts):
        return Verdict(SKIPPED, next(iter(skipped.values())))
    try:
        errors = check(case, contender, inputs, expected, backward=BOTH not in skipped)
    except (UnavailableError, NotImplementedError) as error:
        return Verdict(UNAVAILABLE, _one_line(error))
    except Exception as error:
        return Verdict(FAILED, _one_line(error))
    wrong = {name: error for name, error in errors.items() if not error <= allowed}
    if wrong:
        worst = sorted(wrong.items(), key=lambda item: -item[1])[:3]
        text = ", ".join(f"{name} {error:.2g}" for name, error in worst)
        return Verdict(WRONG, f"relative error above {allowed:g}: {text}", errors, allowed)
    return Verdict(TIMED, "", errors, allowed)


def skipped_parts(case: Case, contender: Contender, settings: Settings) -> dict[str, str]:
    """Parts that the contender cannot do, or that would try the run's patience, with the reason."""
    skipped = {part: why for part, why in contender.skip_parts.items() if part in case.parts}
    for part in case.parts:
        seconds = floor_seconds(contender.cost.get(part, {}), settings.rates) or 0.0
        if seconds > settings.patience:
            skipped[part] = f"would take about {seconds:.0f} s a call on this machine; --patience includes it"
    return skipped


def _run_part(
    case: Case, part: str, inputs: Inputs, verdicts: dict[str, Verdict], settings: Settings
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    runners: list[tuple[dict[str, Any], timing.Runner]] = []
    for contender in case.contenders:
        verdict = verdicts[contender.name]
        row: dict[str, Any] = {
            "name": contender.name,
            "ours": contender.ours,
            "orientation": contender.reference is not None,
        }
        row |= {
            "status": verdict.status,
            "reason": verdict.reason,
            "errors": verdict.errors,
            "tolerance": verdict.tolerance,
        }
        rows.append(row)
        if verdict.status != TIMED:
            continue
        skipped = skipped_parts(case, contender, settings)
        if part in skipped:
            row |= {"status": SKIPPED, "reason": skipped[part]}
            continue
        try:
            runners.append((row, _runner(case, part, contender, inputs)))
        except Exception as error:  # it passed the check, so this is memory or the like
            row |= {"status": FAILED, "reason": _one_line(error)}
    timing.interleave([runner for _, runner in runners], settings.plan)
    for row, runner in runners:
        row["samples"] = {"wall": runner.wall, "cpu": runner.cpu}
        row["calls_per_sample"] = runner.calls_per_sample
    runners.clear()
    if case.memory and settings.memory and part == case.parts[-1]:
        _add_memory(case, part, rows, settings.threads)
    work = case.work[part]
    return {
        "op": case.op,
        "case": case.name,
        "dtype": case.dtype,
        "part": part,
        "shape": dict(case.shape),
        "threads": settings.threads,
        "work": {"amount": work.amount, "unit": work.unit, "floor": dict(work.floor), "bytes": work.bytes},
        "targets": [asdict(target) for target in case.targets if target.part == part],
        "note": case.note,
        "finished": time.time(),
        "contenders": rows,
    }


def _runner(case: Case, part: str, contender: Contender, inputs: Inputs) -> timing.Runner:
    if part != BOTH:
        return timing.Runner(contender.build(copies_of(inputs, case.mutated)), contender.mode)
    leaves = leaves_of(inputs, case.gradients)
    call = contender.build(leaves)
    with torch.no_grad():
        outputs = as_tuple(call())
    generator = torch.Generator().manual_seed(1)
    random = [
        torch.ones_like(out)
        if out.dim() == 0
        else torch.randn(out.shape, generator=generator, dtype=torch.float64)
        for out in outputs
    ]
    doutputs = doutputs_like(random, outputs)
    return timing.Runner(backward_call(call, leaves, case.gradients, doutputs), "grad")


def _add_memory(case: Case, part: str, rows: list[dict[str, Any]], threads: int) -> None:
    timed = [row for row in rows if row["status"] == TIMED]
    answer = measure_in_child(case, part, [row["name"] for row in timed], threads)
    for row in timed:
        row["memory"] = {"reason": answer} if isinstance(answer, str) else answer[row["name"]]


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    if isinstance(error, NotImplementedError):  # the dispatcher's text goes on for pages
        text = text.partition(". ")[0]
    return (
        text
        if isinstance(error, (UnavailableError, NotImplementedError))
        else f"{type(error).__name__}: {text}"
    )
