"""Names inside transformers that are looked up when a part is enabled, and what is said when one is missing.

Some of them are private to transformers and may move with any release: `tests/compat` checks each one.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

# Releases whose models passed the tests of this package.
TESTED = ("5.24.0",)


def find(name: str) -> Any:
    """The object called `module:attribute`, the attribute dotted; a missing one raises.

    Args:
        name: for example `"transformers.cache_utils:Cache.update_conv_state"`.

    Raises:
        ImportError: transformers is not installed; the text names the extra.
        RuntimeError: this release of transformers has no such name; the text says which releases were tested.
    """
    version = installed_version()
    module, _, attributes = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise _unfit(version, f"has no {name.replace(':', '.')} ({error})") from error
    return found


def find_function(name: str, parameters: Iterable[str]) -> Any:
    """As `find`, for a function that must know these parameters by name."""
    function = find(name)
    known = inspect.signature(function).parameters
    missing = [parameter for parameter in parameters if parameter not in known]
    if missing:
        called = name.partition(":")[2]
        raise _unfit(installed_version(), f"has no parameter {missing[0]!r} in {called}{tuple(known)}")
    return function


def installed_version() -> str:
    """Version of the installed transformers.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"fastlm.compat.transformers needs transformers 5: pip install 'fastlm[hf]' ({error})"
        ) from error
    return str(transformers.__version__)


def _unfit(version: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"fastlm.compat.transformers: transformers {version} {what}. Tested with transformers "
        f"{', '.join(TESTED)}; install one of these."
    )
