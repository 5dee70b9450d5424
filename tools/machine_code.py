"""Machine code of CUDA kernels as nvdisasm prints it: instructions by kernel, and the loops among them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

WIDTHS = ("U8", "S8", "U16", "S16", "64", "128")
MEMORY = ("LDG", "STG", "LDGSTS")


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
