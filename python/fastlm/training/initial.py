"""The model that a run begins with: a preset with weights drawn from the seed, or a trained one."""

from __future__ import annotations

from pathlib import Path

import torch

from fastlm.models.samba import SambaConfig, SambaForCausalLM
from fastlm.training.atomic import new_folder
from fastlm.training.config import TrainConfig, flag_of
from fastlm.training.data import PreparedData
from fastlm.training.errors import InputError, RunError
from fastlm.training.loading import find_model, load_run
from fastlm.training.tokenizer import mark_of

FOLDER = "init"  # of the copy in the run


def check_model(config: TrainConfig) -> None:
    """What can be told before any work: an unknown preset, experts that do not fit, no model at `init`.

    Raises:
        InputError: says which.
    """
    if config.init is None:
        model_config(config, 2**20)
        return
    try:
        find_model(config.init)
    except InputError as error:
        raise _of_init(error) from None


def model_config(config: TrainConfig, vocab_size: int) -> SambaConfig:
    """The preset with the vocabulary of the run's tokenizer (or `vocab_size` as a bound)."""
    try:
        sizes = SambaConfig.from_preset(config.preset, vocab_size=vocab_size)
    except (ValueError, KeyError) as error:
        raise InputError(f"--preset: {error.args[0] if error.args else error}") from error
    try:
        changed = sizes.changed(**config.expert_changes)
    except ValueError as error:
        raise InputError(f"experts: {error}") from error
    if changed.num_experts == 0 and config.expert_changes.keys() - {"num_experts"}:
        first = next(name for name in config.expert_changes if name != "num_experts")
        flag = flag_of("expert_size" if first == "intermediate_size" else first)
        raise InputError(f"{flag}: needs --num-experts of at least 2, got a model without experts")
    return changed


def initial_model(config: TrainConfig, data: PreparedData, out: Path) -> SambaForCausalLM:
    """The run's model before its first step, in float32.

    Args:
        config: `preset` and `seed`, or `init`, decide.
        data: the run's.
        out: folder of the run, which keeps a copy of the model of `init`: a resumed run needs no other folder.

    Raises:
        InputError: the model of `init` cannot be loaded or has another tokenizer than the data.
        RunError: the copy is lost or damaged.
    """
    torch.manual_seed(config.seed)
    if config.init is None:
        mark = mark_of(data.tokenizer)
        sizes = model_config(config, data.vocab_size)
        return SambaForCausalLM(sizes.changed(bos_token_id=mark, eos_token_id=mark))
    folder = out / FOLDER
    if not folder.exists():
        try:
            loaded = load_run(config.init)
        except InputError as error:
            raise _of_init(error) from None
        if loaded.tokenizer.to_str() != data.tokenizer.to_str():
            raise InputError(
                f"--tokenizer: expected the one that the model of --init {config.init} was trained with, got another"
            )
        with new_folder(folder) as temporary:
            loaded.model.save_pretrained(temporary)
    try:
        return SambaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise RunError(f"init: the model in {folder} cannot be loaded: {error}; start a new run") from error


def _of_init(error: InputError) -> InputError:
    return InputError(str(error).replace("RUN:", "--init:", 1))
