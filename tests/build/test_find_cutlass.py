"""CUTLASS's headers are found in the user's environment, also from inside an isolated build."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = Path(sys.executable).parent / "cmake"
HIDDEN = "import sys\nsys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
VERSION = "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 1\n"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a new environment."""
    if not CMAKE.exists():
        pytest.skip("cmake is not in this environment")
    venv.create(tmp_path / "env", symlinks=True)
    return tmp_path / "env" / "bin" / "python"


def put_headers(folder: Path) -> Path:
    headers = folder / "cutlass_library" / "source" / "include"
    (headers / "cutlass").mkdir(parents=True)
    (headers / "cutlass" / "cutlass.h").touch()
    (headers / "cutlass" / "version.h").write_text(VERSION)
    (folder / "cutlass_library" / "__init__.py").touch()
    return headers


def find(python: Path, path: str) -> str:
    script = python.parent / "find.cmake"
    script.write_text(
        f'set(Python_EXECUTABLE "{python}")\nset(FASTLM_CUTLASS_DIR "")\nset(ENV{{PYTHONPATH}} "{path}")\n'
        f'include("{ROOT}/third_party/FindCutlassHeaders.cmake")\n'
        'message(STATUS "found: ${CutlassHeaders_VERSION} ${CutlassHeaders_INCLUDE_DIR} ${CutlassHeaders_WHY_NOT}")\n'
    )
    done = subprocess.run([CMAKE, "-P", script], capture_output=True, text=True, check=True)
    return next(line for line in done.stdout.splitlines() if "found: " in line)


def site_packages(python: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(python.parents[1])}))


def test_in_the_environment_that_an_isolated_build_hides(python, tmp_path):
    headers = put_headers(site_packages(python))
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    assert f"found: 4.2.1 {headers}" in find(python, str(tmp_path))


def test_on_the_path_of_a_build_environment(python, tmp_path):
    headers = put_headers(tmp_path / "overlay")
    assert f"found: 4.2.1 {headers}" in find(python, str(tmp_path / "overlay"))


def test_nowhere(python):
    assert "the package nvidia-cutlass is not installed" in find(python, "")
