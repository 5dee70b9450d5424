"""`experts_implementation="fastlm"`: the experts of transformers' mixtures on `moe_experts`, or on its parts.

transformers describes a module of experts by attributes: a gate or none, biases, the layout of the weights, a gating
function of its own, a norm behind each expert. Where gate and activation are the operator's, one call does it all.
Otherwise `moe_plan` sorts the picks, `grouped_gemm` multiplies, and the module's own functions run in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import ops
from fastlm.compat.transformers._interfaces import Registered, functions_of
from fastlm.compat.transformers._interfaces import check as check_interfaces
from fastlm.compat.transformers._names import find, find_function

_MOE = "transformers.integrations.moe"
INTERFACES = (f"{_MOE}:ExpertsInterface",)
DEFAULT_GATE = f"{_MOE}:_default_apply_gate"
# Functions that are called or stood in for, and the parameters they must have.
FUNCTIONS: dict[str, tuple[str, ...]] = {
    **functions_of(INTERFACES),
    DEFAULT_GATE: ("self", "gate_up_out"),
    f"{_MOE}:use_experts_implementation": (
        "is_concatenated",
        "is_transposed",
        "has_bias",
        "has_gate",
        "has_post_expert_norm",
    ),
}
# Classes of activations, and the operator's name for what they compute.
ACTIVATIONS = {
    "torch.nn:SiLU": "silu",
    "torch.nn:ReLU": "relu",
    "transformers.activations:SiLUActivation": "silu",
    "transformers.activations:GELUTanh": "gelu_tanh",
    "transformers.activations:NewGELUActivation": "gelu_tanh",
    "transformers.activations:ReLUSquaredActivation": "relu2",
}
_MOST_PICKS = 8  # of the operator
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WAY_OUT = "Use another implementation for this model: model.set_experts_implementation('eager')."

_registered = Registered()
_activation_names: dict[type, Any] = {}
_default_gate: Any = None


def check() -> None:
    """Raises if transformers lacks a name that is needed."""
    for name, parameters in FUNCTIONS.items():
        find_function(name, parameters)
    for name in ACTIVATIONS:
        find(name)
    check_interfaces(INTERFACES)


def install() -> None:
    """Makes the name known."""
    global _default_gate
    _default_gate = find(DEFAULT_GATE)
    _activation_names.update({find(name): word for name, word in ACTIVATIONS.items()})
    for name in INTERFACES:
        _registered.add(name, experts_forward)


def remove() -> None:
    """Makes the name unknown again, or what it was before."""
    _registered.remove()


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **kwargs: Any
) -> Tensor:
    """The experts function of `experts_implementation="fastlm"`, with the arguments that models give to all of them.

    Args:
        module: the experts, as `use_experts_implementation` describes them.
        hidden_states: `(T, h)`; if their dtype is not that of the weights, they are cast, and the result is cast back.
        top_k_index: `(T, k)`, any k; an id of `num_experts` or more goes to no expert, as expert parallelism marks
            the experts of other processes.
        top_k_weights: `(T, k)`, any floating dtype.

    Returns:
        `(T, h)`, dtype of `hidden_states`.

    Raises:
        ValueError: a shape, weights or an argument that the operators do not have.
    """
    up, down = _projections(module)
    _refuse_others(hidden_states, top_k_index, kwargs)
    x = hidden_states.to(up.dtype)
    # Weights of less than float32 are rounded already; only float64 must stay.
    if top_k_weights.dtype != x.dtype:
        top_k_weights = top_k_weights.to(torch.promote_types(x.dtype, torch.float32))
    ids = top_k_index.masked_fill(top_k_index >= module.num_experts, -1)
    activation = _fused_activation(module)
    if activation is None:
        out = _composed(module, x, up, down, ids, top_k_weights)
    else:
        out = _fused(module, x, up, down, ids, top_k_weights, activation)
    return out.to(hidden_states.dtype)


def _fused(
    module: Any, x: Tensor, up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, activation: Any
) -> Tensor:
    """All in one operator."""
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    up_bias, down_bias = _biases(module)
    tokens, picks = ids.shape
    parts = -(-picks // _MOST_PICKS)
    if parts > 1:  # a token with many picks becomes several with few
        missing = -picks % parts
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1).view(tokens * parts, -1)
        weights = torch.nn.functional.pad(weights, (0, missing)).view(tokens * parts, -1)
        x = x.repeat_interleave(parts, 0)
    out = ops.moe_experts(
        x,
        up,
        down,
        ids,
        weights,
        activation=activation,
        gate_up_proj_bias=up_bias,
        down_proj_bias=down_bias,
    )
    return out if parts == 1 else out.view(tokens, parts, -1).sum(1)


def _composed(module: Any, x: Tensor, up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The same around any gate, activation and norm: one row per pick, sorted by expert; rows without expert are 0."""
    up_bias, down_bias = _biases(module)
    tokens, picks = ids.shape
    offsets, perm, inv = ops.moe_plan(ids.reshape(-1, 1), module.num_experts)  # of one pick: so k may be any
    # Repeated first and permuted then: the way back adds the picks of a token in one sum, in the same order always.
    rows = x.unsqueeze(1).expand(-1, picks, -1).flatten(0, 1).index_select(0, perm)
    rows = _product(rows, up, up_bias, offsets, transposed=module.is_transposed)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = _product(rows, down, down_bias, offsets, transposed=module.is_transposed)
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(rows)
    rows = rows.index_select(0, inv).unflatten(0, (tokens, picks))
    # What a function of the module makes of a row of zeros must not be added.
    weights = weights.masked_fill(ids < 0, 0).to(torch.promote_types(weights.dtype, torch.float32))
    out: Tensor = (rows * weights.unsqueeze(-1)).sum(1)
    return out


def _product(
    rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, *, transposed: bool
) -> Tensor:
    """`rows` times the weight of their expert, plus its bias."""
    out = ops.grouped_gemm(rows, weight, offsets, trans_b=not transposed)
    if bias is None:
        return out
    # A product too, with ones: its gradient is a sum in float32, where indexing would add in the bias's dtype.
    ones = bias.new_ones(rows.shape[0], 1)
    return out + ops.grouped_gemm(ones, bias.unsqueeze(-1), offsets).to(out.dtype)


def _projections(module: Any) -> tuple[Tensor, Tensor]:
    """The two weights, if they are what the operators multiply with."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    found = []
    for name in (first, "down_proj"):
        weight = getattr(module, name, None)
        dtype = getattr(weight, "dtype", None)
        if not isinstance(weight, Tensor) or dtype not in _DTYPES:
            raise ValueError(
                f"fastlm experts: {name} of {type(module).__name__} must be a tensor of dtype float32, bfloat16, "
                f"float16 or float64, got {dtype or type(weight)}. {_WAY_OUT}"
            )
        found.append(weight)
    return found[0], found[1]


def _biases(module: Any) -> tuple[Tensor | None, Tensor | None]:
    if not module.has_bias:
        return None, None
    return module.gate_up_proj_bias if module.has_gate else module.up_proj_bias, module.down_proj_bias


def _fused_activation(module: Any) -> Any:
    """The operator's name of the activation, if it can stand for everything between the two products and after."""
    if module.has_post_expert_norm:
        return None
    own_gate = type(module)._apply_gate is not _default_gate or not module.is_concatenated
    if module.has_gate and own_gate:
        return None
    return _activation_names.get(type(module.act_fn))


def _refuse_others(hidden_states: Tensor, top_k_index: Tensor, kwargs: dict[str, Any]) -> None:
    """Raises for what the operators would refuse in other words, and for what would be left out in silence."""
    tokens = hidden_states.shape[0]
    if hidden_states.dim() != 2 or top_k_index.dim() != 2 or top_k_index.shape[0] != tokens:
        raise ValueError(
            "fastlm experts: hidden_states and top_k_index must have shapes (tokens, hidden size) and (tokens, picks), "
            f"got {tuple(hidden_states.shape)} and {tuple(top_k_index.shape)}. {_WAY_OUT}"
        )
    if kwargs:
        raise ValueError(f"fastlm experts: {next(iter(kwargs))} is not supported. {_WAY_OUT}")
