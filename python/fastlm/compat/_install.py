"""Makes the import statement find fastlm under another project's name, where that project is absent.

A finder at the end of `sys.meta_path` answers for the module paths a surface offers. Everything that is really
installed is found before it is asked, and nothing on disk is touched. What a surface offers stands in its own
`MODULES`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Projects whose names can be installed, and where their functions are.
SURFACES = {
    "mamba_ssm": "fastlm.compat.mamba_ssm",
    "causal_conv1d": "fastlm.compat.causal_conv1d",
    "flash_attn": "fastlm.compat.flash_attn",
}


class SurfaceFinder(MetaPathFinder, Loader):
    """Finds and fills the modules of one surface.

    Args:
        project: name that is imported.
        implementation: module with `VERSION`, with `MODULES` (names offered by each module path), and with those
            names.
    """

    def __init__(self, project: str, implementation: ModuleType) -> None:
        self.project = project
        self.implementation = implementation
        self.modules: Mapping[str, Sequence[str]] = implementation.MODULES

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module path this surface offers, else None."""
        if fullname not in self.modules:
            return None
        is_package = any(other.startswith(f"{fullname}.") for other in self.modules)
        # `__file__` tells the truth: an ImportError for a name that is not offered points to fastlm.
        spec = ModuleSpec(fullname, self, origin=self.implementation.__file__, is_package=is_package)
        spec.has_location = True
        return spec

    def exec_module(self, module: ModuleType) -> None:
        """Fill a fresh module with the names it offers; the root also imports the modules below it."""
        name = module.__name__
        offered = {public: getattr(self.implementation, public) for public in self.modules[name]}
        vars(module).update(offered, __all__=list(offered))
        module.__doc__ = f"{name}, offered by {self.implementation.__name__}."
        if name == self.project:
            vars(module)["__version__"] = self.implementation.VERSION
            for other in self.modules:
                importlib.import_module(other)

    def owns(self, name: str) -> bool:
        """Whether the module loaded under `name` came from here."""
        loaded = sys.modules.get(name)
        spec = None if loaded is None else getattr(loaded, "__spec__", None)
        return spec is not None and spec.loader is self


def install(*names: str) -> tuple[str, ...]:
    """Makes other projects' import names stand on fastlm, where those projects are absent.

    Args:
        names: of `"mamba_ssm"`, `"causal_conv1d"` and `"flash_attn"`; none named: all of them.

    Returns:
        installed: those of `names` that stand on fastlm now, in the order given, whether by this call or by an
        earlier one. A project that is really installed is left alone: it is not in the result, and a `UserWarning`
        says where it was found.

    Raises:
        ValueError: a name that fastlm offers no surface for; nothing is installed then.

    Note:
        For this process only; `uninstall` takes it back. Call it before importing whatever looks for these
        projects: most libraries look once. Package metadata is not faked: `importlib.metadata.version` does not
        know these names, `__version__` says which version's words are offered, with `+fastlm` behind.

    Example:
        >>> import fastlm.compat
        >>> fastlm.compat.install("causal_conv1d")
        ('causal_conv1d',)
        >>> from causal_conv1d import causal_conv1d_fn
        >>> fastlm.compat.uninstall("causal_conv1d")
        ('causal_conv1d',)
    """
    installed = []
    for name in _known("install", names):
        if name not in _finders():
            where = _found_elsewhere(name)
            if where is not None:
                warnings.warn(
                    f"fastlm.compat.install: {name} is installed already ({where}) and stays as it is",
                    stacklevel=2,
                )
                continue
            sys.meta_path.append(SurfaceFinder(name, importlib.import_module(SURFACES[name])))
        installed.append(name)
    return tuple(installed)


def uninstall(*names: str) -> tuple[str, ...]:
    """Takes back what `install` did.

    Args:
        names: as for `install`; none named: all of them.

    Returns:
        uninstalled: those of `names` that stood on fastlm, in the order given.

    Raises:
        ValueError: a name that fastlm offers no surface for; nothing is uninstalled then.

    Note:
        Functions and modules that other code has imported meanwhile stay with that code and keep working.
    """
    uninstalled = []
    for name in _known("uninstall", names):
        finder = _finders().get(name)
        if finder is None:
            continue
        sys.meta_path.remove(finder)
        for module in finder.modules:
            if finder.owns(module):
                del sys.modules[module]
        uninstalled.append(name)
    return tuple(uninstalled)


def _known(function: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """`names` without repeats, or all known ones; an unknown one raises."""
    for name in names:
        if name not in SURFACES:
            known = ", ".join(repr(surface) for surface in SURFACES)
            raise ValueError(f"fastlm.compat.{function}: names must be among {known}, got {name!r}")
    return tuple(dict.fromkeys(names)) or tuple(SURFACES)


def _finders() -> dict[str, SurfaceFinder]:
    """The surfaces in place, by project."""
    return {finder.project: finder for finder in sys.meta_path if isinstance(finder, SurfaceFinder)}


def _found_elsewhere(name: str) -> str | None:
    """Where Python finds `name` without us, or None."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module somebody put into sys.modules without a spec
        return "in sys.modules"
    if spec is None:
        return None
    return spec.origin or ", ".join(spec.submodule_search_locations or ()) or "built in"
