"""The script for a GPU, tried without one: workers that die, results that are kept, the file, floors, the report. No test looks at a
duration, and nothing here says anything about a GPU.
"""

from __future__ import annotations

import json
import stat
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import ceilings, measure, pool, report, sanitize, sizes
from bench.gpu.case import Contender, Problem, Target, Work
from bench.gpu.cli import main
from bench.gpu.edges import guarded
from bench.gpu.facts import slug
from bench.gpu.item import Context, Item, Outcome, Settings, WrongError
from bench.gpu.measure import measure_part
from bench.gpu.state import fingerprint_of, keep, load, new_state, to_do

FACTS = {
    "git": None,
    "machine": {"card": "NVIDIA H100 80GB HBM3", "driver": "1"},
    "software": {
        "torch": "2",
        "cuda": "13",
        "triton": None,
        "library": "abc",
        "fastlm": {"version": "0", "cuda": {"architectures": ["90a"]}, "cutlass": {"version": None}},
    },
}


def _run(state: Path, *words: str) -> int:
    return main([*words, "--device", "cpu", "--state", str(state), "--workers", "1"])


# ---- workers --------------------------------------------------------------------------------------------


def test_a_worker_that_dies_costs_one_item(tmp_path, capfd):
    """Abort, hang, exception and wrong result are recorded; what comes after them passes; a second call has nothing left to do."""
    state = tmp_path / "results.json"
    good = (
        *("sample/causal_conv1d/plain", "hostile/selective_scan/cu_seqlens", "alone/causal_conv1d/rows_bf16"),
        *("unaligned/causal_conv1d_update/one_input", "fused/hybrid", "errors/selective_state_update"),
    )
    words = ["check", "--faults", *(w for name in ("faults/", "large/", *good) for w in ("--only", name))]
    assert _run(state, *words) == 1
    items = load(state)["parts"]["check"]["items"]
    found = {name: item["status"] for name, item in items.items()}
    assert {name: status for name, status in found.items() if status != "passed"} == {
        "faults/dies": "crashed",
        "faults/hangs": "hung",
        "faults/raises": "failed",
        "faults/is_wrong": "failed",
        "faults/does_not_apply": "skipped",
    }
    assert set(good) | {"large/selective_scan"} <= set(found)
    assert load(state)["parts"]["check"]["missing"] == {}
    assert "about to abort" in items["faults/dies"]["reason"]
    assert "SIGABRT" in items["faults/dies"]["reason"]
    assert items["faults/is_wrong"]["reason"] == "out: 1, reference 2"
    assert items["sample/causal_conv1d/plain"]["data"]["relative_rms"]["output 0"] < 1e-6

    capfd.readouterr()
    assert _run(state, *words) == 1
    assert f"{len(found)} items, 0 to do" in capfd.readouterr().err

    assert _run(state, "report") == 0
    page = state.with_suffix(".md").read_text()
    assert "**crashed** `faults/dies`" in page
    kept = list(tmp_path.glob("gpu-*.json"))
    assert len(kept) == 1
    assert json.loads(kept[0].read_text())["kind"] == "fastlm gpu"


def test_a_case_is_measured(tmp_path):
    state = tmp_path / "results.json"
    assert _run(state, "bench", "--no-compile", "--rounds", "2", "--only", "selective_scan/") == 0
    found = load(state)
    result = found["parts"]["bench"]["items"]["selective_scan/B1_D16_L70_N16"]["data"]["parts"]["backward"]
    rows = {row["name"]: row for row in result["contenders"]}
    assert rows["fastlm"]["status"] == "timed"
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    assert set(rows["fastlm"]["errors"]) == {f"d{name}" for name in names}
    assert len(rows["fastlm"]["samples"]) >= 2
    assert rows["mamba_ssm"]["status"] in ("unavailable", "timed", "failed")
    assert any("torch, chunks in step" in row for row in report.time_rows(found))


@pytest.mark.parametrize(
    "words", ["sliding_window_attention_update/", "scan_swa/", "selective_state_update/", "moe_experts/"]
)
def test_contenders_pass_their_check(words):
    settings = Settings(device="cpu", rounds=1, compile=False)
    (item,) = [item for item in measure.items(settings) if item.name.startswith(words)]
    data = item.run(Context(settings))
    assert data is not None
    for part in data["parts"].values():
        assert {row["status"] for row in part["contenders"]} <= {"timed", "unavailable", "left out"}
        assert part["contenders"][0]["status"] == "timed"


def test_ceilings_of_this_machine_stand_in_for_those_of_a_card():
    settings = Settings(device="cpu")
    data = {
        i.name: i.run(Context(settings)) for i in ceilings.items(settings) if i.name in ("fma", "copy_torch")
    }
    assert all(found is not None and found["per_second"] > 1e6 for found in data.values())


class _Doomed:
    """In place of a worker: it starts, and dies at every item of an operator called `bad`."""

    stage = ""

    def __init__(self, *words: object) -> None:
        self._name = ""

    def ask(self, name: str, *, ours_only: bool = False) -> None:
        self._name = name

    def wait_for(self, key: str, seconds: float) -> dict | str:
        if key == "ready":
            return {"ready": True}
        result = {"status": "passed", "reason": "", "data": {}}
        return "died" if "/bad/" in self._name else {"result": result, "fatal": False}

    def end(self) -> str:
        return "SIGSEGV"

    def finish(self) -> None:
        pass


def test_what_keeps_crashing_is_given_up(monkeypatch):
    monkeypatch.setattr(pool, "_Worker", _Doomed)
    items = [Item(f"sample/{op}/{i}", lambda context: None) for i in range(5) for op in ("bad", "good")]
    outcomes: dict[str, Outcome] = {}
    deadline = time.monotonic() + 60
    left = pool.run_items(
        "check", items, Settings(), workers=1, deadline=deadline, on_result=outcomes.__setitem__
    )
    assert left == []
    assert [outcomes[f"sample/good/{i}"].status for i in range(5)] == ["passed"] * 5
    assert [outcomes[f"sample/bad/{i}"].status for i in range(5)] == ["crashed"] * 3 + ["skipped"] * 2
    assert outcomes["sample/bad/4"].reason.startswith("given up")


def test_what_the_time_does_not_allow_is_left(monkeypatch):
    monkeypatch.setattr(pool, "_Worker", _Doomed)
    items = [Item(name, lambda context: None) for name in ("a", "b")]
    words = {"workers": 1, "deadline": time.monotonic() - 1, "on_result": lambda name, outcome: None}
    assert pool.run_items("check", items, Settings(), **words) == ["a", "b"]


def test_words_that_fit_no_item(tmp_path, capfd):
    assert _run(tmp_path / "r.json", "check", "--only", "no such item") == 2
    assert "no such item" in capfd.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capfd):
    assert main(["check", "--state", str(tmp_path / "r.json")]) == 2
    assert "torch sees no CUDA device" in capfd.readouterr().err


# ---- the file -------------------------------------------------------------------------------------------


def test_results_of_another_library_are_taken_again():
    state = new_state(FACTS)
    items = [Item("a", lambda context: None), Item("b", lambda context: None)]
    keep(state, "check", "a", Outcome("passed"), "card, library 1")
    keep(state, "check", "b", Outcome("crashed"), "card, library 1")

    def names(mark: str, **options: bool) -> list[str]:
        chosen = {"redo": False, "redo_failed": False} | options
        return [item.name for item in to_do(state, "check", items, mark, **chosen)]

    assert names("card, library 1") == []
    assert names("card, library 2") == ["a", "b"]
    assert names("card, library 1", redo_failed=True) == ["b"]
    assert names("card, library 1", redo=True) == ["a", "b"]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"schema": 1}')
    with pytest.raises(ValueError, match=r"other\.json"):
        load(path)


def test_names_of_cards_in_names_of_files():
    assert slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert slug("NVIDIA GeForce RTX 4090") == "rtx-4090"


# ---- measuring ------------------------------------------------------------------------------------------


def _doubling(**changes: object) -> Problem:
    x = torch.randn(5)
    fields: dict = {
        "shape": {"n": 5},
        "inputs": {"x": x},
        "contenders": (
            Contender("fastlm", lambda i: lambda: 2 * i["x"], ours=True),
            Contender("sum", lambda i: lambda: i["x"] + i["x"]),
            Contender("triple", lambda i: lambda: 3 * i["x"]),
            Contender("broken", lambda i: lambda: 1 / 0),
            Contender("graph", lambda i: lambda: 2 * i["x"], graph=True),
        ),
        "work": {
            "forward": Work(5.0, "FLOP", {}, (Target("speedup", 1e-6, "sum"),)),
            "backward": Work(5.0, "FLOP"),
        },
        "expected": lambda part: {"out": 2 * x} if part == "forward" else {"dx": torch.full((5,), 2.0)},
        "gradients": ("x",),
        "upstream": (torch.ones(5),),
    }
    return Problem(**(fields | changes))


def test_only_right_contenders_are_timed():
    context = Context(Settings(device="cpu", rounds=3))
    for part in ("forward", "backward"):
        rows = {row["name"]: row for row in measure_part(_doubling(), part, context)["contenders"]}
        assert {name: row["status"] for name, row in rows.items()} == {
            "fastlm": "timed",
            "sum": "timed",
            "triple": "wrong",
            "broken": "failed",
            "graph": "left out",
        }
        assert len(rows["sum"]["samples"]) == 3
        assert "samples" not in rows["triple"]


def test_without_a_reference_the_first_contender_is_it():
    context = Context(Settings(device="cpu", rounds=3))
    rows = measure_part(_doubling(expected=None), "forward", context)["contenders"]
    assert [row["status"] for row in rows][:3] == ["timed", "timed", "wrong"]


# ---- floors and targets ---------------------------------------------------------------------------------

H200 = {"exp2": 4.18e12, "fma": 67e12, "copy": 4.3e12, "gemm_bf16": 790e12}


def test_floors_of_the_design_notes():
    """Scan with D = 4096 and N = 16 over 32K tokens on an H200: 474 µs forward with balanced pipes, 1147 µs backward."""
    from bench.gpu.cases_scan import scan_work

    work = scan_work(1, 4096, 32768, 16)
    assert ceilings.floor_seconds(work["forward"].floor, H200) == pytest.approx(474e-6, rel=0.01)
    assert ceilings.floor_seconds(work["backward"].floor, H200) == pytest.approx(1147e-6, rel=0.01)
    assert ceilings.floor_seconds(work["forward"].floor, {"copy": 1.0}) is None
    assert ceilings.floor_seconds({"bytes": 4.3e12, "bf16": 790e12 / 2}, H200) == pytest.approx(1.0)


def test_useful_work_of_a_window():
    from bench.gpu.cases_attention import useful_flops

    visible = sum(min(i + 1, 7) for i in range(20))
    assert useful_flops(1, 20, 3, 8, 7) == 4 * 8 * 3 * visible
    assert useful_flops(2, 5, 1, 8, 100) == 2 * 4 * 8 * 15


def test_targets_are_judged_by_the_measured_ceilings():
    state = new_state(FACTS)
    rate = {"per_second": 100.0, "best": 100.0, "middle": 90.0}
    keep(state, "ceilings", "copy", Outcome("passed", data=rate), fingerprint_of(state, "ceilings"))
    row = {
        "name": "fastlm",
        "ours": True,
        "graph": False,
        "orientation": False,
        "status": "timed",
        "reason": "",
    }
    times = {"median": 2.0, "p20": 1.9, "p80": 2.2, "samples": [2.0], "errors": {"out": 1e-3}}
    targets = [
        Target("share", 0.4),
        Target("share", 0.8),
        Target("floor", 2.5),
        Target("speedup", 1.0, "absent"),
    ]
    part = {
        "work": {"amount": 100.0, "unit": "bytes", "floor": {"bytes": 100.0}},
        "targets": [t.as_dict() for t in targets],
        "contenders": [row | times],
        "watch": {},
    }
    keep(
        state,
        "bench",
        "case",
        Outcome("passed", data={"shape": {}, "note": "", "parts": {"step": part}}),
        fingerprint_of(state, "bench"),
    )
    assert [row[-1] for row in report.target_rows(state)] == ["yes", "**no**", "yes", "?"]
    text = report.plain(report.markdown(state))
    assert "NVIDIA H100" in text
    assert "50.0%" in text


# ---- sanitizers and guards ------------------------------------------------------------------------------

REPORT = """========= COMPUTE-SANITIZER
causal_conv1d-silu
========= Invalid __global__ read of size 4 bytes
=========     at void {}(int)+0x10
=========     by thread (0,0,0) in block (0,0,0)
calls: {{"calls": 3, "refused": 1}}
========= ERROR SUMMARY: 1 error
"""


def test_reports_about_fastlm_fail():
    with pytest.raises(WrongError, match="1 of 1 reports"):
        sanitize.judge(REPORT.format("fastlm::causal_conv1d::forward"), 77)
    assert sanitize.judge(REPORT.format("at::native::fill"), 77)["reports_about_others"] == 1
    with pytest.raises(WrongError, match="did not come to their end"):
        sanitize.judge("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 1)


def test_a_tool_is_run_on_the_chosen_samples(tmp_path):
    """In place of compute-sanitizer, a script that runs the program behind its own options."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\nwhile [ "$1" != "' + sys.executable + '" ]; do shift; done\nexec "$@"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    settings = Settings(device="cpu", sanitizer=str(tool))
    (item,) = [i for i in sanitize.items(settings) if i.name == "memcheck/causal_conv1d"]
    data = item.run(Context(settings))
    assert data is not None
    assert data["calls"] == 6
    assert data["reports_about_others"] == 0


def test_guards_notice_a_write_beside_a_tensor():
    for t in (torch.randn(3, 4).t(), torch.randn(1, 5).expand(3, 5), torch.arange(7)):
        inside, intact = guarded(t)
        assert torch.equal(inside, t)
        assert inside.stride() == t.stride()
        assert intact()
        torch.as_strided(inside, (1,), (1,), inside.storage_offset() - 1).zero_()
        assert not intact()


@pytest.mark.parametrize(
    "op",
    [
        "selective_scan",
        "causal_conv1d",
        "sliding_window_attention",
        "scan_swa",
        "samba_decode_step",
        "grin_route",
        "moe_plan",
        "grouped_gemm",
        "moe_experts",
        "linear_nll",
        "select_tokens",
    ],
)
def test_odd_sizes_have_names_of_their_own(op):
    names = [sample.name for sample in sizes.samples(op)]
    assert len(names) == len(set(names)) > 9


def test_an_operator_without_odd_sizes_has_none():
    assert sizes.samples("exp_ceiling") == []


@pytest.mark.parametrize(("length", "window"), [(700, 300), (384, 128), (300, 1), (512, 2048), (70, 32)])
def test_the_blocks_of_flex_attention_are_those_of_the_mask(length, window):
    from torch.nn.attention.flex_attention import flex_attention

    from bench.gpu.peers import block_mask, window_mask

    q, k, v = (torch.randn(1, 1, length, 8) for _ in range(3))
    out = flex_attention(q, k, v, block_mask=block_mask(length, window, "cpu"))
    mask = window_mask(length, window, "cpu")
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, want)
    blocks = block_mask(length, window, "cpu")
    count = -(-length // 128)
    padded = torch.zeros(count * 128, count * 128, dtype=torch.bool)
    padded[:length, :length] = mask
    some = padded.view(count, 128, count, 128).any(3).any(1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), some)
