"""Runs another project's own tests on the functions fastlm offers under its name.

    python tools/run_upstream_tests.py flash-attention ~/src/flash-attention

The test files are copied from a checkout of that project into a temporary folder and told to use the CPU; the
checkout is not changed and nothing of it is installed. Grids of parameters are sampled: `--at-most` cases of each
test function, evenly spread and the same ones every time. Cases with sequences over `--longest` tokens are left
out. Needs pytest and einops. The exit status is 1 if a case failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest


@dataclass(frozen=True)
class Project:
    """What is run of a project.

    Attributes:
        surface: the import name.
        files: test files, from the root of its checkout.
        edits: (pattern, replacement) pairs on top of `cuda` -> `cpu`.
    """

    surface: str
    files: tuple[str, ...]
    edits: tuple[tuple[str, str], ...] = ()


# Loops that look for races over and over.
FEWER_ROUNDS = (r"in range\((?:10000|250|50)\):", "in range(3):")
PROJECTS = {
    "mamba": Project(
        "mamba_ssm",
        ("tests/ops/test_selective_scan.py", "tests/ops/triton/test_selective_state_update.py"),
    ),
    "causal-conv1d": Project("causal_conv1d", ("tests/test_causal_conv1d.py",), (FEWER_ROUNDS,)),
    "flash-attention": Project(
        "flash_attn",
        ("tests/test_flash_attn.py",),
        (
            FEWER_ROUNDS,
            # Facts about its CUDA extension; the flag makes the test of the extension's own arguments skip itself.
            (r"from flash_attn\.flash_attn_interface import _get_block_size_n.*", "USE_TRITON_ROCM = True"),
        ),
    ),
}


class Sampler:
    """A pytest plugin: thins out the grid, counts what came of each test function.

    Args:
        at_most: cases of each test function.
        longest: tokens of the longest sequence.
    """

    def __init__(self, at_most: int, longest: int) -> None:
        self.at_most = at_most
        self.longest = longest
        self.grid: Counter[str] = Counter()
        self.results: defaultdict[str, Counter[str]] = defaultdict(Counter)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep every n-th case, n coprime to the size of the grid, so that every axis is walked through."""
        cases: defaultdict[str, list[pytest.Item]] = defaultdict(list)
        for item in items:
            cases[item.originalname].append(item)
        kept = []
        for name, grid in cases.items():
            self.grid[name] = len(grid)
            short = [item for item in grid if self._length(item) <= self.longest]
            stride = max(1, len(short) // self.at_most)
            while math.gcd(stride, len(short)) > 1:
                stride += 1
            chosen = (
                sorted({i * stride % len(short) for i in range(min(self.at_most, len(short)))})
                if short
                else []
            )
            kept += [short[i] for i in chosen]
        items[:] = kept

    @staticmethod
    def _length(item: pytest.Item) -> int:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return max(
            (n for name, n in params.items() if name.startswith("seqlen") and isinstance(n, int)), default=0
        )

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> object:
        """A clear refusal is neither a pass nor a failure."""
        try:
            return (yield)
        except NotImplementedError as error:
            refused = re.match(r"\w+: (\w+) must be", str(error))
            if refused is None:
                raise
            pytest.skip(f"refused: {refused[1]}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the outcome under the name of the test function."""
        if report.when != "call" and report.passed:
            return
        outcome = report.outcome
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            outcome = reason if reason.startswith("refused: ") else "skipped by the test"
        name = report.nodeid.split("::")[-1].split("[")[0]
        self.results[name][outcome] += 1

    def table(self) -> str:
        """One line per test function, and the sum."""
        lines = []
        for name, size in self.grid.items():
            counts = self.results[name]
            lines.append(f"{name}: {sum(counts.values())} of {size} cases: {self._words(counts)}")
        total: Counter[str] = Counter()
        for counts in self.results.values():
            total += counts
        lines.append(f"all: {sum(total.values())} of {sum(self.grid.values())} cases: {self._words(total)}")
        return "\n".join(lines)

    @staticmethod
    def _words(counts: Counter[str]) -> str:
        return ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())) or "none"


def copy_tests(project: Project, checkout: Path, folder: Path) -> list[str]:
    """The edited test files in `folder`."""
    copies = []
    for file in project.files:
        text = (checkout / file).read_text()
        for pattern, replacement in ((r"([\"'])cuda\1", r"\1cpu\1"), *project.edits):
            text = re.sub(pattern, replacement, text)
        copy = folder / Path(file).name
        copy.write_text(text)
        copies.append(str(copy))
    return copies


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("project", choices=PROJECTS)
    parser.add_argument("checkout", type=Path, help="folder of a checkout of that project")
    parser.add_argument("--at-most", type=int, default=60, help="cases of each test function (default 60)")
    parser.add_argument(
        "--longest", type=int, default=1100, help="longest sequence, in tokens (default 1100)"
    )
    parser.add_argument("-k", dest="expression", default="", help="pytest's -k: which test functions")
    args = parser.parse_args()
    project = PROJECTS[args.project]
    missing = [file for file in project.files if not (args.checkout / file).is_file()]
    if missing:
        parser.error(f"{args.checkout} has no {', '.join(missing)}")
    if importlib.util.find_spec("einops") is None:
        parser.error("these tests import einops: pip install einops")

    import torch

    import fastlm.compat

    if fastlm.compat.install(project.surface) == ():
        parser.error(f"{project.surface} is installed here: its tests would run on itself")
    # Questions the files ask about the GPU while they are loaded: answered as by one with 16 GB.
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(total_memory=16 * 2**30)

    sampler = Sampler(args.at_most, args.longest)
    with tempfile.TemporaryDirectory() as folder:
        copies = copy_tests(project, args.checkout, Path(folder))
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", folder]
        status = pytest.main([*options, "-k", args.expression, *copies], plugins=[sampler])
    print(sampler.table())
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
