"""The command line: instant help, flags that are the settings, one sentence for every error."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastlm.training import InputError, TrainConfig, load_record
from fastlm_cli import train as train_command
from fastlm_cli.errors import explain
from fastlm_cli.main import app
from fastlm_cli.main import run as entry
from tests.training.runs import SMALL, write_text

FASTLM = [sys.executable, "-m", "fastlm_cli"]
SMALL_FLAGS = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str | Path, stdin: str = "") -> Done:
    """The command in this process, through the real entry point: torch is imported once for all tests."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin, torch.get_num_threads()
    sys.argv, sys.stdin = ["fastlm", *map(str, arguments)], io.StringIO(stdin)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            entry()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.argv, sys.stdin = before[:2]
        torch.set_num_threads(before[2])
    return Done(code, out.getvalue(), err.getvalue())


def launch(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    words = [*FASTLM, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell that runs the tests in the background has interrupts ignored, and its children inherit that.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen(words, text=True, **pipes, **heard, **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text")


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "my run"
    done = run("train", "samba", "--data", text, "--out", out, *SMALL_FLAGS, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
    return out


# Start


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["--help"], {}),
        (["--version"], {}),
        (["train", "--help"], {}),
        ([], {"_FASTLM_COMPLETE": "complete_bash", "COMP_WORDS": "fastlm tr", "COMP_CWORD": "1"}),
    ],
    ids=["help", "version", "train help", "completion"],
)
def test_help_version_and_completion_load_nothing_heavy(arguments: list[str], extra: dict[str, str]) -> None:
    """What makes them instant, on any machine."""
    environment = {**os.environ, **extra}
    code = f"import sys; sys.argv = ['fastlm', *{arguments!r}]\nfrom fastlm_cli.main import run\nrun()"
    heavy = (
        "import sys, atexit\n"
        "heavy = lambda: [m for m in ('torch', 'fastlm', 'numpy', 'tokenizers') if m in sys.modules]\n"
        "atexit.register(lambda: print(heavy(), file=sys.stderr))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", heavy + code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    if extra:
        assert "train" in done.stdout


def processor_seconds(*command: str) -> float:
    """User and system time of the command as a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime


def test_help_costs_little_more_than_the_library_that_prints_it() -> None:
    """Processor time, in turns: the best of five, after a first one that writes the .pyc files. The ratio does not know how
    fast the machine is; the number of milliseconds would."""
    pairs = [
        (processor_seconds(*FASTLM[1:], "--help"), processor_seconds("-c", "import typer")) for _ in range(6)
    ]
    own, library = (min(times) for times in zip(*pairs[1:], strict=True))
    assert own < 4 * library, f"fastlm --help: {own:.3f} s, import typer: {library:.3f} s"


def test_every_setting_is_a_flag_with_the_same_default() -> None:
    parameters = inspect.signature(train_command.train, eval_str=True).parameters
    rest = {"out", "resume", "config", "as_json", "quiet"}
    assert set(parameters) - rest == set(TrainConfig.model_fields)
    for name, field in TrainConfig.model_fields.items():
        if name == "architecture":
            continue
        parameter = parameters[name]
        assert parameter.default is None, "None means: not given"
        shown = parameter.annotation.__metadata__[0].show_default
        if field.default is not None:
            assert shown == str(field.default), f"--{name} shows {shown}, the default is {field.default}"


# Train, resume, generate


def test_a_run_from_the_command_line(trained: Path, text: Path) -> None:
    record = load_record(trained)
    assert record.status == "finished"
    assert record.config.data == text
    again = run("train", "samba", "--out", trained, "--resume")
    assert again.returncode == 0
    assert re.search(r"held-out text +\d\.\d{3} bits per byte", again.stdout)
    assert "'" + str(trained) + "'" in again.stdout, "a folder with a space is quoted in what to type next"


def test_generate_prints_prompt_and_text(trained: Path) -> None:
    arguments = ["generate", trained, "--max-new-tokens", "8", "--seed", "3"]
    plain = run(*arguments, "--prompt", "def f(")
    streamed = run(*arguments, "--prompt", "def f(", "--stream")
    piped = run(*arguments, "--prompt", "-", stdin="def f(")
    as_json = run(*arguments, "--prompt", "def f(", "--json")
    assert plain.returncode == streamed.returncode == piped.returncode == as_json.returncode == 0
    assert plain.stdout.startswith("def f(")
    assert plain.stdout == streamed.stdout == piped.stdout
    answer = json.loads(as_json.stdout)
    assert "def f(" + answer["text"] + "\n" == plain.stdout
    assert answer["num_tokens"] == 8
    assert re.search(r"8 tokens, [\d,]+ tokens/s", plain.stderr)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    text: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "run"
    flags = ["--data", text, "--out", out, *SMALL_FLAGS, "--steps", "100000"]
    process = launch("train", "samba", *flags)
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text()) < 1000:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    record = load_record(out)
    assert f"Saved after step {record.step} of 100000." in errors
    assert f"To go on: fastlm train samba --out {out} --resume" in errors
    assert "Traceback" not in errors


def test_ctrl_c_before_training_is_no_traceback(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = launch("train", "samba", "--out", out, "--steps", "5")
    deadline = time.monotonic() + 60
    while not any(out.glob("data.partial-*")):  # the default text takes seconds to prepare
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped before the first step." in errors
    assert "Traceback" not in errors
    assert not any(out.glob("data*"))


# Errors


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train"], "expected a folder for the run, got none"),
        (
            ["train", "samba", "--out", "{tmp}/r", "--data", "{tmp}/none"],
            "--data: expected a folder or file of text",
        ),
        (
            ["train", "samba", "--out", "{tmp}/r", "--lr", "-1"],
            "--lr: Input should be greater than 0, got -1.0",
        ),
        (["train", "samba", "--out", "{tmp}/r", "--minutes", "1", "--steps", "2"], "must not both be given"),
        (["train", "samba", "--out", "{tmp}/r", "--preset", "no"], "--preset: preset must be one of"),
        (["train", "samba", "--out", "{tmp}/r", "--resume"], "expected the folder of a run"),
        (["train", "samba", "--out", "{tmp}/r", "--config", "{tmp}/x.json"], "--config: cannot read"),
        (["train", "samba", "--out", "/proc/nowhere/r", "--steps", "2"], "--out: cannot make folder"),
        (["train", "mamba", "--out", "{tmp}/r"], "architecture"),
        (["train", "samba", "--out", "{tmp}/r", "--steps", "many"], "Input should be a valid integer"),
        (["generate", "{tmp}"], "RUN: expected a run"),
        (["generate", "{tmp}/none"], "RUN: expected the folder of a run or a model, found none"),
        (["generate", "{tmp}", "--stream", "--json"], "expected one of --stream and --json, got both"),
        (["demo", "--seconds", "1", "--minutes", "1"], "expected one of --seconds and --minutes, got both"),
        (["demo", "--out", "{tmp}/mine"], "--out: expected a new or empty folder, found precious in"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_code_2(
    arguments: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERM", "dumb")
    done = run(*(word.format(tmp=tmp_path) for word in arguments))
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "mine" / "precious").exists()


def test_traceback_only_on_demand(tmp_path: Path) -> None:
    plain = run("generate", tmp_path)
    assert plain.returncode == 2
    assert len(plain.stderr.splitlines()) == 1
    assert plain.stderr.startswith("fastlm: error: RUN: expected a run")
    with pytest.raises(
        InputError, match=r"RUN: expected a run"
    ):  # which Python then shows with its traceback
        run("generate", tmp_path, "--traceback")


def test_a_damaged_checkpoint_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    record = load_record(out)
    record.status = "interrupted"
    record.save(out)
    newest = max((out / "checkpoints").iterdir())
    (newest / "model.safetensors").write_bytes(b"rubbish")
    done = run("train", "samba", "--out", out, "--resume", "--quiet")
    assert done.returncode == 2
    assert done.stderr.startswith("fastlm: error: checkpoint: ")
    assert "model.safetensors: expected" in done.stderr
    assert len(done.stderr.splitlines()) == 1


class _OwnError(Exception):
    exit_code = 7


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("a\n  b"), ("a b", 2)),
        (IndexError("id 5"), ("id 5", 2)),
        (OSError(28, "No space left on device", "/x"), ("/x: No space left on device", 1)),
        (ImportError("no torch"), ("no torch", 1)),
        (_OwnError("mine"), ("mine", 7)),
        (KeyError("k"), ("KeyError: 'k' (add --traceback to see where)", 1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_become_a_sentence_and_a_code(error: Exception, expected: tuple[str, int]) -> None:
    assert explain(error) == expected


# Settings from a file


def test_flags_win_over_a_file_and_its_other_limit(text: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({**SMALL, "data": str(text), "steps": 9, "seed": 4}))
    arguments = ["--config", tmp_path / "settings.json", "--out", tmp_path / "run", "--steps", "2", "--quiet"]
    done = run("train", "samba", *arguments)
    assert done.returncode == 0, done.stderr
    record = load_record(tmp_path / "run")
    assert (record.config.steps, record.config.seed, record.config.peak_lr) == (2, 4, 0.002)
    assert done.stderr == ""


# Bench and doctor


def test_bench_hands_its_arguments_over(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    from fastlm_cli import bench

    seen: list[list[str]] = []
    package = types.SimpleNamespace(main=lambda words: seen.append(words) or 3)
    monkeypatch.setattr(bench, "_package", lambda: package)
    done = CliRunner().invoke(
        app, ["bench", "--quick", "--op", "selective_scan", "--json", "out.json", "--help"]
    )
    assert seen == [["--quick", "--op", "selective_scan", "--json", "out.json", "--help"]]
    assert done.exit_code == 3


def test_doctor_tests_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlm import doctor

    report = doctor.examine()
    assert report["ok"], report["problem"]
    rows = {row["name"]: row for row in report["operators"]}
    registered = {
        n.partition("::")[2].partition(".")[0]
        for n in torch._C._dispatch_get_all_op_names()
        if n[:8] == "fastlm::"
    }
    assert set(rows) == {name for name in registered if not name.endswith("_backward")}
    assert set(doctor.CASES) == set(rows)
    for name, row in rows.items():
        assert row["cpu"]
        assert row["fake"]
        assert row["forward_error"] <= doctor.TOLERANCE
        assert row["gb_per_second"] > 0
        if name.endswith("_update") or name in (
            "samba_decode_step",
            "moe_plan",
            "select_tokens",
        ):  # in place; a choice
            assert row["autograd"] is None
        else:
            assert row["autograd"]
            assert row["backward_error"] <= doctor.TOLERANCE
    assert report["facts"]["CPU level"]
    assert json.dumps(report)


def test_doctor_finds_a_wrong_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlm import doctor, ops

    right = ops.causal_conv1d
    monkeypatch.setattr(ops, "causal_conv1d", lambda *a, **k: right(*a, **k) * 1.001)
    report = doctor.examine()
    assert not report["ok"]
    assert report["problem"] == "self-test failed: causal_conv1d"
    row = next(row for row in report["operators"] if row["name"] == "causal_conv1d")
    assert "expected at most 1e-04" in row["problem"]
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["problem"] == "self-test failed: causal_conv1d"
    shown = CliRunner().invoke(app, ["doctor"])
    assert "causal_conv1d: error" in shown.stdout.replace("\n", " ")


def test_doctor_tests_the_cuda_kernels_where_there_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second device of another name stands for the card, with kernels that are wrong for one operator."""
    from fastlm import doctor, ops

    known, right = doctor._has_kernel, ops.grouped_gemm
    card = torch.device("cpu", 0)  # equal to no other device of this test
    monkeypatch.setattr(doctor, "_devices", lambda: {"cpu": torch.device("cpu"), "cuda": card})
    monkeypatch.setattr(doctor, "_has_kernel", lambda name, key: key == "CUDA" or known(name, key))
    calls: list[int] = []

    def second_half_is_wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return right(*args, **kwargs) * (
            1 if len(calls) <= 5 else 1.001
        )  # 5: a comparison and four timed calls

    monkeypatch.setattr(ops, "grouped_gemm", second_half_is_wrong)
    report = doctor.examine()
    rows = {row["name"]: row for row in report["operators"]}
    assert report["problem"] == "self-test failed: grouped_gemm"
    assert rows["grouped_gemm"]["problem"].startswith("on cuda: error")
    assert (
        rows["grouped_gemm"]["forward_error"] <= doctor.TOLERANCE < rows["grouped_gemm"]["cuda_forward_error"]
    )
    for name, row in rows.items():
        assert row["cuda"]
        assert row["cuda_gb_per_second"] > 0
        assert name == "grouped_gemm" or row["cuda_forward_error"] <= doctor.TOLERANCE
        assert (row["cuda_backward_error"] is None) == (row["backward_error"] is None)
    lines = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "80"}).stdout.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("on the CUDA device"))
    table = lines[begin + 1 : begin + 1 + len(rows)]
    assert [line.split()[0] for line in table] == list(rows)  # names are not cut
    assert all(len(line.split()) == 4 for line in table)


def test_doctor_says_why_fastlm_does_not_import(tmp_path: Path) -> None:
    environment = {**os.environ, "FASTLM_LIBRARY_DIR": str(tmp_path)}
    process = launch("doctor", "--json", env=environment)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    report = json.loads(shown)
    assert (
        "import fastlm failed: FASTLM_LIBRARY_DIR must name a folder with libfastlm_ops.so"
        in report["problem"]
    )
    assert report["versions"]["torch"]
