"""A text, a reference run and its scores, for tests of selective training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm import training
from fastlm.methods import rho1
from tests.training.runs import small_config, write_text


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a reference run and its scores."""
    place, before = tmp_path_factory.mktemp("place"), torch.get_num_threads()
    text = write_text(place / "text")
    training.train(small_config(text, steps=8), place / "reference")
    settings = {"context": 16, "entropy": True, "threads": 1, "part_tokens": 300, "dtype": "fp32"}
    rho1.score_text(place / "reference", text, place / "scores", **settings)
    torch.set_num_threads(before)  # training sets them
    return place
