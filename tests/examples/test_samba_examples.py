"""The Samba examples run and do what they say, on shorter inputs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_training_learns(capsys):
    assert load("samba_train").main(steps=40) < 2.9  # log(256) = 5.5 at the start
    assert "bytes/s" in capsys.readouterr().out


def test_generation_runs(capsys):
    load("samba_generate").main()
    assert "3015 tokens seen" in capsys.readouterr().out


def test_a_long_prompt_in_chunks_equals_one_pass():
    assert load("samba_long_prompt").main(tokens=700, chunk=96) < 1e-4
