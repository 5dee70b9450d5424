"""Measures the operators of fastlm beside plain PyTorch and other packages, on this machine.

In a checkout: `python -m bench run --quick`. Installed: the package is called `fastlm_bench` and `fastlm
    bench` runs it.
The README in this folder says how the numbers are made.
"""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Runs one command (`run`, `list`, `show`, `compare`, `plot`); without one it is `run`.

    Args:
        argv: the words after the program's name; default `sys.argv[1:]`.

    Returns:
        0 if all went well, 1 if a fastlm result was wrong or a comparison failed, 2 for input that cannot be
        used.
    """
    from .commands import run_command

    return run_command(argv)


__all__ = ["main"]
