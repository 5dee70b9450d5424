"""The matrix products of csrc/core/cuda/gemm against plain loops, on the emulated device."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .test_emulated_device import ROOT, cuda_headers


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    headers, compiler = cuda_headers(), shutil.which("g++")
    if headers is None or compiler is None:
        pytest.skip("the CUDA headers or a C++ compiler are missing")
    target = tmp_path_factory.mktemp("gemm") / "gemm"
    sources = [
        "tests/cuda/emulated_gemm.cpp",
        "csrc/core/cuda/emulation/run.cpp",
        "csrc/core/cuda/tensor_map.cu",
        "csrc/core/cuda/gemm/gemm.cu",
    ]
    flags = [
        "-std=c++20",
        "-O1",
        "-w",
        "-DFASTLM_EMULATE_CUDA",
        "-I",
        str(ROOT / "csrc"),
        "-isystem",
        str(headers),
        "-x",
        "c++",
    ]
    subprocess.run([compiler, *flags, *(str(ROOT / s) for s in sources), "-o", str(target)], check=True)
    return target


def _run(program: Path, backend: str, schedule: int) -> None:
    # Few blocks, so that each has several tiles.
    env = {**os.environ, "FASTLM_EMULATED_SCHEDULE": str(schedule), "FASTLM_EMULATED_SMS": "1"}
    done = subprocess.run([program, backend], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("schedule", [0, 2])
@pytest.mark.parametrize("backend", ["fma", "mma", "stream", "hopper", "pairs"])
def test_products(program, backend, schedule):
    _run(program, backend, schedule)


@pytest.mark.parametrize("warp", [0, 4, 11])
@pytest.mark.parametrize("backend", ["hopper", "pairs"])
def test_products_with_a_slow_warp(program, backend, warp):
    """The producer, or a warp of either consumer, lags behind all others."""
    _run(program, backend, 10 + warp)
