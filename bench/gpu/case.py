"""What a measured problem says: inputs, contenders, the float64 results they are held to, work, floors, targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .item import Context

FORWARD, BACKWARD, STEP = "forward", "backward", "step"
Inputs = dict[str, Any]
Call = Callable[[], Any]
Results = dict[str, Tensor]
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class Contender:
    """One way to compute a problem.

    Attributes:
        name: short; the first of a problem is fastlm's, whose targets count.
        build: makes the call from inputs; raises `UnavailableError` with the reason. What it does is not timed.
        prepare: changes the layout of inputs to what it likes best, not timed either.
        ours: a form of fastlm rather than a peer.
        compiled: goes through torch.compile, which takes its time.
        parts: what it can do.
        graph: timed as a CUDA graph.
        full_check: its results are compared; False where it computes something else, for orientation.
    """

    name: str
    build: Callable[[Inputs], Call]
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs
    ours: bool = False
    compiled: bool = False
    parts: tuple[str, ...] = (FORWARD, BACKWARD, STEP)
    graph: bool = False
    full_check: bool = True


@dataclass(frozen=True)
class Target:
    """A number to reach.

    Attributes:
        kind: "floor" (at most `value` times the floor), "share" (at least this share of the ceiling, which is the floor over the
            time), "speedup" (at least `value` times as fast as `peer`), "time" (at most `value` seconds).
        value: see kind.
        peer: name of the contender compared with.
    """

    kind: str
    value: float
    peer: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For the file."""
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """What one call does.

    Attributes:
        amount: in `unit`, for rates.
        unit: "FLOP", "bytes", "tokens", "state-steps".
        floor: amounts by resource, see `ceilings.floor_seconds`.
        targets: of fastlm.
    """

    amount: float
    unit: str
    floor: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True)
class Problem:
    """A case with its tensors made.

    Attributes:
        shape: sizes by letter, for people.
        inputs: by name.
        contenders: fastlm first.
        work: by part, which also says what the parts are.
        expected: results in float64 by name, for a part; None: contenders are compared with the first.
        outputs: names of what a call returns.
        gradients: inputs to differentiate by.
        mutated: inputs that a call writes into; each contender gets copies.
        allowed: relative error that counts as right.
        allowed_for: the same for single results, by name.
        note: a sentence for the report.
    """

    shape: Mapping[str, int]
    inputs: Inputs
    contenders: tuple[Contender, ...]
    work: Mapping[str, Work]
    expected: Callable[[str], Results] | None = None
    outputs: tuple[str, ...] = ("out",)
    gradients: tuple[str, ...] = ()
    mutated: tuple[str, ...] = ()
    allowed: float = 3e-2
    note: str = ""
    upstream: tuple[Tensor, ...] = ()
    allowed_for: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GpuCase:
    """A name and what makes the problem."""

    name: str
    make: Callable[[Context], Problem]
    limit: float = 240.0


def upstream_of(*outputs: Tensor) -> tuple[Tensor, ...]:
    """Random gradients in shape, layout and dtype of outputs."""
    return tuple(torch.empty_like(out).normal_() for out in outputs)
