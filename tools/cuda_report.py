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
        ("no local memory around HGMMA", "UTMALDG", "SYNCS", "STG.128", "at most 168 registers"),
    ),
    (r"mma_(row|outer)_kernel<.*>", "", ("no local memory around HMMA", "LDSM", "LDGSTS.128")),
    (r"stream_row_kernel<.*>", "", ("no local memory around HMMA", "LDSM", "LDGSTS.128")),
    (r"route<(bfloat16|float), 8, .*>", "", ("no local memory in loops", "SHFL")),
    (r"route_gradient<(bfloat16|float), 8, .*>", "", ("no local memory in loops", "SHFL")),
    (r"select<(bfloat16|float), \d+>", "sm_90a", ("no local memory in loops", "LDG.128")),
)
WIDTHS = ("U8", "S8", "U16", "S16", "64", "128")
MEMORY = ("LDG", "STG", "LDGSTS")
COUNTED = (
    *("HGMMA", "HMMA", "LDSM", "UTMALDG", "LDGSTS.128", "LDGSTS.64", "LDGSTS"),
    *("LDG.128", "LDG.64", "LDG", "LDG.16", "STG.128", "STG.64", "STG", "STG.16"),
    *("MUFU.EX2", "FFMA", "FMUL", "FADD", "SHFL", "BAR", "SYNCS"),
)
# How much a kernel's time may hang on an instruction: what makes a loop the hot one.
WORK = {"HGMMA": 64, "HMMA": 16, "MUFU": 4, "FFMA": 1, "FMUL": 1, "FADD": 1, "DFMA": 1, "LDG": 1, "LDGSTS": 1}
SMALLEST = 8  # instructions; kernels of another architecture have an empty body


@dataclass
class Instruction:
    opcode: str  # with its suffixes
    operands: str
    conditional: bool


@dataclass
class Code:
    """The machine code of one kernel, and the place of each label in it."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


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
    local_around: dict[str, int] = field(
        default_factory=dict
    )  # matrix instruction: in the smallest loop that holds it
    instructions: Counter[str] = field(default_factory=Counter)
    hot: Counter[str] = field(default_factory=Counter)


# ---- machine code ---------------------------------------------------------------------------------------


def read_sass(text: str) -> dict[str, Code]:
    """The kernels in the output of `nvdisasm -c`, by mangled name."""
    kernels = {}
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition(":")
        code = Code()
        for line in body.splitlines():
            if line.startswith("."):
                label = re.match(r"(\.L_x_\d+):", line)
                if label:
                    code.labels[label[1]] = len(code.instructions)
                elif line.startswith((".section", ".text")):
                    break
                continue
            found = re.search(r"\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", line)
            if found:
                code.instructions.append(Instruction(found[2], found[3], found[1] is not None))
        kernels[name] = code
    return kernels


def kind(opcode: str) -> str:
    """LDG.E.128.CONSTANT -> LDG.128, LDG.E.U16 -> LDG.16, MUFU.EX2 as it is; others are cut at the first dot."""
    head, *rest = opcode.split(".")
    if head in MEMORY:
        width = next((part.lstrip("US") for part in rest if part in WIDTHS), "")
        return f"{head}.{width}" if width else head
    return opcode if opcode == "MUFU.EX2" else head


def successors(code: Code, at: int) -> list[int]:
    """Where the flow goes from instruction `at`; not to the copies of code for warps that have parted (BRA.DIV)."""
    instruction = code.instructions[at]
    head, *rest = instruction.opcode.split(".")
    following = [at + 1] if at + 1 < len(code.instructions) else []
    if head in ("EXIT", "RET", "KILL"):
        return following if instruction.conditional else []
    if head not in ("BRA", "BRX", "JMP", "JMX", "CALL") or "DIV" in rest:
        return following
    targets = [code.labels[t] for t in re.findall(r"\.L_x_\d+", instruction.operands) if t in code.labels]
    maybe = instruction.conditional or "ANY" in rest or re.match(r"!?U?P\w", instruction.operands)
    return targets + following if maybe or head == "CALL" else targets


def find_loops(code: Code) -> list[set[int]]:
    """The natural loops, each as the places of its instructions; loops with one head count as one."""
    count = len(code.instructions)
    after = [successors(code, at) for at in range(count)]
    leaders = {
        0,
        *(t for at in range(count) if after[at] != [at + 1] for t in [*after[at], at + 1] if t < count),
    }
    starts = sorted(leaders)
    blocks = {a: range(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True) if a < b}
    follow = {a: [t for t in after[block[-1]] if t in blocks] for a, block in blocks.items()}
    order = _postorder(follow)
    number = {block: i for i, block in enumerate(order)}
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for target in follow[block]:
            before[target].append(block)
    above = _dominators(order, number, before)
    bodies: dict[int, set[int]] = {}
    for block in order:
        for head in follow[block]:
            if _dominates(head, block, above):
                body = bodies.setdefault(head, {head})
                waiting = [block]
                while waiting:
                    inside = waiting.pop()
                    if inside not in body:
                        body.add(inside)
                        waiting += before[inside]
    return [{at for block in body for at in blocks[block]} for body in bodies.values()]


def _postorder(follow: dict[int, list[int]]) -> list[int]:
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(follow.get(0, [])))]
    while stack:
        block, rest = stack[-1]
        target = next((t for t in rest if t not in seen), None)
        if target is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(target)
            stack.append((target, iter(follow[target])))
    return order


def _dominators(order: list[int], number: dict[int, int], before: dict[int, list[int]]) -> dict[int, int]:
    """The closest block on every way to a block (Cooper, Harvey, Kennedy: A Simple, Fast Dominance Algorithm)."""
    above = {0: 0}
    changed = True
    while changed:
        changed = False
        for block in reversed(order):
            known = [b for b in before[block] if b in above]
            if block == 0 or not known:
                continue
            closest = known[0]
            for other in known[1:]:
                while closest != other:
                    while number[closest] < number[other]:
                        closest = above[closest]
                    while number[other] < number[closest]:
                        other = above[other]
            if above.get(block) != closest:
                above[block] = closest
                changed = True
    return above


def _dominates(head: int, block: int, above: dict[int, int]) -> bool:
    while block not in (head, 0):
        block = above[block]
    return block == head


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
