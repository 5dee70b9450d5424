"""Opens a trained model with its tokenizer, from a run, one of its checkpoints, or a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from fastlm.models.samba import SambaForCausalLM
from fastlm.training.checkpoint import CheckpointFolder
from fastlm.training.errors import InputError
from fastlm.training.tokenizer import load_tokenizer, mark_of


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use."""

    model: SambaForCausalLM
    tokenizer: Tokenizer
    folder: Path  # where the weights came from
    tokenizer_file: Path

    @property
    def end_token(self) -> int:
        """The mark before and after every document."""
        return mark_of(self.tokenizer)


def load_run(path: Path) -> LoadedModel:
    """Loads the finished model of a run, else its newest checkpoint, else `path` itself as a model folder.

    Raises:
        InputError: nothing usable at `path`; the text says what was looked for, or which file is damaged.
    """
    folder, tokenizer_file = find_model(path)
    try:
        model = SambaForCausalLM.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"RUN: the model in {folder} cannot be loaded: {error}") from error
    tokenizer = load_tokenizer(tokenizer_file)
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise InputError(
            f"RUN: expected a tokenizer of at most {model.config.vocab_size} tokens in {tokenizer_file}, "
            f"found {tokenizer.get_vocab_size()}"
        )
    return LoadedModel(model.eval(), tokenizer, folder, tokenizer_file)


def find_model(path: Path) -> tuple[Path, Path]:
    """The folder with the weights, and the tokenizer's file, of what `load_run` loads.

    Raises:
        InputError: nothing usable at `path`.
    """
    if not path.is_dir():
        raise InputError(f"RUN: expected the folder of a run or a model, found none at {path}")
    if (path / "model" / "config.json").exists():
        return path / "model", path / "model" / "tokenizer.json"
    checkpoints = CheckpointFolder(path)
    if steps := checkpoints.steps():
        return checkpoints.folder(steps[-1]), path / "data" / "tokenizer.json"
    if (path / "config.json").exists():
        if (path / "tokenizer.json").exists():
            return path, path / "tokenizer.json"
        if path.parent.name == "checkpoints":
            return path, path.parent.parent / "data" / "tokenizer.json"
        raise InputError(f"RUN: expected tokenizer.json beside the model in {path}, found none")
    raise InputError(
        f"RUN: expected a run (with model/ or checkpoints/) or a model (config.json, tokenizer.json) in "
        f"{path}, found "
        "neither; a run that has just begun has no checkpoint yet"
    )
