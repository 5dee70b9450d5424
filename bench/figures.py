"""Numbers of a record: medians, rates, shares of ceilings, ratios, targets. Pure functions of the JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .case import BACKWARD, BOTH, FORWARD
from .ceilings import floor_seconds
from .quantiles import median, quantile

Result = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """Seconds of one call."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Outcome:
    """A target and what became of it.

    Attributes:
        text: the target in words, as it was set.
        wanted: the target on this machine in words.
        found: what was measured, in words.
        met: None if it could not be decided.
    """

    text: str
    wanted: str
    found: str
    met: bool | None


def key_of(result: Result) -> tuple[str, str, str, str]:
    """What a result is about."""
    return result["op"], result["case"], result["dtype"], result["part"]


def spread(row: Row, clock: str = "wall") -> Spread | None:
    """Median and 20th and 80th percentile, None if it was not timed."""
    samples = row.get("samples", {}).get(clock)
    if row["status"] != "timed" or not samples:
        return None
    return Spread(median(samples), quantile(samples, 0.2), quantile(samples, 0.8))


def row_named(result: Result, name: str | None) -> Row | None:
    """The contender called `name`."""
    return next((row for row in result["contenders"] if row["name"] == name), None)


def main_row(result: Result) -> Row | None:
    """fastlm itself: the first contender of ours."""
    return next((row for row in result["contenders"] if row["ours"]), None)


def rates_at(machine: Mapping[str, Any] | None, threads: int) -> Mapping[str, float]:
    """Ceilings of a machine for a number of threads; those of one thread times their number if they were not
    measured.
    """
    rates = (machine or {}).get("rates", {})
    if str(threads) in rates:
        return rates[str(threads)]  # type: ignore[no-any-return]
    return {name: rate * threads for name, rate in rates.get("1", {}).items()}


def share_of_ceiling(record: Mapping[str, Any], result: Result, seconds: float) -> float | None:
    """Least possible time over measured time."""
    least = floor_seconds(result["work"]["floor"], rates_at(record["ceilings"], result["threads"]))
    return None if least is None else least / seconds


def derived_backward(forward: Result, both: Result, clock: str = "wall") -> dict[str, float]:
    """Median of forward+backward minus median of forward, by contender that has both."""
    found = {}
    for row in both["contenders"]:
        other = row_named(forward, row["name"])
        if other is None:
            continue
        whole, part = spread(row, clock), spread(other, clock)
        if whole is not None and part is not None:
            found[row["name"]] = whole.median - part.median
    return found


def backward_of(
    results: Iterable[Result], clock: str = "wall"
) -> dict[tuple[str, str, str, str], dict[str, float]]:
    """Derived backward times of all cases, by key with the part `backward`."""
    by_key = {key_of(result): result for result in results}
    found = {}
    for (op, case, dtype, part), result in by_key.items():
        forward = by_key.get((op, case, dtype, FORWARD))
        if part == BOTH and forward is not None:
            found[op, case, dtype, BACKWARD] = derived_backward(forward, result, clock)
    return found


def machine_scale(record: Mapping[str, Any], result: Result) -> float | None:
    """How many times faster this machine's ceilings are, with the threads of the run, than one core of the
    reference.
    """
    floor = result["work"]["floor"]
    there = floor_seconds(floor, rates_at(record["reference"], 1))
    here = floor_seconds(floor, rates_at(record["ceilings"], result["threads"]))
    return None if there is None or here is None else there / here


def outcome(
    record: Mapping[str, Any], result: Result, target: Mapping[str, Any], clock: str = "wall"
) -> Outcome:
    """Decides one target."""
    decide = {"rate": _rate, "time": _time, "speedup": _speedup, "memory": _memory}[target["kind"]]
    return decide(record, result, target, clock)


def _own(result: Result, clock: str) -> Spread | None:
    row = main_row(result)
    return None if row is None else spread(row, clock)


def _rate(record: Any, result: Result, target: Any, clock: str) -> Outcome:
    unit, value, own = result["work"]["unit"], target["value"], _own(result, clock)
    text = f">= {si(value)}{unit}/s on one reference core"
    scale = machine_scale(record, result)
    wanted = "no ceiling measured" if scale is None else f">= {si(value * scale)}{unit}/s"
    if own is None:
        return Outcome(text, wanted, "not timed", None)
    rate = result["work"]["amount"] / own.median
    met = None if scale is None else rate >= value * scale
    return Outcome(text, wanted, f"{si(rate)}{unit}/s", met)


def _time(record: Any, result: Result, target: Any, clock: str) -> Outcome:
    value, own = target["value"], _own(result, clock)
    text = f"<= {duration(value)} on one reference core"
    scale = machine_scale(record, result)
    wanted = "no ceiling measured" if scale is None else f"<= {duration(value / scale)}"
    if own is None:
        return Outcome(text, wanted, "not timed", None)
    met = None if scale is None else own.median <= value / scale
    return Outcome(text, wanted, duration(own.median), met)


def _speedup(record: Any, result: Result, target: Any, clock: str) -> Outcome:
    text = f">= {target['value']:g}x of {target['peer']}"
    peer, own = row_named(result, target["peer"]), _own(result, clock)
    other = None if peer is None else spread(peer, clock)
    if own is None or other is None:
        absent = "fastlm" if own is None else str(target["peer"])
        return Outcome(text, text, f"{absent} not timed", None)
    ratio = other.median / own.median
    return Outcome(text, text, f"{ratio:.2f}x", ratio >= target["value"])


def _memory(record: Any, result: Result, target: Any, clock: str) -> Outcome:
    text = f"<= {target['value']:g} of the peak extra memory of {target['peer']}"
    mine, theirs = (extra_beyond_results(r) for r in (main_row(result), row_named(result, target["peer"])))
    if mine is None or theirs is None:
        return Outcome(text, text, "not measured", None)
    ratio = mine / max(theirs, 1)
    return Outcome(
        text,
        text,
        f"{ratio:.3f} ({size(mine)} of {size(theirs)}, results not counted)",
        ratio <= target["value"],
    )


def extra_beyond_results(row: Row | None) -> int | None:
    """Peak extra memory without the tensors that the call returns."""
    memory = (row or {}).get("memory") or {}
    if "peak_extra_bytes" not in memory:
        return None
    return max(0, int(memory["peak_extra_bytes"]) - int(memory["result_bytes"]))


def si(value: float) -> str:
    """Three digits and a decimal prefix: 3.52 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


_SECONDS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit = next((name for name, length in _SECONDS.items() if abs(seconds) >= length), "ns")
    return f"{seconds / _SECONDS[unit]:.3g} {unit}"


def span(low: float, high: float) -> str:
    """Two times in the unit of the first."""
    unit = duration(low).split()[1]
    return f"{duration(low).split()[0]}–{high / _SECONDS[unit]:.3g} {unit}"


def size(count: float) -> str:
    """Bytes with a binary prefix."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"
