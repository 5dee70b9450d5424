"""Depthwise causal convolution along time, with optional SiLU: whole sequences and decoding steps."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Filters every channel along time with its own `W` taps, looking only backwards.

    `p[t] = bias + sum_j weight[j] * x[t - (W-1) + j]`; `out[t] = p[t]`, or `p[t] * sigmoid(p[t])` with an
    activation. An input before the row's start is taken from `initial_states`, or is 0.

    Args:
        x: shape `(B, D, L)`.
        weight: shape `(D, W)`.
        bias: shape `(D,)`; default 0.
        seq_idx: shape `(B, L)`, integer: document of each position. A tap is dropped where its document
            differs from the current position's; positions with a negative id give 0.
        initial_states: shape `(B, D, W-1)`, oldest first; default 0. With `seq_idx` they belong to the row's
            first document.
        return_final_states: also return the last `W - 1` inputs of each row: the initial state of the row's
            continuation. With `seq_idx` they are the inputs of the last document alone, 0 in place of others.
        final_states_out: the final states are copied into it as well.
        activation: None, `"silu"` or `"swish"` (the same).
        cu_seqlens: shape `(S+1,)`, integer: the batch is one row of `S` packed sequences, and states have
            shape `(S, D, W-1)`. A sequence shorter than `W - 1` keeps the newest part of its initial state in
            front, an empty one keeps all of it.

    Returns:
        out: shape and dtype of `x`; with `return_final_states` the pair `(out, final_states)`.

    Raises:
        ValueError: unknown activation, or `cu_seqlens` with `seq_idx` or with a batch other than 1.

    Source: Dao-AILab/causal-conv1d, `causal_conv1d_fn`; `cu_seqlens`, and `seq_idx` together with states, are
    additions.
    """
    _check_activation(activation)
    if cu_seqlens is None:
        out, final_states = _one_batch(x, weight, bias, seq_idx, initial_states, activation)
    else:
        if seq_idx is not None or x.shape[0] != 1:
            raise ValueError("causal_conv1d: cu_seqlens needs a batch of 1 and no seq_idx")
        bounds = cu_seqlens.tolist()
        outs, states = [x[..., :0]], [x.new_zeros((0, x.shape[1], weight.shape[1] - 1))]
        for s, (begin, end) in enumerate(pairwise(bounds)):
            initial = None if initial_states is None else initial_states[s : s + 1]
            piece, state = _one_batch(x[..., begin:end], weight, bias, None, initial, activation)
            outs.append(piece)
            states.append(state)
        out, final_states = torch.cat(outs, dim=-1), torch.cat(states)
    if final_states_out is not None:
        final_states_out.copy_(final_states)
    return (out, final_states) if return_final_states else out


def _one_batch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """Equal-length rows: `(out (B, D, L), final_states (B, D, W-1))`."""
    batch, dim, length = x.shape
    width = weight.shape[1]
    acc = torch.promote_types(x.dtype, torch.float32)
    if initial_states is None:
        initial_states = x.new_zeros((batch, dim, width - 1))
    inputs = torch.cat([initial_states, x], dim=-1)  # (B, D, W-1+L): position t is at W-1+t
    documents = None
    if seq_idx is not None and length > 0:
        documents = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], dim=-1)  # (B, W-1+L)

    exact = inputs.to(acc)  # once: the gradient of the cast rounds, and a sum of taps is rounded once
    pre = torch.zeros(x.shape, dtype=acc, device=x.device)
    for j in range(width):
        tap = exact[..., j : j + length]
        if documents is not None and seq_idx is not None:
            same = (documents[:, j : j + length] == seq_idx).unsqueeze(1)
            tap = torch.where(same, tap, 0.0)
        pre = pre + weight[:, j].to(acc).unsqueeze(-1) * tap
    if bias is not None:
        pre = pre + bias.to(acc).unsqueeze(-1)
    out = pre if activation is None else torch.nn.functional.silu(pre)
    if seq_idx is not None:
        out = torch.where((seq_idx >= 0).unsqueeze(1), out, 0.0)

    final_states = inputs[..., length:]
    if documents is not None:
        of_last = (documents[:, length:] == documents[:, -1:]).unsqueeze(1)
        final_states = torch.where(of_last, final_states, 0.0)
    return out.to(x.dtype), final_states.clone()


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Filters the next `m` inputs of each row after those kept in `conv_state`, and keeps them there.

    Same formula as `causal_conv1d`, with the state's newest `W - 1` inputs in front.

    Args:
        x: shape `(B, D)` (one input) or `(B, D, m)`.
        conv_state: shape `(B, D, S)`, `S >= W - 1`, written in place; any number of slots instead of `B` with
            `conv_state_indices`. Without `cache_seqlens` it holds the last `S` inputs, oldest first, and is
            shifted.
        weight: shape `(D, W)`.
        bias: shape `(D,)`; default 0.
        activation: None, `"silu"` or `"swish"` (the same).
        cache_seqlens: shape `(B,)`, integer: inputs each row has seen. The state is then a ring: input number
            `n` lies at slot `n mod S`. Slots for inputs before the first are read like any other (zeros in a
            fresh state).
        conv_state_indices: shape `(B,)`, integer: slot of each row. A negative one marks a padding row:
            output 0, no state touched.

    Returns:
        out: shape and dtype of `x`.

    Raises:
        ValueError: unknown activation.
        IndexError: a slot that does not exist.

    Note:
        Not differentiable.

    Source: Dao-AILab/causal-conv1d, `causal_conv1d_update`.
    """
    _check_activation(activation)
    tokens = x.unsqueeze(-1) if x.dim() == 2 else x
    keep, size = weight.shape[1] - 1, conv_state.shape[-1]
    new = tokens.shape[-1]
    out = torch.zeros_like(tokens)
    for row in range(tokens.shape[0]):
        slot = row if conv_state_indices is None else int(conv_state_indices[row])
        if slot < 0:
            continue
        state = conv_state[slot]  # (D, S)
        if cache_seqlens is None:
            past = state[:, size - keep :]
        else:
            seen = int(cache_seqlens[row])
            past = state[:, [n % size for n in range(seen - keep, seen)]]
        filtered, _ = _one_batch(tokens[row : row + 1], weight, bias, None, past.unsqueeze(0), activation)
        out[row] = filtered[0]
        if cache_seqlens is None:
            state.copy_(torch.cat([state, tokens[row]], dim=-1)[:, new:].clone())
        else:
            for t in range(new):
                state[:, (seen + t) % size] = tokens[row, :, t]
    return out.reshape(x.shape)


def _check_activation(activation: str | None) -> None:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"causal_conv1d: activation must be None, 'silu' or 'swish', got {activation!r}")
