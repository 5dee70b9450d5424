"""Times calls on the device: CUDA events around each, a cold L2 before each, all contenders in turns.

Flushing the L2 takes some tens of microseconds, in which the host gets ahead, so that the time between the events is the device's and
not that of launching. Where a call costs the host more, the device sleeps for twice that time before the first event. What even that
does not hide is marked in the report: `host_median` is above `hidden`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..quantiles import median, quantile

Call = Callable[[], Any]
_LEAST_ROUNDS = 3
_FLUSH_BYTES = 256 << 20  # at least
_MOST_SLEEP = 0.05  # seconds before a sample
_CYCLES = 20_000_000  # of a sleep that is timed to learn the clock


@dataclass
class Timed:
    """One contender's call and its samples in seconds."""

    name: str
    call: Call
    rounds: int = 0
    sleep: float = 0.0
    hidden: float | None = None
    samples: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def data(self) -> dict[str, Any]:
        """For the file."""
        if not self.samples:
            return {}
        s = self.samples
        spread = {"median": median(s), "p20": quantile(s, 0.2), "p80": quantile(s, 0.8)}
        host = {"host_median": median(self.host), "hidden": self.hidden}
        return {**spread, **host, "samples": [float(f"{x:.6g}") for x in s]}


class Flush:
    """Leaves nothing of anyone's in the L2, and nothing that must still be written to memory.

    A buffer of several times its size is written, which throws out what was there; then another is read, which throws out what was
    written: lines that differ from memory would be written back while the next call runs.
    """

    def __init__(self, device: str, l2: int, least: int = _FLUSH_BYTES) -> None:
        count = max(4 * l2, least) // 4
        self._written, self._read = (torch.zeros(count, device=device) for _ in range(2))
        self._sum = torch.zeros((), device=device)

    def __call__(self) -> None:
        self._written.zero_()
        torch.sum(self._read, 0, out=self._sum)


class Clock:
    """Samples of one call on a device.

    Attributes:
        hidden: seconds of host time that the flush covers; None where the host is the device.
    """

    hidden: float | None = None
    _cycles_per_second = 0.0

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        if self._cuda:
            l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 0
            self._flush = Flush("cuda", l2)
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._flush()
            self.hidden = min(self._seconds(self._flush) for _ in range(3))
            if hasattr(torch.cuda, "_sleep"):
                slept = min(self._seconds(partial(torch.cuda._sleep, _CYCLES)) for _ in range(2))
                self._cycles_per_second = _CYCLES / slept

    @property
    def can_sleep(self) -> bool:
        """Whether the device can be kept busy before a sample."""
        return self._cycles_per_second > 0

    def _seconds(self, call: Call) -> float:
        begin_event, end_event = self._events
        begin_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event) * 1e-3

    def sample(self, call: Call, sleep: float = 0.0) -> tuple[float, float]:
        """Seconds on the device and seconds until the call returned to the host.

        Args:
            call: what is timed.
            sleep: seconds that the device sleeps beforehand.
        """
        if not self._cuda:
            begin = time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
            return seconds, seconds
        begin_event, end_event = self._events
        self._flush()
        if sleep > 0:
            torch.cuda._sleep(int(sleep * self._cycles_per_second))
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
        once, host = clock.sample(one.call)  # the first may compile or load something
        for _ in range(2):
            if once < seconds / 4:
                once, host = clock.sample(one.call)
        if clock.hidden is not None:
            if clock.can_sleep and 2 * host > clock.hidden:
                one.sleep = min(2 * host, _MOST_SLEEP)
            one.hidden = clock.hidden + one.sleep
        one.rounds = min(rounds, max(_LEAST_ROUNDS, int(seconds / max(once + one.sleep, 1e-9))))
    most = max((one.rounds for one in timed), default=0)
    for round_ in range(most):
        for offset in range(len(timed)):
            one = timed[(round_ + offset) % len(timed)]
            if (round_ + 1) * one.rounds // most > round_ * one.rounds // most:
                on_device, on_host = clock.sample(one.call, one.sleep)
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
