"""The build backend: scikit-build-core, plus one decision.

torch stands in no static build requirement, since pip's isolated build would then fetch another, much larger torch. The compiler
only needs the headers of the torch that is already installed, and CMake finds them from inside the isolated build. `torch` becomes a
build requirement only where none can be found (front ends such as uv, which build in a fresh environment).
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403  (the PEP 517 hooks that stay as they are)

_LOCATE = pathlib.Path(__file__).resolve().parent.parent / "third_party" / "locate_torch.py"


def _torch_is_installed() -> bool:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    return (
        subprocess.run([sys.executable, str(_LOCATE)], env=environment, capture_output=True).returncode == 0
    )


def _requirements(found: list[str]) -> list[str]:
    return found if _torch_is_installed() else [*found, "torch>=2.11"]


def get_requires_for_build_wheel(config_settings: dict[str, object] | None = None) -> list[str]:
    return _requirements(_backend.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict[str, object] | None = None) -> list[str]:
    return _requirements(_backend.get_requires_for_build_editable(config_settings))
