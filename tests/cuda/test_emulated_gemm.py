"""The matrix products of csrc/core/cuda/gemm against plain loops, on the emulated device."""

import os
import subprocess
from pathlib import Path

import pytest

from .test_emulated_device import emulated_program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated_program(
        tmp_path_factory.mktemp("emulated"),
        "emulated_gemm",
        "core/cuda/tensor_map.cu",
        "core/cuda/gemm/gemm.cu",
        sanitizers="",
    )


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
