"""One decoding step of the scan, also with the channels grouped into heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from fastlm import ops, reference


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """`fastlm.ops.selective_state_update`, with or without heads.

    Args:
        state: shape `(B, D, N)`, or `(B, H, P, N)` for `H` heads of `P` channels; written in place; any number of
            slots instead of `B` with `state_batch_indices`.
        x, dt, z: shape `(B, D)`, or `(B, H, P)`; z: default none.
        A: shape `(D, N)`, or `(H, P, N)`.
        B, C: shape `(B, N)`, or `(B, G, N)` with groups of neighbouring heads.
        D, dt_bias: shape `(D,)`, or `(H, P)`; default none.
        dt_softplus: apply softplus to the step sizes.
        state_batch_indices: shape `(B,)`, integer: the slot of each row; a negative one marks a padding row, whose
            output is 0 and which touches no state.

    Returns:
        out: shape and dtype of `x`.

    Raises:
        ValueError: the number of dimensions of an argument does not fit that of `state`; the rest in the words of
            `fastlm.ops.selective_state_update`.
        IndexError: a slot that does not exist.

    Note:
        Not differentiable. `x`, `dt`, `B`, `C` and `z` may differ in dtype: then they are computed with in the
        common one, and the result is rounded to that of `x`. A `state` whose heads and channels do not lie evenly
        in memory is copied and written back.

    Source: state-spaces/mamba, `selective_state_update`.
    """
    return _update(
        ops.selective_state_update,
        "selective_state_update",
        state,
        (x, dt, A, B, C, D, z, dt_bias),
        dt_softplus,
        state_batch_indices,
    )


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`fastlm.reference.selective_state_update`, with or without heads; as in the original there are no slots here."""
    return _update(
        reference.selective_state_update,
        "selective_state_update_ref",
        state,
        (x, dt, A, B, C, D, z, dt_bias),
        dt_softplus,
        None,
    )


@torch.no_grad()
def _update(
    update: Callable[..., Tensor],
    name: str,
    state: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
) -> Tensor:
    """`update` on one flat axis of channels; tensors are x, dt, A, B, C, D, z and dt_bias."""
    x, dt, A, B, C, D, z, dt_bias = tensors
    if state.dim() not in (3, 4):
        raise ValueError(f"{name}: state must have 3 or 4 dimensions, got shape {tuple(state.shape)}")
    heads = state.dim() == 4
    expected = {"x": 2, "dt": 2, "A": 2, "D": 1, "z": 2, "dt_bias": 1}
    for argument, t in zip(("x", "dt", "A", "D", "z", "dt_bias"), (x, dt, A, D, z, dt_bias), strict=True):
        if t is not None and t.dim() != expected[argument] + heads:
            raise ValueError(
                f"{name}: {argument} must have {expected[argument] + heads} dimensions with a state of shape "
                f"{tuple(state.shape)}, got shape {tuple(t.shape)}"
            )
    if heads:
        _check_heads(name, state, {"x": x, "dt": dt, "z": z}, {"A": A, "D": D, "dt_bias": dt_bias}, B, C)
    flat = state.flatten(1, 2) if heads else state
    wide = reduce(torch.promote_types, (t.dtype for t in (x, dt, B, C, z) if t is not None))

    def rows(t: Tensor | None) -> Tensor | None:
        """`(B, D)` in the common dtype."""
        return None if t is None else (t.flatten(1) if heads else t).to(wide)

    def channels(t: Tensor | None) -> Tensor | None:
        """`(D, ...)`."""
        return t.flatten(0, 1) if heads and t is not None else t

    out = update(
        flat,
        rows(x),
        rows(dt),
        channels(A),
        B.to(wide),
        C.to(wide),
        channels(D),
        rows(z),
        channels(dt_bias),
        dt_softplus,
        **({} if state_batch_indices is None else {"state_batch_indices": state_batch_indices}),
    )
    if heads and not _flattens_in_place(state):
        state.copy_(flat.view(state.shape))
    return out.reshape(x.shape).to(x.dtype)


def _check_heads(
    name: str,
    state: Tensor,
    rows: dict[str, Tensor | None],
    channels: dict[str, Tensor | None],
    B: Tensor,
    C: Tensor,
) -> None:
    """Heads and channels agree everywhere: flattened, `(4, 2)` would pass for `(2, 4)`."""
    heads = tuple(state.shape[1:3])
    for argument, t in rows.items():
        if t is not None and t.shape[1:] != heads:
            raise ValueError(
                f"{name}: {argument} must have shape (B, {heads[0]}, {heads[1]}), got {tuple(t.shape)}"
            )
    for argument, t in channels.items():
        if t is not None and t.shape[:2] != heads:
            raise ValueError(
                f"{name}: {argument} must have heads and channels {heads}, got shape {tuple(t.shape)}"
            )
    for argument, t in (("B", B), ("C", C)):
        if t.dim() == 3 and (t.shape[1] == 0 or heads[0] % t.shape[1]):
            raise ValueError(
                f"{name}: {argument} must have a number of groups that divides the {heads[0]} heads, got {t.shape[1]}"
            )


def _flattens_in_place(state: Tensor) -> bool:
    """Whether `(S, H, P, N)` seen as `(S, H * P, N)` is the same memory."""
    _, heads, channels, _ = state.shape
    return heads <= 1 or channels <= 1 or state.stride(1) == channels * state.stride(2)
