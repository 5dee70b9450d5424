"""Settings are checked once with flag, expected and found; the schedule depends on what is stored alone."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.training import InputError, TrainConfig, make_config, read_config_file
from fastlm.training.schedule import (
    Schedule,
    enough_measured,
    fixed_schedule,
    learning_rate,
    measured_schedule,
)

# Settings


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lr": -1}, r"--lr: Input should be greater than 0, got -1"),
        ({"lr": float("nan")}, r"--lr: Input should be a finite number, got nan"),
        ({"seq_len": 1}, r"--seq-len: Input should be greater than or equal to 2, got 1"),
        ({"dtype": "fp8"}, r"--dtype: Input should be 'auto', 'fp32' or 'bf16', got 'fp8'"),
        ({"steps": 0}, r"--steps: Input should be greater than 0, got 0"),
        ({"minutes": 1.0, "steps": 3}, r"minutes and steps must not both be given"),
        (
            {"batch_tokens": 100, "micro_batch_tokens": 33},
            r"micro_batch_tokens must divide batch_tokens 100, got 33",
        ),
        ({"learning_rate": 1}, r"--learning-rate: is no setting of a run; known: architecture, data, .*"),
        ({"held_out": 1.0}, r"--held-out: Input should be less than 1, got 1.0"),
        ({"vocab_size": 256}, r"--vocab-size: Input should be greater than or equal to 257, got 256"),
    ],
)
def test_a_wrong_setting_names_flag_expected_and_found(values: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        make_config(values)


def test_a_config_survives_its_record() -> None:
    config = make_config({"data": Path("text"), "steps": 7, "dtype": "bf16"})
    assert config.data == Path("text").absolute()
    assert TrainConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_files_of_settings(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"steps": 3}')
    (tmp_path / "run.json").write_text('{"format": "x", "config": {"steps": 4}}')
    assert read_config_file(tmp_path / "a.json") == {"steps": 3}
    assert read_config_file(tmp_path / "run.json") == {"steps": 4}
    (tmp_path / "a.toml").write_text("steps = 5\n")
    if sys.version_info >= (3, 11):
        assert read_config_file(tmp_path / "a.toml") == {"steps": 5}
    else:
        with pytest.raises(InputError, match=r"needs Python 3.11"):
            read_config_file(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.json", b"{", "is not valid JSON"),
        ("a.json", b"[1]", "expected settings by name .*, got a list"),
        ("a.yaml", b"steps: 1", "expected a .json or .toml file, got a.yaml"),
        ("a.json", b"\xff", "cannot read"),
    ],
)
def test_a_wrong_file_of_settings_is_a_clear_error(
    tmp_path: Path, name: str, content: bytes, text: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=text):
        read_config_file(tmp_path / name)
    with pytest.raises(InputError, match="No such file"):
        read_config_file(tmp_path / "missing.json")


# Schedule


@given(warmup=st.integers(0, 30), total=st.integers(1, 200), ratio=st.floats(0, 1))
def test_the_rate_rises_to_its_peak_and_falls_to_its_end(warmup: int, total: int, ratio: float) -> None:
    total = max(total, warmup + 1)
    rates = [learning_rate(step, warmup, total, peak=1.0, min_ratio=ratio) for step in range(total)]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[-1] == pytest.approx(ratio)
    if warmup:
        assert rates[warmup - 1] == 1.0


def test_warm_up_does_not_depend_on_the_length_which_is_still_unknown_then() -> None:
    for step in range(20):
        assert learning_rate(step, 20, None, peak=1.0, min_ratio=0.1) == learning_rate(
            step, 20, 500, peak=1.0, min_ratio=0.1
        )


def test_steps_fix_the_schedule_at_once() -> None:
    schedule = fixed_schedule(make_config({"steps": 100, "evaluations": 4}))
    assert schedule == Schedule(20, 100, 20, 262_144)
    assert [step for step in range(101) if schedule.evaluates_at(step)] == [20, 40, 60, 80]
    assert fixed_schedule(make_config({"steps": 2})).total_steps == 2
    assert fixed_schedule(make_config({"steps": 9, "evaluations": 0})).evaluates_at(5) is False


@pytest.mark.parametrize("per_step", [0.01, 0.2, 3.0])
def test_a_budget_becomes_steps_that_fit_into_it(per_step: float) -> None:
    config = make_config({"minutes": 2.0})
    measured: list[float] = []
    while not enough_measured(config, measured):
        measured.append(per_step * (3 if not measured else 1))  # the first step pays for start-up
    evaluation = per_step
    schedule = measured_schedule(
        config,
        step=len(measured),
        step_seconds=measured,
        elapsed=sum(measured) + evaluation,
        evaluation_seconds=evaluation,
    )
    evaluations = len([s for s in range(schedule.total_steps) if schedule.evaluates_at(s)])
    final = evaluation * schedule.final_eval_tokens / config.eval_tokens
    spent = sum(measured) + evaluation * (1 + evaluations) + final
    spent += (schedule.total_steps - len(measured)) * per_step
    assert 0.85 * 120 <= spent <= 1.05 * 120
    assert schedule.warmup_steps <= max(len(measured), schedule.total_steps // 4)
    assert Schedule(**asdict(schedule)) == schedule


def test_a_step_longer_than_the_budget_ends_after_the_measured_ones() -> None:
    config = make_config({"minutes": 0.1})
    measured = [10.0, 10.0, 10.0]
    assert enough_measured(config, measured)
    schedule = measured_schedule(config, step=3, step_seconds=measured, elapsed=30.0, evaluation_seconds=5.0)
    assert schedule.total_steps == 4
