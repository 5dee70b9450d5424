"""What this machine can do at best, measured in the same run as everything else, and the machine that targets
were set on.

Rates are per second of thread CPU time, summed over the threads, best of a few tries: what the cores do if
    nobody
else uses them. Only matrix products on several threads are taken from the wall clock, because torch's threads
spin while they wait.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Rates = dict[str, float]

# Units: operations, values or bytes per second.
DESCRIPTION = {
    "fma": "fp32 multiply-add, FLOP",
    "dot_bf16": "bf16 dot product into fp32, FLOP",
    "exp2": "exponentials of the kernels",
    "dram_read": "memory read, bytes",
    "dram_copy": "memory copy, bytes read + written",
    "mm_fp32": "torch.mm fp32, FLOP",
    "mm_bf16": "torch.mm bf16, FLOP",
}
# A contender may use the best instruction there is for its dtype: `dot` is dot_bf16 where the CPU has it,
# else fma.
_ALIASES = {"dot": ("dot_bf16", "fma")}

# The machine that the targets in bench/cases were set on: 2 vCPU of an AMD EPYC (family 25 model 17, Zen 4)
# with AVX-512, avx512_bf16 and VNNI, 1 MiB L2 per core; middle of the measured ranges.
REFERENCE_MACHINE = "2 vCPU AMD EPYC Zen 4, AVX-512 with bf16 dot products"
REFERENCE_RATES: dict[str, Rates] = {
    "1": {
        "fma": 114.5e9,
        "dot_bf16": 231e9,
        "exp2": 9.4e9,
        "dram_read": 14e9,
        "dram_copy": 35e9,
        "mm_fp32": 84e9,
        "mm_bf16": 195e9,
    },
    "2": {
        "fma": 228.5e9,
        "dot_bf16": 458e9,
        "exp2": 18.6e9,
        "dram_read": 26e9,
        "dram_copy": 61e9,
        "mm_fp32": 159e9,
        "mm_bf16": 410e9,
    },
}

_LOOPS = {"fma": "fma", "exp2": "exp2", "dot_bf16": "dot_bf16", "dram_read": "read", "dram_copy": "copy"}
_PRODUCTS = {"mm_fp32": torch.float32, "mm_bf16": torch.bfloat16}


def measure(threads: int, *, seconds: float = 0.08, tries: int = 3) -> dict[str, Any]:
    """Measures the ceilings of one thread and of `threads` threads.

    Args:
        threads: as many as the run uses.
        seconds: length of one try.
        tries: the best one counts.

    Returns:
        `{"level": CPU level, "rates": {"1": {...}, "<threads>": {...}}}`.
    """
    import fastlm

    module = sys.modules["fastlm._C"]
    names = module.ceiling_names()

    def best(name: str, count: int) -> float:
        return max(module.measure_ceiling(name, seconds, count)["per_cpu_second"] for _ in range(tries))

    rates: dict[str, Rates] = {}
    sizes: dict[str, int] = {}
    before = torch.get_num_threads()
    try:
        for count in sorted({1, threads}):
            here: Rates = {}
            for name, loop in _LOOPS.items():
                if loop in names:
                    here[name] = best(loop, count)
            torch.set_num_threads(count)
            for name, dtype in _PRODUCTS.items():
                sizes.setdefault(
                    name, _product_size(dtype, 2 * seconds)
                )  # chosen with one thread, kept for more
                clock = time.process_time if count == 1 else time.perf_counter
                here[name] = _product_rate(dtype, sizes[name], 2 * seconds, clock)
            rates[str(count)] = here
    finally:
        torch.set_num_threads(before)
    return {"level": fastlm.cpu_capability(), "rates": rates}


def _product_size(dtype: torch.dtype, seconds: float) -> int:
    """Rows of the largest square product from 128 to 1024 of which a few fit the time."""
    size = 128
    while size < 1024:
        a = torch.zeros(size, size, dtype=dtype)
        if 8 * 4 * _fastest(lambda a=a: torch.mm(a, a), seconds / 8, time.process_time) > seconds:
            break
        size *= 2
    return size


def _product_rate(dtype: torch.dtype, size: int, seconds: float, clock: Callable[[], float]) -> float:
    """FLOP/s of the fastest product within the time."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2.0 * size**3 / _fastest(lambda: torch.mm(a, b), seconds, clock)


def _fastest(call: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    call()
    end = time.perf_counter() + seconds
    best = float("inf")
    while True:
        begin = clock()
        call()
        best = min(best, clock() - begin)
        if time.perf_counter() > end:
            return best


def rate_of(name: str, rates: Mapping[str, float]) -> float | None:
    """The ceiling called `name`, None if it was not measured."""
    for known in _ALIASES.get(name, (name,)):
        if known in rates:
            return rates[known]
    return None


def floor_seconds(floor: Mapping[str, float], rates: Mapping[str, float]) -> float | None:
    """Least time for the amounts in `floor`, None if it is empty or a ceiling is missing."""
    total = 0.0
    for name, amount in floor.items():
        rate = rate_of(name, rates)
        if rate is None:
            return None
        total += amount / rate
    return total or None
