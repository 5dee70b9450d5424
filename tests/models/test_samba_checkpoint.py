"""Saving and loading: round trips, and what is said about files that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastlm.models.samba import SambaConfig, SambaForCausalLM
from fastlm.models.samba import checkpoint as checkpoint_module


def make(**changes: object) -> SambaForCausalLM:
    torch.manual_seed(0)
    return SambaForCausalLM(SambaConfig.from_preset("tiny", **changes)).eval()


@pytest.fixture
def saved(tmp_path) -> Path:
    make().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_exact_and_tied_weights_are_stored_once(tmp_path, tied):
    model = make(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "deep" / "model")
    again = SambaForCausalLM.from_pretrained(tmp_path / "deep" / "model")
    assert again.config == model.config
    assert not again.training
    for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
        assert b.requires_grad
    with safe_open(tmp_path / "deep" / "model" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not tied)  # noqa: SIM118  (not a dict)
        assert file.metadata()["model_type"] == "fastlm_samba"
    ids = torch.randint(96, (2, 11))
    assert torch.equal(again(ids).logits, model(ids).logits)
    again(ids, labels=ids).loss.backward()
    assert sorted(p.name for p in (tmp_path / "deep" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_dtype_is_changed_on_loading_but_not_that_of_the_state_parameters(saved):
    model = SambaForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    fresh = SambaForCausalLM(model.config, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {name: p.dtype for name, p in fresh.named_parameters()}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    double = SambaForCausalLM.from_pretrained(saved, dtype=torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}


def test_saving_replaces_an_earlier_checkpoint(saved):
    other = make(hidden_size=48)
    other.save_pretrained(saved)
    assert SambaForCausalLM.from_pretrained(saved).config.hidden_size == 48


def test_a_write_that_fails_leaves_the_earlier_checkpoint_whole(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(_tensors: object, path: Path, **_options: object) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        make(hidden_size=48).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def without(path: Path, name: str) -> None:
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


def with_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    save_file({**load_file(path), name: tensor}, path)


GATE = "model.layers.0.mlp.w1.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: without(p, GATE),
            rf"tensor {GATE} must have shape \(60, 32\), got no such tensor \(1 of \d+ tensors are missing",
        ),
        (
            lambda p: with_tensor(p, GATE, torch.zeros(61, 32)),
            rf"model\.safetensors: tensor {GATE} must have shape \(60, 32\), got \(61, 32\)",
        ),
        (
            lambda p: with_tensor(p, "lm_head.weight", torch.zeros(96, 32)),
            r"model\.safetensors: tensor lm_head.weight of shape \(96, 32\) does not belong to this model",
        ),
        (
            lambda p: p.write_bytes(p.read_bytes()[:-10]),
            r"model\.safetensors: not a readable safetensors file",
        ),
        (lambda p: p.write_bytes(b"\x00" * 100), r"model\.safetensors: not a readable safetensors file"),
        (lambda p: p.write_bytes(b""), r"model\.safetensors: not a readable safetensors file"),
        (
            lambda p: p.write_text("version https://git-lfs"),
            r"model\.safetensors: not a readable safetensors file",
        ),
    ],
)
def test_damaged_weights(saved, damage, message):
    damage(saved / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        SambaForCausalLM.from_pretrained(saved)


def test_foreign_and_changed_configurations(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(
        ValueError, match=r"config\.json: SambaConfig: model_type must be \"fastlm_samba\", got 'mamba'"
    ):
        SambaForCausalLM.from_pretrained(saved)
    (saved / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(
        ValueError, match=r"tensor model\.layers\.4\.\S+ must have shape .*, got no such tensor"
    ):
        SambaForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no such file: .*{name}"):
        SambaForCausalLM.from_pretrained(saved)


def test_missing_directory(saved):
    shutil.rmtree(saved)
    with pytest.raises(
        FileNotFoundError, match=r"no such directory: .*model\. Only local directories are read"
    ):
        SambaForCausalLM.from_pretrained(saved)


def test_loaded_weights_survive_a_replaced_file(saved):
    model = SambaForCausalLM.from_pretrained(saved)
    expected = {name: p.clone() for name, p in model.named_parameters()}
    make(hidden_size=48).save_pretrained(saved)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
