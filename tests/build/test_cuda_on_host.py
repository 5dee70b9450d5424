"""The arithmetic and the index maths of the CUDA kernels, compiled as host code and run thread by thread.

It says nothing about launches, synchronisation or speed; those need a GPU (tests marked `cuda`).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastlm import reference
from tests.support import samples

ROOT = Path(__file__).parents[2]


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "dim", "seqlen", "width", "num_states")),
        *((name, ctypes.c_int32) for name in ("silu", "channel_last")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "initial", "cu_seqlens", "seq_idx")),
    ]


def _cuda_headers() -> Path | None:
    nvcc = shutil.which("nvcc")
    candidates = [Path("/usr/local/cuda/include")]
    if nvcc is not None:
        candidates.insert(0, Path(nvcc).resolve().parents[1] / "include")
    return next((folder for folder in candidates if (folder / "cuda_bf16.h").exists()), None)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    headers = _cuda_headers()
    compiler = shutil.which("g++")
    if headers is None or compiler is None:
        pytest.skip("the CUDA headers or a C++ compiler are missing")
    target = tmp_path_factory.mktemp("host") / "causal_conv1d_host.so"
    source = ROOT / "tests" / "build" / "causal_conv1d_host.cpp"
    flags = [
        "-std=c++20",
        "-O1",
        "-w",
        "-shared",
        "-fPIC",
        "-fsanitize=undefined",
        "-fno-sanitize-recover=all",
    ]
    command = [compiler, *flags, "-I", str(ROOT / "csrc"), "-isystem", str(headers), str(source)]
    subprocess.run([*command, "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _float32_samples() -> list[samples.Sample]:
    return [
        s
        for s in samples.of("causal_conv1d")
        if all(t.dtype == torch.float32 for t in s.build().floating().values())
    ]


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("sample", _float32_samples(), ids=str)
def test_forward_and_backward(library, sample, channel_last):
    call = sample.build()
    x, weight = (t.contiguous() for t in call.args)
    memory = x.transpose(1, 2).contiguous() if channel_last else x
    batch, dim, length = x.shape
    bias, initial = call.kwargs.get("bias"), call.kwargs.get("initial_states")
    bounds, ids = call.kwargs.get("cu_seqlens"), call.kwargs.get("seq_idx")
    bounds = None if bounds is None else bounds.int()
    ids = None if ids is None else ids.int().contiguous()
    states = batch if bounds is None else len(bounds) - 1
    c = _Call(batch, dim, length, weight.shape[1], states)
    c.silu, c.channel_last = call.kwargs["activation"] is not None, channel_last
    c.x, c.weight, c.bias, c.initial = map(_pointer, (memory, weight, bias, initial))
    c.cu_seqlens, c.seq_idx = _pointer(bounds), _pointer(ids)

    out = torch.full_like(memory, float("nan"))
    final = torch.full((states, dim, weight.shape[1] - 1), float("nan"))
    library.forward(ctypes.byref(c), ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(final.data_ptr()))

    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, initial) if t is not None]
    present = [n for n, t in zip("xwbi", (x, weight, bias, initial), strict=True) if t is not None]
    named = dict(zip(present, leaves, strict=True))
    want, want_final = reference.causal_conv1d(
        named["x"],
        named["w"],
        named.get("b"),
        call.kwargs.get("seq_idx"),
        named.get("i"),
        return_final_states=True,
        activation=call.kwargs["activation"],
        cu_seqlens=call.kwargs.get("cu_seqlens"),
    )
    torch.testing.assert_close(out.transpose(1, 2) if channel_last else out, want.detach())
    torch.testing.assert_close(final, want_final.detach())

    dout, dfinal = torch.randn_like(want), torch.randn_like(want_final)
    roots = [(t, g) for t, g in ((want, dout), (want_final, dfinal)) if t.requires_grad]
    want_grads = torch.autograd.grad([t for t, _ in roots], leaves, [g for _, g in roots], allow_unused=True)
    grad_memory = dout.transpose(1, 2).contiguous() if channel_last else dout.contiguous()
    dx = torch.full_like(memory, float("nan"))
    dweight, dbias = torch.zeros_like(weight), torch.zeros(dim)
    dinitial = None if initial is None else torch.full_like(initial, float("nan"))
    arguments = (grad_memory, dfinal, dx, dweight, dbias, dinitial)
    library.backward(ctypes.byref(c), *(ctypes.c_void_p(_pointer(t)) for t in arguments))
    found = {"x": dx.transpose(1, 2) if channel_last else dx, "w": dweight, "b": dbias, "i": dinitial}
    for name, grad in zip(named, want_grads, strict=True):
        expected = torch.zeros_like(named[name]) if grad is None else grad
        torch.testing.assert_close(
            found[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"d{n}: {m}"
        )


@pytest.mark.parametrize(
    "sample",
    [s for s in samples.of("causal_conv1d_update") if s.build().args[0].dtype == torch.float32],
    ids=str,
)
def test_update(library, sample):
    call = sample.build()
    x, state, weight = (t.contiguous() for t in call.args)
    tokens = x.shape[2] if x.dim() == 3 else 1
    given = [call.kwargs.get(name) for name in ("cache_seqlens", "conv_state_indices")]
    seen, slots = (None if t is None else t.long() for t in given)
    bias, activation = call.kwargs.get("bias"), call.kwargs["activation"]
    want_state = state.clone()
    want = reference.causal_conv1d_update(x, want_state, weight, bias, activation, *given)
    out = torch.full_like(x, float("nan"))
    numbers = (x.shape[0], x.shape[1], tokens, weight.shape[1], state.shape[2], state.shape[0])
    numbers = (*numbers, activation is not None)
    pointers = (x, state, weight, bias, seen, slots, out)
    library.update(*(ctypes.c_int64(n) for n in numbers), *(ctypes.c_void_p(_pointer(t)) for t in pointers))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state, want_state, equal_nan=True)
