"""Training speed and memory of fastlm beside plain PyTorch: same weights, same batch, same optimizer, this
machine.

Correctness first: a contender whose loss or gradient differs is reported, not timed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlm.demo.plain_samba import PlainSamba
from fastlm.models.samba import SambaForCausalLM
from fastlm.training.memory import peak_memory_bytes, reset_peak_memory, resident_memory_bytes

LOSS_TOLERANCE = 1e-4  # relative, fp32
GRADIENT_TOLERANCE = 1e-3  # of the gradient's norm, relative
FASTLM, PLAIN, STEP_LOOP = "fastlm", "plain PyTorch", "transformers-style step loop"


@dataclass
class Peer:
    """One way to do the same training step."""

    name: str
    what: str
    loss: float = math.nan
    gradient_norm: float = math.nan
    seconds: list[float] = field(default_factory=list)  # of each timed step
    peak_bytes: int = 0  # most memory of one step beyond what was there before it
    problem: str | None = None  # why it was not timed

    def tokens_per_second(self, tokens: int) -> float | None:
        """Median over the timed steps."""
        return tokens / statistics.median(self.seconds) if self.seconds else None


def measure_peers(
    model: SambaForCausalLM, input_ids: Tensor, *, rounds: int, budget: float, report: Callable[[str], None]
) -> list[Peer]:
    """Times whole training steps (forward, backward, AdamW).

    Args:
        model: the weights that all contenders start from; its own are left as they are.
        input_ids: `(B, L)`; every contender gets the same rows, each row one sequence.
        rounds: timed steps of each contender, taken in turns.
        budget: seconds for all timed steps; slow contenders get fewer rounds, at least one.
        report: called with one line per contender.

    Returns:
        fastlm, the plain form and the step loop, in this order.
    """
    contenders = [
        (Peer(FASTLM, "the operators of this package"), _copy(model)),
        (
            Peer(PLAIN, "the fastest plain form known to us: chunks of the sequence in step"),
            _plain(model, "plain"),
        ),
        (
            Peer(STEP_LOOP, "all decays and inputs as one tensor, then a loop over the sequence"),
            _plain(model, "step_loop"),
        ),
    ]
    steps = []
    for peer, module in contenders:
        report(f"checking and timing {peer.name}")
        step = _Step(peer, module, input_ids)
        step.check()
        steps.append(step)
    reference = contenders[0][0]
    for peer, _ in contenders[1:]:
        _compare(peer, reference)
    started = time.monotonic()
    for _number in range(1, rounds):  # the check was the first round
        for step in steps:
            spent = time.monotonic() - started
            slowest = step.peer.seconds[-1] if step.peer.seconds else 0.0
            if step.peer.problem is None and spent + slowest < budget:
                step.time()
    return [peer for peer, _ in contenders]


class _Step:
    """A contender ready to train."""

    def __init__(self, peer: Peer, module: torch.nn.Module, input_ids: Tensor) -> None:
        self.peer, self.module, self.input_ids = peer, module, input_ids
        # Rate 0: the work of an update, the same weights before every step.
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.1, fused=True)

    def check(self) -> None:
        """Warms up on a short piece, then one whole step with memory, loss and gradient recorded."""
        self._forward_backward(self.input_ids[:, :16])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        _give_back_memory()
        counted = reset_peak_memory()
        before = resident_memory_bytes()
        started = time.monotonic()
        self.peer.loss = self._forward_backward(self.input_ids)
        self.optimizer.step()
        self.peer.seconds.append(time.monotonic() - started)
        self.peer.peak_bytes = max(0, peak_memory_bytes() - before) if counted else 0
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        self.peer.gradient_norm = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])))
        self.optimizer.zero_grad(set_to_none=True)

    def time(self) -> None:
        """One whole step."""
        started = time.monotonic()
        self._forward_backward(self.input_ids)
        self.optimizer.step()
        self.peer.seconds.append(time.monotonic() - started)
        self.optimizer.zero_grad(set_to_none=True)

    def _forward_backward(self, input_ids: Tensor) -> float:
        output = self.module(input_ids, labels=input_ids)
        loss: Tensor = output[0] if isinstance(output, tuple) else output.loss
        loss.backward()
        return float(loss.detach())


def _compare(peer: Peer, reference: Peer) -> None:
    """Marks a contender that computes something else."""
    for what, found, expected, tolerance in (
        ("loss", peer.loss, reference.loss, LOSS_TOLERANCE),
        ("gradient norm", peer.gradient_norm, reference.gradient_norm, GRADIENT_TOLERANCE),
    ):
        if not abs(found - expected) <= tolerance * abs(expected):
            peer.problem = f"not timed: its {what} is {found:.6g}, fastlm's is {expected:.6g}"
            peer.seconds.clear()
            return


def _copy(model: SambaForCausalLM) -> SambaForCausalLM:
    other = SambaForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    return other.train()


def _plain(model: SambaForCausalLM, scan: str) -> PlainSamba:
    other = PlainSamba(model.config, scan=scan)
    other.load_state_dict(model.state_dict())
    return other.train()


def _give_back_memory() -> None:
    """Returns freed memory to the system, so that the next peak is the step's own (glibc only)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
