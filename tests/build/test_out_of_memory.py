"""Memory that a thread does not get is a RuntimeError, and the process goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(what: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.build.out_of_memory", what],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.endswith("passed\n"), done.stdout + done.stderr


def test_every_kernel_survives_a_failed_request(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("a C compiler is missing")
    library = tmp_path / "no_memory.so"
    source = Path(__file__).with_name("no_memory.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(library)], check=True)
    _run("preloaded", LD_PRELOAD=str(library))


def test_a_request_beyond_the_address_space():
    _run("limited")
