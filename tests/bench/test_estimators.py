"""The comparison of router estimators in small: runs, resuming, statistics, what is counted, the pictures."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from bench import estimators, estimators_summary
from bench.estimators_text import KINDS, kind_of
from fastlm.layers import Routing

TINY = estimators.Sizes(
    steps=8,
    batch_tokens=64,
    seq_len=32,
    evaluations=4,
    eval_tokens=128,
    final_eval_tokens=256,
    warmup_steps=2,
    vocab_size=300,
    hidden_size=16,
    num_attention_heads=2,
    sliding_window=8,
    num_experts=4,
    intermediate_size=8,
    dtype="fp32",
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a little prepared text and four runs."""
    from fastlm.training.config import TrainConfig
    from fastlm.training.data import prepare_data

    folder = tmp_path_factory.mktemp("estimators")
    text = folder / "text"
    text.mkdir()
    for i in range(8):
        lines = [f"def f{i}_{j}(x):\n    if x > {j}:\n        return x + {i}\n" for j in range(30)]
        (text / f"f{i}.py").write_text("\n".join(lines), encoding="utf-8")
    config = TrainConfig(data=text, held_out=0.3)
    prepare_data(folder / "data", config, TINY.vocab_size, lambda _: None, lambda _: None)
    return folder


@pytest.fixture(scope="module")
def runs(work):
    threads = torch.get_num_threads()  # a job takes one, here in the process of the tests
    yield estimators.run_all(["v2", "topk"], [0, 1], TINY, work, workers=0)
    torch.set_num_threads(threads)


def test_every_run_has_its_curve_and_its_routing(runs):
    assert [(run["variant"], run["seed"]) for run in runs] == [("v2", 0), ("topk", 0), ("v2", 1), ("topk", 1)]
    for run in runs:
        assert [point["step"] for point in run["curve"]] == [2, 4, 6, 8]
        assert 0 < run["bits"] < 16
        for point in run["curve"]:
            for load in point["load"]:
                assert len(load) == 4
                assert sum(load) == pytest.approx(1, abs=1e-4)
        for part in run["affinity"].values():
            for entry in part.values():
                assert [sum(row) for row in entry["experts"]] == pytest.approx([1, 1], abs=5e-3)
    assert all(
        max(point["unlikely"]) == 0 for run in runs for point in run["curve"] if run["variant"] == "topk"
    )
    assert len({run["bits"] for run in runs}) == 4


def test_one_seed_is_one_beginning_and_one_order_of_text(work):
    from fastlm.models import SambaForCausalLM

    weights = []
    for variant in ("v2", "topk"):
        torch.manual_seed(5)
        weights.append(SambaForCausalLM(TINY.model(variant, 300)).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_finished_run_is_not_done_again(work, runs, monkeypatch):
    done = []
    monkeypatch.setattr(
        estimators, "train", lambda variant, seed, *rest: done.append((variant, seed)) or runs[0]
    )
    assert estimators.run_all(["v2", "topk"], [0, 1], TINY, work, workers=0) == runs
    assert done == []
    lost = estimators.file_of(work, "topk", 1)
    kept = lost.read_text()
    lost.unlink()
    try:
        estimators.run_all(["v2", "topk"], [0, 1], TINY, work, workers=0)
        assert done == [("topk", 1)]
    finally:
        lost.write_text(kept)


def test_a_run_of_other_sizes_is_refused(work, runs):
    with pytest.raises(ValueError, match="other sizes"):
        estimators.run_all(["v2"], [0], replace(TINY, lr=1e-3), work, workers=0)


def test_a_run_repeats_itself(work, runs):
    from fastlm.training.data import open_data

    again = estimators.train("v2", 1, TINY, open_data(work / "data"))
    (kept,) = (run for run in runs if (run["variant"], run["seed"]) == ("v2", 1))
    assert {**again, "cpu_seconds": 0} == {**json.loads(json.dumps(kept)), "cpu_seconds": 0}


def test_variants_differ_as_they_say():
    dense = TINY.model("dense", 300)
    assert (dense.num_experts, dense.intermediate_size) == (0, 16)
    assert TINY.model("v2", 300).router_estimator == "v2"
    assert TINY.model("topk", 300).router_estimator == "topk"
    assert TINY.model("v2_straight_through", 300).expert_grad == "straight_through"
    assert TINY.model("v2_no_balance", 300).router_aux_loss_coef == 0


def test_the_log_counts_picks_and_surprises():
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    ids = torch.tensor([[0, 1], [1, 0], [0, 2], [0, 1]], dtype=torch.int32)
    # A pick is compared with the best of what the picks before it left.
    assert estimators.unlikely(logits, ids).tolist() == [False, True, True, False]
    weights = torch.tensor([[1.0, 1.0], [0.5, 1.0], [1.0, 1.0], [1.0, 0.3]])
    log = estimators.RoutingLog()
    routing = Routing(logits, weights, ids, torch.tensor([4, 3, 1], dtype=torch.int32))
    log.add([routing])
    log.add([routing])
    found = log.read()
    assert found["load"] == [[0.5, 0.375, 0.125]]
    assert found["unlikely"] == [0.5]
    assert found["rivals"] == [0.25]
    p = [math.exp(x) / (math.exp(2) + math.exp(1) + 1) for x in (2, 1, 0)]
    expected = (3 * -sum(x * math.log2(x) for x in p) + math.log2(3)) / 4
    assert found["entropy"] == [pytest.approx(expected, abs=1e-4)]
    assert log.read() == {}


def test_intervals_are_students():
    # Mean 2, standard deviation 1 (of 1, 2, 3), t = 4.3027 at two degrees of freedom: 4.3027 / sqrt 3.
    mean, half = estimators_summary.interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(2.4841, abs=1e-4)
    # Two values a and b: t = 12.7062 and the standard error is |a - b| / 2.
    assert estimators_summary.interval([0.0, 1.0])[1] == pytest.approx(6.3531)
    assert math.isnan(estimators_summary.interval([1.0])[1])


def _run(variant, seed, bits):
    return {
        "variant": variant,
        "seed": seed,
        "bits": bits,
        "parameters": 1,
        "curve": [{"step": 1, "bits": bits}],
    }


def test_differences_are_taken_by_seed():
    made = [
        _run("v2", 0, 2.0),
        _run("v2", 1, 3.0),
        _run("v2", 2, 9.0),
        _run("topk", 1, 3.2),
        _run("topk", 0, 2.1),
    ]
    assert estimators_summary.differences(made, "topk", "v2") == pytest.approx([0.1, 0.2])
    rows = estimators_summary.summary(made, "v2")
    assert "difference" not in rows[0]
    assert rows[1]["difference"] == pytest.approx(0.15)
    assert rows[1]["difference_half"] == pytest.approx(12.7062 * 0.05, abs=1e-4)
    assert (rows[1]["pairs"], rows[1]["wins"]) == (2, 0)
    assert "+0.1500 ± 0.6353" in estimators_summary.table(rows)


def test_information_of_kinds():
    split = {"a": {"share": 0.5, "experts": [[1.0, 0.0]]}, "b": {"share": 0.5, "experts": [[0.0, 1.0]]}}
    alike = {"a": {"share": 0.3, "experts": [[0.4, 0.6]]}, "b": {"share": 0.7, "experts": [[0.4, 0.6]]}}
    assert estimators_summary.information(split, 0) == pytest.approx(1)
    assert estimators_summary.information(alike, 0) == pytest.approx(0, abs=1e-12)


def test_kinds_of_tokens():
    spelled = (b"\n        ", b" return", b" value", b"ing", b"42", b"):", b"", b" \xc3\xa4")
    expected = (*KINDS[:6], "other", "other")
    assert tuple(kind_of(spelling) for spelling in spelled) == expected


def test_pictures_and_record(work, runs, tmp_path):
    pytest.importorskip("matplotlib")
    from bench import estimators_plot

    record = {"sizes": asdict(TINY), "summary": estimators_summary.summary(runs, "v2"), "runs": runs}
    text = estimators.compact(record)
    assert text.count("\n") < 200
    record = json.loads(text)
    assert ["tokens" in run["affinity"] for run in record["runs"]] == [True, False, False, False]
    assert [run["bits"] for run in record["runs"]] == [run["bits"] for run in runs]
    for name in ("curves", "loads", "affinities"):
        getattr(estimators_plot, name)(record, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
