"""Tests mirror the tree: `tests/ops/test_<family>.py` for `csrc/ops/<family>`, and so on."""
