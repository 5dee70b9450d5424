"""Prefill along diagonals of (layer, chunk): the bits of one chunk after the other, whatever the blocks and the chunks."""

from __future__ import annotations

import pytest
import torch

from fastlm import ops
from fastlm.models import SambaConfig, SambaForCausalLM
from fastlm.models.samba.wavefront import prefill_wavefront

PATTERNS = {
    "samba": ("mamba", "sliding_attention"),
    "attention_first": ("sliding_attention", "mamba", "mamba", "sliding_attention"),
    "both_in_a_block": ("mamba+sliding_attention", "sliding_attention", "mamba"),
    "no_attention": ("mamba",),
}


def model_of(kind: str) -> SambaForCausalLM:
    torch.manual_seed(0)
    config = SambaConfig.from_preset(
        "tiny", num_hidden_layers=4, layer_pattern=PATTERNS[kind], sliding_window=8
    )
    return SambaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", list(PATTERNS))
@pytest.mark.parametrize("chunk", [1, 3, 8, 19, 38, 64])  # 38 leaves a last chunk of one token
def test_states_and_hidden_states_are_those_of_single_chunks(kind, chunk):
    model = model_of(kind)
    pieces = torch.split(torch.randint(96, (2, 39)), chunk, dim=1)
    one, other = model.new_cache(2), model.new_cache(2)
    with torch.inference_mode():
        expected = [model.model(piece, one) for piece in pieces]
        got = list(prefill_wavefront(model.model, ((piece, None) for piece in pieces), other))
    assert len(got) == len(expected)
    # A pass of one token takes another operator through a pair of blocks, `samba_decode_step`.
    exact = chunk != 1 and 39 % chunk != 1
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, **tolerance)
    assert one.lengths == other.lengths
    assert torch.equal(one.positions, other.positions)
    for mine, theirs in zip(other.layers, one.layers, strict=True):
        for g, e in zip(mine.tensors(), theirs.tensors(), strict=True):
            torch.testing.assert_close(g, e, **tolerance)


@pytest.mark.parametrize("chunk", [1, 4, 16, 100])
@pytest.mark.parametrize("lengths", [[37], [30, 30], [5, 40, 17]])
def test_generate_gives_the_same_tokens(chunk, lengths):
    model = model_of("samba")
    prompts = [torch.randint(96, (n,)).tolist() for n in lengths]
    expected = model.generate(prompts, max_new_tokens=12)
    assert model.generate(prompts, max_new_tokens=12, prefill_chunk_size=chunk, wavefront=True) == expected


def test_it_continues_a_cache():
    model = model_of("samba")
    ids = torch.randint(96, (1, 70))
    cache = model.new_cache(1)
    model.generate(ids[:, :33], max_new_tokens=0, cache=cache)
    with torch.inference_mode():
        model.model(ids[:, :33], cache)
    expected = model.generate(ids, max_new_tokens=10)[:, 70:]
    got = model.generate(ids[:, 33:], max_new_tokens=10, cache=cache, prefill_chunk_size=9, wavefront=True)
    assert torch.equal(got[:, 37:], expected)


def test_scan_and_attention_meet_in_one_call(monkeypatch):
    calls = []
    fused = ops.scan_swa

    def counted(*args, **options):
        calls.append(args)
        return fused(*args, **options)

    monkeypatch.setattr(ops, "scan_swa", counted)
    model = model_of("samba")
    model.generate(torch.randint(96, (1, 50)), max_new_tokens=1, prefill_chunk_size=10, wavefront=True)
    # 5 chunks: the attention of the first 4 beside the scan of the last 4, in each of 2 pairs
    assert len(calls) == 8
