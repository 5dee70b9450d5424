"""The Mamba-1 mixers of transformers on `causal_conv1d` and `selective_scan`.

`MambaMixer`, `FalconMambaMixer` and `JambaMambaMixer` have the same parameters under the same names; the last two
normalise the step size, B and C. One `forward` serves all three and replaces theirs on the class, so that models
made earlier follow too. Activations stay in `(B, L, D)` memory: the operators get transposed views.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastlm import ops
from fastlm.compat.transformers._names import find, find_function
from fastlm.compat.transformers.padding import TokensFirst
from fastlm.layers.rms_norm import at_least_float32

MIXERS = (
    "transformers.models.mamba.modeling_mamba:MambaMixer",
    "transformers.models.falcon_mamba.modeling_falcon_mamba:FalconMambaMixer",
    "transformers.models.jamba.modeling_jamba:JambaMambaMixer",
)
# Functions that are called or replaced, and the parameters they must have.
FUNCTIONS = {
    **{f"{mixer}.forward": ("hidden_states", "cache", "attention_mask") for mixer in MIXERS},
    "transformers.cache_utils:Cache.get_conv_state": ("layer_idx",),
    "transformers.cache_utils:Cache.get_recurrent_state": ("layer_idx",),
    "transformers.cache_utils:Cache.update_conv_state": ("conv_states", "layer_idx", "kwargs"),
    "transformers.cache_utils:Cache.update_recurrent_state": ("recurrent_states", "layer_idx"),
    "transformers.cache_utils:Cache.is_recording_past": ("layer_idx",),
    "transformers.cache_utils:LinearAttentionLayer.update_conv_state": ("conv_states", "conv_kernel_size"),
    "transformers.integrations.accelerate:force_accelerate_hooks": ("child_module_names",),
}
# Added to a step size, its softplus is exactly 0: the state passes unchanged. Within the range of float16.
_NO_STEP = -1e4

_replaced: dict[Any, Any] = {}  # classes, and their own `forward`


def check() -> None:
    """Raises if transformers lacks a name that is needed."""
    for name, parameters in FUNCTIONS.items():
        find_function(name, parameters)


def install() -> None:
    """Puts the mixers on fastlm."""
    with_hooks = find("transformers.integrations.accelerate:force_accelerate_hooks")
    forward = with_hooks(["conv1d", "dt_proj"])(
        mixer_forward
    )  # weights that are read without calling their module
    for name in MIXERS:
        mixer = find(name)
        _replaced[mixer] = vars(mixer)["forward"]
        mixer.forward = forward


def remove() -> None:
    """Gives the mixers their own `forward` back."""
    while _replaced:
        mixer, forward = _replaced.popitem()
        mixer.forward = forward


def mixer_forward(
    self: Any,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """What `MambaMixer.forward` does.

    Args:
        self: the mixer.
        hidden_states: `(B, L, d)`.
        cache: of transformers, with a linear-attention layer for this mixer; it is read and written as transformers
            does it: the last `W` inputs of the convolution, and the state in float32.
        attention_mask: `(B, M)`, `M >= L`: 0 for padding, anywhere in a row. Padding leaves no trace in tokens and
            states, and its own output is 0.

    Returns:
        `(B, L, d)`.
    """
    cache = kwargs.get("cache_params") if cache is None else cache
    for name in ("seq_idx", "cu_seqlens", "cu_seq_lens_q"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"fastlm.compat.transformers: a Mamba layer does not take {name}. Pad the sequences of a batch instead; "
                "fastlm.layers.Mamba takes packed ones."
            )
    padded = None if attention_mask is None else TokensFirst.of(attention_mask, *hidden_states.shape[:2])
    conv_state = state = None
    if cache is not None:
        conv_state = cache.get_conv_state(self.layer_idx)
        state = cache.get_recurrent_state(self.layer_idx)
    if (
        conv_state is not None
        and state is not None
        and hidden_states.shape[1] == 1
        and padded is None
        and not torch.is_grad_enabled()
        and not cache.is_recording_past(self.layer_idx)
    ):
        return _step(self, hidden_states, conv_state, state)
    return _sequence(self, hidden_states, cache, conv_state, state, padded)


def _sequence(
    mixer: Any,
    hidden_states: Tensor,
    cache: Any,
    conv_state: Tensor | None,
    state: Tensor | None,
    padded: TokensFirst | None,
) -> Tensor:
    """Any number of positions, from the states on if there are any."""
    if padded is not None:
        hidden_states = padded.to_front(hidden_states)
    if torch.is_grad_enabled():  # the cache is written in place below; the backward pass needs what was in it
        conv_state = None if conv_state is None else conv_state.clone()
        state = None if state is None else state.clone()
    # Split along the inner dimension: so the backward pass joins the gradients without transposing them.
    halves = mixer.in_proj(hidden_states).chunk(2, dim=-1)
    x, z = (half.transpose(1, 2) for half in halves)  # (B, D, L) views
    weight, activation = mixer.conv1d.weight.squeeze(1), _fused_activation(mixer)
    past = None if conv_state is None else _last_columns(conv_state, weight.shape[1] - 1)
    u = ops.causal_conv1d(x, weight, mixer.conv1d.bias, initial_states=past, activation=activation)
    u = u if activation else mixer.act(u)
    if cache is not None:
        _keep_inputs(mixer, x, cache, conv_state, padded)

    delta, delta_bias, b, c = _step_inputs(mixer, u.transpose(1, 2))
    if padded is not None:
        delta = delta.masked_fill(padded.behind()[:, :, None], _NO_STEP)
    y, last_state = ops.selective_scan(
        u,
        delta.transpose(1, 2),
        _a(mixer),
        b.transpose(1, 2),
        c.transpose(1, 2),
        at_least_float32(mixer.D),
        z,
        delta_bias=delta_bias,
        delta_softplus=True,
        return_last_state=True,
        initial_state=state,
    )
    if cache is not None:
        cache.update_recurrent_state(last_state, mixer.layer_idx)
    out: Tensor = mixer.out_proj(y.transpose(1, 2))
    return out if padded is None else padded.to_places(out)


def _step(mixer: Any, hidden_states: Tensor, conv_state: Tensor, state: Tensor) -> Tensor:
    """One position per row, the states written in place. No gradients."""
    x, z = mixer.in_proj(hidden_states[:, 0]).chunk(2, dim=-1)  # (B, D) views
    weight, activation = mixer.conv1d.weight.squeeze(1), _fused_activation(mixer)
    u = ops.causal_conv1d_update(x, conv_state, weight, mixer.conv1d.bias, activation=activation)
    u = u if activation else mixer.act(u)
    delta, delta_bias, b, c = _step_inputs(mixer, u)
    d = at_least_float32(mixer.D)
    y = ops.selective_state_update(
        state, u, delta, _a(mixer), b, c, d, z, dt_bias=delta_bias, dt_softplus=True
    )
    out: Tensor = mixer.out_proj(y)
    return out.unsqueeze(1)


def _step_inputs(mixer: Any, u: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Step size before its bias, that bias, B and C for `u (..., D)`."""
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    low, b, c = mixer.x_proj(u).split(sizes, dim=-1)
    if hasattr(mixer, "dt_layernorm"):  # Falcon-Mamba and Jamba
        low, b, c = mixer.dt_layernorm(low), mixer.b_layernorm(b), mixer.c_layernorm(c)
    if hasattr(mixer.config, "_is_quantized"):  # such a weight is only to be used through its module
        return mixer.dt_proj(low), None, b, c
    bias = mixer.dt_proj.bias
    return (
        functional.linear(low, mixer.dt_proj.weight),
        None if bias is None else at_least_float32(bias),
        b,
        c,
    )


def _a(mixer: Any) -> Tensor:
    """`A = -exp(A_log)`, formed in float32."""
    return -torch.exp(at_least_float32(mixer.A_log))


def _fused_activation(mixer: Any) -> Any:
    """The convolution's activation if the operator has it, else None."""
    return mixer.activation if mixer.activation in ("silu", "swish") else None


def _last_columns(states: Tensor, count: int) -> Tensor:
    """The last `count` columns of `states (B, D, S)`, zeros in front if there are fewer."""
    missing = count - states.shape[2]
    return functional.pad(states, (missing, 0)) if missing > 0 else states[:, :, states.shape[2] - count :]


def _keep_inputs(
    mixer: Any, x: Tensor, cache: Any, conv_state: Tensor | None, padded: TokensFirst | None
) -> None:
    """Gives the cache the convolution's last inputs; all of them if it may have to go back."""
    width = mixer.conv_kernel_size
    if padded is not None:
        if conv_state is None:
            before = x.new_zeros(*x.shape[:2], width)
        else:
            before = _last_columns(conv_state, width)
        x = padded.last(before, x)
    elif not cache.is_recording_past(mixer.layer_idx):
        x = x[:, :, -width:]
    cache.update_conv_state(x, mixer.layer_idx, conv_kernel_size=width)
