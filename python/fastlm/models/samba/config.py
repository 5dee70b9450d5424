"""The configuration of a Samba model: a frozen dataclass in transformers' words, checked when it is made."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastlm.layers.grin_moe import ESTIMATORS, EXPERT_GRADS

MODEL_TYPE = "fastlm_samba"

# What a block may contain before its feed-forward layer, in this order.
BLOCK_KINDS = ("mamba", "sliding_attention", "mamba+sliding_attention")
NORM_TYPES = ("rms_norm", "layer_norm")


@dataclass(frozen=True)
class SambaConfig:
    """Sizes of a Samba model.

    A block is a mixer and a feed-forward layer, each with its norm and residual; the paper counts both, so
    its "24 layers" are 12 blocks here. `layer_pattern` names the mixers of consecutive blocks and repeats:
    `("mamba", "sliding_attention")` is Samba, `("mamba+sliding_attention",)` is Mamba-SWA-MLP, where one
    block holds both mixers.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        num_hidden_layers: blocks.
        layer_pattern: kinds of consecutive blocks, each one of `mamba`, `sliding_attention`,
            `mamba+sliding_attention`.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads; default as many as query heads.
        head_dim: default `hidden_size / num_attention_heads`.
        intermediate_size: inner width of the feed-forward layer.
        sliding_window: tokens a query sees, itself included.
        use_rope: False leaves positions out of the attention (NoPE).
        rope_theta: base of the rotary frequencies.
        state_size, conv_kernel, expand: of the Mamba mixer.
        time_step_rank: default `ceil(hidden_size / 16)`.
        time_step_min, time_step_max, time_step_floor: initial step sizes.
        rms_norm_eps: added to the mean square, or to the variance of a layer norm.
        norm_type: `rms_norm` or `layer_norm` (with bias), of all norms.
        attention_bias, lm_head_bias: biases of the attention's projections and of the output projection.
        tie_word_embeddings: the output projection is the embedding.
        initializer_range: standard deviation of the embedding's initial values.
        num_experts: experts of every feed-forward layer, each `intermediate_size` wide; 0: a dense layer.
        num_experts_per_tok: experts a token visits.
        router_jitter_noise, input_jitter_noise, router_estimator, expert_grad: see `fastlm.layers.GrinMoE`.
        router_aux_loss_coef: weight of the load-balance loss in training; 0: none.
        bos_token_id, eos_token_id, pad_token_id: special tokens, None where there is none.

    Raises:
        ValueError: a field is out of range; the text names field, expected and found value.

    Example:
        >>> config = SambaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=4)
        >>> config.layer_types
        ('mamba', 'sliding_attention', 'mamba', 'sliding_attention')
    """

    vocab_size: int = 32000
    hidden_size: int = 1536
    num_hidden_layers: int = 12
    layer_pattern: tuple[str, ...] = ("mamba", "sliding_attention")
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 4096
    sliding_window: int = 2048
    use_rope: bool = True
    rope_theta: float = 10000.0
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    time_step_rank: int | None = None
    time_step_min: float = 1e-3
    time_step_max: float = 1e-1
    time_step_floor: float = 1e-4
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    norm_type: str = "rms_norm"
    attention_bias: bool = False
    lm_head_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 2
    router_jitter_noise: float = 0.01
    input_jitter_noise: float = 0.01
    router_estimator: str = "v2"
    expert_grad: str = "full"
    router_aux_loss_coef: float = 0.01
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        self._check_positive()
        set_field = (
            object.__setattr__
        )  # the dataclass is frozen; defaults that depend on other fields are filled once, here
        set_field(self, "layer_pattern", tuple(self.layer_pattern))
        if self.num_key_value_heads is None:
            set_field(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                _fail(
                    "num_attention_heads",
                    f"a divisor of hidden_size = {self.hidden_size}",
                    f"{self.num_attention_heads}. Set head_dim to choose it freely.",
                )
            set_field(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.time_step_rank is None:
            set_field(self, "time_step_rank", math.ceil(self.hidden_size / 16))
        self._check_relations()

    def _check_positive(self) -> None:
        """Integers are integers and not below their smallest value; sizes given as None are filled later."""
        may_be_zero = ("router_jitter_noise", "input_jitter_noise", "router_aux_loss_coef")
        least = {"conv_kernel": 2, "num_experts": 0, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "int | None") and value is not None:
                if not isinstance(value, int) or isinstance(value, bool) or value < least.get(field.name, 1):
                    _fail(field.name, f"an integer of at least {least.get(field.name, 1)}", repr(value))
            elif field.type == "float" and field.name in may_be_zero:
                if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                    _fail(field.name, "a number of at least 0", repr(value))
            elif field.type == "float" and not (
                isinstance(value, (int, float)) and value > 0 and math.isfinite(value)
            ):
                _fail(field.name, "a positive number", repr(value))
            elif field.type == "bool" and not isinstance(value, bool):
                _fail(field.name, "True or False", repr(value))

    def _check_relations(self) -> None:
        """Fields fit each other."""
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            expected = f"a divisor of num_attention_heads = {self.num_attention_heads}"
            _fail("num_key_value_heads", expected, str(self.num_key_value_heads))
        if self.use_rope and (self.head_dim or 0) % 2:
            _fail("head_dim", "an even number while use_rope is True", str(self.head_dim))
        if not self.layer_pattern or any(kind not in BLOCK_KINDS for kind in self.layer_pattern):
            _fail("layer_pattern", f"one or more of {', '.join(BLOCK_KINDS)}", repr(self.layer_pattern))
        if self.time_step_min > self.time_step_max:
            _fail("time_step_min", f"at most time_step_max = {self.time_step_max}", str(self.time_step_min))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab_size:
                _fail(name, f"below vocab_size = {self.vocab_size}", str(token))
        for name, known in (
            ("norm_type", NORM_TYPES),
            ("router_estimator", ESTIMATORS),
            ("expert_grad", EXPERT_GRADS),
        ):
            if getattr(self, name) not in known:
                _fail(name, f"one of {', '.join(known)}", repr(getattr(self, name)))
        for name in ("router_jitter_noise", "input_jitter_noise"):
            if getattr(self, name) >= 1:
                _fail(name, "below 1", str(getattr(self, name)))
        if self.num_experts == 1:
            _fail("num_experts", "0 or at least 2", "1")
        most = min(self.num_experts, 8)
        if self.num_experts and self.num_experts_per_tok > most:
            _fail("num_experts_per_tok", f"at most {most}", str(self.num_experts_per_tok))
        if self.lm_head_bias and self.tie_word_embeddings:
            _fail("lm_head_bias", "False while tie_word_embeddings is True", "True")

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Kind of every block, in order."""
        pattern = self.layer_pattern
        return tuple(pattern[i % len(pattern)] for i in range(self.num_hidden_layers))

    @property
    def num_residual_branches(self) -> int:
        """Sub-layers that add to the residual stream: what the paper calls layers."""
        return sum(2 + kind.count("+") for kind in self.layer_types)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> SambaConfig:
        """A published or demo size, see `fastlm.models.samba.presets`; `changes` as in `changed`."""
        from fastlm.models.samba.presets import preset  # presets are instances of this class

        return preset(name).changed(**changes)

    def changed(self, **changes: Any) -> SambaConfig:
        """A copy with some fields replaced; derived fields that had their default follow the new sizes."""
        defaults = {
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
            "time_step_rank": math.ceil(self.hidden_size / 16),
        }
        derived = {name: None for name, default in defaults.items() if getattr(self, name) == default}
        return replace(self, **{**derived, **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields and `model_type`, as JSON knows them."""
        values = asdict(self)
        values["layer_pattern"] = list(self.layer_pattern)
        return {"model_type": MODEL_TYPE, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SambaConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: another `model_type`, or a field this version does not know.
        """
        found = values.get("model_type", MODEL_TYPE)
        if found != MODEL_TYPE:
            _fail("model_type", f'"{MODEL_TYPE}"', repr(found))
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in values.items() if key in known}
        unknown = sorted(
            set(values)
            - known
            - {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version"}
        )
        if unknown:
            raise ValueError(
                f"SambaConfig: unknown field {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        return cls(**given)

    def to_json_file(self, path: str | Path) -> None:
        """Write `to_dict()` as indented JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json_file(cls, path: str | Path) -> SambaConfig:
        """Read what `to_json_file` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, not an object, or not a Samba configuration; the text names the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"SambaConfig: no such file: {path}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"expected a JSON object, got {type(values).__name__}")
            return cls.from_dict(values)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise ValueError(f"{path}: {error}") from error


def _fail(name: str, expected: str, found: str) -> None:
    raise ValueError(f"SambaConfig: {name} must be {expected}, got {found}")
