"""A training step of a small Samba: forward, backward and optimizer, beside the same model in plain
PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..case import STEP, Build, Call, Case, Contender, Inputs, Target, Work
from ..peers import member

_VOCABULARY = 2048
_WEIGHT = "weight:"


def cases() -> list[Case]:
    """The demo model, as the demo trains it, and a short row for quick runs."""
    return [_step(2, 512), _step(1, 128, quick=True)]


def _step(B: int, L: int, *, quick: bool = False) -> Case:
    def inputs() -> Inputs:
        model = _fastlm_model()
        weights = {f"{_WEIGHT}{name}": t.detach() for name, t in model.state_dict().items()}
        return {"input_ids": torch.randint(0, _VOCABULARY, (B, L)), **weights}

    return Case(
        op="samba",
        name=f"training_step_B{B}_L{L}",
        dtype="fp32",
        shape={"B": B, "L": L, "V": _VOCABULARY},
        inputs=inputs,
        reference=_plain("plain"),
        contenders=(
            Contender("fastlm", _fastlm, ours=True, mode="grad"),
            Contender("plain PyTorch", _plain("plain"), mode="grad"),
            Contender("plain PyTorch, step loop", _plain("step_loop"), mode="grad"),
        ),
        work={STEP: Work(B * L, "tokens")},
        part=STEP,
        targets=()
        if quick
        else (
            Target(STEP, "speedup", 10, "plain PyTorch"),
            Target(STEP, "speedup", 10, "plain PyTorch, step loop"),
        ),
        quick=quick,
        tolerance=1e-3,
        note="Demo model and AdamW. 'plain PyTorch' scans in chunks, 'step loop' one position at a time.",
    )


def _config() -> Any:
    return member("fastlm.models.samba", "SambaConfig").from_preset("demo", vocab_size=_VOCABULARY)


def _fastlm_model() -> nn.Module:
    model: nn.Module = member("fastlm.models.samba", "SambaForCausalLM")(_config())
    return model


def _fastlm(inputs: Inputs) -> Call:
    return _training(_fastlm_model(), inputs)


def _plain(scan: str) -> Build:
    def build(inputs: Inputs) -> Call:
        return _training(member("fastlm.demo.plain_samba", "PlainSamba")(_config(), scan=scan), inputs)

    return build


def _training(model: nn.Module, inputs: Inputs) -> Call:
    """Steps at rate 0: the work of an update, and the same weights before every step. Returns loss and
    gradients.
    """
    weights = {name.removeprefix(_WEIGHT): t for name, t in inputs.items() if name.startswith(_WEIGHT)}
    model = model.to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.1)
    ids = inputs["input_ids"]

    def call() -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        output = model(ids, labels=ids)
        loss: Tensor = output[0] if isinstance(output, tuple) else output.loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return (loss.detach(), *(p.grad for p in parameters if p.grad is not None))

    return call
