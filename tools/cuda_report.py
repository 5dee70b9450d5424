"""What the compiler made of the CUDA kernels: registers, spills and instructions of each, read from the objects of `make cuda-check`.

    python tools/cuda_report.py [BUILD] [--write] [--check]

BUILD is `build/cuda-check` by default. `--write` puts the tables into docs/cuda-kernels.md; `--check` fails where a kernel of
`EXPECTED` is not as it should be. It needs cuobjdump and nvdisasm: from PATH, from beside nvcc, or from an installed triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Kernels that matter most: a pattern of the name, the architecture, and what must be found in its code.
EXPECTED = (
    (
        r"forward_kernel<ForwardShape<.*float16?, 4, 4, 32, 3.*>, false>",
        "",
        ("no local memory in loops", "MUFU.EX2", "LDGSTS.128"),
    ),
    (r"hopper_forward<.*, (64|128)>", "sm_90a", ("no local memory in loops", "HGMMA", "UTMALDG")),
    (r"hopper_backward<.*128.*>", "sm_90a", ("HGMMA", "UTMALDG")),
    (r"forward_mma<.*>", "", ("no local memory in loops", "HMMA", "LDSM", "LDGSTS.128")),
    (r"fused_hopper<.*>", "sm_90a", ("HGMMA", "UTMALDG", "MUFU.EX2")),
    (r"update_kernel<.*, 4>", "", ("no local memory in loops", "LDG.128", "STG.128")),
)
COUNTED = (
    "HGMMA",
    "HMMA",
    "LDSM",
    "UTMALDG",
    "LDGSTS.128",
    "LDG.128",
    "STG.128",
    "MUFU.EX2",
    "FFMA",
    "SHFL",
    "BAR",
)


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    instructions: Counter[str] = field(default_factory=Counter)
    local: int = 0
    local_in_loops: int = 0
    total: int = 0


def find_tool(name: str) -> str:
    found = shutil.which(name)
    if found:
        return found
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for folder in folders:
        if (folder / name).exists():
            return str(folder / name)
    sys.exit(f"{name} was not found: put it on PATH, or install triton, which brings one")


def run(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


def shorten(name: str) -> str:
    """`void fastlm::selective_scan::cuda::kernel<...>(Params)` -> `kernel<...>`."""
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    name = re.sub(r"\b(?:\w+::)+", "", name.removeprefix("void "))
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


def kind(opcode: str) -> str:
    """LDG.E.128.CONSTANT -> LDG.128; MUFU.EX2 stays; others are cut at the first dot."""
    head, *rest = opcode.split(".")
    if head in ("LDG", "STG", "LDGSTS"):
        widths = [w for w in rest if w in ("64", "128")]
        return f"{head}.{widths[0]}" if widths else head
    return opcode if opcode == "MUFU.EX2" else head


def read_sass(text: str) -> dict[str, tuple[Counter[str], int, int, int]]:
    """By mangled name: instructions by kind, local-memory accesses, those within loops, all instructions."""
    kernels = {}
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition(":")
        labels: dict[str, int] = {}
        code: list[str] = []
        branches: list[tuple[int, str]] = []
        for line in body.splitlines():
            if line.startswith("."):
                label = re.match(r"(\.L_x_\d+):", line)
                if label:
                    labels[label[1]] = len(code)
                elif line.startswith((".section", ".text")):
                    break
                continue
            found = re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line)
            if found:
                target = re.search(r"BRA\S* .*`\((\.L_x_\d+)\)", line)
                if target:
                    branches.append((len(code), target[1]))
                code.append(found[1])
        loops = [(labels[t], at) for at, t in branches if labels.get(t, len(code)) <= at]
        # Innermost loops: those that hold no other.
        inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        local = [i for i, op in enumerate(code) if op.startswith(("LDL", "STL"))]
        in_loops = sum(any(a <= i <= b for a, b in inner) for i in local)
        kernels[name] = (Counter(map(kind, code)), len(local), in_loops, len(code))
    return kernels


def read_object(path: Path) -> list[Kernel]:
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        run(cuobjdump, "-xelf", "all", str(path), cwd=Path(folder))
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = re.search(r"sm_\w+?(?=\.|$)", cubin.name)
            usage = run(cuobjdump, "-res-usage", str(cubin))
            registers = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", usage))
            stacks = dict(re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", usage))
            for mangled, (ops, local, in_loops, total) in read_sass(run(nvdisasm, "-c", str(cubin))).items():
                name = shorten(run("c++filt", mangled).strip())
                kernel = Kernel(
                    name,
                    arch[0] if arch else "?",
                    int(registers.get(mangled, 0)),
                    int(stacks.get(mangled, 0)),
                )
                kernel.instructions, kernel.local, kernel.local_in_loops, kernel.total = (
                    ops,
                    local,
                    in_loops,
                    total,
                )
                if total > 8:  # empty bodies: kernels of another architecture
                    kernels.append(kernel)
    return kernels


def table(kernels: list[Kernel]) -> str:
    rows = [
        "| kernel | arch | registers | stack | local memory (in loops) | instructions | of them |",
        "|---|---|---|---|---|---|---|",
    ]
    for k in sorted(kernels, key=lambda k: (k.name, k.arch)):
        counts = ", ".join(f"{k.instructions[op]} {op}" for op in COUNTED if k.instructions[op])
        local = f"{k.local} ({k.local_in_loops})"
        rows.append(f"| `{k.name}` | {k.arch} | {k.registers} | {k.stack} | {local} | {k.total} | {counts} |")
    return "\n".join(rows)


def violations(kernels: list[Kernel]) -> list[str]:
    found = []
    for pattern, arch, wanted in EXPECTED:
        matching = [k for k in kernels if re.fullmatch(pattern, k.name) and k.arch.startswith(arch)]
        if not matching:
            found.append(f"no kernel is called {pattern}")
        for k in matching:
            for what in wanted:
                if what.startswith("no local"):
                    if k.local_in_loops:
                        found.append(f"{k.name}, {k.arch}: expected {what}, found {k.local_in_loops}")
                elif not k.instructions[what]:
                    found.append(f"{k.name}, {k.arch}: expected {what}, found none")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", nargs="?", type=Path, default=ROOT / "build" / "cuda-check")
    parser.add_argument("--write", action="store_true", help="write docs/cuda-kernels.md")
    parser.add_argument("--check", action="store_true", help="fail where an expectation is not met")
    arguments = parser.parse_args()
    objects = sorted((arguments.build / "CMakeFiles" / "fastlm_cuda_kernels.dir" / "csrc").rglob("*.cu.o"))
    if not objects:
        sys.exit(f"{arguments.build} holds no compiled CUDA sources; run make cuda-check")
    families: dict[str, list[Kernel]] = {}
    for path in objects:
        parts = path.parts[path.parts.index("csrc") + 1 :]
        family = parts[1] if parts[0] == "ops" else parts[0]
        if family == "core":  # only a check that CUTLASS compiles
            continue
        families.setdefault(family, []).extend(read_object(path))
    text = "\n\n".join(f"## {family}\n\n{table(kernels)}" for family, kernels in families.items() if kernels)
    compiler = run("nvcc", "--version").splitlines()[-1].strip()
    if arguments.write:
        head = (
            "# What the compiler made of the CUDA kernels\n\nWritten by `make cuda-report` from the objects of `make cuda-check`. "
            f"Compiler: {compiler}.\n\nRegisters are those a launch takes; the sm_90a attention kernels share them out anew "
            "(setmaxnreg). Stack in bytes. Local memory: instructions\nthat read or write it, and how many of these lie in an "
            "innermost loop: a spill outside of one is paid once a tile. Counts are of the code, not of\nwhat runs: every path "
            "of a kernel is in them.\n\n"
        )
        (ROOT / "docs" / "cuda-kernels.md").write_text(head + text + "\n")
    else:
        print(text)
    found = violations([k for kernels in families.values() for k in kernels])
    for sentence in found:
        print(sentence, file=sys.stderr)
    if arguments.check and found:
        sys.exit(1)


if __name__ == "__main__":
    main()
