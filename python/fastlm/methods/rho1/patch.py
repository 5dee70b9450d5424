"""One function puts the fused cross-entropy into a transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor

from fastlm.methods.rho1.head import (
    HeadInputs,
    LogitForm,
    auxiliary_loss,
    captured_inputs,
    fused_cross_entropy,
    head_inputs,
    measure_logits,
    next_tokens,
    only,
)

REQUEST = "fastlm_loss"  # the argument of a patched forward that carries a `LossRequest`
_STATE = "_fastlm_loss"
Model = TypeVar("Model")


@dataclass(frozen=True)
class LossRequest:
    """What to compute instead of the model's loss.

    Attributes:
        loss: from the pieces of the head, and the `num_items_in_batch` of the call or None, to a scalar.
        aux_weight: factor of the routers' auxiliary loss that is added to it.
        padding_predicts: whether a position that `attention_mask` leaves out still predicts its label, as in transformers.
    """

    loss: Callable[[HeadInputs, Any], Tensor]
    aux_weight: float = 1.0
    padding_predicts: bool = True


@dataclass
class _Patch:
    """What a patched model carries."""

    form: LogitForm
    had_own: bool  # a forward of the instance, as accelerate puts there
    original: Callable[..., Any]  # unbound
    on_labels: bool = False  # labels alone ask for the fused loss
    logits_in_eval: bool = True


def patch_loss(model: Model, *, logits_in_eval: bool = True) -> Model:
    """From now on the model's loss is the fused linear cross-entropy: the same value, and no logits are made or kept.

    In training mode a forward pass with `labels` returns `logits=None`. A pass without labels, and with it generation, is the model's
    own. `num_items_in_batch`, `shift_labels` and the auxiliary loss of routers work as before. A model whose own loss is fused
    already (fastlm's Samba) keeps it.

    Args:
        model: a transformers causal language model whose output embeddings are an `nn.Linear`, or a peft model around one.
            What it does to its logits (soft cap, scaling) is measured once, with a dozen tokens.
        logits_in_eval: in evaluation mode labels leave the model's forward as it is, logits included, since metrics read
            them; False: the fused loss alone, there too.

    Returns:
        model: the same object. `unpatch_loss` takes it back; patching twice changes `logits_in_eval` alone.

    Raises:
        ValueError: the model's loss is not that of a linear head, a scaling and a soft cap.

    Note:
        Where no token has a label the loss is 0, transformers' is NaN. The loss comes from float32 logits whatever the dtype. Copies
        (`copy.deepcopy`) are patched too.

    Example:
        >>> from fastlm.methods import rho1
        >>> model = rho1.patch_loss(transformers.AutoModelForCausalLM.from_pretrained(path))  # doctest: +SKIP
        >>> model.train()(input_ids, labels=input_ids).loss.backward()  # doctest: +SKIP
    """
    patch = install(model)
    patch.on_labels, patch.logits_in_eval = True, logits_in_eval
    return model


def unpatch_loss(model: Model) -> Model:
    """Takes back what `patch_loss` did; a model that is not patched stays as it is."""
    inner: Any = causal_model(model)
    patch = inner.__dict__.pop(_STATE, None)
    if patch is not None:
        del inner.forward
        if patch.had_own:
            inner.forward = MethodType(patch.original, inner)
    return model


def causal_model(model: Any) -> Any:
    """The causal language model itself, without peft around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def install(model: Any) -> _Patch:
    """Teaches a model's forward the argument `REQUEST`; without it nothing changes."""
    inner = causal_model(model)
    if isinstance(patch := inner.__dict__.get(_STATE), _Patch):
        return patch
    original = getattr(inner.forward, "__func__", None)
    if original is None:
        raise ValueError(
            f"{type(inner).__name__}: expected forward to be a method of the model, got {type(inner.forward).__name__}"
        )
    patch = _Patch(measure_logits(inner, inner.forward), "forward" in inner.__dict__, original)
    inner.__dict__[_STATE] = patch
    inner.forward = MethodType(_make_forward(original), inner)
    return patch


def _make_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    names = list(signature.parameters)[1:]
    takes_return_dict = "return_dict" in names or any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values()
    )

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args, strict=False))
        request: LossRequest | None = kwargs.pop(REQUEST, None)
        patch: _Patch = self.__dict__[_STATE]
        if kwargs.get("labels") is None:
            return original(self, **kwargs)
        if request is None:
            fused = patch.on_labels and not getattr(self, "loss_is_fused", False)
            if not fused or (patch.logits_in_eval and not self.training):
                return original(self, **kwargs)
        labels = kwargs.pop("labels")
        num_items = kwargs.pop("num_items_in_batch", None)
        shifted = kwargs.pop("shift_labels", None)
        targets = next_tokens(labels) if shifted is None else shifted
        if request is None:
            request = LossRequest(fused_cross_entropy)
        as_tuple = kwargs.pop("return_dict", None) is False
        if takes_return_dict:
            kwargs["return_dict"] = True
        with captured_inputs(self.get_output_embeddings()) as found:
            output = original(self, **kwargs)
        mask = kwargs.get("attention_mask")
        if not request.padding_predicts and mask is not None and mask.shape == targets.shape:
            targets = targets.masked_fill(mask == 0, -100)
        loss = request.loss(head_inputs(self, patch.form, only(found, self), targets), num_items)
        aux = auxiliary_loss(self, output)
        if aux is not None:
            loss = loss + request.aux_weight * aux.to(loss.device)
        kept = {name: value for name, value in output.items() if name not in ("loss", "logits")}
        result = type(output)(loss=loss, **kept)
        return result.to_tuple() if as_tuple else result

    # Not functools.wraps: accelerate walks `__wrapped__` to find what it wrapped itself, and would walk past this.
    forward.__doc__ = original.__doc__
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward
