"""Arrows only point down: who may import and include whom, read from the source lines.

The tables are those of the style guide. A folder without a floor fails: new code says where it stands.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / "python"
CSRC = ROOT / "csrc"

# ---- Python
# -----------------------------------------------------------------------------------------------------

# Floor of each part, and the floors it may import besides itself.
FLOORS = {
    "fastlm.reference": (0, ()),
    "fastlm._C": (1, ()),
    "fastlm._library": (1, (1,)),
    "fastlm._ops": (1, (1,)),
    "fastlm._registration": (1, (1,)),
    "fastlm.ops": (2, (1,)),
    "fastlm.layers": (3, (2,)),
    "fastlm.models": (4, (2, 3)),
    "fastlm.training": (5, (2, 3, 4)),
    "fastlm.methods": (6, (2, 3, 4, 5)),
    "fastlm.compat": (7, (0, 2, 3, 4)),  # 0: other projects' `_ref` functions are the definitions
    "fastlm.apps": (7, (2, 3, 4, 5, 6)),
    # The demo and the doctor look at everything, the definitions included: they compare.
    "fastlm.demo": (7, (0, 2, 3, 4, 5, 6)),
    "fastlm.doctor": (7, (0, 2, 3, 4, 5, 6)),
    "fastlm_cli": (8, (2, 3, 4, 5, 6, 7)),
}
# What the package root itself offers (build_info, cpu_capability, __version__) is for those above the layers.
ROOT_FLOOR = 4
# Below the models the package stands on torch alone.
PLAIN_FLOOR = 3


def part_of(module: str) -> str | None:
    """The part a module belongs to; None for the package root and for other people's packages."""
    return next((part for part in FLOORS if module == part or module.startswith(part + ".")), None)


def imports(source: str, package: str) -> Iterator[tuple[int, str, bool]]:
    """Line, module, whether it is imported with the file; `from fastlm import ops` counts as `fastlm.ops`."""
    tree = ast.parse(source)
    lazy: set[ast.AST] = set()
    for node in ast.walk(tree):
        is_lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if is_lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            lazy.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name, node not in lazy
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join(base + ([module] if module else []))
            for name in node.names:
                found = f"{module}.{name.name}" if module == "fastlm" else module
                yield node.lineno, found, node not in lazy


def python_arrows_up(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of `module`, one line each."""
    if module == "fastlm":  # the root binds the library, the operators and their registration together
        return []
    part = part_of(module)
    if part is None:
        return [f"{module}: no floor; add it to tests/test_floors.py and the style guide"]
    floor, may = FLOORS[part]
    found = []
    package = module if is_package else module.rpartition(".")[0]
    for line, name, eager in imports(source, package):
        where = f"{module}:{line} imports {name}"
        top = name.split(".")[0]
        target = part_of(name)
        if part == "fastlm_cli" and eager and top in ("fastlm", "torch", "numpy"):
            found.append(f"{where}: the command line loads it inside a command only")
        if top not in ("fastlm", "fastlm_cli"):
            if floor <= PLAIN_FLOOR and top != "torch" and top not in sys.stdlib_module_names:
                found.append(f"{where}: floor {floor} stands on torch alone")
        elif target is None:
            if floor < ROOT_FLOOR:
                found.append(f"{where}: the package root is above floor {floor}")
        elif target != part and FLOORS[target][0] not in may:
            found.append(f"{where}: floor {floor} must not use floor {FLOORS[target][0]}")
        elif part == target == "fastlm.methods" and name.split(".")[2:3] != module.split(".")[2:3]:
            found.append(f"{where}: a method imports no other method")
    return found


def python_files() -> list[Path]:
    return sorted(p for p in PYTHON.rglob("*.py") if "__pycache__" not in p.parts)


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(PYTHON)))
def test_python_imports_point_down(path):
    parts = path.relative_to(PYTHON).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    assert not python_arrows_up(module, path.read_text(), is_package=is_package)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fastlm.reference.causal_conv1d", "from fastlm import ops"),
        ("fastlm.reference.causal_conv1d", "import numpy"),
        ("fastlm._registration.causal_conv1d", "from fastlm.ops import causal_conv1d"),
        ("fastlm.ops.causal_conv1d", "import fastlm"),
        ("fastlm.ops.causal_conv1d", "from fastlm.reference import causal_conv1d"),
        ("fastlm.ops.causal_conv1d", "from ..layers import Mamba"),
        ("fastlm.layers.mamba", "from fastlm import _ops"),
        ("fastlm.layers.mamba", "from .. import models"),
        ("fastlm.layers.mamba", "def f():\n    from fastlm.models import samba"),
        ("fastlm.models.samba.modeling", "import fastlm.reference"),
        ("fastlm.methods.rho1", "from fastlm.methods.lorc import compress"),
        ("fastlm.training", "from fastlm.methods import rho1"),
        ("fastlm.training.trainer", "import fastlm.demo"),
        ("fastlm.apps.sgcode", "from fastlm_cli import main"),
        ("fastlm_cli.train", "import torch"),
        ("fastlm_cli.train", "from fastlm.training import train"),
        ("fastlm.helpers", ""),
    ],
)
def test_an_import_that_points_up_is_found(module, line):
    assert len(python_arrows_up(module, line)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fastlm.reference", "from fastlm.reference.causal_conv1d import causal_conv1d"),
        ("fastlm.models.samba.modeling", "from fastlm import ops\nfrom fastlm.layers import Mamba"),
        ("fastlm.methods.rho1.score", "from .config import Config\nimport numpy"),
        ("fastlm.methods.rho1", "from fastlm.training import train"),
        ("fastlm_cli.train", "import typer\ndef f():\n    from fastlm import training"),
    ],
)
def test_an_import_that_points_down_is_let_through(module, line):
    assert not python_arrows_up(module, line)


# ---- C++
# --------------------------------------------------------------------------------------------------------

_INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
# CPU level files are compiled once per level: an inline function of the standard library compiled with
# AVX-512 could become everybody's copy. These headers have none.
_PLAIN_HEADERS = {"cstdint", "cstddef", "immintrin.h"}
# Operators that run the pieces of others among their own.
_FUSES = {
    "scan_swa": ("selective_scan", "sliding_window_attention"),
    "samba_decode_step": ("causal_conv1d", "selective_scan", "sliding_window_attention"),
}
_STABLE = ("torch/csrc/stable/", "torch/headeronly/")


def cpp_arrows_up(path: str, source: str) -> list[str]:
    """What is wrong with the includes of the file `path` (below csrc/), one line each."""
    found = []
    for match in _INCLUDE.finditer(source):
        ours, name = match.group(1) == '"', match.group(2)
        why = _ours(path, name) if ours else _theirs(path, name)
        if why:
            found.append(f"{path}:{source.count(chr(10), 0, match.start()) + 1} includes {name}: {why}")
    return found


def cpp_floor(path: str) -> int | None:
    """Floor of a source file, by its place."""
    if path in ("schema.cpp", "module.cpp"):
        return 3
    if re.match(r"ops/\w+/((params|keys)\.h$|cpu/|cuda/)", path) or path.startswith("ceilings/"):
        return 1
    if path.startswith("adapter/") or re.match(r"ops/\w+/[^/]+$", path):
        return 2
    generated = path == "build_info.h"  # facts about the build, written by CMake
    return 0 if generated or path.startswith("core/") else None


def _ours(path: str, name: str) -> str | None:
    floor, target = cpp_floor(path), cpp_floor(name)
    if floor is None or target is None:
        return "no floor; add the folder to tests/test_floors.py and the style guide"
    if target > floor:
        return f"floor {floor} must not use floor {target}"
    op, other = (re.match(r"ops/(\w+)/", p) for p in (path, name))
    if (
        other
        and floor <= 2
        and (op is None or other.group(1) not in {op.group(1), *_FUSES.get(op.group(1), ())})
    ):
        return "an operator's folder is its own; shared code moves down to core/"
    if path == "schema.cpp" or (path == "module.cpp" and name.startswith(("adapter/", "ops/"))):
        return "schema.cpp and module.cpp stand beside the adapters"
    return None


def _theirs(path: str, name: str) -> str | None:
    floor = cpp_floor(path)
    if name.startswith(("torch/", "ATen/", "c10/", "aten/")):
        if path == "schema.cpp":
            return None if name == "torch/csrc/stable/library.h" else "only the stable library header"
        if floor != 2:
            return "no torch header outside the adapters"
        if not name.startswith(_STABLE):
            return "the adapters use the stable ABI only"
    elif re.match(r"ops/\w+/cpu/", path) and name not in _PLAIN_HEADERS:
        return "a CPU level file includes no header with inline functions"
    elif name.startswith(("Python.h", "pybind11/")) and path != "module.cpp":
        return "Python stays in module.cpp"
    elif name.startswith("cutlass/") and not re.match(r"core/|ops/\w+/cuda/", path):
        return "CUTLASS stays in core/ and in the CUDA kernels"
    return None


def cpp_files() -> list[Path]:
    return sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".inl", ".cu", ".cuh"))


@pytest.mark.parametrize("path", cpp_files(), ids=lambda p: str(p.relative_to(CSRC)))
def test_cpp_includes_point_down(path):
    assert not cpp_arrows_up(path.relative_to(CSRC).as_posix(), path.read_text())


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("core/dtypes.h", "#include <torch/headeronly/core/ScalarType.h>"),
        ("core/dtypes.h", '#include "adapter/tensor.h"'),
        ("core/simd/simd.h", '#include "ops/slm_loss/params.h"'),
        ("ops/slm_loss/params.h", '#include "adapter/tensor.h"'),
        ("ops/slm_loss/cpu/forward.cpp", '#include "ops/slm_loss/checks.h"'),
        ("ops/slm_loss/cpu/forward.cpp", "#include <vector>"),
        ("ops/slm_loss/cpu/forward.cpp", '#include "ops/selective_scan/cpu/tile.h"'),
        ("ops/slm_loss/cuda/forward.cuh", "#include <torch/csrc/stable/tensor.h>"),
        ("ops/slm_loss/cpu.cpp", "#include <ATen/ATen.h>"),
        ("ops/slm_loss/cpu.cpp", "#include <torch/extension.h>"),
        ("ops/slm_loss/cpu.cpp", '#include "ops/selective_scan/checks.h"'),
        ("ops/slm_loss/cpu.cpp", "#include <pybind11/pybind11.h>"),
        ("adapter/tensor.h", '#include "ops/slm_loss/params.h"'),
        ("schema.cpp", "#include <torch/csrc/stable/tensor.h>"),
        ("module.cpp", '#include "adapter/tensor.h"'),
        ("module.cpp", "  #  include <torch/csrc/stable/library.h>"),
        ("helpers/x.h", '#include "core/dtypes.h"'),
    ],
)
def test_an_include_that_points_up_is_found(path, line):
    assert len(cpp_arrows_up(path, "\n" + line)) == 1
