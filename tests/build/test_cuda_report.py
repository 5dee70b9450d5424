"""The report on compiled CUDA kernels: names, loops and spills as they stand in machine code."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# Two loops, one inside the other; the inner one goes through a block that the compiler has put behind the end.
SASS = """
.text._Z6kernelPf:
.L_x_0:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R4 ;
.L_x_1:
        /*0020*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0030*/              @!P0 LDGSTS.E.BYPASS.LTC128B.128 [R8], [R2.64] ;
        /*0040*/                   LDL R6, [R1] ;
.L_x_2:
        /*0050*/                   MUFU.EX2 R3, R3 ;
        /*0060*/                   FFMA R3, R3, R3, R4 ;
        /*0070*/               @P2 BRA `(.L_x_4) ;
.L_x_3:
        /*0080*/                   LDG.E.U16 R7, [R2.64] ;
        /*0090*/               @P0 BRA `(.L_x_2) ;
        /*00a0*/                   STG.E.64 [R2.64], R4 ;
        /*00b0*/               @P1 BRA `(.L_x_1) ;
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   LDL R5, [R1] ;
        /*00e0*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*00f0*/                   BRA `(.L_x_5);
.section .nv.info
        /*0100*/                   LDL R5, [R1] ;
"""


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_report", ROOT / "tools" / "cuda_report.py")
    assert spec is not None
    assert spec.loader is not None
    sys.path.insert(0, str(ROOT / "tools"))  # as for a script that is run
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_report"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _kernel(report: ModuleType, text: str = SASS) -> Any:
    ((name, code),) = report.read_sass(text).items()
    kernel = report.Kernel(name, "family", "sm_80")
    report.describe(kernel, code)
    return kernel


def test_reads_machine_code(report):
    kernel = _kernel(report)
    assert kernel.name == "_Z6kernelPf"
    assert (kernel.total, kernel.local) == (16, 3)
    ops = kernel.instructions
    assert ops["LDG.128"] == ops["LDGSTS.128"] == ops["STG.64"] == ops["MUFU.EX2"] == ops["LDG.16"] == 1


def test_finds_loops_through_blocks_elsewhere(report):
    kernel = _kernel(report)
    assert (kernel.local_in_loops, kernel.local_in_hot_loop) == (2, 1)
    assert kernel.in_hot_loop == 7
    assert kernel.hot["FFMA"] == kernel.hot["MUFU.EX2"] == 1
    assert not kernel.hot["STG.64"]


def test_local_memory_around_a_matrix_instruction(report):
    """In the loop over the depth of a product, although an epilogue around it has more arithmetic."""
    epilogue = "".join(f"        /*{i:04x}*/ MUFU.EX2 R3, R3 ;\n" for i in range(0x300, 0x500, 0x10))
    inner = SASS.replace("FFMA R3, R3, R3, R4", "HMMA.16816.F32 R3, R3, R3, R4")
    text = inner.replace("        /*00a0*/", epilogue + "        /*00a0*/")
    kernel = _kernel(report, text)
    assert kernel.in_hot_loop > 7  # the outer one
    assert kernel.local_around == {"HMMA": 1}
    assert report.is_met(kernel, "no local memory around HMMA") == "1 instructions"
    assert report.is_met(kernel, "no local memory around HGMMA") == "no such loop"
    kernel = _kernel(report, text.replace("LDL R5, [R1]", "MOV R5, R1"))
    assert report.is_met(kernel, "no local memory around HMMA") is None


def test_code_without_a_loop(report):
    kernel = _kernel(report, ".text.f:\n /*0000*/ STL [R1], R4 ;\n /*0010*/ @P0 EXIT ;\n /*0020*/ EXIT ;\n")
    assert (kernel.total, kernel.local, kernel.local_in_loops, kernel.in_hot_loop) == (3, 1, 0, 0)


def test_warps_that_part_are_no_loop(report):
    """BRA.DIV leads to a copy of an exchange that comes back; only the way that is usually taken counts."""
    text = SASS.replace("@P2 BRA `(.L_x_4)", "BRA.DIV ~URZ, `(.L_x_4)")
    assert _kernel(report, text).local_in_hot_loop == 0


def test_shortens_names(report):
    long = "void fastlm::selective_scan::cuda::forward_kernel<fastlm::Shape<fastlm::bfloat16, 4>, false>(fastlm::Call, long)"
    assert report.shorten(long) == "forward_kernel<Shape<bfloat16, 4>, false>"


def test_names_what_is_missing(report):
    name = "forward_kernel<ForwardShape<bfloat16, 4, 4, 32, 3, true>, false>"
    found = report.violations([report.Kernel(name, "selective_scan", "sm_90a", local_in_hot_loop=3)])
    assert any(f"{name}, sm_90a: expected no local memory in the hot loop, found 3" in text for text in found)
    assert any("expected hot MUFU.EX2, found none" in text for text in found)
    assert any("no kernel is called hopper_forward" in text for text in found)


def test_says_how_many_registers_are_too_many(report):
    kernel = report.Kernel("forward_rows<bfloat16, 4, 8>", "causal_conv1d", "sm_80", registers=200)
    assert any("expected at most 112 registers, found 200" in text for text in report.violations([kernel]))


def test_a_row_of_the_table(report):
    kernel = _kernel(report)
    kernel.registers, kernel.stack = 40, 8
    last = report.table([kernel]).splitlines()[-1]
    assert last.startswith("| `_Z6kernelPf` | sm_80 | 40 | 0, 8 | 3 (2, 1) | 16 | ")
    assert last.endswith(" | 7 | 1 LDG.16, 1 MUFU.EX2, 1 FFMA |")


@pytest.mark.skipif(not all(map(shutil.which, ("cuobjdump", "nvdisasm"))), reason="CUDA's tools are missing")
def test_reads_a_compiled_object(report):
    folder = ROOT / "build" / "cuda-check" / "CMakeFiles" / "fastlm_cuda_kernels.dir" / "csrc"
    path = folder / "ops" / "causal_conv1d" / "cuda" / "update.cu.o"
    if not path.exists():
        pytest.skip("no CUDA objects in the checkout; make cuda-check compiles them")
    kernels = report.read_object(path)
    assert {k.family for k in kernels} == {"causal_conv1d"}
    assert all(0 < k.registers <= 255 and k.total > 0 for k in kernels)


def test_leaves_out_objects_of_deleted_sources(report, tmp_path):
    folder = tmp_path / "CMakeFiles" / "fastlm_cuda_kernels.dir" / "csrc" / "core" / "cuda"
    folder.mkdir(parents=True)
    for name in ("launch.cu.o", "deleted.cu.o"):
        (folder / name).write_bytes(b"")
    entries = [{"file": str(ROOT / "csrc/core/cuda/launch.cu")}, {"file": str(ROOT / "csrc/schema.cpp")}]
    (tmp_path / "compile_commands.json").write_text(json.dumps(entries))
    assert report.compiled_objects(tmp_path) == [folder / "launch.cu.o"]
