"""Runs of the script for a GPU, tried without one: what is repeated, what a peer costs, what the report leaves out, slow tools."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.utils import cpp_extension

from bench.gpu import ceilings, cli, peers, pool, report, sanitize
from bench.gpu.facts import slow_build
from bench.gpu.item import Context, Item, Outcome, Settings, SkipError, WrongError
from bench.gpu.state import fingerprint_of, keep, load, new_state, only_current, to_do
from tests.bench.test_gpu_script import FACTS, REPORT


def _run(state: Path, *words: str) -> int:
    return cli.main([*words, "--device", "cpu", "--state", str(state), "--workers", "1"])


# ---- peers and tools that come later --------------------------------------------------------------------


def test_a_peer_beside_the_results_is_found_and_what_lacked_it_repeated(tmp_path, capfd):
    """No `--peers` in any call: the folder beside the results serves by itself."""
    state, words = tmp_path / "results.json", ["--no-compile", "--rounds", "1", "--only", "causal_conv1d"]
    case = "causal_conv1d/B1_D16_L70_channel_last"

    def status() -> dict[str, str]:
        rows = load(state)["parts"]["bench"]["items"][case]["data"]["parts"]["forward"]["contenders"]
        return {row["name"]: row["status"] for row in rows}

    assert _run(state, "peers", *words) == 0
    assert load(state)["parts"]["peers"]["items"]["import/causal_conv1d"]["status"] == "skipped"
    assert _run(state, "bench", *words) == 0
    assert status()["causal_conv1d"] == "unavailable"

    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "causal_conv1d.py").write_text(
        "from bench.cases.causal_conv1d import conv_and_silu\n\n"
        "def causal_conv1d_fn(x, weight, bias, activation):\n    return conv_and_silu(x, weight, bias)\n"
    )
    assert _run(state, "peers", *words) == 0
    assert load(state)["parts"]["peers"]["items"]["import/causal_conv1d"]["status"] == "passed"
    assert _run(state, "bench", *words) == 0
    assert status()["causal_conv1d"] == "timed"

    capfd.readouterr()
    assert _run(state, "bench", *words, "--without", "F.conv1d") == 0
    assert "1 items, 0 to do" in capfd.readouterr().err
    assert _run(state, "bench", *words, "--without", "F.conv1d", "--redo") == 0
    assert status()["F.conv1d"] == "left out"


def test_what_lacked_a_tool_is_done_again_once_there_is_one():
    state = new_state(FACTS)
    items = [Item(name, lambda context: None) for name in ("passed", "skipped")]
    for name in ("passed", "skipped"):
        keep(state, "sanitize", name, Outcome(name), "card", "tool a")

    def names(means: str) -> list[str]:
        found = to_do(state, "sanitize", items, "card", redo=False, redo_failed=False, means=means)
        return [item.name for item in found]

    assert names("tool a") == []
    assert names("tool b") == ["skipped"]


def test_a_build_that_was_ended_leaves_no_lock(tmp_path, monkeypatch):
    (tmp_path / "mamba" / "csrc" / "selective_scan").mkdir(parents=True)
    lock = tmp_path / "build" / "selective_scan_cuda" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    seen: list[bool] = []
    monkeypatch.setattr(cpp_extension, "load", lambda *_, **__: seen.append(lock.exists()))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    build = next(item for item in peers.items(Settings()) if item.name.startswith("build/"))
    build.run(Context(Settings(peers=str(tmp_path))))
    assert seen == [False]


def test_all_goes_past_parts_without_a_match(tmp_path, capfd):
    state = tmp_path / "r.json"
    assert _run(state, "all", "--only", "import/triton") == 0
    assert list(load(state)["parts"]["peers"]["items"]) == ["import/triton"]
    assert state.with_suffix(".md").is_file()
    capfd.readouterr()
    assert _run(state, "all", "--only", "no such item") == 2
    assert "no such item" in capfd.readouterr().err


# ---- workers that are lost ------------------------------------------------------------------------------


class _Fails:
    """In place of a worker: what is asked ends in `answers`, by whether peers take part."""

    stage = "forward: bad peer"
    answers: ClassVar[dict[bool, dict | str]] = {}

    def __init__(self, *words: object) -> None:
        self._ours_only = False

    def ask(self, name: str, *, ours_only: bool = False) -> None:
        self._ours_only = ours_only

    def wait_for(self, key: str, seconds: float) -> dict | str:
        return {"ready": True} if key == "ready" else self.answers[self._ours_only]

    def end(self) -> str:
        return "SIGSEGV"

    def finish(self) -> None:
        pass


def _answer(status: str, *, fatal: bool = False, reason: str = "") -> dict:
    return {"result": {"status": status, "reason": reason, "data": {"a": 1}}, "fatal": fatal}


_FATAL = _answer("failed", fatal=True, reason="illegal access")


def _outcomes(monkeypatch, part: str, answers: dict[bool, dict | str], names: list[str]) -> list[Outcome]:
    monkeypatch.setattr(pool, "_Worker", _Fails)
    monkeypatch.setattr(_Fails, "answers", answers)
    items = [Item(name, lambda context: None) for name in names]
    found: dict[str, Outcome] = {}
    words = {"workers": 1, "deadline": time.monotonic() + 1000, "on_result": found.__setitem__}
    assert pool.run_items(part, items, Settings(), **words) == []
    return [found[name] for name in names]


@pytest.mark.parametrize("lost", [_FATAL, "died", "late"])
def test_a_peer_that_costs_the_worker_does_not_cost_the_case(monkeypatch, lost):
    (outcome,) = _outcomes(monkeypatch, "bench", {False: lost, True: _answer("passed")}, ["case/a"])
    assert outcome.status == "passed"
    assert outcome.data == {"a": 1}
    assert outcome.reason.startswith("peers left out; with them it ")
    state = new_state(FACTS)
    keep(state, "bench", "case/a", outcome, fingerprint_of(state, "bench"))
    state["parts"]["bench"]["items"]["case/a"]["data"] = {"parts": {}}
    assert "`case/a`: peers left out" in report.markdown(state)


@pytest.mark.parametrize("lost", [_FATAL, "died", "late"])
def test_a_case_that_fails_without_peers_too_keeps_its_reason(monkeypatch, lost):
    (outcome,) = _outcomes(monkeypatch, "bench", {False: lost, True: "died"}, ["case/a"])
    assert outcome.status == {"died": "crashed", "late": "hung"}.get(str(lost), "failed")
    assert "without" not in outcome.reason


def test_other_parts_are_not_tried_twice(monkeypatch):
    (outcome,) = _outcomes(monkeypatch, "check", {False: "died", True: _answer("passed")}, ["sample/a/b"])
    assert outcome.status == "crashed"


def test_errors_that_stay_with_the_process_count_as_lost_workers(monkeypatch):
    names = [f"sample/op/{i}" for i in range(5)]
    outcomes = _outcomes(monkeypatch, "check", {False: _FATAL}, names)
    assert [outcome.status for outcome in outcomes] == ["failed"] * 3 + ["skipped"] * 2


# ---- results of another card or library -----------------------------------------------------------------


def test_the_report_leaves_out_other_cards_and_libraries():
    state = new_state(FACTS)
    rate = {"per_second": 100.0, "best": 100.0, "middle": 90.0}
    keep(state, "ceilings", "copy", Outcome("passed", data=rate), "another card")
    keep(state, "ceilings", "fma", Outcome("passed", data=rate), fingerprint_of(state, "ceilings"))
    keep(state, "check", "sample/a/old", Outcome("failed", "old reason"), "another library")
    keep(state, "check", "sample/a/new", Outcome("failed", "new reason"), fingerprint_of(state, "check"))
    assert set(ceilings.rates(state)) == {"fma"}
    text = report.markdown(state)
    assert "new reason" in text
    assert "old reason" not in text
    assert "Left out, as they are of another card, driver or library: check 1, ceilings 1." in text
    kept = only_current(state)
    assert list(kept["parts"]["check"]["items"]) == ["sample/a/new"]
    assert len(state["parts"]["check"]["items"]) == 2


def test_a_build_without_wgmma_is_named_on_a_card_that_has_it():
    def facts(capability: str, cutlass: str | None, *architectures: str) -> dict:
        fastlm = FACTS["software"]["fastlm"] | {
            "cutlass": {"version": cutlass},
            "cuda": {"architectures": list(architectures)},
        }
        machine = FACTS["machine"] | {"capability": capability}
        return FACTS | {"machine": machine, "software": FACTS["software"] | {"fastlm": fastlm}}

    assert slow_build(facts("9.0", "4.2", "80", "90a")) == ""
    assert slow_build(facts("8.0", None, "80")) == ""
    assert "nvidia-cutlass" in slow_build(facts("9.0", None, "90a"))
    assert "90a" in slow_build(facts("9.0", "4.2", "80"))
    assert "**fastlm was built without" in report.markdown(new_state(facts("9.0", None, "80")))


# ---- tools that hang ------------------------------------------------------------------------------------


def _is_alive(process: int) -> bool:
    """Whether it runs; one that has ended may wait for its parent to look."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_a_tool_is_ended_with_the_program_it_started(tmp_path):
    """The program holds the output open after the tool has gone: no call waits for it."""
    child = tmp_path / "child"
    words = ["sh", "-c", f"sleep 600 & echo $! > {child}; echo begun; wait"]
    groups: list[int] = []
    context = Context(Settings(device="cpu"), started=groups.append)
    text, code = sanitize.run_group(words, dict(os.environ), 1.0, context)
    assert (text, code) == ("begun\n", None)
    assert len(groups) == 2
    assert groups[1] == 0
    process = int(child.read_text())
    end = time.monotonic() + 30
    while _is_alive(process) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _is_alive(process)


def test_what_ran_out_of_time_is_skipped_but_for_its_reports():
    begun = "========= COMPUTE-SANITIZER\n"
    for text, code in ((begun, None), (f"{begun}Timeout (0:06:20)!\nThread 0x1\n", 1)):
        with pytest.raises(SkipError, match="longer than"):
            sanitize.judge(text, code)
    with pytest.raises(WrongError, match="1 of 1 reports"):
        sanitize.judge(REPORT.format("fastlm::scan"), None)


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_only_initcheck_looks_at_every_kernel(tool, monkeypatch):
    asked: list[list[str]] = []

    def run_group(words: list[str], *_: object) -> tuple[str, int]:
        asked.append(words)
        return 'calls: {"calls": 1, "refused": 0}', 0

    monkeypatch.setattr(sanitize, "run_group", run_group)
    settings = Settings(device="cpu", sanitizer="tool")
    next(i for i in sanitize.items(settings) if i.name.startswith(tool)).run(Context(settings))
    (words,) = asked
    assert ("--kernel-name" in words) == (tool != "initcheck")
    if tool != "initcheck":
        assert words[words.index("--kernel-name") + 1] == "kns=fastlm"
    assert words.index(sys.executable) > words.index("--tool")


def test_ending_a_worker_ends_what_it_started_apart():
    worker = pool._Worker("check", Settings(device="cpu"), 1)
    child = pool.subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        worker._answers.put({"group": child.pid})
        worker._answers.put({"ready": True})
        assert worker.wait_for("ready", 5) == {"ready": True}
        worker.end()
        assert child.wait(timeout=30) == -signal.SIGKILL
    finally:
        child.kill()
        worker.end()


def test_the_program_under_a_tool_ends_by_itself(monkeypatch, capsys):
    """Before the tool's own limit: a tool that is ended leaves its program behind."""
    asked: list[tuple[float, bool]] = []
    monkeypatch.setattr(
        sanitize.faulthandler, "dump_traceback_later", lambda seconds, exit: asked.append((seconds, exit))
    )
    monkeypatch.setattr(sanitize, "chosen_samples", lambda *_: [])
    monkeypatch.setattr(sanitize, "poison_fresh_memory", lambda on: None)
    settings = '{"device": "cpu"}'
    monkeypatch.setattr(sys, "argv", ["sanitize", "memcheck", "causal_conv1d", settings])
    assert sanitize.main() == 0
    assert [(seconds < sanitize._LIMIT, exit) for seconds, exit in asked] == [(True, True)]
    assert "calls: " in capsys.readouterr().out
