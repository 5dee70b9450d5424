"""What tests/conftest.py promises every test."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

CONFTEST = Path(__file__).parent.parent / "conftest.py"


@pytest.fixture
def conftest(request):
    """The module pytest has loaded, not a second copy."""
    loaded = request.config.pluginmanager.get_plugins()
    return next(p for p in loaded if getattr(p, "__file__", None) == str(CONFTEST))


def test_a_missing_gpu_skips_or_fails(conftest, monkeypatch):
    monkeypatch.setattr(conftest, "_why_no_cuda", lambda: "no device here")
    monkeypatch.delenv("FASTLM_REQUIRE_CUDA", raising=False)
    gpu_test = SimpleNamespace(get_closest_marker=lambda name: name if name == "cuda" else None)
    cpu_test = SimpleNamespace(get_closest_marker=lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="no device here"):
        conftest.pytest_runtest_setup(gpu_test)
    monkeypatch.setenv("FASTLM_REQUIRE_CUDA", "1")
    with pytest.raises(pytest.fail.Exception, match="FASTLM_REQUIRE_CUDA=1, but no device here"):
        conftest.pytest_runtest_setup(gpu_test)
    conftest.pytest_runtest_setup(cpu_test)
    monkeypatch.setattr(conftest, "_why_no_cuda", lambda: None)
    conftest.pytest_runtest_setup(gpu_test)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fresh_memory_is_poisoned(dtype):
    assert torch.empty(100, dtype=dtype).isnan().all()
    assert torch.empty_strided((3, 4), (1, 3), dtype=dtype).isnan().all()
    assert torch.empty(4, dtype=torch.int32).eq(torch.iinfo(torch.int32).max).all()


@pytest.mark.parametrize("again", [1, 2])
def test_every_test_starts_from_the_same_random_state(again):
    expected = torch.Generator().manual_seed(0)
    assert torch.equal(torch.randn(3), torch.randn(3, generator=expected))
    assert random.random() == random.Random(0).random()
    assert np.random.rand() == np.random.RandomState(0).rand()
