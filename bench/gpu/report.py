"""Part `report`: tables of a results file, for the terminal and as Markdown. Everything comes from the file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from . import ceilings
from .facts import slow_build
from .item import BAD
from .state import PARTS, State, current

Row = list[str]
_UNITS = {
    "fma": ("FLOP/s", 1e12, "TFLOP/s"),
    "exp2": ("values/s", 1e12, "T/s"),
    "fma_exp2": ("values/s", 1e12, "T/s"),
    "gemm_bf16": ("FLOP/s", 1e12, "TFLOP/s"),
    "gemm_fp32": ("FLOP/s", 1e12, "TFLOP/s"),
    "read": ("bytes/s", 1e9, "GB/s"),
    "copy": ("bytes/s", 1e9, "GB/s"),
    "launch": ("launches/s", 1e6, "M/s"),
    "graph_launch": ("launches/s", 1e6, "M/s"),
}
_RATES = {
    "FLOP": (1e12, "TFLOP/s"),
    "bytes": (1e9, "GB/s"),
    "tokens": (1e3, "k tokens/s"),
    "state-steps": (1e9, "G steps/s"),
}


def markdown(state: State) -> str:
    """The whole report."""
    lines = [f"# {state['machine']['card']}", "", *_head(state), ""]
    lines += ["## Checks", "", *_summary(state, "check"), *_problems(state, "check"), ""]
    lines += ["## Sanitizers", "", *_summary(state, "sanitize"), *_problems(state, "sanitize"), ""]
    lines += [
        "## Ceilings",
        "",
        *_table(["", "best", "middle", "SM MHz", "W"], list(_ceiling_rows(state))),
        "",
    ]
    lines += ["## Targets", "", *_table(_TARGET_COLUMNS, list(target_rows(state))), ""]
    lines += ["## Times", "", *_table(_TIME_COLUMNS, list(time_rows(state))), ""]
    lines += [*_notes(state), *_problems(state, "bench"), ""]
    return "\n".join(lines)


def plain(text: str) -> str:
    """Markdown with its tables aligned, for a terminal."""
    out: list[str] = []
    block: list[Row] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            block.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if block:
            out += _aligned([row for row in block if set("".join(row)) - set("-: ")])
            block = []
        out.append(line.lstrip("#").strip() if line.startswith("#") else line)
    return "\n".join(out)


def _aligned(rows: list[Row]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _table(columns: Row, rows: list[Row]) -> list[str]:
    if not rows:
        return ["nothing yet"]
    cells = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells)]


def _head(state: State) -> list[str]:
    machine, software, git = state["machine"], state["software"], state["git"] or {}
    cuda = software["fastlm"]["cuda"]
    changed = ", with changes" if git.get("changed") else ""
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(state["updated"]))
    trial = (
        ["This was no GPU: times and ceilings mean nothing.", ""] if machine.get("device") == "cpu" else []
    )
    lacking = slow_build(state)
    return [
        *trial,
        *([f"**{lacking}.**", ""] if lacking else []),
        *_left_out(state),
        f"{when}, commit {git.get('commit', 'unknown')}{changed}, driver {machine.get('driver')}, torch "
        f"{software['torch']} (CUDA {software['cuda']}), Triton {software['triton']}.",
        f"fastlm {software['fastlm']['version']}, architectures {', '.join(cuda['architectures']) or 'none'}, "
        f"CUTLASS {software['fastlm']['cutlass']['version']}, library {software['library']}.",
    ]


def _items(state: State, part: str) -> dict[str, Any]:
    """Results of the card, driver and library that the head names."""
    return current(state, part)


def _left_out(state: State) -> list[str]:
    """A line that counts the results of another card, driver or library."""
    counts = {part: len(state["parts"][part]["items"]) - len(current(state, part)) for part in PARTS}
    words = ", ".join(f"{part} {count}" for part, count in counts.items() if count)
    return [f"Left out, as they are of another card, driver or library: {words}.", ""] if words else []


def _summary(state: State, part: str) -> list[str]:
    """Counts by kind, what is missing, what is left to do."""
    by_kind: dict[str, Counter[str]] = {}
    for name, item in _items(state, part).items():
        by_kind.setdefault(name.split("/")[0], Counter())[item["status"]] += 1
    statuses = ("passed", "failed", "crashed", "hung", "skipped")
    rows = [[kind, *(str(counts[status] or "") for status in statuses)] for kind, counts in by_kind.items()]
    lines = _table(["kind", *statuses], rows)
    missing = state["parts"][part].get("missing", {})
    if missing:
        why = Counter(missing.values())
        lines += [
            "",
            "; ".join(
                f"{reason}: {', '.join(op for op in missing if missing[op] == reason)}" for reason in why
            ),
        ]
    left = state["parts"][part].get("unfinished", [])
    if left:
        lines += ["", f"{len(left)} items were not reached in the time given."]
    return lines


def _problems(state: State, part: str) -> list[str]:
    """A line for everything that went wrong, and for every reason to skip."""
    lines: list[str] = []
    skipped: dict[str, list[str]] = {}
    for name, item in _items(state, part).items():
        if item["status"] in BAD:
            lines.append(f"- **{item['status']}** `{name}`: {' '.join(item['reason'].split())[:600]}")
        elif item["status"] == "passed" and item["reason"]:
            lines.append(f"- `{name}`: {' '.join(item['reason'].split())[:600]}")
        elif item["status"] == "skipped":
            skipped.setdefault(item["reason"][:200], []).append(name)
    for reason, names in skipped.items():
        some = ", ".join(f"`{name}`" for name in names[:3]) + (
            f" and {len(names) - 3} more" if len(names) > 3 else ""
        )
        lines.append(f"- skipped {some}: {' '.join(reason.split())}")
    return ["", *lines] if lines else []


def _ceiling_rows(state: State) -> Iterator[Row]:
    for name, item in _items(state, "ceilings").items():
        data = item["data"]
        if item["status"] != "passed":
            yield [name, item["status"], item["reason"][:80], "", ""]
            continue
        _, scale, unit = _UNITS[name.removesuffix("_torch")]
        watch = data.get("watch", {})
        middle = [f"{watch[key][1]:.0f}" if key in watch else "" for key in ("sm_mhz", "watts")]
        yield [name, f"{data['best'] / scale:.4g} {unit}", f"{data['middle'] / scale:.4g}", *middle]


def _results(state: State) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    for name, item in _items(state, "bench").items():
        if item["status"] == "passed":
            for part, result in item["data"]["parts"].items():
                yield name, part, item["data"], result


def _timed(result: Mapping[str, Any], name: str) -> float | None:
    for row in result["contenders"]:
        if row["name"] == name and row["status"] == "timed":
            return float(row["median"])
    return None


def _best_of_ours(result: Mapping[str, Any]) -> float | None:
    """fastlm's time, called or as a graph, whichever is less."""
    found = [_timed(result, name) for name in ("fastlm", "fastlm, graph")]
    return min((t for t in found if t is not None), default=None)


_TARGET_COLUMNS = ["case", "part", "target", "wanted", "measured", "ratio", "met"]


def target_rows(state: State) -> Iterator[Row]:
    """Every target and what became of it."""
    known = ceilings.rates(state)
    for name, part, _, result in _results(state):
        mine = _best_of_ours(result)
        floor = ceilings.floor_seconds(result["work"]["floor"], known)
        for target in result["targets"]:
            yield [name, part, *_outcome(target, result, mine, floor)]


def _outcome(
    target: Mapping[str, Any], result: Mapping[str, Any], mine: float | None, floor: float | None
) -> tuple[str, str, str, str, str]:
    kind, value = target["kind"], target["value"]
    if kind in ("floor", "share"):
        limit = None if floor is None else floor * value if kind == "floor" else floor / value
        text = (
            f"at most {value:.3g}x the floor" if kind == "floor" else f"at least {value:.0%} of the ceiling"
        )
    elif kind == "speedup":
        peer = _timed(result, target["peer"])
        limit = None if peer is None else peer / value
        text = f"at least {value:.3g}x as fast as {target['peer']}"
    else:
        limit, text = value, f"at most {seconds(value)}"
    if mine is None or limit is None:
        return (
            text,
            "" if limit is None else seconds(limit),
            "not measured" if mine is None else seconds(mine),
            "",
            "?",
        )
    return text, seconds(limit), seconds(mine), f"{mine / limit:.3f}", "yes" if mine <= limit else "**no**"


_TIME_COLUMNS = [
    "case",
    "part",
    "contender",
    "median",
    "20 % to 80 %",
    "rate",
    "of ceiling",
    "beside fastlm",
    "error",
]


def time_rows(state: State) -> Iterator[Row]:
    """Every contender of every case; those that were not timed say why in `_notes`."""
    known = ceilings.rates(state)
    for name, part, _, result in _results(state):
        floor = ceilings.floor_seconds(result["work"]["floor"], known)
        mine = _timed(result, "fastlm")
        scale, unit = _RATES[result["work"]["unit"]]
        for row in result["contenders"]:
            if row["status"] != "timed":
                continue
            t = row["median"]
            worst = max((e for e in row.get("errors", {}).values() if isinstance(e, float)), default=None)
            yield [
                name,
                part,
                row["name"] + (" *" if row["orientation"] else ""),
                seconds(t) + (" †" if _host_shows(row) else ""),
                f"{seconds(row['p20'])} to {seconds(row['p80'])}",
                f"{result['work']['amount'] / t / scale:.4g} {unit}",
                "" if floor is None else f"{floor / t:.1%}",
                "" if mine is None or (row["ours"] and row["name"] == "fastlm") else _comparison(t / mine),
                "" if worst is None else f"{worst:.1e}",
            ]


def _host_shows(row: Mapping[str, Any]) -> bool:
    """Whether the host took longer over a call than the device was busy beforehand."""
    hidden = row.get("hidden")
    return hidden is not None and row["host_median"] > hidden


def _comparison(ratio: float) -> str:
    return f"fastlm {ratio:.2f}x faster" if ratio >= 1 else f"**fastlm {1 / ratio:.2f}x slower**"


def _notes(state: State) -> list[str]:
    """Contenders that were not timed, with the cases they miss in."""
    absent: dict[tuple[str, str, str], int] = {}
    for _, _, _, result in _results(state):
        for row in result["contenders"]:
            if row["status"] != "timed":
                bad = row["ours"] and row["status"] in ("wrong", "failed")
                key = (f"**{row['name']}**" if bad else row["name"], row["status"], row["reason"])
                absent[key] = absent.get(key, 0) + 1
    lines = [f"- {name}: {status} ({count}x): {reason}" for (name, status, reason), count in absent.items()]
    notes = dict.fromkeys(
        item["data"]["note"] for item in _items(state, "bench").values() if item["data"].get("note")
    )
    shown = [row for *_, result in _results(state) for row in result["contenders"] if _host_shows(row)]
    host = "† the host took longer to launch than the device was kept busy beforehand: the time may be the host's"
    legend = ["\\* for orientation: computes something else", "", *([host, ""] if shown else [])]
    return ["", *legend, *lines, *(f"- {note}" for note in notes)]


def seconds(t: float) -> str:
    """A duration with three digits."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if t >= scale:
            return f"{t / scale:.4g} {unit}"
    return f"{t / 1e-9:.3g} ns"
