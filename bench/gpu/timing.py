"""Times calls on the device: CUDA events around each, a cold L2 before each, all contenders in turns.

The write that flushes the L2 takes some tens of microseconds, in which the host gets ahead, so that the time between the events is
the device's and not that of launching. What a call costs the host shows where its launches take longer than its kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..quantiles import median, quantile

Call = Callable[[], Any]
_LEAST_ROUNDS = 3


@dataclass
class Timed:
    """One contender's call and its samples in seconds."""

    name: str
    call: Call
    rounds: int = 0
    samples: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def data(self) -> dict[str, Any]:
        """For the file."""
        if not self.samples:
            return {}
        s = self.samples
        spread = {"median": median(s), "p20": quantile(s, 0.2), "p80": quantile(s, 0.8)}
        return {**spread, "host_median": median(self.host), "samples": [float(f"{x:.6g}") for x in s]}


class Clock:
    """Samples of one call on a device."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        if self._cuda:
            l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 0
            self._room = torch.empty(max(4 * l2, 256 << 20), dtype=torch.int8, device="cuda")
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def sample(self, call: Call) -> tuple[float, float]:
        """Seconds on the device and seconds until the call returned to the host."""
        if not self._cuda:
            begin = time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
            return seconds, seconds
        begin_event, end_event = self._events
        self._room.zero_()
        begin_event.record()
        begin = time.perf_counter()
        call()
        host = time.perf_counter() - begin
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event) * 1e-3, host


def interleave(timed: Sequence[Timed], device: str, *, rounds: int, seconds: float) -> None:
    """Takes samples in turns, every round beginning with another contender.

    Args:
        timed: contenders; their samples are filled.
        device: "cuda" or "cpu".
        rounds: of each at most.
        seconds: that each may take; a slow one gets fewer rounds, at least three.
    """
    clock = Clock(device)
    for one in timed:
        once, _ = clock.sample(one.call)  # the first may compile or load something
        for _ in range(2):
            if once < seconds / 4:
                once, _ = clock.sample(one.call)
        one.rounds = min(rounds, max(_LEAST_ROUNDS, int(seconds / max(once, 1e-9))))
    most = max((one.rounds for one in timed), default=0)
    for round_ in range(most):
        for offset in range(len(timed)):
            one = timed[(round_ + offset) % len(timed)]
            if (round_ + 1) * one.rounds // most > round_ * one.rounds // most:
                on_device, on_host = clock.sample(one.call)
                one.samples.append(on_device)
                one.host.append(on_host)


def captured(call: Call) -> Call:
    """The call as a CUDA graph: what is returned replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
