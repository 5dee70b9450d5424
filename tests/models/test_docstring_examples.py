"""The examples in the docstrings of layers and models run and give what they show."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "fastlm.layers.grin_moe",
        "fastlm.layers.layer_norm",
        "fastlm.layers.mamba",
        "fastlm.layers.rms_norm",
        "fastlm.layers.rotary",
        "fastlm.models.samba.config",
        "fastlm.models.samba.modeling",
    ],
)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
