"""Functions under the name `"fastlm"` in the interfaces from which transformers takes implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastlm.compat.transformers._names import find

NAME = "fastlm"


def functions_of(interfaces: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """What is called of these interfaces, with the parameters it must have."""
    return {f"{interface}.register": ("key", "value") for interface in interfaces}


def check(interfaces: Iterable[str]) -> None:
    """Raises if one of these interfaces keeps its functions elsewhere."""
    for name in interfaces:
        find(f"{name}._global_mapping")


class Registered:
    """What stands under the name now, and what stood there before."""

    def __init__(self) -> None:
        self._before: dict[Any, Any] = {}

    def add(self, interface_name: str, function: Callable[..., Any]) -> None:
        """Makes the name known to an interface."""
        interface = find(interface_name)
        self._before[interface] = interface._global_mapping.get(NAME)
        interface.register(NAME, function)

    def remove(self) -> None:
        """Makes the name unknown again everywhere, or what it was before."""
        while self._before:
            interface, before = self._before.popitem()
            if before is None:
                interface._global_mapping.pop(NAME, None)  # there is no public way to unregister
            else:
                interface.register(NAME, before)
