"""The last layer of a causal language model, taken apart: hidden states, weight, bias, and what is done to the logits.

A transformers model computes `logits = post(lm_head(hidden))`. The fused losses want `hidden` and the weight instead. Both come from
the model's own forward: a hook on the output projection keeps what goes in and lets nothing through, so everything before it
(scalings of the residual stream, auxiliary losses of routers) is the model's. What comes after it, `post`, is a scaling (Cohere,
Granite), a soft cap (Gemma 2) or nothing; which one is taken from the configuration and then measured, since no two families use one
name the same way. A model that the measurement does not confirm is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops

IGNORE_INDEX = -100
# Where configurations keep a factor of the logits (or what they are divided by), and a soft cap.
_SCALES = ("logit_scale", "logits_scaling", "logits_scale", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "final_logit_softcap", "logits_soft_cap", "output_logit_soft_cap")
_PROBE_LOGIT = 40.0  # far beyond the published caps (15 to 50), so that a cap shows


@dataclass(frozen=True)
class LogitForm:
    """`logits = softcap(scale * (hidden @ weight.T + bias))`; a cap of 0 is none."""

    scale: float = 1.0
    softcap: float = 0.0

    def of(self, raw: Tensor) -> Tensor:
        """The model's logits of what its projection puts out."""
        scaled = raw * self.scale
        return self.softcap * torch.tanh(scaled / self.softcap) if self.softcap else scaled


@dataclass(frozen=True)
class HeadInputs:
    """All that a fused loss needs.

    Attributes:
        hidden: `(B, L, h)`, with the factor of the logits already in it.
        weight: `(V, h)`, dtype of `hidden` unless autocast decides.
        bias: `(V,)` or None.
        softcap: bound of the logits, 0 for none.
        targets: `(B, L)` int64: the token that each position predicts, -100 where none.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float
    targets: Tensor


def next_tokens(labels: Tensor) -> Tensor:
    """What each position predicts: `labels (..., L)` one place to the left, -100 at the end of every row."""
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[..., :-1] = labels[..., 1:]
    return targets


def output_projection(model: Any) -> nn.Linear:
    """The model's `lm_head`.

    Raises:
        ValueError: it has none, or one that is no plain linear layer (quantized, adapted).
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__}: expected a causal language model, got an encoder and a decoder"
        )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"{type(model).__name__}: expected a causal language model whose output embeddings are an nn.Linear, "
            f"got {'none' if head is None else type(head).__name__}"
        )
    return head


@contextmanager
def captured_inputs(head: nn.Module) -> Iterator[list[Tensor]]:
    """Within: what goes into `head` is collected, and the head itself computes nothing (`(B, 0, V)`)."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        found.append(arguments[0])
        return (arguments[0][:, :0], *arguments[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def only(found: list[Tensor], model: Any) -> Tensor:
    """The one input of the head; a model that calls it never or twice is told."""
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__}: expected a forward pass that calls its output projection once, "
            f"it was called {len(found)} times"
        )
    return found[0]


def head_inputs(model: Any, form: LogitForm, hidden: Tensor, targets: Tensor) -> HeadInputs:
    """Puts the pieces together.

    Args:
        model: a transformers causal language model.
        form: from `measure_logits`.
        hidden: `(B, L, h)`, what went into the output projection.
        targets: `(B, L)`, see `next_tokens`.

    Raises:
        ValueError: targets do not fit hidden states; or the factor of the logits is no power of two and 16-bit hidden states would
            be rounded by it.
    """
    name = type(model).__name__
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: labels must have shape {tuple(hidden.shape[:-1])}, that of the hidden states that reach the head, "
            f"got {tuple(targets.shape)}"
        )
    head = output_projection(model)
    dtype = hidden.dtype
    autocast = torch.is_autocast_enabled(hidden.device.type)
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    bias: Tensor | None = head.bias
    if form.scale != 1.0:
        if dtype.itemsize < 4 and abs(math.frexp(form.scale)[0]) != 0.5:
            raise ValueError(
                f"{name}: its logits are multiplied by {form.scale:g}, which is no power of two and would be rounded into "
                f"{str(dtype).removeprefix('torch.')} hidden states; expected float32 arithmetic for this model"
            )
        hidden = hidden * form.scale
        bias = None if bias is None else bias * form.scale
    weight = head.weight if autocast else head.weight.to(hidden.dtype)
    return HeadInputs(hidden, weight, bias, form.softcap, targets.to(hidden.device))


def auxiliary_loss(model: Any, output: Any) -> Tensor | None:
    """The routers' loss that the model would add to its own, or None."""
    aux: Tensor | None = getattr(output, "aux_loss", None)
    if aux is None:
        return None
    coefficient = getattr(model, "router_aux_loss_coef", None)
    if coefficient is None:
        coefficient = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    if coefficient is None:
        raise ValueError(
            f"{type(model).__name__}: expected router_aux_loss_coef beside its auxiliary loss, found none"
        )
    return float(coefficient) * aux


@torch.no_grad()
def measure_logits(model: Any, forward: Callable[..., Any]) -> LogitForm:
    """Finds out what a model does to its logits, by two passes over a dozen tokens in evaluation mode.

    Args:
        model: a transformers causal language model, on the device it will run on.
        forward: its own, unchanged forward.

    Returns:
        form: so that `form.of(lm_head(hidden))` are the model's logits and the fused cross-entropy is its loss.

    Raises:
        ValueError: neither a scaling nor a soft cap of its configuration explains the model's logits, or its loss has further terms.
    """
    head = output_projection(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(head.out_features, (2, 6), generator=generator).to(head.weight.device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _amplified(head) as (inputs, raw):
            output = forward(input_ids=ids, return_dict=True)
        only(inputs, model)
        form = _fitting(model, raw[0].float(), output.logits.float(), raw[0].dtype)
        if not getattr(model, "loss_is_fused", False):
            with _amplified(head) as (inputs, raw):
                output = forward(input_ids=ids, labels=ids, return_dict=True)
            _check_loss(model, form, only(inputs, model), ids, output, raw[0].dtype)
    finally:
        for module, training in modes.items():
            module.training = training
    return form


@contextmanager
def _amplified(head: nn.Linear) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Within: hidden states reach the head so large that its largest output is `_PROBE_LOGIT`. An untrained model's logits are next
    to nothing, and there a soft cap would not show."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def enlarge(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        largest = nn.functional.linear(arguments[0], head.weight.to(arguments[0].dtype)).abs().max().float()
        inputs.append(arguments[0] * (_PROBE_LOGIT / largest.clamp_min(1e-6)).to(arguments[0].dtype))
        return (inputs[-1], *arguments[1:])

    handles = (
        head.register_forward_pre_hook(enlarge),
        head.register_forward_hook(lambda _module, _arguments, output: outputs.append(output)),
    )
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def _fitting(model: Any, raw: Tensor, logits: Tensor, dtype: torch.dtype) -> LogitForm:
    """The form, among those the configuration can mean, that gives the model's logits."""
    name = type(model).__name__
    if logits.shape != raw.shape:
        raise ValueError(
            f"{name}: expected logits of shape {tuple(raw.shape)}, that of its output projection, got {tuple(logits.shape)}"
        )
    caps, scales = [0.0], [1.0]
    config = model.config.get_text_config()
    for key in _CAPS:
        caps += [float(getattr(config, key))] if getattr(config, key, None) else []
    for key in _SCALES:
        value = getattr(config, key, None)
        scales += [float(value), 1 / float(value)] if isinstance(value, int | float) and value else []
    forms = [LogitForm(scale, cap) for scale in scales for cap in caps]
    errors = [float((form.of(raw) - logits).abs().max()) for form in forms]
    best = min(range(len(forms)), key=errors.__getitem__)
    allowed = 4 * torch.finfo(dtype).eps * float(logits.abs().max())
    if not errors[best] <= max(allowed, 1e-5):
        raise ValueError(
            f"{name}: its logits are neither those of its output projection nor a scaling or soft cap of them that the configuration "
            f"names (tried {', '.join(sorted({*_SCALES, *_CAPS}))}), so its loss cannot be fused"
        )
    return forms[best]


def _check_loss(
    model: Any, form: LogitForm, hidden: Tensor, ids: Tensor, output: Any, dtype: torch.dtype
) -> None:
    """The fused loss of the same hidden states must be the one that the model reported of logits in `dtype`."""
    parts = head_inputs(model, form, hidden.float(), next_tokens(ids))
    aux = auxiliary_loss(model, output)
    ours = float(fused_cross_entropy(parts)) + (0.0 if aux is None else float(aux))
    theirs = float(output.loss)
    allowed = _PROBE_LOGIT * min(32 * torch.finfo(dtype).eps, 0.0125)
    if not abs(ours - theirs) <= allowed:
        raise ValueError(
            f"{type(model).__name__}: its loss is {theirs:g} where the next-token cross-entropy of its logits is {ours:g}, "
            "so it has terms that the fused loss does not know"
        )


def fused_cross_entropy(parts: HeadInputs, num_items: Tensor | int | float | None = None) -> Tensor:
    """Mean over the targets, or their sum divided by `num_items`, as transformers does it."""
    total = ops.linear_cross_entropy(
        parts.hidden,
        parts.weight,
        parts.targets,
        parts.bias,
        ignore_index=IGNORE_INDEX,
        softcap=parts.softcap,
        reduction="mean" if num_items is None else "sum",
    )
    if num_items is None:
        return total
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)
