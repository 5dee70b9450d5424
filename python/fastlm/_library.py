"""Finds and loads the compiled libraries.

They lie beside this file in an installed package. `FASTLM_LIBRARY_DIR` names another folder (a CMake build folder, a sanitizer
build); nothing else is searched, and a library that does not load says which file and why.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_LIBRARY = "libfastlm_ops.so"
_loaded: ModuleType | None = None


def _folder() -> Path:
    forced = os.environ.get("FASTLM_LIBRARY_DIR")
    if forced:
        folder = Path(forced)
        if not (folder / _LIBRARY).is_file():
            raise ImportError(f"FASTLM_LIBRARY_DIR must name a folder with {_LIBRARY}, got {forced}")
        return folder
    # An editable install keeps the sources in the checkout and the libraries in site-packages.
    spec = importlib.util.find_spec("fastlm._C")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    raise ImportError(
        f"fastlm: no compiled library beside {Path(__file__).parent}. "
        "Install the package (pip install .) or point FASTLM_LIBRARY_DIR at a build folder."
    )


def _load_module(folder: Path) -> ModuleType:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_C{suffix}"
        if path.is_file():
            spec = importlib.util.spec_from_file_location("fastlm._C", path)
            if spec is None or spec.loader is None:
                break
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules["fastlm._C"] = module
            sys.modules["fastlm"]._C = module  # type: ignore[attr-defined]
            return module
    raise ImportError(
        f"fastlm: {folder} holds {_LIBRARY} but no module _C for Python {sys.version.split()[0]}"
    )


def load() -> None:
    """Loads `libfastlm_ops` into torch and `_C` into Python; raises ImportError with the file and the reason."""
    global _loaded
    if _loaded is not None:
        return
    folder = _folder()
    path = folder / _LIBRARY
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"fastlm: {path} does not load with torch {torch.__version__}: {error}. "
            "It needs torch 2.11 or newer; a rebuild (pip install --force-reinstall .) fits it to this environment."
        ) from error
    _loaded = _load_module(folder)
    problem = _loaded.cpu_capability_problem()
    if problem is not None:
        raise ImportError(f"fastlm: {problem}")


def _module() -> Any:
    if _loaded is None:
        raise ImportError("fastlm: the compiled library is not loaded; import fastlm first")
    return _loaded


def build_info() -> dict[str, Any]:
    """What was compiled, with what, and what was left out and why.

    Returns:
        A dict with `version`, `torch` (built against), `torch_target` (oldest torch that may load the binary), `cuda`
        (`built`, `architectures`, `why_not`), `cutlass` (`version`, `why_not`), `cpu_levels`, `compiler`, `build_type`, `flags`,
        `sanitizers`.

    Example:
        >>> import fastlm
        >>> "default" in fastlm.build_info()["cpu_levels"]
        True
    """
    info: dict[str, Any] = _module().build_info()
    return info


def cpu_capability() -> str:
    """The CPU level in use: `default`, `avx2`, `avx512` or `avx512_bf16`.

    It is the highest level that was compiled and that this CPU runs; the environment variable `FASTLM_CPU_CAPABILITY`, read when
    the library is loaded, forces a lower one.

    Example:
        >>> import fastlm
        >>> fastlm.cpu_capability() in ("default", "avx2", "avx512", "avx512_bf16")
        True
    """
    level: str = _module().cpu_capability()
    return level
