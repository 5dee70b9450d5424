"""What can be enabled, and what is."""

from __future__ import annotations

import importlib
import threading
from types import ModuleType

# Parts, and the modules whose `install()` and `remove()` put them in place and take them away.
PARTS = {
    "mamba": "fastlm.compat.transformers.mamba",
    "attention": "fastlm.compat.transformers.attention",
    "experts": "fastlm.compat.transformers.experts",
    "router": "fastlm.compat.transformers.router",
}

_lock = threading.Lock()
_enabled: set[str] = set()


def enable(*parts: str) -> tuple[str, ...]:
    """Runs transformers models on fastlm's operators from now on.

    Args:
        parts: of `"mamba"` (the mixers of Mamba, Falcon-Mamba and Jamba), `"attention"` (the attention implementation
            called `"fastlm"`), `"experts"` (the experts implementation of that name, for mixtures of experts) and
            `"router"` (PhiMoE's router); none named: all of them.

    Returns:
        enabled: the parts that are enabled now, of those named, whether by this call or by an earlier one.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: the installed transformers lacks a name that a part needs; nothing changes then.
        ValueError: an unknown part; nothing changes then.

    Note:
        For this process, all threads, and models created before or after. `"mamba"` and `"router"` act on every model
        at once; attention is chosen per model: `model.set_attn_implementation("fastlm")`, or
        `attn_implementation="fastlm"` when it is loaded; experts likewise: `model.set_experts_implementation("fastlm")`
        or `experts_implementation="fastlm"`. No weights, configurations or caches are changed.

    Example:
        >>> import fastlm.compat.transformers
        >>> fastlm.compat.transformers.enable("mamba")  # doctest: +SKIP
        ('mamba',)
    """
    return _switch("enable", parts, on=True)


def disable(*parts: str) -> tuple[str, ...]:
    """Takes back what `enable` did.

    Args:
        parts: as for `enable`; none named: all of them.

    Returns:
        disabled: the parts that were enabled before, of those named.

    Raises:
        ValueError: an unknown part; nothing changes then.

    Note:
        transformers then runs its own functions again, the same objects as before. A model that was set to
        `attn_implementation="fastlm"` or `experts_implementation="fastlm"` must be set to another one: transformers no
        longer knows that name.
    """
    return _switch("disable", parts, on=False)


def _switch(function: str, parts: tuple[str, ...], *, on: bool) -> tuple[str, ...]:
    for part in parts:
        if part not in PARTS:
            known = ", ".join(repr(name) for name in PARTS)
            raise ValueError(
                f"fastlm.compat.transformers.{function}: parts must be among {known}, got {part!r}"
            )
    wanted = tuple(dict.fromkeys(parts)) or tuple(PARTS)
    with _lock:
        if not on:
            wanted = tuple(part for part in wanted if part in _enabled)
        modules = {part: _module(part) for part in wanted}
        if on:
            for module in modules.values():
                module.check()
        for part, module in modules.items():
            if on == (part in _enabled):
                continue
            if on:
                module.install()
                _enabled.add(part)
            else:
                module.remove()
                _enabled.discard(part)
    return wanted


def _module(part: str) -> ModuleType:
    return importlib.import_module(PARTS[part])
