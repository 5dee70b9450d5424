"""Files of a run: written, read, shown, compared, drawn."""

from __future__ import annotations

import builtins
import copy
import importlib.util
import io
import json

import pytest
from rich.console import Console

from bench import main, record
from bench.compare import changes
from bench.plot import bars, plot
from bench.report import show
from bench.runner import run_case
from tests.bench.fakes import SETTINGS, fake_case, fake_record


def _shown(data, **options):
    text = io.StringIO()
    show(data, Console(file=text, width=150), **options)
    return text.getvalue()


# ---- file


def test_round_trip_of_a_measured_case(tmp_path):
    data = fake_record(results=run_case(fake_case(), SETTINGS))
    record.save(data, tmp_path / "deep" / "run.json")
    assert record.load(tmp_path / "deep" / "run.json") == data
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run.json"]


def test_infinite_errors_are_written_as_words(tmp_path):
    data = fake_record()
    data["results"][0]["contenders"][0]["errors"] = {"out": float("inf")}
    record.save(data, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["results"][0]["contenders"][0]["errors"] == {
        "out": "inf"
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "schema must be 1, got 'list'"),
        ('{"schema": 2}', "schema must be 1, got 2"),
        ('{"schema": 1, "results": []}', "machine"),
    ],
)
def test_files_that_are_no_record(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as found:
        record.load(path)
    assert "run.json" in str(found.value)


def test_missing_file_ends_with_one_line(capsys):
    assert main(["show", "nowhere.json"]) == 2
    assert capsys.readouterr().err == "bench: no such file: nowhere.json\n"


# ---- tables


def test_table_shows_gains_losses_and_reasons():
    data = fake_record()
    text = _shown(data)
    assert "4x faster" in text
    assert "50 %" in text  # of the ceiling
    assert "liar: wrong: relative error above 0.1: out 2" in text
    data = copy.deepcopy(data)
    data["results"][0]["contenders"][1]["samples"]["wall"] = [1e-3] * 3
    assert "2x slower" in _shown(data)


def test_table_by_cpu_clock():
    assert "4.5x faster" in _shown(fake_record(), clock="cpu")


def test_targets_are_printed_with_what_they_mean_here():
    data = copy.deepcopy(fake_record())
    data["results"][0]["targets"] = [{"part": "forward", "kind": "rate", "value": 6e9, "peer": None}]
    text = _shown(data)
    assert ">= 6 GFLOP/s on one reference core" in text
    assert ">= 3 GFLOP/s" in text


def test_busy_machine_is_mentioned():
    assert "busy" not in _shown(fake_record())
    assert "load average 3.0" in _shown(fake_record(load=[3.0, None]))


# ---- comparison


def _slower(factor):
    data = copy.deepcopy(fake_record())
    samples = data["results"][0]["contenders"][0]["samples"]
    samples["wall"] = [seconds * factor for seconds in samples["wall"]]
    return data


def test_changes_pair_contenders_of_the_same_case():
    found = changes(fake_record(), _slower(4))
    assert [(change.name, change.ratio) for change in found] == [
        ("fastlm", pytest.approx(4.0)),
        ("peer", pytest.approx(1.0)),
    ]
    assert [change.clear for change in found] == [True, False]


def test_changes_do_not_mix_threads():
    other = copy.deepcopy(fake_record())
    other["results"][0]["threads"] = 1
    assert changes(fake_record(), other) == []


@pytest.mark.parametrize(
    ("factor", "words", "code"),
    [(4, [], 0), (4, ["--fail-above", "1.5"], 1), (1.1, ["--fail-above", "1.05"], 0)],
)
def test_compare_command(tmp_path, capsys, factor, words, code):
    """A slowdown fails only if it is asked for and larger than the spread of the samples."""
    record.save(fake_record(), tmp_path / "a.json")
    record.save(_slower(factor), tmp_path / "b.json")
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *words]) == code
    assert f"{factor:.3f}" in capsys.readouterr().out


def test_compare_without_common_rows(tmp_path, capsys):
    record.save(fake_record(), tmp_path / "a.json")
    record.save(fake_record(results=[]), tmp_path / "b.json")
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "no timed row in common" in capsys.readouterr().err


# ---- picture


def test_bars_are_relative_to_fastlm():
    ((title, rows),) = bars(fake_record())
    assert title == "doubling three fp32: forward"
    assert rows == [("fastlm", 2e-3, 1.0, True), ("peer", 8e-3, pytest.approx(4.0), False)]


def test_plot_without_matplotlib_names_the_extra(tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *words):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *words)

    monkeypatch.setattr(builtins, "__import__", without)
    record.save(fake_record(), tmp_path / "run.json")
    assert main(["plot", str(tmp_path / "run.json")]) == 1
    assert "fastlm[bench]" in capsys.readouterr().err
    assert not (tmp_path / "run.png").exists()


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is missing")
def test_plot_draws_a_png(tmp_path):
    record.save(fake_record(), tmp_path / "run.json")
    assert main(["plot", str(tmp_path / "run.json")]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is missing")
def test_plot_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="got none"):
        plot(fake_record(results=[]), tmp_path / "run.png")
