"""A case without any operator: a product by two, with contenders that are right, slow, wrong, broken and
absent.
"""

from __future__ import annotations

import torch

from bench.case import Call, Case, Contender, Inputs, Target, UnavailableError, Work, direct
from bench.runner import Settings
from bench.timing import Plan

PLAN = Plan(rounds=4, least_rounds=2, budget=10.0, sample=0.0)
SETTINGS = Settings(PLAN, threads=1, memory=False)


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def _absent(inputs: Inputs) -> Call:
    raise UnavailableError("needs a machine from the future")


def _broken(inputs: Inputs) -> Call:
    raise RuntimeError("no luck\nwith a second line")


def fake_case(**changes: object) -> Case:
    """Forward and backward of `2 x` in float32."""
    fields: dict[str, object] = {
        "op": "doubling",
        "name": "three",
        "dtype": "fp32",
        "shape": {"n": 3},
        "inputs": lambda: {"x": torch.randn(3)},
        "reference": direct(double),
        "contenders": (
            Contender("fastlm", direct(double), ours=True),
            Contender("sum", direct(lambda x: x + x)),
            Contender("triple", direct(lambda x: 3 * x)),
            Contender("absent", _absent),
            Contender("broken", _broken),
            Contender("compiled", direct(double), compiled=True),
        ),
        "work": {
            part: Work(3, "FLOP", {"fma": 3}) for part in ("forward", "forward+backward", "decode step")
        },
        "gradients": ("x",),
        "targets": (Target("forward", "speedup", 1e-9, "sum"), Target("forward", "rate", 1.0)),
    }
    return Case(**(fields | changes))  # type: ignore[arg-type]


def fake_record(**changes: object) -> dict[str, object]:
    """A record with one result of round numbers: fastlm 2 ms, its peer 8 ms, one wrong contender."""
    rows = [
        {**_ROW, "name": "fastlm", "ours": True, "samples": {"wall": [2e-3, 1e-3, 3e-3], "cpu": [2e-3] * 3}},
        {**_ROW, "name": "peer", "samples": {"wall": [8e-3] * 3, "cpu": [9e-3] * 3}},
        {**_ROW, "name": "liar", "status": "wrong", "reason": "relative error above 0.1: out 2"},
    ]
    result = {
        "op": "doubling",
        "case": "three",
        "dtype": "fp32",
        "part": "forward",
        "shape": {"n": 3},
        "threads": 2,
        "work": {"amount": 6e6, "unit": "FLOP", "floor": {"fma": 6e6}, "bytes": None},
        "targets": [],
        "note": "",
        "finished": 0.0,
        "contenders": rows,
    }
    record: dict[str, object] = {
        "schema": 1,
        "created": 0.0,
        "git": None,
        "machine": {"cpu": "Abacus", "cpus": 2, "flags": ["beads"]},
        "software": {
            "python": "3",
            "torch": "2",
            "torch_cpu_capability": "NONE",
            "cpu_level": "default",
            "fastlm": {"version": "0", "compiler": "cc", "flags": "-O3"},
        },
        "settings": {"threads": 2, "cpus": [0, 1], "quick": False, "rounds": 3},
        "load": [0.0, 0.0],
        "ceilings": {"level": "default", "rates": {"1": {"fma": 3e9}, "2": {"fma": 6e9}}},
        "reference": {"machine": "Slide rule", "rates": {"1": {"fma": 12e9}}},
        "results": [result],
    }
    return record | changes


_ROW = {"ours": False, "orientation": False, "status": "timed", "reason": "", "errors": {}, "tolerance": 0.1}
