"""grin_route against its reference: picks, weights, counts, noise. Gradients in `test_grin_route_backward.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm import ops, reference
from fastlm.reference.grin_route import grin_noise, philox
from tests.support import conformance, samples, strategies
from tests.support.compile import assert_compiled_equals_eager
from tests.support.conformance import assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.grin_route import crowded, uniform

ROUTE = samples.of("grin_route")
BACKWARD = samples.of("grin_route_backward")
ESTIMATORS = ("v2", "v2_star", "v1")


def weights_of(function: Any) -> Any:
    """The floating outputs of a router: weights and probabilities."""
    return lambda *args, **kwargs: function(*args, **kwargs, return_probs=True)[::3]


def choice_of(function: Any, call: Call) -> list[Tensor]:
    """The integer outputs: ids and counts."""
    return list(function(*call.args, **call.kwargs)[1:])


def assert_same(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ROUTE, ids=str)
def test_matches_reference(sample, device):
    assert_matches_reference(
        weights_of(ops.grin_route), weights_of(reference.grin_route), sample.build(device)
    )
    call = sample.build(device)
    assert_same(choice_of(ops.grin_route, call), choice_of(reference.grin_route, call))


# Random123's known answers: seed, counter, words.
PHILOX = [
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("seed", "counter", "words"), PHILOX)
def test_philox(seed, counter, words):
    found = philox([torch.tensor([word]) for word in counter], seed)
    assert [int(word) for word in found] == list(words)


@pytest.mark.parametrize("level", fastlm._C.supported_cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("experts", "top_k"), [(2, 2), (16, 2), (31, 4), (256, 8)])
def test_a_seed_is_the_noise_made_of_it(experts, top_k, dtype, level):
    """The kernel computes only the draws it needs; the rest would have changed nothing."""
    for seed in (0, -1, 2**63 - 1, 1234567890123):
        draw = Draw(f"seed-{seed}")
        for logits in (crowded(draw, 99, experts, dtype), draw.normal(99, experts, dtype=dtype)):
            route = partial(ops.grin_route, logits, top_k=top_k, training=True, return_probs=True)
            with conformance.cpu_level(level):
                lazy = route(seed=torch.tensor([seed]))
                full = route(noise=grin_noise(seed, 99, top_k, experts))
            assert_same(lazy, full)


def test_noise_at_its_ends_is_finite():
    """0 and 1 count as the numbers next to them; NaN counts as 0."""
    logits = crowded(Draw("ends"), 64, 16)
    noise = Draw("ends").integers(0, 3, (64, 2, 17)).float() / 2
    noise[noise == 0.5] = torch.nan
    results = ops.grin_route(logits, training=True, jitter_eps=1.0, noise=noise)
    expected = reference.grin_route(logits, training=True, jitter_eps=1.0, noise=noise)
    assert_same(results[1:], expected[1:])
    assert results[0].isfinite().all()


def test_ties_go_to_the_first():
    """Among equal logits, and among equal sums of logit and noise."""
    equal = {"training": True, "top_k": 3, "noise": torch.full((1, 3, 5), 0.5), "jitter_eps": 1.0}
    assert ops.grin_route(torch.zeros(1, 4), top_k=3)[1].tolist() == [[0, 1, 2]]
    assert ops.grin_route(torch.zeros(1, 4), **equal)[1].tolist() == [[0, 1, 2]]
    assert ops.grin_route(torch.tensor([[1.0, 2.0, 1.0, 2.0]]), **equal)[1].tolist() == [[1, 3, 0]]
    equal["noise"][..., 0] = 0.25
    assert ops.grin_route(torch.zeros(1, 4), **equal)[1].tolist() == [[1, 2, 3]]


NOT_NUMBERS = [
    ("nan", [1.0, torch.nan, 3.0, torch.nan]),
    ("inf", [1.0, torch.inf, 3.0, torch.inf]),
    ("one_inf", [1.0, 2.0, torch.inf, 0.5]),
    ("minus_inf", [-torch.inf, 1.0, -torch.inf, 1.01]),
    ("one_finite", [-torch.inf, -torch.inf, 1.0, -torch.inf]),
    ("all_minus_inf", [-torch.inf] * 4),
    ("all_nan", [torch.nan] * 4),
    ("everything", [torch.nan, torch.inf, -torch.inf, 1.0]),
    ("zeros", [0.0, -0.0, 0.0, -0.0]),
    ("extremes", [3.4e38, -3.4e38, 3.39e38, 1e-40]),
]


@pytest.mark.parametrize("level", fastlm._C.supported_cpu_capabilities())
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("row", [row for _, row in NOT_NUMBERS], ids=[name for name, _ in NOT_NUMBERS])
def test_rows_that_are_not_numbers(row, training, level):
    """Ids stay distinct experts, weights are those of the definition, and other tokens see nothing of it."""
    draw = Draw("not numbers")
    logits = crowded(draw, 40, 4)
    kwargs = {"training": training, "noise": uniform(draw, 40, 4, 5), "top_k": 4, "return_probs": True}
    with conformance.cpu_level(level):
        clean = ops.grin_route(logits, **kwargs)
        logits[7] = torch.tensor(row)
        logits[39] = torch.tensor(row)
        found = ops.grin_route(logits, **kwargs)
    expected = reference.grin_route(logits, **kwargs)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0].isnan(), expected[0].isnan())
    assert torch.equal(found[1].sort(-1).values, torch.arange(4, dtype=torch.int32).expand(40, 4))
    others = [t for t in range(40) if t not in (7, 39)]
    assert_same([found[i][others] for i in (0, 1, 3)], [clean[i][others] for i in (0, 1, 3)])


def test_what_is_minus_infinity_is_picked_last():
    logits = Draw("masked").normal(500, 6)
    logits[:, 3:] = -torch.inf
    for training in (False, True):
        weights, ids, counts = ops.grin_route(logits, top_k=3, jitter_eps=0.3, training=training)
        assert weights.isfinite().all()
        assert (ids < 3).all()
        assert counts.tolist() == [500, 500, 500, 0, 0, 0]


# ---- properties -----------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Any sizes, dtype, estimator and spread of the logits; noise given."""
    source = draw(strategies.draws())
    tokens, experts = draw(strategies.sizes(0, 70)), draw(strategies.sizes(2, 70))
    top_k = draw(st.integers(1, min(8, experts)))
    make = draw(st.sampled_from([partial(crowded, source), source.normal]))
    logits = make(tokens, experts, dtype=draw(strategies.dtypes()))
    kwargs = {
        "top_k": top_k,
        "jitter_eps": draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 2.0])),
        "training": draw(st.booleans()),
        "estimator": draw(st.sampled_from(ESTIMATORS)),
        "noise": uniform(source, tokens, top_k, experts + 1),
        "valid": source.integers(0, 4, (tokens,)) > 0,
    }
    return Call((logits,), kwargs)


@given(call=calls())
def test_outputs_are_a_routing(call):
    """Ids are distinct experts, counts count them, weights are m p with p in (0, 1]."""
    weights, ids, counts, probs = ops.grin_route(*call.args, **call.kwargs, return_probs=True)
    valid, experts = call.kwargs["valid"], call.args[0].shape[1]
    chosen = ids[valid].long()
    assert ((chosen >= 0) & (chosen < experts)).all()
    assert (chosen.sort(-1).values.diff(dim=-1) > 0).all()
    assert torch.equal(counts.long(), torch.bincount(chosen.flatten(), minlength=experts))
    assert ((probs[valid] > 0) & (probs[valid] <= 1)).all()
    factor = {"v1": 1 / 2}.get(call.kwargs["estimator"], 1 / 3)
    whole, reduced = weights == probs, weights == probs * factor
    assert (whole | (reduced & call.kwargs["training"]))[valid].all()
    for t in (weights, probs):
        assert (t[~valid] == 0).all()
    assert (ids[~valid] == -1).all()


@given(call=calls(), cut=st.floats(0, 1))
def test_tokens_do_not_see_each_other(call, cut):
    """Any cut of the tokens gives the same bits."""
    tokens = call.args[0].shape[0]
    at = int(cut * tokens)

    def part(rows: slice) -> tuple[Tensor, ...]:
        return ops.grin_route(
            *(a[rows] for a in call.args),
            **{name: a[rows] if isinstance(a, Tensor) else a for name, a in call.kwargs.items()},
        )

    whole, first, second = part(slice(None)), part(slice(at)), part(slice(at, None))
    for i in (0, 1):
        assert torch.equal(whole[i], torch.cat([first[i], second[i]]))
    assert torch.equal(whole[2], first[2] + second[2])


@given(call=calls(), exponent=st.integers(-8, 8))
def test_the_mask_knows_no_scale(call, exponent):
    """In eval, a power of two changes neither ids nor where a weight is 1."""
    call.kwargs["training"] = False
    logits = call.args[0].double()
    one = ops.grin_route(logits, **call.kwargs)
    other = ops.grin_route(logits * 2.0**exponent, **call.kwargs)
    assert_same(one[1:], other[1:])
    if call.kwargs["top_k"] < logits.shape[1]:
        assert torch.equal(one[0] == 1, other[0] == 1)


@given(draw=strategies.draws(), experts=strategies.sizes(2, 40))
def test_permuted_experts_are_picked_under_their_new_names(draw, experts):
    logits, order = draw.normal(50, experts, dtype=torch.float64), draw.permutation(experts)
    ids = ops.grin_route(logits)[1]
    permuted = ops.grin_route(logits[:, order])[1]
    assert torch.equal(order[permuted.long()], ids.long())


@given(draw=strategies.draws(), experts=strategies.sizes(2, 40), training=st.booleans())
def test_the_ends_of_the_threshold(draw, experts, training):
    """0 keeps exact maxima: weights are 1. A huge one keeps all: the first p is the plain softmax."""
    logits = draw.normal(50, experts, dtype=torch.float64)
    assert (ops.grin_route(logits, jitter_eps=0.0, training=training)[0] == 1).all()
    _, ids, _, probs = ops.grin_route(logits, jitter_eps=1e30, training=training, return_probs=True)
    softmax = logits.softmax(-1).gather(-1, ids[:, :1].long())
    torch.testing.assert_close(probs[:, :1], softmax)


@given(draw=strategies.draws(), layout=strategies.layouts(), dtype=strategies.dtypes())
def test_memory_layout_changes_no_bit(draw, layout, dtype):
    logits = crowded(draw, 21, 12, dtype, layout=layout)
    noise = uniform(draw, 21, 2, 13, layout=layout)
    valid = (draw.integers(0, 4, (42,)) > 0)[::2]
    found, copied = (
        ops.grin_route(logits, training=True, noise=noise, valid=valid)
        for logits, noise, valid in ((logits, noise, valid), [t.contiguous() for t in (logits, noise, valid)])
    )
    assert_same(found, copied)


# ---- contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("sample", ROUTE, ids=str)
def test_opcheck(sample, with_grad):
    conformance.assert_opcheck(sample, with_grad=with_grad)


@pytest.mark.parametrize("sample", BACKWARD, ids=str)
def test_opcheck_of_backward(sample):
    conformance.assert_opcheck(sample, with_grad=False)


@pytest.mark.parametrize("name", ["eval", "padding", "seed", "v2_star"])
def test_compile(name):
    (sample,) = [s for s in ROUTE if s.name == name]
    conformance.assert_compiles(sample, ops.grin_route, with_grad=True, return_probs=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_draws_the_seed_in_the_graph(backend):
    logits = crowded(Draw("compiled"), 64, 16)

    def step(z: Tensor) -> tuple[Tensor, ...]:
        return ops.grin_route(z, training=True, jitter_eps=0.1)

    if backend == "aot_eager":
        torch.manual_seed(3)
        expected = step(logits)
        torch.manual_seed(3)
        assert_same(torch.compile(step, fullgraph=True, backend=backend)(logits), expected)
        return
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    assert not torch.equal(compiled(logits)[1], compiled(logits)[1])


def test_compile_of_a_step_with_the_balance_loss():
    def step(z: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        weights, _, counts = ops.grin_route(z, training=True, seed=seed)
        return weights, ops.load_balance_loss(z, counts, alpha=0.1)

    logits = crowded(Draw("step"), 40, 8).requires_grad_()
    assert_compiled_equals_eager(step, logits, torch.tensor([5]))


def test_the_seed_comes_from_the_generator():
    logits = crowded(Draw("generator"), 200, 16)
    route = partial(ops.grin_route, logits, training=True)
    one, other = (route(generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    assert_same(one, route(generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(one[1], other[1])
    torch.manual_seed(11)
    first, second = route(), route()
    torch.manual_seed(11)
    assert_same(first, route())
    assert not torch.equal(first[1], second[1])
    torch.manual_seed(11)
    assert_same(first[1:], reference.grin_route(logits, training=True)[1:])


def test_eval_draws_nothing():
    before = torch.get_rng_state()
    ops.grin_route(torch.randn(0, 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpointing_replays_the_routing():
    """A recomputed layer must route as the first time, or its gradients belong to other experts."""
    draw = Draw("checkpoint")
    experts = draw.normal(16, 8)

    def layer(logits: Tensor) -> Tensor:
        weights, ids, _ = ops.grin_route(logits, training=True, jitter_eps=0.1)
        return (weights.unsqueeze(-1) * experts[ids.long()]).sum(1).square()

    gradients = []
    for recompute in (False, True):
        logits = crowded(Draw("logits"), 300, 16).requires_grad_()
        torch.manual_seed(5)
        out = checkpoint(layer, logits, use_reentrant=False) if recompute else layer(logits)
        gradients.append(torch.autograd.grad(out.sum(), logits)[0])
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


# ---- errors ---------------------------------------------------------------------------------------------

_Z = torch.zeros(5, 4)
_NOISE, _SEED = torch.full((5, 2, 5), 0.5), torch.zeros(1, dtype=torch.int64)
BAD_CALLS = [
    ("dim", torch.zeros(4), {}, "router_logits must have shape (T, E), got (4,)"),
    (
        "dtype",
        _Z.int(),
        {},
        "router_logits must have dtype float32, bfloat16, float16 or float64, got int32",
    ),
    ("one_expert", _Z[:, :1], {}, "router_logits must have shape (T, E) with at least 2 experts, got (5, 1)"),
    (
        "tokens",
        torch.zeros(1, 2).expand(2**31, 2),
        {},
        "router_logits must have less than 2147483648 tokens, got 2147483648",
    ),
    ("no_pick", _Z, {"top_k": 0}, "top_k must be from 1 to 4, got 0"),
    ("too_many_picks", _Z, {"top_k": 5}, "top_k must be from 1 to 4, got 5"),
    ("nine_picks", torch.zeros(3, 20), {"top_k": 9}, "top_k must be from 1 to 8, got 9"),
    ("jitter", _Z, {"jitter_eps": -0.25}, "jitter_eps must not be negative, got -0.25"),
    ("jitter_nan", _Z, {"jitter_eps": float("nan")}, "jitter_eps must not be negative, got nan"),
    ("estimator", _Z, {"estimator": "v3"}, "estimator must be 'v2', 'v2_star' or 'v1', got 'v3'"),
    ("noise_shape", _Z, {"noise": _NOISE[:, :1]}, "noise must have shape (5, 2, 5), got (5, 1, 5)"),
    ("noise_dtype", _Z, {"noise": _NOISE.double()}, "noise must have dtype float32, got float64"),
    (
        "noise_half",
        _Z.double(),
        {"noise": _NOISE.half()},
        "noise must have dtype float32 or float64, got float16",
    ),
    ("seed_shape", _Z, {"seed": _SEED[0]}, "seed must have shape (1,), got ()"),
    ("seed_dtype", _Z, {"seed": _SEED.int()}, "seed must have dtype int64, got int32"),
    ("valid_shape", _Z, {"valid": torch.ones(4, dtype=torch.bool)}, "valid must have shape (5,), got (4,)"),
    ("valid_dtype", _Z, {"valid": torch.ones(5)}, "valid must have dtype bool, got float32"),
    (
        "both",
        _Z,
        {"training": True, "noise": _NOISE, "seed": _SEED},
        "training needs exactly one of noise and seed, got both",
    ),
]


@pytest.mark.parametrize(
    ("logits", "kwargs", "text"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS]
)
def test_errors(logits, kwargs, text):
    for function in (ops.grin_route, torch.ops.fastlm.grin_route):
        conformance.assert_same_error(function, Call((logits,), kwargs), ValueError, f"grin_route: {text}")


def test_errors_without_a_source_of_chance():
    call = Call((_Z,), {"training": True})
    text = "grin_route: training needs exactly one of noise and seed, got neither"
    conformance.assert_same_error(torch.ops.fastlm.grin_route, call, ValueError, text)


# ---- twins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ROUTE, ids=str)
def test_every_level(sample):
    """The same experts, bit for bit: nothing that decides them is rounded differently."""
    functions = weights_of(ops.grin_route), weights_of(reference.grin_route)
    conformance.assert_levels_match_reference(sample, *functions, with_grad=True)
    call = sample.build()
    here = choice_of(ops.grin_route, call)
    for level in conformance.other_levels():
        with conformance.cpu_level(level):
            assert_same(choice_of(ops.grin_route, call), here)


def test_close_calls_are_decided_alike_on_every_level():
    """Two experts whose sums of logit and noise differ by a rounding: any other arithmetic would flip some."""
    noise = uniform(Draw("close"), 4000, 1, 3)
    gumbel = -torch.log(-torch.log(noise[:, 0, :2]))
    logits = torch.stack([torch.zeros(4000), gumbel[:, 0] - gumbel[:, 1]], -1)
    route = partial(ops.grin_route, logits, top_k=1, training=True, jitter_eps=1e30, noise=noise)
    here = route()[1]
    assert 0 < int(here.sum()) < 4000
    for level in conformance.other_levels():
        with conformance.cpu_level(level):
            assert torch.equal(route()[1], here), level


@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    def make_call() -> Call:
        logits = crowded(Draw("threads"), 3001, 24, dtype)
        return Call((logits,), {"training": True, "seed": torch.tensor([7]), "return_probs": True})

    conformance.assert_same_for_any_thread_count(ops.grin_route, make_call, with_grad=True)
