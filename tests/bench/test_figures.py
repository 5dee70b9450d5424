"""Arithmetic of records: shares, ratios, targets scaled from machine to machine."""

from __future__ import annotations

import pytest

from bench.ceilings import floor_seconds, rate_of
from bench.figures import (
    backward_of,
    duration,
    machine_scale,
    outcome,
    share_of_ceiling,
    si,
    size,
    span,
    spread,
)
from bench.quantiles import median, quantile
from tests.bench.fakes import fake_record


def _target(**fields):
    return {"part": "forward", "peer": None} | fields


def _outcome(record, **fields):
    return outcome(record, record["results"][0], _target(**fields))


@pytest.mark.parametrize(("q", "value"), [(0.0, 1.0), (0.5, 3.0), (0.2, 1.8), (0.8, 4.2), (1.0, 5.0)])
def test_quantile_is_linear_between_neighbours(q, value):
    assert quantile([5.0, 3.0, 1.0, 2.0, 4.0], q) == pytest.approx(value)


def test_median_of_one_and_of_none():
    assert median([7.0]) == 7.0
    with pytest.raises(ValueError, match="must not be empty"):
        median([])


def test_floor_adds_the_times_of_shared_pipes():
    assert floor_seconds({"fma": 8.0, "exp2": 2.0}, {"fma": 4.0, "exp2": 1.0}) == pytest.approx(4.0)


@pytest.mark.parametrize("floor", [{}, {"unknown": 1.0}])
def test_floor_without_ceiling_is_none(floor):
    assert floor_seconds(floor, {"fma": 4.0}) is None


def test_dot_is_the_best_there_is():
    assert rate_of("dot", {"fma": 1.0}) == 1.0
    assert rate_of("dot", {"fma": 1.0, "dot_bf16": 2.0}) == 2.0


def test_share_of_ceiling_uses_the_threads_of_the_run():
    record = fake_record()  # 6e6 FLOP at 6e9 FLOP/s with two threads: 1 ms at best
    assert share_of_ceiling(record, record["results"][0], 2e-3) == pytest.approx(0.5)


def test_rate_target_is_scaled_by_the_ceilings():
    """One reference core does 12e9, this machine 6e9 with both threads: half the rate is asked for."""
    record = fake_record()
    assert machine_scale(record, record["results"][0]) == pytest.approx(0.5)
    met = _outcome(record, kind="rate", value=6e9)  # 6e6 FLOP in 2 ms is 3e9
    assert met.met is True
    assert (met.wanted, met.found) == (">= 3 GFLOP/s", "3 GFLOP/s")
    assert met.text == ">= 6 GFLOP/s on one reference core"
    assert _outcome(record, kind="rate", value=6.1e9).met is False


def test_time_target_is_scaled_by_the_ceilings():
    record = fake_record()
    met = _outcome(record, kind="time", value=1e-3)
    assert (met.wanted, met.found, met.met) == ("<= 2 ms", "2 ms", True)
    assert _outcome(record, kind="time", value=0.9e-3).met is False


def test_speedup_target_is_a_ratio_of_medians():
    record = fake_record()
    met = _outcome(record, kind="speedup", value=4, peer="peer")
    assert (met.found, met.met) == ("4.00x", True)
    assert _outcome(record, kind="speedup", value=4.1, peer="peer").met is False


@pytest.mark.parametrize("peer", ["liar", "nobody"])
def test_speedup_over_somebody_who_was_not_timed_is_open(peer):
    found = _outcome(fake_record(), kind="speedup", value=4, peer=peer)
    assert (found.met, found.found) == (None, f"{peer} not timed")


def test_memory_target_leaves_results_out():
    record = fake_record()
    fastlm, peer, _ = record["results"][0]["contenders"]
    fastlm["memory"] = {"peak_extra_bytes": 30, "result_bytes": 20}
    peer["memory"] = {"peak_extra_bytes": 120, "result_bytes": 20}
    try:
        assert _outcome(record, kind="memory", value=0.1, peer="peer").met is True
        assert _outcome(record, kind="memory", value=0.09, peer="peer").met is False
        peer["memory"] = {"reason": "killed"}
        assert _outcome(record, kind="memory", value=0.1, peer="peer").met is None
    finally:
        del fastlm["memory"], peer["memory"]


def test_without_ceilings_scaled_targets_stay_open():
    record = fake_record(ceilings=None)
    assert _outcome(record, kind="rate", value=1.0).met is None
    assert _outcome(record, kind="speedup", value=4, peer="peer").met is True


def test_backward_is_derived_from_medians():
    record = fake_record()
    forward = record["results"][0]
    rows = [dict(row) for row in forward["contenders"]]
    rows[0]["samples"] = {"wall": [7e-3], "cpu": [7e-3]}
    both = forward | {"part": "forward+backward", "contenders": rows}
    found = backward_of([forward, both])
    assert found.keys() == {("doubling", "three", "fp32", "backward")}
    (seconds,) = found.values()
    assert seconds == {"fastlm": pytest.approx(5e-3), "peer": pytest.approx(0.0)}


def test_spread_by_clock():
    row = fake_record()["results"][0]["contenders"][1]
    assert spread(row).median == 8e-3
    assert spread(row, "cpu").median == 9e-3
    assert spread({"status": "wrong"}) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (si(3.5e9), "3.5 G"),
        (si(12.0), "12 "),
        (duration(0.0123), "12.3 ms"),
        (duration(25e-6), "25 µs"),
        (duration(2.0), "2 s"),
        (span(0.9e-3, 1.2e-3), "900–1.2e+03 µs"),
        (span(1.5e-3, 1.7e-3), "1.5–1.7 ms"),
        (size(3 * 2**20), "3 MiB"),
        (size(4), "4 B"),
    ],
)
def test_numbers_in_words(text, expected):
    assert text == expected
