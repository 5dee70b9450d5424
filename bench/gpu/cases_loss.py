"""The loss of a linear head: scores and gradients, whole training steps beside the fused losses of others, selection alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..cases.slm_loss import KEEP, topk
from ..peers import member, operator
from . import float64, peers_loss
from .case import (
    BACKWARD,
    FORWARD,
    STEP,
    Call,
    Contender,
    GpuCase,
    Inputs,
    Problem,
    Target,
    Work,
)
from .item import Context

_LEARNED = ("hidden", "weight")
# T, h, V: a head of Llama 3's vocabulary; GRIN's; Samba-1.3B's.
_HEADS = ((8192, 4096, 128256), (32768, 4096, 128256), (8192, 4096, 32064), (8192, 2304, 32000))
_FORWARD_SHARE, _BACKWARD_SHARE = 700 / 790, 640 / 790  # TFLOP/s where a product of 8192^3 runs at 790
_LIMIT = 500.0


def cases(*, tiny: bool) -> list[GpuCase]:
    """In the order of importance."""
    heads = ((40, 32, 97),) if tiny else _HEADS
    scores = (70,) if tiny else (32768, 4096, 1 << 20)
    found = []
    for T, h, V in heads:
        found += [
            GpuCase(
                f"slm_loss/T{T}_h{h}_V{V}_k{int(100 * KEEP)}", partial(_selective, T, h, V), limit=_LIMIT
            ),
            GpuCase(f"linear_nll/T{T}_h{h}_V{V}", partial(_scores, T, h, V), limit=_LIMIT),
            GpuCase(f"linear_cross_entropy/T{T}_h{h}_V{V}", partial(_step, T, h, V), limit=_LIMIT),
        ]
    return found + [GpuCase(f"select_tokens/T{T}", partial(_select, T)) for T in scores]


def head_inputs(T: int, h: int, V: int, device: str) -> Inputs:
    """bfloat16 hidden states and head."""
    return {
        "hidden": torch.randn(T, h, device=device, dtype=torch.bfloat16),
        "weight": torch.randn(V, h, device=device, dtype=torch.bfloat16) / h**0.5,
        "labels": torch.randint(0, V, (T,), device=device),
    }


def _scores(T: int, h: int, V: int, context: Context) -> Problem:
    """Losses of all tokens, and the backward pass on its own: logits again, two products."""
    inputs = head_inputs(T, h, V, context.device)
    upstream = (torch.rand(T, device=context.device),)
    flops = 2.0 * T * h * V
    aimed = h >= 2048 and V >= 65536
    return Problem(
        shape={"T": T, "h": h, "V": V},
        inputs=inputs,
        contenders=(
            Contender("fastlm", operator("linear_nll"), ours=True),
            Contender("logits stored", peers_loss.eager_scores),
            Contender("cut_cross_entropy", peers_loss.cut_scores, compiled=True),
        ),
        work={
            FORWARD: Work(
                flops, "FLOP", {"bf16": flops}, (Target("share", _FORWARD_SHARE),) if aimed else ()
            ),
            BACKWARD: Work(
                3 * flops, "FLOP", {"bf16": 3 * flops}, (Target("share", _BACKWARD_SHARE),) if aimed else ()
            ),
        },
        expected=lambda part: float64.head(inputs, part, upstream[0], "nll"),
        outputs=("nll",),
        gradients=_LEARNED,
        upstream=upstream,
        note="Backward counts logits computed again, which stored logits save.",
    )


def _with_gradients(build: Callable[[Inputs], Call], inputs: Inputs) -> Call:
    """A training step of the head: loss and gradients, however they share the work."""
    leaves = {name: t.detach().requires_grad_() if name in _LEARNED else t for name, t in inputs.items()}
    run = build(leaves)

    def call() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            loss = run()
            found = torch.autograd.grad(loss, [leaves[name] for name in _LEARNED])
        return loss.detach(), *found

    return call


def _contender(
    name: str, build: Callable[[Inputs], Call], *, ours: bool = False, full: bool = True
) -> Contender:
    return Contender(name, partial(_with_gradients, build), ours=ours, full_check=full, parts=(STEP,))


def _step(T: int, h: int, V: int, context: Context) -> Problem:
    inputs = head_inputs(T, h, V, context.device)
    flops = 2.0 * T * h * V
    return Problem(
        shape={"T": T, "h": h, "V": V},
        inputs=inputs,
        contenders=(
            _contender("fastlm", operator("linear_cross_entropy"), ours=True),
            _contender("liger_kernel", peers_loss.liger),
            _contender("cut_cross_entropy", peers_loss.cut),
            _contender("F.linear_cross_entropy, chunks", peers_loss.chunked),
            _contender("logits stored", peers_loss.eager),
        ),
        work={STEP: Work(4 * flops, "FLOP", {"bf16": 4 * flops})},
        expected=lambda part: float64.head(inputs, STEP, None, "mean"),
        outputs=("loss", "dhidden", "dweight"),
        note="Counts 8 T h V, logits twice; losses that form gradients in the forward pass do 6.",
    )


def _selective(T: int, h: int, V: int, context: Context) -> Problem:
    """The best 60 % of the tokens by excess loss."""
    inputs = head_inputs(T, h, V, context.device)
    # Far apart, so that rounding of the losses chooses no other tokens.
    kept = torch.randperm(T, device=context.device) < int(KEEP * T + 0.5)
    inputs["ref_nll"] = torch.where(kept, 0.0, 50.0)
    flops = 2.0 * T * h * V
    floor = flops * (1 + 3 * KEEP)
    aimed = h >= 2048 and V >= 65536
    targets = (
        Target("speedup", 1 / 0.75, "liger_kernel, every token"),
        Target("speedup", 1 / 0.85, "chosen, then liger_kernel"),
    )
    return Problem(
        shape={"T": T, "h": h, "V": V, "keep %": int(100 * KEEP)},
        inputs=inputs,
        contenders=(
            _contender("fastlm", operator("slm_loss", keep_ratio=KEEP), ours=True),
            _contender("fastlm, every token", _every_token, ours=True, full=False),
            _contender("chosen, then liger_kernel", peers_loss.chosen_then_liger),
            _contender("liger_kernel, every token", peers_loss.liger, full=False),
            _contender("logits stored", peers_loss.eager_selective),
        ),
        work={STEP: Work(floor, "FLOP", {"bf16": floor}, targets if aimed else ())},
        expected=lambda part: float64.head(inputs, STEP, kept, "mean"),
        outputs=("loss", "dhidden", "dweight"),
        note="Every token: the same step without selection, for orientation.",
    )


def _every_token(inputs: Inputs) -> Call:
    function = member("fastlm.ops", "linear_cross_entropy")
    return lambda: function(inputs["hidden"], inputs["weight"], inputs["labels"])


def _select(T: int, context: Context) -> Problem:
    device = context.device
    inputs: Inputs = {"score": torch.randn(T, device=device), "eligible": torch.rand(T, device=device) < 0.9}
    moved = 6.0 * T
    function = member("fastlm.reference", "select_tokens")
    return Problem(
        shape={"T": T},
        inputs=inputs,
        contenders=(
            Contender("fastlm", _selected, ours=True),
            Contender("torch.topk and scatter", topk),
        ),
        work={FORWARD: Work(moved, "bytes", {"copy": moved}, (Target("time", 15e-6),) if T == 32768 else ())},
        expected=lambda part: {
            "mask": function(inputs["score"].cpu(), inputs["eligible"].cpu(), keep_ratio=KEEP)
            .to(device)
            .float()
        },
        outputs=("mask",),
        allowed=0.0,
    )


def _selected(inputs: Inputs) -> Call:
    function = member("fastlm.ops", "select_tokens")
    return lambda: function(inputs["score"], inputs["eligible"], keep_ratio=KEEP)
