"""The training loop: from a configuration to a finished model, through any number of interruptions.

What decides the weights is the configuration, the schedule (fixed once, stored) and the position. A run that
was killed goes on from its newest checkpoint and does the very same steps again, so the final weights have
the same bits as those of a run that was never disturbed (same machine, same number of threads).
"""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fastlm
from fastlm.layers import Routing
from fastlm.models.samba import SambaConfig
from fastlm.training.atomic import new_folder
from fastlm.training.batches import PackedSampler
from fastlm.training.checkpoint import CheckpointFolder, Position
from fastlm.training.config import TrainConfig, reason
from fastlm.training.data import PreparedData, prepare_data
from fastlm.training.errors import InputError, RunError
from fastlm.training.evaluation import Evaluation, evaluate, held_out_rows
from fastlm.training.initial import check_model, initial_model
from fastlm.training.log import RunLog
from fastlm.training.memory import peak_memory_bytes
from fastlm.training.objective import CrossEntropy, Objective
from fastlm.training.progress import QuietReporter, Reporter, StepReport
from fastlm.training.record import RunRecord
from fastlm.training.run_folder import RunLock, create_run, reopen_run
from fastlm.training.schedule import (
    Schedule,
    enough_measured,
    fixed_schedule,
    learning_rate,
    measured_schedule,
)
from fastlm.training.stopping import StopRequestedError, StopRequests

RATE_STEPS = 10  # the shown tokens per second are a mean over so many steps


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    loss: float  # what was minimised, nats per token that counts
    bits_per_byte: float | None  # None where not every token's loss was computed
    grad_norm: float
    tokens: int
    seconds: float
    log: dict[str, Any]  # what else the objective knows


def train(
    config: TrainConfig,
    out: Path,
    *,
    objective: Objective | None = None,
    reporter: Reporter | None = None,
) -> RunRecord:
    """Trains a model into the new folder `out`.

    Args:
        config: what to train, on what, for how long.
        out: new or empty folder of the run.
        objective: what is minimised; default: the cross-entropy of every token. A run with `loss` slm gets its objective from
            `fastlm.methods.rho1.train`.
        reporter: sees the progress; default: warnings only.

    Returns:
        The record; its `status` is `finished`, or `interrupted` after SIGINT or SIGTERM (a checkpoint was
        written).

    Raises:
        InputError: a setting, the data or `out` cannot be used.
        RunError: the run cannot go on: disk full, loss not finite. The newest whole checkpoint stays.
    """
    objective = _objective_of(config, objective, "train(config, out)")
    check_model(config)
    used: dict[str, Any] = {"lr": config.peak_lr}  # the record says what was used
    if config.loss == "slm":
        used |= {"score": config.token_score, "keep": config.keep_ratio}
    config = config.model_copy(update=used)
    dtype = resolve_dtype(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    record, lock = create_run(out, config, dtype=dtype, threads=torch.get_num_threads())
    return _run(out, record, lock, objective, reporter or QuietReporter())


def resume(
    out: Path,
    *,
    given: dict[str, Any] | None = None,
    objective: Objective | None = None,
    reporter: Reporter | None = None,
) -> RunRecord:
    """Goes on with the run in `out` from its newest checkpoint; a finished run is returned as it is.

    Args:
        out: folder of the run.
        given: settings that the caller insists on; they must equal the run's.
        objective: as in `train`; `fastlm.methods.rho1.resume` gives it for a run with `loss` slm.
        reporter: sees the progress.

    Raises:
        InputError: there is no run, its checkpoint is damaged, or a setting differs.
        RunError: as in `train`.
    """
    reporter = reporter or QuietReporter()
    record, lock = reopen_run(out, given or {})
    if record.status == "finished":
        lock.release()
        return record
    try:
        objective = _objective_of(record.config, objective, "resume(out)")
    except InputError:
        lock.release()
        raise
    if torch.get_num_threads() != record.threads:
        torch.set_num_threads(record.threads)  # sums are split by thread in torch's matrix products
    level, saved = fastlm.cpu_capability(), record.environment.get("cpu_capability")
    if level != saved:
        reporter.warn(f"the run began with CPU level {saved}, now it is {level}: last bits may differ")
    return _run(out, record, lock, objective, reporter)


def _objective_of(config: TrainConfig, objective: Objective | None, call: str) -> Objective:
    if objective is not None:
        return objective
    if config.loss != "ce":
        raise InputError(
            f"loss: a run with loss {config.loss} needs its objective: call fastlm.methods.rho1.{call}"
        )
    return CrossEntropy()


def resolve_dtype(config: TrainConfig) -> str:
    """`auto` is bf16 only where the CPU multiplies bf16 natively; elsewhere it is slower and coarser."""
    if config.dtype != "auto":
        return config.dtype
    return "bf16" if fastlm.cpu_capability() == "avx512_bf16" else "fp32"


def _run(out: Path, record: RunRecord, lock: RunLock, objective: Objective, reporter: Reporter) -> RunRecord:
    try:
        return Trainer(out, record, objective, reporter).run()
    except OSError as error:
        raise RunError(
            f"run: could not write to {out}: {reason(error)}; whole checkpoints are untouched. "
            f"Make room, then: fastlm train samba --out {out} --resume"
        ) from error
    finally:
        reporter.close()
        lock.release()


class Trainer:
    """One process's work on one run; made by `train` and `resume`."""

    def __init__(self, out: Path, record: RunRecord, objective: Objective, reporter: Reporter) -> None:
        self.out, self.record, self.objective, self.reporter = out, record, objective, reporter
        self.config = record.config
        self.log = RunLog(out)
        self.checkpoints = CheckpointFolder(out, keep=self.config.keep_checkpoints)
        self.checkpoints.clean()
        self.schedule = Schedule(**record.schedule) if record.schedule else None
        if self.schedule is None and self.config.steps is not None:
            self.schedule = fixed_schedule(self.config)
        self.data = self._prepare_data()
        self.sizes = torch.tensor([len(spelling) for spelling in self.data.spelling()])
        record.objective = objective.prepare(
            self.config, self.data, record.dtype, record.objective, reporter.warn
        )
        self.model = initial_model(self.config, self.data, out).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.config.peak_lr,
            betas=(self.config.beta1, self.config.beta2),
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        self.sampler = PackedSampler(
            self.data.train,
            row_tokens=self.config.micro_batch,
            seq_len=self.config.seq_len,
            seed=self.config.seed,
        )
        self.step, self.tokens, self.train_seconds = 0, 0, 0.0
        self.step_seconds: list[float] = []  # measured while the schedule is open
        self.rates: deque[tuple[int, float]] = deque(maxlen=RATE_STEPS)
        self.evaluation_seconds = 0.0

    def run(self) -> RunRecord:
        """Trains from where the run stands to its end, or to the next signal."""
        self._load_newest()
        self.record.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self._save_record("running")
        with StopRequests() as stop:
            try:
                self._steps(stop)
                self._finish(stop)
            except StopRequestedError:
                self.checkpoints.save(self.model, self.optimizer, self._position())
                self.record.environment["stopped_by"] = signal.Signals(
                    stop.signal_number or signal.SIGINT
                ).name
                self._save_record("interrupted")
        return self.record

    def _prepare_data(self) -> PreparedData:
        vocab_size = self.config.vocab_size or SambaConfig.from_preset(self.config.preset).vocab_size
        data = prepare_data(
            self.out / "data", self.config, vocab_size, self.reporter.stage, self.reporter.warn
        )
        if data.train.num_tokens < self.config.batch_tokens:
            self.reporter.warn(
                f"the training text is shorter than one step ({data.train.num_tokens} of "
                f"{self.config.batch_tokens} "
                "tokens): it will be repeated many times"
            )
        self.record.data = asdict(data.summary)
        return data

    def _load_newest(self) -> None:
        steps = self.checkpoints.steps()
        if steps:
            position = self.checkpoints.load(steps[-1], self.model, self.optimizer)
            self.step, self.tokens, self.train_seconds = (
                position.step,
                position.tokens,
                position.train_seconds,
            )
            if position.schedule is not None:
                self.schedule = Schedule(**position.schedule)
            self.reporter.stage(f"going on after step {self.step}")
        self.log.rewind(self.step if steps else -1)

    def _steps(self, stop: StopRequests) -> None:
        began = last_saved = time.monotonic()
        if self.step == 0:
            self._evaluate(stop)
        while self.schedule is None or self.step < self.schedule.total_steps:
            stop.check()
            result = self._one_step()
            self._report(result, began)
            if self.schedule is None:
                self._fix_schedule(result, time.monotonic() - began)
            elif self.schedule.evaluates_at(self.step):
                self._evaluate(stop)
            every = self.config.checkpoint_steps
            now = time.monotonic()
            if now - last_saved > 60 * self.config.checkpoint_minutes or (every and self.step % every == 0):
                self.checkpoints.save(self.model, self.optimizer, self._position())
                self._save_record("running")
                last_saved = time.monotonic()
        self.checkpoints.save(self.model, self.optimizer, self._position())

    def _one_step(self) -> StepResult:
        """Forward and backward over the step's rows, then the update."""
        started = time.monotonic()
        config = self.config
        count = config.batch_tokens // config.micro_batch
        rows = [self.sampler.row(self.step * count + i) for i in range(count)]
        rate = learning_rate(
            self.step,
            self.schedule.warmup_steps if self.schedule else config.warmup_steps,
            self.schedule.total_steps if self.schedule else None,
            peak=config.peak_lr,
            min_ratio=config.min_lr_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        seed = (
            config.seed + 1_000_003 * (self.step + 1)
        ) % 2**63  # chance depends on the run and the step alone
        if self.model.config.num_experts:  # routers sample
            torch.manual_seed(seed)
        losses = self.objective.begin(rows, seed)
        for index in range(count):
            routing: list[Routing] | None = [] if self.model.config.num_experts else None
            total = losses.loss(self.model, index, self.record.dtype, routing)
            if routing:
                total = total + self.model.auxiliary_loss(routing) / count
            total.backward()
        done = losses.numbers()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip))
        if not (math.isfinite(done.loss) and math.isfinite(norm)):
            raise self._diverged(done.loss, norm)
        self.optimizer.step()
        self.step += 1
        self.tokens += config.batch_tokens
        seconds = time.monotonic() - started
        self.train_seconds += seconds
        bits = None
        if done.nats is not None:
            num_bytes = sum(int(self.sizes[row.targets].sum()) for row in rows)
            bits = done.nats / math.log(2) / max(1, num_bytes)
        if done.warning is not None:
            self.reporter.warn(done.warning)
        return StepResult(done.loss, bits, norm, config.batch_tokens, seconds, done.log)

    def _diverged(self, loss: float, norm: float) -> RunError:
        steps = self.checkpoints.steps()
        safe = (
            f"the checkpoint of step {steps[-1]} is from before" if steps else "no checkpoint was written yet"
        )
        return RunError(
            f"training: step {self.step} gave loss {loss} and gradient norm {norm}, expected finite "
            f"numbers; {safe}. "
            f"Start again with a smaller --lr than {self.config.peak_lr:g}"
        )

    def _report(self, result: StepResult, began: float) -> None:
        self.rates.append((result.tokens, result.seconds))
        rate = sum(tokens for tokens, _ in self.rates) / max(1e-9, sum(seconds for _, seconds in self.rates))
        left: float | None = None
        total = self.schedule.total_steps if self.schedule else None
        if total is not None:
            left = (total - self.step) * result.tokens / rate
        elif self.config.budget_seconds is not None:
            left = max(0.0, self.config.budget_seconds - (time.monotonic() - began))
        self.reporter.step(StepReport(self.step, total, result.loss, result.bits_per_byte, rate, left))
        self.log.append(
            kind="step",
            step=self.step,
            loss=result.loss,
            bits_per_byte=None if result.bits_per_byte is None else round(result.bits_per_byte, 6),
            lr=self.optimizer.param_groups[0]["lr"],
            grad_norm=result.grad_norm,
            tokens=self.tokens,
            seconds=round(self.train_seconds, 4),
            **result.log,
        )

    def _fix_schedule(self, result: StepResult, elapsed: float) -> None:
        self.step_seconds.append(result.seconds)
        if enough_measured(self.config, self.step_seconds):
            self.schedule = measured_schedule(
                self.config,
                step=self.step,
                step_seconds=self.step_seconds,
                elapsed=elapsed,
                evaluation_seconds=self.evaluation_seconds,
            )
            self._save_record("running")  # before the first step that depends on it

    def _evaluate(self, stop: StopRequests, tokens: int | None = None) -> Evaluation:
        """Held-out loss over the fixed part of `tokens` tokens (default: `eval_tokens`), logged."""
        started = time.monotonic()
        rows = held_out_rows(
            self.data,
            row_tokens=self.config.micro_batch,
            seq_len=self.config.seq_len,
            max_tokens=tokens or self.config.eval_tokens,
        )
        done = evaluate(self.model, self.data, rows, dtype=self.record.dtype, between=stop.check)
        self.evaluation_seconds = time.monotonic() - started
        self.reporter.evaluation(self.step, done.bits_per_byte)
        self.log.append(
            kind="evaluation",
            step=self.step,
            loss=done.loss,
            bits_per_byte=done.bits_per_byte,
            tokens=done.tokens,
            seconds=round(self.train_seconds, 4),
        )
        return done

    def _finish(self, stop: StopRequests) -> None:
        """Last evaluation, the model for use, the result."""
        assert self.schedule is not None
        self.reporter.stage("reading the held-out text")
        done = self._evaluate(stop, self.schedule.final_eval_tokens)
        folder = self.out / "model"
        if not folder.exists():
            with new_folder(folder) as temporary:
                self.model.save_pretrained(temporary)
                self.data.tokenizer.save(str(temporary / "tokenizer.json"))
        self.record.result = {
            "bits_per_byte": done.bits_per_byte,
            "loss": done.loss,
            "held_out_tokens": done.tokens,
            "held_out_bytes": done.bytes,
            "tokens_per_second": self.tokens / max(1e-9, self.train_seconds),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        with suppress(KeyError):
            del self.record.environment["stopped_by"]
        self._save_record("finished")

    def _position(self) -> Position:
        schedule = None if self.schedule is None else asdict(self.schedule)
        return Position(self.step, self.tokens, self.train_seconds, schedule)

    def _save_record(self, status: Any) -> None:
        self.record.status = status
        self.record.step, self.record.tokens, self.record.train_seconds = (
            self.step,
            self.tokens,
            self.train_seconds,
        )
        self.record.schedule = None if self.schedule is None else asdict(self.schedule)
        self.record.save(self.out)
