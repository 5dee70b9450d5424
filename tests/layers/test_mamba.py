"""The Mamba layer: against a step loop over the same parameters, in pieces, packed, and with gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from fastlm.layers import Mamba, MambaState


@pytest.fixture(params=[None, "affine", "plain"])
def mamba(request) -> Mamba:
    torch.manual_seed(0)
    mamba = Mamba(12, d_state=3, d_conv=4, dt_rank=2, bcdt_rms_norm=request.param, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in mamba.named_parameters():
            if "layernorm" in name:
                parameter.uniform_(0.5, 1.5)
    return mamba


def normalised(mamba: Mamba, name: str, x: Tensor) -> Tensor:
    norm = getattr(mamba, name)
    if norm is None:
        return x
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return y if norm.weight is None else y * norm.weight


def step_loop(mamba: Mamba, h: Tensor) -> Tensor:
    """The layer written out, one token after the other."""
    p = dict(mamba.named_parameters())
    a = -p["A_log"].exp()
    taps = mamba.d_conv
    past = [h.new_zeros(h.shape[0], mamba.d_inner)] * (taps - 1)
    state = h.new_zeros(h.shape[0], mamba.d_inner, mamba.d_state)
    out = []
    for t in range(h.shape[1]):
        x, z = (h[:, t] @ p["in_proj.weight"].T).chunk(2, dim=-1)
        past = [*past, x][-taps:]
        u = functional.silu(
            sum(past[j] * p["conv1d.weight"][:, 0, j] for j in range(taps)) + p["conv1d.bias"]
        )
        past = past[1:]
        low, b, c = (u @ p["x_proj.weight"].T).split([mamba.dt_rank, mamba.d_state, mamba.d_state], dim=-1)
        low, b, c = (
            normalised(mamba, name, x)
            for name, x in (("dt_layernorm", low), ("b_layernorm", b), ("c_layernorm", c))
        )
        dt = functional.softplus(low @ p["dt_proj.weight"].T + p["dt_proj.bias"])
        state = torch.exp(dt[..., None] * a) * state + (dt * u)[..., None] * b[:, None]
        y = (state * c[:, None]).sum(-1) + p["D"] * u
        out.append((y * functional.silu(z)) @ p["out_proj.weight"].T)
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 17])
def test_forward_and_gradients_equal_the_step_loop(mamba, length):
    h = torch.randn(2, length, 12, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, length, 12, dtype=torch.float64)
    inputs = [h, *mamba.parameters()]
    out, expected = mamba(h), step_loop(mamba, h)
    assert_close(out, expected)
    got = torch.autograd.grad((out * weights).sum(), inputs)
    want = torch.autograd.grad((expected * weights).sum(), inputs)
    for (name, _), g, w in zip([("input", h), *mamba.named_parameters()], got, want, strict=True):
        assert_close(g, w, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize("split", [1, 2, 3, 5, 10])
def test_two_pieces_with_carried_state_equal_one(mamba, split):
    h = torch.randn(2, 11, 12, dtype=torch.float64, requires_grad=True)
    whole, end = mamba(h, return_state=True)
    first, state = mamba(h[:, :split], return_state=True)
    second, last = mamba(h[:, split:], state, return_state=True)
    assert_close(torch.cat((first, second), dim=1), whole)
    assert_close(last.conv, end.conv)
    assert_close(last.scan, end.scan)
    grad_whole = torch.autograd.grad(whole.square().sum() + end.scan.sum(), h)[0]
    grad_pieces = torch.autograd.grad(first.square().sum() + second.square().sum() + last.scan.sum(), h)[0]
    assert_close(grad_pieces, grad_whole)


def test_steps_equal_forward_and_write_the_state_in_place(mamba):
    h = torch.randn(2, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        whole, end = mamba(h, return_state=True)
        state = mamba.new_state(2)
        places = state.conv.data_ptr(), state.scan.data_ptr()
        steps = torch.cat([mamba.step(h[:, t : t + 1], state) for t in range(9)], dim=1)
    assert_close(steps, whole)
    assert_close(state.conv, end.conv)
    assert_close(state.scan, end.scan)
    assert places == (state.conv.data_ptr(), state.scan.data_ptr())


def test_packed_sequences_equal_separate_ones(mamba):
    h = torch.randn(1, 13, 12, dtype=torch.float64)
    bounds = [0, 1, 6, 6, 13]  # a sequence of one token, and an empty one
    start = MambaState(torch.randn(4, 24, 3, dtype=torch.float64), torch.randn(4, 24, 3, dtype=torch.float64))
    packed, end = mamba(h, start, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), return_state=True)
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        own = MambaState(start.conv[i : i + 1], start.scan[i : i + 1])
        if a == b:
            assert_close(end.scan[i], own.scan[0])
            continue
        alone, last = mamba(h[:, a:b], own, return_state=True)
        assert_close(packed[:, a:b], alone)
        assert_close(end.conv[i : i + 1], last.conv)
        assert_close(end.scan[i : i + 1], last.scan)


def test_parameter_names_and_shapes_of_the_public_layer():
    mamba = Mamba(32, 16, 4, 2)
    assert {name: tuple(p.shape) for name, p in mamba.named_parameters()} == {
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (34, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "A_log": (64, 16),
        "D": (64,),
        "out_proj.weight": (32, 64),
    }


def test_norms_of_step_and_projections_have_the_names_of_jamba():
    names = {name: p.shape[0] for name, p in Mamba(32, bcdt_rms_norm="affine").named_parameters()}
    assert names["dt_layernorm.weight"] == 2
    assert names["b_layernorm.weight"] == names["c_layernorm.weight"] == 16
    assert not any("layernorm" in name for name, _ in Mamba(32, bcdt_rms_norm="plain").named_parameters())
    mamba = Mamba(32, bcdt_rms_norm="affine", dtype=torch.bfloat16)
    assert mamba.b_layernorm.eps == 1e-6
    with torch.no_grad():
        mamba.c_layernorm.weight.zero_()
    mamba.reset_parameters()
    assert (mamba.c_layernorm.weight == 1).all()
    assert mamba(torch.randn(1, 5, 32).bfloat16()).dtype == torch.bfloat16


def test_initial_values():
    torch.manual_seed(0)
    mamba = Mamba(256)
    assert_close(mamba.A_log[5].exp(), torch.arange(1.0, 17.0))
    assert (mamba.D == 1).all()
    assert mamba.dt_proj.weight.abs().max() <= 16**-0.5
    steps = functional.softplus(mamba.dt_proj.bias.double())
    assert 1e-3 * 0.999 <= steps.min() < 2e-3
    assert 5e-2 < steps.max() <= 1e-1 * 1.001
    assert steps.log().mean().item() == pytest.approx(
        math.log(1e-2), abs=0.15
    )  # log-uniform: the mean is in the middle
    assert mamba.conv1d.weight.abs().max() <= 0.5 < 2 * mamba.conv1d.weight.abs().max()


def test_state_parameters_stay_float32_in_a_half_precision_layer():
    mamba = Mamba(16, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in mamba.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "A_log",
        "D",
        "dt_proj.bias",
    }
    state = mamba.new_state(1)
    assert (state.conv.dtype, state.scan.dtype) == (torch.bfloat16, torch.float32)
    out, new = mamba(torch.randn(1, 5, 16).bfloat16(), state, return_state=True)
    assert (out.dtype, new.scan.dtype) == (torch.bfloat16, torch.float32)


def test_another_norm_is_refused():
    with pytest.raises(ValueError, match="bcdt_rms_norm must be 'affine', 'plain' or None, got 'rms'"):
        Mamba(8, bcdt_rms_norm="rms")


@pytest.mark.parametrize(
    ("name", "value"), [("d_state", 0), ("d_conv", 1), ("expand", 0), ("dt_rank", 0), ("d_model", 0)]
)
def test_sizes_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"Mamba: {name} must be at least [12], got {value}"):
        Mamba(**{"d_model": 8, name: value})
