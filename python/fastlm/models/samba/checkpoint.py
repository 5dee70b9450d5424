"""Saving and loading: `config.json` beside `model.safetensors`, read from local directories only.

Tied weights are stored once. Files appear under their name only when they are complete. Loading checks every
tensor before any is used, and says which file, which tensor, what was expected and what was found.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastlm.models.samba.config import MODEL_TYPE, SambaConfig

if TYPE_CHECKING:
    from fastlm.models.samba.modeling import SambaForCausalLM

    Model = TypeVar("Model", bound=SambaForCausalLM)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

# Kept in float32 when the rest is loaded in a half type, as the layers do when they are made.
_PRECISE = (".A_log", ".mamba.D", ".dt_proj.bias")


def save_pretrained(model: SambaForCausalLM, directory: str | Path) -> None:
    """Write the model's configuration and weights into `directory`, which is made if needed.

    Each file is written under a temporary name and renamed, so that a reader, or a crash, never meets half a
    file. An earlier checkpoint in the directory is replaced.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", "model_type": MODEL_TYPE}
    write_file(directory / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata=metadata))
    write_file(directory / CONFIG_FILE, model.config.to_json_file)


def load_pretrained(
    cls: type[Model],
    directory: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Model:
    """Build a model from `directory`.

    Args:
        cls: the model class.
        directory: holds `config.json` and `model.safetensors`; never looked for anywhere but on this machine.
        device: where the weights go.
        dtype: of the weights, default as stored; `A_log`, `D` and `dt_proj.bias` stay float32 at least.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: the directory or one of the files is missing.
        ValueError: a file is damaged, is for another kind of model, or lacks, adds or mis-shapes tensors.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"from_pretrained: no such directory: {directory}. Only local directories are read."
        )
    config = SambaConfig.from_json_file(directory / CONFIG_FILE)
    model = cls(config, device="meta")
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"from_pretrained: no such file: {path}")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
            check_shapes(path, expected, found)
            tensors = {name: _converted(name, file.get_tensor(name), dtype) for name in expected}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True).eval()


def check_shapes(path: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """All names and shapes of the file are those of the model."""
    if missing := [name for name in expected if name not in found]:
        raise ValueError(
            f"{path}: tensor {missing[0]} must have shape {expected[missing[0]]}, got no such tensor"
            f" ({len(missing)} of {len(expected)} tensors are missing)"
        )
    if extra := [name for name in found if name not in expected]:
        raise ValueError(
            f"{path}: tensor {extra[0]} of shape {found[extra[0]]} does not belong to this model"
            f" ({len(extra)} unexpected tensors; the model has {len(expected)})"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{path}: tensor {name} must have shape {shape}, got {found[name]}")


def _converted(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None:
        return tensor
    return tensor.to(torch.promote_types(dtype, torch.float32) if name.endswith(_PRECISE) else dtype)


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file in the same directory, then give it its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
