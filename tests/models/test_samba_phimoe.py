"""PhiMoE weights: transformers' model and ours read each other's directories; what is said about those that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastlm.models.samba import SambaConfig, SambaForCausalLM, load_phimoe, preset, save_phimoe
from fastlm.models.samba.phimoe import read_phimoe_config
from tests.support.tolerance import assert_close_to_reference

transformers = pytest.importorskip("transformers", minversion="5.24", reason="needs the extra fastlm[hf]")

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "max_position_embeddings": 64,
    "sliding_window": 7,
    "attention_bias": True,
    "lm_head_bias": True,
    "router_jitter_noise": 0.1,
    "input_jitter_noise": 0.01,
    "router_aux_loss_coef": 0.02,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "rms_norm_eps": 1e-4,
    "pad_token_id": 0,
}
HUB_ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
HUB_GATE = "model.layers.2.block_sparse_moe.experts.3.w1.weight"


def theirs(**changes: Any) -> Any:
    """A small model of transformers with weights that say something."""
    torch.manual_seed(0)
    model = transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**{**SIZES, **changes})).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.25)
            if parameter.dim() == 1:
                parameter.add_(1.0)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return theirs()


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(61, (2, 31), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_logits(ours: SambaForCausalLM, other: Any, ids: Tensor) -> None:
    exact = type(other)(other.config).double().eval()
    exact.set_experts_implementation("eager")
    exact.load_state_dict({name: t.double() for name, t in other.state_dict().items()})
    got, expected = ours(ids).logits, other(ids).logits
    assert_close_to_reference("logits", got, exact(ids).logits, expected)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


def edit(directory: Path, **changes: Any) -> None:
    """Fields of `config.json` replaced; None removes one."""
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: v for name, v in values.items() if v != "remove"}))


# Reading


def in_memory(model: Any, directory: Path) -> None:
    """The weights under the names that they have in transformers' model."""
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("write", "files", "router"),
    [
        (lambda model, path: model.save_pretrained(path), 1, HUB_ROUTER),
        (lambda model, path: model.save_pretrained(path, max_shard_size="40KB"), 3, HUB_ROUTER),
        (in_memory, 1, "model.layers.1.mlp.router.weight"),
    ],
    ids=["published", "sharded", "in memory"],
)
def test_every_layout_gives_the_same_logits(model, saved, ids, write, files, router):
    (saved / "model.safetensors").unlink()
    write(model, saved)
    shards = list(saved.glob("*.safetensors"))
    assert len(shards) >= files
    assert any(router in load_file(shard) for shard in shards)
    ours = load_phimoe(saved)
    assert not ours.training
    assert all(p.requires_grad for p in ours.parameters())
    assert_same_logits(ours, model, ids)


def test_cached_generation_gives_the_same_tokens(model, saved, ids):
    options = {"do_sample": False, "eos_token_id": None}
    ours = load_phimoe(saved)
    for prompt in (ids, ids[:1, :3]):
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, **options
        )
        assert torch.equal(ours.generate(prompt, max_new_tokens=20, eos_token_id=()), expected)
    assert len(set(expected[0, 3:].tolist())) > 4


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": False},
        {"lm_head_bias": False},
        {"lm_head_bias": False, "tie_word_embeddings": True},
        {"head_dim": 12},
        {"sliding_window": None},
        {"num_key_value_heads": 4, "num_local_experts": 2},
    ],
    ids=str,
)
def test_other_configurations(changes, tmp_path, ids):
    other = theirs(**changes)
    other.save_pretrained(tmp_path)
    ours = load_phimoe(tmp_path)
    assert ours.config.sliding_window == (64 if "sliding_window" in changes else 7)
    assert (ours.lm_head is None) == bool(changes.get("tie_word_embeddings"))
    assert_same_logits(ours, other, ids)


def test_the_configuration_is_taken_over(saved):
    config = load_phimoe(saved).config
    assert config == SambaConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=3,
        layer_pattern=("sliding_attention",),
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=20,
        sliding_window=7,
        rope_theta=5000.0,
        rms_norm_eps=1e-4,
        tie_word_embeddings=False,
        norm_type="layer_norm",
        attention_bias=True,
        lm_head_bias=True,
        num_experts=5,
        router_jitter_noise=0.1,
        input_jitter_noise=0.01,
        router_aux_loss_coef=0.02,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, 7),
        ({"model_type": "grinmoe"}, 8),
        ({"auto_map": {"AutoConfig": "configuration_slimmoe.PhiMoEConfig"}}, 8),
        ({"sliding_window": None}, 64),
        ({"sliding_window": "remove", "model_type": "grinmoe"}, 64),
    ],
    ids=str,
)
def test_the_window_is_that_of_the_training(saved, changes, window):
    edit(saved, **changes)
    assert load_phimoe(saved).config.sliding_window == window
    ours = load_phimoe(saved, sliding_window=5)
    assert ours.config.sliding_window == 5
    assert ours.model.layers[0].attn.sliding_window == 5


def test_a_configuration_like_the_one_on_the_hub_is_the_preset(tmp_path):
    """The fields that decide about the model; what it leaves out here gets transformers' value."""
    published = {
        "model_type": "grinmoe",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 6400,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "attention_bias": True,
        "lm_head_bias": True,
        "sliding_window": 2047,
        "rope_theta": 10000.0,
        "input_jitter_noise": 0.01,
        "router_aux_loss_coef": 0.0,
        "eos_token_id": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert read_phimoe_config(tmp_path / "config.json") == preset("GRIN_MoE").changed(bos_token_id=1)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": "remove", "rope_theta": 300.0},
        {"rope_parameters": "remove", "rope_theta": 300.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 300.0}},
    ],
    ids=str,
)
def test_both_ways_to_write_the_base_of_the_frequencies(saved, rope):
    edit(saved, **rope)
    assert load_phimoe(saved).config.rope_theta == 300.0


def test_dtype_on_loading(saved, ids):
    half = load_phimoe(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(ids).logits.isfinite().all()


# Writing


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "lm_head_bias": False}], ids=str)
def test_transformers_loads_what_is_written(ids, tmp_path, changes):
    sizes = {"layer_pattern": ("sliding_attention",), "norm_type": "layer_norm", "attention_bias": True}
    sizes |= {"lm_head_bias": True, "tie_word_embeddings": False, "head_dim": 12, "rope_theta": 700.0}
    torch.manual_seed(0)
    config = SambaConfig.from_preset("tiny", num_experts=5, router_jitter_noise=0.1, **{**sizes, **changes})
    ours = SambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_phimoe(ours, tmp_path / "deep" / "ours", max_position_embeddings=100)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "ours")
    assert type(other).__name__ == "PhimoeForCausalLM"
    other.set_experts_implementation("eager")
    assert other.config.max_position_embeddings == 100
    assert other.config.sliding_window == 8
    assert_same_logits(ours, other.eval(), ids)
    again = load_phimoe(tmp_path / "deep" / "ours")
    assert again.config == config.changed(state_size=again.config.state_size)  # no Mamba: nothing has it
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
    assert sorted(path.name for path in (tmp_path / "deep" / "ours").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_what_was_read_is_written_back(saved, tmp_path):
    save_phimoe(load_phimoe(saved), tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (saved, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert HUB_GATE in before
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_pattern": ("mamba", "sliding_attention")},
            r"layer_pattern must be \('sliding_attention',\), got",
        ),
        ({"norm_type": "rms_norm"}, "norm_type must be 'layer_norm', got 'rms_norm'"),
        ({"num_experts": 0}, "num_experts must be at least 2, got 0"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok must be 2, got 1"),
        ({"use_rope": False}, "use_rope must be True, got False"),
        ({"router_estimator": "topk"}, "router_estimator must be one of v2, v2_star, v1, got 'topk'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_models_that_have_no_place_in_the_layout(changes, message, tmp_path):
    fits = {"layer_pattern": ("sliding_attention",), "norm_type": "layer_norm"}
    ours = SambaForCausalLM(SambaConfig.from_preset("tiny_moe", **{**fits, **changes}))
    with pytest.raises(ValueError, match=f"save_phimoe: {message}"):
        save_phimoe(ours, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What does not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type must be one of phimoe, grinmoe, got 'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok must be 2, got 1"),
        ({"hidden_size": "remove"}, "hidden_size must be an integer of at least 1, got no such field"),
        ({"hidden_size": "wide"}, "SambaConfig: hidden_size must be an integer of at least 1, got 'wide'"),
        ({"num_local_experts": 1}, "SambaConfig: num_experts must be 0 or at least 2, got 1"),
        ({"tie_word_embeddings": True}, "lm_head_bias must be False while tie_word_embeddings is True"),
        ({"sliding_window": 2.5}, "sliding_window must be an integer or null, got 2.5"),
        (
            {"sliding_window": None, "max_position_embeddings": "remove"},
            "max_position_embeddings must be there",
        ),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type must be 'default', got 'longrope'"),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "rope_parameters.rope_type must be 'default', got 'longrope'",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object or null, got 'linear'"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta must be a positive number, got 'big'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
        ({"pad_token_id": 61}, "pad_token_id must be below vocab_size = 61, got 61"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_configurations_that_are_refused(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(ValueError, match=rf"theirs/config\.json: .*{message}"):
        load_phimoe(saved)


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: change_tensors(p, lambda t: t.pop(HUB_GATE)),
            rf"tensor {HUB_GATE} must have shape \(20, 32\), got no such tensor \(1 of \d+ tensors are missing",
        ),
        (
            lambda p: change_tensors(p, lambda t: t.update({HUB_GATE: torch.zeros(21, 32)})),
            rf"model\.safetensors: tensor {HUB_GATE} must have shape \(20, 32\), got \(21, 32\)",
        ),
        (
            lambda p: change_tensors(p, lambda t: t.update({"model.layers.3.x": torch.zeros(2)})),
            r"model\.safetensors: tensor model\.layers\.3\.x of shape \(2,\) does not belong to this model",
        ),
        (lambda p: edit(p, lm_head_bias=False), r"tensor lm_head\.bias of shape \(61,\) does not belong"),
        (
            lambda p: edit(p, num_local_experts=6),
            r"tensor model\.layers\.0\.block_sparse_moe\.gate\.weight must have shape \(6, 32\), got \(5, 32\)",
        ),
        (lambda p: (p / "model.safetensors").write_bytes(b""), r"not a readable safetensors file"),
        (lambda p: (p / "config.json").write_text("{"), r"config\.json: Expecting property name"),
        (lambda p: (p / "config.json").write_text("[]"), r"config\.json: expected a JSON object, got list"),
    ],
)
def test_damaged_files(saved, damage, message):
    damage(saved)
    with pytest.raises(ValueError, match=message):
        load_phimoe(saved)


@pytest.fixture
def sharded(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


def change_index(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = path / "model.safetensors.index.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda p: change_index(p, lambda v: v.pop("weight_map")),
            ValueError,
            r"index\.json: must be JSON with weight_map, got KeyError",
        ),
        (
            lambda p: change_index(p, lambda v: v["weight_map"].update({"x": "other.safetensors"})),
            FileNotFoundError,
            r"no such file: .*other\.safetensors, named by model\.safetensors\.index\.json",
        ),
        (
            lambda p: change_index(p, lambda v: v["weight_map"].update({"x": v["weight_map"][HUB_GATE]})),
            ValueError,
            r"model-0.*\.safetensors: must have tensor x, as .*index\.json says, got no such tensor",
        ),
        (
            lambda p: change_index(p, lambda v: v["weight_map"].pop(HUB_GATE)),
            ValueError,
            rf"index\.json: tensor {HUB_GATE} must have shape \(20, 32\), got no such tensor",
        ),
        (
            lambda p: edit(p, vocab_size=62),
            ValueError,
            r"model-0.*\.safetensors: tensor \S+ must have shape \(62.*\), got \(61.*\)",
        ),
    ],
    ids=["no map", "no shard", "not in the shard", "not in the map", "another size"],
)
def test_damaged_shards(sharded, damage, error, message):
    damage(sharded)
    with pytest.raises(error, match=message):
        load_phimoe(sharded)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"load_phimoe: no such file: .*{name}"):
        load_phimoe(saved)
    with pytest.raises(
        FileNotFoundError, match=r"no such directory: .*nowhere\. Only local directories are read"
    ):
        load_phimoe(saved / "nowhere")


def test_leftovers_of_other_versions_are_no_error(saved, ids, tmp_path):
    """Tables that used to be stored, and a tied output projection that is there twice."""
    expected = load_phimoe(saved)(ids).logits
    change_tensors(
        saved, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    )
    assert torch.equal(load_phimoe(saved)(ids).logits, expected)
    theirs(tie_word_embeddings=True, lm_head_bias=False).save_pretrained(tmp_path / "tied")
    embedding = load_file(tmp_path / "tied" / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(tmp_path / "tied", lambda t: t.update({"lm_head.weight": embedding.clone()}))
    assert load_phimoe(tmp_path / "tied").lm_head is None
    change_tensors(tmp_path / "tied", lambda t: t.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ValueError, match=r"tensor lm_head\.weight must equal model\.embed_tokens\.weight"):
        load_phimoe(tmp_path / "tied")
