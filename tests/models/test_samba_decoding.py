"""Pairs of blocks decoded by one operator: the same as the layers, and left to them where it does not apply."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastlm import ops
from fastlm.layers import Mamba
from fastlm.models import SambaConfig, SambaForCausalLM
from fastlm.models.samba import decoding
from tests.support.tolerance import assert_close_to_reference


def make(dtype: torch.dtype = torch.float32, **options) -> SambaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = SambaConfig(**sizes, intermediate_size=80, vocab_size=64, sliding_window=8, **options)
    return SambaForCausalLM(config).to(dtype).eval()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Grows by one with every pair that the operator took."""
    found: list[int] = []

    def counted(*args, **kwargs):
        found.append(1)
        return step(*args, **kwargs)

    step = ops.samba_decode_step
    monkeypatch.setattr(decoding.ops, "samba_decode_step", counted)
    return found


def decode(
    model: SambaForCausalLM, rows: int = 2, steps: int = 12
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Hidden states of single-token steps past a wrap of the ring, and the states after them."""
    ids = torch.randint(64, (rows, 5 + steps), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(rows)
    model.model(ids[:, :5], cache)
    outs = [model.model(ids[:, t : t + 1], cache) for t in range(5, 5 + steps)]
    return torch.cat(outs, dim=1), [t for layer in cache.layers for t in layer.tensors()]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_equals_the_layers(dtype, calls, monkeypatch):
    model = make(dtype)
    out, states = decode(model)
    assert len(calls) == 2 * 12
    monkeypatch.setattr("fastlm.models.samba.modeling.step_pair", lambda *_: None)
    by_layers, states_by_layers = decode(model)
    exact, exact_states = decode(_in_float64(model))
    assert_close_to_reference("hidden states", out, exact, by_layers)
    for i, (got, want, baseline) in enumerate(zip(states, exact_states, states_by_layers, strict=True)):
        assert_close_to_reference(f"state {i}", got, want, baseline)


def _in_float64(model: SambaForCausalLM) -> SambaForCausalLM:
    exact = make(torch.float64)
    exact.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    return exact


def _hook(model: SambaForCausalLM) -> None:
    model.model.layers[0].mlp.w1.register_forward_hook(lambda *_: None)
    model.model.layers[3].attn.q_proj.register_forward_pre_hook(lambda *_: None)


class Wrapped(nn.Linear):
    """A projection with something beside it, as adapters have it."""


def _adapter(model: SambaForCausalLM) -> None:
    for i, part in ((1, "attn"), (2, "mamba")):
        mixer = getattr(model.model.layers[i], part)
        name = "o_proj" if part == "attn" else "out_proj"
        old = getattr(mixer, name)
        wrapped = Wrapped(old.in_features, old.out_features, bias=False)
        wrapped.load_state_dict(old.state_dict())
        setattr(mixer, name, wrapped)


@torch.no_grad()
@pytest.mark.parametrize("change", [_hook, _adapter], ids=["hook", "adapter"])
def test_a_changed_layer_is_run_as_it_is(change: Callable[[SambaForCausalLM], None], calls):
    model = make()
    change(model)
    out, _ = decode(model)
    assert not calls
    untouched, _ = decode(make())
    torch.testing.assert_close(out, untouched)


def test_gradients_autocast_and_many_rows_take_the_layers(calls):
    model = make()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        decode(model)
    with torch.no_grad():
        decode(model, rows=5)
    decode(model)
    assert not calls


@torch.no_grad()
def test_norms_before_the_scan_take_the_layers(calls):
    model = make()
    for i in (0, 2):
        old = model.model.layers[i].mamba
        like = {"d_conv": old.d_conv, "dt_rank": old.dt_rank, "dtype": old.in_proj.weight.dtype}
        model.model.layers[i].mamba = Mamba(old.d_model, old.d_state, bcdt_rms_norm="plain", **like)
    decode(model)
    assert not calls


@torch.no_grad()
def test_other_arrangements_take_the_layers(calls):
    decode(make(layer_pattern=("mamba", "mamba", "sliding_attention", "sliding_attention")))
    assert len(calls) == 12  # the pair in the middle
