"""The words of sm_90a on the emulated device: tile copies, barriers in shared memory, products of a warpgroup."""

from __future__ import annotations

from pathlib import Path

import pytest

from .test_emulated_device import _run, emulated_program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated_program(tmp_path_factory.mktemp("emulated"), "emulated_hopper", "core/cuda/tensor_map.cu")


@pytest.mark.parametrize("schedule", [0, 1, 2, 10])
@pytest.mark.parametrize(
    "case", ["shared_k_k", "shared_mn_mn", "registers_k", "registers_mn", "tile", "phases", "bulk", "cluster"]
)
def test_right_kernels(program, case, schedule):
    done = _run(program, case, schedule)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", ["product_without_wait", "tile_without_wait"])
def test_kernels_that_do_not_wait_give_wrong_numbers(program, case):
    for schedule in (0, 1, 2):
        done = _run(program, case, schedule)
        assert done.returncode == 1, done.stderr


def test_a_copy_over_what_the_other_block_still_reads(program):
    for schedule in (0, 1, 2):
        done = _run(program, "cluster_without_wait", schedule)
        assert done.returncode == 1, done.stderr


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("product_without_fence", "wgmma without a wgmma_fence"),
        ("one_arrival_more", "an mbarrier gets more arrivals in a phase than its init said"),
        ("use_before_init", "an mbarrier is used before its init"),
        ("block_that_leaves", "block 0 of the cluster has ended"),
        ("half_a_cluster", "a grid of 3 blocks is no whole number of clusters of 2"),
    ],
)
def test_kernels_that_break_the_rules_say_so(program, case, text):
    done = _run(program, case, 0)
    assert done.returncode < 0
    assert text in done.stderr
