"""All cases: every module of this folder has a function `cases()` that lists those of its family."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ..case import Case


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case, families in alphabetical order."""
    found: list[Case] = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        found.extend(importlib.import_module(f"{__name__}.{module.name}").cases())
    return tuple(found)


def find_case(op: str, name: str, dtype: str) -> Case:
    """The case with this name.

    Raises:
        ValueError: there is none.
    """
    for case in all_cases():
        if (case.op, case.name, case.dtype) == (op, name, dtype):
            return case
    raise ValueError(f"bench: no case {op} {name} {dtype}")
