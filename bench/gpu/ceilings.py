"""Part `ceilings`: what this card does at best, in this run: the units in which the bench states its work.

Names: `fma` (fp32 multiply-add, FLOP/s), `exp2` (ex2.approx, values/s), `fma_exp2` (exponentials/s with eight multiply-adds beside
each), `read` and `copy` (bytes/s; copy counts bytes read plus written, the better of a kernel and of torch), `gemm_bf16` and
`gemm_fp32` (torch.mm on random data, FLOP/s), `launch` (empty kernels/s on a stream), `graph_launch` (the same from a CUDA graph).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .facts import Watch
from .item import Context, Item, Settings, SkipError
from .state import current
from .timing import Timed, captured, interleave

_SECONDS = 0.5
_FROM_LIBRARY = ("fma", "exp2", "fma_exp2", "read", "copy", "launch")
# Per channel and position of a scan with N states, see docs/gpu.md: exponentials, and fp32 instructions beside them.
_FMA_PER_POLYNOMIAL = 8.0


def items(settings: Settings) -> list[Item]:
    """One item for each ceiling."""
    found = [Item(name, partial(_from_library, name)) for name in _FROM_LIBRARY]
    found.append(Item("copy_torch", _copy))
    for word, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found.append(Item(f"gemm_{word}", partial(_gemm, dtype)))
    found.append(Item("graph_launch", _graph_launch))
    return found


def _from_library(name: str, context: Context) -> dict[str, Any]:
    import fastlm  # noqa: F401  (loads the module)

    module = sys.modules["fastlm._C"]
    with Watch(context.device) as watch:
        if context.device == "cuda":
            if name not in module.cuda_ceiling_names():
                raise SkipError("this build of fastlm measures no ceilings of a GPU")
            torch.cuda.synchronize()
            found = module.measure_cuda_ceiling(name, _SECONDS)
        elif name in module.ceiling_names():
            rate = module.measure_ceiling(name, 0.05, 1)["per_wall_second"]
            found = {"best": rate, "middle": rate, "tries": 1}
        else:
            raise SkipError("not measured on a CPU")
    return {"per_second": found["best"], **found, "watch": watch.data()}


def _rate(amount: float, call: Callable[[], object], context: Context) -> dict[str, Any]:
    timed = Timed("", call)
    with Watch(context.device) as watch:
        interleave(
            [timed], context.device, rounds=40, seconds=2 * _SECONDS if context.device == "cuda" else 0.1
        )
    best, middle = min(timed.samples), sorted(timed.samples)[len(timed.samples) // 2]
    return {
        "per_second": amount / best,
        "best": amount / best,
        "middle": amount / middle,
        "tries": len(timed.samples),
        "watch": watch.data(),
    }


def _copy(context: Context) -> dict[str, Any]:
    size = 2 << 30 if context.device == "cuda" else 16 << 20
    source = torch.randint(-100, 100, (size // 4,), dtype=torch.int32, device=context.device)
    target = torch.empty_like(source)
    return _rate(2.0 * size, lambda: target.copy_(source), context)


def _gemm(dtype: torch.dtype, context: Context) -> dict[str, Any]:
    n = (8192 if dtype == torch.bfloat16 else 4096) if context.device == "cuda" else 256
    a, b = (torch.randn(n, n, device=context.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _rate(2.0 * n**3, lambda: torch.mm(a, b, out=out), context) | {"size": n}


def _graph_launch(context: Context) -> dict[str, Any]:
    if context.device != "cuda":
        raise SkipError("graphs are a matter of CUDA")
    x, count = torch.zeros(1, device="cuda"), 1000

    def kernels() -> None:
        for _ in range(count):
            x.add_(1.0)

    return _rate(count, captured(kernels), context)


def rates(state: Mapping[str, Any]) -> dict[str, float]:
    """The measured ceilings of a results file, per second: those of its card and driver."""
    found = {
        name: float(item["data"]["per_second"])
        for name, item in current(state, "ceilings").items()
        if item["status"] == "passed"
    }
    if "copy_torch" in found:
        found["copy"] = max(found.get("copy", 0.0), found.pop("copy_torch"))
    return found


def floor_seconds(floor: Mapping[str, float], known: Mapping[str, float]) -> float | None:
    """Least time for amounts of several resources that work side by side: the longest of them.

    `exp2` with `fp32` (instructions, half a ceiling's FLOP) is balanced where the floor says so (`balanced`): an exponential may be
    a polynomial of eight multiply-adds instead, and as many are as make both pipes finish together.
    """
    names = {"exp2": "exp2", "bytes": "copy", "read": "read", "bf16": "gemm_bf16", "fp32": "fma"}
    times: dict[str, float] = {}
    for name, amount in floor.items():
        if name == "balanced":
            continue
        rate = known.get(names[name])
        if rate is None:
            return None
        times[name] = amount / (rate / 2 if name == "fp32" else rate)
    if floor.get("balanced") and "exp2" in times and "fp32" in times and times["exp2"] > times["fp32"]:
        per_exp = times["exp2"] / floor["exp2"]
        per_fma = times["fp32"] / floor["fp32"]
        moved = (times["exp2"] - times["fp32"]) / (per_exp + _FMA_PER_POLYNOMIAL * per_fma)
        times["exp2"] = times["fp32"] = times["exp2"] - moved * per_exp
    return max(times.values(), default=None)
