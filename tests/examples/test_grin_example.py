"""The mixture-of-experts example runs, learns more than one map could, and uses all its experts."""

from __future__ import annotations

from tests.examples.test_samba_examples import load


def test_a_layer_learns_two_functions(capsys):
    example = load("grin_moe_layer")
    left, most = example.main()
    assert left < 0.35  # the better of two linear maps for all inputs leaves about half
    assert most < 0.5
    untrained, _ = example.main(steps=0)
    assert untrained > 0.9
    assert "of the variance left; picks of the experts: [" in capsys.readouterr().out
