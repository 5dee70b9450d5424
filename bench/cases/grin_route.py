"""GRIN's router: masks, picks and weights of every token, in eval and in training, with the estimator's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..case import BOTH, FORWARD, Build, Call, Case, Contender, Inputs, Target, UnavailableError, Work, direct
from ..peers import member, package

PLAIN = "plain PyTorch"
PICKS, JITTER, SEED = 2, 0.01, 1234


def cases() -> list[Case]:
    """The experts of GRIN-MoE and Phi-3.5-MoE, four times as many, and a large batch; and logits so near each other that every
    expert survives the mask, which is the most work there is.
    """
    found = []
    for training in (True, False):
        found += [
            _case(4096, 16, training=training, quick=True),
            _case(4096, 64, training=training),
            _case(65536, 16, training=training),
        ]
    return [*found, _case(4096, 16, training=True, crowded=True)]


def _case(T: int, E: int, *, training: bool, crowded: bool = False, quick: bool = False) -> Case:
    def inputs() -> Inputs:
        logits = 5 + 0.05 * torch.randn(T, E) if crowded else torch.randn(T, E)
        if not training:
            return {"router_logits": logits}
        noise = member("fastlm.reference.grin_route", "grin_noise")(SEED, T, PICKS, E)
        return {"router_logits": logits, "noise": noise, "seed": torch.tensor([SEED])}

    # logits | logits again and their gradient; per pick a weight, an id, a probability | a gradient and an id
    forward, both = 4 * T * (E + 3 * PICKS), 4 * T * (3 * E + 5 * PICKS)
    targets = (Target(FORWARD, "time", 0.6e-3), Target(FORWARD, "speedup", 9.0, PLAIN)) if training else ()
    words = "training" if training else "eval"
    return Case(
        op="grin_route",
        name=f"{words}{'_crowded' if crowded else ''}_T{T}_E{E}",
        dtype="fp32",
        shape={"T": T, "E": E, "k": PICKS},
        inputs=inputs,
        reference=_calls("fastlm.reference", "noise", training=training),
        contenders=(
            Contender("fastlm", _calls("fastlm.ops", "seed", training=training), ours=True),
            Contender("fastlm, noise given", _calls("fastlm.ops", "noise", training=training), ours=True)
            if training
            else Contender(PLAIN, direct(plain)),
            Contender(PLAIN, _plain_training) if training else Contender("transformers", _transformers),
            Contender("transformers", _transformers_training)
            if training
            else Contender(f"{PLAIN}, compiled", _plain_compiled, compiled=True),
        ),
        work={
            FORWARD: Work(T, "tokens", {"dram_copy": forward}, forward),
            BOTH: Work(T, "tokens", {"dram_copy": both}, both),
        },
        gradients=("router_logits",),
        targets=targets if (T, E) == (4096, 16) and not crowded else (),
        quick=quick,
        note="The random numbers of the other contenders are made beforehand and not timed."
        if training
        else "",
    )


def _calls(module: str, chance: str, *, training: bool) -> Build:
    """The weights alone: they depend on every pick, and their gradient does, too."""

    def build(inputs: Inputs) -> Call:
        function, logits = member(module, "grin_route"), inputs["router_logits"]
        options = {chance: inputs[chance]} if training else {}
        return lambda: function(logits, training=training, jitter_eps=JITTER, top_k=PICKS, **options)[0]

    return build


class _Weight(torch.autograd.Function):
    """m p[D], whose gradient is that of p[D]."""

    @staticmethod
    def forward(ctx, logits, p, chosen, m):  # type: ignore[no-untyped-def]
        p_chosen = p.gather(-1, chosen)
        ctx.save_for_backward(p, p_chosen, chosen)
        return p_chosen * m

    @staticmethod
    def backward(ctx, dweight):  # type: ignore[no-untyped-def]
        p, p_chosen, chosen = ctx.saved_tensors
        g = dweight * p_chosen
        return (-g * p).scatter_add_(-1, chosen, g), None, None, None


def plain(router_logits: Tensor, noise: Tensor | None = None) -> Tensor:
    """The steps of the public implementations, one torch call each."""
    weights = []
    left = router_logits
    for j in range(PICKS):
        with torch.no_grad():
            top, chosen = left.max(-1, keepdim=True)
            dropped = (top - router_logits) / router_logits.abs().clamp(min=top) > 2 * JITTER
            masked = left.masked_fill(dropped, -torch.inf)
            if noise is not None:
                chosen = (masked - torch.log(-torch.log(noise[:, j, :-1]))).argmax(-1, keepdim=True)
            p = torch.softmax(masked, -1)
            m = torch.ones_like(top)
            if noise is not None:
                whole = (chosen == p.argmax(-1, keepdim=True)) | (noise[:, j, -1:] < 0.25)
                m = torch.where(whole, m, 1 / 3)
        weights.append(_Weight.apply(router_logits, p, chosen, m))
        left = left.scatter(-1, chosen, -torch.inf)
    return torch.cat(weights, -1)


def _plain_training(inputs: Inputs) -> Call:
    return lambda: plain(inputs["router_logits"], inputs["noise"])


def _plain_compiled(inputs: Inputs) -> Call:
    function = torch.compile(plain)
    return lambda: function(**inputs)


def _transformers(inputs: Inputs) -> Call:
    function = package("transformers.models.phimoe.modeling_phimoe").sparsemixer
    return lambda: function(inputs["router_logits"], JITTER, False)[0]


def _transformers_training(inputs: Inputs) -> Call:
    raise UnavailableError("draws numbers of its own: nothing to compare it with")
