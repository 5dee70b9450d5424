"""Calls that get no working memory, in a process of their own: `python -m tests.build.out_of_memory preloaded|limited`.

Every call under test runs in a fresh thread: working memory belongs to threads, so it starts with none.
"""

from __future__ import annotations

import ctypes
import re
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm import ops
from tests.support import samples
from tests.support.conformance import tensors_of
from tests.support.samples import Call

# The other operators need no working memory; those that write in place must never fail half way.
NEED_MEMORY = {
    "causal_conv1d_backward",
    "selective_scan",
    "selective_scan_backward",
    "sliding_window_attention",
    "sliding_window_attention_backward",
    "scan_swa",
    "grin_route",
    "grin_route_backward",
    "grouped_gemm",
    "grouped_gemm_backward",
    "moe_experts",
    "moe_experts_backward",
    "linear_nll",
    "linear_nll_backward",
}


def in_a_fresh_thread(f: Callable[[], Any]) -> Any:
    """The result of `f()`, or the RuntimeError it raised."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(f())
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def check_error(op: str, error: RuntimeError) -> None:
    text = rf"{op}: out of memory: could not allocate [1-9]\d* bytes of working memory for a thread"
    assert re.search(text, str(error)), f"{op}: {error}"


def everything(op: str, call: Call) -> list[Tensor]:
    outputs = getattr(torch.ops.fastlm, op)(*call.args, **call.kwargs)
    return tensors_of(outputs) + list(call.floating().values())


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
        for a, b in zip(found, expected, strict=True)
    )


def preloaded() -> None:
    """All samples of all operators, while every request fails, while every second one does, and afterwards."""
    fail_every = ctypes.c_int.in_dll(ctypes.CDLL(None), "fail_every")
    failed = set()
    for op in samples.operators():
        for sample in samples.of(op):
            expected = in_a_fresh_thread(lambda c=sample.build(), op=op: everything(op, c))
            for every in (1, 2, 0):
                call = sample.build()
                fail_every.value = every
                found = in_a_fresh_thread(lambda c=call, op=op: everything(op, c))
                fail_every.value = 0
                if isinstance(found, RuntimeError):
                    assert every != 0
                    check_error(op, found)
                    failed.add(op)
                else:
                    assert same(found, expected), f"{sample}: another result, every {every}"
    assert failed == NEED_MEMORY, sorted(failed ^ NEED_MEMORY)


def settled_address_space() -> int:
    """Bytes mapped, once threads that have ended have given theirs back: they do so after they were joined."""
    readings: list[int] = []
    while len(readings) < 6 or len(set(readings[-6:])) > 1:
        time.sleep(0.1)
        readings.append(int(Path("/proc/self/statm").read_text().split()[0]))
    return readings[-1] * resource.getpagesize()


def limited() -> None:
    """A large request beyond a limit of the address space, on two threads."""
    torch.set_num_threads(2)
    hidden = torch.randn(1, 120_000)
    weight = torch.randn(193, 120_000)  # two pieces, 92 MB of working memory each
    label = torch.tensor([192])
    small, small_weight = hidden[:, :50], weight[:, :50]
    expected = in_a_fresh_thread(lambda: ops.linear_nll(hidden, weight, label))
    expected_small = ops.linear_nll(small, small_weight, label)  # starts the threads as well

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = settled_address_space()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    for _ in range(2):
        try:
            ops.linear_nll(hidden, weight, label)
        except RuntimeError as error:
            check_error("linear_nll", error)
        else:
            raise AssertionError("linear_nll found memory beyond the limit")
        assert torch.equal(ops.linear_nll(small, small_weight, label), expected_small)
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert torch.equal(ops.linear_nll(hidden, weight, label), expected)


if __name__ == "__main__":
    {"preloaded": preloaded, "limited": limited}[sys.argv[1]]()
    print("passed")
