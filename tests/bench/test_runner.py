"""The runner: checks before timing, turns, gradients, states written in place. No test looks at a
duration.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bench import timing
from bench.case import Contender, Target, Work, direct
from bench.checking import relative_error
from bench.runner import Settings, run_case
from tests.bench.fakes import PLAN, SETTINGS, double, fake_case


def _rows(results, part):
    (result,) = [result for result in results if result["part"] == part]
    return {row["name"]: row for row in result["contenders"]}


# ---- check before timing


def test_only_right_contenders_are_timed():
    for part in ("forward", "forward+backward"):
        rows = _rows(run_case(fake_case(), SETTINGS), part)
        assert {name: row["status"] for name, row in rows.items()} == {
            "fastlm": "timed",
            "sum": "timed",
            "triple": "wrong",
            "absent": "unavailable",
            "broken": "failed",
            "compiled": "skipped",
        }
        timed = {name for name, row in rows.items() if "samples" in row}
        assert timed == {"fastlm", "sum"}


def test_reasons_name_what_was_found():
    rows = _rows(run_case(fake_case(), SETTINGS), "forward")
    assert rows["triple"]["reason"] == "relative error above 0.0001: out 0.5, dx 0.5"
    assert rows["absent"]["reason"] == "needs a machine from the future"
    assert rows["broken"]["reason"] == "RuntimeError: no luck"
    assert "--compile" in rows["compiled"]["reason"]


def test_compiled_contenders_take_part_when_asked():
    settings = dataclasses.replace(SETTINGS, compile=True)
    assert _rows(run_case(fake_case(), settings), "forward")["compiled"]["status"] == "timed"


def test_wrong_gradient_alone_is_enough():
    def stops_gradient(x):
        return 2 * x.detach() + 0 * x

    case = fake_case(contenders=(Contender("fastlm", direct(stops_gradient), ours=True),))
    row = _rows(run_case(case, SETTINGS), "forward")["fastlm"]
    assert row["status"] == "wrong"
    assert row["errors"]["out"] < 1e-6
    assert row["errors"]["dx"] == pytest.approx(1.0)


def test_missing_reference_stops_everybody():
    def no_reference(inputs):
        raise ImportError("gone")

    rows = _rows(run_case(fake_case(reference=no_reference), SETTINGS), "forward")
    assert {row["status"] for name, row in rows.items() if name != "compiled"} == {"failed"}
    assert "no reference" in rows["fastlm"]["reason"]


def test_contender_with_its_own_reference_is_marked():
    other = Contender("triple", direct(lambda x: 3 * x), reference=direct(lambda x: 3 * x))
    row = _rows(run_case(fake_case(contenders=(other,)), SETTINGS), "forward")["triple"]
    assert row["status"] == "timed"
    assert row["orientation"]


def test_parts_that_would_take_too_long_are_skipped():
    slow = Contender("slow", direct(double), cost={"forward+backward": {"fma": 100.0}})
    settings = dataclasses.replace(SETTINGS, rates={"fma": 1.0}, patience=60.0)
    results = run_case(fake_case(contenders=(slow,)), settings)
    assert _rows(results, "forward")["slow"]["status"] == "timed"
    row = _rows(results, "forward+backward")["slow"]
    assert row["status"] == "skipped"
    assert "100 s" in row["reason"]


def test_state_written_in_place_is_compared_and_not_shared():
    def add(state, x):
        state += x
        return state.clone()

    def forgets_state(state, x):
        return state + x

    inputs = {"state": torch.zeros(2), "x": torch.ones(2)}
    case = fake_case(
        inputs=lambda: inputs,
        reference=direct(add),
        contenders=(
            Contender("fastlm", direct(add), ours=True, mode="inference"),
            Contender("forgets", direct(forgets_state)),
        ),
        gradients=(),
        part="decode step",
        mutated=("state",),
    )
    rows = _rows(run_case(case, SETTINGS), "decode step")
    assert rows["fastlm"]["status"] == "timed"
    assert rows["forgets"]["status"] == "wrong"
    assert rows["forgets"]["errors"]["out"] == 0
    assert torch.equal(inputs["state"], torch.zeros(2))


@pytest.mark.parametrize(
    ("found", "error"),
    [
        (torch.tensor([1.0, 1.0]), 0.0),
        (torch.tensor([2.0, 1.0]), math.sqrt(0.5)),
        (torch.tensor([float("nan"), 1.0]), math.inf),
        (torch.tensor([float("inf"), 1.0]), math.inf),
        (torch.tensor([1.0]), math.inf),
    ],
)
def test_relative_error(found, error):
    assert relative_error(found, torch.ones(2, dtype=torch.float64)) == pytest.approx(error)


# ---- results


def test_result_holds_every_sample_and_the_facts_of_the_case():
    results = run_case(fake_case(), SETTINGS)
    assert [result["part"] for result in results] == ["forward", "forward+backward"]
    forward = results[0]
    assert forward["work"] == {"amount": 3, "unit": "FLOP", "floor": {"fma": 3}, "bytes": None}
    assert [target["kind"] for target in forward["targets"]] == ["speedup", "rate"]
    assert results[1]["targets"] == []
    samples = _rows(results, "forward")["fastlm"]["samples"]
    assert len(samples["wall"]) == len(samples["cpu"]) == PLAN.rounds
    assert all(seconds >= 0 for seconds in samples["wall"] + samples["cpu"])


def test_inputs_are_the_same_in_every_run():
    seen = []

    def watch(x):
        seen.append(x.clone())
        return 2 * x

    case = fake_case(contenders=(Contender("fastlm", direct(watch), ours=True),))
    run_case(case, SETTINGS)
    run_case(case, SETTINGS)
    assert all(torch.equal(x, seen[0]) for x in seen)


# ---- turns


class _Counter(timing.Runner):
    """A runner with a given cost that never looks at a clock."""

    def __init__(self, rounds: int) -> None:
        super().__init__(lambda: None, "no_grad")
        self.wanted = rounds

    def warm_up(self, plan: timing.Plan) -> None:
        self.rounds = self.wanted


def test_contenders_take_turns_and_start_in_turn():
    order = timing.interleave([_Counter(3), _Counter(3), _Counter(3)], PLAN)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]


def test_slow_contender_gets_fewer_samples_spread_over_the_run():
    fast, slow = _Counter(6), _Counter(2)
    order = timing.interleave([fast, slow], PLAN)
    assert (len(fast.wall), len(slow.wall)) == (6, 2)
    positions = [i for i, who in enumerate(order) if who == 1]
    assert positions[0] < len(order) // 2 < positions[1] + 1


@pytest.mark.parametrize(("own", "rounds"), [(1, 1), (3, 7), (7, 7), (5, 31)])
def test_takes_part_gives_each_its_number(own, rounds):
    assert sum(timing.takes_part(r, own, rounds) for r in range(rounds)) == own


def test_warm_up_respects_least_and_most_rounds():
    def plan(budget):
        return timing.Plan(rounds=5, least_rounds=2, budget=budget, sample=0.0)

    runner = timing.Runner(lambda: None, "no_grad")
    runner.warm_up(plan(budget=1e9))
    assert runner.rounds == 5
    runner.warm_up(plan(budget=0.0))
    assert runner.rounds == 2


def test_gradient_mode_of_a_contender_holds_while_it_is_timed():
    modes = set()

    def look(x):
        modes.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return 2 * x

    case = fake_case(
        contenders=(Contender("fastlm", direct(look), mode="inference"),), gradients=(), part="forward"
    )
    run_case(case, SETTINGS)
    assert (False, True) in modes


# ---- cases


def test_targets_without_part_are_not_lost():
    case = fake_case(targets=(Target("forward+backward", "rate", 1.0),))
    results = run_case(case, Settings(PLAN, memory=False))
    assert [len(result["targets"]) for result in results] == [0, 1]


def test_work_must_cover_the_parts():
    with pytest.raises(KeyError):
        run_case(fake_case(work={"forward": Work(1, "FLOP")}), SETTINGS)
