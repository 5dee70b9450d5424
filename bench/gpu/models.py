"""A small Samba on the device beside the same model in plain PyTorch, float64, on the CPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .item import Context, WrongError
from .operators import poison_fresh_memory, registered

_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def _models(context: Context, dtype: torch.dtype) -> tuple[Any, Any, Tensor]:
    from fastlm.demo.plain_samba import PlainSamba
    from fastlm.models.samba import SambaConfig, SambaForCausalLM

    torch.manual_seed(0)
    config = (
        SambaConfig.from_preset("demo", vocab_size=512)
        if not context.settings.tiny
        else SambaConfig.from_preset("tiny")
    )
    model = SambaForCausalLM(config, dtype=dtype)
    plain = PlainSamba(config).double()
    plain.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    ids = torch.randint(config.vocab_size, (2, 300 if not context.settings.tiny else 40))
    return model.to(context.device), plain, ids


def _error(found: Tensor, wanted: Tensor) -> float:
    found = found.detach().cpu().double()
    return float((found - wanted).norm() / wanted.norm())


def _hold(what: str, error: float, allowed: float) -> float:
    if not error <= allowed:
        raise WrongError(f"{what}: relative error {error:.3g}, allowed {allowed:g}")
    return error


def cross_entropy(model: Any, ids: Tensor) -> Tensor:
    """The model's loss; through stored logits where the fused loss has no kernel for the device."""
    if "linear_nll" in registered(ids.device.type):
        loss: Tensor = model(ids, labels=ids).loss
        return loss
    logits = model(ids).logits.float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def check_forward(context: Context, dtype: torch.dtype) -> dict[str, Any]:
    """Logits, and gradients of the loss by all parameters."""
    poison_fresh_memory()
    model, plain, ids = _models(context, dtype)
    context.stage("forward")
    loss = cross_entropy(model, ids.to(context.device))
    logits = model(ids.to(context.device)).logits
    context.stage("backward")
    loss.backward()
    context.stage("plain model")
    wanted_loss, wanted = plain(ids, labels=ids)
    wanted_loss.backward()
    errors = {
        "logits": _hold("logits", _error(logits, wanted.detach()), _ALLOWED[dtype]),
        "loss": _hold("loss", _error(loss, wanted_loss.detach()), _ALLOWED[dtype]),
    }
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    missing = [name for name, g in gradients.items() if g is not None and name not in found]
    if missing:
        raise WrongError(f"no gradient of {', '.join(missing)}")
    worst = max((_error(found[name], g), name) for name, g in gradients.items() if g is not None)
    errors["worst gradient"] = _hold(f"gradient of {worst[1]}", worst[0], 3 * _ALLOWED[dtype])
    return errors


def check_decoding(context: Context, dtype: torch.dtype) -> dict[str, Any]:
    """A prompt in two pieces, then one token after the other, gives the logits of one pass."""
    poison_fresh_memory()
    model, plain, ids = _models(context, dtype)
    context.stage("plain model")
    with torch.no_grad():
        wanted = plain(ids)[1]
    here = ids.to(context.device)
    length, steps = ids.shape[1], 8
    cuts = [0, (length - steps) // 3, length - steps]
    pieces = []
    with torch.inference_mode():
        cache = model.new_cache(ids.shape[0])
        for begin, end in pairwise(cuts):
            context.stage(f"tokens {begin} to {end}")
            pieces.append(model(here[:, begin:end], cache=cache).logits)
        for t in range(length - steps, length):
            context.stage(f"token {t}")
            pieces.append(model(here[:, t : t + 1], cache=cache).logits)
    return {"logits": _hold("logits", _error(torch.cat(pieces, dim=1), wanted), _ALLOWED[dtype])}


def needs() -> tuple[str, ...]:
    """Operators that a Samba calls."""
    return (
        "causal_conv1d",
        "causal_conv1d_update",
        "selective_scan",
        "selective_state_update",
        "sliding_window_attention",
        "sliding_window_attention_update",
    )
