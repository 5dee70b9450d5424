"""Training with experts: settings, learning, and the same bits after a kill although routers sample."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.models.samba import SambaConfig, SambaForCausalLM
from fastlm.training import InputError, load_record, make_config, resume, train
from fastlm.training.checkpoint import CheckpointFolder
from fastlm.training.initial import model_config
from fastlm.training.log import RunLog
from fastlm.training.progress import QuietReporter, StepReport
from tests.cli.test_cli import SMALL_FLAGS, run
from tests.training.runs import STEPS, assert_same_bits, die_at_write, small_config, start, write_text

MOE: dict[str, Any] = {"num_experts": 5, "expert_size": 20, "router_aux_loss_coef": 0.05}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text")


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(train, small_config(text, **MOE), out)
    process.join(60)
    assert process.exitcode == 0
    return out


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in RunLog(out).read() if entry["kind"] == "step"]


# Settings


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_experts": 5}, {"num_experts": 5, "intermediate_size": 60}),
        (MOE, {"num_experts": 5, "intermediate_size": 20, "router_aux_loss_coef": 0.05}),
        (
            {"num_experts": 9, "num_experts_per_tok": 3, "router_estimator": "topk"},
            {"num_experts": 9, "num_experts_per_tok": 3, "router_estimator": "topk"},
        ),
        ({"num_experts": 0}, {"num_experts": 0, "intermediate_size": 60}),
        ({}, {"num_experts": 0}),
        ({"num_experts": 2, "router_aux_loss_coef": 0.0}, {"router_aux_loss_coef": 0.0}),
    ],
    ids=str,
)
def test_settings_become_sizes(given: dict[str, Any], expected: dict[str, Any]) -> None:
    config = model_config(make_config({"preset": "tiny", **given}), 300)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.vocab_size == 300


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"expert_size": 20}, "--expert-size"),
        ({"num_experts_per_tok": 2}, "--num-experts-per-tok"),
        ({"router_estimator": "v1"}, "--router-estimator"),
        ({"router_aux_loss_coef": 0.1}, "--router-aux-loss-coef"),
        ({"num_experts": 0, "expert_size": 20}, "--expert-size"),
    ],
    ids=str,
)
def test_a_setting_of_experts_without_experts_is_told_before_any_work(
    given: dict[str, Any], flag: str, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"{flag}: needs --num-experts of at least 2, got a model without"):
        train(small_config(text, **given), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "text_of_error"),
    [
        ({"num_experts": -1}, r"--num-experts: Input should be greater than or equal to 0, got -1"),
        ({"num_experts": 2000}, r"--num-experts: Input should be less than or equal to 1024, got 2000"),
        (
            {"num_experts_per_tok": 9},
            r"--num-experts-per-tok: Input should be less than or equal to 8, got 9",
        ),
        ({"expert_size": 0}, r"--expert-size: Input should be greater than or equal to 1, got 0"),
        ({"router_estimator": "v3"}, r"--router-estimator: Input should be 'v2', .*, got 'v3'"),
        ({"router_aux_loss_coef": -1}, r"--router-aux-loss-coef: Input should be .*, got -1"),
        ({"router_aux_loss_coef": float("nan")}, r"--router-aux-loss-coef: Input should be a finite number"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_values_out_of_range(given: dict[str, Any], text_of_error: str) -> None:
    with pytest.raises(InputError, match=text_of_error):
        make_config({"num_experts": 4, **given})


@pytest.mark.parametrize(
    ("given", "text_of_error"),
    [
        ({"num_experts": 1}, "experts: SambaConfig: num_experts must be 0 or at least 2, got 1"),
        (
            {"num_experts": 4, "num_experts_per_tok": 5},
            "experts: .*num_experts_per_tok must be at most 4, got 5",
        ),
    ],
    ids=str,
)
def test_values_that_do_not_fit_each_other(given: dict[str, Any], text_of_error: str) -> None:
    with pytest.raises(InputError, match=text_of_error):
        model_config(make_config({"preset": "tiny", **given}), 300)


# Learning


@pytest.mark.parametrize("estimator", ["v2", "topk"])
def test_training_learns_and_keeps_the_auxiliary_loss_out_of_the_log(
    estimator: str, text: Path, tmp_path: Path
) -> None:
    config = small_config(text, steps=60, lr=0.01, **{**MOE, "router_estimator": estimator})
    record = train(config, tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(5.7, abs=0.4)  # log(300)
    assert sum(found[-5:]) / 5 < 0.6 * found[0]
    model = SambaForCausalLM.from_pretrained(tmp_path / "run" / "model")
    sizes = model.config
    assert (sizes.num_experts, sizes.intermediate_size, sizes.router_estimator) == (5, 20, estimator)
    assert record.parameters == model.num_parameters()
    assert record.result is not None
    evaluations = [e["bits_per_byte"] for e in RunLog(tmp_path / "run").read() if e["kind"] == "evaluation"]
    assert evaluations[-1] < 0.7 * evaluations[0]


def test_the_load_balance_loss_trains(text: Path, tmp_path: Path) -> None:
    """The same run with another coefficient has the same first loss and other ones after it."""
    for name, coefficient in (("none", 0.0), ("strong", 5.0)):
        train(small_config(text, steps=3, num_experts=5, router_aux_loss_coef=coefficient), tmp_path / name)
    none, strong = losses(tmp_path / "none"), losses(tmp_path / "strong")
    assert none[0] == strong[0]
    assert none[2] != strong[2]


def test_the_seed_decides_what_routers_draw(text: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(hash(name) % 1000)  # what happened before must not matter
        train(small_config(text, steps=3, seed=seed, **MOE), tmp_path / name)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_what_routers_draw_depends_on_the_step_alone(text: Path, tmp_path: Path) -> None:
    class Drawing(QuietReporter):
        def step(self, report: StepReport) -> None:
            torch.rand(1 + report.step)

    train(small_config(text, steps=4, **MOE), tmp_path / "quiet")
    train(small_config(text, steps=4, **MOE), tmp_path / "drawing", reporter=Drawing())
    assert losses(tmp_path / "drawing") == losses(tmp_path / "quiet")


def test_bf16_trains_experts_on_fp32_weights(text: Path, tmp_path: Path) -> None:
    train(small_config(text, steps=3, dtype="bf16", **MOE), tmp_path / "run")
    model = SambaForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# Killed


@pytest.mark.parametrize("number", [14, 22, 29])
def test_death_at_a_write_changes_nothing(text: Path, undisturbed: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    process = start(die_at_write, number, train, small_config(text, **MOE), out)
    process.join(60)
    assert process.exitcode == 77
    process = start(resume, out)
    process.join(60)
    assert process.exitcode == 0
    assert load_record(out).status == "finished"
    assert_same_bits(out, undisturbed)
    assert len(losses(out)) == STEPS


def test_kill_9_in_the_middle_changes_nothing(text: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(train, small_config(text, **MOE), out)
    deadline = time.monotonic() + 60
    while not CheckpointFolder(out).steps():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    process = start(resume, out)
    process.join(60)
    assert process.exitcode == 0
    assert_same_bits(out, undisturbed)


# The command line


def test_a_run_with_experts_from_the_command_line(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--num-experts", "4", "--num-experts-per-tok", "1", "--expert-size", "24"]
    flags += ["--router-estimator", "v2_star", "--router-aux-loss-coef", "0.02"]
    done = run("train", "samba", "--data", text, "--out", out, *SMALL_FLAGS, *flags, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)["config"]
    assert (config["num_experts"], config["router_estimator"], config["expert_size"]) == (4, "v2_star", 24)
    sizes = SambaConfig.from_json_file(out / "model" / "config.json")
    assert (sizes.num_experts, sizes.num_experts_per_tok, sizes.router_aux_loss_coef) == (4, 1, 0.02)
    words = run("generate", out, "--prompt", "def f(", "--max-new-tokens", "8")
    assert words.returncode == 0
    assert words.stdout.startswith("def f(")


def test_flags_that_do_not_fit_are_one_sentence(text: Path, tmp_path: Path) -> None:
    done = run("train", "samba", "--data", text, "--out", tmp_path / "run", "--expert-size", "9")
    assert done.returncode == 2
    assert "--expert-size: needs --num-experts of at least 2" in done.stderr
    assert len(done.stderr.splitlines()) == 1
