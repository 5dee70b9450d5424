"""The definition of selective_scan against analytic solutions and itself in pieces, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fastlm.reference import selective_scan, selective_state_update
from tests.support import samples
from tests.support.layouts import Draw

F64 = torch.float64
BATCH, DIM, STATE, LENGTH = 2, 6, 3, 11


@pytest.fixture
def draw() -> Draw:
    return Draw("reference-scan")


@pytest.fixture
def inputs(draw) -> dict[str, torch.Tensor]:
    """u, delta, A, B, C of a stable recurrence."""
    return {
        "u": draw.normal(BATCH, DIM, LENGTH, dtype=F64),
        "delta": draw.normal(BATCH, DIM, LENGTH, dtype=F64).abs(),
        "A": -draw.normal(DIM, STATE, dtype=F64).exp(),
        "B": draw.normal(BATCH, STATE, LENGTH, dtype=F64),
        "C": draw.normal(BATCH, STATE, LENGTH, dtype=F64),
    }


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def cut(inputs, part):
    return {name: t if name == "A" else t[..., part] for name, t in inputs.items()}


def test_constant_coefficients_give_a_geometric_sum():
    step, decay = 0.3, -0.7
    ones = torch.ones(1, 1, 9, dtype=F64)
    out = selective_scan(2 * ones, step * ones, torch.full((1, 1), decay, dtype=F64), 5 * ones, 3 * ones)
    a, b = torch.tensor(step * decay, dtype=F64).exp(), step * 5 * 2
    t = torch.arange(9, dtype=F64)
    close(out[0, 0], 3 * b * (1 - a ** (t + 1)) / (1 - a))


def test_no_decay_gives_a_prefix_sum(inputs):
    inputs["A"] = torch.zeros_like(inputs["A"])
    terms = (inputs["delta"] * inputs["u"]).unsqueeze(2) * inputs["B"].unsqueeze(1)  # (B, D, N, L)
    close(selective_scan(**inputs), (terms.cumsum(-1) * inputs["C"].unsqueeze(1)).sum(2))


def test_full_decay_forgets_at_once(inputs):
    inputs["A"] = torch.full_like(inputs["A"], -1e9)
    inputs["delta"] += 0.1
    terms = (inputs["delta"] * inputs["u"]).unsqueeze(2) * inputs["B"].unsqueeze(1)
    close(selective_scan(**inputs), (terms * inputs["C"].unsqueeze(1)).sum(2))


def test_equals_the_closed_form(inputs, draw):
    """h[t] = sum over s of exp(A * (dt summed over (s, t])) * dt[s] B[s] u[s]."""
    start = draw.normal(BATCH, DIM, STATE, dtype=F64)
    dt = inputs["delta"].cumsum(-1)
    gap = dt.unsqueeze(-1) - dt.unsqueeze(-2)  # (B, D, t, s)
    past = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    decay = torch.where(past[..., None], (gap[..., None] * inputs["A"][:, None, None]).exp(), 0)
    source = (inputs["delta"] * inputs["u"]).unsqueeze(-1) * inputs["B"].transpose(1, 2).unsqueeze(1)
    h = torch.einsum("bdtsn,bdsn->bdtn", decay, source)
    h = h + (dt.unsqueeze(-1) * inputs["A"][:, None]).exp() * start.unsqueeze(2)
    out, last, every = selective_scan(
        **inputs, initial_state=start, return_last_state=True, return_all_states=True
    )
    close(out, torch.einsum("bdtn,bnt->bdt", h, inputs["C"]))
    close(last, h[:, :, -1])
    close(every, h.transpose(1, 2))


def test_linear_in_u(inputs, draw):
    other = draw.normal(BATCH, DIM, LENGTH, dtype=F64)
    D = draw.normal(DIM, dtype=F64)
    mixed = selective_scan(**inputs | {"u": 2 * inputs["u"] - 3 * other}, D=D)
    close(mixed, 2 * selective_scan(**inputs, D=D) - 3 * selective_scan(**inputs | {"u": other}, D=D))


def test_skip_comes_before_the_gate(inputs, draw):
    D, z = draw.normal(DIM, dtype=F64), draw.normal(BATCH, DIM, LENGTH, dtype=F64)
    plain = selective_scan(**inputs)
    close(selective_scan(**inputs, D=D, z=z), (plain + D[:, None] * inputs["u"]) * functional.silu(z))


def test_bias_and_softplus_act_on_the_step(inputs, draw):
    bias = draw.normal(DIM, dtype=F64)
    delta = inputs["delta"] + bias[:, None]
    delta[..., 0] += 40  # past the threshold, where softplus is the identity
    shifted = inputs | {"delta": delta - bias[:, None]}
    step = torch.where(delta > 20, delta, delta.exp().log1p())
    close(
        selective_scan(**shifted, delta_bias=bias, delta_softplus=True),
        selective_scan(**inputs | {"delta": step}),
    )
    close(selective_scan(**shifted, delta_bias=bias), selective_scan(**inputs | {"delta": delta}))


def test_forms_of_input_and_output_maps_agree(inputs, draw):
    grouped = {name: draw.normal(BATCH, 2, STATE, LENGTH, dtype=F64) for name in ("B", "C")}
    whole = selective_scan(**inputs | grouped)
    for g, channels in enumerate((slice(0, 3), slice(3, 6))):
        part = {
            "u": inputs["u"][:, channels],
            "delta": inputs["delta"][:, channels],
            "A": inputs["A"][channels],
            "B": grouped["B"][:, g],
            "C": grouped["C"][:, g],
        }
        close(whole[:, channels], selective_scan(**part))
    constant = {name: draw.normal(DIM, STATE, dtype=F64) for name in ("B", "C")}
    per_channel = {name: t[None, :, :, None].expand(BATCH, -1, -1, LENGTH) for name, t in constant.items()}
    close(selective_scan(**inputs | constant), selective_scan(**inputs | per_channel))


@pytest.mark.parametrize("at", [0, 1, 5, LENGTH - 1, LENGTH])
def test_two_pieces_with_carried_state_equal_one(inputs, draw, at):
    start = draw.normal(BATCH, DIM, STATE, dtype=F64)
    whole, end = selective_scan(**inputs, initial_state=start, return_last_state=True)
    first, state = selective_scan(**cut(inputs, slice(0, at)), initial_state=start, return_last_state=True)
    second, last = selective_scan(**cut(inputs, slice(at, None)), initial_state=state, return_last_state=True)
    close(torch.cat([first, second], dim=-1), whole)
    close(last, end)


def test_packed_equals_separate(draw):
    bounds = [0, 0, 1, 5, LENGTH]
    one = {
        "u": draw.normal(1, DIM, LENGTH, dtype=F64),
        "delta": draw.normal(1, DIM, LENGTH, dtype=F64).abs(),
        "A": -draw.normal(DIM, STATE, dtype=F64).exp(),
        "B": draw.normal(1, 2, STATE, LENGTH, dtype=F64),
        "C": draw.normal(1, STATE, LENGTH, dtype=F64),
    }
    start = draw.normal(4, DIM, STATE, dtype=F64)
    options = {"return_last_state": True, "return_all_states": True}
    out, ends, every = selective_scan(**one, initial_state=start, cu_seqlens=torch.tensor(bounds), **options)
    assert torch.equal(ends[0], start[0])
    for s in range(4):
        part = slice(bounds[s], bounds[s + 1])
        alone, end, states = selective_scan(**cut(one, part), initial_state=start[s : s + 1], **options)
        close(out[..., part], alone)
        close(ends[s : s + 1], end)
        close(every[:, part], states)


@pytest.mark.parametrize("groups", [None, 2])
def test_decoding_equals_the_whole_sequence(inputs, draw, groups):
    if groups:
        inputs |= {name: draw.normal(BATCH, groups, STATE, LENGTH, dtype=F64) for name in ("B", "C")}
    D, bias = draw.normal(DIM, dtype=F64), draw.normal(DIM, dtype=F64)
    z = draw.normal(BATCH, DIM, LENGTH, dtype=F64)
    whole, last = selective_scan(
        **inputs, D=D, z=z, delta_bias=bias, delta_softplus=True, return_last_state=True
    )
    state = torch.zeros(BATCH, DIM, STATE, dtype=F64)
    for t in range(LENGTH):
        now = {name: inputs[name][..., t] for name in ("B", "C")}
        out = selective_state_update(
            state, inputs["u"][..., t], inputs["delta"][..., t], inputs["A"], **now,
            D=D, z=z[..., t], dt_bias=bias, dt_softplus=True,
        )  # fmt: skip
        close(out, whole[..., t])
    close(state, last)


def test_padding_rows_touch_nothing(draw):
    state = draw.normal(4, DIM, STATE, dtype=F64)
    before = state.clone()
    x, dt = draw.normal(3, DIM, dtype=F64), draw.normal(3, DIM, dtype=F64).abs()
    A = -draw.normal(DIM, STATE, dtype=F64).exp()
    B, C = draw.normal(3, STATE, dtype=F64), draw.normal(3, STATE, dtype=F64)
    out = selective_state_update(state, x, dt, A, B, C, state_batch_indices=torch.tensor([3, -5, 1]))
    assert not out[1].any()
    assert torch.equal(state[[0, 2]], before[[0, 2]])
    alone, rows = before[[3, 1]], [0, 2]
    close(out[rows], selective_state_update(alone, x[rows], dt[rows], A, B[rows], C[rows]))
    assert torch.equal(state[[3, 1]], alone)


def test_output_uses_the_state_before_rounding(draw):
    one = torch.ones(1, 1)
    state = torch.full((1, 1, 1), 256.0, dtype=torch.bfloat16)
    out = selective_state_update(state, one, one, torch.zeros(1, 1), one, one)
    assert out.item() == 257
    assert state.item() == 256  # 257 is not a bfloat16


def test_no_length_hands_the_state_on(inputs, draw):
    start = draw.normal(BATCH, DIM, STATE, dtype=F64)
    out, last = selective_scan(**cut(inputs, slice(0, 0)), initial_state=start, return_last_state=True)
    assert out.shape == (BATCH, DIM, 0)
    assert torch.equal(last, start)


@pytest.mark.parametrize("name", ["everything", "bare", "groups", "constant_B", "packed_initial"])
def test_gradcheck(name):
    call = samples.of("selective_scan", name)[0].build().to(F64).requires_grad()
    inputs = call.floating()

    def function(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        args = [named.get(f"arg{i}", a) for i, a in enumerate(call.args)]
        kwargs = {key: named.get(key, a) for key, a in call.kwargs.items()}
        return selective_scan(*args, **kwargs, return_last_state=True)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)


def test_dtypes(inputs):
    low = {name: t if name == "A" else t.bfloat16() for name, t in inputs.items()}
    out, last, every = selective_scan(
        **low | {"A": inputs["A"].float()}, return_last_state=True, return_all_states=True
    )
    assert out.dtype == torch.bfloat16
    assert last.dtype == every.dtype == torch.float32
    assert not every.requires_grad
    with pytest.raises(ValueError, match="batch 1"):
        selective_scan(**inputs, cu_seqlens=torch.tensor([0, LENGTH]))
