"""Training speed and memory of fastlm beside plain PyTorch: same weights, same batch, same optimizer, same
arithmetic, this machine.

Correctness first: a contender whose float32 loss or gradient differs is reported, not timed.
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
from fastlm.training.evaluation import autocast
from fastlm.training.memory import peak_memory_bytes, reset_peak_memory, resident_memory_bytes

CHECKED_TOKENS = 64  # of every row, in float32
LOSS_TOLERANCE = 1e-4  # relative
GRADIENT_TOLERANCE = 1e-3  # of the gradient's norm, relative
FASTLM, PLAIN, STEP_LOOP = "fastlm", "plain PyTorch", "transformers-style step loop"


@dataclass
class Peer:
    """One way to do the same training step."""

    name: str
    what: str
    loss: float = math.nan  # of the whole batch, in the arithmetic that is timed
    checked: dict[str, float] = field(default_factory=dict)  # what is compared, by name
    seconds: list[float] = field(default_factory=list)  # of each timed step
    peak_bytes: int = 0  # most memory of one step beyond what was there before it
    problem: str | None = None  # why it was not timed

    def tokens_per_second(self, tokens: int) -> float | None:
        """Median over the timed steps."""
        return tokens / statistics.median(self.seconds) if self.seconds else None


def measure_peers(
    model: SambaForCausalLM,
    input_ids: Tensor,
    *,
    dtype: str,
    rounds: int,
    budget: float,
    report: Callable[[str], None],
) -> list[Peer]:
    """Times whole training steps (forward, backward, AdamW).

    Args:
        model: the weights that all contenders start from; its own are left as they are.
        input_ids: `(B, L)`; every contender gets the same rows, each row one sequence.
        dtype: `fp32`, or `bf16` for autocast over the same weights.
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
        step = _Step(peer, module, input_ids, dtype)
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

    def __init__(self, peer: Peer, module: torch.nn.Module, input_ids: Tensor, dtype: str) -> None:
        self.peer, self.module, self.input_ids, self.dtype = peer, module, input_ids, dtype
        # Rate 0: the work of an update, the same weights before every step.
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.1, fused=True)

    def check(self) -> None:
        """Loss and gradient in float32 on a piece; then one whole step with memory and loss recorded."""
        loss = self._forward_backward(self.input_ids[:, :CHECKED_TOKENS], "fp32")
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        self.peer.checked = {"loss": loss, "gradient norm": float(norm)}
        self.optimizer.zero_grad(set_to_none=True)
        self._forward_backward(self.input_ids[:, :16], self.dtype)  # warms up
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        _give_back_memory()
        counted = reset_peak_memory()
        before = resident_memory_bytes()
        self.time()
        self.peer.peak_bytes = max(0, peak_memory_bytes() - before) if counted else 0

    def time(self) -> None:
        """One whole step."""
        started = time.monotonic()
        self.peer.loss = self._forward_backward(self.input_ids, self.dtype)
        self.optimizer.step()
        self.peer.seconds.append(time.monotonic() - started)
        self.optimizer.zero_grad(set_to_none=True)

    def _forward_backward(self, input_ids: Tensor, dtype: str) -> float:
        with autocast(dtype):
            output = self.module(input_ids, labels=input_ids)
        loss: Tensor = output[0] if isinstance(output, tuple) else output.loss
        loss.backward()
        return float(loss.detach())


def _compare(peer: Peer, reference: Peer) -> None:
    """Marks a contender that computes something else."""
    for what, tolerance in (("loss", LOSS_TOLERANCE), ("gradient norm", GRADIENT_TOLERANCE)):
        found, expected = peer.checked[what], reference.checked[what]
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
