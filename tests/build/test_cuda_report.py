"""The report on compiled CUDA kernels: names, loops and spills as they stand in machine code."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]

SASS = """
.text._Z6kernelPf:
.L_x_0:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R4 ;
.L_x_1:
        /*0020*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0030*/              @!P0 LDGSTS.E.BYPASS.128 [R8], [R2.64] ;
.L_x_2:
        /*0040*/                   MUFU.EX2 R3, R3 ;
        /*0050*/                   LDL R5, [R1] ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/                   STG.E.64 [R2.64], R4 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.section .nv.info
        /*00a0*/                   LDL R5, [R1] ;
"""


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_report", ROOT / "tools" / "cuda_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_report"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_reads_machine_code(report):
    (name, (ops, local, in_loops, total)) = next(iter(report.read_sass(SASS).items()))
    assert name == "_Z6kernelPf"
    assert (local, in_loops, total) == (2, 1, 10)
    assert ops["LDG.128"] == ops["LDGSTS.128"] == ops["STG.64"] == ops["MUFU.EX2"] == 1


def test_shortens_names(report):
    long = "void fastlm::selective_scan::cuda::forward_kernel<fastlm::Shape<fastlm::bfloat16, 4>, false>(fastlm::Call, long)"
    assert report.shorten(long) == "forward_kernel<Shape<bfloat16, 4>, false>"


def test_names_what_is_missing(report):
    pattern, arch, wanted = report.EXPECTED[0]
    kernel = report.Kernel("forward_kernel<ForwardShape<bfloat16, 4, 4, 32, 3, true>, false>", "sm_80", local_in_loops=3)
    found = report.violations([kernel])
    assert any("expected no local memory in loops, found 3" in sentence for sentence in found)
    assert any("expected MUFU.EX2, found none" in sentence for sentence in found)
    assert any("no kernel is called hopper_forward" in sentence for sentence in found)
