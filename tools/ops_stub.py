"""Writes `python/fastlm/_ops.pyi`, the types of the bound operators, from the registered schemas.

`python tools/ops_stub.py` writes the file; with `--check` it exits with 1 if the file is not what it would
write.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

STUB = Path(__file__).parent.parent / "python" / "fastlm" / "_ops.pyi"
_LINE = 110
_TYPES = ("Tensor", "int", "float", "bool", "str")


def schemas() -> list[torch.FunctionSchema]:
    """Schemas of all registered operators of fastlm, by name."""
    import fastlm  # noqa: F401  (registers them)

    found = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastlm::")]
    return sorted(found, key=lambda s: s.name)


def stub_text() -> str:
    """The whole stub file."""
    functions = [_function(schema) for schema in schemas()]
    head = '"""Types of the bound operators, generated from the schemas by tools/ops_stub.py."""\n\n'
    head += "from collections.abc import Sequence\n\n" if any("Sequence[" in f for f in functions) else ""
    head += "from torch import Tensor\n\n"
    return head + "".join(functions)


def _function(schema: torch.FunctionSchema) -> str:
    arguments, notes = [], []
    keyword_only = False
    for argument in schema.arguments:
        if argument.kwarg_only and not keyword_only:
            keyword_only = True
            arguments.append("*")
            notes.append("")
        arguments.append(_argument(argument))
        written = argument.alias_info is not None and argument.alias_info.is_write
        notes.append("  # written in place" if written else "")
    name = schema.name.removeprefix("fastlm::")
    returns = [_type(r.type) for r in schema.returns]
    result = returns[0] if len(returns) == 1 else f"tuple[{', '.join(returns)}]" if returns else "None"
    line = f"def {name}({', '.join(arguments)}) -> {result}: ...\n"
    if len(line) <= _LINE:
        return line
    body = "".join(f"    {argument},{note}\n" for argument, note in zip(arguments, notes, strict=True))
    return f"def {name}(\n{body}) -> {result}: ...\n"


def _argument(argument: torch.Argument) -> str:
    text = f"{argument.name}: {_type(argument.type)}"
    if not argument.has_default_value():
        return text
    default = argument.default_value
    if isinstance(default, str):
        return f'{text} = "{default}"'
    return f"{text} = {tuple(default) if isinstance(default, list) else default!r}"


def _type(kind: torch.JitType) -> str:
    if isinstance(kind, torch.OptionalType):
        return f"{_type(kind.getElementType())} | None"
    if isinstance(kind, torch.ListType):
        return f"Sequence[{_type(kind.getElementType())}]"
    name = str(kind)  # SymInt reads "int" here
    if name not in _TYPES:
        raise ValueError(f"ops_stub: no Python type is known for schema type {name}")
    return name


def main() -> int:
    text = stub_text()
    if "--check" in sys.argv[1:]:
        same = STUB.is_file() and STUB.read_text() == text
        if not same:
            print(f"{STUB} is not what the schemas say: run python tools/ops_stub.py", file=sys.stderr)
        return 0 if same else 1
    STUB.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
