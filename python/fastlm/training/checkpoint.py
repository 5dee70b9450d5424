"""Checkpoints: model, optimizer, schedule, position and random state in one folder that is either whole or
absent.

    checkpoints/step-00000120/
        config.json, model.safetensors      `SambaForCausalLM.from_pretrained` reads them
        optimizer.safetensors               first and second moments by parameter name, step count, torch's
        RNG state state.json                          position, schedule, and size and digest of the other
        files

The newest two are kept (`keep_checkpoints`); an older one is deleted only after the new one is on the disk. No
pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastlm.training.atomic import new_folder, remove_leftovers, write_json
from fastlm.training.config import reason
from fastlm.training.errors import InputError, RunError

if TYPE_CHECKING:
    from fastlm.models.samba import SambaForCausalLM

FORMAT = "fastlm-checkpoint-1"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Position:
    """Where a run stands; with the weights, the moments and the RNG state all that decides what follows."""

    step: int  # optimizer steps done = index of the next one
    tokens: int
    train_seconds: float
    schedule: dict[str, int] | None


class CheckpointFolder:
    """The checkpoints of one run; `save` leaves the newest `keep`, or all with 0."""

    def __init__(self, run: Path, *, keep: int = 2) -> None:
        self.run, self.keep = run, keep
        self.path = run / "checkpoints"

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        if not self.path.is_dir():
            return []
        found = (re.fullmatch(r"step-(\d{8,})", entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def folder(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def clean(self) -> None:
        """Removes what a killed process left half-written."""
        remove_leftovers(self.path)

    def save(self, model: SambaForCausalLM, optimizer: torch.optim.Optimizer, position: Position) -> Path:
        """Writes a checkpoint; on any failure the earlier ones stay as they were.

        Raises:
            RunError: the disk is full or not writable; the text names the newest whole checkpoint.
        """
        target = self.folder(position.step)
        if target.exists():  # the run was resumed from this very step
            return target
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with new_folder(target) as temporary:
                model.save_pretrained(temporary)
                save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
                state = {
                    "format": FORMAT,
                    "position": asdict(position),
                    "files": {path.name: _describe(path) for path in sorted(temporary.iterdir())},
                }
                write_json(temporary / "state.json", state)
        except (OSError, SafetensorError) as error:
            kept = self.steps()
            safe = f"the checkpoint of step {kept[-1]} is whole" if kept else "there is no earlier checkpoint"
            raise RunError(
                f"checkpoint: could not write step {position.step} to {self.path}: {reason(error)}; {safe}. "
                f"Make room, then: fastlm train samba --out {self.run} --resume"
            ) from error
        for step in self.steps()[: -self.keep]:  # none with 0
            shutil.rmtree(self.folder(step), ignore_errors=True)
        return target

    def load(self, step: int, model: SambaForCausalLM, optimizer: torch.optim.Optimizer) -> Position:
        """Fills `model` and `optimizer` and returns the position; checks every file first.

        Raises:
            InputError: the checkpoint is damaged, incomplete or of another model.
        """
        folder = self.folder(step)
        state = self._checked_state(folder, step)
        try:
            weights = load_file(folder / "model.safetensors")
            moments = load_file(folder / "optimizer.safetensors")
            position = Position(**state["position"])
        except (OSError, SafetensorError, TypeError, KeyError) as error:
            raise self._damaged(folder, f"cannot be read: {reason(error)}", step) from error
        try:
            model.load_state_dict(weights, strict=True)
            _restore_optimizer(model, optimizer, moments)
        except (RuntimeError, KeyError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            detail = lines[min(1, len(lines) - 1)] if lines else type(error).__name__
            raise InputError(
                f"checkpoint: {folder} is of another model than {self.run}/run.json: {detail}"
            ) from error
        torch.set_rng_state(moments["rng.torch"])
        return position

    def _checked_state(self, folder: Path, step: int) -> dict[str, Any]:
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(folder, f"state.json cannot be read: {reason(error)}", step) from error
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        if found != FORMAT:
            raise InputError(f"checkpoint: expected format {FORMAT} in {folder}/state.json, found {found!r}")
        files = state.get("files")
        if not isinstance(files, dict) or not {"model.safetensors", "optimizer.safetensors"} <= set(files):
            raise self._damaged(folder, "state.json lists no weights", step)
        for name, expected in files.items():
            try:
                actual = _describe(folder / name)
            except OSError as error:
                raise self._damaged(folder, f"{name}: {reason(error)}", step) from error
            if actual["bytes"] != expected["bytes"]:
                detail = f"{name}: expected {expected['bytes']} bytes, found {actual['bytes']}"
                raise self._damaged(folder, detail, step)
            if actual["blake2b"] != expected["blake2b"]:
                raise self._damaged(folder, f"{name}: its content changed since it was written", step)
        checked: dict[str, Any] = state
        return checked

    def _damaged(self, folder: Path, detail: str, step: int) -> InputError:
        earlier = [other for other in self.steps() if other < step]
        way_out = (
            f"delete that folder and --resume to go on from step {earlier[-1]}"
            if earlier
            else "there is no earlier one"
        )
        return InputError(f"checkpoint: {folder} is damaged: {detail}; {way_out}")


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


def _optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {"rng.torch": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        for key in _MOMENTS:
            if key in state:
                tensors[f"{key}.{name}"] = state[key].contiguous()
        if "step" in state:
            tensors[f"step.{name}"] = torch.as_tensor(float(state["step"]), dtype=torch.float64)
    return tensors


def _restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Sets the optimizer's state by parameter name; nothing may be missing or left over."""
    left = set(tensors) - {"rng.torch"}
    for name, parameter in model.named_parameters():
        keys = [f"{key}.{name}" for key in (*_MOMENTS, "step")]
        if not any(key in tensors for key in keys):
            continue  # a parameter that never had a gradient
        for key in keys:
            if key not in tensors:
                raise ValueError(f"optimizer.safetensors: expected {key}, found none")
        for moment in _MOMENTS:
            found = tensors[f"{moment}.{name}"]
            if found.shape != parameter.shape or found.dtype != parameter.dtype:
                raise ValueError(
                    f"optimizer.safetensors: expected {moment}.{name} of shape {tuple(parameter.shape)} "
                    f"{parameter.dtype}, found {tuple(found.shape)} {found.dtype}"
                )
        optimizer.state[parameter] = {
            "step": tensors[f"step.{name}"].to(torch.float32),
            **{moment: tensors[f"{moment}.{name}"].clone() for moment in _MOMENTS},
        }
        left -= set(keys)
    if left:
        raise ValueError(f"optimizer.safetensors: {sorted(left)[0]} belongs to no parameter")
