"""Generation: greedy against the plain twin, ragged prompts, sampling, streaming, continuation."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fastlm.demo.plain_samba import PlainSamba
from fastlm.models.samba import SambaConfig, SambaForCausalLM, Sampling


@pytest.fixture(scope="module")
def model() -> SambaForCausalLM:
    torch.manual_seed(0)
    model = SambaForCausalLM(SambaConfig.from_preset("tiny"), dtype=torch.float64).eval()
    with torch.no_grad():  # initial weights say little: larger ones make greedy choices clear and varied
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter is not model.model.layers[0].mamba.A_log:
                parameter.mul_(2.0)
    return model


@pytest.fixture(scope="module")
def plain(model) -> PlainSamba:
    twin = PlainSamba(model.config).double()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(96, (3, 21), generator=torch.Generator().manual_seed(1))


def test_greedy_equals_recomputation_over_more_than_two_windows(model, plain, ids):
    expected = plain.generate(ids, max_new_tokens=24)
    assert torch.equal(model.generate(ids, max_new_tokens=24), expected)
    assert len(set(expected[0, 21:].tolist())) > 4


@pytest.mark.parametrize("chunk", [1, 4, 20, 21, 1000])
def test_prefill_in_chunks_changes_nothing(model, ids, chunk):
    expected = model.generate(ids, max_new_tokens=6)
    assert torch.equal(model.generate(ids, max_new_tokens=6, prefill_chunk_size=chunk), expected)


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
def test_prompts_of_different_lengths_equal_separate_runs(model, ids, chunk):
    prompts = [ids[0, :5].tolist(), ids[1].tolist(), ids[2, :1].tolist()]
    together = model.generate(prompts, max_new_tokens=20, prefill_chunk_size=chunk)
    for prompt, got in zip(prompts, together, strict=True):
        assert got == model.generate(torch.tensor([prompt]), max_new_tokens=20)[0].tolist()


@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_leak(model, ids, left):
    lengths = [5, 21, 9]
    mask = torch.stack([torch.arange(21) < n for n in lengths]).long()
    padded = ids.clone()
    if left:
        mask = mask.flip(1)
        padded = torch.stack([ids[i].roll(21 - n) for i, n in enumerate(lengths)])
    padded = torch.where(mask.bool(), padded, 95)
    out = model.generate(padded, attention_mask=mask, max_new_tokens=10)
    assert torch.equal(out[:, :21], padded)
    for row, n in enumerate(lengths):
        assert torch.equal(out[row, 21:], model.generate(ids[row : row + 1, :n], max_new_tokens=10)[0, n:])


def test_one_prompt_without_batch_dimension(model, ids):
    assert torch.equal(model.generate(ids[0], max_new_tokens=3), model.generate(ids[:1], max_new_tokens=3))


def test_continuation_with_a_cache_equals_one_run(model, ids):
    whole = model.generate(ids, max_new_tokens=20)
    cache = model.new_cache(3)
    first = model.generate(ids, max_new_tokens=8, cache=cache)
    assert cache.lengths == (28,) * 3  # all but the last new token
    second = model.generate(first[:, -1:], max_new_tokens=12, cache=cache)
    assert torch.equal(torch.cat((first, second[:, 1:]), dim=1), whole)


def test_a_cache_of_rows_at_different_positions_is_continued(model, ids):
    cache = model.new_cache(2)
    model.generate([ids[0, :4].tolist(), ids[1, :17].tolist()], max_new_tokens=1, cache=cache)
    more = [[7, 8, 9], [3]]
    got = model.generate(more, max_new_tokens=5, cache=cache)
    for row, n in enumerate([4, 17]):
        alone = model.generate([ids[row, :n].tolist() + more[row]], max_new_tokens=5)[0]
        assert got[row] == alone[n:]


def test_sampling_is_fixed_by_the_seed(model, ids):
    options = {"max_new_tokens": 15, "temperature": 1.0, "top_p": 0.95, "top_k": 50}
    first = model.generate(ids, seed=3, **options)
    torch.rand(5)  # the global generator plays no part
    assert torch.equal(model.generate(ids, seed=3, **options), first)
    assert torch.equal(model.generate(ids, generator=torch.Generator().manual_seed(3), **options), first)
    assert not torch.equal(model.generate(ids, seed=4, **options), first)


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1e-4), Sampling()]
)
def test_narrow_sampling_is_greedy(sampling):
    torch.manual_seed(0)
    logits = torch.randn(50, 30)
    assert torch.equal(sampling.draw(logits), logits.argmax(-1))


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(1.0), 6),
        (Sampling(0.5), 6),
        (Sampling(2.0, top_k=3), 3),
        (Sampling(1.0, top_k=100), 6),
        (Sampling(1.0, top_p=0.8), 3),  # 0.4, 0.3, 0.15 reach 0.8; 0.4 and 0.3 do not
        (Sampling(1.0, top_p=0.7), 2),
        (Sampling(1.0, top_k=2, top_p=0.99), 2),
    ],
)
def test_samples_follow_the_filtered_distribution(sampling, allowed):
    probs = torch.tensor([0.05, 0.4, 0.15, 0.02, 0.3, 0.08], dtype=torch.float64)
    n = 40_000
    drawn = (
        sampling.draw(probs.log().expand(n, 6), torch.Generator().manual_seed(0)).bincount(minlength=6) / n
    )
    expected = (probs.log() / sampling.temperature).softmax(-1)
    expected[expected.argsort(descending=True)[allowed:]] = 0.0
    expected /= expected.sum()
    assert (drawn[expected == 0] == 0).all()
    sigma = (expected * (1 - expected) / n).sqrt()
    assert ((drawn - expected).abs() <= 4.5 * sigma + 1e-12).all()


def test_rows_stop_at_their_end_token(model, ids):
    free = model.generate(ids, max_new_tokens=20)
    end = free[0, 21 + 3].item()
    stops = [row[21:].tolist().index(end) if end in row[21:].tolist() else 20 for row in free]
    out = model.generate(ids, max_new_tokens=20, eos_token_id=end, pad_token_id=95)
    for row, stop in enumerate(stops):
        assert torch.equal(out[row, : 21 + stop + 1], free[row, : 21 + stop + 1][: out.shape[1]])
        assert (out[row, 21 + stop + 1 :] == 95).all()
    lists = model.generate([row.tolist() for row in ids], max_new_tokens=20, eos_token_id=[end])
    assert [len(row) - 21 for row in lists] == [min(stop + 1, 20) for stop in stops]


def test_generation_ends_when_all_rows_have_ended(model, ids):
    free = model.generate(ids[:1], max_new_tokens=20)
    end = free[0, 25].item()
    first = 21 + free[0, 21:].tolist().index(end)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=20, eos_token_id=end), free[:, : first + 1])


def test_stream_and_streamer_see_every_step(model, ids):
    expected = model.generate(ids, max_new_tokens=7)[:, 21:]
    steps = model.generate(ids, max_new_tokens=7, stream=True)
    first = next(steps)
    assert torch.is_grad_enabled()  # the iterator's inference mode does not leak into the caller
    assert not torch.is_inference_mode_enabled()
    assert torch.equal(torch.stack([first, *steps], dim=1), expected)
    seen = []
    model.generate(ids, max_new_tokens=7, streamer=seen.append)
    assert torch.equal(torch.stack(seen, dim=1), expected)


def test_no_new_tokens(model, ids):
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)


def test_generation_under_autocast_and_in_bfloat16(model, ids):
    small = SambaForCausalLM(model.config)
    small.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert small.generate(ids, max_new_tokens=12).shape == (3, 33)
    half = SambaForCausalLM(model.config, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    assert half.generate(ids, max_new_tokens=12, temperature=1.0, seed=0).shape == (3, 33)


def test_untied_and_attention_free_models_generate(ids):
    for changes in ({"tie_word_embeddings": False}, {"layer_pattern": ("mamba",)}, {"use_rope": False}):
        torch.manual_seed(0)
        model = SambaForCausalLM(SambaConfig.from_preset("tiny", **changes), dtype=torch.float64)
        twin = PlainSamba(model.config).double()
        twin.load_state_dict(model.state_dict())
        assert_close(model.generate(ids, max_new_tokens=10), twin.generate(ids, max_new_tokens=10))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature must be at least 0, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be at least 0, got nan"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\], got 1.5"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be at least 0"),
        ({"prefill_chunk_size": 0}, ValueError, "prefill_chunk_size at least 1"),
        (
            {"attention_mask": torch.ones(3, 4)},
            ValueError,
            r"attention_mask must have shape \(3, 21\), got \(3, 4\)",
        ),
        ({"attention_mask": torch.zeros(3, 21)}, ValueError, "at least 1 token each, got an empty prompt"),
        ({"input_ids": []}, ValueError, "at least 1 row"),
        ({"input_ids": [[1], []]}, ValueError, "got an empty prompt"),
        ({"input_ids": [[1], [96]]}, IndexError, r"input_ids must be in \[0, 96\), got 96"),
        ({"input_ids": torch.tensor([[-1]])}, IndexError, r"input_ids must be in \[0, 96\), got -1"),
        (
            {"input_ids": torch.zeros(1, 1, 1)},
            ValueError,
            r"input_ids must have shape \(B, L\), got \(1, 1, 1\)",
        ),
    ],
)
def test_options_out_of_range(model, ids, options, error, message):
    with pytest.raises(error, match=message):
        model.generate(**{"input_ids": ids, **options})
