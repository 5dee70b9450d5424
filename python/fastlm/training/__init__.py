"""Training on plain text: data, tokenizer, packed batches, the loop, checkpoints and the run record."""

from fastlm.training.config import TrainConfig, make_config, read_config_file
from fastlm.training.errors import InputError, RunError
from fastlm.training.objective import CrossEntropy, Objective, StepNumbers, StepObjective
from fastlm.training.record import RunRecord, load_record
from fastlm.training.trainer import resume, train

__all__ = [
    "CrossEntropy",
    "InputError",
    "Objective",
    "RunError",
    "RunRecord",
    "StepNumbers",
    "StepObjective",
    "TrainConfig",
    "load_record",
    "make_config",
    "read_config_file",
    "resume",
    "train",
]
