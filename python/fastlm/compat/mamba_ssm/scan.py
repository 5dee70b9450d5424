"""The selective scan, and Mamba's inner part (convolution, projections, scan, output projection) in one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastlm import ops, reference


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`fastlm.ops.selective_scan`.

    Args:
        u, delta: shape `(B, D, L)`, one dtype.
        A: shape `(D, N)`, real.
        B, C: shape `(B, N, L)`, `(B, G, N, L)` or constant `(D, N)`.
        D, delta_bias: shape `(D,)`; default none.
        z: shape `(B, D, L)`, gate; default none.
        delta_softplus: apply softplus to the step sizes.
        return_last_state: also return the state after the last position.

    Returns:
        out: shape and dtype of `u`; with `return_last_state` the pair `(out, last_state)`, the latter of shape
        `(B, D, N)`, float32 (float64 for float64).

    Raises:
        NotImplementedError: `A` is complex.
        ValueError: in the words of `fastlm.ops.selective_scan`.

    Note:
        Gradients flow from `last_state` too; the original drops them.

    Source: state-spaces/mamba, `selective_scan_fn`.
    """
    _refuse_complex("selective_scan_fn", A)
    return ops.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`fastlm.reference.selective_scan` under the same words; complex `A` raises NotImplementedError."""
    _refuse_complex("selective_scan_ref", A)
    return reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Everything of a Mamba layer behind its input projection.

    `x, z = xz`; `u = silu(conv1d(x))`; `dt, B, C = x_proj(u)`; `y = scan(u, delta_proj(dt), A, B, C, D) * silu(z)`;
    `out_proj(y)`.

    Args:
        xz: shape `(B, 2D, L)`: the convolution's input, then the gate.
        conv1d_weight: shape `(D, 1, W)`.
        conv1d_bias: shape `(D,)` or None.
        x_proj_weight: shape `(R + N + N, D)`, rows for the step size's rank `R`, `B` and `C`; a constant `B` or `C`
            has none.
        delta_proj_weight: shape `(D, R)`.
        out_proj_weight, out_proj_bias: shapes `(d, D)` and `(d,)` (or None).
        A: shape `(D, N)`, real.
        B, C: constant `(D, N)`; default: projected from the input.
        D, delta_bias: shape `(D,)`; default none.
        B_proj_bias, C_proj_bias: shape `(N,)`, added to a projected `B` or `C`; default none.
        delta_softplus: apply softplus to the step sizes.
        checkpoint_lvl: 0 or 1. Both give the same result and need the same memory here.
        b_rms_weight, c_rms_weight: shape `(N,)`: root-mean-square normalisation of a projected `B` or `C`.
        dt_rms_weight: shape `(D,)`: the same for the step sizes, behind their projection.
        b_c_dt_rms_eps: added to those mean squares.

    Returns:
        out: shape `(B, L, d)`.

    Raises:
        NotImplementedError: `A` is complex.
        ValueError: a shape or dtype does not fit; `checkpoint_lvl` is neither 0 nor 1; a normalisation or bias for
            a constant `B` or `C`.

    Note:
        A composition of operators, differentiable in every floating argument, the normalisations included; the
        original leaves these out of its backward pass.

    Source: state-spaces/mamba, `mamba_inner_fn`.
    """
    name = "mamba_inner_fn"
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"{name}: checkpoint_lvl must be 0 or 1, got {checkpoint_lvl}")
    for letter, matrix, bias, rms in (
        ("B", B, B_proj_bias, b_rms_weight),
        ("C", C, C_proj_bias, c_rms_weight),
    ):
        if matrix is not None and (bias is not None or rms is not None):
            raise ValueError(
                f"{name}: {letter}_proj_bias and {letter.lower()}_rms_weight must be None when {letter} is given, "
                f"got a constant {letter} of shape {tuple(matrix.shape)}"
            )
    y = _mix(
        (name, ops.causal_conv1d, ops.selective_scan),
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        (B, B_proj_bias, b_rms_weight),
        (C, C_proj_bias, c_rms_weight),
        D,
        (delta_bias, delta_softplus, dt_rms_weight),
        b_c_dt_rms_eps,
    )
    return functional.linear(y, out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` with the convolution and the scan of `fastlm.reference`."""
    y = _mix(
        ("mamba_inner_ref", reference.causal_conv1d, reference.selective_scan),
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        (B, B_proj_bias, None),
        (C, C_proj_bias, None),
        D,
        (delta_bias, delta_softplus, None),
        0.0,
    )
    return functional.linear(y, out_proj_weight, out_proj_bias)


def _mix(
    parts: tuple[str, Callable[..., Any], Callable[..., Any]],
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    input_map: tuple[Tensor | None, Tensor | None, Tensor | None],
    output_map: tuple[Tensor | None, Tensor | None, Tensor | None],
    D: Tensor | None,
    step: tuple[Tensor | None, bool, Tensor | None],
    eps: float,
) -> Tensor:
    """The gated scan `(B, L, D)`, before the output projection.

    Args:
        parts: name for errors, convolution, scan.
        input_map, output_map: B and C, each as (constant or None, bias or None, normalisation or None).
        step: delta_bias, delta_softplus, normalisation or None.
    """
    name, conv, scan = parts
    _refuse_complex(name, A)
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    sizes = [rank, *[states for matrix, *_ in (input_map, output_map) if matrix is None]]
    if x_proj_weight.shape[0] != sum(sizes):
        raise ValueError(
            f"{name}: x_proj_weight must have {sum(sizes)} rows ({' + '.join(map(str, sizes))}), "
            f"got shape {tuple(x_proj_weight.shape)}"
        )
    x, z = xz.chunk(2, dim=1)
    u = conv(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")  # (B, D, L)
    low, *projected = functional.linear(u.transpose(1, 2), x_proj_weight).split(sizes, dim=-1)
    delta = _normalised(functional.linear(low, delta_proj_weight), step[2], eps)
    maps = []
    for constant, bias, rms in (input_map, output_map):
        if constant is not None:
            maps.append(constant)
            continue
        matrix = projected.pop(0)  # (B, L, N)
        if bias is not None:
            matrix = matrix + bias.to(matrix.dtype)
        maps.append(_normalised(matrix, rms, eps).transpose(1, 2))
    y: Tensor = scan(u, delta.transpose(1, 2), A, *maps, D, z, delta_bias=step[0], delta_softplus=step[1])
    return y.transpose(1, 2)


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x` over its root mean square along the last dimension, times `weight`; `x` itself without one."""
    if weight is None:
        return x
    acc = torch.promote_types(x.dtype, torch.float32)
    return functional.rms_norm(x.to(acc), weight.shape, weight.to(acc), eps).to(x.dtype)


def _refuse_complex(name: str, A: Tensor) -> None:
    if A.is_complex():
        raise NotImplementedError(f"{name}: A must be real, got {A.dtype}")
