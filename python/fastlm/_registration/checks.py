"""Argument checks of the fake kernels, in the words of csrc/adapter/check.h.

Checks on values (ids, cu_seqlens) need data and stay with the real kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_text(shape: Sequence[int | torch.SymInt]) -> str:
    inner = ", ".join(str(size) for size in shape)
    return f"({inner},)" if len(shape) == 1 else f"({inner})"


def floating(op: str, name: str, t: Tensor) -> None:
    torch._check_value(
        t.dtype in _FLOATING,
        lambda: f"{op}: {name} must have dtype float32, bfloat16, float16 or float64, got {name_of(t.dtype)}",
    )


def dim(op: str, name: str, t: Tensor, expected: int, words: str) -> None:
    torch._check_value(
        t.dim() == expected, lambda: f"{op}: {name} must have shape {words}, got {shape_text(t.shape)}"
    )


def shape(op: str, name: str, t: Tensor, expected: Sequence[int | torch.SymInt]) -> None:
    def text() -> str:
        return f"{op}: {name} must have shape {shape_text(expected)}, got {shape_text(t.shape)}"

    torch._check_value(t.dim() == len(expected), text)
    for size, wanted in zip(t.shape, expected, strict=True):
        torch._check_value(size == wanted, text)


def same_dtype(op: str, name: str, t: Tensor, main: str, like: Tensor) -> None:
    torch._check_value(
        t.dtype == like.dtype,
        lambda: f"{op}: {name} must have the dtype of {main}, {name_of(like.dtype)}, got {name_of(t.dtype)}",
    )


def same_device(op: str, name: str, t: Tensor, main: str, like: Tensor) -> None:
    torch._check_value(
        t.device.type == like.device.type,
        lambda: f"{op}: {name} must be on the device of {main}, {like.device.type}, got {t.device.type}",
    )


def index_vector(op: str, name: str, t: Tensor) -> None:
    torch._check_value(
        t.dtype in (torch.int32, torch.int64),
        lambda: f"{op}: {name} must have dtype int32 or int64, got {name_of(t.dtype)}",
    )
    torch._check_value(
        t.dim() == 1, lambda: f"{op}: {name} must have one dimension, got {shape_text(t.shape)}"
    )


def cu_seqlens(op: str, name: str, t: Tensor) -> None:
    index_vector(op, name, t)
    torch._check_value(
        t.shape[0] >= 1,
        lambda: f"{op}: {name} must have at least 1 element (0), got shape {shape_text(t.shape)}",
    )
