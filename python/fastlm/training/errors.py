"""The two ways a training command ends early on purpose; each carries the exit code of the command line."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used: one sentence with argument, expected and found."""

    exit_code = 2


class RunError(RuntimeError):
    """The run cannot go on (full disk, lost files): one sentence with what is safe and what to do next."""

    exit_code = 1
