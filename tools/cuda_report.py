"""What the compiler made of the CUDA kernels: registers, spills and instructions of each, read from objects.

    python tools/cuda_report.py [BUILD] [--write] [--check] [--json FILE]

BUILD, the folder of `make cuda-report`, is `build/cuda-report` by default. `--write` puts the tables into docs/cuda-kernels.md;
`--check` fails where a kernel of `EXPECTED` is not as it should be. It needs cuobjdump and nvdisasm: from PATH, from beside nvcc,
or from an installed triton.

Loops are those of the flow graph: a jump back to a block through which every way to the jump leads. The hot loop of a kernel is the
smallest one that holds at least half of the arithmetic of any loop.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from machine_code import Code, find_loops, kind, read_sass

ROOT = Path(__file__).resolve().parents[1]

# Kernels that matter most: a pattern of the name, the architecture, and what must be found in their code. `hot X`: in the hot loop;
# `around X`: in the smallest loop that holds an X, which in a product is the one over its depth, however much its epilogue does.
EXPECTED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r"forward_kernel<ForwardShape<.*float16?, 4, 4, 32, 3.*>, false>", "", ("hot MUFU.EX2", "LDGSTS.128")),
    (
        r"forward_kernel<ForwardShape<.*float16?, 4, 4, 32, 3.*>, false>",
        "sm_90a",
        ("no local memory in the hot loop",),
    ),
    (
        r"hopper_forward<.*, (64|128)>",
        "sm_90a",
        ("no local memory in the hot loop", "hot HGMMA", "hot MUFU.EX2", "UTMALDG", "SYNCS"),
    ),
    (r"hopper_backward<.*128.*>", "sm_90a", ("no local memory in the hot loop", "hot HGMMA", "UTMALDG")),
    (
        r"forward_mma<.*>",
        "",
        ("no local memory in the hot loop", "hot HMMA", "hot LDSM", "LDGSTS.128"),
    ),
    (r"fused_hopper<.*>", "sm_90a", ("HGMMA", "UTMALDG", "MUFU.EX2")),
    (
        r"update_dense<.*, float>",
        "",
        ("no local memory in loops", "LDG.128", "STG.128", "MUFU.EX2", "at most 80 registers"),
    ),
    (
        r"forward_rows<b?float16, 4, 8>",
        "",
        ("no local memory in loops", "hot LDG.128", "hot STG.128", "hot MUFU.EX2", "at most 112 registers"),
    ),
    (
        r"backward_rows<b?float16, 4, 4>",
        "",
        ("no local memory in the hot loop", "hot LDG.64", "hot STG.64", "at most 128 registers"),
    ),
    (r"forward_channels<b?float16, 4>", "", ("no local memory in loops", "LDG.128", "STG.128")),
    (r"backward_channels<b?float16, 4>", "", ("no local memory in loops", "LDG.128", "STG.128", "SHFL")),
    (r"update_one_token<b?float16, 4>", "", ("no local memory in loops", "LDG.128", "STG.128")),
    (
        r"hopper_(row|outer)_kernel<.*>",
        "sm_90a",
        ("no local memory around HGMMA", "UTMALDG", "SYNCS", "at most 168 registers"),
    ),
    (r"hopper_(row|outer)_kernel<.* (?!Statistics)\w+<.*> >", "sm_90a", ("STG.128",)),
    (r"mma_(row|outer)_kernel<.*>", "", ("no local memory around HMMA", "LDSM", "LDGSTS.128")),
    (r"stream_row_kernel<.*>", "", ("no local memory around HMMA", "LDSM", "LDGSTS.128")),
    (r"route<(bfloat16|float), 8, .*>", "", ("no local memory in loops", "SHFL")),
    (r"route_gradient<(bfloat16|float), 8, .*>", "", ("no local memory in loops", "SHFL")),
    (r"select<bfloat16, \d+>", "sm_90a", ("no local memory in loops", "LDG.64")),
    (r"select<float, \d+>", "sm_90a", ("no local memory in loops", "LDG.128")),
)
COUNTED = (
    *("HGMMA", "HMMA", "LDSM", "UTMALDG", "LDGSTS.128", "LDGSTS.64", "LDGSTS"),
    *("LDG.128", "LDG.64", "LDG", "LDG.16", "STG.128", "STG.64", "STG", "STG.16"),
    *("MUFU.EX2", "FFMA", "FMUL", "FADD", "SHFL", "BAR", "SYNCS"),
)
# How much a kernel's time may hang on an instruction: what makes a loop the hot one.
WORK = {"HGMMA": 64, "HMMA": 16, "MUFU": 4, "FFMA": 1, "FMUL": 1, "FADD": 1, "DFMA": 1, "LDG": 1, "LDGSTS": 1}
SMALLEST = 8  # instructions; kernels of another architecture have an empty body


@dataclass
class Kernel:
    name: str
    family: str
    arch: str
    registers: int = 0
    shared: int = 0  # static, bytes
    stack: int = 0  # bytes
    total: int = 0  # instructions
    in_hot_loop: int = 0
    local: int = 0  # instructions that read or write local memory
    local_in_loops: int = 0
    local_in_hot_loop: int = 0
    local_around: dict[str, int] = field(default_factory=dict)  # by matrix instruction, as `around X` above
    instructions: Counter[str] = field(default_factory=Counter)
    hot: Counter[str] = field(default_factory=Counter)


def work(ops: Counter[str]) -> int:
    return sum(n * WORK.get(op.split(".")[0], 0) for op, n in ops.items())


def describe(kernel: Kernel, code: Code) -> None:
    """Fills the counts of `kernel` from its machine code."""
    kinds = [kind(i.opcode) for i in code.instructions]
    loops = [loop for loop in find_loops(code) if len(loop) > 1]
    weight = {id(loop): work(Counter(kinds[at] for at in loop)) for loop in loops}
    most = max(weight.values(), default=0)
    hot = min((loop for loop in loops if 2 * weight[id(loop)] >= most > 0), key=len, default=set[int]())
    local = [at for at, op in enumerate(kinds) if op in ("LDL", "STL")]
    kernel.total, kernel.in_hot_loop = len(kinds), len(hot)
    kernel.instructions, kernel.hot = Counter(kinds), Counter(kinds[at] for at in hot)
    kernel.local = len(local)
    kernel.local_in_loops = sum(any(at in loop for loop in loops) for at in local)
    kernel.local_in_hot_loop = sum(at in hot for at in local)
    for op in ("HGMMA", "HMMA"):
        holding = [loop for loop in loops if any(kinds[at] == op for at in loop)]
        if holding:
            kernel.local_around[op] = sum(at in min(holding, key=len) for at in local)


# ---- objects --------------------------------------------------------------------------------------------


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


def run(*command: str, cwd: Path | None = None, text: str | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd, input=text).stdout


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


def family_of(path: Path) -> str:
    parts = path.parts[path.parts.index("csrc") + 1 :]
    return parts[1] if parts[0] == "ops" else parts[0]


def read_object(path: Path) -> list[Kernel]:
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        run(cuobjdump, "-xelf", "all", str(path.resolve()), cwd=Path(folder))
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = re.search(r"sm_\w+?(?=\.|$)", cubin.name)
            usage = {
                mangled: dict(re.findall(r"(\w+):(\d+)", line))
                for mangled, line in re.findall(
                    r"Function (\S+):\s+(.*)", run(cuobjdump, "-res-usage", str(cubin))
                )
            }
            codes = read_sass(run(nvdisasm, "-c", str(cubin)))
            names = run("c++filt", text="\n".join(codes)).splitlines()
            for (mangled, code), name in zip(codes.items(), names, strict=True):
                if sum(i.opcode != "NOP" for i in code.instructions) <= SMALLEST:
                    continue
                used = {key: int(n) for key, n in usage.get(mangled, {}).items()}
                kernel = Kernel(shorten(name.strip()), family_of(path), arch[0] if arch else "?")
                kernel.registers, kernel.stack = used.get("REG", 0), used.get("STACK", 0)
                # 1 KiB of each block belongs to the system from sm_90 on.
                kernel.shared = max(0, used.get("SHARED", 0) - (1024 if kernel.arch >= "sm_90" else 0))
                describe(kernel, code)
                kernels.append(kernel)
    return kernels


def compiler(build: Path) -> str:
    """`Cuda compilation tools, release ...; flags ...` of the build."""
    version = run("nvcc", "--version") if shutil.which("nvcc") else "unknown"
    named = next((line for line in version.splitlines() if "release" in line), version).strip()
    commands = build / "compile_commands.json"
    if not commands.exists():
        return named
    for entry in json.loads(commands.read_text()):
        if entry["file"].endswith(".cu"):
            words = shlex.split(entry["command"])[1:]
            skipped = {"-o", "-c", "-x", "-isystem", "-MF", "-MT"}
            flags = [
                w
                for before, w in zip(["", *words], words, strict=False)
                if w.startswith("-")
                and w not in skipped
                and before not in skipped
                and w[:2] not in ("-I", "-M")
            ]
            return f"{named}; {' '.join(flags)}"
    return named


# ---- what is said about it ------------------------------------------------------------------------------


def counts(ops: Counter[str]) -> str:
    return ", ".join(f"{ops[op]} {op}" for op in COUNTED if ops[op])


def table(kernels: Iterable[Kernel]) -> str:
    rows = [
        "| kernel | arch | registers | static shared, stack | local memory (in loops, in the hot loop) "
        "| instructions | of them | hot loop | of them |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for k in sorted(kernels, key=lambda k: (k.name, k.arch)):
        local = f"{k.local} ({k.local_in_loops}, {k.local_in_hot_loop})" if k.local else "0"
        cells = (f"`{k.name}`", k.arch, k.registers, f"{k.shared}, {k.stack}", local)
        more = (k.total, counts(k.instructions), k.in_hot_loop, counts(k.hot))
        rows.append(f"| {' | '.join(str(c) for c in (*cells, *more))} |")
    return "\n".join(rows)


def is_met(k: Kernel, what: str) -> str | None:
    """None, or what was found instead."""
    limit = re.fullmatch(r"at most (\d+) registers", what)
    if limit:
        return str(k.registers) if k.registers > int(limit[1]) else None
    if what.startswith("no local memory around "):
        around = k.local_around.get(what.rsplit(" ", 1)[1])
        return "no such loop" if around is None else f"{around} instructions" if around else None
    if what.startswith("no local memory"):
        found = k.local_in_hot_loop if what.endswith("hot loop") else k.local_in_loops
        return f"{found} instructions" if found else None
    ops = k.hot if what.startswith("hot ") else k.instructions
    return None if ops[what.removeprefix("hot ")] else "none"


def violations(kernels: Sequence[Kernel]) -> list[str]:
    found = []
    for pattern, arch, wanted in EXPECTED:
        matching = [k for k in kernels if re.fullmatch(pattern, k.name) and k.arch.startswith(arch)]
        if not matching:
            found.append(f"no kernel is called {pattern}")
        for k in matching:
            missing = [(what, is_met(k, what)) for what in wanted]
            found += [f"{k.name}, {k.arch}: expected {a}, found {b}" for a, b in missing if b is not None]
    return found


HEAD = """# What the compiler made of the CUDA kernels

Written by `make cuda-report` from what it compiles with every optimisation. Compiler: {compiler}

Registers are those a launch takes; the sm_90a attention kernels share them out anew (setmaxnreg). Static shared memory and stack in
bytes; dynamic shared memory is asked for at the launch. Local memory: instructions that read or write it, and how many of these lie
in loops and in the hot loop, the smallest one with at least half of the arithmetic of any loop. Counts are of the code, not of what
runs: every path of a kernel is in them. Instances of float16 are left out: they are those of bfloat16 with other conversions.
"""


def compiled_objects(build: Path) -> list[Path]:
    """The objects of the sources there are now: a build folder keeps those of deleted ones."""
    commands = build / "compile_commands.json"
    if not commands.exists():
        return []
    entries = json.loads(commands.read_text())
    sources = [Path(e["file"]).resolve().relative_to(ROOT) for e in entries if e["file"].endswith(".cu")]
    folder = build / "CMakeFiles" / "fastlm_cuda_kernels.dir"
    return sorted({path for source in sources if (path := folder / f"{source}.o").exists()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", nargs="?", type=Path, default=ROOT / "build" / "cuda-report")
    parser.add_argument("--write", action="store_true", help="write docs/cuda-kernels.md")
    parser.add_argument("--check", action="store_true", help="fail where an expectation is not met")
    parser.add_argument("--json", type=Path, help="write everything that was found to this file")
    arguments = parser.parse_args()
    objects = compiled_objects(arguments.build)
    if not objects:
        sys.exit(f"{arguments.build} holds no compiled CUDA sources; run make cuda-report")
    # The one kernel of core/ only shows that CUTLASS compiles.
    kernels = [k for path in objects if family_of(path) != "core" for k in read_object(path)]
    families = dict.fromkeys(k.family for k in kernels)
    shown = [k for k in kernels if not re.search(r"\bfloat16\b", k.name)]
    text = "\n".join(f"\n## {f}\n\n{table(k for k in shown if k.family == f)}" for f in families)
    if arguments.json:
        found = {"compiler": compiler(arguments.build), "kernels": [vars(k) for k in kernels]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.write:
        page = HEAD.format(compiler=compiler(arguments.build)) + text + "\n"
        (ROOT / "docs" / "cuda-kernels.md").write_text(page)
    elif not arguments.json:
        print(text)
    sentences = violations(kernels)
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    if arguments.check and sentences:
        sys.exit(1)


if __name__ == "__main__":
    main()
