"""What the style guide asks of names and sizes: one name per family, telling file names, no endless file."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from fastlm import ops
from tests.support import samples

ROOT = Path(__file__).parent.parent
TREES = ("csrc", "python", "tests", "bench", "tools", "cmake")
SOURCES = {".py", ".pyi", ".h", ".cpp", ".inl", ".cu", ".cuh", ".cmake"}
LONGEST = 450  # lines

# Words that say nothing, and names that would shadow a system include.
EMPTY_WORDS = {"utils", "util", "common", "misc", "helpers", "helper", "torch", "cuda_runtime"}


def sources() -> list[Path]:
    return sorted(
        path
        for tree in TREES
        for path in (ROOT / tree).rglob("*")
        if path.suffix in SOURCES and "__pycache__" not in path.parts and "build" not in path.parts
    )


def families() -> set[str]:
    return {path.parent.name for path in (ROOT / "csrc" / "ops").glob("*/cpu.cpp")}


def test_there_are_sources():
    assert len(sources()) > 100
    assert "causal_conv1d" in families()


def test_no_name_says_nothing():
    found = {part for path in sources() for part in (*path.relative_to(ROOT).parts[:-1], path.stem)}
    assert not found & EMPTY_WORDS


def test_no_file_is_too_long():
    long = {
        str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text().splitlines())) > LONGEST
    }
    assert not long, f"split by phase or by instance, not at random: {long}"


@pytest.mark.parametrize("package", ["fastlm.ops", "fastlm.reference"])
def test_python_modules_are_called_as_the_operator_folders(package):
    folder = Path(importlib.import_module(package).__file__).parent
    modules = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert modules == families()


def test_tests_of_operators_are_called_as_a_family_or_what_is_in_it():
    names = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "ops").glob("test_*.py")}
    assert names >= families()
    assert names <= families() | set(samples.operators()) | set(ops.__all__)


def test_samples_are_called_as_the_operator_folders():
    assert set(samples.FAMILIES) == families()
