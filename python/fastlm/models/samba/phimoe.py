"""Weights of GRIN-MoE, Phi-3.5-MoE and their small siblings: `model_type` `phimoe` and `grinmoe`, read and written.

Two layouts are read, from one file or from shards with an index. The one of the published checkpoints::

    model.layers.{i}.input_layernorm | post_attention_layernorm  .weight .bias
    model.layers.{i}.self_attn.{q,k,v,o}_proj                    .weight .bias
    model.layers.{i}.block_sparse_moe.gate.weight                (E, h)   the router
    model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight      (I, h)   gate; w3 (I, h): up; w2 (h, I): down

and the one transformers 5 has in memory, with `mlp.router.weight`, `mlp.experts.gate_up_proj` and `mlp.experts.down_proj`.

The window. A published `sliding_window` of 2047 is the left bound of the attention kernel that the model was trained with: 2048 keys,
the current one included. transformers takes the number for that of the keys and loses one. Here a configuration that comes with code
of its own (`auto_map`, or `model_type` `grinmoe`) is read as the model was trained, any other as transformers reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastlm.models.samba.checkpoint import CONFIG_FILE, WEIGHTS_FILE, check_shapes, write_file
from fastlm.models.samba.config import SambaConfig
from fastlm.models.samba.modeling import SambaForCausalLM

INDEX_FILE = "model.safetensors.index.json"
MODEL_TYPES = ("phimoe", "grinmoe")

# transformers' values for what a configuration leaves out; its sizes have to be there.
_DEFAULTS: dict[str, Any] = {
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.01,
    "input_jitter_noise": 0.0,
    "router_aux_loss_coef": 0.001,
    "attention_bias": False,
    "lm_head_bias": False,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "head_dim": None,
    "num_key_value_heads": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ROPE_THETA = 1e6
_PICKS = 2


def load_phimoe(
    directory: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    sliding_window: int | None = None,
) -> SambaForCausalLM:
    """Build a model from a directory in the layout of the published PhiMoE checkpoints.

    Args:
        directory: holds `config.json` and `model.safetensors`, or shards with `model.safetensors.index.json`.
        device: where the weights go.
        dtype: of the weights, default as stored.
        sliding_window: keys that a query sees, itself included; default: what the configuration says, see above, or
            `max_position_embeddings` where it has none. The cache of a sequence is as long as that.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: the directory or one of the files is missing.
        ValueError: a file is damaged, the configuration asks for something else (LongRoPE among it), or tensors are missing, left
            over or of another shape; the text names file, tensor or field, expected and found value.

    Note:
        Dropout of the configuration is not applied; it would matter in training only. Of several end tokens the first is taken.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"load_phimoe: no such directory: {directory}. Only local directories are read."
        )
    config = read_phimoe_config(directory / CONFIG_FILE, sliding_window=sliding_window)
    model = SambaForCausalLM(config, device="meta")
    with ExitStack() as stack:
        tensors = _Tensors(directory, device, stack)
        tensors.check(_expected(model, hub="block_sparse_moe" in " ".join(tensors.names)), config)
        state = {}
        for name in model.state_dict():
            tensor = _assembled(name, config, tensors)
            state[name] = tensor if dtype is None else tensor.to(dtype)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def save_phimoe(
    model: SambaForCausalLM, directory: str | Path, *, max_position_embeddings: int | None = None
) -> None:
    """Write `config.json` and `model.safetensors` in the layout of the published checkpoints, as transformers reads it.

    Args:
        model: attention and experts in every block, layer norms, rotary positions, two experts a token.
        directory: made if needed.
        max_position_embeddings: tokens the model is good for; default: its window, at least 4096.

    Raises:
        ValueError: the model has something the layout has no place for; the text names the field.

    Note:
        `router_estimator` and `expert_grad` are not stored: they change training alone.
    """
    directory = Path(directory)
    values = _to_phimoe(model.config, max_position_embeddings)
    values["dtype"] = str(model.output_weight.dtype).removeprefix("torch.")
    tensors = dict(_published(model))
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=2) + "\n"
    write_file(directory / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_file(directory / CONFIG_FILE, lambda path: _write_text(path, text))


# Configuration


def read_phimoe_config(path: str | Path, *, sliding_window: int | None = None) -> SambaConfig:
    """The sizes in a `config.json` of PhiMoE, see `load_phimoe`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, another kind of model, or a field this library cannot follow; the text names file and field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_phimoe: no such file: {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
        return _from_phimoe(values, sliding_window)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path}: {error}") from error


def _from_phimoe(values: dict[str, Any], sliding_window: int | None) -> SambaConfig:
    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {kind!r}")
    for name in _SIZES:
        if name not in values:
            raise ValueError(f"{name} must be an integer of at least 1, got no such field")
    for name, needed in (("hidden_act", "silu"), ("num_experts_per_tok", _PICKS)):
        if values.get(name, needed) != needed:
            raise ValueError(f"{name} must be {needed!r}, got {values[name]!r}")
    read = {name: values.get(name, default) for name, default in _DEFAULTS.items()}
    if isinstance(read["eos_token_id"], list):
        read["eos_token_id"] = read["eos_token_id"][0] if read["eos_token_id"] else None
    return SambaConfig(
        layer_pattern=("sliding_attention",),
        norm_type="layer_norm",
        num_experts=read.pop("num_local_experts"),
        rope_theta=_rope_theta(values),
        sliding_window=_window(values) if sliding_window is None else sliding_window,
        **{name: values[name] for name in _SIZES},
        **read,
    )


def _rope_theta(values: dict[str, Any]) -> float:
    """The base of the frequencies, if these are all there is to the positions."""
    theta = values.get("rope_theta", _ROPE_THETA)
    for name in ("rope_parameters", "rope_scaling"):  # of transformers 5, and of the versions before
        found = values.get(name) or {}
        if not isinstance(found, dict):
            raise ValueError(f"{name} must be an object or null, got {found!r}")
        kind = found.get("rope_type", found.get("type", "default"))
        if kind != "default":
            raise ValueError(
                f"{name}.rope_type must be 'default', got {kind!r}. LongRoPE rescales positions by tables of its own, at "
                "short contexts too: this model would not be the one that was trained."
            )
        theta = found.get("rope_theta", theta)
    share = values.get("partial_rotary_factor", 1.0)
    if share not in (1, None):
        raise ValueError(f"partial_rotary_factor must be 1, got {share!r}")
    return float(theta) if isinstance(theta, (int, float)) else theta


def _window(values: dict[str, Any]) -> int:
    """Keys that a query sees."""
    found: int | None = values.get("sliding_window")
    if found is None:
        if "max_position_embeddings" not in values:
            raise ValueError(
                "max_position_embeddings must be there without sliding_window, got no such field"
            )
        whole: int = values["max_position_embeddings"]
        return whole
    if not isinstance(found, int):
        raise ValueError(f"sliding_window must be an integer or null, got {found!r}")
    own_code = values.get("model_type") == "grinmoe" or "auto_map" in values
    return found + 1 if own_code else found


def _to_phimoe(config: SambaConfig, max_position_embeddings: int | None) -> dict[str, Any]:
    """The configuration in transformers' words."""
    for name, wrong, text in (
        ("layer_pattern", set(config.layer_types) != {"sliding_attention"}, "('sliding_attention',)"),
        ("norm_type", config.norm_type != "layer_norm", "'layer_norm'"),
        ("num_experts", not config.num_experts, "at least 2"),
        ("num_experts_per_tok", config.num_experts_per_tok != _PICKS, str(_PICKS)),
        ("use_rope", not config.use_rope, "True"),
        ("router_estimator", config.router_estimator == "topk", "one of v2, v2_star, v1"),
    ):
        if wrong:
            raise ValueError(f"save_phimoe: {name} must be {text}, got {getattr(config, name)!r}")
    kept = [name for name in (*_SIZES, *_DEFAULTS) if name != "num_local_experts"]
    return {
        "architectures": ["PhimoeForCausalLM"],
        "model_type": "phimoe",
        **{name: getattr(config, name) for name in kept},
        "num_local_experts": config.num_experts,
        "hidden_act": "silu",
        "sliding_window": config.sliding_window,
        "max_position_embeddings": max_position_embeddings or max(4096, config.sliding_window),
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


# Tensors


class _Tensors:
    """The tensors of one file or of all shards, by name; files stay open as long as `stack`."""

    def __init__(self, directory: Path, device: torch.device | str, stack: ExitStack) -> None:
        single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
        self.path = single if single.is_file() or not index.is_file() else index
        if not self.path.is_file():
            raise FileNotFoundError(f"load_phimoe: no such file: {single}, nor {INDEX_FILE}")
        self._device, self._stack = str(device), stack
        self._files: dict[Path, Any] = {}
        self._where = (
            dict.fromkeys(self._open(single), single) if self.path == single else self._indexed(index)
        )
        self.names = sorted(name for name in self._where if not name.endswith("rotary_emb.inv_freq"))

    def _open(self, path: Path) -> list[str]:
        """Names in a file."""
        if not path.is_file():
            raise FileNotFoundError(f"load_phimoe: no such file: {path}, named by {self.path.name}")
        try:
            self._files[path] = self._stack.enter_context(
                safe_open(path, framework="pt", device=self._device)
            )
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
        return list(self._files[path].keys())

    def _indexed(self, index: Path) -> dict[str, Path]:
        """The shard of each name; every shard is opened, and has what the index says."""
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            where = {name: index.parent / file for name, file in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index}: must be JSON with weight_map, got {type(error).__name__}: {error}"
            ) from error
        for path in dict.fromkeys(where.values()):
            inside = set(self._open(path))
            for name in (name for name, file in where.items() if file == path):
                if name not in inside:
                    raise ValueError(
                        f"{path}: must have tensor {name}, as {index.name} says, got no such tensor"
                    )
        return where

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._where[name]].get_tensor(name)
        return tensor

    def check(self, expected: dict[str, tuple[int, ...]], config: SambaConfig) -> None:
        """Names and shapes are those expected; a tied output projection may be there twice, if it is the same."""
        shapes = {
            name: tuple(self._files[self._where[name]].get_slice(name).get_shape()) for name in self.names
        }
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        if config.tie_word_embeddings and head in shapes and shapes[head] == shapes.get(embedding):
            if not torch.equal(self[head], self[embedding]):
                raise ValueError(
                    f"{self._where[head]}: tensor {head} must equal {embedding}, to which it is tied"
                )
            del shapes[head]
        for path in self._files:  # shapes are told with the shard they are in
            here = {name: shape for name, shape in shapes.items() if self._where[name] == path}
            check_shapes(
                path,
                {name: expected[name] for name in here if name in expected},
                {name: shape for name, shape in here.items() if name in expected},
            )
        check_shapes(self.path, expected, shapes)


_RENAMED = (
    (".attn_norm.", ".input_layernorm."),
    (".mlp_norm.", ".post_attention_layernorm."),
    (".attn.", ".self_attn."),
)
_EXPERTS = ".mlp.experts."


def _in_memory_name(name: str) -> str:
    """Our name of a parameter as transformers has it in memory."""
    for ours, theirs in _RENAMED:
        name = name.replace(ours, theirs)
    return name


def _router_name(name: str) -> str:
    return name.replace(".mlp.router.", ".block_sparse_moe.gate.")


def _expert_names(name: str, num_experts: int) -> list[tuple[str, ...]]:
    """For each expert the published tensors, one above the other, that make its part of `name`."""
    start, _, part = _in_memory_name(name).partition(_EXPERTS)
    parts = ("w1", "w3") if part == "gate_up_proj" else ("w2",)
    experts = f"{start}.block_sparse_moe.experts"
    return [tuple(f"{experts}.{e}.{w}.weight" for w in parts) for e in range(num_experts)]


def _expected(model: SambaForCausalLM, *, hub: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the published layout, or in that of transformers' memory."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if hub and _EXPERTS in name:
            for names in _expert_names(name, shape[0]):
                expected |= dict.fromkeys(names, (shape[1] // len(names), shape[2]))
        else:
            theirs = _in_memory_name(name)
            expected[_router_name(theirs) if hub else theirs] = shape
    return expected


def _assembled(name: str, config: SambaConfig, tensors: _Tensors) -> Tensor:
    """The parameter `name`, from whichever layout the file has."""
    theirs = _in_memory_name(name)
    if theirs in tensors:
        return tensors[theirs]
    if _EXPERTS not in name:
        return tensors[_router_name(theirs)]
    experts = _expert_names(name, config.num_experts)
    return torch.stack([torch.cat([tensors[part] for part in parts]) for parts in experts])


def _published(model: SambaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the published layout."""
    for name, tensor in model.state_dict().items():
        if _EXPERTS not in name:
            yield _router_name(_in_memory_name(name)), tensor.contiguous()
            continue
        for expert, names in zip(tensor, _expert_names(name, len(tensor)), strict=True):
            for part, rows in zip(names, expert.chunk(len(names)), strict=True):
                yield part, rows.contiguous()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
