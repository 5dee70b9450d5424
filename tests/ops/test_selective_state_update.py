"""selective_state_update, one position at a time, against its reference and the whole scan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastlm
from fastlm import ops, reference
from tests.support import conformance, samples, strategies
from tests.support.conformance import assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.selective_scan import scan_inputs

UPDATE = samples.of("selective_state_update")


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", UPDATE, ids=str)
def test_update_matches_reference(sample, device):
    assert_matches_reference(
        ops.selective_state_update, reference.selective_state_update, sample.build(device)
    )


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "gaps", "no_unit_stride"])
def test_update_with_every_state_dtype(dtype, state_dtype, layout):
    draw = Draw("update")
    call = Call(
        (
            draw.normal(3, 70, 17, dtype=state_dtype, layout=layout),
            draw.normal(3, 70, dtype=dtype),
            draw.normal(3, 70, dtype=dtype),
            -draw.normal(70, 17).exp(),
            draw.normal(3, 17, dtype=dtype),
            draw.normal(3, 2, 17, dtype=dtype),
        ),
        {"z": draw.normal(3, 70, dtype=dtype), "dt_softplus": True, "D": draw.normal(70, dtype=dtype)},
    )
    assert_matches_reference(ops.selective_state_update, reference.selective_state_update, call)


# ---- properties -----------------------------------------------------------------------------------------


@given(draw=strategies.draws(), batch=st.integers(1, 3), dtype=strategies.dtypes(float64=False))
def test_decoding_equals_the_whole_sequence(draw, batch, dtype):
    inputs = scan_inputs(draw, batch, 37, 9, 16, dtype=dtype)
    whole, last, every = ops.selective_scan(**inputs, return_last_state=True, return_all_states=True)
    state = torch.zeros_like(last)
    for t in range(whole.shape[2]):
        step = {name: inputs[name][..., t] for name in ("u", "delta", "B", "C", "z")}
        out = ops.selective_state_update(
            state,
            step["u"],
            step["delta"],
            inputs["A"],
            step["B"],
            step["C"],
            inputs["D"],
            step["z"],
            inputs["delta_bias"],
            True,
        )
        torch.testing.assert_close(out, whole[..., t])
        torch.testing.assert_close(state, every[:, t], rtol=1e-5, atol=1e-6)
    assert torch.equal(last, every[:, -1])


def test_slots_of_other_rows_stay_as_they_were():
    state = torch.randn(5, 6, 4)
    before = state.clone()
    x, matrix = torch.randn(2, 6), torch.randn(2, 4)
    slots = torch.tensor([3, -1])
    out = ops.selective_state_update(
        state, x, x, -torch.rand(6, 4), matrix, matrix, state_batch_indices=slots
    )
    assert torch.equal(state[[0, 1, 2, 4]], before[[0, 1, 2, 4]])
    assert not torch.equal(state[3], before[3])
    assert not out[1].any()


# ---- layouts --------------------------------------------------------------------------------------------


def _mamba_call(
    dtype: torch.dtype, state_dtype: torch.dtype, batch: int, dim: int, *, spread: bool, bare: bool
) -> Call:
    """One call of Mamba's sizes, B and C cut from a wider matrix; `spread`: the same values, no stride 1 anywhere."""
    draw = Draw("layouts-update")
    groups = 2 if dim % 2 == 0 else 1
    cut = draw.normal(batch, 8 + 2 * groups * 16, dtype=dtype)
    B, C = (part.view(batch, groups, 16) for part in cut[:, 8:].split(groups * 16, 1))
    args = [
        draw.normal(batch + 2, dim, 16, dtype=state_dtype),
        draw.normal(batch, dim, dtype=dtype),
        draw.normal(batch, dim, dtype=dtype).abs(),
        -draw.normal(dim, 16).exp(),
        B,
        C,
    ]
    more = {
        "D": draw.normal(dim, dtype=dtype),
        "z": draw.normal(batch, dim, dtype=dtype),
        "dt_bias": draw.normal(dim),
    }
    slots = torch.arange(batch).flip(0) + 1
    if batch > 1:
        slots[0] = -1

    def place(t: Tensor) -> Tensor:
        if not spread:
            return t
        to = torch.zeros([2 * size for size in t.shape], dtype=t.dtype)[(slice(None, None, 2),) * t.dim()]
        return to.copy_(t)

    kwargs = {} if bare else {name: place(t) for name, t in more.items()} | {"dt_softplus": True}
    return Call(tuple(place(t) for t in args), kwargs | {"state_batch_indices": slots})


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(("batch", "dim", "bare"), [(1, 32, False), (5, 33, True), (9, 70, False)])
def test_update_of_mamba_sizes_in_any_layout(dtype, state_dtype, batch, dim, bare):
    call, spread = (
        _mamba_call(dtype, state_dtype, batch, dim, spread=spread, bare=bare) for spread in (False, True)
    )
    assert_matches_reference(ops.selective_state_update, reference.selective_state_update, call)
    # The call above may have worked on a copy of the state: again, to compare bits.
    results = []
    for made in (_mamba_call(dtype, state_dtype, batch, dim, spread=False, bare=bare), spread):
        out = ops.selective_state_update(*made.args, **made.kwargs)
        results.append((out, made.args[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_bits_of_a_row_do_not_depend_on_the_batch():
    call = _mamba_call(torch.bfloat16, torch.float32, 7, 70, spread=False, bare=False)
    state, x, dt, A, B, C = call.args
    call.kwargs.pop("state_batch_indices")
    z = call.kwargs.pop("z")
    whole_state = state[:7].clone()
    whole = ops.selective_state_update(whole_state, x, dt, A, B, C, z=z, **call.kwargs)
    for i in range(7):
        row = slice(i, i + 1)
        alone = state[row].clone()
        out = ops.selective_state_update(alone, x[row], dt[row], A, B[row], C[row], z=z[row], **call.kwargs)
        assert torch.equal(out, whole[row])
        assert torch.equal(alone, whole_state[row])


@pytest.mark.parametrize("spread", [False, True])
def test_slots_that_do_not_exist_are_padding_on_the_device(spread):
    if not fastlm.build_info()["cuda"]["emulated"]:
        pytest.skip("the CPU operator refuses these values")
    results = []
    for missing in ([-1, -1, -1, -1], [9, 2**31 + 1, 2**40 + 1, -(2**63)]):
        call = _mamba_call(torch.bfloat16, torch.float32, 7, 70, spread=spread, bare=False)
        call.kwargs["state_batch_indices"] = torch.tensor([3, missing[0], 0, *missing[1:], 8])
        results.append((ops.selective_state_update(*call.args, **call.kwargs), call.args[0]))
    (out, state), (got_out, got_state) = results
    assert torch.equal(got_out, out)
    assert torch.equal(got_state, state)
    assert not got_out[[1, 3, 4, 5]].any()


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", UPDATE, ids=str)
def test_opcheck_of_update(sample):
    conformance.assert_opcheck(sample, with_grad=False)


def test_compile_update():
    (sample,) = samples.of("selective_state_update", "slots_padding")
    conformance.assert_compiles(sample, ops.selective_state_update, with_grad=False)


# ---- errors ---------------------------------------------------------------------------------------------


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _good_update() -> dict[str, Tensor]:
    names = ("state", "x", "dt", "A", "B", "C")
    return dict(zip(names, (_x(2, 6, 4), _x(2, 6), _x(2, 6), _x(6, 4), _x(2, 4), _x(2, 4)), strict=True))


UPDATE_BAD_CALLS = [
    ("x_dim", {"x": _x(2, 6, 1)}, "x must have shape (B, D), got (2, 6, 1)"),
    ("state_batch", {"state": _x(3, 6, 4)}, "state must have shape (2, 6, 4), got (3, 6, 4)"),
    (
        "state_slots",
        {"state": _x(5, 6, 3), "state_batch_indices": torch.tensor([0, 1])},
        "state must have shape (5, 6, 4), got (5, 6, 3)",
    ),
    (
        "state_float64",
        {"state": _x(2, 6, 4, dtype=torch.float64)},
        "state must have dtype float32, bfloat16 or float16, got float64",
    ),
    ("dt", {"dt": _x(2, 5)}, "dt must have shape (2, 6), got (2, 5)"),
    ("A", {"A": _x(6, 4, dtype=torch.complex64)}, "A must have dtype float32, bfloat16, float16 or float64"),
    ("B_dim", {"B": _x(2, 1, 1, 4)}, "B must have shape (B, N) or (B, G, N), got (2, 1, 1, 4)"),
    ("B_shape", {"B": _x(2, 5)}, "B must have shape (2, 4), got (2, 5)"),
    ("C_groups", {"C": _x(2, 4, 4)}, "C must have a number of groups that divides 6, got 4"),
    ("z", {"z": _x(1, 6)}, "z must have shape (2, 6), got (1, 6)"),
    (
        "indices_shape",
        {"state_batch_indices": torch.tensor([1])},
        "state_batch_indices must have shape (2,), got (1,)",
    ),
    (
        "indices_dtype",
        {"state_batch_indices": _x(2)},
        "state_batch_indices must have dtype int32 or int64, got float32",
    ),
]


@pytest.mark.parametrize(
    ("changes", "text"), [c[1:] for c in UPDATE_BAD_CALLS], ids=[c[0] for c in UPDATE_BAD_CALLS]
)
def test_errors_of_update(changes, text):
    for function in (ops.selective_state_update, torch.ops.fastlm.selective_state_update):
        call = Call((), _good_update() | changes)
        conformance.assert_same_error(function, call, ValueError, f"selective_state_update: {text}")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_of_a_state_that_repeats_memory(device):
    call = Call((), {name: t.to(device) for name, t in _good_update().items()})
    call.kwargs["state"] = torch.zeros(1, 6, 4, device=device).expand(2, 6, 4)
    text = "selective_state_update: state must not repeat memory, got stride 0 in dimension 0"
    conformance.assert_same_error(ops.selective_state_update, call, ValueError, text, on_meta=False)


@pytest.mark.host_values
@pytest.mark.parametrize(
    ("slots", "error", "text"),
    [
        ([0, 2], IndexError, "state_batch_indices must be below 2, got 2 at index 1"),
        ([1, 1], ValueError, "state_batch_indices must name each slot at most once, got 1 again at index 1"),
    ],
)
def test_errors_in_slots(slots, error, text):
    call = Call((), _good_update() | {"state_batch_indices": torch.tensor(slots)})
    conformance.assert_same_error(ops.selective_state_update, call, error, text, on_meta=False)


# ---- twins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", UPDATE, ids=str)
def test_every_level_of_update(sample):
    conformance.assert_levels_match_reference(
        sample, ops.selective_state_update, reference.selective_state_update, with_grad=False
    )


def test_same_bits_for_any_number_of_threads_in_update():
    def make_call() -> Call:
        draw = Draw("threads-update")
        args = (
            draw.normal(4, 700, 16),
            draw.normal(4, 700),
            draw.normal(4, 700),
            -draw.normal(700, 16).exp(),
        )
        return Call((*args, draw.normal(4, 16), draw.normal(4, 16)), {})

    conformance.assert_same_for_any_thread_count(ops.selective_state_update, make_call, with_grad=False)
