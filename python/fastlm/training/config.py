"""One description of a run: command-line flags, config file and saved run record are this object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastlm.models.samba.presets import peak_learning_rate
from fastlm.training.errors import InputError


class TrainConfig(BaseModel):
    """Everything that decides the outcome of a training run, besides the machine.

    Exactly one of `minutes` and `steps` sets the length; with neither it is 2 minutes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    architecture: Literal["samba"] = Field("samba", description="model family")
    data: Path | None = Field(
        None, description="folder or file of text; default: Python's own library source"
    )
    preset: str = Field("demo", description="model size, one of fastlm.models.samba's presets")
    num_experts: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="experts of every feed-forward layer, 0 for none; default: the preset's",
    )
    num_experts_per_tok: int | None = Field(
        None, ge=1, le=8, description="experts a token visits; default: the preset's"
    )
    expert_size: int | None = Field(
        None, ge=1, description="inner width of an expert; default: that of the preset's feed-forward layer"
    )
    router_estimator: Literal["v2", "v2_star", "v1", "topk"] | None = Field(
        None, description="of the router's gradient; topk: no sampling, as in GShard; default: the preset's"
    )
    router_aux_loss_coef: float | None = Field(
        None, ge=0, description="weight of the load-balance loss; default: the preset's"
    )
    tokenizer: Path | None = Field(
        None,
        description="tokenizer.json, or a folder with one, instead of training a tokenizer; default: that of init",
    )
    init: Path | None = Field(
        None, description="run or model whose weights, sizes and tokenizer the run begins with"
    )
    loss: Literal["ce", "slm"] = Field(
        "ce", description="ce: cross-entropy of every token; slm: of those chosen by score (Rho-1)"
    )
    scores: Path | None = Field(None, description="folder of reference losses that `fastlm score` wrote")
    score: Literal["excess", "ref_loss", "ref_entropy", "intersection", "loss", "random"] | None = Field(
        None, description="what tokens are chosen by, with loss slm; default: excess"
    )
    keep: float | None = Field(
        None, ge=0, le=1, description="share of the tokens that are trained on, with loss slm; default: 0.6"
    )
    vocab_size: int | None = Field(None, ge=257, le=1_000_000, description="tokens; default: the preset's")
    minutes: float | None = Field(None, gt=0, le=1e6, description="length of the run in minutes of training")
    steps: int | None = Field(None, gt=0, description="length of the run in optimizer steps")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="arithmetic; weights are always fp32; auto = bf16 where the CPU has it natively"
    )
    seq_len: int = Field(512, ge=2, description="longest piece of one document, in tokens")
    batch_tokens: int = Field(1024, ge=2, description="tokens of one optimizer step")
    micro_batch_tokens: int | None = Field(
        None, ge=2, description="tokens of one forward pass; default: batch_tokens (no gradient accumulation)"
    )
    lr: float | None = Field(None, gt=0, le=10, description="peak learning rate; default: the preset's")
    min_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak"
    )
    warmup_steps: int = Field(20, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled weight decay, on every parameter as Samba does"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second decay")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    seed: int = Field(0, ge=0, lt=2**63, description="of the initial weights and of the order of documents")
    held_out: float = Field(
        0.03, gt=0, lt=1, description="share of files kept away from training for evaluation"
    )
    max_bytes: int | None = Field(None, gt=0, description="most bytes of text, whole files; default: all")
    evaluations: int = Field(
        8, ge=0, description="evaluations during the run, on a fixed part of the held-out text"
    )
    eval_tokens: int = Field(16_384, ge=2, description="held-out tokens of an evaluation during the run")
    final_eval_tokens: int = Field(262_144, ge=2, description="most held-out tokens of the last evaluation")
    checkpoint_minutes: float = Field(5.0, gt=0, description="time between checkpoints, in minutes")
    checkpoint_steps: int | None = Field(
        None, gt=0, description="steps between checkpoints, besides the time"
    )
    keep_checkpoints: int = Field(2, ge=0, description="newest checkpoints that are kept; 0: all")
    threads: int | None = Field(None, gt=0, le=4096, description="CPU threads; default: torch's choice")

    @field_validator("data", "tokenizer", "init", "scores")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return (
            None if value is None else value.expanduser().absolute()
        )  # the record is read from other folders too

    @model_validator(mode="after")
    def _check_lengths(self) -> TrainConfig:
        if self.minutes is not None and self.steps is not None:
            raise ValueError(
                "minutes and steps must not both be given: one of them sets the length of the run"
            )
        micro = self.micro_batch_tokens
        if micro is not None and self.batch_tokens % micro != 0:
            raise ValueError(f"micro_batch_tokens must divide batch_tokens {self.batch_tokens}, got {micro}")
        return self

    @model_validator(mode="after")
    def _check_selection(self) -> TrainConfig:
        if self.loss == "ce":
            for name in ("scores", "score", "keep"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs loss slm, got loss ce")
        elif self.scores is None and self.token_score not in ("loss", "random"):
            raise ValueError(f"scores must be given for score {self.token_score}, got none")
        return self

    @model_validator(mode="after")
    def _check_init(self) -> TrainConfig:
        own = "the model of init has its own"
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError(f"vocab_size must not be given with tokenizer, got {self.vocab_size}")
        if self.init is None:
            return self
        if self.preset != type(self).model_fields["preset"].default:
            raise ValueError(f"preset must not be given with init, got {self.preset}: {own} size")
        if self.vocab_size is not None or self.expert_changes:
            name = "vocab_size" if self.vocab_size is not None else next(iter(self.expert_changes))
            raise ValueError(f"{name} must not be given with init: {own}")
        if self.lr is None:
            raise ValueError(
                "lr must be given with init, got none: no preset knows how far to move a trained model"
            )
        return self

    @property
    def token_score(self) -> str:
        """What tokens are chosen by, in force with `loss` slm."""
        return self.score or "excess"

    @property
    def keep_ratio(self) -> float:
        """Share of the tokens that are trained on, in force with `loss` slm."""
        return 0.6 if self.keep is None else self.keep

    @property
    def expert_changes(self) -> dict[str, Any]:
        """What the run changes in the preset's feed-forward layers, by the names of `SambaConfig`."""
        names = ("num_experts", "num_experts_per_tok", "router_estimator", "router_aux_loss_coef")
        given = {name: getattr(self, name) for name in names} | {"intermediate_size": self.expert_size}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def budget_seconds(self) -> float | None:
        """Seconds of training of a time-limited run, None for one limited by steps."""
        return None if self.steps is not None else 60.0 * (2.0 if self.minutes is None else self.minutes)

    @property
    def peak_lr(self) -> float:
        """The peak learning rate in force."""
        return peak_learning_rate(self.preset) if self.lr is None else self.lr

    @property
    def micro_batch(self) -> int:
        """Tokens of one forward pass."""
        return self.micro_batch_tokens or self.batch_tokens


def flag_of(field: str) -> str:
    """`batch_tokens` → `--batch-tokens`."""
    return "--" + field.replace("_", "-")


def make_config(values: dict[str, Any]) -> TrainConfig:
    """Builds a `TrainConfig`; a wrong value becomes one sentence with flag, expected and found.

    Args:
        values: field name → value.

    Raises:
        InputError: an unknown field or a value out of its range; the first few are named.
    """
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        problems = []
        for item in error.errors()[:3]:
            where = flag_of(str(item["loc"][0])) if item["loc"] else "train"
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                message = f"is no setting of a run; known: {', '.join(TrainConfig.model_fields)}"
            found = f", got {item['input']!r}" if item["loc"] and item["type"] != "extra_forbidden" else ""
            problems.append(f"{where}: {message}{found}")
        raise InputError("; ".join(problems)) from None


def read_config_file(path: Path) -> dict[str, Any]:
    """Reads the settings of a `.json` or `.toml` file (also a `run.json`, whose `config` part is taken).

    Raises:
        InputError: the file cannot be read, is of another kind or holds no settings.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config: cannot read {path}: {reason(error)}") from error
    try:
        if path.suffix == ".json":
            value = json.loads(text)
        elif path.suffix == ".toml":
            try:
                import tomllib  # type: ignore[import-not-found, unused-ignore]
            except ModuleNotFoundError:
                raise InputError(
                    f"--config: {path} needs Python 3.11 to be read; write it as .json"
                ) from None
            value = tomllib.loads(text)
        else:
            raise InputError(f"--config: expected a .json or .toml file, got {path.name}")
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"--config: {path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if isinstance(value, dict) and "config" in value and isinstance(value["config"], dict):
        value = value["config"]
    if not isinstance(value, dict):
        raise InputError(f"--config: expected settings by name in {path}, got a {type(value).__name__}")
    return value


def reason(error: BaseException) -> str:
    """The short human part of an error: `No space left on device` instead of `[Errno 28] …`."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
