"""What every test gets: a device, a fresh random state, poisoned memory, hypothesis profiles."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# derandomize: the same examples each time, so that a failure is a change and not luck.
# `--hypothesis-profile=thorough` for long runs, `few` where each example is slow.
settings.register_profile(
    "default",
    derandomize=True,
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", settings.get_profile("default"), derandomize=False, max_examples=400)
settings.register_profile("few", settings.get_profile("default"), max_examples=4)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    # Deterministic mode is on for the sake of poisoned memory only; where torch has no such algorithm, it may
    # say so in vain.
    config.addinivalue_line(
        "filterwarnings", "ignore:.*does not have a deterministic implementation.*:UserWarning"
    )


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device a test should run on; tests that use it run once per device."""
    return torch.device(request.param)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests that need a GPU where there is none, or fails them under FASTLM_REQUIRE_CUDA=1."""
    if item.get_closest_marker("host_values") is not None and _is_emulated():
        pytest.skip("the CUDA operators clamp these values on the device")
    if item.get_closest_marker("cuda") is None:
        return
    why_not = _why_no_cuda()
    if why_not is None:
        return
    if os.environ.get("FASTLM_REQUIRE_CUDA") == "1":
        pytest.fail(f"FASTLM_REQUIRE_CUDA=1, but {why_not}", pytrace=False)
    pytest.skip(why_not)


def _is_emulated() -> bool:
    """Whether the operators under test are the CUDA ones, on an emulated device (FASTLM_EMULATE_CUDA)."""
    import fastlm

    return bool(fastlm.build_info()["cuda"]["emulated"])


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    import fastlm

    cuda = fastlm.build_info()["cuda"]
    return None if cuda["built"] else f"fastlm was built without CUDA: {cuda['why_not']}"


@pytest.fixture(autouse=True)
def _fresh_random_state() -> Iterator[None]:
    """Every test starts from seed 0 and leaves no trace in the random generators."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN (integers: the largest value): what a kernel forgets to write shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[2]
