"""The list of the tokens that count, by the CUDA kernels on the emulated device, against a loop."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .test_emulated_device import emulated_program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated_program(
        tmp_path_factory.mktemp("emulated"),
        "emulated_compact",
        "ops/slm_loss/cuda/compact.cu",
        sanitizers="address,undefined",
    )


def run(program: Path, tokens: int, pattern: str, schedule: int, tiles: int = 1024) -> None:
    env = os.environ | {"FASTLM_EMULATED_SCHEDULE": str(schedule), "ASAN_OPTIONS": "detect_leaks=0"}
    env.pop("LD_PRELOAD", None)
    done = subprocess.run(
        [program, str(tokens), pattern, str(tiles)], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("pattern", ["some", "all", "none"])
@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 1023, 1024, 1025, 5000])
def test_lists(program, tokens, pattern):
    """A word of flags is 32 tokens, a tile 1024."""
    run(program, tokens, pattern, schedule=2)


@pytest.mark.parametrize("pattern", ["first", "last"])
def test_one_token(program, pattern):
    run(program, 3333, pattern, schedule=1)


@pytest.mark.parametrize(("tokens", "tiles"), [(20000, 3), (40000, 2), (40000, 1)])
def test_tiles_that_grow(program, tokens, tiles):
    """More tokens than so many tiles hold at their smallest; more words of a tile than a block has threads."""
    run(program, tokens, "some", schedule=0, tiles=tiles)
