"""What the object files of a CPU level may contain: nothing that the linker could hand to another level."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _objects() -> list[Path]:
    """Kernel objects of the build folders in the checkout; an installed package does not carry them."""
    return sorted((ROOT / "build").glob("*/CMakeFiles/fastlm_cpu_*.dir/csrc/ops/*/cpu/*.o"))


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is missing")
def test_levels_share_no_weak_symbol():
    objects = _objects()
    if not objects:
        pytest.skip("no build folder in the checkout")
    weak = []
    for path in objects:
        lines = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout
        for line in lines.splitlines():
            kind = line[17:18]
            if kind in "WVu" and "DW.ref.__gxx" not in line:
                weak.append(f"{path.parts[-5]} {path.name}: {line[19:]}")
    assert not weak, "weak symbols in per-level objects:\n" + "\n".join(weak[:20])


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is missing")
def test_the_library_uses_the_stable_interface_only():
    """No undefined symbol of ATen, c10 or Python: so one binary serves several torch versions."""
    import fastlm

    library = Path(fastlm._library._folder()) / "libfastlm_ops.so"
    lines = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", str(library)], check=True, capture_output=True, text=True
    ).stdout
    foreign = [
        line.strip()
        for line in lines.splitlines()
        if any(w in line for w in ("at::", "c10::", " Py", " _Py"))
    ]
    assert not foreign, foreign
