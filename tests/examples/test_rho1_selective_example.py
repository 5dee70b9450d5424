"""The example of selective training runs, and clean tokens are what is kept."""

from __future__ import annotations

import pytest
import torch

from tests.examples.test_samba_examples import load


@pytest.mark.slow
def test_clean_tokens_are_kept_and_noise_mostly_not(capsys):
    before = torch.get_num_threads()
    try:
        clean, noise = load("rho1_selective_training").main(steps=40)
    finally:
        torch.set_num_threads(before)
    assert clean > 0.8
    assert noise < 0.5
    assert "12 documents scored, mean reference loss" in capsys.readouterr().out
