"""How the compiled libraries are found, chosen and refused: each case in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastlm

ROOT = Path(__file__).parents[2]


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_lower_level_can_be_forced():
    done = _python("import fastlm; print(fastlm.cpu_capability())", FASTLM_CPU_CAPABILITY="default")
    assert done.stdout.strip() == "default", done.stderr


@pytest.mark.parametrize(
    ("level", "text"),
    [
        (
            "avx1024",
            "FASTLM_CPU_CAPABILITY must be one of default, avx2, avx512, avx512_bf16, got 'avx1024'",
        ),
    ],
)
def test_an_unknown_level_is_an_error(level, text):
    done = _python("import fastlm", FASTLM_CPU_CAPABILITY=level)
    assert done.returncode != 0
    assert text in done.stderr


def test_a_level_beyond_this_cpu_is_an_error():
    beyond = [
        level for level in ("avx512", "avx512_bf16") if level not in fastlm._C.supported_cpu_capabilities()
    ]
    if not beyond:
        pytest.skip("this CPU runs every level")
    done = _python("import fastlm", FASTLM_CPU_CAPABILITY=beyond[0])
    assert done.returncode != 0
    assert f"got '{beyond[0]}'" in done.stderr


def test_a_folder_without_the_library_is_an_error(tmp_path):
    done = _python("import fastlm", FASTLM_LIBRARY_DIR=str(tmp_path))
    assert done.returncode != 0
    assert f"FASTLM_LIBRARY_DIR must name a folder with libfastlm_ops.so, got {tmp_path}" in done.stderr


def test_a_broken_library_names_file_and_reason(tmp_path):
    (tmp_path / "libfastlm_ops.so").write_bytes(b"not a library")
    done = _python("import fastlm", FASTLM_LIBRARY_DIR=str(tmp_path))
    assert done.returncode != 0
    assert str(tmp_path / "libfastlm_ops.so") in done.stderr
    assert "does not load with torch" in done.stderr


def test_build_info_is_complete():
    info = fastlm.build_info()
    assert set(info) >= {
        "version",
        "torch",
        "torch_target",
        "cuda",
        "cutlass",
        "cpu_levels",
        "compiler",
        "flags",
    }
    assert info["cpu_levels"][0] == "default"
    assert info["cuda"]["built"] or info["cuda"]["why_not"]
    assert info["cutlass"]["version"] or info["cutlass"]["why_not"]


def test_locating_torch_without_torch_fails_with_status_1(tmp_path):
    """The build asks this script; an environment without torch must be told apart from a broken one."""
    script = ROOT / "third_party" / "locate_torch.py"
    done = subprocess.run([sys.executable, "-S", "-I", str(script)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
