"""The emulated device that CUDA kernels are tested on: it runs right kernels rightly and finds wrong ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def cuda_headers() -> Path | None:
    nvcc = shutil.which("nvcc")
    candidates = [Path("/usr/local/cuda/include")]
    if nvcc is not None:
        candidates.insert(0, Path(nvcc).resolve().parents[1] / "include")
    return next((folder for folder in candidates if (folder / "cuda_bf16.h").exists()), None)


def emulated_program(folder: Path, main: str, *sources: str, sanitizers: str = "undefined") -> Path:
    """A program of tests/cuda with sources of csrc as host code; skips the test where it cannot be compiled."""
    headers, compiler = cuda_headers(), shutil.which("g++")
    if headers is None or compiler is None:
        pytest.skip("the CUDA headers or a C++ compiler are missing")
    paths = [f"tests/cuda/{main}.cpp", "csrc/core/cuda/emulation/run.cpp", *(f"csrc/{s}" for s in sources)]
    flags = [
        "-std=c++20",
        "-O1",
        "-w",
        "-DFASTLM_EMULATE_CUDA",
        "-I",
        str(ROOT / "csrc"),
        "-isystem",
        str(headers),
    ]
    if sanitizers:
        flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    target = folder / main
    command = [compiler, *flags, "-x", "c++", *(str(ROOT / p) for p in paths), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated_program(tmp_path_factory.mktemp("emulated"), "emulated_kernels")


def _run(program: Path, case: str, schedule: int) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "FASTLM_EMULATED_SCHEDULE": str(schedule)}
    return subprocess.run([program, case], capture_output=True, text=True, env=env, timeout=60)


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("case", ["reverse", "copy", "early_exit", "meeting", "multiply", "sums"])
def test_right_kernels(program, case, schedule):
    done = _run(program, case, schedule)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", ["reverse_without_barrier", "copy_without_wait", "unwritten"])
def test_kernels_that_do_not_wait_give_wrong_numbers(program, case):
    """Whatever the order of threads."""
    for schedule in (0, 1, 2):
        done = _run(program, case, schedule)
        assert done.returncode == 1, done.stderr


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("divergent", "lanes of one warp meet at different exchanges"),
        ("half_a_barrier", "no thread can go on"),
        ("copy_outside", "lies outside of the shared memory (256 bytes)"),
        ("too_much_shared", "307200 bytes of shared memory are more than a block may have"),
    ],
)
def test_kernels_that_would_hang_or_fault_say_so(program, case, text):
    done = _run(program, case, 0)
    assert done.returncode < 0
    assert text in done.stderr
