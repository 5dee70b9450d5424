"""The measurement of scoring runs, and both sides do the same work."""

from __future__ import annotations

import torch

from bench import rho1_scoring


def test_both_sides_are_measured(capsys):
    before = torch.get_num_threads()
    try:
        rows = rho1_scoring.run("tiny", 96, 300, 1, 1)
    finally:
        torch.set_num_threads(before)
    assert [row["dtype"] for row in rows] == ["fp32"] * 3 + ["bf16"] * 3
    assert {row["contender"] for row in rows} == {
        rho1_scoring.STORED,
        rho1_scoring.WITHIN,
        rho1_scoring.WHOLE,
    }
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert "tokens/s" in capsys.readouterr().out
