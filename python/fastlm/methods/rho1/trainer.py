"""transformers' `Trainer` with the selective loss of Rho-1. Needs the extra `fastlm[hf]`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

try:
    import transformers
except ImportError as error:
    raise ImportError(
        f"fastlm.methods.rho1.Trainer needs transformers 5: pip install 'fastlm[hf]' ({error})"
    ) from error

from fastlm import ops
from fastlm.methods.rho1.head import HeadInputs, fused_cross_entropy, next_tokens
from fastlm.methods.rho1.patch import REQUEST, LossRequest, install
from fastlm.methods.rho1.selection_log import SelectionLog

Score = Literal["excess", "ref_loss", "loss"]
Scope = Literal["batch", "sequence", "global"]
_CHOICES = {
    "score": ("excess", "ref_loss", "loss"),
    "scope": ("batch", "sequence", "global"),
    "tie_break": ("index", "random"),
}


class Trainer(transformers.Trainer):  # type: ignore[misc]  # untyped base
    """Trains any causal language model on the chosen tokens alone.

    Each training step runs the whole batch through the model, ranks its tokens by `score`, and takes the mean loss of the
    `keep_ratio` best. Losses come from the hidden states (`ops.slm_loss`): no logits are stored. Evaluation is plain
    cross-entropy over all tokens, so `eval_loss` compares with other runs; the training loss, a mean over hard tokens, does
    not.

    Args:
        args, kwargs: of `transformers.Trainer`. `data_collator` is a `rho1.Collator`, or anything that puts `ref_nll` into
            the batches.
        keep_ratio: share of the eligible tokens to learn from, in [0, 1]. Eligible are tokens that have a label, are not padding, and
            have a finite score.
        score: `"excess"`: loss minus reference loss; `"ref_loss"`: low reference loss first; `"loss"`: high loss first, needs
            no reference.
        scope: where the ranking happens: `"batch"`, one micro-batch of one process; `"sequence"`, each row; `"global"`, the
            micro-batches of all processes together.
        normalizer: what the sum of the chosen losses is divided by. `"selected"`: the number of chosen tokens of the whole
            optimizer step, over all micro-batches and processes; `"valid"`: its number of labels (the loss is then
            `keep_ratio` times as large, and so is the gradient); a number: itself.
        tie_break: among equal scores the first (`"index"`), or some by a seed that changes with every step (`"random"`).
        z_loss: factor of the squared log-sum-exp of chosen tokens.

    Raises:
        ValueError: a setting out of its range; a setting of `TrainingArguments` that the loss cannot follow (label smoothing,
            Liger kernels, several GPUs in one process); a model whose head cannot be fused (see `patch_loss`); batches
            without what the score needs.

    Note:
        Under gradient accumulation and data parallelism the gradient is that of one mean over all chosen tokens of the step,
        also when micro-batches have different numbers of labels. The routers' auxiliary loss is averaged over micro-batches
        and processes. Every line of the training log has, beside `loss`: `full_loss` (cross-entropy of all tokens),
        `selected_fraction`, `score_selected` and `score_unselected` (means), `selection_threshold`, `nonfinite_scores`. A
        warning tells when more than a tenth of the tokens tie at the threshold.

    Source: Lin et al., arXiv 2404.07965, equations 3 to 5; docs/methods/rho1_transformers.md.

    Example:
        >>> from fastlm.methods import rho1
        >>> trainer = rho1.Trainer(  # doctest: +SKIP
        ...     model, args, train_dataset=rows, data_collator=rho1.Collator("scores", pad_token_id=0), keep_ratio=0.6
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        keep_ratio: float = 0.6,
        score: Score = "excess",
        scope: Scope = "batch",
        normalizer: Literal["selected", "valid"] | float = "selected",
        tie_break: Literal["index", "random"] = "index",
        z_loss: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if not 0 <= keep_ratio <= 1:
            raise ValueError(f"rho1.Trainer: keep_ratio must be in [0, 1], got {keep_ratio}")
        for name, value in (("score", score), ("scope", scope), ("tie_break", tie_break)):
            _check_choice(name, value, _CHOICES[name])
        if isinstance(normalizer, str):
            _check_choice("normalizer", normalizer, ("selected", "valid"))
        elif not (math.isfinite(normalizer) and normalizer > 0):
            raise ValueError(f"rho1.Trainer: normalizer must be a positive number, got {normalizer}")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "rho1.Trainer: compute_loss_func must not be given, the loss is the selective one"
            )
        self.keep_ratio, self.score, self.scope = keep_ratio, score, scope
        self.normalizer, self.tie_break, self.z_loss = normalizer, tie_break, z_loss
        self._selection_log = SelectionLog(score)
        self._micro_batch = 0  # within the optimizer step
        self._loss_alone = False  # nobody reads the logits of this evaluation
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"rho1.Trainer: label_smoothing_factor must be 0, got {self.args.label_smoothing_factor}"
            )
        if self.args.use_liger_kernel:
            raise ValueError("rho1.Trainer: use_liger_kernel must be False: the head is fused already")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"rho1.Trainer: expected one process per GPU (torchrun or accelerate launch), "
                f"got {self.args.n_gpu} GPUs in one process"
            )
        install(self.model)

    def call_model_init(self, trial: Any = None) -> Any:
        """A new model learns to take the loss, too."""
        model = super().call_model_init(trial)
        install(model)
        return model

    # Training

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | float | None]:
        """The micro-batches of a step, and what the sum of its losses over all processes is divided by."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batch = 0
        return samples, self._denominator(samples) if samples else None

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Any:
        """The selective loss in training mode, plain cross-entropy in evaluation mode; arguments of the base class.

        `num_items_in_batch` is what `get_batch_samples` returned; without it, in training mode, the loss is normalized over
        this batch.
        """
        batch = {name: value for name, value in inputs.items() if name != "ref_nll"}
        if not model.training:
            if self._loss_alone:
                batch[REQUEST] = LossRequest(fused_cross_entropy)
            return super().compute_loss(model, batch, return_outputs, num_items_in_batch)
        if batch.get("labels") is None:
            raise ValueError("rho1.Trainer: expected labels in every batch, found none")
        normalizer = self.normalizer
        if num_items_in_batch is not None:  # processes are averaged, so each divides by its share
            normalizer = float(num_items_in_batch) / self.args.world_size
        steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        loss = partial(self._selective_loss, ref_nll=self._reference(inputs), normalizer=normalizer)
        batch[REQUEST] = LossRequest(loss, aux_weight=1 / steps, padding_predicts=False)
        outputs = model(**batch)
        self._micro_batch += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _selective_loss(
        self, parts: HeadInputs, _num_items: Any, *, ref_nll: Tensor | None, normalizer: Any
    ) -> Tensor:
        loss, stats = ops.slm_loss(
            parts.hidden,
            parts.weight,
            parts.targets,
            ref_nll,
            keep_ratio=self.keep_ratio,
            scope=self.scope if self.args.world_size > 1 or self.scope != "global" else "batch",
            score=self.score,
            bias=parts.bias,
            softcap=parts.softcap,
            z_loss=self.z_loss,
            normalizer=normalizer,
            tie_break=self.tie_break,
            seed=self._seed(),
            return_stats=True,
        )
        self._selection_log.add(stats, parts.targets, ref_nll)
        result: Tensor = loss
        return result

    def _seed(self) -> int:
        """Of random ties: known from the position alone, so that a resumed run draws what it would have drawn."""
        process = 0 if self.scope == "global" else self.args.process_index
        return int(
            self.args.seed + 1_000_003 * self.state.global_step + 10_007 * self._micro_batch + 101 * process
        )

    def _reference(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The batch's reference losses, if the score is made of them."""
        if self.score == "loss":
            return None
        reference = batch.get("ref_nll")
        if reference is None:
            raise ValueError(
                f"rho1.Trainer: score {self.score!r} needs ref_nll in every batch, found {', '.join(batch)}; use a rho1.Collator "
                "with a store, or score='loss'"
            )
        if reference.shape != batch["input_ids"].shape:
            raise ValueError(
                f"rho1.Trainer: ref_nll must have the shape of input_ids, {tuple(batch['input_ids'].shape)}, "
                f"got {tuple(reference.shape)}"
            )
        result: Tensor = reference
        return result

    def _denominator(self, samples: list[Mapping[str, Any]]) -> float:
        """Chosen tokens (or labels) of the whole step, over all micro-batches and processes.

        Known before the first backward pass, since the number of chosen tokens follows from that of the eligible ones; only a loss
        that turns out not to be finite is counted in vain.
        """
        if not isinstance(self.normalizer, str):
            return float(self.normalizer)
        valid = [_predictions(batch) for batch in samples]
        if self.normalizer == "valid":
            return max(1.0, float(self._total(torch.stack([mask.sum() for mask in valid]).sum())))
        if self.score != "loss":
            references = [self._reference(batch) for batch in samples]
            valid = [m & r.isfinite() for m, r in zip(valid, references, strict=True) if r is not None]
        if self.scope == "sequence":
            counts = torch.cat([mask.sum(-1).flatten() for mask in valid])
        else:
            counts = torch.stack([mask.sum() for mask in valid])
        if self.scope == "global":
            return max(1.0, float(self._chosen(self._total(counts))))
        return max(1.0, float(self._total(self._chosen(counts))))

    def _chosen(self, eligible: Tensor) -> Tensor:
        """Number of chosen tokens, summed over groups with so many eligible ones."""
        some = (eligible > 0).long() if self.keep_ratio > 0 else torch.zeros_like(eligible)
        rounded = torch.floor(self.keep_ratio * eligible.double() + 0.5).long()
        return torch.minimum(torch.maximum(rounded, some), eligible).sum()

    def _total(self, value: Tensor) -> Tensor:
        """Sum over all processes."""
        result: Tensor = self.accelerator.reduce(value.to(self.args.device), "sum")
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what the selection did to the lines of the training loss."""
        if "loss" in logs:
            found, tied = self._selection_log.flush(self._total)
            logs = {**logs, **found}
            if tied and self.is_world_process_zero():
                way_out = (
                    "; of equal tokens the first in the batch are kept, consider tie_break='random'"
                    if self.tie_break == "index"
                    else ""
                )
                warnings.warn(
                    "rho1.Trainer: more than 10 % of the eligible tokens have the very score at which the selection "
                    f"ends, as when model and reference are the same{way_out}",
                    stacklevel=2,
                )
        super().log(logs, *args, **kwargs)

    # Evaluation

    def prediction_step(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As in the base class; where the loss is all that is asked for, no logits are made."""
        inputs = {name: value for name, value in inputs.items() if name != "ref_nll"}
        self._loss_alone = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._loss_alone = False


def _predictions(batch: Mapping[str, Any]) -> Tensor:
    """Where a batch has something to predict, `(B, L)`; as the patched forward sees it."""
    if batch.get("labels") is None:
        raise ValueError("rho1.Trainer: expected labels in every batch, found none")
    shifted = batch.get("shift_labels")
    targets = next_tokens(batch["labels"]) if shifted is None else shifted
    mask = batch.get("attention_mask")
    valid = targets != -100
    return valid & (mask != 0) if mask is not None and mask.shape == targets.shape else valid


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"rho1.Trainer: {name} must be among {', '.join(map(repr, known))}, got {value!r}")
