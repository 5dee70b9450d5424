"""What a case file says: shapes, inputs, work formulas, contenders, reference, targets. No measuring happens
here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "grad": nullcontext,
    "inference": torch.inference_mode,
}

Inputs = dict[str, Tensor]
Outputs = Tensor | tuple[Tensor, ...]
Call = Callable[[], Outputs]
# Prepares a call on given tensors: what is done here (masks, modules, compilation) is not timed.
Build = Callable[[Inputs], Call]

FORWARD = "forward"
BOTH = "forward+backward"
BACKWARD = "backward"  # derived: BOTH - FORWARD
DECODE = "decode step"
CALL = "call"
STEP = "training step"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# Largest relative error (root of the summed squares) against the float64 reference that counts as the same
# result.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3, "fp64": 1e-10}


class UnavailableError(Exception):
    """Why a contender cannot take part here: its text becomes a row of the table."""


@dataclass(frozen=True)
class Contender:
    """One way to compute the case.

    Attributes:
        name: short; `fastlm` is the one whose targets count.
        build: prepares the call; raises `UnavailableError` with the reason.
        ours: a form of fastlm rather than a peer.
        compiled: uses torch.compile, which costs seconds to minutes; takes part with `--compile`.
        skip_parts: parts it cannot do, with the reason.
        mode: gradient mode of the parts without backward: "no_grad", "grad" or "inference".
        reference: what it is checked against, if it is shown for orientation and computes something else than
            the case.
        tolerance: of this contender, if another than the case's.
        cost: per part, amounts of ceilings that a call needs at least; a part that would take longer than the
            run's patience on this machine is skipped and says so.
    """

    name: str
    build: Build
    ours: bool = False
    compiled: bool = False
    skip_parts: Mapping[str, str] = field(default_factory=dict)
    mode: str = "no_grad"
    reference: Build | None = None
    tolerance: float | None = None
    cost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What one call does.

    Attributes:
        amount: in `unit`: "FLOP", "state-steps", "bytes", "tokens", "calls".
        floor: names of ceilings (see `ceilings.py`) with amounts in their units; the times add up, as for
            instructions that share pipes. `floor seconds / measured seconds` is the share of the ceiling.
        bytes: least traffic with memory, for information.
    """

    amount: float
    unit: str
    floor: Mapping[str, float] = field(default_factory=dict)
    bytes: float | None = None


@dataclass(frozen=True)
class Target:
    """A number to reach.

    Attributes:
        part: which part of the case.
        kind: "rate" (at least `value` units per second on one core of the reference machine, scaled to this
            one by the ceilings), "time" (at most `value` seconds there, scaled likewise), "speedup" (at least
            `value` times as fast as `peer`), "memory" (at most `value` times the peak extra memory of
            `peer`).
        value: see kind.
        peer: name of the contender compared with.
    """

    part: str
    kind: str
    value: float
    peer: str | None = None


@dataclass(frozen=True)
class Case:
    """One problem in one dtype.

    Attributes:
        op: operator family.
        name: unique within op and dtype.
        dtype: key of `DTYPES`.
        shape: sizes by letter, for people.
        inputs: makes the tensors; the random generator is seeded before.
        reference: the definition; gets the inputs in float64.
        contenders: fastlm first.
        work: per part.
        gradients: inputs to differentiate by; if there are any, the parts are forward and forward+backward.
        part: the only part otherwise.
        mutated: inputs that a call writes into; every contender gets copies, and they are compared too.
        targets: see there.
        quick: part of `--quick`.
        tolerance: default by dtype.
        memory: also measure the peak of extra memory of a call.
        note: one sentence printed under the table.
    """

    op: str
    name: str
    dtype: str
    shape: Mapping[str, int]
    inputs: Callable[[], Inputs]
    reference: Build
    contenders: tuple[Contender, ...]
    work: Mapping[str, Work]
    gradients: tuple[str, ...] = ()
    part: str = FORWARD
    mutated: tuple[str, ...] = ()
    targets: tuple[Target, ...] = ()
    quick: bool = False
    tolerance: float | None = None
    memory: bool = False
    note: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """What is measured."""
        return (FORWARD, BOTH) if self.gradients else (self.part,)

    @property
    def allowed_error(self) -> float:
        """Relative error that counts as right."""
        return TOLERANCE[self.dtype] if self.tolerance is None else self.tolerance

    @property
    def label(self) -> str:
        """How tables and messages call it."""
        return f"{self.op} {self.name} {self.dtype}"


def direct(function: Callable[..., Outputs], **fixed: object) -> Build:
    """A build whose call is `function(**inputs, **fixed)`."""

    def build(inputs: Inputs) -> Call:
        return lambda: function(**inputs, **fixed)

    return build
