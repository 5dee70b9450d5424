"""Where contenders come from: this package's functions and other packages. Absent ones say why."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from .case import Build, Call, Inputs, UnavailableError


def member(module_name: str, name: str) -> Callable[..., Any]:
    """`<module_name>.<name>`.

    Raises:
        UnavailableError: there is no such function, for example because the family is not compiled.
    """
    found = getattr(package(module_name), name, None)
    if found is None:
        raise UnavailableError(f"{module_name}.{name} does not exist in this build")
    return found  # type: ignore[no-any-return]


def operator(name: str, **fixed: object) -> Build:
    """Calls `fastlm.ops.<name>(**inputs, **fixed)`."""
    return _calls("fastlm.ops", name, fixed)


def definition(name: str, **fixed: object) -> Build:
    """Calls `fastlm.reference.<name>(**inputs, **fixed)`."""
    return _calls("fastlm.reference", name, fixed)


def package(name: str, *, needs: str = "") -> Any:
    """An installed package or module.

    Raises:
        UnavailableError: it is not installed or does not load; `needs` says what it would take to use it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == top
        why = f"{top} is not installed" if missing else f"{name} does not load: {error}"
        raise UnavailableError(f"{why} ({needs})" if needs else why) from error


def _calls(module_name: str, name: str, fixed: dict[str, object]) -> Build:
    def build(inputs: Inputs) -> Call:
        function = member(module_name, name)
        return lambda: function(**inputs, **fixed)

    return build
