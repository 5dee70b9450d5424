"""Mamba-1 models of transformers on fastlm's operators: the same results, and states that carry over."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

transformers = pytest.importorskip("transformers", minversion="5.24", reason="needs the extra fastlm[hf]")

from fastlm.compat.transformers import disable, enable  # noqa: E402
from fastlm.compat.transformers import mamba as part  # noqa: E402
from tests.compat.transformers_models import (  # noqa: E402
    MAMBA,
    assert_all_close,
    generated,
    in_double,
    left_padding,
    make_model,
    one_thread,
    random_ids,
    results_of,
    side_by_side,
)
from tests.support.tolerance import assert_close_to_reference  # noqa: E402

every_model = pytest.mark.parametrize("name", MAMBA)


@pytest.fixture(autouse=True)
def _disabled_afterwards():
    with one_thread():
        yield
    disable()


# ---- Training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_model
def test_logits_loss_and_gradients(name, dtype):
    model = make_model(name, dtype).train()

    def results(model):
        return side_by_side(results_of(model, random_ids(2, 19, seed)) for seed in range(6))

    exact, plain = results(in_double(model)), results(model)
    enable("mamba")
    assert_all_close(results(model), exact, plain, dtype)


@every_model
def test_autocast(name):
    model, ids = make_model(name).train(), random_ids(2, 19)
    exact = results_of(in_double(model), ids)
    with torch.autocast("cpu", torch.bfloat16):
        plain = results_of(model, ids)
        enable("mamba")
        actual = results_of(model, ids)
    assert_all_close(actual, exact, plain, torch.bfloat16)


def test_no_scan_of_transformers_runs(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("transformers' own function was called")

    modeling = transformers.models.mamba.modeling_mamba
    for name in ("causal_conv1d_fn", "causal_conv1d_update", "mamba_inner_fn", "mamba_selective_scan"):
        monkeypatch.setattr(modeling, name, fail)
    monkeypatch.setattr(modeling, "mamba_selective_state_update", fail)
    enable("mamba")
    model, ids = make_model("mamba"), random_ids(2, 9)
    results_of(model.train(), ids)
    generated(model.eval(), ids)


def test_float64_stays_float64():
    enable("mamba")
    single, ids = make_model("mamba"), random_ids(1, 9)
    logits = in_double(single).backbone(ids).last_hidden_state
    assert logits.dtype == torch.float64
    assert_close(single.backbone(ids).last_hidden_state.double(), logits, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_bits():
    enable("mamba")
    model, ids = make_model("mamba").train(), random_ids(2, 19)
    expected = {name: value.clone() for name, value in results_of(model, ids).items()}
    model.activation_checkpointing_enable()
    for name, value in results_of(model, ids).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("padded", [False, True])
def test_compiled_in_one_graph(padded):
    enable("mamba")
    model, ids = make_model("mamba").train(), random_ids(2, 11)
    mask = left_padding(ids, 4, 0) if padded else None
    expected = {k: v.clone() for k, v in results_of(model, ids, attention_mask=mask).items()}
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    for name, value in results_of(model, ids, attention_mask=mask).items():
        assert torch.equal(value, expected[name]), name


@torch.no_grad()
def test_exported_program_holds_the_operators():
    enable("mamba")
    model, ids = make_model("mamba"), random_ids(2, 11)
    program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    called = [str(node.target) for node in program.graph.nodes]
    assert called.count("fastlm.selective_scan.default") == 2
    assert torch.equal(program.module()(ids, use_cache=False).logits, model(ids).logits)


# ---- Generation and caches


@pytest.mark.parametrize("length", [1, 2, 9])
@every_model
def test_generated_tokens(name, length):
    model, ids = make_model(name), random_ids(2, length)
    expected = generated(model, ids)
    enable("mamba")
    assert torch.equal(generated(model, ids), expected)
    assert torch.equal(generated(model, ids, use_cache=False), expected)


@every_model
def test_beam_search(name):
    model, ids = make_model(name), random_ids(2, 7)
    expected = generated(model, ids, num_beams=3)
    enable("mamba")
    assert torch.equal(generated(model, ids, num_beams=3), expected)


@torch.no_grad()
@every_model
def test_cache_holds_what_transformers_holds(name):
    """So that a generation may go on under the other implementation."""
    model, ids = make_model(name), random_ids(2, 9)
    theirs = model(ids, use_cache=True).cache
    enable("mamba")
    ours = model(ids, use_cache=True).cache
    for step in random_ids(2, 3, seed=2).split(1, dim=1):
        model(step, cache=ours)
        disable()
        model(step, cache=theirs)
        enable("mamba")
    layer, other = ours.layers[0], theirs.layers[0]
    assert layer.recurrent_states[0].dtype == other.recurrent_states[0].dtype == torch.float32
    assert_close(layer.conv_states[0], other.conv_states[0])
    assert_close(layer.recurrent_states[0], other.recurrent_states[0])


def continued(model, ids: torch.Tensor, *cuts: int, **arguments) -> torch.Tensor:
    """Logits of a row fed in pieces, each from the cache the piece before left."""
    cache, logits = None, []
    for begin, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        mask = arguments.get("attention_mask")
        own = {} if mask is None else {"attention_mask": mask[:, :end]}
        output = model(ids[:, begin:end], cache=cache, use_cache=True, **own)
        cache = output.cache
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1,), (2, 3), (7, 9, 10), (18,)])
@every_model
def test_pieces_of_several_tokens_equal_the_whole(name, cuts):
    model, ids = make_model(name), random_ids(2, 19)
    exact, plain = in_double(model)(ids).logits.double(), model(ids).logits
    enable("mamba")
    assert_close_to_reference("logits", continued(model, ids, *cuts), exact, plain)


@torch.no_grad()
@every_model
def test_transformers_itself_starts_a_piece_from_an_empty_state(name):
    """Why the test above matters. Should this one fail, transformers has mended it: say so in docs/transformers.md."""
    model, ids = make_model(name), random_ids(2, 19)
    whole = model(ids).logits
    assert_close(
        continued(model, ids, *range(1, 19)), whole, rtol=1e-4, atol=1e-4
    )  # one token at a time is right
    wrong = (continued(model, ids, 7) - whole)[:, 7:].abs().max()
    assert wrong > 1e-2 * whole.abs().max()


def test_gradients_flow_through_a_cache():
    """Backpropagation through pieces equals that through the whole: states are read before they are overwritten."""
    enable("mamba")
    model, ids = make_model("mamba").train(), random_ids(2, 19)
    whole = results_of(model, ids)
    model.zero_grad()
    logits = continued(model, ids, 7, 8)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, whole[f"d{name}"], rtol=1e-4, atol=1e-6, msg=name)


# ---- Padding


@torch.no_grad()
@every_model
def test_left_padded_rows_equal_single_rows(name):
    model, ids = make_model(name), random_ids(3, 19)
    mask = left_padding(ids, 17, 2, 0)
    exact_model = in_double(model)
    rows = [ids[i : i + 1, mask[i].bool()] for i in range(3)]
    exact, plain = ([m(row).logits[0] for row in rows] for m in (exact_model, model))
    enable("mamba")
    padded = model(ids, attention_mask=mask).logits
    for i in range(3):
        assert_close_to_reference(f"row {i}", padded[i, mask[i].bool()], exact[i].double(), plain[i])


@every_model
def test_left_padded_generation_equals_single_rows(name):
    model, ids = make_model(name), random_ids(3, 9)
    mask = left_padding(ids, 7, 2, 0)
    enable("mamba")
    batch = generated(model, ids, attention_mask=mask)
    for i in range(3):
        alone = generated(model, ids[i : i + 1, mask[i].bool()])
        assert torch.equal(batch[i, mask[i].argmax() :], alone[0]), f"row {i}"


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "mamba biased gelu", "falcon_mamba"])
def test_padding_anywhere_leaves_no_trace_in_pieces(name):
    """Padding in front, behind and between, also in a later piece: tokens and states are those without it."""
    enable("mamba")
    model, ids = make_model(name), random_ids(4, 14)
    mask = torch.tensor(
        [
            [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0],
            [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ]
    )
    logits = continued(model, ids, 6, 7, attention_mask=mask)
    for i in range(3):
        real = mask[i].bool()
        assert_close(logits[i, real], model(ids[i : i + 1, real]).logits[0], rtol=1e-4, atol=1e-4)


def test_padded_training_equals_transformers():
    """With zero projection biases transformers' left padding is right, gradients included."""
    model, ids = make_model("mamba").train(), random_ids(2, 19)
    mask = left_padding(ids, 5, 0)
    labels = {"attention_mask": mask}
    exact, plain = results_of(in_double(model), ids, **labels), results_of(model, ids, **labels)
    enable("mamba")
    assert_all_close(results_of(model, ids, **labels), exact, plain, torch.float32)


@torch.no_grad()
def test_jamba_with_attention_on_fastlm_too():
    model, ids = make_model("jamba"), random_ids(3, 19)
    mask = left_padding(ids, 9, 2, 0)
    whole, tokens = model(ids).logits, generated(model, ids)
    enable()
    model.set_attn_implementation("fastlm")
    assert_close(continued(model, ids, 7, 8), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(model, ids), tokens)
    padded = generated(model, ids, attention_mask=mask)
    for i in range(3):
        alone = generated(model, ids[i : i + 1, mask[i].bool()])
        assert torch.equal(padded[i, mask[i].argmax() :], alone[0]), f"row {i}"


# ---- Errors


def test_masks_and_arguments_that_do_not_fit():
    enable("mamba")
    model, ids = make_model("mamba"), random_ids(2, 9)
    mixer, hidden = model.backbone.layers[0].mixer, torch.randn(2, 9, 24)
    with pytest.raises(ValueError, match=r"attention_mask of a Mamba layer must have shape \(2, 9\) or more"):
        model(ids, attention_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"got \(1, 9\)"):
        model(ids, attention_mask=torch.ones(1, 9))
    with pytest.raises(ValueError, match=r"got \(2, 1, 9, 9\)"):
        mixer(hidden, attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(ValueError, match=r"does not take seq_idx\. Pad the sequences"):
        mixer(hidden, seq_idx=torch.zeros(2, 9))


# ---- What is used of transformers


@pytest.mark.parametrize("function", part.FUNCTIONS)
def test_transformers_has_the_names(function):
    part.find_function(function, part.FUNCTIONS[function])


@every_model
def test_mixers_have_the_attributes(name):
    model = make_model(name)
    mixer = next(m for m in model.modules() if type(m).__name__.endswith("Mixer"))
    for attribute in (
        "in_proj",
        "conv1d",
        "x_proj",
        "dt_proj",
        "out_proj",
        "A_log",
        "D",
        "act",
        "activation",
    ):
        assert hasattr(mixer, attribute), attribute
    for attribute in ("time_step_rank", "ssm_state_size", "conv_kernel_size", "layer_idx", "config"):
        assert hasattr(mixer, attribute), attribute
    normalised = hasattr(mixer, "dt_layernorm")
    assert normalised == hasattr(mixer, "b_layernorm") == hasattr(mixer, "c_layernorm")
    assert normalised == (not name.startswith("mamba"))
