"""slm_loss, made of linear_nll and select_tokens, against its reference; double backward of linear_nll at the end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributed
from torch.nn import functional

from fastlm import ops, reference
from tests.support import conformance, strategies
from tests.support.compile import assert_compiled_equals_eager
from tests.support.conformance import assert_gradients_match_reference, assert_matches_reference
from tests.support.layouts import Draw
from tests.support.samples import Call
from tests.support.samples.slm_loss import IGNORE, head

F64 = torch.float64
# Every keyword of slm_loss, alone and together.
LOSSES: dict[str, dict[str, Any]] = {
    "excess": {},
    "ref_loss": {"score": "ref_loss"},
    "loss": {"score": "loss"},
    "tensor": {"score": "tensor"},
    "all": {"keep_ratio": 1.0},
    "none": {"keep_ratio": 0.0},
    "rows": {"scope": "sequence", "rows": True},
    "sequences": {"scope": "sequence", "cu_seqlens": torch.tensor([0, 4, 4, 15, 24])},
    "valid": {"normalizer": "valid"},
    "number": {"normalizer": 7.5},
    "tensor_normalizer": {"normalizer": torch.tensor(9)},
    "softcap": {"softcap": 2.0},
    "z_loss": {"z_loss": 1e-2},
    "random_ties": {"score": "tensor", "tie_break": "random", "seed": 3},
    "everything": {"keep_ratio": 0.4, "softcap": 3.0, "z_loss": 1e-2, "bias": True, "ignore_index": 7},
}


def _call(name: str, dtype: torch.dtype = torch.float32) -> Call:
    draw, options = Draw(f"selective/{name}"), dict(LOSSES[name])
    hidden, weight, labels = head(draw, 24, dtype=dtype)
    labels[::4] = options.get("ignore_index", IGNORE)
    ref_nll: Tensor | None = draw.normal(24, shift=3.0)
    ref_nll[5] = math.nan
    if options.pop("bias", False):
        options["bias"] = draw.normal(len(weight), dtype=dtype)
    if options.get("score") in ("loss", "tensor"):
        ref_nll = None
    if options.get("score") == "tensor":
        options["score"] = draw.normal(24).round()
    if options.pop("rows", False):
        hidden, labels, ref_nll = hidden.view(3, 8, -1), labels.view(3, 8), ref_nll.view(3, 8)
    return Call((hidden, weight, labels, ref_nll), options)


# ---- reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", strategies.FLOATING, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_matches_reference(name, dtype):
    call = _call(name, dtype)
    assert_matches_reference(ops.slm_loss, reference.slm_loss, call)
    assert_gradients_match_reference(ops.slm_loss, reference.slm_loss, call)


@pytest.mark.parametrize("name", LOSSES)
def test_statistics_match_reference(name):
    call = _call(name, F64)
    stats, want = (
        fn(*call.args, **call.kwargs, return_stats=True)[1] for fn in (ops.slm_loss, reference.slm_loss)
    )
    assert stats._fields == want._fields
    for field, got, expected in zip(stats._fields, stats, want, strict=True):
        torch.testing.assert_close(got, expected, msg=lambda text, field=field: f"{field}: {text}")


@pytest.mark.parametrize("score", ["excess", "loss", "ref_loss"])
def test_keeping_every_token_is_the_usual_cross_entropy(score):
    hidden, weight, labels, ref_nll = (t.clone() for t in _call("excess", F64).args)
    ref_nll[5] = 1.0
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = ops.slm_loss(*leaves, labels, ref_nll, keep_ratio=1.0, score=score)
    usual = functional.cross_entropy(functional.linear(*leaves), labels)
    torch.testing.assert_close(loss, usual)
    for got, want in zip(*(torch.autograd.grad(t, leaves) for t in (loss, usual)), strict=True):
        torch.testing.assert_close(got, want)


def test_the_loss_is_the_mean_of_chosen_tokens_worked_out_by_hand():
    """Equations 3 to 5 on five tokens whose losses are known: log 2 for a word of two, log 4 for one of four."""
    weight = torch.eye(4)
    far = 1e4
    hidden = torch.tensor(
        [[0, 0, -far, -far], [0, 0, 0, 0], [0, 0, 0, 0], [0, -far, -far, -far], [0.0, 0, 0, -far]]
    )
    labels = torch.tensor([1, 2, 3, 0, 2])  # losses log 2, log 4, log 4, 0, log 3
    ref_nll = torch.tensor([0.0, 1.5, 0.2, 5.0, 0.1])  # excess 0.69, -0.11, 1.19, -5, 1.0
    loss, stats = ops.slm_loss(hidden, weight, labels, ref_nll, keep_ratio=0.4, return_stats=True)
    assert stats.mask.tolist() == [False, False, True, False, True]
    assert loss.item() == pytest.approx((math.log(4) + math.log(3)) / 2)
    assert stats.threshold.item() == pytest.approx(math.log(3) - 0.1)


# ---- properties -----------------------------------------------------------------------------------------


@given(draw=strategies.draws(), tokens=strategies.sizes(1, 60), keep_ratio=st.floats(0, 1))
def test_adding_a_constant_to_the_reference_changes_nothing(draw, tokens, keep_ratio):
    hidden, weight, labels = head(draw, tokens, dtype=F64)
    ref_nll = draw.normal(tokens, dtype=F64)
    losses = [
        ops.slm_loss(hidden, weight, labels, ref_nll + shift, keep_ratio=keep_ratio) for shift in (0.0, 3.0)
    ]
    assert losses[0] == losses[1]


@given(draw=strategies.draws(), tokens=strategies.sizes(1, 60), keep_ratio=st.floats(0, 1))
def test_the_gradient_is_that_of_a_cross_entropy_over_the_chosen_tokens(draw, tokens, keep_ratio):
    """Rows left out get exactly 0, and the weight's gradient has the bits of a call with the chosen rows only."""
    hidden, weight, labels = head(draw, tokens)
    ref_nll = draw.normal(tokens)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss, stats = ops.slm_loss(*leaves, labels, ref_nll, keep_ratio=keep_ratio, return_stats=True)
    dhidden, dweight = torch.autograd.grad(loss, leaves)
    mask = stats.mask
    assert (dhidden[~mask] == 0).all()
    some = [hidden[mask].detach().requires_grad_(), weight.detach().requires_grad_()]
    want = torch.autograd.grad(ops.linear_cross_entropy(*some, labels[mask]), some)
    torch.testing.assert_close(dhidden[mask], want[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dweight, want[1], rtol=1e-6, atol=1e-7)


@given(draw=strategies.draws(), lengths=strategies.lengths(), keep_ratio=st.floats(0, 1))
def test_scope_sequence_is_a_loop_over_sequences(draw, lengths, keep_ratio):
    tokens = sum(lengths)
    hidden, weight, labels = head(draw, tokens, dtype=F64)
    ref_nll = draw.normal(tokens, dtype=F64)
    options: dict[str, Any] = {"keep_ratio": keep_ratio, "normalizer": 1.0}
    whole = ops.slm_loss(
        hidden,
        weight,
        labels,
        ref_nll,
        scope="sequence",
        cu_seqlens=strategies.cu_seqlens(lengths),
        **options,
    )
    parts = zip(*(t.split(lengths) for t in (hidden, labels, ref_nll)), strict=True)
    loop = sum(ops.slm_loss(h, weight, y, r, **options) for h, y, r in parts)
    torch.testing.assert_close(whole, torch.as_tensor(loop, dtype=F64))


def test_a_selection_known_beforehand_spares_the_other_tokens():
    """With a score that needs no loss, hidden states that are not chosen are never read."""
    hidden, weight, labels = head(Draw("beforehand"))
    score = torch.arange(23.0)
    hidden[:10] = math.nan
    hidden.requires_grad_()
    loss, stats = ops.slm_loss(hidden, weight, labels, None, score=score, keep_ratio=0.5, return_stats=True)
    (dhidden,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite()
    assert torch.equal(stats.mask, score >= 11)
    assert (stats.nll[:11] == 0).all()
    assert (dhidden[:11] == 0).all()


def test_statistics():
    call = _call("excess")
    hidden, weight, labels, ref_nll = call.args
    loss, stats = ops.slm_loss(*call.args, return_stats=True)
    nll = ops.linear_nll(hidden, weight, labels)
    assert torch.equal(stats.nll, nll)
    eligible = (labels != IGNORE) & ref_nll.isfinite()
    assert stats.num_eligible == eligible.sum() == 17
    assert stats.num_nonfinite == 1
    assert stats.num_selected == stats.mask.sum() == 10
    assert stats.num_tied == 1
    assert stats.threshold == (nll - ref_nll)[stats.mask].min()
    torch.testing.assert_close(loss, nll[stats.mask].mean())
    assert not loss.requires_grad
    assert not stats.nll.requires_grad


def test_sequences_have_thresholds_of_their_own():
    call = _call("sequences")
    _, stats = ops.slm_loss(*call.args, **call.kwargs, return_stats=True)
    assert stats.threshold.shape == (4,)
    assert stats.threshold[1] == math.inf  # no token
    assert stats.num_selected == stats.mask.sum()


def test_a_model_that_is_its_own_reference_ties_everywhere():
    hidden, weight, labels = head(Draw("own"))
    ref_nll = ops.linear_nll(hidden, weight, labels)
    _, stats = ops.slm_loss(hidden, weight, labels, ref_nll, keep_ratio=0.5, return_stats=True)
    assert stats.num_tied == 23
    assert torch.equal(stats.mask, torch.arange(23) < 12)


# ---- bad rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_hidden_state_is_never_chosen_and_poisons_nothing(bad):
    hidden, weight, labels = head(Draw("poison"))
    hidden[3] = bad
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss, stats = ops.slm_loss(*leaves, labels, torch.zeros(23), keep_ratio=1.0, return_stats=True)
    grads = torch.autograd.grad(loss, leaves)
    assert loss.isfinite()
    assert all(t.isfinite().all() for t in grads)
    assert not stats.mask[3]
    assert stats.num_nonfinite == 1
    assert stats.num_selected == 22


@pytest.mark.parametrize(
    "change", [{"keep_ratio": 0.0}, {"ignored": True}, {"tokens": 0}, {"ref": math.nan}], ids=str
)
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_nothing_to_select_gives_zero_and_zero_gradients(change, scope):
    hidden, weight, labels = (t.clone() for t in head(Draw("nothing"), change.get("tokens", 6)))
    if change.get("ignored"):
        labels[:] = IGNORE
    ref_nll = torch.full(labels.shape, change.get("ref", 1.0))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = ops.slm_loss(*leaves, labels, ref_nll, scope=scope, keep_ratio=change.get("keep_ratio", 0.6))
    assert loss == 0
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert grad.shape == leaf.shape
        assert (grad == 0).all()


BAD_CALLS = [
    ({"scope": "micro"}, "scope must be 'batch', 'sequence' or 'global', got 'micro'"),
    ({"score": "entropy"}, "score must be 'excess', 'ref_loss', 'loss' or a tensor, got 'entropy'"),
    ({"normalizer": "mean"}, "normalizer must be 'selected', 'valid' or a number, got 'mean'"),
    ({"ref_nll": None}, "score 'excess' needs ref_nll, got None"),
    ({"ref_nll": None, "score": "ref_loss"}, "score 'ref_loss' needs ref_nll, got None"),
    ({"ref_nll": torch.zeros(4)}, "ref_nll must have shape (3,), got (4,)"),
    ({"ref_nll": torch.zeros(3, dtype=torch.int64)}, "ref_nll must have a floating dtype, got torch.int64"),
    ({"score": torch.zeros(1, 3)}, "score must have shape (3,), got (1, 3)"),
    ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens needs scope 'sequence', got scope 'batch'"),
]


@pytest.mark.parametrize(("change", "text"), BAD_CALLS, ids=[text for _, text in BAD_CALLS])
def test_errors(change, text):
    options = {"ref_nll": torch.zeros(3)} | change
    call = Call((torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)), options)
    conformance.assert_same_error(ops.slm_loss, call, ValueError, f"slm_loss: {text}")


@pytest.mark.host_values
def test_errors_in_labels():
    with pytest.raises(IndexError, match="labels must be in"):
        ops.slm_loss(torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 5, 1]), torch.zeros(3))


def test_errors_of_its_parts():
    args = torch.zeros(3, 4), torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"keep_ratio must be in \[0, 1\], got 60"):
        ops.slm_loss(*args, torch.tensor([0, 4, 1]), torch.zeros(3), keep_ratio=60)
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.slm_loss(args[0], torch.zeros(5, 3), torch.tensor([0, 4, 1]), torch.zeros(3))


# ---- compile --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["excess", "tensor", "rows", "everything"])
def test_compile(name):
    call = _call(name).requires_grad()
    assert_compiled_equals_eager(ops.slm_loss, *call.args, **call.kwargs)


# ---- several processes ----------------------------------------------------------------------------------

PARTS = (9, 0, 22, 4)  # tokens of each process
GLOBAL = {
    "excess": {},
    "ties": {"score": True},
    "random_ties": {"score": True, "tie_break": "random", "seed": 11},
    "all": {"keep_ratio": 1.0},
    "none": {"keep_ratio": 0.0},
    "valid": {"normalizer": "valid"},
    "float32": {"dtype": torch.float32},
}


def _everything(name: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    options = dict(GLOBAL[name])
    draw, tokens = Draw("processes"), sum(PARTS)
    dtype = options.pop("dtype", F64)
    hidden, weight, labels = head(draw, tokens, dtype=dtype)
    labels[::5] = IGNORE
    ref_nll, score = draw.normal(tokens, dtype=dtype), draw.normal(tokens, dtype=dtype).round()
    ref_nll[7] = math.nan
    return (hidden, labels, ref_nll, score, weight), options


def _process(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(PARTS)
    )
    results = {}
    for name in GLOBAL:
        (*whole, weight), options = _everything(name)
        hidden, labels, ref_nll, score = (t.split(PARTS)[rank].clone() for t in whole)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        if "score" in options:
            options["score"] = score
        loss, stats = ops.slm_loss(*leaves, labels, ref_nll, scope="global", return_stats=True, **options)
        same = reference.slm_loss(*leaves, labels, ref_nll, scope="global", **options)
        torch.testing.assert_close(loss, same)
        results[name] = loss.detach(), *torch.autograd.grad(loss, leaves), tuple(stats)
    torch.save(results, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch is built without distributed")
def test_scope_global_is_one_process_with_all_tokens(tmp_path):
    """The mean of losses and of weight gradients, as DistributedDataParallel takes it, is that of all tokens."""
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=len(PARTS))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(PARTS))]
    for name in GLOBAL:
        (hidden, labels, ref_nll, score, weight), options = _everything(name)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        if "score" in options:
            options["score"] = score
        loss, stats = ops.slm_loss(*leaves, labels, ref_nll, return_stats=True, **options)
        dhidden, dweight = torch.autograd.grad(loss, leaves)
        losses, dhiddens, dweights, found = zip(*(part[name] for part in parts), strict=True)
        torch.testing.assert_close(torch.stack(losses).mean(), loss.detach())
        torch.testing.assert_close(torch.stack(dweights).mean(0), dweight)
        torch.testing.assert_close(torch.cat(dhiddens) / len(PARTS), dhidden)
        assert torch.equal(torch.cat([f[0] for f in found]), stats.mask), name
        for i in (2, 3, 5, 6):  # numbers and threshold of all
            assert all(torch.equal(f[i], stats[i]) for f in found), (name, stats._fields[i])
        assert sum(f[4] for f in found) == stats.num_nonfinite


# ---- twice differentiable -------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradgradcheck_of_linear_nll(softcap):
    draw = Draw("gradgradcheck")
    hidden, weight, labels = head(draw, 4, 5, 3, F64)
    labels[1] = IGNORE
    inputs = [t.requires_grad_() for t in (hidden, weight, draw.normal(5, dtype=F64))]

    def fn(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return ops.linear_nll(
            hidden, weight, labels, bias, softcap=softcap, return_lse=True, return_entropy=True
        )

    assert torch.autograd.gradgradcheck(fn, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [None, "hidden", "weight"])
def test_first_gradients_are_those_of_the_kernel(dtype, frozen):
    """create_graph=True takes another way to the same numbers."""
    hidden, weight, labels = head(Draw("create_graph"), dtype=dtype)
    labels[::5] = IGNORE
    inputs = {"hidden": hidden, "weight": weight}
    leaves = [t.requires_grad_() for name, t in inputs.items() if name != frozen]
    loss = ops.slm_loss(hidden, weight, labels, torch.zeros(23))
    plain = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    for a, b in zip(plain, again, strict=True):
        assert b.requires_grad
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)


def test_a_penalty_on_the_gradient_trains():
    hidden, weight, labels = head(Draw("penalty"), dtype=F64)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    results = []
    for fn in (ops.slm_loss, reference.slm_loss):
        loss = fn(*leaves, labels, torch.zeros(23, dtype=F64))
        (dhidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
        results.append(torch.autograd.grad(loss + dhidden.square().sum(), leaves))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
