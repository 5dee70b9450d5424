"""`attn_implementation="fastlm"`: models of transformers give what eager attention gives, or say why not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.testing import assert_close

transformers = pytest.importorskip("transformers", minversion="5.24", reason="needs the extra fastlm[hf]")

from transformers import masking_utils  # noqa: E402

from fastlm.compat.transformers import attention as part  # noqa: E402
from fastlm.compat.transformers import disable, enable  # noqa: E402
from fastlm.compat.transformers._names import find, find_function  # noqa: E402
from fastlm.compat.transformers.attention_mask import find_sequences, seen  # noqa: E402
from tests.compat.transformers_models import (  # noqa: E402
    ATTENTION,
    WINDOW,
    assert_all_close,
    generated,
    in_double,
    left_padding,
    make_model,
    one_thread,
    random_ids,
    results_of,
)
from tests.support.tolerance import assert_close_to_reference  # noqa: E402

every_model = pytest.mark.parametrize("name", ATTENTION)


@pytest.fixture(autouse=True)
def _enabled():
    enable("attention")
    with one_thread():
        yield
    disable()


def on_fastlm(model):
    model.set_attn_implementation("fastlm")
    return model


def alone(ids, real):
    """The logits of each row without its padding, as a function of the model."""
    return lambda model: [
        model(ids[i : i + 1, real[i]], use_cache=False).logits[0] for i in range(ids.shape[0])
    ]


# ---- Training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_model
def test_logits_loss_and_gradients(name, dtype):
    model, ids = make_model(name, dtype).train(), random_ids(2, 19)
    exact, plain = results_of(in_double(model), ids), results_of(model, ids)
    assert_all_close(results_of(on_fastlm(model), ids), exact, plain, dtype)


@every_model
def test_padded_training(name):
    """Padding on both sides is as if each row were alone. The loss leaves padding out, as a collator does."""
    model, ids = make_model(name).train(), random_ids(3, 19)
    mask = left_padding(ids, 9, 2, 0)
    mask[2, 13:] = 0
    real = mask.bool()

    def results(model, logits_of):
        model.zero_grad()
        rows = logits_of(model)
        pairs = [(row[:-1].double(), ids[i, real[i]][1:]) for i, row in enumerate(rows)]
        logits, labels = (torch.cat(t) for t in zip(*pairs, strict=True))
        torch.nn.functional.cross_entropy(logits, labels).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {"logits": torch.cat(rows).detach()} | gradients

    def together(model):
        logits = model(ids, attention_mask=mask, use_cache=False).logits
        return [logits[i, real[i]] for i in range(3)]

    exact, plain = results(in_double(model), alone(ids, real)), results(model, alone(ids, real))
    assert_all_close(results(on_fastlm(model), together), exact, plain, torch.float32)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_packed_rows(name):
    """Positions that start again begin a new sequence, as a flattening collator packs them."""
    model = on_fastlm(make_model(name))
    first, second, third = random_ids(1, 9), random_ids(1, 1, seed=2), random_ids(1, 12, seed=3)
    packed = torch.cat([first, second, third], dim=1)
    alone = torch.cat([model(ids).logits for ids in (first, second, third)], dim=1)
    bounds = torch.tensor([0, 9, 10, 22], dtype=torch.int32)
    positions = (torch.arange(22) - bounds[:-1].repeat_interleave(bounds.diff()))[None]
    arguments = {"position_ids": positions, "use_cache": False}
    assert_close(model(packed, **arguments).logits, alone)
    flash = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 12, "max_length_k": 12}
    assert_close(model(packed, **arguments, **flash).logits, alone)


def test_bounds_of_packed_rows_alone():
    """A layer that is told the bounds, but has no mask."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    bounds = torch.tensor([0, 3, 10], dtype=torch.int32)
    module = torch.nn.Module()
    out, _ = part.attend(module, q, k, v, None, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
    flat = [t.transpose(1, 2).reshape(10, -1, 8) for t in (q, k, v)]
    for begin, end in ((0, 3), (3, 10)):
        piece = [t[begin:end].transpose(0, 1)[None] for t in flat]
        assert_close(out.flatten(0, 1)[begin:end], part.attend(module, *piece, None)[0][0])


def test_gradient_checkpointing_gives_the_same_bits():
    model, ids = on_fastlm(make_model("mistral").train()), random_ids(2, 19)
    mask = left_padding(ids, 3, 0)
    expected = {k: v.clone() for k, v in results_of(model, ids, attention_mask=mask).items()}
    model.activation_checkpointing_enable()
    for name, value in results_of(model, ids, attention_mask=mask).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("padded", [False, True])
def test_compiled(padded):
    """Not in one graph: what a mask says has to be looked at."""
    model, ids = on_fastlm(make_model("mistral")), random_ids(2, 19)
    mask = left_padding(ids, 3, 0) if padded else None
    expected = {k: v.clone() for k, v in results_of(model, ids, attention_mask=mask).items()}
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager")
    for name, value in results_of(model, ids, attention_mask=mask).items():
        assert_close(value, expected[name])


# ---- Generation and caches


@every_model
def test_generated_tokens(name):
    """The window is passed, with a cache that drops what is out of it and with one that keeps everything."""
    model, ids = make_model(name), random_ids(2, 4)
    expected = generated(model, ids)
    on_fastlm(model)
    assert torch.equal(generated(model, ids), expected)
    assert torch.equal(generated(model, ids, use_cache=False), expected)
    assert torch.equal(generated(model, ids, cache=transformers.DynamicCache()), expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_beam_search_and_assisted_decoding(name):
    model, ids = make_model(name), random_ids(1, 7)
    assistant = make_model(name, num_hidden_layers=2)
    expected = generated(model, ids, num_beams=3), generated(model, ids)
    on_fastlm(model), on_fastlm(assistant)
    assert torch.equal(generated(model, ids, num_beams=3), expected[0])
    assert torch.equal(generated(model, ids, assistant_model=assistant), expected[1])
    assert torch.equal(generated(model, ids, prompt_lookup_num_tokens=3), expected[1])


@every_model
def test_left_padded_generation_equals_single_rows(name):
    model, ids = on_fastlm(make_model(name)), random_ids(3, 9)
    mask = left_padding(ids, 7, 2, 0)
    batch = generated(model, ids, attention_mask=mask)
    for i in range(3):
        alone = generated(model, ids[i : i + 1, mask[i].bool()])
        assert torch.equal(batch[i, mask[i].argmax() :], alone[0]), f"row {i}"


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@every_model
def test_pieces_equal_the_whole(name, padded):
    model, ids = make_model(name), random_ids(3, 19)
    mask = left_padding(ids, 8, 2, 0) if padded else torch.ones_like(ids)
    real = mask.bool()
    exact, plain = (torch.cat(alone(ids, real)(m)) for m in (in_double(model), model))
    on_fastlm(model)
    cache, logits = None, []
    for begin, end in ((0, 3), (3, 10), (10, 11), (11, 19)):
        output = model(ids[:, begin:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        cache = output.cache
        logits.append(output.logits)
    assert_close_to_reference("logits", torch.cat(logits, dim=1)[real], exact.double(), plain)


@torch.no_grad()
def test_a_window_reaches_exactly_so_far():
    """A change of the key that just left the window is not seen; one position later it is."""
    model = on_fastlm(make_model("mistral", num_hidden_layers=1))
    ids = random_ids(1, 12)
    changed = ids.clone()
    changed[0, 11 - WINDOW] = 3 + (ids[0, 11 - WINDOW] - 2) % 50
    same = model(ids).logits[0] == model(changed).logits[0]
    assert same[11].all()
    assert not same[10].all()


# ---- Masks


def test_sequences_of_a_padded_batch():
    runs = torch.tensor([[0, 0, 1, 1, 2], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    found = find_sequences(runs, 3)
    assert found.k_index.tolist() == [2, 3, 4, 5, 6, 7]
    assert found.q_index.tolist() == [0, 1, 2, 3]
    assert found.cu_seqlens_k.tolist() == [0, 2, 3, 6]
    assert found.cu_seqlens_q.tolist() == [0, 2, 3, 4]
    assert found.rows is None
    assert find_sequences(runs[:1] > 0, 1).rows == ((2, 5),)
    assert find_sequences(runs[:2], 1).rows is None


def test_rows_without_a_token_give_zeros():
    model, ids = on_fastlm(make_model("mistral")), random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1] = 0
    logits = model(ids, attention_mask=mask).logits
    assert_close(logits[0], model(ids[:1]).logits[0])
    assert logits[1].isfinite().all()


@every_model
def test_layers_get_the_window_of_their_type(name, monkeypatch):
    windows = []
    real = part.ops.sliding_window_attention
    monkeypatch.setattr(
        part.ops,
        "sliding_window_attention",
        lambda *a, **k: (windows.append(k["window_size"][0]), real(*a, **k))[1],
    )
    model = on_fastlm(make_model(name))
    model(random_ids(1, 9))
    sliding = {"llama": [], "mistral": [0, 1], "phi3": [0, 1]}.get(name, [0])
    assert windows == [WINDOW - 1 if layer in sliding else -1 for layer in range(2)]


# ---- Errors


def test_dropout_is_refused():
    model = on_fastlm(make_model("llama", attention_dropout=0.1))
    model.eval()(random_ids(1, 5))
    with pytest.raises(ValueError, match=r"dropout must be 0, got 0\.1\. Set attention_dropout = 0"):
        model.train()(random_ids(1, 5))


def test_masks_of_the_users_own_are_refused():
    model, ids = on_fastlm(make_model("llama")), random_ids(1, 5)
    with pytest.raises(
        ValueError, match=r"got \(1, 1, 5, 5\)\. Use model\.set_attn_implementation\('sdpa'\)"
    ):
        model(ids, attention_mask=torch.zeros(1, 1, 5, 5))
    cache = model(ids[:, :3], use_cache=True).cache
    with pytest.raises(ValueError, match=r"must cover all 5 positions so far, got shape \(1, 4\)"):
        model(ids[:, 3:], attention_mask=torch.ones(1, 4), cache=cache)


def test_bidirectional_and_chunked_masks_are_refused():
    ids = random_ids(1, 9)
    with pytest.raises(ValueError, match="must be causal"):
        on_fastlm(make_model("gemma3", use_bidirectional_attention=True))(ids)
    with pytest.raises(ValueError, match="bidirectional_mask_function"):
        on_fastlm(make_model("llama", is_causal=False))(ids)
    with pytest.raises(ValueError, match="chunked_overlay"):
        seen(1, 9, 9, mask_function=masking_utils.chunked_causal_mask_function(3, torch.zeros(1)))
    own = masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: q == k)
    with pytest.raises(ValueError, match="lambda"):
        seen(1, 9, 9, mask_function=own)
    with pytest.raises(ValueError, match="sliding_window must be at least 1, got 0"):
        seen(1, 9, 9, mask_function=masking_utils.sliding_window_causal_mask_function(0))


def test_image_blocks_are_refused():
    blocks = torch.tensor([[-1, 0, 0, -1]])
    mask = masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.blockwise_overlay(blocks))
    with pytest.raises(ValueError, match=r"must be causal.*or_mask.*set_attn_implementation\('sdpa'\)"):
        seen(1, 4, 4, mask_function=mask)


def test_padding_between_tokens_under_a_window_is_refused():
    model, ids = on_fastlm(make_model("mistral")), random_ids(1, 9)
    mask = torch.ones_like(ids)
    mask[0, 4] = 0
    with pytest.raises(ValueError, match="padding must be at the start or at the end of a row"):
        model(ids, attention_mask=mask)
    full = make_model("llama")
    expected = full(ids, attention_mask=mask).logits
    assert_close(on_fastlm(full)(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


def test_caches_of_fixed_size_are_refused():
    model, ids = on_fastlm(make_model("llama")), random_ids(1, 5)
    with pytest.raises(ValueError, match="Caches of fixed size are not supported; use a DynamicCache"):
        generated(model, ids, cache_implementation="static")


def test_other_arguments_are_refused():
    q, module = torch.randn(1, 2, 3, 8), torch.nn.Module()
    with pytest.raises(ValueError, match="s_aux is not supported"):
        part.attend(module, q, q, q, None, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        part.attend(module, q, q, q, None, output_attentions=True)


def test_attention_both_ways_where_a_layer_says_so():
    """Image encoders make no mask."""
    q, module = torch.randn(1, 2, 5, 8), torch.nn.Module()
    module.is_causal = False
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2)
    assert_close(part.attend(module, q, q, q, None)[0], expected)
    assert_close(part.attend(module, q, q, q, None, is_causal=True)[0][:, -1], expected[:, -1])


# ---- What is used of transformers


@pytest.mark.parametrize("function", part.FUNCTIONS)
def test_transformers_has_the_names(function):
    find_function(function, part.FUNCTIONS[function])


def test_masks_are_made_of_the_functions_that_are_recognised():
    window = partial(masking_utils.sliding_window_causal_mask_function, WINDOW)
    assert seen(1, 9, 9, mask_function=masking_utils.causal_mask_function).window is None
    assert seen(1, 9, 9, mask_function=window()).window == WINDOW
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    packed = masking_utils.and_masks(
        masking_utils.remap_positions_for_packed_sequence(window(), positions),
        masking_utils.packed_sequence_mask_function(masking_utils.find_packed_sequence_indices(positions)),
    )
    found = seen(1, 6, 6, mask_function=packed)
    assert found.window == WINDOW
    assert found.sequences.cu_seqlens_q.tolist() == [0, 3, 5, 6]
    assert find("transformers.masking_utils:AttentionMaskInterface")._global_mapping["fastlm"] is seen
