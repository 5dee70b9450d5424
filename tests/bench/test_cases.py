"""Every case file is complete, and the commands find their way through them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlm
from bench import ceilings, machine, main, memory, record
from bench.case import DTYPES, MODES
from bench.cases import all_cases, find_case
from bench.runner import run_case
from tests.bench.fakes import SETTINGS

ROOT = Path(__file__).parents[2]
CASES = all_cases()


def test_names_are_unique():
    names = [(case.op, case.name, case.dtype) for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_case_is_complete(case):
    names = [contender.name for contender in case.contenders]
    assert len(set(names)) == len(names)
    assert case.contenders[0].ours
    assert case.dtype in DTYPES
    assert set(case.parts) <= set(case.work)
    known = set(ceilings.DESCRIPTION) | {"dot"}
    for part in case.parts:
        assert case.work[part].amount > 0
        assert set(case.work[part].floor) <= known
    for contender in case.contenders:
        assert contender.mode in MODES
        assert all(set(cost) <= known for cost in contender.cost.values())
    for target in case.targets:
        assert target.part in case.parts
        assert target.kind in ("rate", "time", "speedup", "memory")
        assert target.value > 0
        assert (target.peer in names) == (target.kind in ("speedup", "memory"))
        assert target.kind != "memory" or case.memory


@pytest.mark.parametrize("case", [case for case in CASES if case.quick], ids=lambda case: case.label)
def test_inputs_have_what_the_case_names(case):
    inputs = case.inputs()
    assert set(case.gradients) | set(case.mutated) <= set(inputs)
    assert all(inputs[name].is_floating_point() for name in case.gradients)
    cast = {t.dtype for t in inputs.values() if t.is_floating_point()}
    assert DTYPES[case.dtype] in cast
    assert cast <= {DTYPES[case.dtype], torch.float32}


def test_reference_machine_has_every_ceiling():
    for rates in ceilings.REFERENCE_RATES.values():
        assert set(rates) == set(ceilings.DESCRIPTION)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [case.name for case in CASES if case.op == "causal_conv1d" and case.quick and case.dtype == "fp32"],
)
def test_fastlm_and_plain_pytorch_pass_their_check(name):
    """The whole way once: inputs, float64 reference, contenders, gradients."""
    for result in run_case(find_case("causal_conv1d", name, "fp32"), SETTINGS):
        status = {row["name"]: row["status"] for row in result["contenders"]}
        assert status["fastlm"] == "timed"
        assert "wrong" not in status.values()
        assert "failed" not in status.values()


# ---- commands


def test_run_writes_a_record_and_prints_tables(tmp_path, capsys):
    path = tmp_path / "run.json"
    words = ["--op", "call_overhead", "--case", "update", "--rounds", "2", "--threads", "1", "--no-ceilings"]
    before = torch.get_num_threads()
    assert main(["run", *words, "--json", str(path)]) == 0
    assert torch.get_num_threads() == before
    output = capsys.readouterr()
    assert "causal_conv1d_update" in output.out
    assert "1 thread(s)" in output.err
    data = record.load(path)
    assert data["settings"]["threads"] == 1
    assert data["software"]["fastlm"] == fastlm.build_info()
    assert all(len(row["samples"]["wall"]) == 2 for row in data["results"][0]["contenders"])
    assert main(["show", str(path)]) == 0


def test_without_a_command_it_runs(monkeypatch):
    seen = []
    monkeypatch.setattr("bench.commands._run", lambda arguments: seen.append(arguments.quick) or 0)
    assert main(["--quick"]) == 0
    assert main([]) == 0
    assert seen == [True, False]


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "compare" in capsys.readouterr().out


def test_list_names_the_cases(capsys):
    assert main(["list", "--op", "causal_conv1d", "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    assert "update_B1_D4608" in text
    assert "bf16" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--op", "sorting"], "--op must be one of call_overhead"),
        (["run", "--dtype", "int3"], "--dtype must be one of"),
        (["list", "--case", "no such case"], "no case fits"),
        (["run", "--rounds", "0"], "at least 1"),
        (["dance"], "invalid choice"),
    ],
)
def test_bad_words(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_failed_fastlm_row_is_an_error(monkeypatch, capsys):
    case = find_case("call_overhead", "causal_conv1d_update", "fp32")
    wrong = dataclasses.replace(case.contenders[0], build=lambda inputs: lambda: inputs["x"] + 1)
    broken = dataclasses.replace(case, contenders=(wrong,))
    monkeypatch.setattr("bench.cases.all_cases", lambda: (broken,))
    assert main(["run", "--rounds", "1", "--no-ceilings"]) == 1
    assert "wrong" in capsys.readouterr().err


@pytest.mark.slow
def test_package_runs_under_another_name(tmp_path):
    """Installed, the folder is called fastlm_bench: every import in it must be relative."""
    (tmp_path / "fastlm_bench").symlink_to(ROOT / "bench")
    code = (
        "import fastlm_bench, sys; code = fastlm_bench.main(['list']); "
        "assert 'bench' not in sys.modules; sys.exit(code)"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "causal_conv1d" in child.stdout


# ---- machine and memory


def test_machine_facts_are_complete():
    facts = machine.machine_facts()
    assert facts["cpu"]
    assert facts["cpus"] >= 1
    assert facts["memory_bytes"] > 2**20
    assert set(machine.software_facts()) >= {"torch", "fastlm", "cpu_level"}


def test_peak_counts_what_is_freed_again():
    def call():
        return torch.ones(32 * 2**20, dtype=torch.uint8)[:4].clone()

    peak, kept = memory.peak_of(call)
    assert 28 * 2**20 < peak < 64 * 2**20
    assert kept == 4


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    case = find_case("causal_conv1d", "B1_D2048_L512_channel_last", "fp32")
    answer = memory.measure_in_child(case, "forward", ["fastlm"], 1)
    assert isinstance(answer, dict), answer
    out = 2048 * 512 * 4
    assert answer["fastlm"]["result_bytes"] == out
    assert out * 0.9 < answer["fastlm"]["peak_extra_bytes"] < out + 16 * 2**20


def test_memory_of_a_failing_child_says_why():
    case = dataclasses.replace(find_case("causal_conv1d", "update_B1_D4608", "fp32"), name="unheard_of")
    answer = memory.measure_in_child(case, "decode step", ["fastlm"], 1)
    assert isinstance(answer, str)
    assert "unheard_of" in answer


def test_ceilings_of_the_level_in_use():
    module = sys.modules["fastlm._C"]
    names = module.ceiling_names()
    assert {"fma", "exp2", "read", "copy"} <= set(names)
    assert ("dot_bf16" in names) == (fastlm.cpu_capability() == "avx512_bf16")
    for name in names:
        rate = module.measure_ceiling(name, seconds=1e-4, threads=2)
        assert rate["per_cpu_second"] > 0
        assert rate["per_wall_second"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sleep",), "name must be one that the CPU level"),
        (("fma", 0.0), "seconds must be in"),
        (("fma", 61.0), "seconds must be in"),
        (("fma", float("nan")), "seconds must be in"),
        (("fma", 0.1, 0), "threads must be in"),
    ],
)
def test_ceiling_that_cannot_be_measured(words, message):
    with pytest.raises(ValueError, match=message):
        sys.modules["fastlm._C"].measure_ceiling(*words)
