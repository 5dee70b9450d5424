"""Statistics, tables, pictures and page of the experiment with selective training, on made-up numbers."""

from __future__ import annotations

import math

import pytest

from bench import rho1_summary
from bench.rho1_noise import KINDS
from bench.rho1_select import VARIANTS
from fastlm.training.errors import InputError

N = len(KINDS)


def _point(step, bits, selected=0.6):
    alone, mixed = [100] * N, [10] * N
    chosen = [[round(100 * selected)] * N, [round(10 * selected)] * N]
    whole = selected == 1
    return {
        "step": step,
        "clean_loss": 2 * bits,
        "clean_bits": bits,
        "noise_loss": 3 * bits,
        "noise_bits": 1.5 * bits,
        "eligible": [alone, mixed],
        "selected": chosen,
        "positions": [[20, 60, 240, 560], [round(x * selected) for x in (20, 60, 240, 560)]],
        "train_loss": 5.0,
        "selected_loss": 4.0,
        "unselected_loss": None if whole else 6.0,
        "selected_score": 1.0,
        "unselected_score": None if whole else -1.0,
        "threshold": 0.25,
    }


def _run(variant, seed, bits, curve=None):
    curve = curve or [10.0, 8.0, 6.0, bits]
    return {
        "variant": variant,
        "seed": seed,
        "parameters": 7,
        "curve": [_point(10 * (i + 1), x, VARIANTS[variant].keep) for i, x in enumerate(curve)],
        "final": {
            side: {"bits": bits, "loss": 2 * bits, "tokens": 9, "by_kind": {}} for side in ("clean", "noise")
        },
    }


def _record(*runs):
    sizes = {"batch_tokens": 1000, "steps": 40, "seq_len": 64}
    return {"sizes": sizes, "corpus": {"digest": "x"}, "runs": list(runs)}


def test_tokens_to_a_loss_are_read_between_evaluations():
    curve = [_point(10, 4.0), _point(20, 3.0), _point(30, 3.5), _point(40, 2.0)]
    assert rho1_summary.steps_to(curve, 3.25) == 17.5
    assert rho1_summary.steps_to(curve, 3.0) == 20
    assert rho1_summary.steps_to(curve, 2.75) == 35  # from the point before, which had risen
    assert rho1_summary.steps_to(curve, 5.0) == 10
    assert rho1_summary.steps_to(curve, 1.0) is None


def test_the_speed_up_is_symmetric():
    slow, fast = _run("ce", 0, 4.0), _run("slm_60", 0, 2.0, [10.0, 6.0, 4.0, 2.0])
    assert rho1_summary.speed_up(fast, slow) == pytest.approx(40 / 30)
    assert rho1_summary.speed_up(slow, fast) == pytest.approx(30 / 40)
    assert rho1_summary.speed_up(slow, slow) == 1
    mean, low, high = rho1_summary.geometric([2.0, 0.5])
    assert mean == pytest.approx(1)
    # Logarithms +-0.693: half width is 12.7062 * 0.693.
    assert math.log(high) == pytest.approx(12.7062 * math.log(2), rel=1e-4)
    assert low * high == pytest.approx(1)


def test_differences_are_taken_by_seed_and_stage():
    record = _record(
        _run("ce", 0, 4.0),
        _run("ce", 1, 5.0),
        _run("ce", 2, 9.0),
        _run("slm_60", 1, 4.8),
        _run("slm_60", 0, 3.9),
        _run("continued_ce", 0, 3.0),
        _run("continued_slm_60", 0, 3.5),
    )
    rows = {row["variant"]: row for row in rho1_summary.summary(record)}
    assert "difference" not in rows["ce"]
    mean, half = rows["slm_60"]["difference"]
    assert mean == pytest.approx(-0.15)
    assert half == pytest.approx(12.7062 * 0.05, abs=1e-4)  # of -0.1 and -0.2
    assert (rows["slm_60"]["pairs"], rows["slm_60"]["better"]) == (2, 2)
    assert rows["continued_slm_60"]["difference"][0] == pytest.approx(0.5)
    assert rows["continued_slm_60"]["better"] == 0
    assert math.isnan(rows["continued_slm_60"]["difference"][1])
    assert rho1_summary.paired(record["runs"], "slm_60", "random_60", rho1_summary.less_bits) == []


def test_every_variant_has_a_name_and_a_base():
    assert set(rho1_summary.LABELS) == set(VARIANTS)
    assert {rho1_summary.base_of(name) for name in VARIANTS} == {"ce", "continued_ce"}
    assert rho1_summary.base_of("reference_then_ce") == "continued_ce"
    assert {name for pair in rho1_summary.PAIRS for name in pair} <= set(VARIANTS)


def test_tables_show_what_there_is():
    record = _record(
        *(_run("ce", seed, 4.0 + seed) for seed in (0, 1)),
        *(_run("slm_60", seed, 3.9 + seed) for seed in (0, 1)),
        *(_run("random_60", seed, 4.1 + seed) for seed in (0, 1)),
    )
    text = rho1_summary.tables(record)
    assert "| SLM, k = 0.6 | 2 | 4.4000 ± 6.3531 | -0.1000 ± 0.0000 | 2 of 2 |" in text
    assert "| SLM, k = 0.6 | random, k = 0.6 | -0.2000 ± 0.0000 | 2 of 2 |" in text
    assert "| SLM, k = 0.6 | " + " | ".join(["60%"] * (N + 4)) + " |" in text
    assert "| SLM, k = 0.6 | 4.00 ± 0.00 | 6.00 ± 0.00 | 1.00 ± 0.00 | -1.00 ± 0.00 | 0.25 ± 0.00 |" in text
    assert "oracle" not in text
    alone = rho1_summary.tables(_record(_run("ce", 0, 4.0)))
    assert "| plain cross-entropy | 1 | 4.0000 |" in alone
    assert "selected" not in alone
    widths = {table.count("|") // (table.count("\n") + 1) for table in text.split("\n\n")}
    assert len(widths) == 4  # each table has one number of columns
    for table in text.split("\n\n"):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_page_gets_its_tables_and_keeps_the_rest():
    record = _record(_run("ce", 0, 4.0))
    text = f"# Title\n\n{rho1_summary.BEGIN}\nold\n{rho1_summary.END}\n\nrest\n"
    found = rho1_summary.with_tables(text, record)
    assert found.startswith("# Title\n")
    assert found.endswith("\n\nrest\n")
    assert "old" not in found
    assert "4.0000" in found
    assert rho1_summary.with_tables(found, record) == found
    with pytest.raises(ValueError, match="expected one"):
        rho1_summary.with_tables("no marks", record)


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("names", [tuple(VARIANTS), ("ce",), ("ce", "slm_60")])
def test_pictures(tmp_path, seeds, names):
    pytest.importorskip("matplotlib")
    from bench import rho1_plot

    record = _record(*(_run(name, seed, 4.0 + 0.1 * seed) for seed in range(seeds) for name in names))
    for name in ("curves", "k_sweep", "selection"):
        getattr(rho1_plot, name)(record, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_the_token_page(tmp_path):
    pytest.importorskip("fastlm.methods.rho1.page")
    from bench.rho1_page import write_page

    with pytest.raises(InputError, match="slm_60"):
        write_page(_record(_run("ce", 0, 4.0)), tmp_path / "page.html")
    run = _run("slm_60", 0, 4.0)
    run["documents"] = [
        {
            "name": "a.py#0",
            "kind": "mixed",
            "tokens": [["def", 2.0, 1.0, 1, 0], ["\u00c3", 5.0, 7.5, 0, 3], ["\u00a9", 1.0, 1.0, 0, 3]],
        }
    ]
    write_page(_record(run), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "mixed: a.py#0" in text
    assert "excess loss +1.00" in text
    assert "excess loss -2.50" in text
    assert "noise: minified" in text
    assert "é" in text
