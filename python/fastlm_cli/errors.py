"""Turns an exception into one sentence and an exit code."""

from __future__ import annotations

BAD_INPUT = 2
FAILED = 1
_INPUT_ERRORS = (ValueError, IndexError, TypeError, FileNotFoundError, NotADirectoryError, PermissionError)


def explain(error: Exception) -> tuple[str, int]:
    """One line for people, and 2 for input that cannot be used or 1 for work that failed."""
    text = " ".join(str(error).split()) or type(error).__name__
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return text, code
    if isinstance(error, ImportError):
        return text, FAILED
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, FAILED
    if isinstance(error, _INPUT_ERRORS):
        return text, BAD_INPUT
    return f"{type(error).__name__}: {text} (add --traceback to see where)", FAILED
