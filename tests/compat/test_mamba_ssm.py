"""`fastlm.compat.mamba_ssm`: scan, inner part, decoding step with heads, and the module with its cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from fastlm import layers, reference
from fastlm.compat.mamba_ssm import (
    Mamba,
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
    selective_state_update_ref,
)
from tests.support.tolerance import assert_close_to_reference

STEPS = [selective_state_update, selective_state_update_ref]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def decay(*shape: int) -> Tensor:
    return (-torch.rand(*shape, dtype=torch.float64) - 0.1).requires_grad_()


# ---- Scan


@pytest.mark.parametrize("function", [selective_scan_fn, selective_scan_ref])
def test_scan_by_position_equals_the_definition_with_gradients(function):
    args = [
        leaf(2, 4, 7),
        leaf(2, 4, 7),
        decay(4, 3),
        leaf(2, 2, 3, 7),
        leaf(2, 3, 7),
        leaf(4),
        leaf(2, 4, 7),
        leaf(4),
    ]
    out, last = function(*args, True, True)
    expected, expected_last = reference.selective_scan(*args, delta_softplus=True, return_last_state=True)
    assert_close(out, expected)
    assert_close(last, expected_last)
    weights, of_last = torch.randn_like(out), torch.randn_like(last)
    got = torch.autograd.grad((out * weights).sum() + (last * of_last).sum(), args)
    want = torch.autograd.grad((expected * weights).sum() + (expected_last * of_last).sum(), args)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w)
    assert isinstance(function(*args), Tensor)


# ---- Inner part


def inner_arguments(*, constant_b: bool = False, constant_c: bool = False) -> dict[str, Tensor | None]:
    """A layer of 4 channels, 3 states, rank 2 and 3 taps, for 2 rows of 6 positions; 5 outputs."""
    return {
        "xz": leaf(2, 8, 6),
        "conv1d_weight": leaf(4, 1, 3),
        "conv1d_bias": leaf(4),
        "x_proj_weight": leaf(2 + 3 * (2 - constant_b - constant_c), 4),
        "delta_proj_weight": leaf(4, 2),
        "out_proj_weight": leaf(5, 4),
        "out_proj_bias": leaf(5),
        "A": decay(4, 3),
        "B": leaf(4, 3) if constant_b else None,
        "C": leaf(4, 3) if constant_c else None,
        "D": leaf(4),
        "delta_bias": leaf(4),
    }


def plain_inner(p: dict[str, Tensor | None], *, eps: float = 1e-6, softplus: bool = True) -> Tensor:
    """The inner part in plain PyTorch and `reference.selective_scan`."""

    def norm(x: Tensor, name: str) -> Tensor:
        weight = p.get(name)
        return x if weight is None else x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    x, z = p["xz"].chunk(2, dim=1)
    taps = p["conv1d_weight"].shape[-1]
    u = functional.silu(
        functional.conv1d(functional.pad(x, (taps - 1, 0)), p["conv1d_weight"], p["conv1d_bias"], groups=4)
    )
    low = u.transpose(1, 2) @ p["x_proj_weight"].T
    delta = norm(low[..., :2] @ p["delta_proj_weight"].T, "dt_rms_weight").transpose(1, 2)
    b, c = p["B"], p["C"]
    if b is None:
        b = norm(low[..., 2:5] + p.get("B_proj_bias", 0), "b_rms_weight").transpose(1, 2)
    if c is None:
        c = norm(low[..., -3:] + p.get("C_proj_bias", 0), "c_rms_weight").transpose(1, 2)
    y = reference.selective_scan(u, delta, p["A"], b, c, p["D"], z, p["delta_bias"], softplus)
    out = y.transpose(1, 2) @ p["out_proj_weight"].T
    return out if p["out_proj_bias"] is None else out + p["out_proj_bias"]


def assert_same_with_gradients(out: Tensor, expected: Tensor, inputs: dict[str, Tensor | None]) -> None:
    assert_close(out, expected)
    leaves = {name: t for name, t in inputs.items() if isinstance(t, Tensor)}
    weights = torch.randn_like(out)
    got = torch.autograd.grad((out * weights).sum(), leaves.values())
    want = torch.autograd.grad((expected * weights).sum(), leaves.values())
    for name, g, w in zip(leaves, got, want, strict=True):
        assert_close(g, w, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize("function", [mamba_inner_fn, mamba_inner_ref])
@pytest.mark.parametrize("constant_b", [False, True])
@pytest.mark.parametrize("constant_c", [False, True])
def test_inner_equals_plain_pytorch(function, constant_b, constant_c):
    p = inner_arguments(constant_b=constant_b, constant_c=constant_c)
    assert_same_with_gradients(function(*p.values()), plain_inner(p), p)


@pytest.mark.parametrize("function", [mamba_inner_fn, mamba_inner_ref])
def test_inner_with_biases_and_without_softplus(function):
    p = inner_arguments() | {"conv1d_bias": None, "out_proj_bias": None, "delta_bias": None}
    p |= {"B_proj_bias": leaf(3), "C_proj_bias": leaf(3)}
    assert_same_with_gradients(function(**p, delta_softplus=False), plain_inner(p, softplus=False), p)


def test_inner_normalises_and_the_norms_have_gradients():
    p = inner_arguments() | {"b_rms_weight": leaf(3), "c_rms_weight": leaf(3), "dt_rms_weight": leaf(4)}
    for level in (0, 1):
        out = mamba_inner_fn(**p, checkpoint_lvl=level, b_c_dt_rms_eps=0.1)
        assert_same_with_gradients(out, plain_inner(p, eps=0.1), p)


def test_inner_in_half_precision_and_under_autocast():
    p = {name: None if t is None else t.detach().float() for name, t in inner_arguments().items()}
    exact = plain_inner({name: None if t is None else t.double() for name, t in p.items()})
    activations = ("xz", "x_proj_weight", "delta_proj_weight", "out_proj_weight", "out_proj_bias")
    half = p | {name: p[name].bfloat16() for name in activations}
    plain = mamba_inner_ref(**half)
    assert_close_to_reference("half", mamba_inner_fn(**half), exact, plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close_to_reference("autocast", mamba_inner_fn(**p), exact, plain)


# ---- Decoding step


def step_arguments(heads: int, channels: int, groups: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    args = [
        torch.randn(2, heads, channels, 5),
        torch.randn(2, heads, channels),
        torch.randn(2, heads, channels),
    ]
    args += [-torch.rand(heads, channels, 5), torch.randn(2, groups, 5), torch.randn(2, groups, 5)]
    return args, {
        "D": torch.randn(heads, channels),
        "z": torch.randn(2, heads, channels),
        "dt_bias": torch.randn(heads, channels),
    }


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_steps_with_heads_equal_steps_of_each_head(step, groups):
    (state, x, dt, A, B, C), more = step_arguments(4, 3, groups)
    before, place = state.clone(), state.data_ptr()
    out = step(state, x, dt, A, B, C, **more, dt_softplus=True)
    assert out.shape == x.shape
    assert state.data_ptr() == place
    for h in range(4):
        g = h * groups // 4
        own = before[:, h].clone()
        per_head = [more["D"][h], more["z"][:, h], more["dt_bias"][h], True]
        expected = reference.selective_state_update(own, x[:, h], dt[:, h], A[h], B[:, g], C[:, g], *per_head)
        assert_close(out[:, h], expected)
        assert_close(state[:, h], own)


@pytest.mark.parametrize("step", STEPS)
def test_steps_without_heads_by_position(step):
    state, x, dt, z = torch.randn(2, 4, 3), torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 4)
    rest = [-torch.rand(4, 3), torch.randn(2, 3), torch.randn(2, 3), torch.randn(4), z, torch.randn(4), True]
    expected_state = state.clone()
    out = step(state, x, dt, *rest)
    assert_close(out, reference.selective_state_update(expected_state, x, dt, *rest))
    assert_close(state, expected_state)


@pytest.mark.parametrize("step", STEPS)
def test_a_state_that_does_not_flatten_is_written_back(step):
    args, more = step_arguments(4, 3, 1)
    strided = args[0].transpose(1, 2).contiguous().transpose(1, 2)  # heads and channels swapped in memory
    assert_close(step(strided, *args[1:], **more), step(args[0], *args[1:], **more))
    assert_close(strided, args[0])


def test_steps_with_values_shared_by_the_channels_of_a_head():
    (state, x, _, _, B, C), more = step_arguments(4, 3, 2)
    dt, A = torch.randn(2, 4, 1).expand(2, 4, 3), -torch.rand(4, 1, 1).expand(4, 3, 5)
    more |= {"D": torch.randn(4, 1).expand(4, 3), "dt_bias": torch.randn(4, 1).expand(4, 3)}
    also = state.clone()
    assert_close(
        selective_state_update(state, x, dt, A, B, C, **more),
        selective_state_update_ref(also, x, dt, A, B, C, **more),
    )
    assert_close(state, also)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_dtypes_are_computed_in_the_common_one(dtype):
    (state, x, dt, A, B, C), more = step_arguments(2, 3, 1)
    state, x, dt, more["z"] = state.to(dtype), x.to(dtype), dt.to(dtype), more["z"].to(dtype)
    exact = state.float()
    out = selective_state_update(state, x, dt, A, B, C, **more)
    wide = {"D": more["D"], "dt_bias": more["dt_bias"], "z": more["z"].float()}
    expected = selective_state_update(exact, x.float(), dt.float(), A, B, C, **wide)
    assert out.dtype == dtype
    assert_close(out, expected.to(dtype), rtol=0, atol=0)
    assert_close(state, exact.to(dtype), rtol=0, atol=0)


def test_steps_in_slots_with_padding_rows():
    (_, x, dt, A, B, C), more = step_arguments(2, 3, 1)
    slots = torch.randn(6, 2, 3, 5)
    own = slots[4:5].clone()
    before = slots.clone()
    out = selective_state_update(
        slots, x, dt, A, B, C, **more, state_batch_indices=torch.tensor([4, -1], dtype=torch.int32)
    )
    first = {name: t[:1] if name == "z" else t for name, t in more.items()}
    assert_close(out[:1], selective_state_update_ref(own, x[:1], dt[:1], A, B[:1], C[:1], **first))
    assert_close(out[1], torch.zeros(2, 3))
    assert_close(slots[4:5], own)
    others = [0, 1, 2, 3, 5]
    assert_close(slots[others], before[others], rtol=0, atol=0)


# ---- Module

SHAPES = {
    "A_log": (24, 3),
    "D": (24,),
    "in_proj.weight": (48, 12),
    "conv1d.weight": (24, 1, 4),
    "conv1d.bias": (24,),
    "x_proj.weight": (7, 24),
    "dt_proj.weight": (24, 1),
    "dt_proj.bias": (24,),
    "out_proj.weight": (12, 24),
}


def module(**more) -> Mamba:
    return Mamba(12, d_state=3, layer_idx=0, dtype=torch.float64, **more)


def test_module_has_the_original_state_dict_and_marks():
    mamba = module()
    assert {name: tuple(t.shape) for name, t in mamba.state_dict().items()} == SHAPES
    assert set(module(bias=True, conv_bias=False).state_dict()) == (
        set(SHAPES) - {"conv1d.bias"} | {"in_proj.bias", "out_proj.bias"}
    )
    assert mamba.dt_proj.bias._no_reinit
    assert mamba.A_log._no_weight_decay
    assert mamba.D._no_weight_decay
    h = torch.randn(2, 5, 24, dtype=torch.float64).transpose(1, 2)
    assert mamba.act(mamba.conv1d(h)[..., :5]).shape == h.shape  # as callers use the convolution themselves


def test_module_equals_the_layer():
    mamba = module(use_fast_path=False)
    layer = layers.Mamba(12, d_state=3, dtype=torch.float64)
    layer.load_state_dict(mamba.state_dict())
    h = torch.randn(2, 7, 12, dtype=torch.float64)
    assert_close(mamba(h), layer(h), rtol=0, atol=0)


def test_words_of_the_initialisation():
    torch.manual_seed(0)
    plain = module(dt_rank=4)
    torch.manual_seed(0)
    scaled = module(dt_rank=4, dt_scale=0.5)
    assert_close(scaled.dt_proj.weight, plain.dt_proj.weight * 0.5)
    constant = module(dt_rank=4, dt_init="constant", dt_scale=3.0)
    assert_close(constant.dt_proj.weight, torch.full((24, 4), 1.5, dtype=torch.float64))
    constant.reset_parameters()
    assert_close(constant.dt_proj.weight, torch.full((24, 4), 1.5, dtype=torch.float64))
    step = functional.softplus(module(dt_min=0.2, dt_max=0.3).dt_proj.bias)
    assert bool(((step > 0.199) & (step < 0.301)).all())


@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_prefill_and_steps_through_inference_params_equal_one_pass(length):
    mamba = module()
    h = torch.randn(2, length + 5, 12, dtype=torch.float64)
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    with torch.no_grad():
        outs = [mamba(h[:, :length], inference_params=params)]
        conv_state, ssm_state = params.key_value_memory_dict[0]
        inputs = mamba.in_proj(h)[..., :24].transpose(1, 2)
        assert_close(conv_state, functional.pad(inputs, (4, 0))[..., length : length + 4])
        for t in range(length, length + 5):
            params.seqlen_offset = t
            outs.append(mamba(h[:, t : t + 1], inference_params=params))
            assert_close(conv_state, functional.pad(inputs, (4, 0))[..., t + 1 : t + 5])
        whole, end = layers.Mamba.forward(mamba, h, return_state=True)
    assert_close(torch.cat(outs, dim=1), whole)
    assert_close(ssm_state, end.scan)
    assert params.key_value_memory_dict[0][0] is conv_state


def test_a_second_prompt_starts_from_zero():
    mamba, h = module(), torch.randn(1, 6, 12, dtype=torch.float64)
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    first = mamba(h, inference_params=params)
    assert_close(mamba(h, inference_params=params), first)
    assert not params.key_value_memory_dict[0][1].requires_grad


def test_step_gives_back_the_states_it_was_given():
    mamba = module()
    conv_state, ssm_state = mamba.allocate_inference_cache(2, 100)
    assert conv_state.shape == (2, 24, 4)
    assert ssm_state.shape == (2, 24, 3)
    assert conv_state.dtype == ssm_state.dtype == torch.float64
    out, conv, ssm = mamba.step(torch.randn(2, 1, 12, dtype=torch.float64), conv_state, ssm_state)
    assert conv is conv_state
    assert ssm is ssm_state
    assert out.shape == (2, 1, 12)
    assert not out.requires_grad
    assert bool((ssm_state != 0).all())


def test_a_cache_in_half_precision():
    mamba = Mamba(12, d_state=3, layer_idx=0, dtype=torch.bfloat16)
    assert mamba.A_log.dtype == mamba.D.dtype == torch.float32
    states = mamba.allocate_inference_cache(2, 100)
    assert {s.dtype for s in states} == {torch.bfloat16}
    assert mamba.step(torch.randn(2, 1, 12, dtype=torch.bfloat16), *states)[0].dtype == torch.bfloat16
    assert {s.dtype for s in mamba.allocate_inference_cache(2, 100, dtype=torch.float32)} == {torch.float32}


# ---- Errors


def call_inner(**change):
    return mamba_inner_fn(**(inner_arguments(constant_b="B" in change) | change))


def call_step(**change):
    (state, x, dt, A, B, C), more = step_arguments(4, 2, 2)
    args = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C} | more | change
    return selective_state_update(**args)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: selective_scan_fn(
                *(leaf(1, 2, 4),) * 2, torch.zeros(2, 3, dtype=torch.complex64), *(leaf(1, 3, 4),) * 2
            ),
            NotImplementedError,
            "selective_scan_fn: A must be real, got torch.complex64",
        ),
        (
            lambda: selective_scan_ref(
                *(leaf(1, 2, 4),) * 2, torch.zeros(2, 3, dtype=torch.complex64), *(leaf(1, 3, 4),) * 2
            ),
            NotImplementedError,
            "selective_scan_ref: A must be real",
        ),
        (
            lambda: call_inner(A=torch.zeros(4, 3, dtype=torch.complex64)),
            NotImplementedError,
            "A must be real",
        ),
        (lambda: call_inner(checkpoint_lvl=2), ValueError, "checkpoint_lvl must be 0 or 1, got 2"),
        (
            lambda: call_inner(x_proj_weight=leaf(6, 4)),
            ValueError,
            r"x_proj_weight must have 8 rows \(2 \+ 3 \+ 3\), got shape \(6, 4\)",
        ),
        (
            lambda: call_inner(B=leaf(4, 3), b_rms_weight=leaf(3)),
            ValueError,
            r"B_proj_bias and b_rms_weight must be None when B is given, got a constant B of shape \(4, 3\)",
        ),
        (
            lambda: call_step(x=torch.randn(2, 8)),
            ValueError,
            r"x must have 3 dimensions with a state of shape \(2, 4, 2, 5\)",
        ),
        (lambda: call_step(dt_bias=torch.randn(8)), ValueError, "dt_bias must have 2 dimensions"),
        (
            lambda: call_step(z=torch.randn(2, 2, 4)),
            ValueError,
            r"z must have shape \(B, 4, 2\), got \(2, 2, 4\)",
        ),
        (lambda: call_step(D=torch.randn(2, 4)), ValueError, r"D must have heads and channels \(4, 2\)"),
        (
            lambda: call_step(B=torch.randn(2, 8, 5)),
            ValueError,
            "B must have a number of groups that divides the 4 heads, got 8",
        ),
        (
            lambda: call_step(state=torch.randn(2, 5)),
            ValueError,
            r"state must have 3 or 4 dimensions, got shape \(2, 5\)",
        ),
        (lambda: call_step(state_batch_indices=torch.tensor([0, 7])), IndexError, "state_batch_indices"),
        (lambda: Mamba(8, expand=1.5), ValueError, "expand must be a whole number, got 1.5"),
        (lambda: Mamba(8, dt_init="zero"), ValueError, "dt_init must be 'random' or 'constant', got 'zero'"),
        (
            lambda: Mamba(8)(
                torch.randn(1, 2, 8), SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
            ),
            ValueError,
            "layer_idx must be given when inference_params is",
        ),
        (
            lambda: Mamba(8, layer_idx=0)(
                torch.randn(1, 2, 8), SimpleNamespace(key_value_memory_dict={}, seqlen_offset=3)
            ),
            ValueError,
            r"hidden_states must have shape \(B, 1, 8\), got \(1, 2, 8\)",
        ),
    ],
)
def test_wrong_input_raises(call, error, text):
    with pytest.raises(error, match=text):
        call()
