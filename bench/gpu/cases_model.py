"""Samba-1.3B as a whole: a training step, a prompt of 128K tokens, a decoded token, with fastlm's operators and with its peers'."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..case import UnavailableError
from ..peers import package
from . import peers
from .case import STEP, Call, Contender, GpuCase, Inputs, Problem, Work
from .item import Context
from .models import cross_entropy

Swap = Callable[[], dict[str, Callable[..., Any]]]


def cases(*, tiny: bool) -> list[GpuCase]:
    """In the order of importance."""
    name, length, prompt = ("tiny", 40, 40) if tiny else ("Samba_1.3B", 4096, 131072)
    return [
        GpuCase(f"samba/{name}_training_step_L{length}", partial(_training, name, length), limit=500),
        GpuCase(f"samba/{name}_prompt_L{prompt}", partial(_prompt, name, prompt), limit=500),
    ]


def _model(name: str, device: str) -> Any:
    from fastlm.models.samba import SambaConfig, SambaForCausalLM

    config = SambaConfig.from_preset(name)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return SambaForCausalLM(config, device=device, dtype=dtype)


def _training(name: str, length: int, context: Context) -> Problem:
    """Forward, backward and AdamW at rate 0: the same weights before every step."""
    model = _model(name, context.device)
    ids = torch.randint(model.config.vocab_size, (1, length), device=context.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, weight_decay=0.0, fused=context.device == "cuda"
    )

    watched = _watched(model)

    def step() -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = cross_entropy(model, ids)
            loss.backward()
        optimizer.step()
        return loss.detach(), *(p.grad for p in watched.values() if p.grad is not None)

    return Problem(
        shape={"B": 1, "L": length, "parameters": model.num_parameters()},
        inputs={"ids": ids},
        contenders=_with_peers(step, training=True),
        work={STEP: Work(length, "tokens", {"bf16": 6.0 * model.num_parameters() * length})},
        outputs=("loss", *watched),
        allowed=2e-2,
        allowed_for=dict.fromkeys(watched, 1e-1),  # through all blocks in bfloat16
        note="loss and gradients of the first mixers are compared with fastlm's; the floor is that of the matrix products alone",
    )


def _watched(model: Any) -> dict[str, Tensor]:
    """A weight of the first mixer of each kind: the loss of a fresh model says nothing of its mixers, their gradients do."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".weight")[0].rpartition(".")[2]
        if kind in ("in_proj", "v_proj") and f"d{kind}" not in found:
            found[f"d{kind}"] = parameter
    return found


def _prompt(name: str, length: int, context: Context) -> Problem:
    """All tokens of a prompt into a cache, logits of the last one."""
    model = _model(name, context.device)
    ids = torch.randint(model.config.vocab_size, (1, length), device=context.device)

    def prefill() -> Tensor:
        with torch.inference_mode():
            logits = model(ids, cache=model.new_cache(1), logits_to_keep=1).logits
        return torch.empty_like(logits).copy_(logits)

    return Problem(
        shape={"B": 1, "L": length, "parameters": model.num_parameters()},
        inputs={"ids": ids},
        contenders=_with_peers(prefill, training=False),
        work={STEP: Work(length, "tokens", {"bf16": prompt_flops(model, length)})},
        outputs=("logits",),
        allowed=1e-1,  # twelve blocks and more in bfloat16, each rounding in its own order
        note="logits are compared with fastlm's; the floor is that of the matrix products alone",
    )


def prompt_flops(model: Any, length: int) -> float:
    """Of the matrix products: every weight for every token, the head for the last one alone."""
    head = model.config.vocab_size * model.config.hidden_size
    embeddings = head if model.config.tie_word_embeddings else 2 * head
    return 2.0 * float((model.num_parameters() - embeddings) * length + head)


def _with_peers(run: Callable[[], Any], *, training: bool) -> tuple[Contender, ...]:
    def build(swap: Swap | None, inputs: Inputs) -> Call:
        if swap is None:
            return run
        operators = swap()

        def call() -> Tensor:
            with _operators(operators):
                return run()

        return call

    return (
        Contender("fastlm", partial(build, None), ours=True),
        Contender("mamba_ssm, causal_conv1d, flash_attn", partial(build, _field)),
        Contender("mamba_ssm, F.conv1d, flex_attention", partial(build, _field_and_flex), compiled=True),
        Contender(
            "torch alone, flex_attention", partial(build, partial(_torch_alone, training)), compiled=True
        ),
    )


@contextmanager
def _operators(swapped: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """The layers call these in place of fastlm.ops inside the block."""
    import fastlm.ops

    before = {name: getattr(fastlm.ops, name) for name in swapped}
    try:
        for name, function in swapped.items():
            setattr(fastlm.ops, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(fastlm.ops, name, function)


# ---- the peers with the signatures of fastlm.ops, as far as the model uses them -------------------------------


def _field() -> dict[str, Callable[..., Any]]:
    package("selective_scan_cuda")
    package("causal_conv1d")
    package("flash_attn")
    return {
        "selective_scan": _scan_by(peers.mamba_scan, peers.channel_first),
        "causal_conv1d": _conv_by(peers.causal_conv1d),
        "sliding_window_attention": _attention_by(lambda window: peers.flash_attn(window, "flash_attn")),
    }


def _field_and_flex() -> dict[str, Callable[..., Any]]:
    package("selective_scan_cuda")
    return {
        "selective_scan": _scan_by(peers.mamba_scan, peers.channel_first),
        "causal_conv1d": _conv_by(peers.conv1d),
        "sliding_window_attention": _attention_by(_kept_flex()),
    }


def _torch_alone(training: bool) -> dict[str, Callable[..., Any]]:
    """The scan keeps no states for its backward pass, which would not fit: it is computed again."""
    return {
        "selective_scan": _scan_by(peers.chunked_scan, lambda inputs: inputs, again=training),
        "causal_conv1d": _conv_by(peers.conv1d),
        "sliding_window_attention": _attention_by(_kept_flex()),
    }


def _scan_by(
    build: Callable[[Inputs], Call], prepare: Callable[[Inputs], Inputs], *, again: bool = False
) -> Callable[..., Any]:
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")

    def scan(
        *words: Tensor, return_last_state: bool = False, initial_state: Tensor | None = None, **_: Any
    ) -> Any:
        if initial_state is not None and bool(initial_state.any()):
            raise UnavailableError("the peer's scan takes no initial state")

        def run(*tensors: Tensor) -> Tensor:
            out: Tensor = build(prepare(dict(zip(names, tensors, strict=True))))()
            return out

        out = checkpoint(run, *words, use_reentrant=False) if again else run(*words)
        batch, dim = words[0].shape[:2]
        last = words[2].new_zeros(batch, dim, words[2].shape[1])
        return (out, last) if return_last_state else out

    return scan


def _conv_by(build: Callable[[Inputs], Call]) -> Callable[..., Any]:
    def conv(x: Tensor, weight: Tensor, bias: Tensor, *, return_final_states: bool = False, **_: Any) -> Any:
        out = build({"x": x, "weight": weight.to(x.dtype), "bias": bias.to(x.dtype)})()
        final = x[..., -(weight.shape[1] - 1) :].contiguous()
        return (out, final) if return_final_states else out

    return conv


def _attention_by(make: Callable[[int], Callable[[Inputs], Call]]) -> Callable[..., Any]:
    def attention(q: Tensor, k: Tensor, v: Tensor, *, window_size: tuple[int, int], **packed: Any) -> Any:
        if packed.get("cu_seqlens_q") is not None:  # one sequence, nothing before it: a batch of one row
            q, k, v = (t.unsqueeze(0) for t in (q, k[-q.shape[0] :], v[-q.shape[0] :]))
            return make(window_size[0] + 1)({"q": q, "k": k, "v": v})().squeeze(0)
        return make(window_size[0] + 1)({"q": q, "k": k, "v": v})()

    return attention


def _kept_flex() -> Callable[[int], Callable[[Inputs], Call]]:
    """flex_attention, its mask and its compiled form made once for each window."""
    return functools.cache(peers.flex)
